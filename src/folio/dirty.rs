//! Blocks that are free and not clean: those that wait for a scrub, and those that somebody is scrubbing just
//! now. They stay whole.

use super::bits::Bits;
use super::ledger::Blocks;
use crate::error::{Error, Op};
use crate::geometry::FolioSize;
use FolioSize::{Base, Huge1G, Huge2M};

/// Blocks of 2 MiB and of 1 GiB, by the frame that they begin at.
#[derive(Debug)]
struct Map {
    huge: Bits,
    giant: Bits,
}

#[derive(Debug)]
pub(super) struct Dirty {
    waiting: Map,
    in_hands: Map,
}

impl Map {
    fn new(nr_pages: u64) -> Result<Self, Error> {
        let bits = |size: FolioSize| Bits::new(Op::CreatePool, nr_pages >> size.order());
        Ok(Self { huge: bits(Huge2M)?, giant: bits(Huge1G)? })
    }

    #[inline]
    fn blocks(&self) -> Blocks {
        Blocks { giant: self.giant.nr_ones(), huge: self.huge.nr_ones(), base: 0 }
    }

    fn of(&self, size: FolioSize) -> Option<&Bits> {
        match size {
            Base => None,
            Huge2M => Some(&self.huge),
            Huge1G => Some(&self.giant),
        }
    }

    fn of_mut(&mut self, size: FolioSize) -> Option<&mut Bits> {
        match size {
            Base => None,
            Huge2M => Some(&mut self.huge),
            Huge1G => Some(&mut self.giant),
        }
    }

    fn get(&self, start: u64, size: FolioSize) -> bool {
        self.of(size).is_some_and(|bits| bits.get(start >> size.order()))
    }

    fn set(&mut self, start: u64, size: FolioSize) -> bool {
        self.of_mut(size).is_some_and(|bits| bits.set(start >> size.order()))
    }

    fn clear(&mut self, start: u64, size: FolioSize) -> bool {
        self.of_mut(size).is_some_and(|bits| bits.clear(start >> size.order()))
    }

    fn metadata_bytes(&self) -> u64 {
        self.huge.metadata_bytes() + self.giant.metadata_bytes()
    }
}

impl Dirty {
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        Ok(Self { waiting: Map::new(nr_pages)?, in_hands: Map::new(nr_pages)? })
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        self.waiting.metadata_bytes() + self.in_hands.metadata_bytes()
    }

    /// All of it, whether it waits or is in hands.
    #[inline]
    pub(super) fn blocks(&self) -> Blocks {
        self.waiting.blocks().plus(self.in_hands.blocks())
    }

    /// How many blocks of a size are being scrubbed.
    #[inline]
    pub(super) fn nr_in_hands(&self, size: FolioSize) -> u64 {
        self.in_hands.blocks().of(size)
    }

    /// The first block of a size that waits.
    pub(super) fn first(&self, size: FolioSize) -> Option<u64> {
        self.waiting.of(size)?.first().map(|block| block << size.order())
    }

    /// Whether a block waits.
    pub(super) fn waits(&self, start: u64, size: FolioSize) -> bool {
        self.waiting.get(start, size)
    }

    pub(super) fn is_in_hands(&self, start: u64, size: FolioSize) -> bool {
        self.in_hands.get(start, size)
    }

    /// Whether 2 MiB are in here, as a block or in one of 1 GiB.
    pub(super) fn has(&self, start: u64) -> bool {
        let giant = start >> Huge1G.order() << Huge1G.order();
        let in_map = |map: &Map| map.get(start, Huge2M) || map.get(giant, Huge1G);
        in_map(&self.waiting) || in_map(&self.in_hands)
    }

    /// Has a block wait.
    pub(super) fn put(&mut self, start: u64, size: FolioSize) {
        self.waiting.set(start, size);
    }

    /// Takes a block out that waits; says whether it did.
    pub(super) fn take(&mut self, start: u64, size: FolioSize) -> bool {
        self.waiting.clear(start, size)
    }

    /// Has somebody scrub a block from now on.
    pub(super) fn put_in_hands(&mut self, start: u64, size: FolioSize) {
        self.in_hands.set(start, size);
    }

    /// Whoever had a block in hands has it no more.
    pub(super) fn leave_hands(&mut self, start: u64, size: FolioSize) {
        self.in_hands.clear(start, size);
    }

    /// Makes a block of 1 GiB that waits as many of 2 MiB.
    pub(super) fn break_giant(&mut self, start: u64) {
        if self.waiting.clear(start, Huge1G) {
            pieces(start).for_each(|huge| self.put(huge, Huge2M));
        }
    }
}

/// The blocks of 2 MiB in one of 1 GiB.
pub(super) fn pieces(giant: u64) -> impl Iterator<Item = u64> {
    let nr = Huge1G.nr_pages() / Huge2M.nr_pages();
    (0..nr).map(move |nr| giant + nr * Huge2M.nr_pages())
}
