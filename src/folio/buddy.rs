//! The buddy allocator: free blocks of 4 KiB to 1 GiB. The smallest that will do comes first, and of
//! those the one with the lowest address.

use super::bits::Bits;
use super::ledger::Blocks;
use crate::error::{Error, Op};
use crate::geometry::{FolioSize, GIANT_ORDER, HUGE_ORDER, HUGE_PAGES};

/// Which frames are free, counted from the start of an arena. A free block is in the map of exactly one
/// order, and never beside its buddy in the same one.
#[derive(Debug)]
pub(super) struct Buddy {
    /// One for each order.
    free: Vec<Bits>,
    /// Bit `order` is set if there are free blocks of that order.
    orders: u32,
    blocks: Blocks,
}

impl Buddy {
    /// None of `nr_pages` frames free.
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let orders = 0..=GIANT_ORDER;
        let free = orders.map(|order| Bits::new(Op::CreatePool, nr_pages >> order));
        Ok(Self { free: free.collect::<Result<_, _>>()?, orders: 0, blocks: Blocks::default() })
    }

    /// What is free, by how large a folio it can become.
    #[inline]
    pub(super) fn blocks(&self) -> Blocks {
        self.blocks
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        self.free.iter().map(Bits::metadata_bytes).sum()
    }

    /// The largest order of which there is a free block.
    pub(super) fn largest_order(&self) -> Option<u8> {
        self.orders.checked_ilog2().and_then(|order| u8::try_from(order).ok())
    }

    /// Takes the lowest block of the smallest order that will do.
    #[inline]
    pub(super) fn allocate(&mut self, order: u8) -> Option<u64> {
        let (pfn, from) = self.lowest(order)?;
        self.cut(pfn, from, pfn, order);
        Some(pfn)
    }

    /// Which one that is, and of which order.
    #[inline]
    pub(super) fn lowest(&self, order: u8) -> Option<(u64, u8)> {
        let larger = self.orders.checked_shr(u32::from(order)).filter(|&orders| orders != 0)?;
        let from = order + u8::try_from(larger.trailing_zeros()).ok()?;
        Some((self.free.get(usize::from(from))?.first()? << from, from))
    }

    /// The first frame of the smallest free block in 2 MiB that begin at `huge`.
    pub(super) fn first_in(&self, huge: u64) -> Option<u64> {
        if self.is_in_free(huge, HUGE_ORDER) {
            return Some(huge);
        }
        let end = huge + HUGE_PAGES;
        let mut smaller = self.free.iter().enumerate().take(usize::from(HUGE_ORDER));
        smaller.find_map(|(order, map)| {
            let pfn = map.first_from(huge >> order)? << order;
            (pfn < end).then_some(pfn)
        })
    }

    /// Takes the very block that begins at `pfn`, which is a multiple of its size; says whether it was
    /// free.
    pub(super) fn allocate_at(&mut self, pfn: u64, order: u8) -> bool {
        let Some(from) = self.order_from(pfn, order) else { return false };
        self.allocate_in(pfn, from, order);
        true
    }

    /// The same, out of the free block of order `from` that it is in.
    #[inline]
    pub(super) fn allocate_in(&mut self, pfn: u64, from: u8, order: u8) {
        self.cut(pfn >> from << from, from, pfn, order);
    }

    /// The order of the free block that a frame is in.
    pub(super) fn order_at(&self, pfn: u64) -> Option<u8> {
        self.order_from(pfn, 0)
    }

    /// The same, but only of blocks of that order or a larger one: each order is one more place to look.
    #[inline]
    pub(super) fn order_from(&self, pfn: u64, smallest: u8) -> Option<u8> {
        (smallest..=GIANT_ORDER).find(|&order| self.get(pfn >> order << order, order))
    }

    /// Whether a frame is in a free block of that order or a larger one. The largest first: for who is after
    /// long runs, of which most of a block are in one of those.
    pub(super) fn is_in_free(&self, pfn: u64, smallest: u8) -> bool {
        (smallest..=GIANT_ORDER).rev().any(|order| self.get(pfn >> order << order, order))
    }

    /// Gives a block back and joins it with its buddies.
    #[inline]
    pub(super) fn free(&mut self, pfn: u64, order: u8) {
        let (mut pfn, mut order) = (pfn, order);
        while order < GIANT_ORDER && self.take(pfn ^ (1 << order), order) {
            pfn &= !(1 << order);
            order += 1;
        }
        self.put(pfn, order);
    }

    /// Gives any run of frames back, in as large blocks as it has.
    pub(super) fn free_run(&mut self, start: u64, nr_pages: u64) {
        let (mut pfn, end) = (start, start + nr_pages);
        while let Some(left) = end.checked_sub(pfn).filter(|&left| left > 0) {
            let order = pfn.trailing_zeros().min(left.ilog2()).min(u32::from(GIANT_ORDER));
            // At most 18.
            self.free(pfn, u8::try_from(order).unwrap_or_default());
            pfn += 1 << order;
        }
    }

    /// The free blocks: the first frame, and how many.
    pub(super) fn free_blocks(&self) -> impl Iterator<Item = (u64, u64)> {
        let orders = self.free.iter().enumerate();
        orders.flat_map(|(order, map)| map.iter().map(move |block| (block << order, 1 << order)))
    }

    /// Whether a frame is in a free block.
    pub(super) fn is_free(&self, pfn: u64) -> bool {
        self.order_at(pfn).is_some()
    }

    /// Takes the free block `from` away and gives back what is not the block at `pfn` in it.
    #[inline]
    fn cut(&mut self, block: u64, from: u8, pfn: u64, order: u8) {
        self.take(block, from);
        for order in (order..from).rev() {
            // The half that `pfn` is not in.
            let half = pfn >> order << order;
            self.put(half ^ (1 << order), order);
        }
    }

    fn get(&self, pfn: u64, order: u8) -> bool {
        self.free.get(usize::from(order)).is_some_and(|map| map.get(pfn >> order))
    }

    #[inline]
    fn take(&mut self, pfn: u64, order: u8) -> bool {
        let Some(map) = self.free.get_mut(usize::from(order)) else { return false };
        if !map.clear(pfn >> order) {
            return false;
        }
        if map.nr_ones() == 0 {
            self.orders &= !(1 << order);
        }
        let (size, nr) = worth(order);
        *self.blocks.of_mut(size) -= nr;
        true
    }

    #[inline]
    fn put(&mut self, pfn: u64, order: u8) {
        let Some(map) = self.free.get_mut(usize::from(order)) else { return };
        if map.set(pfn >> order) {
            self.orders |= 1 << order;
            let (size, nr) = worth(order);
            *self.blocks.of_mut(size) += nr;
        }
    }
}

