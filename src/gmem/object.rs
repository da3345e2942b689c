//! The object itself.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use super::layout::Layout;
use super::pin::Ledger;
use crate::addr::{ByteSize, Pgoff};
use crate::backing::Arena;
use crate::error::{Error, ErrorKind, Found, Op};
use crate::folio::{
    Account, Behind, Commitment, FolioMap, FolioPool, Placement, PrivatePlacement, Reservation,
    Shape, Wanted, Zone,
};
use crate::geometry::{FolioSize, MAX_BYTES};
use crate::identity::ObjectId;
use crate::os::memfd;
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::Stage2;
use crate::state::{
    Phase, Refusal, Shape as Blocks, Stop, Tree, Visibility, Word, enter_section, waiters,
    with_reader,
};
use crate::sync::{Mutex, RwLock};

/// Guest memory: shared and private pages side by side, inside folios that stay whole.
///
/// Clones are handles to the same object. It gives its memory back to the pool when the last handle,
/// pin and view is gone.
///
/// Its file descriptor ([`AsFd`]) names the object and nothing more: whoever maps it sees what the
/// kernel's guest_memfd shows of private pages, a `SIGBUS`. Bytes do not leave by it, because the
/// arena behind may hold other guests as well.
#[derive(Clone, Debug)]
pub struct GuestMemfd(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) name: Box<str>,
    pub(super) sides: Sides,
    pub(super) private: PlacedPrivate,
    pub(super) zones: Box<[Zone]>,
    pub(super) pages: PgoffRange,
    pub(super) tree: Tree,
    pub(super) frames: FolioMap,
    pub(super) arena: Arc<Arena>,
    pub(super) reservation: Reservation,
    pub(super) ledger: Ledger,
    pub(super) layout: RwLock<Layout>,
    /// Whom the layout names as the guest's hypervisor, for those who may not have the layout's lock.
    pub(super) guest: Mutex<Option<Weak<dyn Stage2>>>,
    pub(super) identity: OwnedFd,
}

/// Whether anybody has to look where memory is that turns private.
#[derive(Clone, Copy, Debug)]
pub(super) enum PlacedPrivate {
    /// All of it is in [`Zone::Normal`].
    Anywhere,
    /// Some may be elsewhere.
    Checked(PrivatePlacement),
}

/// Whether pages may change sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sides {
    /// They may.
    #[default]
    Convertible,
    /// They stay what they are at first. What is shared may be [pinned for good](crate::PinMode::LongTerm).
    Fixed,
}

/// What to create; from [`GuestMemfd::builder`].
#[derive(Clone, Debug)]
pub struct GuestMemfdBuilder {
    size: ByteSize,
    initial: Visibility,
    sides: Sides,
    folio_size: FolioSize,
    name: String,
    zones: Vec<Zone>,
    private: PrivatePlacement,
    placement: Placement,
    commitment: Commitment,
    account: Option<Account>,
}

impl GuestMemfdBuilder {
    /// The zones that folios may be taken from, the most wanted first; [`Zone::Normal`] alone unless said
    /// otherwise.
    #[must_use]
    pub fn zones(mut self, zones: &[Zone]) -> Self {
        zones.clone_into(&mut self.zones);
        self
    }

    /// What becomes of private memory if there are other zones than [`Zone::Normal`]; it moves there unless said
    /// otherwise.
    #[must_use]
    pub fn private_placement(mut self, placement: PrivatePlacement) -> Self {
        self.private = placement;
        self
    }

    /// What a first touch prefers: to keep the object in one run unless said otherwise.
    #[must_use]
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Whether the pool promises all that the object may ever hold; it does unless said otherwise.
    #[must_use]
    pub fn commitment(mut self, commitment: Commitment) -> Self {
        self.commitment = commitment;
        self
    }

    /// The account that is charged for the object; none unless said otherwise.
    #[must_use]
    pub fn account(mut self, account: &Account) -> Self {
        self.account = Some(account.clone());
        self
    }

