//! The library's side: the same steps, on real objects.

use std::collections::BTreeSet;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::action::{Asked, Door, Patience};
use super::answer::{Answer, PageFacts, PunchFacts, run_of};
use super::facts::{ObjectFacts, PoolFacts};
use super::model::NoViews;
use super::step::{How, Owner, STRANGER, Step, pattern};
use crate::addr::{ByteSize, Offset, Pgoff};
use crate::backing::ArenaBacking;
use crate::error::{Error, ErrorKind};
use crate::folio::FolioPool;
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::gmem::{
    ConvertOptions, GuestMemfd, HandOutRun, HostView, PageInfo, PageStatus, PinGuard, PinMode,
    Residency, SubscribeOptions, Subscriber, Subscription, ViewOptions, ViewPath,
};
use crate::range::PgoffRange;
use crate::state::{Ack, CancelToken, Visibility, Wait};

/// What a buffer holds before it is read into.
const UNTOUCHED: u8 = 0xa5;

const PATHS: [ViewPath; 4] =
    [ViewPath::Best, ViewPath::UserfaultfdSyscall, ViewPath::UserfaultfdDevice, ViewPath::Fixed];

#[derive(Debug)]
struct RealObject {
    /// With what it has been told of: a subscription keeps the object alive, as a handle does.
    handle: Option<(GuestMemfd, [Subscription; 2])>,
    /// What subscribers of either side have been told.
    told: [Arc<Told>; 2],
    views: Vec<HostView>,
}

/// The pages that a subscriber has.
#[derive(Debug, Default)]
struct Told(Mutex<BTreeSet<u64>>);

impl Told {
    fn each(&self, runs: &[HandOutRun], seen: impl Fn(&mut BTreeSet<u64>, u64)) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = runs.iter().flat_map(|run| run.pages.iter());
        pages.for_each(|page| seen(&mut told, page.get()));
    }
}

impl Subscriber for Told {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        self.each(runs, |told, page| {
            told.remove(&page);
        });
        // Nobody gives up on it within this call.
        let _ = ack.let_go();
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.each(runs, |told, page| {
            told.insert(page);
        });
    }
}

impl Patience {
    fn wait(self) -> Wait {
        let token = CancelToken::new();
        token.cancel();
        match self {
            Self::None => Wait::never(),
            Self::Expired => Wait::at_most(Duration::ZERO),
            Self::Cancelled => Wait::until_cancelled(&token),
        }
    }
}

/// A pool, its objects and their pins as they are.
#[derive(Debug)]
pub(super) struct Real {
    // Before the objects, so that a run that ends early drops them in the usual order.
    pins: Vec<(usize, PinGuard)>,
    objects: Vec<RealObject>,
    pool: FolioPool,
}

impl Asked {
    fn born(self) -> Result<PgoffRange, Error> {
        match self {
            Self::Pages { start, nr_pages } => PgoffRange::new(Pgoff::new(start), nr_pages),
            Self::Bytes { start, len } => {
                PgoffRange::from_bytes(Offset::new(start), ByteSize::from_bytes(len))
            }
        }
    }
}

/// What a step may run into that is no answer at all.
#[derive(Debug)]
pub(super) enum Trouble {
    Refused(Error),
    /// The library contradicts itself, or the runner does.
    Nonsense(String),
}

