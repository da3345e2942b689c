//! The frames of one arena: which are free, clean, dirty, promised or poisoned. Arithmetic alone: no
//! bytes, no locks. Frames are counted from the start of the arena.

#[cfg(feature = "oracle")]
pub(crate) mod naive;

use super::bits::Bits;
use super::buddy::Buddy;
use super::ledger::Blocks;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES, index};
use crate::state::{Flaw, seeded};
use FolioSize::{Base, Huge1G, Huge2M};

/// What came of an attempt to take a folio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is all zeroes.
    Clean(u64),
    /// It must be scrubbed before anybody else sees it.
    Dirty(u64),
    /// There is none until this block of 2 MiB, which is in the caller's hands now, is scrubbed and given to
    /// [`Frames::scrubbed`].
    ScrubFirst(u64),
    /// There is none until somebody else has scrubbed what he has in hands.
    Wait,
    /// There is none.
    Nothing,
}

/// On whose account a folio is taken or given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    /// It was promised, or is to be again.
    Kept,
    /// It was not: others' promises come first.
    None,
}

/// Blocks that wait for a scrub. They are free, and stay whole.
#[derive(Debug)]
struct Dirty {
    huge: Bits,
    giant: Bits,
    /// Blocks that somebody is scrubbing just now.
    in_hands: Blocks,
}

#[derive(Debug)]
pub(super) struct Frames {
    nr_pages: u64,
    buddy: Buddy,
    dirty: Dirty,
    promised: Blocks,
    /// In ascending order. Few, if any.
    poisoned: Vec<u64>,
    quarantined: u64,
    /// Poisoned frames inside of quarantined folios, which are counted as poisoned.
    quarantined_poisoned: u64,
}

impl Frames {
    /// All of `nr_pages` frames free and clean.
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let mut buddy = Buddy::new(nr_pages)?;
        buddy.free_run(0, nr_pages);
        let dirty = Dirty {
            huge: Bits::new(Op::CreatePool, nr_pages >> Huge2M.order())?,
            giant: Bits::new(Op::CreatePool, nr_pages >> Huge1G.order())?,
            in_hands: Blocks::default(),
        };
        Ok(Self {
            nr_pages,
            buddy,
            dirty,
            promised: Blocks::default(),
            poisoned: Vec::new(),
            quarantined: 0,
            quarantined_poisoned: 0,
        })
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// What is free, clean or not.
    #[inline]
    pub(super) fn free(&self) -> Blocks {
        self.buddy.blocks().plus(self.dirty.blocks())
    }

    pub(super) fn promised(&self) -> Blocks {
        self.promised
    }

    pub(super) fn nr_quarantined(&self) -> u64 {
        self.quarantined.saturating_sub(self.quarantined_poisoned)
    }

    pub(super) fn poisoned(&self) -> &[u64] {
        &self.poisoned
    }

    /// Free frames that are not clean.
    pub(super) fn nr_dirty(&self) -> u64 {
        self.dirty.blocks().pages()
    }

    pub(super) fn buddy(&self) -> &Buddy {
        &self.buddy
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let dirty = self.dirty.huge.metadata_bytes() + self.dirty.giant.metadata_bytes();
        self.buddy.metadata_bytes() + dirty
    }

    /// Promises folios, or none of them.
    pub(super) fn promise(&mut self, more: Blocks) -> bool {
        let promised = self.promised.plus(more);
        let kept = self.free().keep(&promised);
        if kept {
            self.promised = promised;
        }
        kept
    }

    /// Ends promises that were not taken up.
    pub(super) fn unpromise(&mut self, fewer: Blocks) {
        self.promised = self.promised.minus(fewer);
    }

    /// Takes a folio, at `home` if that is free and no promise suffers.
    #[inline]
    pub(super) fn take(&mut self, size: FolioSize, home: Option<u64>, promise: Promise) -> Taken {
        let before = self.promised;
        if promise == Promise::Kept {
            match self.promised.of(size).checked_sub(1) {
                Some(left) => *self.promised.of_mut(size) = left,
                None => return Taken::Nothing,
            }
        }
        let after = self.promised;
        if promise == Promise::Kept && !self.free().keep(&before) {
            // Memory failed that was promised. Who comes first is served, and not nobody.
            self.promised = Blocks::default();
        }
        let taken = self.take_unpromised(size, home);
        let is_taken = matches!(taken, Taken::Clean(_) | Taken::Dirty(_));
        self.promised = if is_taken { after } else { before };
        taken
    }

