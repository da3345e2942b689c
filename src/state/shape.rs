//! How an object is cut into blocks, and where the words of the blocks lie.
//!
//! | level | block | words of |
//! |---|---|---|
//! | 2 | 1 GiB | the roots, in a row of their own |
//! | 1 | 2 MiB | tables of 512, one page each |
//! | 0 | 4 KiB | tables of 512, one page each |
//!
//! Fan-out and number of levels are parameters: models have blocks of two parts, on two or three levels.
//! What is no larger than 2 MiB has no more words than it has blocks.
//! A block at the end of the object is as long as the object is; nothing else about it is special.

use std::ops::Range;

use super::flaw::{Flaw, seeded};
use super::word::Word;
use crate::addr::Pgoff;
use crate::geometry::index;
use crate::range::PgoffRange;
use crate::sync::MODELLED;

/// The measures of a tree.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    nr_pages: u64,
    fan_out_order: u32,
    top: u32,
    nr_splits: u64,
    /// Where the words of each level below the roots begin.
    bases: [usize; MOST_LEVELS],
}

const MOST_LEVELS: usize = 3;

/// One block: its level, and its place among the blocks of that level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Block {
    pub(super) level: u32,
    pub(super) place: u64,
}

impl Shape {
    /// Blocks of 1 GiB, 2 MiB and 4 KiB.
    pub fn of_pages(nr_pages: u64) -> Self {
        Self::new(nr_pages, 9, 2, Word::MAX_SPLITS)
    }

    fn new(nr_pages: u64, fan_out_order: u32, top: u32, nr_splits: u64) -> Self {
        let mut shape = Self { nr_pages, fan_out_order, top, nr_splits, bases: [0; MOST_LEVELS] };
        let mut base = 0;
        for level in 0..top {
            if let Some(entry) = shape.bases.get_mut(level as usize) {
                *entry = base;
            }
            base += index(shape.nr_words(level));
        }
        shape
    }

    /// Blocks of `1 << fan_out_order` parts on `nr_levels` levels (two at least), whose splits are
    /// numbered from 1 to `nr_splits`: for models. Two numbers are too few, which a model shows.
    ///
    /// # Panics
    /// If there are more levels or splits than that.
    #[cfg(any(test, all(loom, feature = "loom")))]
    pub fn small(nr_pages: u64, fan_out_order: u32, nr_levels: u32, nr_splits: u64) -> Self {
        assert!((2..=MOST_LEVELS).contains(&(nr_levels as usize)));
        assert!((2..=Word::MAX_SPLITS).contains(&nr_splits));
        Self::new(nr_pages, fan_out_order, nr_levels - 1, nr_splits)
    }

