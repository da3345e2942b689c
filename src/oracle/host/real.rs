//! The library's side: the same steps, on a real object.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::action::{GuestAct, Silence, Terms, Time};
use super::model::{NoViews, Seen};
use super::step::{Answer, Run, Step};
use super::warden::Warden;
use crate::addr::{ByteSize, Gfn, Ipa, Pfn, Pgoff};
use crate::backing::{ArenaBacking, PartSpec};
use crate::error::{Error, ErrorKind};
use crate::folio::{FolioPool, Zone};
use crate::geometry::{HUGE_PAGES, PAGE_BYTES};
use crate::gmem::{
    ConvertOptions, Export, GuestMemfd, HostView, OnSilence, OwnerTag, PinGuard, SubscribeOptions,
    Subscription, ViewOptions, ViewPath,
};
use crate::hyp::iommu::{Device, Domain};
use crate::hyp::{Exit, Hypercall, Hypervisor, MemslotId, Profile, Vcpu, Vm};
use crate::range::PgoffRange;
use crate::state::Visibility;

/// Longer than any answer takes that is meant to come.
const PLENTY: Duration = Duration::from_secs(60);
const A_MOMENT: Duration = Duration::from_millis(1);

#[derive(Debug)]
struct RealKeeper {
    subscription: Subscription,
    warden: Arc<Warden>,
    device: Device,
}

/// An object and all that looks at it.
#[derive(Debug)]
pub(super) struct Real {
    // In the order in which they let go of each other.
    vcpu: Option<Vcpu>,
    pub(super) vm: Vm,
    keepers: Vec<RealKeeper>,
    /// By the numbers of their subscriptions, those that have left as well.
    wardens: BTreeMap<u64, Arc<Warden>>,
    pins: Vec<PinGuard>,
    pub(super) exports: Vec<Export>,
    pub(super) views: Vec<HostView>,
    owner: OwnerTag,
    pub(super) memfd: GuestMemfd,
    pub(super) hypervisor: Hypervisor,
    pub(super) pool: FolioPool,
}

/// How many pages the object has, and the two zones of its pool.
pub(super) fn sizes(backing: ArenaBacking) -> (u64, [u64; 2]) {
    match backing {
        ArenaBacking::MemfdHugetlb2M => (2 * HUGE_PAGES, [3 * HUGE_PAGES, 2 * HUGE_PAGES]),
        _ => (HUGE_PAGES + 24, [2 * HUGE_PAGES + 64; 2]),
    }
}

pub(super) fn range_of(range: Run) -> Result<PgoffRange, Error> {
    PgoffRange::new(Pgoff::new(range.0), range.1)
}

fn not_allowed(what: &str) -> Error {
    Error::new(crate::error::Op::Range, ErrorKind::NotFound).because(String::from(what))
}

impl Real {
    pub(super) fn new(backing: ArenaBacking) -> Result<Self, Error> {
        let (nr_pages, [normal, movable]) = sizes(backing);
        let part = |nr_pages| PartSpec::new([backing], ByteSize::from_pages(nr_pages));
        let pool = FolioPool::builder()
            .part(part(normal), Zone::Normal)
            .part(part(movable), Zone::Movable)
            .dedicated()
            .create()?;
        let memfd = GuestMemfd::builder(ByteSize::from_pages(nr_pages))
            .zones(&[Zone::Movable, Zone::Normal])
            .initial(Visibility::Shared)
            .name("host oracle")
            .create(&pool)?;
        // The only one in which guests give pages up.
        let hypervisor = Hypervisor::with(&pool, Profile::Android618)?;
        let vm = hypervisor.create_vm()?;
        Ok(Self {
            vcpu: Some(vm.create_vcpu()?),
            vm,
            keepers: Vec::new(),
            wardens: BTreeMap::new(),
            pins: Vec::new(),
            exports: Vec::new(),
            views: Vec::new(),
            owner: memfd.register_owner("oracle")?,
            memfd,
            hypervisor,
            pool,
        })
    }