    fn take_unpromised(&mut self, size: FolioSize, home: Option<u64>) -> Taken {
        if let Some(taken) = home.and_then(|home| self.take_at(home, size)) {
            return taken;
        }
        let mut waits = false;
        for from in [Base, Huge2M, Huge1G].into_iter().filter(|&from| from >= size) {
            if !self.may_cut(from, size) {
                continue;
            }
            // The smallest blocks that will do are all of the class `from`.
            if self.buddy.blocks().of(from) > 0 {
                return self.buddy.allocate(size.order()).map_or(Taken::Nothing, Taken::Clean);
            }
            if let Some(taken) = self.take_dirty(from, size) {
                return taken;
            }
            waits |= self.dirty.in_hands.of(from) > 0;
        }
        if waits { Taken::Wait } else { Taken::Nothing }
    }

    /// Whether promises are kept if a folio is cut out of a block of a class.
    #[inline]
    fn may_cut(&self, from: FolioSize, size: FolioSize) -> bool {
        let keeps = |left: Blocks| left.keep(&self.promised) || seeded(Flaw::TakesWhatIsPromised);
        self.free().cut(from, size).is_some_and(keeps)
    }

    fn take_at(&mut self, home: u64, size: FolioSize) -> Option<Taken> {
        if let Some(order) = self.buddy.order_from(home, size.order()) {
            let from = [Huge1G, Huge2M, Base].into_iter().find(|from| order >= from.order())?;
            if !self.may_cut(from, size) {
                return None;
            }
            self.buddy.allocate_in(home, order, size.order());
            return Some(Taken::Clean(home));
        }
        // What is clean elsewhere is there at once.
        let fits =
            !self.has_clean(size) && self.may_cut(size, size) && self.dirty.clear(home, size);
        fits.then_some(Taken::Dirty(home))
    }

    /// Whether a clean folio can be had.
    fn has_clean(&self, size: FolioSize) -> bool {
        let fit = [Base, Huge2M, Huge1G].into_iter().filter(|&from| from >= size);
        fit.into_iter().any(|from| self.buddy.blocks().of(from) > 0 && self.may_cut(from, size))
    }

    /// Whether a block of 2 MiB is free as a whole, clean or not.
    pub(super) fn is_whole(&self, start: u64) -> bool {
        let is_dirty =
            |size: FolioSize| self.dirty.get(start >> size.order() << size.order(), size);
        self.buddy.is_in_free(start, Huge2M.order()) || is_dirty(Huge2M) || is_dirty(Huge1G)
    }

    /// Takes a folio of dirty memory, where there is no clean block of this class.
    fn take_dirty(&mut self, from: FolioSize, size: FolioSize) -> Option<Taken> {
        let block = self.dirty.first(from)?;
        self.dirty.clear(block, from);
        if from == size {
            return Some(Taken::Dirty(block));
        }
        if from == Huge1G {
            for huge in (block..block + Huge1G.nr_pages()).step_by(index(HUGE_PAGES)) {
                self.dirty.set(huge, Huge2M);
            }
            self.dirty.clear(block, Huge2M);
            if size == Huge2M {
                return Some(Taken::Dirty(block));
            }
        }
        self.dirty.in_hands.huge += 1;
        Some(Taken::ScrubFirst(block))
    }

    /// A dirty block, which is in the caller's hands until it is given to [`scrubbed`](Self::scrubbed) or
    /// [`not_scrubbed`](Self::not_scrubbed).
    pub(super) fn next_dirty(&mut self) -> Option<(u64, FolioSize)> {
        let of = |size| self.dirty.first(size).map(|block| (block, size));
        let (block, size) = of(Huge2M).or_else(|| of(Huge1G))?;
        if !seeded(Flaw::ScrubsInPlace) {
            self.dirty.clear(block, size);
        }
        *self.dirty.in_hands.of_mut(size) += 1;
        Some((block, size))
    }

    /// Takes back a block that is all zeroes now, but for poisoned frames.
    pub(super) fn scrubbed(&mut self, start: u64, size: FolioSize) {
        self.leave_hands(size);
        if seeded(Flaw::ScrubsInPlace) {
            self.dirty.clear(start, size);
        }
        self.free_around_poison(start, size);
    }

