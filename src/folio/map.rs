//! Which frames hold an object: one entry for each of its folios.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use super::holes::Holes;
use super::ledger::Blocks;
use crate::addr::{Pfn, Pgoff};
use crate::error::Error;
use crate::geometry::{
    FolioSize, GIANT_ORDER, HUGE_ORDER, HUGE_PAGES, MAX_PAGES, PAGE_BYTES, index,
};
use crate::os::words::boxed;
use crate::range::{PfnRange, PgoffRange};
use crate::state::{Flaw, seeded};
use crate::sync::AtomicU64;

/// How an object is cut into folios: as many of the wanted size from the start on as there can be, then
/// as many of the next smaller one, down to 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    nr_pages: u64,
    giant_end: u64,
    huge_end: u64,
}

/// The place of one folio in an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    index: usize,
    pages: PgoffRange,
}

impl Slot {
    /// The pages of the object that the folio holds.
    pub(crate) fn pages(&self) -> PgoffRange {
        self.pages
    }

    pub(crate) fn size(&self) -> FolioSize {
        match self.pages.nr_pages() {
            1 => FolioSize::Base,
            HUGE_PAGES => FolioSize::Huge2M,
            _ => FolioSize::Huge1G,
        }
    }
}

impl Shape {
    pub(crate) fn new(nr_pages: u64, size: FolioSize) -> Self {
        let end = |of: FolioSize| match size >= of {
            true => nr_pages >> of.order() << of.order(),
            false => 0,
        };
        let giant_end = end(FolioSize::Huge1G);
        Self { nr_pages, giant_end, huge_end: end(FolioSize::Huge2M).max(giant_end) }
    }

    /// How many folios of each size.
    pub(crate) fn blocks(&self) -> Blocks {
        Blocks {
            giant: self.giant_end >> GIANT_ORDER,
            huge: (self.huge_end - self.giant_end) >> HUGE_ORDER,
            base: self.nr_pages - self.huge_end,
        }
    }

    fn nr_slots(&self) -> u64 {
        let Blocks { giant, huge, base } = self.blocks();
        giant + huge + base
    }

    /// Which folio holds a page, how many pages it has, and how far into it the page is; `None` past the
    /// end.
    #[inline]
    fn place(&self, page: Pgoff) -> Option<(u64, u64, u64)> {
        let page = page.get();
        if page < self.giant_end {
            let nr_pages = 1 << GIANT_ORDER;
            return Some((page >> GIANT_ORDER, nr_pages, page & (nr_pages - 1)));
        }
        let giant = self.giant_end >> GIANT_ORDER;
        if page < self.huge_end {
            let place = giant + ((page - self.giant_end) >> HUGE_ORDER);
            return Some((place, HUGE_PAGES, page & (HUGE_PAGES - 1)));
        }
        let huge = (self.huge_end - self.giant_end) >> HUGE_ORDER;
        (page < self.nr_pages).then(|| (giant + huge + (page - self.huge_end), 1, 0))
    }

    /// The first page of the folio at a place.
    fn first_page(&self, place: u64) -> Pgoff {
        let Blocks { giant, huge, .. } = self.blocks();
        Pgoff::new(match (place.checked_sub(giant), place.checked_sub(giant + huge)) {
            (_, Some(base)) => self.huge_end + base,
            (Some(huge), None) => self.giant_end + (huge << HUGE_ORDER),
            (None, None) => place << GIANT_ORDER,
        })
    }

    /// The folio that holds a page; `None` past the end.
    pub(crate) fn slot(&self, page: Pgoff) -> Option<Slot> {
        let (place, nr_pages, skip) = self.place(page)?;
        let pages = PgoffRange::new(Pgoff::new(page.get() - skip), nr_pages).ok()?;
        Some(Slot { index: index(place), pages })
    }

    /// The folios that hold any page of the range, in ascending order.
    pub(crate) fn slots(&self, range: PgoffRange) -> impl Iterator<Item = Slot> + use<> {
        let this = *self;
        let mut next = Some(range.start());
        std::iter::from_fn(move || {
            let slot = this.slot(next.filter(|&page| page < range.end())?)?;
            next = Some(slot.pages.end());
            Some(slot)
        })
    }
}

