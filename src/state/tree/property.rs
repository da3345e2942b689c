//! The tree against a flat list: whatever the blocks do, pages behave as one plain struct for each of
//! them would.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseResult, TestRunner};

use super::tests::{World, range};
use super::*;
use crate::state::freeze::Wanted;
use crate::state::frozen::Frozen;
use crate::state::waiting::{CancelToken, Wait};

/// All that there is to know of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    visibility: Visibility,
    pins: u32,
    exclusive: bool,
    phase: Phase,
}

impl Page {
    fn settled(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Settled => Ok(()),
            Phase::Quarantined => Err(Refusal::Quarantined),
            _ => Err(Refusal::Converting),
        }
    }

    fn unheld(&self) -> Result<(), Refusal> {
        match (self.exclusive, self.pins) {
            (true, _) => Err(Refusal::Exclusive),
            (_, 0) => Ok(()),
            (_, pins) => Err(Refusal::Pinned(pins)),
        }
    }

    fn may_pin(&self, exclusive: bool) -> Result<(), Refusal> {
        self.settled()?;
        match self.visibility {
            Visibility::Private => Err(Refusal::Private),
            Visibility::Shared if exclusive || self.exclusive => self.unheld(),
            Visibility::Shared => Ok(()),
        }
    }

    fn is_idle(&self) -> bool {
        self.settled().is_ok() && self.unheld().is_ok()
    }

    fn word(&self) -> Word {
        let word = Word::new(self.visibility).with_pins(self.pins).with_phase(self.phase);
        if self.exclusive { word.with_exclusive() } else { word }
    }
}

/// Neither of the two that wait has any time to do so.
#[derive(Clone, Copy, Debug)]
enum Patience {
    None,
    Expired,
    Cancelled,
}

#[derive(Clone, Copy, Debug)]
enum Ending {
    Thaw,
    /// With or without the grace period that lets blocks merge.
    Release(bool),
    /// As by a panic.
    Drop,
}

#[derive(Clone, Debug)]
enum Op {
    Pin(PgoffRange, bool),
    Unpin(usize),
    /// What is not ended at once goes on.
    Freeze(Vec<PgoffRange>, Wanted, Patience, Option<Ending>),
    End(usize, Ending),
    Trim,
}

/// Ranges at the start, around the borders of blocks, of whole blocks, and anywhere.
fn ranges(nr_pages: u64, block: u64) -> impl Strategy<Value = PgoffRange> + Clone {
    let inside = move |start: u64, nr: u64| {
        let start = start % nr_pages;
        range(start, nr.clamp(1, nr_pages - start))
    };
    let border = (0..=nr_pages / block, 0..4_u64, 1..6_u64);
    prop_oneof![
        4 => (0..nr_pages.min(12), 1..6_u64).prop_map(move |(at, nr)| inside(at, nr)),
        3 => border.prop_map(move |(at, before, nr)| inside((at * block).saturating_sub(before), nr)),
        3 => (0..4_u64, 1..4_u64).prop_map(move |(at, nr)| inside(at * block, nr * block)),
        1 => (0..nr_pages, 1..=nr_pages).prop_map(move |(at, nr)| inside(at, nr)),
        1 => Just(range(0, nr_pages)),
    ]
}

fn ops(nr_pages: u64, block: u64, most: usize) -> impl Strategy<Value = Vec<Op>> {
    let one = ranges(nr_pages, block);
    let several = vec(one.clone(), 1..4).prop_map(|mut ranges| {
        ranges.sort_by_key(PgoffRange::start);
        ranges.dedup_by(|next, last| next.start() <= last.end());
        ranges
    });
    let wanted = prop_oneof![
        4 => Just(Wanted::Other(Visibility::Private)),
        4 => Just(Wanted::Other(Visibility::Shared)),
        1 => Just(Wanted::All),
    ];
    let patience = prop_oneof![
        3 => Just(Patience::None),
        2 => Just(Patience::Expired),
        1 => Just(Patience::Cancelled),
    ];
    let ending = prop_oneof![
        20 => any::<bool>().prop_map(Ending::Release),
        4 => Just(Ending::Thaw),
        1 => Just(Ending::Drop),
    ];
    let then = prop_oneof![4 => ending.clone().prop_map(Some), 1 => Just(None)];
    let freeze = (several, wanted, patience, then);
    let op = prop_oneof![
        4 => (one, proptest::bool::weighted(0.2)).prop_map(|(pages, alone)| Op::Pin(pages, alone)),
        4 => any::<usize>().prop_map(Op::Unpin),
        8 => freeze.prop_map(|(ranges, to, wait, then)| Op::Freeze(ranges, to, wait, then)),
        2 => (any::<usize>(), ending).prop_map(|(which, ending)| Op::End(which, ending)),
        2 => Just(Op::Trim),
    ];
    vec(op, 1..most)
}

