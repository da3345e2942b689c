//! A word as an atomic. Nobody else sees the integer.

use std::sync::atomic::Ordering;

#[cfg(all(loom, feature = "loom"))]
use super::rules::Refusal;
use super::word::Word;
use crate::sync::AtomicU64;

/// The word of one block, where it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateCell<'a>(&'a AtomicU64);

impl<'a> StateCell<'a> {
    pub(super) fn new(bits: &'a AtomicU64) -> Self {
        Self(bits)
    }

    /// The word as it is now.
    #[inline]
    pub(super) fn load(self) -> Word {
        // Acquire: pairs with the Release of `replace` and `set`. Whoever sees a published word sees the
        // bytes that the converter prepared, and everything that the holders before it did. On the
        // way down, whoever sees a split sees the parts at least as new as it found them.
        Word::from_bits(self.0.load(Ordering::Acquire))
    }

    /// The word as it was at some time: good enough to guess where to look.
    #[inline]
    pub(super) fn guess(self) -> Word {
        // Relaxed: pairs with nothing; whatever is done about the guess checks it.
        Word::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Replaces the word if it is still what was found.
    ///
    /// # Errors
    /// It is not.
    #[inline]
    pub(super) fn replace(self, found: Word, next: Word) -> Result<(), Changed> {
        // Release: pairs with the Acquire of `load` and of the next `replace`. A pin that is dropped
        // hands its holder's accesses to the freeze that follows; a publish hands the converter's
        // work to the next pin. Acquire: pairs with the same Release, so that a freeze comes after all
        // of that and a pin after the conversion. Relaxed on failure: pairs with nothing, since the
        // word is then loaded anew.
        self.0
            .compare_exchange_weak(found.bits(), next.bits(), Ordering::AcqRel, Ordering::Relaxed)
            .map_or(Err(Changed), |_| Ok(()))
    }

    /// Writes a word that nobody else may change: one that the caller has frozen, or that of a split
    /// block all of whose parts it has frozen.
    #[inline]
    pub(super) fn set(self, next: Word) {
        // Release: pairs with the Acquire of `load`, as a publish by `replace` does.
        self.0.store(next.bits(), Ordering::Release);
    }

    /// Drops one pin that is known to be counted right here; returns the word before.
    #[inline]
    pub(super) fn drop_pin(self) -> Word {
        // Release: pairs with the Acquire of `replace`, which a freeze takes the word with.
        Word::from_bits(self.0.fetch_sub(Word::ONE_PIN, Ordering::Release))
    }
}

/// Somebody else was faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changed;

/// A number for people, and for the trim that counts tables.
#[derive(Debug)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(super) fn get(&self) -> u64 {
        // Relaxed: pairs with nothing; a number that is only reported.
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, more: u64) {
        // Relaxed: as in `get`.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn sub(&self, less: u64) {
        // Relaxed: as in `get`.
        self.0.fetch_sub(less, Ordering::Relaxed);
    }
}

/// A word of no tree: canaries do to it what the tree would never do to one of its own.
#[cfg(all(loom, feature = "loom"))]
#[derive(Debug)]
pub struct LoneWord(AtomicU64);

#[cfg(all(loom, feature = "loom"))]
impl LoneWord {
    /// A word that nobody holds.
    pub fn new(visibility: super::word::Visibility) -> Self {
        Self(AtomicU64::new(Word::new(visibility).bits()))
    }

    /// The word as it is now.
    pub fn load(&self) -> Word {
        StateCell(&self.0).load()
    }

    /// Applies a rule as the tree does: once, atomically.
    ///
    /// # Errors
    /// What the rule said of the word that was found last.
    pub fn step(&self, rule: impl Fn(Word) -> Result<Word, Refusal>) -> Result<Word, Refusal> {
        let cell = StateCell(&self.0);
        loop {
            let found = cell.load();
            if cell.replace(found, rule(found)?).is_ok() {
                return Ok(found);
            }
        }
    }

    /// What a check followed by a store would do.
    ///
    /// # Errors
    /// What the rule said.
    pub fn step_by_check_then_store(
        &self,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
    ) -> Result<Word, Refusal> {
        let cell = StateCell(&self.0);
        let found = cell.load();
        cell.set(rule(found)?);
        Ok(found)
    }
}