    /// What every page is at first; private unless said otherwise.
    #[must_use]
    pub fn initial(mut self, visibility: Visibility) -> Self {
        self.initial = visibility;
        self
    }

    /// Whether pages may change sides; they may unless said otherwise.
    #[must_use]
    pub fn sides(mut self, sides: Sides) -> Self {
        self.sides = sides;
        self
    }

    /// How large the folios are; 2 MiB unless said otherwise.
    #[must_use]
    pub fn folio_size(mut self, size: FolioSize) -> Self {
        self.folio_size = size;
        self
    }

    /// A name for people, as in `/proc/self/fd`; at most 240 bytes, none of them zero.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Creates the object, and reserves in the pool whatever it may ever hold, unless it
    /// [overcommits](crate::Commitment::Overcommitted).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`] for a size that is zero, no multiple of 4 KiB or above 2^63 - 1
    /// (the kernel's `EINVAL`), and on hugetlb for one that is not made of whole folios of its pages' size or
    /// more; [`ErrorKind::Exhausted`] if the pool cannot promise that much, with
    /// how much it can; [`ErrorKind::Unsupported`] for a name that is too long or has a zero byte;
    /// [`ErrorKind::Os`] without a free file descriptor.
    pub fn create(self, pool: &FolioPool) -> Result<GuestMemfd, Error> {
        let op = Op::CreateObject;
        if self.size.get() > MAX_BYTES || !self.size.is_page_aligned() {
            return Err(Error::new(op, ErrorKind::InvalidSize));
        }
        if self.name.len() > 240 || self.name.contains('\0') {
            return Err(Error::new(op, ErrorKind::Unsupported)
                .because("a name has at most 240 bytes, none of them zero"));
        }
        let nr_pages = self.size.whole_pages();
        let pages = PgoffRange::new(Pgoff::new(0), nr_pages)
            .map_err(|_| Error::new(op, ErrorKind::InvalidSize))?;
        let granule = pool.view_granule();
        if self.folio_size < granule || nr_pages % granule.nr_pages() != 0 {
            return Err(Error::new(op, ErrorKind::InvalidSize).because(format!(
                "on such hugetlb pages an object is made of whole folios of {} MiB or more",
                granule.bytes().get() >> 20
            )));
        }
        let shape = Shape::new(nr_pages, self.folio_size);
        // First, so that nothing is sized by a number that the pool has not vouched for.
        let reservation = pool.reserve(Wanted {
            blocks: shape.blocks(),
            zones: &self.zones,
            private: self.private,
            placement: self.placement,
            commitment: self.commitment,
            account: self.account,
        })?;
        let private = match self.zones.iter().any(|&zone| zone != Zone::Normal) {
            true => PlacedPrivate::Checked(self.private),
            false => PlacedPrivate::Anywhere,
        };
        let inner = Arc::new(Inner {
            sides: self.sides,
            private,
            zones: self.zones.into_boxed_slice(),
            pages,
            tree: Tree::new(Blocks::of_pages(nr_pages), self.initial, waiters())?,
            frames: FolioMap::new(shape)?,
            arena: Arc::clone(pool.arena()),
            reservation,
            ledger: Ledger::new(),
            layout: RwLock::new(Layout::default()),
            guest: Mutex::new(None),
            identity: memfd::create_identity(&["gmem:", &self.name].concat())?,
            name: self.name.into_boxed_str(),
        });
        let mover: Weak<Inner> = Arc::downgrade(&inner);
        inner.reservation.set_mover(mover);
        Ok(GuestMemfd(inner))
    }
}

