//! The object itself.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::layout::Layout;
use super::pin::Ledger;
use crate::addr::{ByteSize, Pgoff};
use crate::backing::Arena;
use crate::error::{Error, ErrorKind, Found, Op};
use crate::folio::{FolioMap, FolioPool, Reservation, Shape};
use crate::geometry::{FolioSize, HUGE_PAGES, MAX_BYTES};
use crate::os::memfd;
use crate::range::PgoffRange;
use crate::state::{Phase, Refusal, Stop, Table, Visibility, Word};
use crate::sync::RwLock;

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
    pub(super) pages: PgoffRange,
    pub(super) table: Table,
    pub(super) frames: FolioMap,
    pub(super) arena: Arc<Arena>,
    pub(super) reservation: Reservation,
    pub(super) ledger: Ledger,
    pub(super) layout: RwLock<Layout>,
    pub(super) identity: OwnedFd,
}

/// What to create; from [`GuestMemfd::builder`].
#[derive(Clone, Debug)]
pub struct GuestMemfdBuilder {
    size: ByteSize,
    initial: Visibility,
    folio_size: FolioSize,
    name: String,
}

impl GuestMemfdBuilder {
    /// What every page is at first; private unless said otherwise.
    #[must_use]
    pub fn initial(mut self, visibility: Visibility) -> Self {
        self.initial = visibility;
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

    /// Creates the object, and reserves in the pool whatever it may ever hold.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`] for a size that is zero, no multiple of 4 KiB or above 2^63 - 1
    /// (the kernel's `EINVAL`); [`ErrorKind::Exhausted`] if the pool cannot promise that much, with
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
        if pool.view_granule() == FolioSize::Huge2M
            && (self.folio_size != FolioSize::Huge2M || nr_pages % HUGE_PAGES != 0)
        {
            return Err(Error::new(op, ErrorKind::InvalidSize)
                .because("on hugetlb an object is made of whole folios of 2 MiB"));
        }
        let shape = Shape::new(nr_pages, self.folio_size);
        // First, so that nothing is sized by a number that the pool has not vouched for.
        let (huge, base) = shape.nr_folios();
        let reservation = pool.reserve(huge, base)?;
        Ok(GuestMemfd(Arc::new(Inner {
            pages,
            table: Table::new(nr_pages, self.initial)?,
            frames: FolioMap::new(shape)?,
            arena: Arc::clone(pool.arena()),
            reservation,
            ledger: Ledger::new(),
            layout: RwLock::new(Layout::default()),
            identity: memfd::create_identity(&format!("gmem:{}", self.name))?,
            name: self.name.into_boxed_str(),
        })))
    }
}

/// What an object holds at one moment, like `stat(2)`. Pages that change meanwhile count as one or
/// the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectStat {
    /// The size that it was created with.
    pub size: ByteSize,
    /// What its folios take of the pool, in whole folios.
    pub resident: ByteSize,
    /// Pages that the host may see.
    pub shared: ByteSize,
    /// Pages that only the guest may see.
    pub private: ByteSize,
    /// Pages with at least one pin.
    pub pinned: ByteSize,
    /// Pages that host views have mapped.
    pub mapped: ByteSize,
    /// Pages that are kept out of use since a failure.
    pub quarantined: ByteSize,
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
    /// Whether there is a folio behind it.
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

/// Whether there is a folio behind a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residency {
    /// There is.
    Resident,
    /// There is none; the page reads as zeroes and takes no memory.
    Absent,
}

