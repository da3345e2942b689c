//! The frames of the modelled pool, one flag each.

use crate::geometry::{FolioSize, HUGE_ORDER, HUGE_PAGES};

/// Which frames hold something.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    used: Vec<bool>,
}

impl Ledger {
    pub(super) fn new(nr_pages: u64) -> Self {
        Self { used: (0..nr_pages).map(|_| false).collect() }
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

    /// Takes the lowest block of the smallest order that will do, and of that the lowest part. Where
    /// a folio goes is nobody's business; how many whole huge blocks are left depends on it.
    pub(super) fn take(&mut self, size: FolioSize) -> Option<u64> {
        let order = size.order();
        let frame = (order..=HUGE_ORDER)
            .find_map(|from| self.starts(from).find(|&start| self.is_whole_block(start, from)))?;
        self.set(frame, size.nr_pages(), true);
        Some(frame)
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
        self.used.get(at..at + (1 << order)).is_some_and(|block| !block.contains(&true))
    }

    /// Whether it is free and no part of a larger free block.
    fn is_whole_block(&self, start: u64, order: u8) -> bool {
        self.is_free(start, order)
            && (order == HUGE_ORDER || !self.is_free(start ^ (1 << order), order))
    }
}

const _: () = assert!(1 << HUGE_ORDER == HUGE_PAGES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_folios_come_out_of_the_smallest_hole() {
        let mut ledger = Ledger::new(2 * HUGE_PAGES + 5);
        assert_eq!(ledger.take(FolioSize::Base), Some(2 * HUGE_PAGES + 4));
        assert_eq!(ledger.take(FolioSize::Base), Some(2 * HUGE_PAGES));
        assert_eq!((ledger.nr_free_huge(), ledger.nr_free()), (2, 2 * HUGE_PAGES + 3));
        assert_eq!(ledger.take(FolioSize::Huge2M), Some(0));
        ledger.give_back(0, HUGE_PAGES);
        assert_eq!(ledger.nr_free_huge(), 2);
    }
}