/// A freeze that goes on.
struct Held<'t> {
    frozen: Frozen<'t>,
    changes: Vec<u64>,
    /// Held to be merged with the others, and not changed.
    along: Vec<u64>,
    wanted: Wanted,
}

struct Both<'t> {
    world: &'t World,
    flat: Vec<Page>,
    pins: Vec<(PgoffRange, bool, Counted)>,
    held: Vec<Held<'t>>,
}

fn pages(range: PgoffRange) -> std::ops::Range<usize> {
    range.start().get() as usize..range.end().get() as usize
}

fn at(page: usize) -> Pgoff {
    Pgoff::new(page as u64)
}

impl<'t> Both<'t> {
    fn new(world: &'t World, initial: Visibility) -> Self {
        let page = Page { visibility: initial, pins: 0, exclusive: false, phase: Phase::Settled };
        let flat = vec![page; world.tree.shape().nr_pages() as usize];
        Self { world, flat, pins: Vec::new(), held: Vec::new() }
    }

    fn all(&self) -> PgoffRange {
        range(0, self.flat.len() as u64)
    }

    fn apply(&mut self, op: &Op) -> TestCaseResult {
        match op {
            &Op::Pin(range, exclusive) => self.pin(range, exclusive)?,
            &Op::Unpin(which) => {
                if let Some(which) = which.checked_rem(self.pins.len()) {
                    self.unpin(which);
                }
            }
            Op::Freeze(ranges, wanted, patience, then) => {
                let frozen = self.freeze(ranges, *wanted, *patience)?;
                if let (true, Some(ending)) = (frozen, then) {
                    self.end(self.held.len() - 1, *ending);
                }
            }
            &Op::End(which, ending) => {
                if let Some(which) = which.checked_rem(self.held.len()) {
                    self.end(which, ending);
                }
            }
            Op::Trim => self.trim()?,
        }
        self.compare()
    }

    fn pin(&mut self, range: PgoffRange, exclusive: bool) -> TestCaseResult {
        let World { tree, reader, .. } = self.world;
        let outcome = match exclusive {
            true => tree.pin_exclusive(reader, range),
            false => tree.pin(reader, range),
        };
        let refused = |page: usize| {
            self.flat[page].may_pin(exclusive).err().map(|refusal| Stop::At(at(page), refusal))
        };
        let wanted = pages(range).find_map(refused);
        prop_assert_eq!(outcome.err(), wanted);
        if let Ok(counted) = outcome {
            self.pins.push((range, exclusive, counted));
            for page in &mut self.flat[pages(range)] {
                page.exclusive |= exclusive;
                page.pins += u32::from(!exclusive);
            }
        }
        Ok(())
    }

    fn unpin(&mut self, which: usize) {
        let World { tree, reader, .. } = self.world;
        let (range, exclusive, counted) = self.pins.remove(which);
        match (counted, exclusive) {
            (Counted::InPage, _) => tree.unpin_page(range.start()),
            (Counted::InRange, false) => tree.unpin(reader, range),
            (Counted::InRange, true) => tree.unpin_exclusive(reader, range),
        }
        for page in &mut self.flat[pages(range)] {
            page.exclusive &= !exclusive;
            page.pins -= u32::from(!exclusive);
        }
    }

