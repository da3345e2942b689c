//! The words of one object, and what is done to a range of them: in ascending order, all or nothing.

use super::cell::StateCell;
use super::rules::Refusal;
use super::word::{Phase, Visibility, Word};
use crate::addr::Pgoff;
use crate::error::{Error, ErrorKind, Op};
use crate::range::PgoffRange;

/// Where a range operation stopped, and why. Nothing of it is left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The first subpage that stood in the way.
    At(Pgoff, Refusal),
    /// No memory to write down what was frozen.
    OutOfMemory,
}

/// Subpages that the holder of this value has frozen, and must release or thaw. If it is dropped
/// instead, which only an unwinding panic does, nobody knows how far the change came: the subpages
/// are quarantined.
#[derive(Debug)]
#[must_use = "subpages whose freeze is dropped are quarantined"]
pub struct Frozen<'t> {
    table: &'t Table,
    runs: Vec<PgoffRange>,
}

impl Frozen<'_> {
    /// The frozen subpages, as runs in ascending order that do not touch.
    pub fn runs(&self) -> &[PgoffRange] {
        &self.runs
    }

    /// Ends the freeze: the subpages get this visibility.
    pub fn release(mut self, to: Visibility) {
        self.end(|word| word.publish(to));
    }

    /// Ends the freeze: the subpages are as before.
    pub fn thaw(mut self) {
        self.end(Word::thaw);
    }

    fn end(&mut self, rule: impl Fn(Word) -> Result<Word, Refusal>) {
        for run in std::mem::take(&mut self.runs) {
            self.table.give_back(run, &rule);
        }
    }

    /// Adds a page that lies behind all others and that has just been frozen.
    fn push(&mut self, page: PgoffRange) -> Result<(), Stop> {
        if let Some(last) = self.runs.last_mut() {
            if last.end() == page.start() {
                let longer = PgoffRange::new(last.start(), last.nr_pages() + 1);
                *last = longer.map_err(|_| Stop::OutOfMemory)?;
                return Ok(());
            }
        }
        self.runs.try_reserve(1).map_err(|_| Stop::OutOfMemory)?;
        self.runs.push(page);
        Ok(())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.end(Word::quarantine);
    }
}

/// The state of an object: one word for each subpage.
#[derive(Debug)]
pub struct Table {
    cells: Box<[StateCell]>,
}