const BITS: usize = u64::BITS as usize;
/// How many entries take a page of memory.
const GROUP: usize = PAGE_BYTES / size_of::<u64>();

/// The frame of each folio, and which of its pages are holes. Written under the object's layout lock, read
/// by anybody.
#[derive(Debug)]
pub(crate) struct FolioMap {
    shape: Shape,
    slots: Box<[AtomicU64]>,
    /// A bit for as many entries as take a page of memory: whether one of them was ever written. The others need
    /// not be looked at, which would take as many faults.
    written: Box<[AtomicU64]>,
    /// Made before the first hole is.
    holes: OnceLock<Holes>,
}

/// What is said of a folio: its frame number plus one, and whether some of its pages are holes. Zero where
/// nothing is.
#[derive(Clone, Copy, Debug)]
struct Entry(u64);

impl Entry {
    /// No frame has a number as large.
    const HAS_HOLES: u64 = 1 << 63;
    const NOTHING: Self = Self(0);

    fn of(first: Pfn) -> Self {
        Self(first.get() + 1)
    }

    fn marked(self, has_holes: bool) -> Self {
        match has_holes {
            true => Self(self.0 | Self::HAS_HOLES),
            false => Self(self.0 & !Self::HAS_HOLES),
        }
    }

    fn has_holes(self) -> bool {
        self.0 & Self::HAS_HOLES != 0
    }

    fn first_frame(self) -> Option<Pfn> {
        self.marked(false).0.checked_sub(1).map(Pfn::new)
    }

    /// The first frame of a folio without holes; `None` for one with holes as well.
    #[inline]
    fn whole(self) -> Option<Pfn> {
        // One comparison for both: nothing becomes the largest number there is.
        let frame = self.0.wrapping_sub(1);
        (frame < Self::HAS_HOLES).then_some(Pfn::new(frame))
    }
}

const _: () = assert!(MAX_PAGES < Entry::HAS_HOLES);

/// What is behind pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// No folio.
    Nothing,
    /// A folio, whose pages these were until they were punched.
    Holes(PfnRange),
    /// Bytes.
    Frames(PfnRange),
}

impl Behind {
    pub(crate) fn is_resident(self) -> bool {
        matches!(self, Self::Frames(_))
    }
}