    /// Which pages change, or where a freeze stops: at whatever is being changed first, and only then
    /// at pins, if it may wait for those.
    fn frozen_pages(
        &self,
        ranges: &[PgoffRange],
        wanted: Wanted,
        patience: Patience,
    ) -> Result<Vec<u64>, Stop> {
        let stop = |page, refusal| match patience {
            _ if refusal == Refusal::Quarantined => Stop::At(at(page), refusal),
            Patience::None => Stop::At(at(page), refusal),
            Patience::Expired => Stop::TimedOut(at(page), refusal),
            Patience::Cancelled => Stop::Cancelled(at(page), refusal),
        };
        let (mut changes, mut pinned) = (Vec::new(), None);
        for at in ranges.iter().flat_map(|&range| pages(range)) {
            let page = self.flat[at];
            if wanted == Wanted::Other(page.visibility) && page.phase == Phase::Settled {
                continue;
            }
            page.settled().map_err(|refusal| stop(at, refusal))?;
            match page.unheld().map_err(|refusal| stop(at, refusal)) {
                Err(stop) if matches!(patience, Patience::None) => return Err(stop),
                outcome => pinned = pinned.or(outcome.err()),
            }
            changes.push(at as u64);
        }
        pinned.map_or(Ok(changes), Err)
    }

    fn freeze(
        &mut self,
        ranges: &[PgoffRange],
        wanted: Wanted,
        patience: Patience,
    ) -> Result<bool, TestCaseError> {
        let World { tree, reader, waiters } = self.world;
        let token = CancelToken::of(waiters);
        token.cancel();
        let wait = match patience {
            Patience::None => Wait::never(),
            Patience::Expired => Wait::at_most(Duration::ZERO),
            Patience::Cancelled => Wait::until_cancelled(&token),
        };
        let outcome = tree.freeze(reader, ranges, wanted, &wait);
        let changes = self.frozen_pages(ranges, wanted, patience);
        prop_assert_eq!(outcome.as_ref().err(), changes.as_ref().err());
        let (Ok(frozen), Ok(changes)) = (outcome, changes) else { return Ok(false) };
        let mut runs: Vec<PgoffRange> = Vec::new();
        for &page in &changes {
            match runs.last_mut().and_then(|run| Some((run.hull_if_joined(&range(page, 1))?, run)))
            {
                Some((longer, run)) => *run = longer,
                None => runs.push(range(page, 1)),
            }
        }
        prop_assert_eq!(frozen.runs(), runs);
        // Which pages come along depends on the blocks; what kind of pages they are does not.
        let mut along = Vec::new();
        if wanted == Wanted::Other(Visibility::Private) && !changes.is_empty() {
            for page in ranges.iter().flat_map(|&range| pages(range)) {
                let is_taken = tree.load(at(page)).map(Word::phase) == Some(Phase::Converting);
                if self.flat[page].visibility == Visibility::Private && is_taken {
                    along.push(page as u64);
                }
            }
        }
        for &page in changes.iter().chain(&along) {
            self.flat[page as usize].phase = Phase::Converting;
        }
        self.held.push(Held { frozen, changes, along, wanted });
        Ok(true)
    }

    fn end(&mut self, which: usize, ending: Ending) {
        let Held { mut frozen, changes, along, wanted } = self.held.remove(which);
        let to = match wanted {
            Wanted::Other(to) => to,
            Wanted::All => Visibility::Private,
        };
        match ending {
            Ending::Thaw => frozen.thaw(),
            Ending::Release(waits) => {
                let _ = frozen.could_merge();
                assert!(!waits || frozen.wait_for_sections(&self.world.reader));
                frozen.release(to);
            }
            Ending::Drop => drop(frozen),
        }
        for &at in changes.iter().chain(&along) {
            let page = &mut self.flat[at as usize];
            page.phase = Phase::Settled;
            match ending {
                Ending::Thaw => {}
                Ending::Release(_) => page.visibility = to,
                // What came along was not to be changed, so its state is known.
                Ending::Drop if along.contains(&at) => {}
                Ending::Drop => page.phase = Phase::Quarantined,
            }
        }
    }

    fn trim(&mut self) -> TestCaseResult {
        let World { tree, reader, .. } = self.world;
        let before = tree.metadata().get();
        let given_back = tree.trim(reader).unwrap().get();
        let after = tree.metadata().get();
        prop_assert_eq!(after, before - given_back);
        // A block with parts that differ has a table. One whose parts are alike has none, unless
        // somebody holds it: then the table stays until it can be folded.
        let shape = tree.shape();
        let (mut least, mut most) = (0, 0);
        for level in 1..=shape.top() {
            for block in shape.blocks(level, self.all()) {
                let parts = &self.flat[pages(shape.pages_of(block).unwrap())];
                let alike = parts.iter().all(|page| *page == parts[0]);
                least += u64::from(!alike);
                most += u64::from(!alike || !parts[0].is_idle());
            }
        }
        let bytes = |tables: u64| (shape.nr_roots() as u64 + shape.nr_words_taken(tables)) * 8;
        prop_assert!((bytes(least)..=bytes(most)).contains(&after), "{least}..={most}: {after}");
        Ok(())
    }