/// What an object holds at one moment, like `stat(2)`. Pages that change meanwhile count as one or
/// the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectStat {
    /// The size that it was created with.
    pub size: ByteSize,
    /// What its folios take of the host's memory: whole folios, less what was released of them.
    pub resident: ByteSize,
    /// Pages of its folios that were punched and not touched since.
    pub holes: ByteSize,
    /// How much of the holes the host has back. Where the backing cannot give back single pages, that is
    /// nothing.
    pub released: ByteSize,
    /// Pages that the host may see.
    pub shared: ByteSize,
    /// Pages that only the guest may see.
    pub private: ByteSize,
    /// Pages with at least one pin.
    pub pinned: ByteSize,
    /// Pages that host views have mapped, or other processes by an [`Export`](crate::Export).
    pub mapped: ByteSize,
    /// Pages that are kept out of use since a failure.
    pub quarantined: ByteSize,
    /// What the words of state take of the host's memory, on top of the object's size.
    pub metadata: ByteSize,
}

/// The state of a page at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageInfo {
    /// Who may see it.
    pub visibility: Visibility,
    /// How many pins it has, an exclusive one not among them.
    pub pins: u32,
    /// Whether a pin is exclusive, a change is under way, and so on.
    pub status: PageStatus,
    /// Whether there are bytes behind it.
    pub residency: Residency,
}

/// What holds a page at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageStatus {
    /// Nothing but the pins that are counted.
    Settled,
    /// An exclusive pin.
    ExclusivelyPinned,
    /// A conversion or a hole punch.
    Converting,
    /// An earlier failure.
    Quarantined,
}

/// Whether there are bytes behind a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residency {
    /// There are.
    Resident,
    /// There are none: it has no folio, or is a hole in one. It reads as zeroes.
    Absent,
}

impl GuestMemfd {
    /// Begins the description of an object of `size` bytes.
    pub fn builder(size: ByteSize) -> GuestMemfdBuilder {
        GuestMemfdBuilder {
            size,
            initial: Visibility::default(),
            sides: Sides::default(),
            folio_size: FolioSize::default(),
            name: String::from("guest"),
            zones: vec![Zone::default()],
            private: PrivatePlacement::default(),
            placement: Placement::default(),
            commitment: Commitment::default(),
            account: None,
        }
    }

    /// By which number a [`HostFault`](crate::HostFault) names the object.
    pub fn id(&self) -> ObjectId {
        self.0.ledger.id()
    }

    /// Whether the other is a handle to the same object.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How large it is.
    pub fn size(&self) -> ByteSize {
        self.0.pages.len_bytes()
    }

    /// All of its pages.
    pub fn pages(&self) -> PgoffRange {
        self.0.pages
    }

    /// The pool that it draws from.
    pub fn pool(&self) -> &FolioPool {
        self.0.reservation.pool()
    }

    /// The counters. Looks at every block that is the same all over, and at every folio.
    pub fn stat(&self) -> ObjectStat {
        let layout = self.0.layout.read();
        let metadata = self.0.tree.metadata();
        let mut stat = ObjectStat { size: self.size(), metadata, ..ObjectStat::default() };
        for (pages, word) in self.0.spans(self.0.pages) {
            let add = |sum: &mut ByteSize| {
                *sum = ByteSize::from_bytes(sum.get() + pages.len_bytes().get());
            };
            match (word.phase(), word.visibility()) {
                (Phase::Quarantined, _) => add(&mut stat.quarantined),
                (_, Visibility::Shared) => add(&mut stat.shared),
                (_, Visibility::Private) => add(&mut stat.private),
            }
            if word.is_held() {
                add(&mut stat.pinned);
            }
        }
        stat.mapped = ByteSize::from_pages(layout.nr_mapped());
        let (mut filled, mut holes, mut released) = (0, 0, 0);
        for (pages, behind) in self.0.frames.parts(self.0.pages) {
            match behind {
                Behind::Nothing => {}
                Behind::Frames(_) => filled += pages.nr_pages(),
                Behind::Holes(frames) => {
                    holes += pages.nr_pages();
                    if self.0.arena.why_kept(frames).is_none() {
                        released += pages.nr_pages();
                    }
                }
            }
        }
        stat.resident = ByteSize::from_pages(filled + holes - released);
        stat.holes = ByteSize::from_pages(holes);
        stat.released = ByteSize::from_pages(released);
        stat
    }