impl FolioMap {
    pub(crate) fn new(shape: Shape) -> Result<Self, Error> {
        // What was not written yet takes no memory, where there is much of it: an object may be larger than
        // whatever it will ever hold.
        let slots = boxed(index(shape.nr_slots()))?;
        let written = boxed(slots.len().div_ceil(GROUP * BITS))?;
        Ok(Self { shape, slots, written, holes: OnceLock::new() })
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    #[inline]
    fn entry(&self, place: usize) -> Entry {
        // Acquire: pairs with the Release in `set_entry`: who finds a frame finds it scrubbed, and who
        // finds that there are holes finds which.
        self.slots.get(place).map_or(Entry::NOTHING, |entry| Entry(entry.load(Ordering::Acquire)))
    }

    fn set_entry(&self, place: usize, to: Entry) {
        let group = place / GROUP;
        if let Some(word) = self.written.get(group / BITS) {
            // Relaxed: whoever writes holds the lock that the last one held, or has the object for himself.
            let before = word.load(Ordering::Relaxed);
            let after = before | 1 << (group % BITS);
            if after != before {
                // Relaxed: as above.
                word.store(after, Ordering::Relaxed);
            }
        }
        if let Some(entry) = self.slots.get(place) {
            if seeded(Flaw::PublishesFoliosEarly) {
                // Relaxed: pairs with nothing; the models are to notice.
                return entry.store(to.0, Ordering::Relaxed);
            }
            // Release: pairs with the Acquire in `entry`.
            entry.store(to.0, Ordering::Release);
        }
    }

    /// The folio's first frame, whatever of it is holes.
    pub(crate) fn get(&self, slot: &Slot) -> Option<Pfn> {
        self.entry(slot.index).first_frame()
    }

    /// The frame of a page; `None` for a hole.
    #[inline]
    pub(crate) fn frame(&self, page: Pgoff) -> Option<Pfn> {
        let (place, _, skip) = self.shape.place(page)?;
        let entry = self.entry(index(place));
        match entry.whole() {
            Some(first) => first.checked_add(skip),
            None => self.frame_beside_holes(entry, page, skip),
        }
    }

    /// Whether the page is of a folio, be it a hole.
    pub(crate) fn has_folio(&self, page: Pgoff) -> bool {
        let place = self.shape.place(page).map(|(place, _, _)| index(place));
        place.is_some_and(|place| self.entry(place).first_frame().is_some())
    }

    #[cold]
    fn frame_beside_holes(&self, entry: Entry, page: Pgoff, skip: u64) -> Option<Pfn> {
        let is_hole = entry.has_holes() && self.holes.get()?.has(page);
        entry.first_frame().filter(|_| !is_hole)?.checked_add(skip)
    }

    /// All folios that there are, in ascending order. Places without one cost next to nothing: there may be many more
    /// of those. For who has the object for himself, or the layout locked.
    pub(crate) fn taken(&self) -> impl Iterator<Item = (Slot, Pfn)> {
        let groups = self.written.iter().enumerate().flat_map(|(place, word)| {
            // Relaxed: as in `set_entry`.
            let bits = word.load(Ordering::Relaxed);
            (0..BITS).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| place * BITS + bit)
        });
        let places = groups.flat_map(|group| group * GROUP..(group + 1) * GROUP);
        places.filter_map(|place| {
            let pfn = self.entry(place).first_frame()?;
            Some((self.shape.slot(self.shape.first_page(place as u64))?, pfn))
        })
    }

    /// Puts a folio into its place, or takes away what is there, holes and all. Nobody else is at any page
    /// of it.
    pub(crate) fn set(&self, slot: &Slot, folio: Option<Pfn>) {
        let had_holes = self.entry(slot.index).has_holes();
        self.set_entry(slot.index, folio.map_or(Entry::NOTHING, Entry::of));
        if had_holes {
            self.forget_holes(slot, slot.pages);
        }
    }

    /// Puts a folio in the place of another, of which it holds whatever that one has. What is a hole stays one.
    pub(crate) fn replace(&self, slot: &Slot, folio: Pfn) {
        let has_holes = self.entry(slot.index).has_holes();
        self.set_entry(slot.index, Entry::of(folio).marked(has_holes));
    }

    /// Makes sure that [`punch`](Self::punch) can write down what it does.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted).
    pub(crate) fn make_room_for_holes(&self) -> Result<(), Error> {
        if self.holes.get().is_none() {
            // Should somebody else have been faster, his is as good.
            let _ = self.holes.set(Holes::new(self.shape.nr_pages)?);
        }
        Ok(())
    }

    /// Makes pages of one folio holes. Nobody is at these pages, and there is
    /// [room](Self::make_room_for_holes).
    pub(crate) fn punch(&self, slot: &Slot, pages: PgoffRange) {
        if let Some(holes) = self.holes.get() {
            holes.set(pages, true);
            self.set_entry(slot.index, self.entry(slot.index).marked(true));
        }
    }

    /// Makes holes pages again. They are committed, and zero.
    pub(crate) fn fill(&self, range: PgoffRange) {
        for slot in self.shape.slots(range).filter(|slot| self.entry(slot.index).has_holes()) {
            let Some(pages) = slot.pages.intersection(&range) else { continue };
            let Some(holes) = self.holes.get() else { continue };
            holes.set(pages, false);
            if holes.run(slot.pages.start(), slot.pages.end()) == (false, slot.pages.end()) {
                self.set_entry(slot.index, self.entry(slot.index).marked(false));
                self.forget_holes(&slot, pages);
            }
        }
    }

