//! What a conversion or a hole punch holds, and how it gives it back.

use smallvec::SmallVec;

use super::epoch::Reader;
use super::flaw::{Flaw, seeded};
use super::rules::Refusal;
use super::shape::{Block, Shape};
use super::tree::{Stop, Tree};
use super::word::{Phase, Visibility, Word};
use crate::addr::Pgoff;
use crate::failpoint::{FailPoint, fails};
use crate::range::PgoffRange;

/// Why a block is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is to be changed, and nobody holds it but us.
    Changes,
    /// It is to be changed, and pins may still be there.
    Drains,
    /// It is as it should be already, and is held so that it can be merged with what changes.
    Along,
}

/// Blocks of one level in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) level: u32,
    pub(super) pages: PgoffRange,
    pub(super) role: Role,
}

/// Runs of pages in ascending order. One of them takes no memory.
type Runs = SmallVec<[PgoffRange; 1]>;

/// Blocks that somebody holds, in ascending order. One of them takes no memory.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    list: SmallVec<[Held; 1]>,
    /// Where the last one ends.
    end: Pgoff,
    /// Whether it is more than blocks to be changed with gaps between them.
    is_mixed: bool,
}

impl Holdings {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.list.iter()
    }

    /// One block, which takes no memory.
    pub(super) fn one(held: Held) -> Self {
        let (end, is_mixed) = (held.pages.end(), held.role == Role::Along);
        Self { list: SmallVec::from_buf([held]), end, is_mixed }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Room for so many, if there is memory: if not, each of them asks.
    #[inline]
    pub(super) fn make_room(&mut self, nr: usize) {
        let _ = self.list.try_reserve(nr);
    }

    /// The pages alone. `None`: there is no memory.
    pub(super) fn copy_of_pages(&self) -> Option<Vec<PgoffRange>> {
        let mut pages = Vec::new();
        if fails(FailPoint::Memory) || pages.try_reserve_exact(self.list.len()).is_err() {
            return None;
        }
        pages.extend(self.iter().map(|held| held.pages));
        Some(pages)
    }

    /// What changes, as runs that do not touch. `None`: there is no memory.
    fn runs(&self) -> Option<Runs> {
        let mut runs = Runs::new();
        let nr = self.list.len();
        if nr > 0 && fails(FailPoint::Memory) || runs.try_reserve(nr).is_err() {
            return None;
        }
        if !self.is_mixed {
            runs.extend(self.iter().map(|held| held.pages));
            return Some(runs);
        }
        for held in self.iter().filter(|held| held.role != Role::Along) {
            if let Some(last) = runs.last_mut() {
                if let Some(longer) = joined(*last, held.pages) {
                    *last = longer;
                    continue;
                }
            }
            runs.push(held.pages);
        }
        Some(runs)
    }

    /// This list and another in one order. `None`: there is no memory.
    pub(super) fn interleaved(&self, other: &Self) -> Option<Self> {
        let mut all = Self::default();
        let (mut ours, mut others) = (self.iter().peekable(), other.iter().peekable());
        loop {
            let ours_first = match (ours.peek(), others.peek()) {
                (Some(one), Some(other)) => one.pages.start() < other.pages.start(),
                (one, _) => one.is_some(),
            };
            let next = if ours_first { ours.next() } else { others.next() };
            match next {
                None => return Some(all),
                Some(&next) if !all.push(next) => return None,
                Some(_) => {}
            }
        }
    }

    /// Whether nothing of it can make up a larger block: it is too little, gaps and all, or each run of it is.
    #[inline]
    fn is_too_little(&self, shape: &Shape) -> bool {
        let is_too_short =
            |one: &Held| shape.is_too_short(one.level, one.pages.start(), one.pages.end());
        match self.list.as_slice() {
            [] => true,
            [one] => is_too_short(one),
            [first, .., last] => {
                shape.is_too_short(0, first.pages.start(), last.pages.end())
                    || !self.is_mixed && self.iter().all(is_too_short)
            }
        }
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Held> {
        self.list.iter_mut()
    }

    /// Adds a block that lies behind all others. `false`: there is no memory to write it down.
    #[must_use]
    #[inline]
    pub(super) fn push(&mut self, held: Held) -> bool {
        if held.pages.start() == self.end || held.role == Role::Along {
            return self.push_beside(held);
        }
        self.append(held)
    }

    #[inline(never)]
    fn push_beside(&mut self, held: Held) -> bool {
        self.is_mixed |= held.role == Role::Along;
        if let Some(last) = self.list.last_mut() {
            if let Some(joined) = joined(last.pages, held.pages) {
                if last.level == held.level && last.role == held.role {
                    last.pages = joined;
                    self.end = joined.end();
                    return true;
                }
                self.is_mixed = true;
            }
        }
        self.append(held)
    }

    #[inline]
    fn append(&mut self, held: Held) -> bool {
        if fails(FailPoint::Memory) {
            return false;
        }
        if self.list.len() == self.list.capacity() && self.list.try_reserve(1).is_err() {
            return false;
        }
        self.end = held.pages.end();
        self.list.push(held);
        true
    }
}

/// Two ranges as one, if the second begins where the first ends.
#[inline]
fn joined(first: PgoffRange, second: PgoffRange) -> Option<PgoffRange> {
    match first.end() == second.start() {
        true => first.hull_if_joined(&second),
        false => None,
    }
}

impl Tree {
    /// Applies a rule to every block of a list. The caller holds them, so they speak, and no rule that
    /// ends the hold can be refused.
    pub(super) fn end_each(
        &self,
        holdings: &Holdings,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
    ) {
        for held in holdings.iter() {
            for block in self.shape().blocks(held.level, held.pages) {
                self.end_block(block, &rule);
            }
        }
    }

    /// The same for one block. Nobody else writes a word that is converting or folding, so a store will
    /// do; from one that is draining others drop their pins.
    #[inline]
    pub(super) fn end_block(&self, block: Block, rule: impl Fn(Word) -> Result<Word, Refusal>) {
        let Some(cell) = self.cell(block) else { return };
        loop {
            let found = cell.load();
            let outcome = rule(found);
            debug_assert!(outcome.is_ok(), "{block:?}: {outcome:?}, found {found:?}");
            match outcome {
                Ok(next) if found.phase() != Phase::Draining => break cell.set(next),
                Ok(next) if cell.replace(found, next).is_err() => {}
                Ok(_) | Err(_) => break,
            }
        }
    }

    /// Makes one block of all the parts of a split one, which the caller holds.
    pub(super) fn merge(&self, block: Block, like: Word) {
        let Some(cell) = self.cell(block) else { return };
        let found = cell.load();
        debug_assert!(found.is_split(), "{block:?}: {found:?}");
        let merged = found.merged(like);
        // The seeded one: as if it had not been split, so that parts of then pass for parts that inherit.
        let splits = match found.splits() {
            splits if !seeded(Flaw::MergeForgetsItsSplit) => splits,
            1 => self.shape().nr_splits(),
            splits => splits - 1,
        };
        cell.set(merged.with_splits(splits));
    }
}

/// Subpages that the holder of this value has frozen, and must release or thaw. If it is dropped
/// instead, which only an unwinding panic does, nobody knows how far the change came: the subpages
/// are quarantined.
#[derive(Debug)]
#[must_use = "subpages whose freeze is dropped are quarantined"]
pub struct Frozen<'t> {
    tree: &'t Tree,
    held: Holdings,
    /// What changes, as runs that do not touch.
    runs: Runs,
    /// Whether something of what is held may make up a larger block.
    may_merge: bool,
    merging: Merging,
}

