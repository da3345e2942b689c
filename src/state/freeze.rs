//! How a conversion gets hold of what it changes: at once or not at all, or with time to wait.
//!
//! A conversion freezes what is not on its side yet, in ascending order. What is on its side already is
//! left alone, whoever holds it, and looked at once more when the rest is frozen: otherwise two
//! conversions of one mixed range in opposite directions could both succeed, each on what the other left
//! alone.
//!
//! With time to wait, what cannot be had at once drains: pins go and none come, and accesses go on until the
//! last pin is gone. Nobody waits in a circle. Two
//! conversions of one direction meet in ascending order. Of two in opposite directions the one to
//! shared gives way: it lets go of all that it has before it waits for the other.

use super::epoch::Reader;
use super::flaw::{Flaw, seeded};
use super::frozen::{Frozen, Held, Holdings, Role};
use super::frozen_block::FrozenBlock;
use super::rules::Refusal;
use super::tree::{Refused, Spot, Stop, Tree};
use super::waiting::{Wait, Waited};
use super::word::{Phase, Visibility, Word};
use crate::addr::Pgoff;
use crate::range::PgoffRange;

/// What a freeze is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every subpage.
    All,
    /// Those that do not have this visibility yet.
    Other(Visibility),
}

impl Wanted {
    /// Whether a block is left alone: it is on the right side, and nobody is about to change that.
    fn spares(self, word: Word) -> bool {
        self == Self::Other(word.visibility()) && word.phase() == Phase::Settled
    }
}

/// A freeze that is not complete yet. Dropped, it has never been.
struct Freezing<'t> {
    tree: &'t Tree,
    held: Holdings,
    /// What was left alone at first.
    along: Holdings,
}

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        if seeded(Flaw::GivesUpWithoutUndoing) || self.held.is_empty() {
            return;
        }
        for holdings in [&self.held, &self.along] {
            self.tree.end_each(holdings, Word::thaw);
        }
        self.tree.waiters().wake();
    }
}

impl<'t> Freezing<'t> {
    fn new(tree: &'t Tree) -> Self {
        Self { tree, held: Holdings::default(), along: Holdings::default() }
    }

    /// Writes down a block that has just been taken, or lets it go.
    #[inline]
    fn note(&mut self, level: u32, pages: PgoffRange, role: Role) -> Result<(), Stop> {
        let held = Held { level, pages, role };
        let list = match role {
            Role::Along => &mut self.along,
            Role::Changes | Role::Drains => &mut self.held,
        };
        match list.push(held) {
            true => Ok(()),
            false => self.let_go(held),
        }
    }

    #[cold]
    fn let_go(&self, held: Held) -> Result<(), Stop> {
        self.tree.end_each(&Holdings::one(held), Word::thaw);
        self.tree.waiters().wake();
        Err(Stop::OutOfMemory)
    }

    fn finish(mut self) -> Result<Frozen<'t>, Stop> {
        if !self.along.is_empty() {
            self.held = self.held.interleaved(&self.along).ok_or(Stop::OutOfMemory)?;
            self.along = Holdings::default();
        }
        Frozen::new(self.tree, std::mem::take(&mut self.held))
    }
}

/// Why a freeze did not come about.
enum Outcome {
    Stopped(Stop),
    /// Somebody is at a page who must not be waited for with anything in hand.
    GaveWay(Refused),
}

impl From<Stop> for Outcome {
    fn from(stop: Stop) -> Self {
        Self::Stopped(stop)
    }
}

