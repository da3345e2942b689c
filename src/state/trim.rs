//! Giving memory back: parts that have become alike are one word again, and tables that nobody needs go
//! back to the host.

use super::epoch::Reader;
use super::flaw::{Flaw, seeded};
use super::frozen::{Held, Holdings, Role};
use super::rules::Refusal;
use super::shape::Block;
use super::tree::Tree;
use super::word::{Phase, Visibility, Word};
use crate::addr::ByteSize;
use crate::error::Error;
use crate::range::PgoffRange;

/// A block that is being folded. Dropped, it stays as it was.
struct Folding<'t> {
    tree: &'t Tree,
    held: Holdings,
}

impl Drop for Folding<'_> {
    fn drop(&mut self) {
        self.tree.end_each(&self.held, Word::unfold);
        if !self.held.is_empty() {
            self.tree.waiters().wake();
        }
    }
}

impl Tree {
    /// Makes one word of many wherever all parts of a block are alike and nobody holds one, and gives
    /// back the tables that are not needed then. Returns how much that was.
    ///
    /// Accesses go on meanwhile; a pin or a conversion that comes to a block in the moment in which it is
    /// folded waits for that moment.
    ///
    /// # Errors
    /// That of the system call that gives memory back. All words say what they said before.
    pub fn trim(&self, reader: &Reader) -> Result<ByteSize, Error> {
        let before = self.metadata().get();
        for place in 0..self.shape().nr_roots() {
            self.trim_block(reader, Block { level: self.shape().top(), place: place as u64 })?;
        }
        Ok(ByteSize::from_bytes(before.saturating_sub(self.metadata().get())))
    }

    fn trim_block(&self, reader: &Reader, block: Block) -> Result<(), Error> {
        let Some(pages) = self.shape().pages_of(block) else { return Ok(()) };
        let spot = self.locate(pages.start()).filter(|spot| spot.block.level <= block.level);
        // Part of something larger, or whole and without tables.
        let Some(spot) = spot else { return Ok(()) };
        if spot.block == block && spot.word.splits() == 0 {
            return Ok(());
        }
        if let Some(folding) = self.fold(reader, pages) {
            return self.give_back_tables(reader, block, folding);
        }
        for part in self.shape().blocks(block.level - 1, pages).filter(|part| part.level > 0) {
            self.trim_block(reader, part)?;
        }
        Ok(())
    }

    /// Takes hold of all parts of a range, if they are alike and idle.
    fn fold(&self, reader: &Reader, range: PgoffRange) -> Option<Folding<'_>> {
        let alike = self.load(range.start())?;
        // A look before the first step: most blocks are not worth one.
        if !self.spans(range).all(|(_, word)| word == alike) || alike.fold().is_err() {
            return None;
        }
        let mut folding = Folding { tree: self, held: Holdings::default() };
        let mut page = range.start();
        while page < range.end() {
            let fold = |word: Word| match word.bare() == alike {
                true => word.fold().map(Some),
                false => Err(Refusal::Converting),
            };
            let step = self.step(reader, page, range, fold).ok()??;
            page = step.pages.end();
            let held = Held { level: step.block.level, pages: step.pages, role: Role::Along };
            if !folding.held.push(held) {
                self.end_each(&Holdings::one(held), Word::unfold);
                return None;
            }
        }
        Some(folding)
    }

    /// Makes the block one word, and zeroes the tables below it when nobody looks into them any more.
    fn give_back_tables(
        &self,
        reader: &Reader,
        block: Block,
        mut folding: Folding<'_>,
    ) -> Result<(), Error> {
        let Some(cell) = self.cell(block) else { return Ok(()) };
        if cell.load().is_split() {
            // The wait for this merge comes after it, while the block is still ours. If there can be none,
            // there is no merge: the numbers of splits could go round.
            if !reader.can_wait() {
                return Ok(());
            }
            let held = folding.held.iter().next();
            let visibility = held.and_then(|held| self.load(held.pages.start()));
            let visibility = visibility.map_or(Visibility::Private, Word::visibility);
            self.merge(block, Word::new(visibility).with_phase(Phase::Folding));
            let Some(pages) = self.shape().pages_of(block) else { return Ok(()) };
            folding.held = Holdings::one(Held { level: block.level, pages, role: Role::Along });
        }
        // Whoever came down before the merge has left when this returns. From then on nobody looks below
        // the block, for whose word is not split, and cannot be split: it is ours.
        if !seeded(Flaw::TrimsWithoutWaiting) && !reader.wait_for_others() {
            return Ok(());
        }
        let nr_tables = self.nr_tables_under(block);
        // Words of pages first: if this stops half way, the numbers of their splits are still known.
        for words in self.shape().words_under(block) {
            self.tables().give_back(words)?;
        }
        self.nr_tables.sub(nr_tables);
        cell.set(cell.load().with_splits(0));
        Ok(())
    }

    /// How many tables below a block have been written since they were given back last.
    fn nr_tables_under(&self, block: Block) -> u64 {
        let split = |block| self.cell(block).is_some_and(|cell| cell.load().splits() > 0);
        let Some(pages) = self.shape().pages_of(block).filter(|_| split(block)) else { return 0 };
        let parts = self.shape().blocks(block.level - 1, pages).filter(|part| part.level > 0);
        1 + parts.map(|part| self.nr_tables_under(part)).sum::<u64>()
    }
}
