//! Homes: where in an arena an object would like its folios to be, so that it is one run of frames.
//!
//! A home is a wish, not a claim: nobody is kept from taking frames there. But no two objects have the
//! same home, and who has none takes the lowest frames.

use super::bits::Bits;
use crate::error::{Error, Op};
use crate::geometry::{FolioSize, HUGE_ORDER, HUGE_PAGES};

/// The homes of an arena.
#[derive(Debug)]
pub(super) struct Homes {
    /// The blocks of 2 MiB that are nobody's home.
    open: Bits,
    nr_blocks: u64,
    /// Where the next search begins: behind the last home.
    next: u64,
}

/// Frames of an arena that are to be an object's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Home {
    pub(super) start: u64,
    nr_pages: u64,
}

impl Homes {
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let nr_blocks = nr_pages >> HUGE_ORDER;
        let mut open = Bits::new(Op::CreatePool, nr_blocks)?;
        (0..nr_blocks).for_each(|block| {
            open.set(block);
        });
        Ok(Self { open, nr_blocks, next: 0 })
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        self.open.metadata_bytes()
    }

    /// A run of blocks of 2 MiB that are free, clean or not, and nobody's home yet. `None` for less than 2 MiB,
    /// or if there is none.
    pub(super) fn find(&mut self, is_free: impl Fn(u64) -> bool, nr_pages: u64) -> Option<Home> {
        let nr_blocks = nr_pages.div_ceil(HUGE_PAGES);
        if nr_pages < HUGE_PAGES || nr_blocks > self.nr_blocks {
            return None;
        }
        let align = match nr_pages >= FolioSize::Huge1G.nr_pages() {
            true => FolioSize::Huge1G.nr_pages() >> HUGE_ORDER,
            false => 1,
        };
        let start = self
            .search(&is_free, self.next, nr_blocks, align)
            .or_else(|| self.search(&is_free, 0, nr_blocks, align))?;
        (start..start + nr_blocks).for_each(|block| {
            self.open.clear(block);
        });
        self.next = start + nr_blocks;
        Some(Home { start: start << HUGE_ORDER, nr_pages })
    }

    fn search(
        &self,
        is_free: impl Fn(u64) -> bool,
        from: u64,
        nr_blocks: u64,
        align: u64,
    ) -> Option<u64> {
        let mut start = self.open.first_from(from)?.next_multiple_of(align);
        let mut end = start;
        while end - start < nr_blocks {
            if end >= self.nr_blocks {
                return None;
            }
            // First what is one look.
            let is_open = self.open.get(end);
            match is_open && is_free(end << HUGE_ORDER) {
                true => end += 1,
                false => {
                    start = self.open.first_from(end + 1)?.next_multiple_of(align);
                    end = start;
                }
            }
        }
        Some(start)
    }

    /// Ends a home.
    pub(super) fn leave(&mut self, home: Home) {
        let first = home.start >> HUGE_ORDER;
        (first..first + home.nr_pages.div_ceil(HUGE_PAGES)).for_each(|block| {
            self.open.set(block);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::buddy::Buddy;
    use super::*;
    use crate::geometry::GIANT_ORDER;

    #[test]
    fn homes_lie_behind_one_another_and_are_used_again() {
        let mut buddy = Buddy::new(3 << GIANT_ORDER).unwrap();
        buddy.free_run(0, 3 << GIANT_ORDER);
        let mut homes = Homes::new(3 << GIANT_ORDER).unwrap();
        let starts: Vec<_> = [512, 1025, 512, 1 << GIANT_ORDER, 512]
            .map(|nr_pages| {
                homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), nr_pages).unwrap().start
            })
            .into();
        assert_eq!(starts, [0, 512, 2048, 1 << GIANT_ORDER, 2 << GIANT_ORDER]);
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 511), None);
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 2 << GIANT_ORDER), None);
        homes.leave(Home { start: 512, nr_pages: 1025 });
        homes.next = homes.nr_blocks;
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 1024).unwrap().start, 512);
    }

    #[test]
    fn what_is_in_use_is_nobodys_home() {
        let mut buddy = Buddy::new(4 * 512).unwrap();
        buddy.free_run(0, 4 * 512);
        assert!(buddy.allocate_at(700, 0));
        let mut homes = Homes::new(4 * 512).unwrap();
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 1024).unwrap().start, 1024);
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 1024), None);
        assert_eq!(homes.find(|at| buddy.is_in_free(at, HUGE_ORDER), 512).unwrap().start, 0);
    }
}