    /// Who may see which pages of the range: runs in ascending order, as long as they can be. A page
    /// that is being converted counts as what it was before.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`].
    pub fn visibility(
        &self,
        range: PgoffRange,
    ) -> Result<impl Iterator<Item = (PgoffRange, Visibility)>, Error> {
        self.0.check_range(Op::Range, range)?;
        Ok(runs(self.0.spans(range).map(|(pages, word)| (pages, word.visibility()))))
    }

    /// The state of the pages of the range: runs in ascending order, as long as they can be.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`].
    pub fn snapshot(
        &self,
        range: PgoffRange,
    ) -> Result<impl Iterator<Item = (PgoffRange, PageInfo)>, Error> {
        self.0.check_range(Op::Range, range)?;
        let object = &*self.0;
        // Blocks of state and folios do not end in the same places.
        let parts = object.spans(range).flat_map(move |(pages, word)| {
            let parts = object.frames.parts(pages);
            parts.map(move |(part, behind)| (part, info(word, behind.is_resident())))
        });
        Ok(runs(parts))
    }

    /// Where the folios of the range are: runs of pages, holes among them, and of the pool's frames, in
    /// ascending order of pages. The zone of a frame is [`FolioPool::zone_of`], its part one of
    /// [`FolioPool::parts`].
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`].
    pub fn frames_of(
        &self,
        range: PgoffRange,
    ) -> Result<impl Iterator<Item = (PgoffRange, PfnRange)>, Error> {
        self.0.check_range(Op::Range, range)?;
        Ok(self.0.frames.folios(range))
    }

    /// Makes the words of state as few as they can be, and gives what they took back to the host; says
    /// how much that was. Words multiply where pages of a larger block differ, and stay when those are
    /// alike again.
    ///
    /// Nothing about the pages changes. Accesses go on meanwhile; a pin or conversion that comes to a
    /// block in the moment in which it becomes one waits for that moment.
    ///
    /// # Errors
    /// [`ErrorKind::Os`]: that of the system call that gives memory back.
    pub fn trim(&self) -> Result<ByteSize, Error> {
        with_reader(|reader| self.0.tree.trim(reader)).map_err(|error| error.of(Op::Trim))
    }
}

impl AsFd for GuestMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.identity.as_fd()
    }
}

impl Inner {
    pub(super) fn check_range(&self, op: Op, range: PgoffRange) -> Result<(), Error> {
        if self.pages.covers(&range) {
            Ok(())
        } else {
            Err(Error::new(op, ErrorKind::OutOfRange).on(range))
        }
    }

    /// Whether there are bytes behind all of the range.
    pub(super) fn is_resident(&self, range: PgoffRange) -> bool {
        self.frames.is_resident(range)
    }

    /// The word of a page.
    pub(super) fn word(&self, page: Pgoff) -> Option<Word> {
        let _section = enter_section();
        self.tree.load(page)
    }

    /// The words of a range, each with the pages that it speaks for, as they are when the iterator gets
    /// there.
    pub(super) fn spans(&self, range: PgoffRange) -> impl Iterator<Item = (PgoffRange, Word)> {
        let mut spans = self.tree.spans(range);
        std::iter::from_fn(move || {
            // For each step: the caller may make system calls between two.
            let _section = enter_section();
            spans.next()
        })
    }

    /// The words of all pages, as they are when the iterator gets there.
    pub(super) fn words(&self) -> impl Iterator<Item = (Pgoff, Word)> {
        let spans = self.spans(self.pages);
        spans.flat_map(|(pages, word)| pages.iter().map(move |page| (page, word)))
    }

    /// The error for a range operation that stopped.
    pub(super) fn stopped(&self, op: Op, range: Option<PgoffRange>, stop: Stop) -> Error {
        let (kind, at) = match stop {
            Stop::At(page, refusal) => (kind_of(refusal), Some((page, refusal))),
            Stop::TimedOut(page, refusal) => (ErrorKind::TimedOut, Some((page, refusal))),
            Stop::Cancelled(page, refusal) => (ErrorKind::Cancelled, Some((page, refusal))),
            Stop::OutOfMemory => (ErrorKind::Exhausted, None),
        };
        let mut error = Error::new(op, kind);
        if let Some(range) = range {
            error = error.on(range);
        }
        match at {
            Some((page, refusal)) => {
                self.note_refused(op, refusal);
                error.at(page.offset(), self.found(page, refusal))
            }
            None => error,
        }
    }

    /// What was found at a page that refused.
    pub(super) fn found(&self, page: Pgoff, refusal: Refusal) -> Found {
        let owners = || self.ledger.owners_of_page(page);
        match refusal {
            Refusal::Private => Found::Private,
            Refusal::Pinned(pins) => Found::Pinned { pins, owners: owners() },
            Refusal::Saturated => Found::Pinned { pins: Word::MAX_PINS, owners: owners() },
            Refusal::Exclusive => Found::ExclusivelyPinned { owners: owners() },
            Refusal::Converting | Refusal::Folding => Found::Converting,
            Refusal::Quarantined | Refusal::NotHeld => Found::Quarantined,
        }
    }
}

fn kind_of(refusal: Refusal) -> ErrorKind {
    match refusal {
        Refusal::Private => ErrorKind::NotShared,
        Refusal::Saturated => ErrorKind::Saturated,
        Refusal::Quarantined | Refusal::NotHeld => ErrorKind::Quarantined,
        Refusal::Pinned(_) | Refusal::Exclusive | Refusal::Converting | Refusal::Folding => {
            ErrorKind::Busy
        }
    }
}

fn info(word: Word, is_resident: bool) -> PageInfo {
    PageInfo {
        visibility: word.visibility(),
        pins: word.pins(),
        status: match word.phase() {
            Phase::Settled | Phase::Folding if word.is_exclusive() => PageStatus::ExclusivelyPinned,
            Phase::Settled | Phase::Folding => PageStatus::Settled,
            Phase::Draining | Phase::Converting => PageStatus::Converting,
            Phase::Quarantined => PageStatus::Quarantined,
        },
        residency: if is_resident { Residency::Resident } else { Residency::Absent },
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemfd")
            .field("name", &self.name)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let layout = self.layout.read();
        let is_lost = |side| layout.subscribers.iter().any(|(_, it)| it.is_lost(side));
        for (slot, pfn) in self.frames.taken() {
            // A pin whose guard was forgotten may be a device that is still at work there.
            // So may be one whose subscriber has never let go.
            let unknown = |word: Word| {
                word.phase() == Phase::Quarantined || word.is_held() || is_lost(word.visibility())
            };
            let spans = self.spans(slot.pages()).filter(|&(_, word)| unknown(word));
            // What failed is out of use by itself.
            let failed = self.reservation.failed_in(pfn, slot.pages().nr_pages());
            let has_failed = |page: Pgoff| {
                let skip = page.get() - slot.pages().start().get();
                pfn.checked_add(skip).is_some_and(|pfn| failed.binary_search(&pfn).is_ok())
            };
            let is_unknown =
                spans.flat_map(|(pages, _)| pages.iter()).any(|page| !has_failed(page));
            // The pool's memory is all committed. What the host keeps to itself is lost.
            if is_unknown || self.commit_holes(Op::Allocate, slot.pages()).is_err() {
                self.reservation.quarantine(pfn);
            } else {
                self.reservation.give_back(pfn, slot.size());
            }
        }
    }
}

/// Joins neighbouring ranges that are alike.
pub(super) fn runs<T: PartialEq>(
    parts: impl Iterator<Item = (PgoffRange, T)>,
) -> impl Iterator<Item = (PgoffRange, T)> {
    let mut parts = parts.peekable();
    std::iter::from_fn(move || {
        let (first, what) = parts.next()?;
        let mut nr_pages = first.nr_pages();
        while let Some((more, _)) = parts.next_if(|(_, next)| *next == what) {
            nr_pages += more.nr_pages();
        }
        Some((PgoffRange::new(first.start(), nr_pages).ok()?, what))
    })
}