impl Table {
    /// Words for so many subpages.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn new(nr_pages: u64, visibility: Visibility) -> Result<Self, Error> {
        let exhausted = || Error::new(Op::CreateObject, ErrorKind::Exhausted);
        let len = usize::try_from(nr_pages).map_err(|_| exhausted())?;
        let mut cells = Vec::new();
        cells.try_reserve_exact(len).map_err(|_| exhausted())?;
        cells.resize_with(len, || StateCell::new(visibility));
        Ok(Self { cells: cells.into_boxed_slice() })
    }

    /// The word of a subpage; `None` past the end.
    pub fn load(&self, page: Pgoff) -> Option<Word> {
        self.cell(page).map(StateCell::load)
    }

    fn cell(&self, page: Pgoff) -> Option<&StateCell> {
        self.cells.get(usize::try_from(page.get()).ok()?)
    }

    /// Whether the host may touch all of the range now; the first subpage that it may not.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn check_open(&self, range: PgoffRange) -> Result<(), Stop> {
        for (page, cell) in self.cells_of(range) {
            let word = cell.load();
            if !word.is_open() {
                // A shared word that is not open is frozen or quarantined: freeze names which.
                return Err(Stop::At(page, word.pin().err().unwrap_or(Refusal::Converting)));
            }
        }
        Ok(())
    }

    /// Pins every subpage of the range.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn pin(&self, range: PgoffRange) -> Result<(), Stop> {
        self.take(range, Word::pin, Word::unpin)
    }

    /// Drops a pin from every subpage of the range.
    pub fn unpin(&self, range: PgoffRange) {
        self.give_back(range, Word::unpin);
    }

    /// Pins every subpage of the range exclusively.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn pin_exclusive(&self, range: PgoffRange) -> Result<(), Stop> {
        self.take(range, Word::pin_exclusive, Word::unpin_exclusive)
    }

    /// Drops the exclusive pin from every subpage of the range.
    pub fn unpin_exclusive(&self, range: PgoffRange) {
        self.give_back(range, Word::unpin_exclusive);
    }

    /// Freezes the subpages of the range that are not `to` yet; the others are left alone,
    /// whoever holds them.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn freeze_for(&self, range: PgoffRange, to: Visibility) -> Result<Frozen<'_>, Stop> {
        self.freeze_where(range, |word| word.visibility() != to)
    }

    /// Freezes every subpage of the range.
    ///
    /// # Errors
    /// Where, and what was found.
    pub fn freeze(&self, range: PgoffRange) -> Result<Frozen<'_>, Stop> {
        self.freeze_where(range, |_| true)
    }

    fn cells_of(&self, range: PgoffRange) -> impl Iterator<Item = (Pgoff, &StateCell)> {
        range.iter().filter_map(|page| Some((page, self.cell(page)?)))
    }

    fn take(
        &self,
        range: PgoffRange,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
        inverse: impl Fn(Word) -> Result<Word, Refusal>,
    ) -> Result<(), Stop> {
        for (taken, (page, cell)) in (0..).zip(self.cells_of(range)) {
            if let Err(refusal) = cell.step(&rule) {
                if let Some(taken) = range.slice(0, taken) {
                    self.give_back(taken, inverse);
                }
                return Err(Stop::At(page, refusal));
            }
        }
        Ok(())
    }

    /// Applies a rule that cannot be refused, because the caller holds what it ends.
    fn give_back(&self, range: PgoffRange, rule: impl Fn(Word) -> Result<Word, Refusal>) {
        for (page, cell) in self.cells_of(range) {
            let outcome = cell.step(&rule);
            debug_assert!(outcome.is_ok(), "{page:?}: {outcome:?}, found {:?}", cell.load());
        }
    }

    fn freeze_where(
        &self,
        range: PgoffRange,
        wanted: impl Fn(Word) -> bool,
    ) -> Result<Frozen<'_>, Stop> {
        let mut frozen = Frozen { table: self, runs: Vec::new() };
        let outcome = self.freeze_each(&mut frozen, range, &wanted);
        match outcome.and_then(|()| self.check_left_alone(&frozen, range, &wanted)) {
            Ok(()) => Ok(frozen),
            Err(stop) => {
                frozen.thaw();
                Err(stop)
            }
        }
    }

    fn freeze_each(
        &self,
        frozen: &mut Frozen<'_>,
        range: PgoffRange,
        wanted: impl Fn(Word) -> bool,
    ) -> Result<(), Stop> {
        for (page, cell) in self.cells_of(range) {
            let step = cell.step(|word| match word.phase() {
                Phase::Settled if !wanted(word) => Ok(word),
                _ => word.freeze(),
            });
            match step {
                Ok(before) if !wanted(before) => {}
                Ok(_) => self.note(frozen, page)?,
                Err(refusal) => return Err(Stop::At(page, refusal)),
            }
        }
        Ok(())
    }

    /// Whether the pages that were left alone are still as they should be, now that all others are
    /// frozen. Otherwise two conversions of one mixed range in opposite directions could both
    /// succeed, each on the pages that the other left alone.
    ///
    /// A step that changes nothing, not a load: of two steps on a word the later sees the earlier.
    fn check_left_alone(
        &self,
        frozen: &Frozen<'_>,
        range: PgoffRange,
        wanted: impl Fn(Word) -> bool,
    ) -> Result<(), Stop> {
        let nr_frozen: u64 = frozen.runs.iter().map(PgoffRange::nr_pages).sum();
        if nr_frozen == 0 || nr_frozen == range.nr_pages() {
            return Ok(());
        }
        let mut next = range.start();
        for run in frozen.runs.iter().copied().chain(PgoffRange::new(range.end(), 1)) {
            let nr_between = run.start().get() - next.get();
            let between = PgoffRange::new(next, nr_between);
            for (page, cell) in between.into_iter().flat_map(|between| self.cells_of(between)) {
                cell.step(|word| match word.phase() {
                    Phase::Settled if !wanted(word) => Ok(word),
                    Phase::Quarantined => Err(Refusal::Quarantined),
                    _ => Err(Refusal::Converting),
                })
                .map_err(|refusal| Stop::At(page, refusal))?;
            }
            next = run.end();
        }
        Ok(())
    }

    /// Writes down a page that has just been frozen, or thaws it.
    fn note(&self, frozen: &mut Frozen<'_>, page: Pgoff) -> Result<(), Stop> {
        let page = PgoffRange::single(page).map_err(|_| Stop::OutOfMemory)?;
        frozen.push(page).inspect_err(|_| self.give_back(page, Word::thaw))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn table(nr_pages: u64, visibility: Visibility) -> Table {
        Table::new(nr_pages, visibility).unwrap()
    }

    fn range(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }

    fn words(table: &Table) -> Vec<String> {
        table.cells.iter().map(|cell| format!("{:?}", cell.load())).collect()
    }

    #[test]
    fn a_refused_pin_leaves_no_trace() {
        let table = table(4, Visibility::Shared);
        table.pin_exclusive(range(2, 1)).unwrap();
        let before = words(&table);
        let stop = table.pin(range(0, 4)).unwrap_err();
        assert_eq!(stop, Stop::At(Pgoff::new(2), Refusal::Exclusive));
        assert_eq!(words(&table), before);
    }

    #[test]
    fn a_refused_freeze_leaves_no_trace() {
        let table = table(4, Visibility::Shared);
        table.pin(range(3, 1)).unwrap();
        table.pin(range(3, 1)).unwrap();
        let before = words(&table);
        let stop = table.freeze_for(range(0, 4), Visibility::Private).unwrap_err();
        assert_eq!(stop, Stop::At(Pgoff::new(3), Refusal::Pinned(2)));
        assert_eq!(words(&table), before);
    }

    #[test]
    fn pages_that_have_the_visibility_already_are_left_alone_even_if_pinned() {
        let table = table(4, Visibility::Private);
        let frozen = table.freeze(range(1, 1)).unwrap();
        frozen.release(Visibility::Shared);
        table.pin(range(1, 1)).unwrap();
        let frozen = table.freeze_for(range(0, 4), Visibility::Shared).unwrap();
        assert_eq!(frozen.runs(), [range(0, 1), range(2, 2)]);
        frozen.release(Visibility::Shared);
        assert_eq!(table.check_open(range(0, 4)), Ok(()));
        assert_eq!(table.load(Pgoff::new(1)).unwrap().pins(), 1);
    }

    #[test]
    fn the_check_names_what_it_found() {
        let table = table(2, Visibility::Shared);
        let frozen = table.freeze(range(1, 1)).unwrap();
        let all = range(0, 2);
        assert_eq!(table.check_open(all), Err(Stop::At(Pgoff::new(1), Refusal::Converting)));
        drop(frozen);
        assert_eq!(table.check_open(all), Err(Stop::At(Pgoff::new(1), Refusal::Quarantined)));
        assert_eq!(table.load(Pgoff::new(1)).unwrap().phase(), Phase::Quarantined);
        assert_eq!(table.load(Pgoff::new(2)), None);
    }

    #[test]
    fn pins_saturate_and_unwind() {
        let table = table(2, Visibility::Shared);
        for _ in 0..Word::MAX_PINS {
            table.pin(range(1, 1)).unwrap();
        }
        let stop = table.pin(range(0, 2)).unwrap_err();
        assert_eq!(stop, Stop::At(Pgoff::new(1), Refusal::Saturated));
        assert_eq!(table.load(Pgoff::new(0)).unwrap().pins(), 0);
    }
}