    /// Takes back a block that is still dirty. What is dirty is handed out in whole blocks, which a block of
    /// 2 MiB with a failed frame cannot be: those are quarantined, and `quarantined` is told.
    pub(super) fn not_scrubbed(
        &mut self,
        start: u64,
        size: FolioSize,
        mut quarantined: impl FnMut(u64),
    ) {
        self.leave_hands(size);
        if self.poisoned_in(start, size.nr_pages()).is_empty() {
            self.dirty.set(start, size);
            return;
        }
        for huge in (start..start + size.nr_pages()).step_by(index(HUGE_PAGES)) {
            if self.poisoned_in(huge, HUGE_PAGES).is_empty() {
                self.dirty.set(huge, Huge2M);
            } else {
                self.quarantine(huge, Huge2M);
                quarantined(huge);
            }
        }
    }

    fn leave_hands(&mut self, size: FolioSize) {
        let in_hands = self.dirty.in_hands.of_mut(size);
        *in_hands = in_hands.saturating_sub(1);
    }

    /// Takes a clean folio back; says whether another is promised for it.
    #[inline]
    pub(super) fn give_back_clean(
        &mut self,
        start: u64,
        size: FolioSize,
        promise: Promise,
    ) -> Promise {
        // Who gives back less than he took is not promised another.
        if !self.free_around_poison(start, size) || promise == Promise::None {
            return Promise::None;
        }
        *self.promised.of_mut(size) += 1;
        Promise::Kept
    }

    /// Takes a folio of 2 MiB or more back that is to be scrubbed later; not one with poisoned frames.
    pub(super) fn give_back_dirty(&mut self, start: u64, size: FolioSize, promise: Promise) {
        self.dirty.set(start, size);
        if promise == Promise::Kept {
            *self.promised.of_mut(size) += 1;
        }
    }

    /// Frees the frames of a folio that are not poisoned; says whether that is all of them.
    #[inline]
    fn free_around_poison(&mut self, start: u64, size: FolioSize) -> bool {
        if self.poisoned.is_empty() {
            self.buddy.free(start, size.order());
            return true;
        }
        self.free_run_around_poison(start, size.nr_pages())
    }

    fn free_run_around_poison(&mut self, start: u64, nr_pages: u64) -> bool {
        let end = start + nr_pages;
        let mut from = start;
        for &bad in poisoned_in(&self.poisoned, start, nr_pages) {
            self.buddy.free_run(from, bad - from);
            from = bad + 1;
        }
        self.buddy.free_run(from, end - from);
        from == start
    }

    /// The poisoned frames of a run.
    pub(super) fn poisoned_in(&self, start: u64, nr_pages: u64) -> &[u64] {
        poisoned_in(&self.poisoned, start, nr_pages)
    }

    /// Counts a folio that was taken as quarantined. It never comes back.
    pub(super) fn quarantine(&mut self, start: u64, size: FolioSize) {
        self.quarantined += size.nr_pages();
        self.quarantined_poisoned += self.poisoned_in(start, size.nr_pages()).len() as u64;
    }

    /// Keeps frames out of use from now on; `false` if they were already, or are not all ours. Frames in use stay
    /// there until their folio comes back.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] without host memory to remember them.
    pub(super) fn poison(
        &mut self,
        start: u64,
        nr_pages: u64,
        is_quarantined: IsQuarantined,
    ) -> Result<bool, Error> {
        let known = self.poisoned_in(start, nr_pages).len();
        let nr_new = nr_pages - known as u64;
        let is_ours = start.checked_add(nr_pages).is_some_and(|end| end <= self.nr_pages);
        if nr_new == 0 || !is_ours {
            return Ok(false);
        }
        let frames = start..start + nr_pages;
        let exhausted = |_| Error::new(Op::Poison, ErrorKind::Exhausted);
        self.poisoned.try_reserve(index(nr_new)).map_err(exhausted)?;
        let first = self.poisoned.partition_point(|&pfn| pfn < start);
        self.poisoned.splice(first..first + known, frames.clone());
        if is_quarantined == IsQuarantined::Yes {
            self.quarantined_poisoned += nr_new;
        }
        for pfn in frames {
            self.buddy.allocate_at(pfn, 0);
        }
        Ok(true)
    }