impl Trouble {
    pub(super) fn in_words(self) -> String {
        match self {
            Self::Refused(error) => format!("refused: {error}"),
            Self::Nonsense(what) => what,
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

fn nonsense<T>(what: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Nonsense(what.into()))
}

impl Real {
    pub(super) fn new(backing: ArenaBacking, nr_pages: u64) -> Result<Self, Error> {
        let pool = FolioPool::new(backing, ByteSize::from_pages(nr_pages))?;
        Ok(Self { pins: Vec::new(), objects: Vec::new(), pool })
    }

    /// What an attempt to map a view by each path is answered here, if it is a refusal that always comes.
    pub(super) fn no_views(&self) -> Result<NoViews, Error> {
        let probe = GuestMemfd::builder(FolioSize::Huge2M.bytes()).create(&self.pool)?;
        let mut no_views = NoViews::new();
        for path in PATHS {
            let Err(error) = probe.map_view_with(&ViewOptions::default().path(path)) else {
                continue;
            };
            match (error.kind(), self.pool.backing()) {
                (ErrorKind::Unsupported, ArenaBacking::Heap) => {}
                (ErrorKind::MissingCapability, backing) if backing != ArenaBacking::Heap => {}
                _ => return Err(error),
            }
            no_views.push((path, error.into()));
        }
        Ok(no_views)
    }

    pub(super) fn pool(&self) -> &FolioPool {
        &self.pool
    }

    /// An object, by whatever still refers to it.
    pub(super) fn memfd(&self, object: usize) -> Option<&GuestMemfd> {
        let it = self.objects.get(object)?;
        let by_pin = || self.pins.iter().find(|(of, _)| *of == object).map(|(_, pin)| pin.memfd());
        it.handle
            .as_ref()
            .map(|(memfd, _)| memfd)
            .or_else(|| it.views.first().map(HostView::memfd))
            .or_else(by_pin)
    }

    /// The pages that a subscriber of this side has of the object, as long as that has a handle.
    pub(super) fn told(&self, object: usize, side: Visibility) -> Option<Vec<u64>> {
        let it = self.objects.get(object).filter(|it| it.handle.is_some())?;
        let [shared, private] = &it.told;
        let told = match side {
            Visibility::Shared => shared,
            Visibility::Private => private,
        };
        Some(told.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect())
    }

    pub(super) fn views(&self, object: usize) -> &[HostView] {
        self.objects.get(object).map_or(&[], |it| it.views.as_slice())
    }

    /// Does a step, and says what the library answered.
    ///
    /// # Errors
    /// In words, if the library contradicts itself.
    pub(super) fn apply(&mut self, step: &Step) -> Result<Answer, String> {
        match self.try_apply(step) {
            Ok(answer) => Ok(answer),
            Err(Trouble::Refused(error)) => Ok(Answer::Refused(error.into())),
            Err(Trouble::Nonsense(what)) => Err(what),
        }
    }

    fn of(&self, object: usize) -> Result<&GuestMemfd, Trouble> {
        match self.memfd(object) {
            Some(memfd) => Ok(memfd),
            None => nonsense(format!("object {object} is gone")),
        }
    }

    fn try_apply(&mut self, step: &Step) -> Result<Answer, Trouble> {
        match *step {
            Step::Create { bytes, folio, initial } => self.create(bytes, folio, initial)?,
            Step::Drop { object } => {
                if let Some(object) = self.objects.get_mut(object) {
                    object.handle = None;
                }
            }
            Step::Allocate { object, range } => self.of(object)?.allocate(range.born()?)?,
            Step::Punch { object, range } => {
                let punched = self.of(object)?.punch_hole(range.born()?)?;
                return Ok(Answer::Punched(PunchFacts {
                    returned: pages(punched.returned())?,
                    released: pages(punched.released())?,
                    kept: pages(punched.kept())?,
                    why_kept: punched.why_kept(),
                }));
            }
            Step::Pin { object, range, owner, mode, patience } => {
                self.pin(object, range, owner, mode, &patience.wait())?;
            }
            Step::Unpin { pin } => {
                if pin < self.pins.len() {
                    drop(self.pins.remove(pin));
                }
            }
            Step::Convert { object, ref ranges, to, how } => {
                let ranges =
                    ranges.iter().map(|range| range.born()).collect::<Result<Vec<_>, _>>()?;
                let How { content, most_culprits, patience } = how;
                let most = NonZeroU32::new(most_culprits.into()).unwrap_or(NonZeroU32::MIN);
                let options = ConvertOptions::default().content(content).wait(patience.wait());
                let options = options.most_culprits(most);
                let done = self.of(object)?.convert_ranges(&ranges, to, &options)?;
                return Ok(Answer::Changed(done.changed_pages()));
            }
            Step::Trim { object } => self.trim(object)?,
            Step::Read { object, at, len, door } => return self.read(object, at, len, door),
            Step::Write { object, at, len, seed, door } => {
                let (at, bytes) = (Offset::new(at), pattern(seed, at, len));
                match (door, self.views(object).first()) {
                    (Door::View, Some(view)) => view.write(at, &bytes)?,
                    _ => self.of(object)?.write(at, &bytes)?,
                }
            }
            Step::Load { object, at, door } => {
                let at = Offset::new(at);
                return Ok(Answer::Word(match (door, self.views(object).first()) {
                    (Door::View, Some(view)) => view.load_u64(at)?,
                    _ => self.of(object)?.load_u64(at)?,
                }));
            }
            Step::Store { object, at, value, door } => {
                let at = Offset::new(at);
                match (door, self.views(object).first()) {
                    (Door::View, Some(view)) => view.store_u64(at, value)?,
                    _ => self.of(object)?.store_u64(at, value)?,
                }
            }
            Step::MapView { object, path, mapping } => {
                let options = ViewOptions::default().path(path).mapping(mapping);
                let view = self.of(object)?.map_view_with(&options)?;
                if let Some(object) = self.objects.get_mut(object) {
                    object.views.push(view);
                }
            }
            Step::DropView { object, view } => {
                if let Some(object) = self.objects.get_mut(object) {
                    if view < object.views.len() {
                        drop(object.views.remove(view));
                    }
                }
            }
            Step::Visibility { object, range } => return self.sides(object, range.born()?),
            Step::Snapshot { object, range } => return self.pages(object, range.born()?),
            Step::Owners { object, range } => return self.owners(object, range.born()?),
            Step::Examine => {}
        }
        Ok(Answer::Done)
    }

    fn create(&mut self, bytes: u64, folio: FolioSize, initial: Visibility) -> Result<(), Trouble> {
        let memfd = GuestMemfd::builder(ByteSize::from_bytes(bytes))
            .folio_size(folio)
            .initial(initial)
            .name("oracle")
            .create(&self.pool)?;
        if memfd.size().get() != bytes || memfd.pages().len_bytes().get() != bytes {
            return nonsense(format!("{bytes:#x} bytes wanted, {} made", memfd.size()));
        }
        let told = [(); 2].map(|()| Arc::new(Told::default()));
        let [shared, private] = &told;
        let of_private = SubscribeOptions::default().side(Visibility::Private);
        let subscriptions = [
            memfd.subscribe(Arc::clone(shared) as _)?,
            memfd.subscribe_with(Arc::clone(private) as _, of_private)?,
        ];
        let handle = Some((memfd, subscriptions));
        self.objects.push(RealObject { handle, told, views: Vec::new() });
        Ok(())
    }

    fn pin(
        &mut self,
        object: usize,
        range: Asked,
        owner: Owner,
        mode: PinMode,
        wait: &Wait,
    ) -> Result<(), Trouble> {
        let (of, name) = match owner {
            Owner::Named(name) => (object, name),
            Owner::TagOf(other) => (other, STRANGER),
        };
        let tag = self.of(of)?.register_owner(name)?;
        if self.of(of)?.register_owner(name)? != tag {
            return nonsense(format!("{name} got two tags"));
        }
        let range = range.born()?;
        let guard = self.of(object)?.pin_waiting(range, tag, mode, wait)?.into_owned();
        if (guard.range(), guard.owner(), guard.mode()) != (range, tag, mode) {
            return nonsense(format!("{guard:?} is not what was asked for"));
        }
        self.pins.push((object, guard));
        Ok(())
    }

    /// Words are as few as can be where that is easy to say: all pages alike, and nobody holds one.
    fn trim(&self, object: usize) -> Result<(), Trouble> {
        let memfd = self.of(object)?;
        let before = memfd.stat().metadata.get();
        let given_back = memfd.trim()?.get();
        let stat = memfd.stat();
        let alike = stat.pinned.get() == 0 && (stat.shared.get() == 0 || stat.private.get() == 0);
        let after = stat.metadata.get();
        // Of 2 MiB or less the words of all blocks are there from the start, and stay.
        let least = match stat.size.whole_pages() {
            nr_pages @ ..=HUGE_PAGES => 8 * (nr_pages + 2),
            _ => 8,
        };
        if after.checked_add(given_back) != Some(before) || alike && after != least {
            return nonsense(format!("{before} bytes, {given_back} given back, {after} left"));
        }
        Ok(())
    }

    fn read(&self, object: usize, at: u64, len: u64, door: Door) -> Result<Answer, Trouble> {
        let at = Offset::new(at);
        let mut bytes: Vec<u8> = (0..len).map(|_| UNTOUCHED).collect();
        let outcome = match (door, self.views(object).first()) {
            (Door::View, Some(view)) => view.read(at, &mut bytes),
            _ => self.of(object)?.read(at, &mut bytes),
        };
        match outcome {
            Ok(()) => Ok(Answer::Bytes(bytes)),
            Err(_) if bytes.iter().any(|&byte| byte != UNTOUCHED) => {
                nonsense("a read that was refused has copied something")
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn sides(&self, object: usize, range: PgoffRange) -> Result<Answer, Trouble> {
        let runs = self.of(object)?.visibility(range)?;
        Ok(Answer::Sides(runs.map(|(range, side)| (run_of(range), side)).collect()))
    }

    pub(super) fn pages(&self, object: usize, range: PgoffRange) -> Result<Answer, Trouble> {
        let mut pages = Vec::new();
        for (range, info) in self.of(object)?.snapshot(range)? {
            let exclusive = match info.status {
                PageStatus::Settled => false,
                PageStatus::ExclusivelyPinned => true,
                _ => return nonsense(format!("nobody is at work, but {range}: {info:?}")),
            };
            let PageInfo { visibility, pins, residency, .. } = info;
            let resident = residency == Residency::Resident;
            pages.push((run_of(range), PageFacts { visibility, pins, exclusive, resident }));
        }
        Ok(Answer::Pages(pages))
    }

    pub(super) fn owners(&self, object: usize, range: PgoffRange) -> Result<Answer, Trouble> {
        let names = self.of(object)?.owners(range);
        Ok(Answer::Names(names.iter().map(|name| String::from(&**name)).collect()))
    }

    pub(super) fn object_facts(&self, object: usize) -> Result<ObjectFacts, Trouble> {
        let stat = self.of(object)?.stat();
        Ok(ObjectFacts {
            size: pages(stat.size)?,
            resident: pages(stat.resident)?,
            holes: pages(stat.holes)?,
            released: pages(stat.released)?,
            shared: pages(stat.shared)?,
            private: pages(stat.private)?,
            pinned: pages(stat.pinned)?,
            mapped: pages(stat.mapped)?,
            quarantined: pages(stat.quarantined)?,
        })
    }

    pub(super) fn pool_facts(&self) -> Result<PoolFacts, Trouble> {
        let stat = self.pool.stat();
        Ok(PoolFacts {
            capacity: pages(stat.capacity)?,
            free: pages(stat.free)?,
            reserved: pages(stat.reserved)?,
            used: pages(stat.used)?,
            quarantined: pages(stat.quarantined)?,
        })
    }
}

/// A counter in pages.
fn pages(size: ByteSize) -> Result<u64, Trouble> {
    if size.is_page_aligned() {
        Ok(size.whole_pages())
    } else {
        nonsense(format!("a counter says {size} bytes, which is no number of pages"))
    }
}