/// How many folios of which size a block can become, the largest there is.
#[inline]
const fn worth(order: u8) -> (FolioSize, u64) {
    match order {
        GIANT_ORDER => (FolioSize::Huge1G, 1),
        HUGE_ORDER..GIANT_ORDER => (FolioSize::Huge2M, 1 << (order - HUGE_ORDER)),
        _ => (FolioSize::Base, 1 << order),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_free(nr_pages: u64) -> Buddy {
        let mut buddy = Buddy::new(nr_pages).unwrap();
        buddy.free_run(0, nr_pages);
        buddy
    }

    fn blocks(buddy: &Buddy) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = buddy.free_blocks().collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_ragged_end_is_made_of_smaller_blocks() {
        let buddy = all_free(2 * 512 + 5);
        assert_eq!(blocks(&buddy), [(0, 1024), (1024, 4), (1028, 1)]);
        assert_eq!(buddy.blocks(), Blocks { giant: 0, huge: 2, base: 5 });
        assert_eq!(buddy.largest_order(), Some(10));
    }

    #[test]
    fn small_blocks_come_out_of_fragments_first() {
        let mut buddy = all_free(512 + 1);
        assert_eq!(buddy.allocate(0), Some(512));
        assert_eq!(buddy.blocks().huge, 1);
        assert_eq!(buddy.allocate(0), Some(0));
        assert_eq!(buddy.blocks(), Blocks { giant: 0, huge: 0, base: 511 });
        assert_eq!(buddy.allocate(HUGE_ORDER), None);
        assert_eq!(buddy.allocate(40), None);
    }

    #[test]
    fn a_block_is_taken_where_it_is_wanted() {
        let mut buddy = all_free(1 << 18);
        assert!(buddy.allocate_at(777, 0));
        assert!(!buddy.allocate_at(777, 0));
        assert!(!buddy.allocate_at(512, HUGE_ORDER));
        assert_eq!(buddy.order_at(776), Some(0));
        assert_eq!(buddy.blocks(), Blocks { giant: 0, huge: 511, base: 511 });
        assert!(!buddy.allocate_at(1 << 18, 0));
        buddy.free(777, 0);
        assert_eq!(blocks(&buddy), [(0, 1 << 18)]);
    }

    #[test]
    fn any_order_of_frees_makes_it_whole_again() {
        let mut seed = 1u64;
        for _ in 0..20 {
            let mut buddy = all_free(1024);
            let whole = blocks(&buddy);
            let mut held = Vec::new();
            while let Some(pfn) = buddy.allocate((seed % 4) as u8) {
                held.push((pfn, (seed % 4) as u8));
                seed =
                    seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 1;
            }
            let taken: u64 = held.iter().map(|(_, order)| 1 << order).sum();
            assert_eq!(buddy.blocks().pages() + taken, 1024);
            while !held.is_empty() {
                seed =
                    seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 1;
                let (pfn, order) = held.swap_remove(seed as usize % held.len());
                buddy.free(pfn, order);
            }
            assert_eq!(blocks(&buddy), whole);
        }
    }
}
