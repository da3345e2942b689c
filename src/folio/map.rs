//! Which frames hold an object: one entry for each of its folios.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES, index};
use crate::range::{PfnRange, PgoffRange};

/// How an object is cut into folios: whole ones of the wanted size from the start on, and 4 KiB ones
/// for what is left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    nr_pages: u64,
    size: FolioSize,
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
        Self { nr_pages, size }
    }

    fn nr_large(&self) -> u64 {
        self.nr_pages >> self.size.order()
    }

    /// How many folios of each size: huge, then base.
    pub(crate) fn nr_folios(&self) -> (u64, u64) {
        match self.size {
            FolioSize::Base => (0, self.nr_pages),
            FolioSize::Huge2M | FolioSize::Huge1G => {
                (self.nr_large(), self.nr_pages - self.nr_large() * self.size.nr_pages())
            }
        }
    }

    fn nr_slots(&self) -> u64 {
        let (huge, base) = self.nr_folios();
        huge + base
    }

    /// Which folio holds a page, and how far into it the page is; `None` past the end.
    #[inline]
    fn place(&self, page: Pgoff) -> Option<(u64, u64)> {
        let (page, order) = (page.get(), self.size.order());
        let large_end = self.nr_large() << order;
        match page {
            page if page < large_end => Some((page >> order, page & (self.size.nr_pages() - 1))),
            page if page < self.nr_pages => Some((self.nr_large() + page - large_end, 0)),
            _ => None,
        }
    }

    /// The folio that holds a page; `None` past the end.
    fn slot(&self, page: Pgoff) -> Option<Slot> {
        let (place, skip) = self.place(page)?;
        let nr_pages = if place < self.nr_large() { self.size.nr_pages() } else { 1 };
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

/// The frame of each folio. Written under the object's layout lock, read by anybody.
#[derive(Debug)]
pub(crate) struct FolioMap {
    shape: Shape,
    /// Frame number plus one; zero where nothing is.
    slots: Box<[AtomicU64]>,
}

impl FolioMap {
    pub(crate) fn new(shape: Shape) -> Result<Self, Error> {
        let exhausted = |_| Error::new(Op::CreateObject, ErrorKind::Exhausted);
        let len = index(shape.nr_slots());
        let mut slots = Vec::new();
        slots.try_reserve_exact(len).map_err(exhausted)?;
        slots.resize_with(len, || AtomicU64::new(0));
        Ok(Self { shape, slots: slots.into_boxed_slice() })
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// The folio's first frame.
    pub(crate) fn get(&self, slot: &Slot) -> Option<Pfn> {
        self.first_frame(slot.index)
    }

    #[inline]
    fn first_frame(&self, place: usize) -> Option<Pfn> {
        // Acquire: pairs with the Release in `set`: who finds a frame finds it scrubbed.
        let entry = self.slots.get(place)?.load(Ordering::Acquire);
        entry.checked_sub(1).map(Pfn::new)
    }

    /// The frame of a page.
    #[inline]
    pub(crate) fn frame(&self, page: Pgoff) -> Option<Pfn> {
        let (place, skip) = self.shape.place(page)?;
        self.first_frame(index(place))?.checked_add(skip)
    }

    pub(crate) fn set(&self, slot: &Slot, folio: Option<Pfn>) {
        if let Some(entry) = self.slots.get(slot.index) {
            // Release: pairs with the Acquire in `get`.
            entry.store(folio.map_or(0, |pfn| pfn.get() + 1), Ordering::Release);
        }
    }

    /// The parts of the range that have frames: pages, and the frames that hold them. Runs that
    /// follow each other in both are one.
    pub(crate) fn resident(
        &self,
        range: PgoffRange,
    ) -> impl Iterator<Item = (PgoffRange, PfnRange)> {
        let mut slots = self.shape.slots(range).peekable();
        std::iter::from_fn(move || {
            let (pages, frames) = loop {
                let slot = slots.next()?;
                if let Some(part) = self.part(&slot, range) {
                    break part;
                }
            };
            let mut run = (pages, frames);
            while let Some(part) = slots.peek().and_then(|slot| self.part(slot, range)) {
                let Some(joined) = join(run, part) else { break };
                run = joined;
                slots.next();
            }
            Some(run)
        })
    }

    fn part(&self, slot: &Slot, range: PgoffRange) -> Option<(PgoffRange, PfnRange)> {
        let pages = slot.pages.intersection(&range)?;
        let skip = pages.start().get() - slot.pages.start().get();
        let first = self.get(slot)?.checked_add(skip)?;
        Some((pages, PfnRange::new(first, pages.nr_pages()).ok()?))
    }
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
mod tests {
    use super::*;

    fn range(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }

    #[test]
    fn the_tail_is_made_of_base_folios() {
        let shape = Shape::new(512 + 3, FolioSize::Huge2M);
        assert_eq!(shape.nr_folios(), (1, 3));
        let pages: Vec<_> = shape.slots(range(500, 15)).map(|slot| slot.pages()).collect();
        assert_eq!(pages, [range(0, 512), range(512, 1), range(513, 1), range(514, 1)]);
        assert!(shape.slot(Pgoff::new(515)).is_none());
    }

    #[test]
    fn resident_runs_join_where_pages_and_frames_follow_each_other() {
        let map = FolioMap::new(Shape::new(3 * 512 + 1, FolioSize::Huge2M)).unwrap();
        let slots: Vec<_> = map.shape().slots(range(0, 3 * 512 + 1)).collect();
        map.set(&slots[0], Some(Pfn::new(1024)));
        map.set(&slots[1], Some(Pfn::new(1536)));
        map.set(&slots[3], Some(Pfn::new(7)));
        let runs: Vec<_> = map
            .resident(range(10, 3 * 512 - 9))
            .map(|(pages, frames)| (pages, frames.start().get()))
            .collect();
        assert_eq!(runs, [(range(10, 1014), 1034), (range(1536, 1), 7)]);
        assert_eq!(map.frame(Pgoff::new(513)), Some(Pfn::new(1537)));
        assert_eq!(map.frame(Pgoff::new(1024)), None);
    }
}
