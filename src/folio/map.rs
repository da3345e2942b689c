//! Which frames hold an object: one entry for each of its folios.

use std::sync::atomic::{AtomicU64, Ordering};

use super::ledger::Blocks;
use crate::addr::{Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, GIANT_ORDER, HUGE_ORDER, HUGE_PAGES, index};
use crate::range::{PfnRange, PgoffRange};

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

    /// The folio that holds a page; `None` past the end.
    fn slot(&self, page: Pgoff) -> Option<Slot> {
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
        let (place, _, skip) = self.shape.place(page)?;
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
        assert_eq!(shape.blocks(), Blocks { giant: 0, huge: 1, base: 3 });
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
