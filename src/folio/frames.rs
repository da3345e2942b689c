//! The frames of one arena: which are free, clean, dirty, promised or poisoned. Arithmetic alone: no
//! bytes, no locks. Frames are counted from the start of the arena.

#[cfg(feature = "oracle")]
pub(crate) mod naive;

use super::buddy::Buddy;
use super::dirty::{Dirty, pieces};
use super::ledger::Blocks;
use super::owner::Placement;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, GIANT_ORDER, HUGE_ORDER, HUGE_PAGES, index};
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

/// Where somebody would like a folio.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish {
    pub(super) home: Option<u64>,
    pub(super) placement: Placement,
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
        Ok(Self {
            nr_pages,
            buddy,
            dirty: Dirty::new(nr_pages)?,
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
        self.buddy.metadata_bytes() + self.dirty.metadata_bytes()
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

    /// Takes a folio: where it is wished, or else where `outside` says that there is a clean one, if that is free and
    /// no promise suffers.
    #[inline]
    pub(super) fn take(
        &mut self,
        size: FolioSize,
        wish: Wish,
        promise: Promise,
        outside: impl FnOnce(&Buddy) -> Option<u64>,
    ) -> Taken {
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
        let taken = self.take_unpromised(size, wish, outside);
        let is_taken = matches!(taken, Taken::Clean(_) | Taken::Dirty(_));
        self.promised = if is_taken { after } else { before };
        taken
    }

    fn take_unpromised(
        &mut self,
        size: FolioSize,
        wish: Wish,
        outside: impl FnOnce(&Buddy) -> Option<u64>,
    ) -> Taken {
        if let Some(taken) = wish.home.and_then(|home| self.take_at(home, size, wish.placement)) {
            return taken;
        }
        if let Some(taken) = outside(&self.buddy).and_then(|at| self.take_clean_at(at, size)) {
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
            waits |= self.dirty.nr_in_hands(from) > 0;
        }
        if waits { Taken::Wait } else { Taken::Nothing }
    }

    /// A step towards a free block of 1 GiB, where one is free in pieces of which some are not clean. Clean
    /// pieces grow together. [`Taken::Nothing`] if there is none, or if promises would not be kept without it.
    pub(super) fn gather(&mut self) -> Taken {
        let free = self.free();
        let nr_pieces = Huge1G.nr_pages() / HUGE_PAGES;
        let left = free.huge.checked_sub(nr_pieces).map(|huge| Blocks { huge, ..free });
        if !left.is_some_and(|left| left.keep(&self.promised)) {
            return Taken::Nothing;
        }
        let mut giants = (0..self.nr_pages >> GIANT_ORDER).map(|nr| nr << GIANT_ORDER);
        let Some(giant) = giants.find(|&giant| self.is_in_pieces(giant)) else {
            return Taken::Nothing;
        };
        match pieces(giant).find(|&huge| self.dirty.waits(huge, Huge2M)) {
            Some(huge) => {
                self.take_in_hands(huge, Huge2M);
                Taken::ScrubFirst(huge)
            }
            None => Taken::Wait,
        }
    }

    /// Whether a block of 1 GiB is free, but in blocks of 2 MiB that are not all clean.
    fn is_in_pieces(&self, giant: u64) -> bool {
        let dirty = |huge| self.dirty.waits(huge, Huge2M) || self.dirty.is_in_hands(huge, Huge2M);
        let is_free = |huge| dirty(huge) || self.buddy.is_in_free(huge, HUGE_ORDER);
        pieces(giant).all(is_free) && pieces(giant).any(dirty)
    }

    /// Whether promises are kept if a folio is cut out of a block of a class.
    #[inline]
    fn may_cut(&self, from: FolioSize, size: FolioSize) -> bool {
        let keeps = |left: Blocks| left.keep(&self.promised) || seeded(Flaw::TakesWhatIsPromised);
        self.free().cut(from, size).is_some_and(keeps)
    }

    /// The folio at home, if it is free. One that waits for a scrub or is in somebody's hands comes before what is
    /// clean elsewhere, unless the placement says otherwise.
    fn take_at(&mut self, home: u64, size: FolioSize, placement: Placement) -> Option<Taken> {
        if self.buddy.order_from(home, size.order()).is_some() {
            return self.take_clean_at(home, size);
        }
        if placement == Placement::CleanFirst && self.has_clean(size) {
            return None;
        }
        let giant = home >> GIANT_ORDER << GIANT_ORDER;
        if size != Huge1G && self.dirty.waits(giant, Huge1G) && self.may_cut(Huge1G, size) {
            self.dirty.break_giant(giant);
        }
        let from = size.max(Huge2M);
        let block = home >> from.order() << from.order();
        if !self.may_cut(from, size) {
            return None;
        }
        if self.dirty.waits(block, from) {
            return Some(self.take_waiting(block, from, size));
        }
        // A scrub of 1 GiB takes too long to wait for.
        (from == Huge2M && self.dirty.is_in_hands(block, Huge2M)).then_some(Taken::Wait)
    }

    fn take_clean_at(&mut self, at: u64, size: FolioSize) -> Option<Taken> {
        let order = self.buddy.order_from(at, size.order())?;
        let from = [Huge1G, Huge2M, Base].into_iter().find(|from| order >= from.order())?;
        if !self.may_cut(from, size) {
            return None;
        }
        self.buddy.allocate_in(at, order, size.order());
        Some(Taken::Clean(at))
    }

    /// Whether a clean folio can be had, wherever it is.
    fn has_clean(&self, size: FolioSize) -> bool {
        let mut from = [Base, Huge2M, Huge1G].into_iter().filter(|&from| from >= size);
        from.any(|from| self.buddy.blocks().of(from) > 0 && self.may_cut(from, size))
    }

    /// Whether a block of 2 MiB is free and clean as a whole.
    pub(super) fn is_clean(&self, start: u64) -> bool {
        self.buddy.is_in_free(start, HUGE_ORDER)
    }

    /// Whether a block of 2 MiB is free as a whole: clean, waiting for a scrub, or in somebody's hands.
    pub(super) fn is_whole(&self, start: u64) -> bool {
        self.is_clean(start) || self.dirty.has(start)
    }

    /// Takes a folio of dirty memory, where there is no clean block of this class.
    fn take_dirty(&mut self, from: FolioSize, size: FolioSize) -> Option<Taken> {
        let block = self.dirty.first(from)?;
        if from == Huge1G && size != Huge1G {
            self.dirty.break_giant(block);
            return Some(self.take_waiting(block, Huge2M, size));
        }
        Some(self.take_waiting(block, from, size))
    }

    /// Takes a folio that begins with a block that waits; out of it, if it is smaller.
    fn take_waiting(&mut self, block: u64, from: FolioSize, size: FolioSize) -> Taken {
        if from == size {
            self.dirty.take(block, from);
            return Taken::Dirty(block);
        }
        self.take_in_hands(block, from);
        Taken::ScrubFirst(block)
    }

    /// Has the caller scrub a block that waits.
    fn take_in_hands(&mut self, block: u64, size: FolioSize) {
        if !seeded(Flaw::ScrubsInPlace) {
            self.dirty.take(block, size);
        }
        self.dirty.put_in_hands(block, size);
    }

    /// Whether the 2 MiB around a frame are in somebody's hands, by themselves.
    pub(super) fn is_in_hands(&self, pfn: u64) -> bool {
        self.dirty.is_in_hands(pfn >> HUGE_ORDER << HUGE_ORDER, Huge2M)
    }

    /// Has a block of 2 MiB or more wait for a scrub, if it is free and clean.
    pub(super) fn doubt(&mut self, start: u64, size: FolioSize) {
        if self.buddy.allocate_at(start, size.order()) {
            self.dirty.put(start, size);
        }
    }

    /// Has the caller scrub a certain block; says whether it waited.
    pub(super) fn take_in_hands_at(&mut self, start: u64, size: FolioSize) -> bool {
        let waits = self.dirty.waits(start, size);
        if waits {
            self.take_in_hands(start, size);
        }
        waits
    }

    /// A dirty block, which is in the caller's hands until it is given to [`scrubbed`](Self::scrubbed),
    /// [`not_scrubbed`](Self::not_scrubbed) or [`cannot_be_scrubbed`](Self::cannot_be_scrubbed).
    pub(super) fn next_dirty(&mut self) -> Option<(u64, FolioSize)> {
        let of = |size| self.dirty.first(size).map(|block| (block, size));
        let (block, size) = of(Huge2M).or_else(|| of(Huge1G))?;
        self.take_in_hands(block, size);
        Some((block, size))
    }

    /// Takes back a block that is all zeroes now, but for poisoned frames.
    pub(super) fn scrubbed(&mut self, start: u64, size: FolioSize) {
        self.dirty.leave_hands(start, size);
        if seeded(Flaw::ScrubsInPlace) {
            self.dirty.take(start, size);
        }
        self.free_around_poison(start, size);
    }

    /// Takes back a block that is as dirty as it was, since whoever had it is gone. What is dirty is handed
    /// out in whole blocks, which a block of 2 MiB with a failed frame cannot be: those are quarantined, and
    /// `quarantined` is told.
    pub(super) fn not_scrubbed(
        &mut self,
        start: u64,
        size: FolioSize,
        quarantined: impl FnMut(u64),
    ) {
        self.dirty.leave_hands(start, size);
        if self.poisoned_in(start, size.nr_pages()).is_empty() {
            self.dirty.put(start, size);
        } else {
            self.put_in_blocks(start, size, quarantined);
        }
    }

    /// Takes back a block of which some frame cannot be scrubbed. Of 1 GiB nobody knows which: each 2 MiB of it is
    /// to be tried by itself. Those are quarantined, and `quarantined` is told.
    pub(super) fn cannot_be_scrubbed(
        &mut self,
        start: u64,
        size: FolioSize,
        mut quarantined: impl FnMut(u64),
    ) {
        self.dirty.leave_hands(start, size);
        if seeded(Flaw::ScrubsInPlace) {
            self.dirty.take(start, size);
        }
        if size == Huge1G {
            self.put_in_blocks(start, size, quarantined);
        } else {
            self.quarantine(start, size);
            quarantined(start);
        }
    }

    /// Has the blocks of 2 MiB in a block wait, but for those with failed frames.
    fn put_in_blocks(&mut self, start: u64, size: FolioSize, mut quarantined: impl FnMut(u64)) {
        for huge in (start..start + size.nr_pages()).step_by(index(HUGE_PAGES)) {
            if self.poisoned_in(huge, HUGE_PAGES).is_empty() {
                self.dirty.put(huge, Huge2M);
            } else {
                self.quarantine(huge, Huge2M);
                quarantined(huge);
            }
        }
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
        self.dirty.put(start, size);
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
        for size in [Huge2M, Huge1G] {
            let first = start.next_multiple_of(size.nr_pages());
            let whole = (first..start + nr_pages + 1).step_by(index(size.nr_pages()));
            // Nothing is left of these to be scrubbed.
            whole.skip(1).for_each(|end| {
                self.dirty.take(end - size.nr_pages(), size);
            });
        }
        Ok(true)
    }

    /// The dirty block that a frame is in, taken into the caller's hands.
    pub(super) fn dirty_around(&mut self, pfn: u64) -> Option<(u64, FolioSize)> {
        let (size, start) = [Huge2M, Huge1G]
            .map(|size| (size, pfn >> size.order() << size.order()))
            .into_iter()
            .find(|&(size, start)| self.dirty.waits(start, size))?;
        self.take_in_hands(start, size);
        Some((start, size))
    }

    /// Whether a frame is free, clean or not.
    pub(super) fn is_free(&self, pfn: u64) -> bool {
        let dirty = |size: FolioSize| self.dirty.waits(pfn >> size.order() << size.order(), size);
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