/// Whether parts that are all held become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merging {
    /// They do. Nobody is on the way down to one of them any more.
    Yes,
    No,
}

impl<'t> Frozen<'t> {
    /// Everything that is held is converting. Without memory for the runs it is all thawed.
    pub(super) fn new(tree: &'t Tree, held: Holdings) -> Result<Self, Stop> {
        match held.runs() {
            Some(runs) => {
                let may_merge = !held.is_too_little(tree.shape());
                Ok(Self { tree, held, runs, may_merge, merging: Merging::No })
            }
            None => {
                let runs = Runs::new();
                Self { tree, held, runs, may_merge: false, merging: Merging::No }.thaw();
                Err(Stop::OutOfMemory)
            }
        }
    }

    /// One block, which takes no memory.
    pub(super) fn of_block(tree: &'t Tree, block: Block, pages: PgoffRange) -> Self {
        let held = Holdings::one(Held { level: block.level, pages, role: Role::Changes });
        let may_merge = !held.is_too_little(tree.shape());
        Self { tree, held, runs: Runs::from_buf([pages]), may_merge, merging: Merging::No }
    }

    /// The frozen subpages that change, as runs in ascending order that do not touch.
    pub fn runs(&self) -> &[PgoffRange] {
        &self.runs
    }

    /// Whether blocks will be merged at the [release](Self::release), if somebody
    /// [waits](Self::wait_for_sections) before. Without that they stay split.
    pub fn could_merge(&self) -> bool {
        if !self.may_merge {
            return false;
        }
        let mut could = false;
        self.each_block(Merging::Yes, |block, level| could |= block.level > level);
        could
    }

