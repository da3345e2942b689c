//! Every frame as an entry of a list. What is free is counted anew each time.

use crate::folio::Zone;
use crate::geometry::{HUGE_PAGES, index};
use crate::range::PfnRange;

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Free,
    /// In a folio of the object with this number.
    Of(u64),
    Quarantined,
}

/// So many folios of 2 MiB and of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) huge: u64,
    pub(super) base: u64,
}

impl Count {
    pub(super) fn of_mut(&mut self, nr_pages: u64) -> &mut u64 {
        if nr_pages == HUGE_PAGES { &mut self.huge } else { &mut self.base }
    }

    pub(super) fn of(mut self, nr_pages: u64) -> u64 {
        *self.of_mut(nr_pages)
    }

    pub(super) fn pages(self) -> u64 {
        self.huge * HUGE_PAGES + self.base
    }

    /// How many frames are missing for these promises, in folios of their sizes.
    pub(super) fn missing(self, promised: Self) -> u64 {
        let huge = promised.huge.saturating_sub(self.huge);
        let spare = self.huge.saturating_sub(promised.huge) * HUGE_PAGES + self.base;
        huge * HUGE_PAGES + promised.base.saturating_sub(spare)
    }

    /// Whether so much free memory is enough for these promises, at the worst.
    pub(super) fn keeps(self, promised: Self) -> bool {
        self.huge >= promised.huge
            && (self.huge - promised.huge) * HUGE_PAGES + self.base >= promised.base
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) used: Use,
    pub(super) has_failed: bool,
}

impl Frame {
    fn is_free(self) -> bool {
        self.used == Use::Free && !self.has_failed
    }
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) zone: Zone,
    pub(super) start: u64,
    pub(super) frames: Vec<Frame>,
    pub(super) promised: Count,
}

impl Part {
    pub(super) fn new(frames: PfnRange, zone: Zone) -> Self {
        let free = Frame { used: Use::Free, has_failed: false };
        Self {
            zone,
            start: frames.start().get(),
            frames: vec![free; index(frames.nr_pages())],
            promised: Count::default(),
        }
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.frames.len() as u64
    }

    pub(super) fn covers(&self, pfn: u64) -> bool {
        (self.start..self.start + self.nr_pages()).contains(&pfn)
    }

    /// Frames by their numbers in the pool.
    pub(super) fn run(&self, pfn: u64, nr_pages: u64) -> &[Frame] {
        let at = index(pfn.saturating_sub(self.start));
        self.frames.get(at..at + index(nr_pages)).unwrap_or_default()
    }

    pub(super) fn run_mut(&mut self, pfn: u64, nr_pages: u64) -> &mut [Frame] {
        let at = index(pfn.saturating_sub(self.start));
        self.frames.get_mut(at..at + index(nr_pages)).unwrap_or_default()
    }

    pub(super) fn all_free(&self, pfn: u64, nr_pages: u64) -> bool {
        let run = self.run(pfn, nr_pages);
        run.len() as u64 == nr_pages && run.iter().all(|frame| frame.is_free())
    }

    pub(super) fn has_failed(&self, pfn: u64, nr_pages: u64) -> bool {
        self.run(pfn, nr_pages).iter().any(|frame| frame.has_failed)
    }

    pub(super) fn set(&mut self, pfn: u64, nr_pages: u64, to: Use) {
        self.run_mut(pfn, nr_pages).iter_mut().for_each(|frame| frame.used = to);
    }

    /// How many frames satisfy something and have not failed.
    pub(super) fn count(&self, wanted: impl Fn(Use) -> bool) -> u64 {
        self.frames.iter().filter(|it| !it.has_failed && wanted(it.used)).count() as u64
    }

    /// Whole free blocks, and what is free outside of them.
    pub(super) fn free(&self) -> Count {
        let blocks = self.frames.chunks_exact(index(HUGE_PAGES));
        let huge = blocks.filter(|block| block.iter().all(|frame| frame.is_free())).count() as u64;
        Count { huge, base: self.count(|it| it == Use::Free) - huge * HUGE_PAGES }
    }

    /// The largest power of two of free frames in a row, aligned to that.
    pub(super) fn largest_free(&self) -> u64 {
        let has = |&nr_pages: &u64| {
            let mut blocks = self.frames.chunks_exact(index(nr_pages));
            blocks.any(|block| block.iter().all(|frame| frame.is_free()))
        };
        (0..=18).map(|order| 1 << order).filter(has).max().unwrap_or(0)
    }

    /// Whether a folio can be cut out of a whole block or a fragment, with these promises kept by what
    /// is left.
    pub(super) fn can_spare(&self, nr_pages: u64, promised: Count) -> bool {
        let free = self.free();
        let out_of_huge =
            Count { huge: free.huge.wrapping_sub(1), base: free.base + (HUGE_PAGES - nr_pages) };
        let out_of_base = Count { huge: free.huge, base: free.base.wrapping_sub(1) };
        free.huge > 0 && out_of_huge.keeps(promised)
            || nr_pages == 1 && free.base > 0 && out_of_base.keeps(promised)
    }

    /// How many more folios could be promised: one after the other.
    pub(super) fn promisable(&self, nr_pages: u64, most: u64) -> u64 {
        let (free, mut promised) = (self.free(), self.promised);
        let mut nr = 0;
        while nr < most {
            *promised.of_mut(nr_pages) += 1;
            if !free.keeps(promised) {
                break;
            }
            nr += 1;
        }
        nr
    }
}
