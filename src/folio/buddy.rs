//! The buddy allocator: free blocks of 4 KiB to 2 MiB, lowest address first.

use bitvec::vec::BitVec;

use crate::addr::{PageNumber, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{HUGE_ORDER, HUGE_PAGES, index};
use crate::range::PfnRange;

const NR_ORDERS: usize = HUGE_ORDER as usize + 1;

/// So many bits, all clear.
///
/// # Errors
/// [`ErrorKind::Exhausted`], where [`BitVec::repeat`] would abort.
pub(crate) fn try_bits(op: Op, nr_bits: u64) -> Result<BitVec, Error> {
    let exhausted = || Error::new(op, ErrorKind::Exhausted);
    let len = index(nr_bits.div_ceil(u64::from(usize::BITS)));
    let mut words = Vec::new();
    words.try_reserve_exact(len).map_err(|_| exhausted())?;
    words.resize(len, 0usize);
    let mut bits = BitVec::try_from_vec(words).map_err(|_| exhausted())?;
    bits.truncate(index(nr_bits));
    Ok(bits)
}

/// Which frames are free. A free block is in the map of exactly one order, and never beside its
/// buddy in the same one.
#[derive(Debug)]
pub(super) struct Buddy {
    free: [BitVec; NR_ORDERS],
    nr_free: u64,
}

impl Buddy {
    /// All of `nr_pages` frames free.
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let mut free = std::array::from_fn(|_| BitVec::new());
        for (order, map) in free.iter_mut().enumerate() {
            *map = try_bits(Op::CreatePool, nr_pages >> order)?;
        }
        let mut buddy = Self { free, nr_free: nr_pages };
        let mut pfn = 0;
        for order in (0..=HUGE_ORDER).rev() {
            while pfn + (1 << order) <= nr_pages {
                buddy.set(pfn, order, true);
                pfn += 1 << order;
            }
        }
        Ok(buddy)
    }

    pub(super) fn nr_free(&self) -> u64 {
        self.nr_free
    }

    /// How many whole huge blocks are free.
    pub(super) fn nr_free_huge(&self) -> u64 {
        self.free[usize::from(HUGE_ORDER)].count_ones() as u64
    }

    /// Free frames that are no part of a free huge block.
    pub(super) fn nr_free_small(&self) -> u64 {
        self.nr_free - self.nr_free_huge() * HUGE_PAGES
    }

    /// Takes the lowest block of the smallest order that will do.
    pub(super) fn allocate(&mut self, order: u8) -> Option<Pfn> {
        let mut from = (order..=HUGE_ORDER).find(|&o| self.free[usize::from(o)].any())?;
        let block = self.free[usize::from(from)].first_one()? as u64;
        let pfn = block << from;
        self.set(pfn, from, false);
        while from > order {
            from -= 1;
            self.set(pfn + (1 << from), from, true);
        }
        self.nr_free -= 1 << order;
        Some(Pfn::new(pfn))
    }

    /// Gives a block back and joins it with its buddies.
    pub(super) fn free(&mut self, pfn: Pfn, order: u8) {
        self.nr_free += 1 << order;
        let (mut pfn, mut order) = (pfn.get(), order);
        while order < HUGE_ORDER {
            let buddy = pfn ^ (1 << order);
            if !self.get(buddy, order) {
                break;
            }
            self.set(buddy, order, false);
            pfn = pfn.min(buddy);
            order += 1;
        }
        self.set(pfn, order, true);
    }

    /// The free blocks, each as a range of frames.
    pub(super) fn free_blocks(&self) -> impl Iterator<Item = PfnRange> {
        self.free.iter().enumerate().flat_map(|(order, map)| {
            map.iter_ones().filter_map(move |block| {
                PfnRange::new(Pfn::from_raw((block as u64) << order), 1 << order).ok()
            })
        })
    }

    /// Whether a frame is in a free block.
    pub(super) fn is_free(&self, pfn: Pfn) -> bool {
        (0..=HUGE_ORDER).any(|order| self.get(pfn.get(), order))
    }

    fn get(&self, pfn: u64, order: u8) -> bool {
        self.free[usize::from(order)].get(index(pfn >> order)).is_some_and(|bit| *bit)
    }

    fn set(&mut self, pfn: u64, order: u8, free: bool) {
        if let Some(mut bit) = self.free[usize::from(order)].get_mut(index(pfn >> order)) {
            *bit = free;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(buddy: &Buddy) -> Vec<(u64, u64)> {
        let mut all: Vec<_> =
            buddy.free_blocks().map(|r| (r.start().get(), r.nr_pages())).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_ragged_end_is_made_of_smaller_blocks() {
        let buddy = Buddy::new(2 * 512 + 5).unwrap();
        assert_eq!(blocks(&buddy), [(0, 512), (512, 512), (1024, 4), (1028, 1)]);
        assert_eq!((buddy.nr_free_huge(), buddy.nr_free_small()), (2, 5));
    }

    #[test]
    fn small_blocks_come_out_of_fragments_first() {
        let mut buddy = Buddy::new(512 + 1).unwrap();
        assert_eq!(buddy.allocate(0), Some(Pfn::new(512)));
        assert_eq!(buddy.nr_free_huge(), 1);
        assert_eq!(buddy.allocate(0), Some(Pfn::new(0)));
        assert_eq!(buddy.nr_free_huge(), 0);
        assert_eq!(buddy.allocate(HUGE_ORDER), None);
    }

    #[test]
    fn any_order_of_frees_makes_it_whole_again() {
        let mut seed = 1u64;
        for _ in 0..20 {
            let mut buddy = Buddy::new(1024).unwrap();
            let whole = blocks(&buddy);
            let mut held = Vec::new();
            while let Some(pfn) = buddy.allocate((seed % 4) as u8) {
                held.push((pfn, (seed % 4) as u8));
                seed =
                    seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 1;
            }
            let taken: u64 = held.iter().map(|(_, order)| 1 << order).sum();
            assert_eq!(buddy.nr_free() + taken, 1024);
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