    /// The dirty block that a frame is in, taken into the caller's hands.
    pub(super) fn dirty_around(&mut self, pfn: u64) -> Option<(u64, FolioSize)> {
        let (size, start) = [Huge2M, Huge1G]
            .map(|size| (size, pfn >> size.order() << size.order()))
            .into_iter()
            .find(|&(size, start)| self.dirty.clear(start, size))?;
        *self.dirty.in_hands.of_mut(size) += 1;
        Some((start, size))
    }

    /// Whether a frame is free, clean or not.
    pub(super) fn is_free(&self, pfn: u64) -> bool {
        let dirty = |size: FolioSize| self.dirty.get(pfn >> size.order() << size.order(), size);
        self.buddy.is_free(pfn) || dirty(Huge2M) || dirty(Huge1G)
    }

    /// Takes every free frame of a block out of use, if promises are kept without them. They come back
    /// by [`free_run`](Self::free_run).
    pub(super) fn isolate(&mut self, start: u64, size: FolioSize) -> Option<Vec<(u64, u64)>> {
        let end = start.checked_add(size.nr_pages())?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut pfn = start;
        while pfn < end {
            let Some(order) = self.buddy.order_at(pfn).filter(|&order| order < size.order()) else {
                pfn += 1;
                continue;
            };
            runs.try_reserve(1).ok()?;
            runs.push((pfn, 1 << order));
            pfn += 1 << order;
        }
        for &(pfn, nr_pages) in &runs {
            let order = u8::try_from(nr_pages.ilog2()).unwrap_or_default();
            self.buddy.allocate_at(pfn, order);
        }
        if self.free().keep(&self.promised) {
            return Some(runs);
        }
        runs.iter().for_each(|&(pfn, nr_pages)| self.buddy.free_run(pfn, nr_pages));
        None
    }

    /// Takes a free block out of use, as [`isolate`](Self::isolate) does; says whether it was free and promises
    /// are kept without it.
    pub(super) fn isolate_block(&mut self, start: u64, nr_pages: u64) -> bool {
        let order = u8::try_from(nr_pages.ilog2()).unwrap_or_default();
        if !self.buddy.allocate_at(start, order) {
            return false;
        }
        let kept = self.free().keep(&self.promised);
        if !kept {
            self.buddy.free(start, order);
        }
        kept
    }

    /// Gives frames back that [`isolate`](Self::isolate) took, but for those that have failed since.
    pub(super) fn free_run(&mut self, start: u64, nr_pages: u64) {
        self.free_run_around_poison(start, nr_pages);
    }
}

/// Whether a frame is in a folio that is quarantined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IsQuarantined {
    Yes,
    No,
}

fn poisoned_in(poisoned: &[u64], start: u64, nr_pages: u64) -> &[u64] {
    let first = poisoned.partition_point(|&pfn| pfn < start);
    let behind = poisoned.partition_point(|&pfn| pfn < start.saturating_add(nr_pages));
    poisoned.get(first..behind).unwrap_or_default()
}

impl Dirty {
    #[inline]
    fn blocks(&self) -> Blocks {
        let (giant, huge) = (self.giant.nr_ones(), self.huge.nr_ones());
        self.in_hands.plus(Blocks { giant, huge, base: 0 })
    }

    fn map(&mut self, size: FolioSize) -> Option<&mut Bits> {
        match size {
            Base => None,
            Huge2M => Some(&mut self.huge),
            Huge1G => Some(&mut self.giant),
        }
    }

    fn first(&self, size: FolioSize) -> Option<u64> {
        match size {
            Base => None,
            Huge2M => self.huge.first(),
            Huge1G => self.giant.first(),
        }
        .map(|block| block << size.order())
    }

    fn get(&self, start: u64, size: FolioSize) -> bool {
        match size {
            Base => false,
            Huge2M => self.huge.get(start >> size.order()),
            Huge1G => self.giant.get(start >> size.order()),
        }
    }

    fn set(&mut self, start: u64, size: FolioSize) {
        self.map(size).map(|map| map.set(start >> size.order()));
    }

    fn clear(&mut self, start: u64, size: FolioSize) -> bool {
        self.map(size).is_some_and(|map| map.clear(start >> size.order()))
    }
}