    /// Waits until every access that began before has ended. `false`: the kernel refuses the barrier
    /// that it takes.
    #[must_use]
    pub fn wait_for_sections(&mut self, reader: &Reader) -> bool {
        let waited = reader.wait_for_others();
        if waited {
            self.merging = Merging::Yes;
        }
        waited
    }

    /// Ends the freeze: the subpages get this visibility.
    pub fn release(mut self, to: Visibility) {
        let merging = match self.merging {
            Merging::No if seeded(Flaw::MergesWithoutWaiting) => Merging::Yes,
            merging => merging,
        };
        self.each_block(merging, |block, level| match block.level == level {
            true => self.tree.end_block(block, |word| word.publish(to)),
            false => {
                if seeded(Flaw::MergeFreesItsParts) {
                    self.free_parts(block);
                }
                self.tree.merge(block, Word::new(to));
            }
        });
        self.held = Holdings::default();
        self.tree.waiters().wake();
    }

    /// Only seeded: ends the freeze of the parts of a block.
    fn free_parts(&self, block: Block) {
        let Some(pages) = self.tree.shape().pages_of(block) else { return };
        for &held in self.held.iter().filter(|held| pages.covers(&held.pages)) {
            self.tree.end_each(&Holdings::one(held), Word::thaw);
        }
    }

    /// Ends the freeze: the subpages are as before.
    pub fn thaw(mut self) {
        self.end(|_| Word::thaw);
    }

    #[cold]
    fn quarantine(&mut self) {
        self.end(|role| match role {
            // Nobody was to change it.
            Role::Along => Word::thaw,
            Role::Changes | Role::Drains => Word::quarantine,
        });
    }

    fn end(&mut self, rule_of: impl Fn(Role) -> fn(Word) -> Result<Word, Refusal>) {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return;
        }
        for held in held.iter() {
            for block in self.tree.shape().blocks(held.level, held.pages) {
                self.tree.end_block(block, rule_of(held.role));
            }
        }
        self.tree.waiters().wake();
    }

    /// Goes through the held blocks, each with the level of the words that it is held by. Of parts that
    /// make up a whole block it is that block, the largest there is.
    #[inline]
    fn each_block(&self, merging: Merging, mut seen: impl FnMut(Block, u32)) {
        let shape = self.tree.shape();
        let mut rest = self.held.list.as_slice();
        if merging == Merging::No || !self.may_merge {
            for held in rest {
                shape.blocks(held.level, held.pages).for_each(|block| seen(block, held.level));
            }
            return;
        }
        while let Some((first, others)) = rest.split_first() {
            let is_alone =
                others.first().is_none_or(|next| first.pages.end() != next.pages.start());
            if is_alone && shape.is_too_short(first.level, first.pages.start(), first.pages.end()) {
                shape.blocks(first.level, first.pages).for_each(|block| seen(block, first.level));
                rest = others;
                continue;
            }
            let nr_joints = rest.windows(2).take_while(|pair| touch(pair)).count();
            let (run, behind) = rest.split_at(nr_joints + 1);
            rest = behind;
            let end = run.last().map_or(Pgoff::new(0), |last| last.pages.end());
            let mut page = run.first().map_or(Pgoff::new(0), |first| first.pages.start());
            let is_too_short = shape.is_too_short(0, page, end);
            for held in run {
                if is_too_short {
                    shape.blocks(held.level, held.pages).for_each(|block| seen(block, held.level));
                    continue;
                }
                page = page.max(held.pages.start());
                while page < held.pages.end() {
                    let fits = |&level: &u32| {
                        let pages = shape.pages_of(shape.block_of(level, page));
                        let fits = |pages: PgoffRange| pages.start() == page && pages.end() <= end;
                        pages.is_some_and(fits) || seeded(Flaw::MergesTooMuch) && level > 0
                    };
                    let larger = (held.level + 1..=shape.top()).rev().find(fits);
                    let block = shape.block_of(larger.unwrap_or(held.level), page);
                    seen(block, held.level);
                    let Some(pages) = shape.pages_of(block) else { return };
                    page = pages.end();
                }
            }
        }
    }
}

fn touch(pair: &[Held]) -> bool {
    matches!(pair, [first, second] if first.pages.end() == second.pages.start())
}

impl Drop for Frozen<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.held.is_empty() {
            self.quarantine();
        }
    }
}
