//! Translations that a CPU or a vCPU remembers.
//!
//! Each has 64, direct mapped by frame number. All accesses ask here first and use what they find, tables or
//! no tables: so an invalidation that is forgotten is seen.
//!
//! Lines are written under the lock of the tables, and by nobody else. Every break of an entry calls
//! [`Tlbs::invalidate`]; a line is filled with what a walk under the same lock has found, so it cannot bring back what
//! was forgotten. They are read under that lock, or by [`Lines::hit`] without any, in a section of a
//! domain of grace periods: to invalidate is to empty the lines and to wait for the sections that had begun.
//! A line is one word, so nobody reads half of one.

use std::sync::atomic::Ordering;

use crate::addr::{Access, Gfn, Pfn};
use crate::failpoint::{FailPoint, fails};
use crate::geometry::index;
use crate::stage2::Prot;
use crate::state::{Domain, Flaw, Reader, seeded};
use crate::sync::{Arc, AtomicU64, MODELLED};

/// Models have few, so that lines are taken from each other.
const NR_LINES: usize = if MODELLED { 2 } else { 64 };

/// Where a page leads, and with what rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    pub(crate) pfn: Pfn,
    pub(crate) prot: Prot,
}

/// A line's word. Zero is an empty line.
///
/// | bits | |
/// |---|---|
/// | 0 | there is something |
/// | 3:1 | rights: execute, write, read |
/// | 33:4 | the frame number that is translated, without the bits that choose the line |
/// | 63:34 | what it differs in from the frame that it leads to |
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const TAG_SHIFT: u32 = 4;
const FRAME_SHIFT: u32 = 34;
const TAG_BITS: u32 = FRAME_SHIFT - TAG_SHIFT;
const FRAME_BITS: u32 = u64::BITS - FRAME_SHIFT;
/// What has to be the same for a line to be about a page.
const MATCH: u64 = ((1 << FRAME_SHIFT) - 1) & !(READ | WRITE | EXECUTE);

impl Word {
    const EMPTY: Self = Self(0);

    /// `None` if the two frames are further apart than there are bits for: 4 TiB. The host's are the same frame.
    fn pack(gfn: Gfn, to: Translation) -> Option<Self> {
        let (tag, frame) = (gfn.get() / NR_LINES as u64, gfn.get() ^ to.pfn.get());
        if tag >> TAG_BITS != 0 || frame >> FRAME_BITS != 0 {
            return None;
        }
        let right = |has: bool, bit| if has { bit } else { 0 };
        let rights = right(to.prot.reads(), READ)
            | right(to.prot.writes(), WRITE)
            | right(to.prot.executes(), EXECUTE);
        Some(Self(frame << FRAME_SHIFT | tag << TAG_SHIFT | rights | VALID))
    }

    #[inline]
    const fn is_of(self, gfn: Gfn) -> bool {
        // The bits of a frame number that is too large for a tag match nothing.
        self.0 & MATCH == (gfn.get() / NR_LINES as u64) << TAG_SHIFT | VALID
    }

    #[inline]
    const fn pfn(self, gfn: Gfn) -> Pfn {
        Pfn::new(gfn.get() ^ self.0 >> FRAME_SHIFT)
    }

    #[inline]
    const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.0 & READ != 0,
            Access::Write => self.0 & WRITE != 0,
        }
    }

    fn translation(self, gfn: Gfn) -> Translation {
        let has = |bit| self.0 & bit != 0;
        Translation { pfn: self.pfn(gfn), prot: Prot::of(has(READ), has(WRITE), has(EXECUTE)) }
    }

    /// The page that a line's word is about.
    const fn gfn(self, line: u64) -> Option<Gfn> {
        let tag = self.0 >> TAG_SHIFT & ((1 << TAG_BITS) - 1);
        match self.0 & VALID {
            0 => None,
            _ => Some(Gfn::new(tag * NR_LINES as u64 + line)),
        }
    }
}

/// What one CPU or vCPU remembers.
#[derive(Debug)]
#[repr(align(128))]
struct Tlb([AtomicU64; NR_LINES]);

const fn line_of(gfn: Gfn) -> usize {
    index(gfn.get() % NR_LINES as u64)
}

impl Tlb {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    #[inline]
    fn load(&self, line: usize) -> Word {
        // Acquire: pairs with the Release in `store`. What was done to a page before a guest got it, the guest sees.
        Word(self.0[line].load(Ordering::Acquire))
    }

    fn store(&self, line: usize, word: Word) {
        // Release: pairs with the Acquire in `load`. That an empty line is seen in time, is the barrier's part.
        self.0[line].store(word.0, Ordering::Release);
    }

    #[inline]
    fn find(&self, gfn: Gfn) -> Option<Word> {
        Some(self.load(line_of(gfn))).filter(|word| word.is_of(gfn))
    }

    /// Whether there was anything.
    fn forget(&self, gfn: Gfn, nr_pages: u64) -> bool {
        let forget = |line: usize| {
            let about = self.load(line).gfn(line as u64);
            let hit = about.is_some_and(|it| it.get().wrapping_sub(gfn.get()) < nr_pages);
            if hit {
                self.store(line, Word::EMPTY);
            }
            hit
        };
        match nr_pages {
            1 => forget(line_of(gfn)),
            _ => (0..NR_LINES).fold(false, |any, line| forget(line) | any),
        }
    }
}

/// The TLBs of all that walk one tree; guarded by the lock of its tables.
#[derive(Debug, Default)]
pub(crate) struct Tlbs {
    /// Which of `used` is whose. Who has never remembered anything has none.
    of: Vec<Option<usize>>,
    used: Vec<Arc<Tlb>>,
    /// For those who look without the lock, if there are any.
    domain: Option<Arc<Domain>>,
    /// A translation has made way for another, and those who may still use it were not waited for.
    evicted: bool,
    /// Nothing is remembered any more: the kernel has refused the barrier.
    is_idle: bool,
    /// Nobody accesses anything any more.
    is_closed: bool,
}

