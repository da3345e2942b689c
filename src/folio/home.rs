//! Homes: where in an arena an object would like its folios to be, so that it is one run of frames.
//!
//! A home is a wish, not a claim: nobody is kept from taking frames there. But no two objects have the
//! same home, and who has none is put where nobody has, as long as there is such a place.

use super::bits::Bits;
use super::buddy::Buddy;
use crate::error::{Error, Op};
use crate::geometry::{FolioSize, HUGE_ORDER, HUGE_PAGES};

/// How many blocks are looked at for one folio that has no home: each is a look into a few words.
const MOST_LOOKS: usize = 16;

/// The homes of an arena.
#[derive(Debug)]
pub(super) struct Homes {
    /// The blocks of 2 MiB that are nobody's home and not common.
    open: Bits,
    /// The blocks in which small folios lie that have no home.
    common: Bits,
    /// The last one of them that had room.
    last_common: u64,
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
        let common = Bits::new(Op::CreatePool, nr_blocks)?;
        Ok(Self { open, common, last_common: 0, nr_blocks, next: 0 })
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        self.open.metadata_bytes() + self.common.metadata_bytes()
    }

    /// Where there is a clean folio outside of all homes, if the lowest of the smallest is in one: for who has none, or
    /// not there. Small ones lie together, in few blocks. `None` if there is none, or not among the first that are
    /// looked at.
    pub(super) fn outside(&mut self, buddy: &Buddy, size: FolioSize) -> Option<u64> {
        let (lowest, _) = buddy.lowest(size.order())?;
        let block = lowest >> HUGE_ORDER;
        let is_open = self.open.get(block);
        if is_open || self.common.get(block) || block >= self.nr_blocks {
            if is_open && size == FolioSize::Base {
                self.open.clear(block);
                self.common.set(block);
            }
            return None;
        }
        match size {
            FolioSize::Base => {}
            FolioSize::Huge2M => return Some(self.first_open(buddy)? << HUGE_ORDER),
            FolioSize::Huge1G => return None,
        }
        let mut block = self.last_common;
        for _ in 0..self.common.nr_ones().min(MOST_LOOKS as u64) {
            block = self.common.first_from(block).or_else(|| self.common.first())?;
            if let Some(frame) = buddy.first_in(block << HUGE_ORDER) {
                self.last_common = block;
                return Some(frame);
            }
            block += 1;
        }
        let block = self.last_open(buddy)?;
        self.open.clear(block);
        self.common.set(block);
        self.last_common = block;
        Some(block << HUGE_ORDER)
    }

    /// The last block that is nobody's home, free and clean: homes are found from the front.
    fn last_open(&self, buddy: &Buddy) -> Option<u64> {
        let mut from = self.nr_blocks.checked_sub(1)?;
        for _ in 0..MOST_LOOKS {
            let block = self.open.last_to(from)?;
            if buddy.is_in_free(block << HUGE_ORDER, HUGE_ORDER) {
                return Some(block);
            }
            from = block.checked_sub(1)?;
        }
        None
    }

    /// The first one, so that what is taken block by block is one run.
    fn first_open(&self, buddy: &Buddy) -> Option<u64> {
        let is_free = |&block: &u64| buddy.is_in_free(block << HUGE_ORDER, HUGE_ORDER);
        self.open.iter().take(MOST_LOOKS).find(is_free)
    }

    /// Common blocks that are empty again can be homes.
    fn reopen(&mut self, is_free: impl Fn(u64) -> bool) {
        let mut from = 0;
        while let Some(block) = self.common.first_from(from) {
            if is_free(block << HUGE_ORDER) {
                self.common.clear(block);
                self.open.set(block);
            }
            from = block + 1;
        }
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
        self.reopen(&is_free);
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
