//! The frames of the modelled pool, one flag each.

use std::collections::BTreeSet;

use crate::geometry::{FolioSize, GIANT_ORDER, HUGE_ORDER, HUGE_PAGES};

/// Which frames hold something.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    used: Vec<bool>,
    /// Where objects want their folios: first block of 2 MiB, and how many.
    homes: Vec<(u64, u64)>,
    /// The block behind the last home that was found.
    next: u64,
    /// Blocks where small folios without a home lie, in ascending order, and the last that had room for one.
    common: BTreeSet<u64>,
    last_common: u64,
}

impl Ledger {
    pub(super) fn new(nr_pages: u64) -> Self {
        Self {
            used: (0..nr_pages).map(|_| false).collect(),
            homes: Vec::new(),
            next: 0,
            common: BTreeSet::new(),
            last_common: 0,
        }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.used.len() as u64
    }

    pub(super) fn nr_free(&self) -> u64 {
        self.used.iter().filter(|&&used| !used).count() as u64
    }

    pub(super) fn nr_free_huge(&self) -> u64 {
        self.starts(HUGE_ORDER).filter(|&start| self.is_free(start, HUGE_ORDER)).count() as u64
    }

    /// Takes the folio that begins at `home`, if it is free and as many frames and huge blocks are left as
    /// are `promised`; otherwise one outside of all homes, in the same way; otherwise the lowest block of the smallest
    /// order that will do, and of that the lowest part. Where a folio goes is nobody's business; how many huge blocks
    /// are left depends on it.
    pub(super) fn take(
        &mut self,
        size: FolioSize,
        home: Option<u64>,
        promised: (u64, u64),
    ) -> Option<u64> {
        if home.is_some_and(|home| self.take_at(home, size, promised)) {
            return home;
        }
        let outside = self.outside(size);
        if outside.is_some_and(|outside| self.take_at(outside, size, promised)) {
            return outside;
        }
        let frame = self.lowest(size.order())?;
        self.set(frame, size.nr_pages(), true);
        Some(frame)
    }

    fn take_at(&mut self, at: u64, size: FolioSize, promised: (u64, u64)) -> bool {
        if !self.is_free(at, size.order()) {
            return false;
        }
        self.set(at, size.nr_pages(), true);
        let keeps = self.nr_free() >= promised.0 && self.nr_free_huge() >= promised.1;
        if !keeps {
            self.set(at, size.nr_pages(), false);
        }
        keeps
    }

    fn lowest(&self, order: u8) -> Option<u64> {
        let first_of = |from| self.starts(from).find(|&start| self.is_whole_block(start, from));
        (order..=GIANT_ORDER).find_map(first_of)
    }

    /// Where a folio goes whose lowest place would be in somebody's home.
    fn outside(&mut self, size: FolioSize) -> Option<u64> {
        let lowest = self.lowest(size.order())? / HUGE_PAGES;
        if !self.is_home(lowest) {
            if size == FolioSize::Base && lowest < self.capacity() / HUGE_PAGES {
                self.common.insert(lowest);
            }
            return None;
        }
        let is_open = |&block: &u64| {
            !self.is_home(block)
                && !self.common.contains(&block)
                && self.is_free(block * HUGE_PAGES, HUGE_ORDER)
        };
        let mut blocks = 0..self.capacity() / HUGE_PAGES;
        if size != FolioSize::Base {
            let is_huge = size == FolioSize::Huge2M;
            return blocks.find(is_open).filter(|_| is_huge).map(|block| block * HUGE_PAGES);
        }
        let (before, behind) = (..self.last_common, self.last_common..);
        let common = self.common.range(behind).chain(self.common.range(before));
        let frame_in = |block: u64| {
            let frames = block * HUGE_PAGES..(block + 1) * HUGE_PAGES;
            let mut starts = (0..=HUGE_ORDER).flat_map(|order| {
                frames.clone().step_by(1 << order).map(move |start| (start, order))
            });
            starts.find(|&(start, order)| {
                self.is_whole_block(start, order)
                    || order == HUGE_ORDER && self.is_free(start, order)
            })
        };
        let found = common.copied().find_map(|block| Some((block, frame_in(block)?.0)));
        let (block, frame) = match found {
            Some(found) => found,
            None => blocks.rfind(is_open).map(|block| (block, block * HUGE_PAGES))?,
        };
        self.common.insert(block);
        self.last_common = block;
        Some(frame)
    }

    fn is_home(&self, block: u64) -> bool {
        self.homes.iter().any(|&(first, nr)| (first..first + nr).contains(&block))
    }

    /// Gives an object of 2 MiB or more a home: the first run of free blocks behind the last home, or else
    /// from the start, that is nobody's.
    pub(super) fn find_home(&mut self, nr_pages: u64) -> Option<u64> {
        let nr_blocks = nr_pages.div_ceil(HUGE_PAGES);
        let all = self.capacity() / HUGE_PAGES;
        if nr_pages < HUGE_PAGES || nr_blocks > all {
            return None;
        }
        let empty = |&block: &u64| self.is_free(block * HUGE_PAGES, HUGE_ORDER);
        let common = self.common.iter().copied().filter(|block| !empty(block)).collect();
        self.common = common;
        let open = |block: u64| {
            block < all
                && self.is_free(block * HUGE_PAGES, HUGE_ORDER)
                && !self.is_home(block)
                && !self.common.contains(&block)
        };
        let fits = |&start: &u64| (start..start + nr_blocks).all(open);
        let start = (self.next..all).chain(0..all).find(fits)?;
        self.homes.push((start, nr_blocks));
        self.next = start + nr_blocks;
        Some(start * HUGE_PAGES)
    }

    pub(super) fn leave_home(&mut self, home: u64) {
        self.homes.retain(|&(first, _)| first * HUGE_PAGES != home);
    }

    pub(super) fn give_back(&mut self, frame: u64, nr_pages: u64) {
        self.set(frame, nr_pages, false);
    }

    fn set(&mut self, frame: u64, nr_pages: u64, used: bool) {
        for (_, flag) in
            (0u64..).zip(&mut self.used).filter(|(at, _)| (frame..frame + nr_pages).contains(at))
        {
            *flag = used;
        }
    }

    fn starts(&self, order: u8) -> impl Iterator<Item = u64> + use<> {
        (0..self.capacity()).step_by(1 << order)
    }

    fn is_free(&self, start: u64, order: u8) -> bool {
        let Ok(at) = usize::try_from(start) else { return false };
        self.used.get(at..at.saturating_add(1 << order)).is_some_and(|block| !block.contains(&true))
    }

    /// Whether it is free and no part of a larger free block.
    fn is_whole_block(&self, start: u64, order: u8) -> bool {
        self.is_free(start, order)
            && (order == GIANT_ORDER || !self.is_free(start ^ (1 << order), order))
    }
}

const _: () = assert!(1 << HUGE_ORDER == HUGE_PAGES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_folios_come_out_of_the_smallest_hole() {
        let mut ledger = Ledger::new(2 * HUGE_PAGES + 5);
        let mut take = |size| ledger.take(size, None, (0, 0));
        assert_eq!(take(FolioSize::Base), Some(2 * HUGE_PAGES + 4));
        assert_eq!(take(FolioSize::Base), Some(2 * HUGE_PAGES));
        assert_eq!((ledger.nr_free_huge(), ledger.nr_free()), (2, 2 * HUGE_PAGES + 3));
        assert_eq!(ledger.take(FolioSize::Huge2M, None, (0, 0)), Some(0));
        ledger.give_back(0, HUGE_PAGES);
        assert_eq!(ledger.nr_free_huge(), 2);
    }
}