    /// What an attempt to map a view by each path is answered here, if it is a refusal that always comes.
    pub(super) fn no_views(&self) -> Result<NoViews, Error> {
        const PATHS: [ViewPath; 4] = [
            ViewPath::Best,
            ViewPath::UserfaultfdSyscall,
            ViewPath::UserfaultfdDevice,
            ViewPath::Fixed,
        ];
        // An object of its own would be one too many for the pool, and this one is to have no memory yet.
        let all = [self.memfd.pages()];
        let to = |side| self.memfd.convert_ranges(&all, side, &ConvertOptions::default());
        let _ = to(Visibility::Private)?;
        let mut no_views = NoViews::new();
        for path in PATHS {
            if let Err(error) = self.memfd.map_view_with(&ViewOptions::default().path(path)) {
                let expected = match self.pool.backing() {
                    ArenaBacking::Heap => ErrorKind::Unsupported,
                    _ => ErrorKind::MissingCapability,
                };
                if error.kind() != expected {
                    return Err(error);
                }
                no_views.push((path, error.into()));
            }
        }
        let _ = to(Visibility::Shared)?;
        Ok(no_views)
    }

    /// Does a step, and says what the library answered.
    pub(super) fn apply(&mut self, step: &Step) -> Answer {
        self.try_apply(step).unwrap_or_else(Answer::from)
    }

    fn try_apply(&mut self, step: &Step) -> Result<Answer, Error> {
        let missing = || not_allowed("the runner has lost count");
        match *step {
            Step::MapView { path, mapping } => {
                let options = ViewOptions::default().path(path).mapping(mapping);
                self.views.push(self.memfd.map_view_with(&options)?);
            }
            Step::DropView { view } => drop(self.views.remove(view)),
            Step::RegainHuge { view } => {
                let view = self.views.get(view).ok_or_else(missing)?;
                view.regain_huge(self.memfd.pages())?;
            }
            Step::Convert { ref ranges, to, content } => {
                let ranges =
                    ranges.iter().map(|&range| range_of(range)).collect::<Result<Vec<_>, _>>()?;
                let options = ConvertOptions::default().content(content);
                let done = self.memfd.convert_ranges(&ranges, to, &options)?;
                return Ok(Answer::Changed(done.changed_pages()));
            }
            Step::Punch { range } => drop(self.memfd.punch_hole(range_of(range)?)?),
            Step::Allocate { range } => self.memfd.allocate(range_of(range)?)?,
            Step::Migrate { range, to } => {
                let done = self.memfd.migrate(range_of(range)?, to)?;
                let refused = done.refused.into_iter();
                let refused = refused
                    .map(|(pages, why)| ((pages.start().get(), pages.nr_pages()), why.into()));
                return Ok(Answer::Moved(done.moved.whole_pages(), refused.collect()));
            }
            Step::Pin { range, mode } => {
                let pin = self.memfd.pin(range_of(range)?, self.owner, mode)?;
                self.pins.push(pin.into_owned());
            }
            Step::Unpin { pin } => drop(self.pins.remove(pin)),
            Step::Write { range, byte } => {
                let range = range_of(range)?;
                let bytes = vec![byte; crate::geometry::index(range.len_bytes().get())];
                self.memfd.write(range.start_offset(), &bytes)?;
            }
            Step::Read { page } => {
                let mut bytes = [0xa5; PAGE_BYTES];
                self.memfd.read(Pgoff::new(page).offset(), &mut bytes)?;
                return all_alike(&bytes);
            }
            Step::Export { range } => {
                self.exports.push(self.memfd.export(range_of(range)?, self.owner)?);
            }
            Step::Return { export } => drop(self.exports.remove(export)),
            Step::Subscribe { terms } => self.subscribe(terms)?,
            Step::Leave { who } => {
                let RealKeeper { subscription, warden, .. } = self.keepers.remove(who);
                drop(subscription);
                warden.forget();
            }
            Step::Change { who, mood, can_be_fenced } => {
                let keeper = self.keepers.get(who).ok_or_else(missing)?;
                keeper.warden.change(mood, can_be_fenced);
            }
            Step::Dma { who, at, byte } => return self.dma(who, at, byte),
            Step::Bind { id, at, range } => {
                let id = MemslotId::from_u16(id).ok_or_else(missing)?;
                self.vm.bind_slot(id, Gfn::new(at), &self.memfd, range_of(range)?)?;
            }
            Step::Unbind { id } => self.vm.unbind(MemslotId::from_u16(id).ok_or_else(missing)?)?,
            Step::Guest { at, act, byte } => return self.guest_acts(Gfn::new(at), act, byte),
            Step::Teardown => {
                self.vcpu = None;
                self.vm.teardown()?;
                self.vm = self.hypervisor.create_vm()?;
                self.vcpu = Some(self.vm.create_vcpu()?);
            }
            Step::Examine => {}
        }
        Ok(Answer::Done)
    }