impl Tlbs {
    /// One for each of `nr`.
    pub(crate) fn new(nr: usize) -> Self {
        Self { of: vec![None; nr], ..Self::default() }
    }

    /// One more; its number.
    pub(crate) fn add(&mut self) -> usize {
        self.of.push(None);
        self.of.len() - 1
    }

    #[inline]
    fn of(&self, who: usize) -> Option<&Arc<Tlb>> {
        self.used.get((*self.of.get(who)?)?)
    }

    fn of_or_new(&mut self, who: usize) -> Option<&Arc<Tlb>> {
        let at = self.of.get_mut(who)?;
        let at = *at.get_or_insert_with(|| {
            self.used.push(Arc::new(Tlb::new()));
            self.used.len() - 1
        });
        self.used.get(at)
    }

    #[inline]
    pub(crate) fn look_up(&self, who: usize, gfn: Gfn) -> Option<Translation> {
        Some(self.of(who)?.find(gfn)?.translation(gfn))
    }

    pub(crate) fn fill(&mut self, who: usize, gfn: Gfn, translation: Translation) {
        let Some(word) = Word::pack(gfn, translation).filter(|_| !self.is_idle && !self.is_closed)
        else {
            return;
        };
        let Some(tlb) = self.of_or_new(who) else { return };
        let line = line_of(gfn);
        let evicts = tlb.load(line) != Word::EMPTY;
        tlb.store(line, word);
        self.evicted |= evicts && !seeded(Flaw::EvictsInSilence);
    }

    /// Forgets pages everywhere; returns when nobody uses what was forgotten.
    #[inline(always)]
    pub(crate) fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
        // Where nobody has ever remembered anything there is nothing to forget, and nobody to wait for.
        if !self.used.is_empty() {
            self.forget(gfn, nr_pages);
        }
    }

    fn forget(&mut self, gfn: Gfn, nr_pages: u64) {
        let forgotten = self.used.iter().fold(false, |any, tlb| tlb.forget(gfn, nr_pages) | any);
        // A translation of these pages that is in no line was waited for when it went, or it was evicted.
        if forgotten || self.evicted {
            self.wait();
        }
    }

    fn wait(&mut self) {
        self.evicted = false;
        let Some(domain) = &self.domain else { return };
        if seeded(Flaw::ForgetsWithoutWaiting) {
            return;
        }
        if fails(FailPoint::ForgettingBarrier) || !domain.wait_for_all() {
            // Without the barrier nobody may look without the lock: there is nothing to be found any more.
            self.is_idle = true;
            for tlb in &self.used {
                tlb.forget(Gfn::new(0), u64::MAX);
            }
            domain.wait_by_the_clock();
        }
    }

    /// Forgets everything, and remembers nothing from here on.
    pub(crate) fn close(&mut self) {
        self.is_closed = true;
        self.invalidate(Gfn::new(0), u64::MAX);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// A way to look without the lock, for who has this number.
    pub(crate) fn lines(&mut self, who: usize) -> Option<Lines> {
        let tlb = Arc::clone(self.of_or_new(who)?);
        let domain = self.domain.get_or_insert_with(|| Arc::new(Domain::new()));
        Some(Lines { tlb, domain: Arc::clone(domain) })
    }

    /// All lines, for [`Self::recall`].
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn words(&self) -> Vec<[u64; NR_LINES]> {
        let words = |tlb: &Arc<Tlb>| std::array::from_fn(|line| tlb.load(line).0);
        self.used.iter().map(words).collect()
    }

    /// Remembers again what was forgotten since: a seeded mistake.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn recall(&mut self, was: &[[u64; NR_LINES]]) {
        for (tlb, was) in self.used.iter().zip(was) {
            for (line, &was) in was.iter().enumerate() {
                if tlb.load(line) == Word::EMPTY {
                    tlb.store(line, Word(was));
                }
            }
        }
    }

    /// All that is remembered by anybody.
    pub(crate) fn remembered(&self) -> impl Iterator<Item = (Gfn, Translation)> {
        self.used
            .iter()
            .flat_map(|tlb| (0..NR_LINES).map(|line| (line, tlb.load(line))))
            .filter_map(|(line, word)| {
                let gfn = word.gfn(line as u64)?;
                Some((gfn, word.translation(gfn)))
            })
    }
}

/// What a vCPU remembers, to be looked at without the lock.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    tlb: Arc<Tlb>,
    domain: Arc<Domain>,
}

impl Lines {
    /// A place in the domain, for one thread. Whoever looks needs one.
    pub(crate) fn reader(&self) -> Reader {
        Domain::register(&self.domain)
    }

    /// Acts on the frame that a page leads to, if that is remembered and the access allowed. Who makes the line empty
    /// waits for `act` to return.
    ///
    /// `None` also with a reader of another domain, for which nobody would wait.
    #[inline]
    pub(crate) fn hit<T>(
        &self,
        reader: &Reader,
        gfn: Gfn,
        access: Access,
        act: impl FnOnce(Pfn) -> T,
    ) -> Option<T> {
        if !reader.is_of(&self.domain) {
            return None;
        }
        let section = reader.enter();
        let word = self.tlb.find(gfn).filter(|word| word.allows(access))?;
        if seeded(Flaw::LeavesBeforeTheCopy) {
            drop(section);
            return Some(act(word.pfn(gfn)));
        }
        let done = act(word.pfn(gfn));
        drop(section);
        Some(done)
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