impl GuestMemfd {
    /// Begins the description of an object of `size` bytes.
    pub fn builder(size: ByteSize) -> GuestMemfdBuilder {
        GuestMemfdBuilder {
            size,
            initial: Visibility::default(),
            folio_size: FolioSize::default(),
            name: String::from("guest"),
        }
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

    /// The counters. Looks at every page.
    pub fn stat(&self) -> ObjectStat {
        let layout = self.0.layout.read();
        let mut stat = ObjectStat { size: self.size(), ..ObjectStat::default() };
        let add = |sum: &mut ByteSize| *sum = ByteSize::from_bytes(sum.get() + 4096);
        for (_, word) in self.0.words(self.0.pages) {
            match (word.phase(), word.visibility()) {
                (Phase::Quarantined, _) => add(&mut stat.quarantined),
                (_, Visibility::Shared) => add(&mut stat.shared),
                (_, Visibility::Private) => add(&mut stat.private),
            }
            if word.pins() > 0 || word.is_exclusive() {
                add(&mut stat.pinned);
            }
        }
        stat.mapped = ByteSize::from_pages(layout.nr_mapped());
        for slot in self.0.frames.shape().slots(self.0.pages) {
            if self.0.frames.get(&slot).is_some() {
                stat.resident =
                    ByteSize::from_bytes(stat.resident.get() + slot.size().bytes().get());
            }
        }
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
        Ok(runs(self.0.words(range).map(|(page, word)| (page, word.visibility()))))
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
        Ok(runs(self.0.words(range).map(|(page, word)| (page, self.0.info(page, word)))))
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

    /// Whether all of the range has folios.
    pub(super) fn is_resident(&self, range: PgoffRange) -> bool {
        self.frames.shape().slots(range).all(|slot| self.frames.get(&slot).is_some())
    }

    /// The words of the range's pages, as they are when the iterator gets there.
    pub(super) fn words(&self, range: PgoffRange) -> impl Iterator<Item = (Pgoff, Word)> {
        range.iter().filter_map(|page| Some((page, self.table.load(page)?)))
    }

    fn info(&self, page: Pgoff, word: Word) -> PageInfo {
        PageInfo {
            visibility: word.visibility(),
            pins: word.pins(),
            status: match word.phase() {
                Phase::Settled if word.is_exclusive() => PageStatus::ExclusivelyPinned,
                Phase::Settled => PageStatus::Settled,
                Phase::Converting => PageStatus::Converting,
                Phase::Quarantined => PageStatus::Quarantined,
            },
            residency: match self.frames.frame(page) {
                Some(_) => Residency::Resident,
                None => Residency::Absent,
            },
        }
    }

    /// The error for a range operation that stopped.
    pub(super) fn stopped(&self, op: Op, range: PgoffRange, stop: Stop) -> Error {
        let (page, refusal) = match stop {
            Stop::At(page, refusal) => (page, refusal),
            Stop::OutOfMemory => return Error::new(op, ErrorKind::Exhausted).on(range),
        };
        let owners = || self.ledger.owners_of_page(page);
        let (kind, found) = match refusal {
            Refusal::Private => (ErrorKind::NotShared, Found::Private),
            Refusal::Pinned(pins) => (ErrorKind::Busy, Found::Pinned { pins, owners: owners() }),
            Refusal::Exclusive => (ErrorKind::Busy, Found::ExclusivelyPinned { owners: owners() }),
            Refusal::Converting => (ErrorKind::Busy, Found::Converting),
            Refusal::Quarantined | Refusal::NotHeld => (ErrorKind::Quarantined, Found::Quarantined),
            Refusal::Saturated => {
                (ErrorKind::Saturated, Found::Pinned { pins: Word::MAX_PINS, owners: owners() })
            }
        };
        Error::new(op, kind).on(range).at(page.offset(), found)
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
        for slot in self.frames.shape().slots(self.pages) {
            let Some(pfn) = self.frames.get(&slot) else { continue };
            let quarantined =
                self.words(slot.pages()).any(|(_, word)| word.phase() == Phase::Quarantined);
            if quarantined {
                self.reservation.quarantine(slot.size());
            } else {
                self.reservation.give_back(pfn, slot.size());
            }
        }
    }
}

/// Joins neighbouring pages that are alike.
pub(super) fn runs<T: PartialEq>(
    pages: impl Iterator<Item = (Pgoff, T)>,
) -> impl Iterator<Item = (PgoffRange, T)> {
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let (start, what) = pages.next()?;
        let mut nr_pages = 1;
        while pages.next_if(|(_, next)| *next == what).is_some() {
            nr_pages += 1;
        }
        Some((PgoffRange::new(start, nr_pages).ok()?, what))
    })
}