    fn subscribe(&mut self, terms: Terms) -> Result<(), Error> {
        let domain = Domain::new(&self.pool, terms.places.into())?;
        let device = domain.attach_device();
        let warden = Arc::new(Warden::new(domain, terms.time));
        let options = SubscribeOptions::default()
            .side(terms.side)
            .on_silence(match terms.silence {
                Silence::Refuses => OnSilence::RefuseConversion,
                Silence::Fences => OnSilence::FenceOff,
            })
            .answer_within(match terms.time {
                Time::None => Duration::ZERO,
                Time::Some => A_MOMENT,
                Time::Plenty => PLENTY,
            });
        let subscription = self.memfd.subscribe_with(Arc::clone(&warden) as _, options)?;
        self.wardens.insert(self.wardens.len() as u64, Arc::clone(&warden));
        self.keepers.push(RealKeeper { subscription, warden, device });
        Ok(())
    }

    /// What the one with this number has mapped: places, and frames.
    pub(super) fn domain(&self, nr: u64) -> Option<&Domain> {
        self.wardens.get(&nr).map(|warden| &warden.domain)
    }

    pub(super) fn subscription(&self, who: usize) -> Option<&Subscription> {
        self.keepers.get(who).map(|keeper| &keeper.subscription)
    }

    /// Those who are late carry out what they were asked.
    pub(super) fn catch_up(&self) -> Result<(), String> {
        self.keepers.iter().try_for_each(|keeper| keeper.warden.catch_up())
    }

    pub(super) fn dma(&self, who: usize, at: u64, byte: u8) -> Result<Answer, Error> {
        let keeper = self.keepers.get(who).ok_or_else(|| not_allowed("no such device"))?;
        let at = Gfn::new(at).ipa();
        if byte > 0 {
            return Ok(match keeper.device.write(at, &[byte; PAGE_BYTES]) {
                Ok(()) => Answer::Done,
                Err(fault) => Answer::Dma(fault.kind),
            });
        }
        let mut bytes = [0xa5; PAGE_BYTES];
        match keeper.device.read(at, &mut bytes) {
            Ok(()) => all_alike(&bytes),
            Err(fault) => Ok(Answer::Dma(fault.kind)),
        }
    }

    fn guest_acts(&mut self, at: Gfn, act: GuestAct, byte: u8) -> Result<Answer, Error> {
        let vcpu = self.vcpu.as_mut().ok_or_else(|| not_allowed("no guest"))?;
        let ipa: Ipa = at.ipa();
        let outcome = match act {
            GuestAct::Store => vcpu.store(ipa, &[byte; PAGE_BYTES]).map(|()| None),
            GuestAct::Share => vcpu.hvc(Hypercall::MemShare(ipa)).map(Some),
            GuestAct::Unshare => vcpu.hvc(Hypercall::MemUnshare(ipa)).map(Some),
            GuestAct::Relinquish => vcpu.hvc(Hypercall::MemRelinquish(ipa)).map(Some),
        };
        Ok(match outcome {
            Ok(None) => Answer::Done,
            Ok(Some(result)) => Answer::Granted(result.is_success()),
            Err(Exit::Conversion(request)) => {
                // The guest hears what is there, not what we say.
                let _ = request.convert();
                Answer::Granted(vcpu.answer()?.is_success())
            }
            Err(Exit::Mmio { .. }) => Answer::NoSlot,
            Err(Exit::MemoryFault { .. }) => Answer::NotPrivate,
            Err(Exit::Failed(error)) => return Err(error),
            Err(_) => return Err(not_allowed("an exit that nobody asked for")),
        })
    }

    /// First frames of the folios.
    pub(super) fn frames(&self) -> BTreeMap<u64, Pfn> {
        self.memfd.folios().into_iter().map(|(page, pfn)| (page.get(), pfn)).collect()
    }

    /// Zones of the folios.
    pub(super) fn seen(&self) -> Seen {
        let frames = self.frames().into_iter();
        frames.map(|(page, pfn)| (page, self.pool.zone_of(pfn))).collect()
    }

    /// All goes but the pool and those who never let go.
    pub(super) fn into_pool(self) -> FolioPool {
        let Self { pool, .. } = self;
        pool
    }
}

/// The byte that all of them are.
fn all_alike(bytes: &[u8]) -> Result<Answer, Error> {
    match bytes {
        // Each is what the one before it is.
        [first, rest @ ..] if Some(rest) == bytes.get(..rest.len()) => Ok(Answer::Byte(*first)),
        _ => Err(not_allowed("a page that nobody has filled like that")),
    }
}