    fn compare(&self) -> TestCaseResult {
        let World { tree, .. } = self.world;
        let mut next = 0;
        for (span, word) in tree.spans(self.all()) {
            prop_assert_eq!(span.start(), at(next));
            next = pages(span).end;
            for page in &self.flat[pages(span)] {
                prop_assert_eq!(word, page.word(), "at {:?}", span);
            }
        }
        prop_assert_eq!(next, self.flat.len());
        for start in [0, next / 3, next - 1] {
            let refused = |at: usize| {
                let page = &self.flat[at];
                let closed = page.visibility == Visibility::Private || page.phase != Phase::Settled;
                let refusal = page.settled().err().unwrap_or(Refusal::Private);
                closed.then_some(Stop::At(Pgoff::new(at as u64), refusal))
            };
            let wanted = (start..next).find_map(refused).map_or(Ok(()), Err);
            prop_assert_eq!(tree.check_open(range(start as u64, (next - start) as u64)), wanted);
        }
        Ok(())
    }

    /// Everybody leaves. What is not quarantined can then be made one.
    fn finish(&mut self) -> TestCaseResult {
        while !self.held.is_empty() {
            self.end(0, Ending::Thaw);
        }
        while !self.pins.is_empty() {
            self.unpin(0);
        }
        self.compare()?;
        if self.flat.iter().all(Page::is_idle) {
            let to = Wanted::Other(Visibility::Shared);
            prop_assert!(self.freeze(&[self.all()], to, Patience::None)?);
            self.end(0, Ending::Release(true));
            self.compare()?;
            self.trim()?;
            let nr_words = self.world.tree.spans(self.all()).count();
            prop_assert_eq!(nr_words, self.world.tree.shape().nr_roots());
        }
        Ok(())
    }
}

fn check(shape: Shape, most: usize, cases: u32) {
    let block = shape.fan_out();
    let cases = if cfg!(miri) { 1 } else { cases };
    let most = if cfg!(miri) { 12 } else { most };
    let config = ProptestConfig {
        failure_persistence: None,
        cases,
        max_shrink_time: 5_000,
        ..ProptestConfig::default()
    };
    let input = (proptest::bool::ANY, ops(shape.nr_pages(), block, most));
    let outcome = TestRunner::new(config).run(&input, |(shared, ops)| {
        let initial = if shared { Visibility::Shared } else { Visibility::Private };
        let world = World::new(shape, initial);
        let mut both = Both::new(&world, initial);
        ops.iter().try_for_each(|op| both.apply(op))?;
        both.finish()
    });
    if let Err(failure) = outcome {
        panic!("{shape:?}: {failure}");
    }
}

#[test]
fn small_trees_behave_like_a_list_of_pages() {
    for (order, levels, sizes) in
        [(1, 2, [1, 2, 7]), (1, 3, [3, 8, 13]), (2, 2, [4, 11, 16]), (2, 3, [16, 33, 39])]
    {
        // One of each shape where every comparison takes a second.
        let sizes = if cfg!(miri) { &sizes[1..2] } else { &sizes[..] };
        for &nr_pages in sizes {
            for &nr_splits in if cfg!(miri) { &[2][..] } else { &[2, 3] } {
                check(Shape::small(nr_pages, order, levels, nr_splits), 40, 60);
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes hours when interpreted")]
fn real_trees_behave_like_a_list_of_pages() {
    check(Shape::of_pages(2 * 512 + 37), 40, 100);
}

/// Over the border of two blocks of 1 GiB.
#[test]
#[cfg_attr(miri, ignore = "takes hours when interpreted")]
fn large_trees_behave_like_a_list_of_pages() {
    check(Shape::of_pages((1 << 18) + 515), 12, 6);
}