    /// Clears the bits of a folio whose entry does not speak of them any more, and gives their memory back
    /// if no other folio needs it.
    fn forget_holes(&self, slot: &Slot, pages: PgoffRange) {
        let Some(holes) = self.holes.get() else { return };
        holes.set(pages, false);
        let mut next = Holes::group(slot.pages.start());
        while let Some(group) = next.filter(|group| group.start() < slot.pages.end()) {
            let is_needed = |slot: Slot| self.entry(slot.index).has_holes();
            if !self.shape.slots(group).any(is_needed) {
                holes.give_back(group);
            }
            next = Holes::group(group.end());
        }
    }

    /// If a folio was never put at this place, the next place where one was, or the end of all.
    fn never_until(&self, place: usize) -> Option<usize> {
        let group = place / GROUP;
        let words = self.written.get(group / BITS..)?;
        let mut behind = group % BITS;
        for (nr, word) in words.iter().enumerate() {
            // Relaxed: who is entitled to find a folio has synchronised with whoever put it there.
            let bits = word.load(Ordering::Relaxed) >> behind << behind;
            if bits != 0 {
                let next = (group / BITS + nr) * BITS + bits.trailing_zeros() as usize;
                return (next != group).then_some(next * GROUP);
            }
            behind = 0;
        }
        Some(self.slots.len())
    }