impl Tree {
    /// Freezes what is wanted of the ranges, which are in ascending order and neither overlap nor touch.
    /// What is left alone is so in one moment with the freeze.
    ///
    /// # Errors
    /// Where, and what was found: at once, or when there is no more time to wait.
    pub fn freeze(
        &self,
        reader: &Reader,
        ranges: &[PgoffRange],
        wanted: Wanted,
        wait: &Wait,
    ) -> Result<Frozen<'_>, Stop> {
        if let [range] = *ranges {
            if let Some(block) = self.freeze_block(reader, range, wanted) {
                return Ok(block.into_frozen());
            }
        }
        // What can be had at once need not drain.
        match self.freeze_once(reader, ranges, wanted, &Wait::never()) {
            Err(Outcome::Stopped(Stop::At(_, refusal)))
                if !wait.is_never() && refusal != Refusal::Quarantined => {}
            Ok(frozen) => return Ok(frozen),
            Err(Outcome::Stopped(stop)) => return Err(stop),
            Err(Outcome::GaveWay(_)) => {}
        }
        loop {
            match self.freeze_once(reader, ranges, wanted, wait) {
                Ok(frozen) => return Ok(frozen),
                Err(Outcome::Stopped(stop)) => return Err(stop),
                Err(Outcome::GaveWay(refused)) => self.await_settled(wait, refused.page)?,
            }
        }
    }

    /// Quarantines a range that others may have pinned, who keep it until they let go. Nobody else comes to it;
    /// who is inside of a section may be.
    ///
    /// # Errors
    /// The first page that somebody is about to change. The others are quarantined all the same.
    pub fn condemn(&self, reader: &Reader, range: PgoffRange) -> Result<(), Stop> {
        let rule = |word: Word| match word.phase() {
            Phase::Quarantined => Ok(None),
            _ => word.condemn().map(Some),
        };
        let mut outcome = Ok(());
        let mut page = range.start();
        while page < range.end() {
            match self.step(reader, page, range, rule) {
                Ok(Some(step)) => page = step.pages.end(),
                Ok(None) => break,
                Err(refused) => {
                    outcome = outcome.and(Err(refused.into()));
                    page = Pgoff::new(page.get() + 1);
                }
            }
        }
        outcome
    }

    /// Freezes a range that is one block and can be frozen at once, as most can. `None`: it is something
    /// else, or is refused, and nothing has been done.
    #[inline]
    pub fn freeze_block(
        &self,
        reader: &Reader,
        range: PgoffRange,
        wanted: Wanted,
    ) -> Option<FrozenBlock<'_>> {
        if range.nr_pages() == 1 {
            // Needs no section, for the same reason as a pin of a page.
            if let Some(spot) = self.own_spot(range.start()) {
                return self.freeze_spot(&spot, range, wanted);
            }
        }
        let _section = reader.enter();
        let spot = self.locate(range.start()).filter(|spot| spot.pages == range)?;
        self.freeze_spot(&spot, range, wanted)
    }

    #[inline]
    fn freeze_spot(
        &self,
        spot: &Spot<'_>,
        range: PgoffRange,
        wanted: Wanted,
    ) -> Option<FrozenBlock<'_>> {
        let frozen = spot.word.freeze().ok().filter(|_| !wanted.spares(spot.word))?;
        self.write(spot, frozen).ok()?;
        Some(FrozenBlock::new(self, spot.block, range))
    }

    /// Freezes a page by its own word, if that speaks and nobody is in the way. Needs no section, as in
    /// [`freeze_block`](Self::freeze_block).
    #[inline]
    fn freeze_page(
        &self,
        freezing: &mut Freezing<'_>,
        page: Pgoff,
        wanted: Wanted,
    ) -> Result<bool, Stop> {
        let Some(spot) = self.own_spot(page).filter(|spot| !wanted.spares(spot.word)) else {
            return Ok(false);
        };
        let Ok(frozen) = spot.word.freeze() else { return Ok(false) };
        if self.write(&spot, frozen).is_err() {
            return Ok(false);
        }
        freezing.note(spot.block.level, spot.pages, Role::Changes)?;
        Ok(true)
    }

    fn freeze_once(
        &self,
        reader: &Reader,
        ranges: &[PgoffRange],
        wanted: Wanted,
        wait: &Wait,
    ) -> Result<Frozen<'_>, Outcome> {
        let mut freezing = Freezing::new(self);
        freezing.held.make_room(ranges.len());
        for &range in ranges {
            let mut page = range.start();
            while page < range.end() {
                // What is waited for drains first.
                if wait.is_never() && self.freeze_page(&mut freezing, page, wanted)? {
                    page = Pgoff::new(page.get() + 1);
                    continue;
                }
                match self.step(reader, page, range, |word| first_look(word, wanted, wait)) {
                    Ok(Some(step)) => {
                        page = step.pages.end();
                        match step.written.map(Word::phase) {
                            None => {}
                            Some(Phase::Draining) => {
                                freezing.note(step.block.level, step.pages, Role::Drains)?
                            }
                            Some(_) => {
                                freezing.note(step.block.level, step.pages, Role::Changes)?
                            }
                        }
                    }
                    Ok(None) => break,
                    Err(refused) => self.wait_or_give_way(wanted, wait, refused)?,
                }
            }
        }
        self.drain(&mut freezing, wait)?;
        self.look_again(reader, &mut freezing, ranges, wanted, wait)?;
        Ok(freezing.finish()?)
    }

    /// Somebody else is at a block. Who holds on while waiting must not be waited for in turn.
    fn wait_or_give_way(
        &self,
        wanted: Wanted,
        wait: &Wait,
        refused: Refused,
    ) -> Result<(), Outcome> {
        if refused.refusal != Refusal::Converting || wait.is_never() {
            return Err(Outcome::Stopped(refused.into()));
        }
        // It is on our side, so the other takes it from there.
        let opposite = wanted == Wanted::Other(refused.visibility);
        if opposite && wanted == Wanted::Other(Visibility::Shared) {
            return Err(Outcome::GaveWay(refused));
        }
        Ok(self.await_settled(wait, refused.page)?)
    }

    /// Waits until nobody is changing the page, or so it seems: a sleeper is in no section, since others
    /// may wait for those. Whoever waited looks again.
    ///
    /// # Errors
    /// Somebody still is.
    pub fn await_settled(&self, wait: &Wait, page: Pgoff) -> Result<(), Stop> {
        // Even if there is nothing to wait for: each time somebody else may be faster.
        ended(wait.is_over(), page, Refusal::Converting)?;
        let waited = self.waiters().sleep_while(wait, || {
            let phase = self.load(page).map(Word::phase);
            matches!(phase, Some(Phase::Draining | Phase::Converting))
        });
        ended(waited, page, Refusal::Converting)
    }

    /// Waits until all that drains is dry, and freezes it: not one block before the last is dry, for
    /// accesses go on until then.
    fn drain(&self, freezing: &mut Freezing<'_>, wait: &Wait) -> Result<(), Stop> {
        for held in freezing.held.iter().filter(|held| held.role == Role::Drains) {
            for block in self.shape().blocks(held.level, held.pages) {
                let Some(cell) = self.cell(block) else { continue };
                let Err(refusal) = cell.load().freeze_drained() else { continue };
                let start = self.shape().pages_of(block).map(|pages| pages.start());
                let page = start.unwrap_or(held.pages.start());
                let waited = self.waiters().sleep_while(wait, || cell.load().is_held());
                ended(waited, page, refusal)?;
            }
        }
        for held in freezing.held.iter_mut().filter(|held| held.role == Role::Drains) {
            for block in self.shape().blocks(held.level, held.pages) {
                self.end_block(block, Word::freeze_drained);
            }
            held.role = Role::Changes;
        }
        Ok(())
    }

    /// Looks at what was left alone, now that the rest is frozen, by exchanges and not by loads: of two
    /// exchanges of a word the later sees the earlier. To private, what makes up whole blocks with
    /// the rest is held as well, so that they can be merged: it is private, so nobody can miss it.
    fn look_again(
        &self,
        reader: &Reader,
        freezing: &mut Freezing<'_>,
        ranges: &[PgoffRange],
        wanted: Wanted,
        wait: &Wait,
    ) -> Result<(), Outcome> {
        let nr_held: u64 = freezing.held.iter().map(|held| held.pages.nr_pages()).sum();
        let nr_pages: u64 = ranges.iter().map(PgoffRange::nr_pages).sum();
        if nr_held == 0 || nr_held == nr_pages || seeded(Flaw::LooksOnce) {
            return Ok(());
        }
        let held: Vec<PgoffRange> = freezing.held.copy_of_pages().ok_or(Stop::OutOfMemory)?;
        let mut held = held.into_iter().peekable();
        for &range in ranges {
            let mut page = range.start();
            while page < range.end() {
                let next = held.peek().map_or(range.end(), |next| next.start().min(range.end()));
                while page < next {
                    // A block may reach beyond the range, to where the next one has begun to be held.
                    let end = self.look_at(reader, freezing, page, range, wanted, wait)?;
                    page = end.min(range.end());
                }
                if let Some(taken) = held.next_if(|taken| taken.start() == page) {
                    page = taken.end();
                }
            }
        }
        Ok(())
    }

    /// Looks at a block that was left alone; returns the first page behind it.
    fn look_at(
        &self,
        reader: &Reader,
        freezing: &mut Freezing<'_>,
        page: Pgoff,
        range: PgoffRange,
        wanted: Wanted,
        wait: &Wait,
    ) -> Result<Pgoff, Outcome> {
        loop {
            let outcome = if self.may_come_along(page, range, wanted) {
                let freeze = |word: Word| still_spared(wanted, word).and_then(|()| word.freeze());
                match self.step(reader, page, range, |word| freeze(word).map(Some)) {
                    Ok(Some(step)) => {
                        freezing.note(step.block.level, step.pages, Role::Along)?;
                        return Ok(step.pages.end());
                    }
                    outcome => outcome.map(|_| None),
                }
            } else {
                self.touch(reader, page, |word| still_spared(wanted, word))
            };
            match outcome {
                Ok(pages) => return Ok(pages.map_or(range.end(), |pages| pages.end())),
                Err(refused) if refused.refusal != Refusal::Converting || wait.is_never() => {
                    return Err(Outcome::Stopped(refused.into()));
                }
                // It may come back: the conversion to shared that has it gives way to us.
                Err(refused) if wanted == Wanted::Other(refused.visibility) => {
                    if wanted == Wanted::Other(Visibility::Shared) {
                        return Err(Outcome::GaveWay(refused));
                    }
                    self.await_settled(wait, refused.page)?;
                }
                Err(refused) => return Err(Outcome::GaveWay(refused)),
            }
        }
    }

    /// Whether the block that speaks for a page is private, and part of a larger one that is converted
    /// to private as a whole.
    fn may_come_along(&self, page: Pgoff, range: PgoffRange, wanted: Wanted) -> bool {
        let shape = self.shape();
        let Some(spot) = self.locate(page) else { return false };
        wanted == Wanted::Other(Visibility::Private)
            && shape
                .pages_of(shape.block_of((spot.block.level + 1).min(shape.top()), page))
                .is_some_and(|larger| spot.block.level < shape.top() && range.covers(&larger))
    }
}

/// What a freeze makes of a block that it has not seen yet.
fn first_look(word: Word, wanted: Wanted, wait: &Wait) -> Result<Option<Word>, Refusal> {
    match wanted.spares(word) {
        true => Ok(None),
        false if wait.is_never() => word.freeze().map(Some),
        false => word.drain().map(Some),
    }
}

/// Whether a block that was left alone may still be.
fn still_spared(wanted: Wanted, word: Word) -> Result<(), Refusal> {
    match word.phase() {
        _ if wanted.spares(word) => Ok(()),
        Phase::Quarantined => Err(Refusal::Quarantined),
        Phase::Folding => Err(Refusal::Folding),
        Phase::Settled | Phase::Draining | Phase::Converting => Err(Refusal::Converting),
    }
}

/// What the caller gets to hear of a wait.
fn ended(waited: Waited, page: Pgoff, refusal: Refusal) -> Result<(), Stop> {
    match waited {
        Waited::Over => Ok(()),
        Waited::TimedOut => Err(Stop::TimedOut(page, refusal)),
        Waited::Cancelled => Err(Stop::Cancelled(page, refusal)),
    }
}
