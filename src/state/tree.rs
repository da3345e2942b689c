//! The words of one object: one for a block that is the same all over, more where parts differ.
//!
//! Every block of every level has a word, and at any moment one of them speaks for a page: from the root
//! down, the first that is not split. A part that was not written since the block above it was split
//! inherits from there, so a split is one compare-and-swap however many parts there are. A merge is one
//! store by whoever holds all parts. Numbers of splits tell a part that speaks from one that is out of
//! date. design/state.md has the argument.
//!
//! **A word of a table that is settled speaks.** Only its holder can silence a word, by a merge, and a
//! silenced word stays as it was held until it is written under the next split. So an operation on one
//! page may go to its word directly; all others come down from the root.

use super::cell::{Changed, Counter, StateCell};
use super::epoch::Reader;
use super::flaw::{Flaw, seeded};
use super::rules::{Refusal, Standing};
use super::shape::{Block, Shape};
use super::waiting::Waiters;
use super::word::{Phase, Visibility, Word};
use crate::addr::{ByteSize, Pgoff};
use crate::error::Error;
use crate::geometry::index;
use crate::os::words::{Words, boxed};
use crate::range::PgoffRange;
use crate::sync::{Arc, AtomicU64, relax};

/// Where a range operation stopped, and why. Nothing of it is left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The first subpage that stood in the way.
    At(Pgoff, Refusal),
    /// The same, after all the time that there was.
    TimedOut(Pgoff, Refusal),
    /// The same, until the caller lost interest.
    Cancelled(Pgoff, Refusal),
    /// No memory to write down what was frozen.
    OutOfMemory,
}

impl Stop {
    /// The first subpage that stood in the way, if one did.
    pub fn page(&self) -> Option<Pgoff> {
        match *self {
            Self::At(page, _) | Self::TimedOut(page, _) | Self::Cancelled(page, _) => Some(page),
            Self::OutOfMemory => None,
        }
    }
}

/// Where a pin is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// In the word of the page itself, where it stays.
    InPage,
    /// In whatever words there are for the range when it is dropped.
    InRange,
}

/// The state of an object.
#[derive(Debug)]
pub struct Tree {
    shape: Shape,
    roots: Box<[AtomicU64]>,
    tables: Words,
    /// Tables that have been written since they were last given back.
    pub(super) nr_tables: Counter,
    waiters: Arc<Waiters>,
}

/// The word that spoke for a page.
pub(super) struct Spot<'t> {
    pub(super) cell: StateCell<'t>,
    /// What lies there.
    pub(super) found: Word,
    /// What it means.
    pub(super) word: Word,
    pub(super) block: Block,
    pub(super) pages: PgoffRange,
}

/// Why a step was not made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused {
    pub(super) page: Pgoff,
    pub(super) refusal: Refusal,
    pub(super) visibility: Visibility,
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Self::At(refused.page, refused.refusal)
    }
}

/// A step that was made, or was not needed.
pub(super) struct Step {
    pub(super) block: Block,
    pub(super) pages: PgoffRange,
    /// The word that was written; `None` if it was left alone.
    pub(super) written: Option<Word>,
}

impl Tree {
    /// A tree of idle blocks. `waiters` are woken when something becomes possible.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted).
    pub fn new(
        shape: Shape,
        visibility: Visibility,
        waiters: &Arc<Waiters>,
    ) -> Result<Self, Error> {
        let roots = boxed(shape.nr_roots())?;
        for root in &roots {
            StateCell::new(root).set(Word::new(visibility).with_stamp(1));
        }
        let nr_words = shape.nr_words_below();
        let tables = if shape.is_one_table() { Words::few(nr_words) } else { Words::new(nr_words) };
        Ok(Self {
            shape,
            roots,
            tables: tables?,
            nr_tables: Counter::new(),
            waiters: Arc::clone(waiters),
        })
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(super) fn tables(&self) -> &Words {
        &self.tables
    }

    pub(super) fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    /// The memory that the words take: the roots, and the tables that have been written. Where there is one table,
    /// that is there from the start.
    pub fn metadata(&self) -> ByteSize {
        let word = size_of::<u64>() as u64;
        let in_tables = self.shape.nr_words_taken(self.nr_tables.get());
        ByteSize::from_bytes((self.roots.len() as u64).saturating_add(in_tables) * word)
    }

    /// The cell of a block, whether or not it speaks.
    #[inline]
    pub(super) fn cell(&self, block: Block) -> Option<StateCell<'_>> {
        let bits = if block.level == self.shape.top() {
            self.roots.get(usize::try_from(block.place).ok()?)?
        } else {
            self.tables.get(self.shape.place_of(block))?
        };
        Some(StateCell::new(bits))
    }

