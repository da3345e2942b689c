//! What most conversions hold: one block, which stays one. A [`Frozen`] without its lists.

use std::mem::ManuallyDrop;

use super::frozen::Frozen;
use super::rules::Refusal;
use super::shape::Block;
use super::tree::Tree;
use super::word::{Visibility, Word};
use crate::range::PgoffRange;

/// A block that the holder of this value has frozen, and must release or thaw, or turn into a [`Frozen`]. Dropped, it
/// is quarantined, as that is.
#[derive(Debug)]
#[must_use = "a block whose freeze is dropped is quarantined"]
pub struct FrozenBlock<'t> {
    tree: &'t Tree,
    block: Block,
    pages: PgoffRange,
}

impl<'t> FrozenBlock<'t> {
    #[inline]
    pub(super) fn new(tree: &'t Tree, block: Block, pages: PgoffRange) -> Self {
        Self { tree, block, pages }
    }

    /// The pages that the block speaks for.
    #[inline]
    pub fn pages(&self) -> PgoffRange {
        self.pages
    }

    /// Whether it may be all that there is of a larger block, and ought to be merged. It is not here.
    #[inline]
    pub fn could_merge(&self) -> bool {
        !self.tree.shape().is_too_short(self.block.level, self.pages.start(), self.pages.end())
    }

    /// The same in a list.
    #[inline]
    pub fn into_frozen(self) -> Frozen<'t> {
        let this = ManuallyDrop::new(self);
        Frozen::of_block(this.tree, this.block, this.pages)
    }

    /// Ends the freeze: the block gets this visibility.
    #[inline]
    pub fn release(self, to: Visibility) {
        ManuallyDrop::new(self).end(|word| word.publish(to));
    }

    /// Ends the freeze: the block is as before.
    #[inline]
    pub fn thaw(self) {
        ManuallyDrop::new(self).end(Word::thaw);
    }

    #[inline]
    fn end(&self, rule: impl Fn(Word) -> Result<Word, Refusal>) {
        self.tree.end_block(self.block, rule);
        self.tree.waiters().wake();
    }
}

impl Drop for FrozenBlock<'_> {
    #[cold]
    fn drop(&mut self) {
        self.end(Word::quarantine);
    }
}