    /// The level of the roots.
    pub(super) fn top(&self) -> u32 {
        self.top
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    pub(super) fn nr_splits(&self) -> u64 {
        self.nr_splits
    }

    /// How many words a table has.
    pub(super) fn fan_out(&self) -> u64 {
        1 << self.fan_out_order
    }

    /// The block of a level that holds a page.
    #[inline]
    pub(super) fn block_of(&self, level: u32, page: Pgoff) -> Block {
        Block { level, place: page.get() >> self.order(level) }
    }

    /// log2 of the pages in a block, if it is not cut off by the end.
    #[inline]
    pub(super) fn order(&self, level: u32) -> u32 {
        self.fan_out_order * level
    }

    /// The pages of a block that the object has.
    #[inline]
    pub(super) fn pages_of(&self, block: Block) -> Option<PgoffRange> {
        let start = block.place.checked_mul(1 << self.order(block.level))?;
        let most = 1 << self.order(block.level);
        PgoffRange::before(Pgoff::new(self.nr_pages), Pgoff::new(start), most)
    }

    /// The blocks of a level that make up a range.
    #[inline]
    pub(super) fn blocks(
        &self,
        level: u32,
        range: PgoffRange,
    ) -> impl Iterator<Item = Block> + use<> {
        let first = range.start().get() >> self.order(level);
        let behind = ((range.end().get() - 1) >> self.order(level)) + 1;
        (first..behind).map(move |place| Block { level, place })
    }

    fn nr_blocks(&self, level: u32) -> u64 {
        self.nr_pages.div_ceil(1 << self.order(level))
    }

    pub(super) fn nr_roots(&self) -> usize {
        index(self.nr_blocks(self.top))
    }

    /// The words of a level take whole tables, but for an object that has one table of a level at most: that is
    /// no longer than it has to be.
    fn nr_words(&self, level: u32) -> u64 {
        match self.is_one_table() {
            true => self.nr_blocks(level),
            false => self.nr_blocks(level).next_multiple_of(self.fan_out()),
        }
    }

    /// Whether one table has the words of all pages.
    pub(super) fn is_one_table(&self) -> bool {
        self.nr_pages <= self.fan_out()
    }

    /// Whether blocks of a level, or larger ones, from `start` to `end` cannot make up a larger one: less than
    /// a table of them does only where the object ends.
    #[inline]
    pub(super) fn is_too_short(&self, level: u32, start: Pgoff, end: Pgoff) -> bool {
        let is_short = end.get() - start.get() < self.fan_out() << self.order(level);
        is_short && end.get() != self.nr_pages && !seeded(Flaw::MergesTooMuch)
    }

    /// How many words below the roots take memory when so many tables have been written. Models count those, however small.
    pub(super) fn nr_words_taken(&self, nr_tables: u64) -> u64 {
        match self.is_one_table() && !MODELLED {
            true => self.nr_words_below() as u64,
            false => nr_tables.saturating_mul(self.fan_out()),
        }
    }

    /// How many words the tables of all levels have, that of the roots left out.
    pub(super) fn nr_words_below(&self) -> usize {
        (0..self.top).map(|level| index(self.nr_words(level))).sum()
    }

    /// Where the word of a block below the roots lies: pages first, so that the word of a page is at the
    /// number of the page.
    #[inline]
    pub(super) fn place_of(&self, block: Block) -> usize {
        let base = self.bases.get(block.level as usize).copied().unwrap_or(usize::MAX);
        base.saturating_add(index(block.place))
    }

    /// Where the words of all parts of a block lie, its parts' parts included, as far as the block has
    /// any: a range for each level.
    pub(super) fn words_under(&self, block: Block) -> impl Iterator<Item = Range<usize>> {
        let shape = *self;
        (0..block.level).map(move |level| {
            let order = shape.fan_out_order * (block.level - level);
            let first = Block { level, place: block.place << order };
            let start = shape.place_of(first);
            // Whole tables, but not beyond those of the level.
            let most = shape.nr_words(level).saturating_sub(first.place);
            start..start + index(most.min(1 << order))
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn range(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }

    #[test]
    fn words_of_a_table_fill_a_page_and_levels_do_not_overlap() {
        let shape = Shape::of_pages((1 << 18) + 515);
        assert_eq!((shape.nr_roots(), shape.top()), (2, 2));
        let leaves = (1 << 18) + 1024;
        assert_eq!(shape.nr_words_below(), leaves + 1024);
        assert_eq!(shape.place_of(shape.block_of(0, Pgoff::new(77))), 77);
        assert_eq!(shape.place_of(shape.block_of(1, Pgoff::new(0))), leaves);
        assert_eq!(shape.place_of(shape.block_of(1, Pgoff::new((1 << 18) + 514))), leaves + 513);
    }

    #[test]
    fn blocks_at_the_end_are_as_long_as_the_object() {
        let shape = Shape::of_pages((1 << 18) + 515);
        let last = Pgoff::new((1 << 18) + 514);
        let pages = |level| shape.pages_of(shape.block_of(level, last)).unwrap();
        assert_eq!(pages(0), range((1 << 18) + 514, 1));
        assert_eq!(pages(1), range((1 << 18) + 512, 3));
        assert_eq!(pages(2), range(1 << 18, 515));
        assert_eq!(shape.pages_of(Block { level: 2, place: 2 }), None);
        assert_eq!(shape.pages_of(Block { level: 2, place: u64::MAX }), None);
    }

    #[test]
    fn an_object_of_a_table_has_a_word_for_each_block() {
        for nr_pages in [1, 3, 512] {
            let shape = Shape::of_pages(nr_pages);
            let last = Pgoff::new(nr_pages - 1);
            assert_eq!(shape.nr_words_below() as u64, nr_pages + 1);
            assert_eq!(shape.place_of(shape.block_of(0, last)) as u64, nr_pages - 1);
            assert_eq!(shape.place_of(shape.block_of(1, last)) as u64, nr_pages);
            let under = shape.words_under(shape.block_of(2, last)).collect::<Vec<_>>();
            let behind = nr_pages as usize;
            assert_eq!(under, [0..behind, behind..behind + 1]);
        }
        assert_eq!(Shape::of_pages(513).nr_words_below(), 1024 + 512);
    }

    #[test]
    fn the_words_under_a_block_are_whole_tables() {
        let shape = Shape::of_pages((1 << 18) + 515);
        let leaves = (1 << 18) + 1024;
        let under = |block| shape.words_under(block).collect::<Vec<_>>();
        assert_eq!(under(Block { level: 1, place: 1 }), vec![512..1024; 1]);
        let last = Block { level: 2, place: 1 };
        assert_eq!(under(last), [1 << 18..leaves, leaves + 512..leaves + 1024]);
    }
}