    /// Finds the word that speaks for a page; `None` past the end. What it says may change at once;
    /// only an exchange for exactly what was found shows that it has not.
    ///
    /// To be called inside of a section: outside, a trim may zero a part between the look at the block above
    /// it and the look at the part, which then seems to inherit what it has long ceased to be. What is
    /// found outside of one is a guess.
    #[inline]
    pub(super) fn locate(&self, page: Pgoff) -> Option<Spot<'_>> {
        if page.get() >= self.shape.nr_pages() {
            return None;
        }
        'from_the_root: loop {
            let mut block = self.shape.block_of(self.shape.top(), page);
            let mut cell = self.cell(block)?;
            let mut found = cell.load();
            let mut word = found;
            while word.is_split() {
                block = self.shape.block_of(block.level.checked_sub(1)?, page);
                cell = self.cell(block)?;
                found = cell.load();
                word = match found.standing(word, self.shape.nr_splits()) {
                    Standing::Speaks => found,
                    Standing::Inherits => Word::inherit(word, found),
                    Standing::Stale if seeded(Flaw::TakesLaterPartsForOlder) => {
                        Word::inherit(word, found)
                    }
                    // The block above was merged and split again since it was read.
                    Standing::Stale => continue 'from_the_root,
                };
            }
            return Some(Spot { cell, found, word, block, pages: self.shape.pages_of(block)? });
        }
    }

    /// The word of a page; `None` past the end. To be called inside of a section.
    pub fn load(&self, page: Pgoff) -> Option<Word> {
        self.locate(page).map(|spot| spot.word.bare())
    }

    /// The words of a range in ascending order, each with the pages that it speaks for, as they are when
    /// the iterator gets there. Each step is to be made inside of a section.
    pub fn spans(&self, range: PgoffRange) -> impl Iterator<Item = (PgoffRange, Word)> {
        let mut next = range.start();
        std::iter::from_fn(move || {
            let spot = self.locate(next)?;
            let rest = range.slice(next.get() - range.start().get(), u64::MAX)?;
            next = spot.pages.end();
            Some((spot.pages.intersection(&rest)?, spot.word.bare()))
        })
    }

    /// Whether the host may touch a page now. To be called inside of a section.
    #[inline]
    pub fn is_open(&self, page: Pgoff) -> bool {
        let own = self.own_cell(page).map(StateCell::load);
        let speaks = |word: &Word| word.phase() == Phase::Settled && word.stamp() != 0;
        match own.filter(speaks) {
            Some(word) => word.is_open(),
            None => self.is_open_from_root(page),
        }
    }

    #[inline(never)]
    fn is_open_from_root(&self, page: Pgoff) -> bool {
        self.locate(page).is_some_and(|spot| spot.word.is_open())
    }

    /// Whether the host may touch all of the range now; the first subpage that it may not. To be called
    /// inside of a section.
    ///
    /// # Errors
    /// Where, and what was found.
    #[inline]
    pub fn check_open(&self, range: PgoffRange) -> Result<(), Stop> {
        let mut page = range.start();
        while page < range.end() {
            let Some(spot) = self.locate(page) else { return Ok(()) };
            if !spot.word.is_open() {
                // Not open, so a pin is refused as well, and says why. A fold changes nothing.
                let word = spot.word.unfold().unwrap_or(spot.word);
                let refusal = word.pin().err().unwrap_or(Refusal::Converting);
                return Err(Stop::At(page, refusal));
            }
            page = spot.pages.end();
        }
        Ok(())
    }

    /// Applies a rule, once, atomically, to the block that speaks for a page, or if that reaches beyond
    /// `range`, to a part of it. A rule that says `None` leaves the block as it is.
    pub(super) fn step(
        &self,
        reader: &Reader,
        page: Pgoff,
        range: PgoffRange,
        rule: impl Fn(Word) -> Result<Option<Word>, Refusal>,
    ) -> Result<Option<Step>, Refused> {
        let mut folding = 0;
        loop {
            // So that nobody can merge, split and merge again while we hold what we have read.
            let section = reader.enter();
            let Some(spot) = self.locate(page) else { return Ok(None) };
            let Spot { word, block, pages, .. } = spot;
            let next = match rule(word) {
                Ok(None) => return Ok(Some(Step { block, pages, written: None })),
                Ok(Some(next)) => next,
                Err(_) if seeded(Flaw::SplitsFrozenBlocks) && !range.covers(&pages) => word,
                Err(Refusal::Folding) => {
                    // Over in a moment, but not as long as we are in a section.
                    drop(section);
                    relax(folding);
                    folding = folding.saturating_add(1);
                    continue;
                }
                Err(refusal) => {
                    return Err(Refused { page, refusal, visibility: word.visibility() });
                }
            };
            if range.covers(&pages) {
                if self.write(&spot, next).is_ok() {
                    return Ok(Some(Step { block, pages, written: Some(next) }));
                }
            } else if self.write(&spot, word.split(self.shape.nr_splits())).is_ok() {
                if seeded(Flaw::FillsTables) {
                    self.fill(&spot);
                }
                if word.splits() == 0 {
                    self.nr_tables.add(1);
                }
            }
        }
    }

    /// Only seeded: writes into all parts of a block that has just been split what they inherit.
    fn fill(&self, above: &Spot<'_>) {
        let split = above.word.split(self.shape.nr_splits());
        for part in self.shape.blocks(above.block.level - 1, above.pages) {
            if let Some(cell) = self.cell(part) {
                cell.set(Word::inherit(split, cell.load()));
            }
        }
    }

    /// Replaces the word of a spot.
    pub(super) fn write(&self, spot: &Spot<'_>, next: Word) -> Result<(), Changed> {
        let is_first = spot.found.stamp() != spot.word.stamp();
        if seeded(Flaw::WritesBlindly) || seeded(Flaw::WritesPartsBlindly) && is_first {
            spot.cell.set(next);
            return Ok(());
        }
        spot.cell.replace(spot.found, next)
    }

    /// Exchanges the word that speaks for a page for itself, if the rule agrees: of two exchanges the
    /// later sees the earlier, which a load does not. Returns the pages that the word speaks for.
    pub(super) fn touch(
        &self,
        reader: &Reader,
        page: Pgoff,
        rule: impl Fn(Word) -> Result<(), Refusal>,
    ) -> Result<Option<PgoffRange>, Refused> {
        let mut folding = 0;
        loop {
            // As in `step`, for what was found is written back.
            let section = (!seeded(Flaw::TouchesWithoutSection)).then(|| reader.enter());
            let Some(spot) = self.locate(page) else { return Ok(None) };
            match rule(spot.word) {
                Ok(()) if self.write(&spot, spot.word).is_ok() => return Ok(Some(spot.pages)),
                Ok(()) => {}
                Err(Refusal::Folding) => {
                    // As in `step`.
                    drop(section);
                    relax(folding);
                    folding = folding.saturating_add(1);
                }
                Err(refusal) => {
                    return Err(Refused { page, refusal, visibility: spot.word.visibility() });
                }
            }
        }
    }

    /// Pins every subpage of the range.
    ///
    /// # Errors
    /// Where, and what was found.
    #[inline]
    pub fn pin(&self, reader: &Reader, range: PgoffRange) -> Result<Counted, Stop> {
        if range.nr_pages() == 1 && self.pin_page(range.start()) {
            return Ok(Counted::InPage);
        }
        let rule = |word: Word| match word.phase() {
            Phase::Draining if seeded(Flaw::DrainingLetsPinsIn) => {
                word.with_phase(Phase::Settled).pin().map(|word| word.with_phase(Phase::Draining))
            }
            _ => word.pin(),
        };
        self.take(reader, range, rule, Word::unpin)?;
        Ok(Counted::InRange)
    }

    /// Pins a page by its own word, if that speaks and is willing. Needs no section: a word that is
    /// settled speaks, so if the exchange succeeds the pin is good, whatever has happened before.
    #[inline]
    pub fn pin_page(&self, page: Pgoff) -> bool {
        let Some(cell) = self.own_cell(page) else { return false };
        loop {
            let found = cell.load();
            match found.pin() {
                // A word that was never written would pass for a shared one.
                Ok(next) if found.stamp() != 0 || seeded(Flaw::PinsUnwrittenPages) => {
                    if cell.replace(found, next).is_ok() {
                        return true;
                    }
                }
                _ => return false,
            }
        }
    }

    /// The word of a page itself, if the block above seems to be split: the tables of whole blocks are
    /// not to be touched. What it says counts only if it is settled.
    #[inline]
    fn own_cell(&self, page: Pgoff) -> Option<StateCell<'_>> {
        let above = self.cell(self.shape.block_of(1, page))?.guess();
        (above.is_split() && page.get() < self.shape.nr_pages()).then_some(())?;
        self.tables.get(index(page.get())).map(StateCell::new)
    }

    /// The spot of a page whose own word is settled, and so speaks. A word that was never written is not.
    #[inline]
    pub(super) fn own_spot(&self, page: Pgoff) -> Option<Spot<'_>> {
        let cell = self.own_cell(page)?;
        let word = cell.load();
        let speaks = word.phase() == Phase::Settled && word.stamp() != 0;
        let pages = PgoffRange::before(Pgoff::new(self.shape.nr_pages()), page, 1)?;
        let block = self.shape.block_of(0, page);
        speaks.then_some(Spot { cell, found: word, word, block, pages })
    }

    /// Drops a pin from every subpage of the range, in whatever words they are.
    pub fn unpin(&self, reader: &Reader, range: PgoffRange) {
        self.give_back(reader, range, Word::unpin);
    }

    /// Drops a pin that is counted in the page's own word. As long as it is there the word is neither
    /// frozen nor merged, and a page cannot be split.
    #[inline]
    pub fn unpin_page(&self, page: Pgoff) {
        if let Some(cell) = self.tables.get(index(page.get())).map(StateCell::new) {
            let before = cell.drop_pin();
            debug_assert!(before.pins() > 0, "{page:?}: {before:?}");
            if before.phase() == Phase::Draining {
                self.waiters.wake();
            }
        }
    }

    /// Pins every subpage of the range exclusively.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn pin_exclusive(&self, reader: &Reader, range: PgoffRange) -> Result<Counted, Stop> {
        self.take(reader, range, Word::pin_exclusive, Word::unpin_exclusive)?;
        Ok(Counted::InRange)
    }

    /// Drops the exclusive pin from every subpage of the range.
    pub fn unpin_exclusive(&self, reader: &Reader, range: PgoffRange) {
        self.give_back(reader, range, Word::unpin_exclusive);
    }

    fn take(
        &self,
        reader: &Reader,
        range: PgoffRange,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
        inverse: impl Fn(Word) -> Result<Word, Refusal>,
    ) -> Result<(), Stop> {
        let mut page = range.start();
        while page < range.end() {
            match self.step(reader, page, range, |word| rule(word).map(Some)) {
                Ok(Some(step)) => page = step.pages.end(),
                Ok(None) => break,
                Err(refused) => {
                    let nr_taken = page.get() - range.start().get();
                    if let Some(taken) = range.slice(0, nr_taken) {
                        self.give_back(reader, taken, inverse);
                    }
                    return Err(refused.into());
                }
            }
        }
        Ok(())
    }

    /// Applies a rule that cannot be refused, because the caller holds what it ends. The blocks may be
    /// smaller than those that were taken, never larger.
    fn give_back(
        &self,
        reader: &Reader,
        range: PgoffRange,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
    ) {
        let mut wake = false;
        let mut page = range.start();
        while page < range.end() {
            match self.step(reader, page, range, |word| rule(word).map(Some)) {
                Ok(Some(step)) => {
                    wake |= step.written.is_some_and(|word| word.phase() == Phase::Draining);
                    page = step.pages.end();
                }
                outcome => {
                    let found = outcome.err();
                    debug_assert!(false, "{page:?} of {range:?} is not held: {found:?}");
                    break;
                }
            }
        }
        if wake {
            self.waiters.wake();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod property;
#[cfg(all(test, not(loom)))]
mod tests;