    /// The places of folios that hold any page of the range, in ascending order, but for long runs of those that
    /// never had one.
    pub(crate) fn places(&self, range: PgoffRange) -> impl Iterator<Item = Slot> + '_ {
        let mut next = range.start();
        std::iter::from_fn(move || {
            let mut slot = self.shape.slot(next).filter(|_| next < range.end())?;
            if let Some(later) = self.never_until(slot.index) {
                let page = self.shape.first_page(later as u64);
                slot = self.shape.slot(page).filter(|_| page < range.end())?;
            }
            next = slot.pages.end();
            Some(slot)
        })
    }

    /// Everything that the range consists of, in ascending order, and no part in two folios. Where there are none, a
    /// part may be long.
    pub(crate) fn parts(
        &self,
        range: PgoffRange,
    ) -> impl Iterator<Item = (PgoffRange, Behind)> + Clone {
        let mut next = range.start();
        std::iter::from_fn(move || {
            let slot = self.shape.slot(next).filter(|_| next < range.end())?;
            let entry = self.entry(slot.index);
            let never = || self.never_until(slot.index);
            let end = match entry.first_frame().map_or_else(never, |_| None) {
                Some(later) => self.shape.first_page(later as u64),
                None => slot.pages.end(),
            };
            let end = end.min(range.end());
            let (are_holes, end) = match self.holes.get().filter(|_| entry.has_holes()) {
                Some(holes) => holes.run(next, end),
                None => (false, end),
            };
            let nr_pages = end.get() - next.get();
            let pages = PgoffRange::new(next, nr_pages).ok()?;
            let behind = match entry.first_frame() {
                None => Behind::Nothing,
                Some(first) => {
                    let first = first.checked_add(next.get() - slot.pages.start().get())?;
                    let frames = PfnRange::new(first, nr_pages).ok()?;
                    if are_holes { Behind::Holes(frames) } else { Behind::Frames(frames) }
                }
            };
            next = end;
            Some((pages, behind))
        })
    }

    /// The frames of pages that lie in one folio without holes, as most do that are asked for together; `None`
    /// for anything else.
    #[inline]
    pub(crate) fn in_one_folio(&self, range: PgoffRange) -> Option<PfnRange> {
        let (place, nr_pages, skip) = self.shape.place(range.start())?;
        let first = self.entry(index(place)).whole()?.checked_add(skip)?;
        let fits = range.nr_pages() <= nr_pages - skip;
        fits.then(|| PfnRange::new(first, range.nr_pages()).ok()).flatten()
    }

    /// Whether all of the range has bytes.
    #[inline]
    pub(crate) fn is_resident(&self, range: PgoffRange) -> bool {
        self.in_one_folio(range).is_some() || self.consists_of_frames(range)
    }

    fn consists_of_frames(&self, range: PgoffRange) -> bool {
        self.parts(range).all(|(_, behind)| behind.is_resident())
    }

    /// Whether all of the range is holes.
    pub(crate) fn is_hollow(&self, range: PgoffRange) -> bool {
        self.parts(range).all(|(_, behind)| matches!(behind, Behind::Holes(_)))
    }

    /// A page that is written down as a hole though its folio has none, or whose folio has holes that are
    /// not written down: for the audit.
    pub(crate) fn contradiction(&self) -> Option<Pgoff> {
        let holes = self.holes.get()?;
        let all = PgoffRange::new(Pgoff::new(0), self.shape.nr_pages).ok()?;
        let contradicts = |slot: &Slot| {
            let (start, end) = (slot.pages.start(), slot.pages.end());
            let has_holes = holes.run(start, end) != (false, end);
            self.entry(slot.index).has_holes() != has_holes
        };
        self.shape.slots(all).find(contradicts).map(|slot| slot.pages.start())
    }

    /// The parts of the range that have bytes: pages, and the frames that hold them. Runs that follow each
    /// other in both are one.
    pub(crate) fn resident(
        &self,
        range: PgoffRange,
    ) -> impl Iterator<Item = (PgoffRange, PfnRange)> {
        joined(self.parts(range).filter_map(|(pages, behind)| match behind {
            Behind::Frames(frames) => Some((pages, frames)),
            Behind::Nothing | Behind::Holes(_) => None,
        }))
    }

    /// The same, one after the other.
    #[inline]
    pub(crate) fn each_resident(
        &self,
        range: PgoffRange,
        mut seen: impl FnMut(PgoffRange, PfnRange),
    ) {
        match self.in_one_folio(range) {
            Some(frames) => seen(range, frames),
            None => self.resident(range).for_each(|(pages, frames)| seen(pages, frames)),
        }
    }

    /// Whether there ever was a hole: most objects have none.
    #[inline]
    pub(crate) fn has_had_holes(&self) -> bool {
        self.holes.get().is_some()
    }

    /// The holes of the range, and the frames that they have in their folios.
    pub(crate) fn holes(
        &self,
        range: PgoffRange,
    ) -> impl Iterator<Item = (PgoffRange, PfnRange)> + Clone {
        self.parts(range).filter_map(|(pages, behind)| match behind {
            Behind::Holes(frames) => Some((pages, frames)),
            Behind::Nothing | Behind::Frames(_) => None,
        })
    }

    /// The parts of the range that have folios, holes or not; else as [`resident`](Self::resident).
    pub(crate) fn folios(&self, range: PgoffRange) -> impl Iterator<Item = (PgoffRange, PfnRange)> {
        joined(self.parts(range).filter_map(|(pages, behind)| match behind {
            Behind::Frames(frames) | Behind::Holes(frames) => Some((pages, frames)),
            Behind::Nothing => None,
        }))
    }
}

/// Joins runs that follow each other in both.
fn joined(
    parts: impl Iterator<Item = (PgoffRange, PfnRange)>,
) -> impl Iterator<Item = (PgoffRange, PfnRange)> {
    let mut parts = parts.peekable();
    std::iter::from_fn(move || {
        let mut run = parts.next()?;
        while let Some(both) = parts.peek().and_then(|&part| join(run, part)) {
            run = both;
            parts.next();
        }
        Some(run)
    })
}

fn join(a: (PgoffRange, PfnRange), b: (PgoffRange, PfnRange)) -> Option<(PgoffRange, PfnRange)> {
    if a.0.end() != b.0.start() || a.1.end() != b.1.start() {
        return None;
    }
    let nr_pages = a.0.nr_pages() + b.0.nr_pages();
    let pages = PgoffRange::new(a.0.start(), nr_pages).ok()?;
    Some((pages, PfnRange::new(a.1.start(), nr_pages).ok()?))
}

#[cfg(test)]
mod tests;
