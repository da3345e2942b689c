//! One word as an atomic. Nobody else sees the integer, and nobody else loops.

use super::rules::Refusal;
use super::word::{Visibility, Word};
use crate::sync::AtomicU64;

use std::sync::atomic::Ordering;

/// The state of one subpage.
#[derive(Debug)]
pub struct StateCell(AtomicU64);

impl StateCell {
    /// A subpage that nobody holds.
    pub fn new(visibility: Visibility) -> Self {
        Self(AtomicU64::new(Word::new(visibility).bits()))
    }

    /// The word as it is now.
    pub fn load(&self) -> Word {
        // Acquire: pairs with the Release of `step`. Whoever sees a published word sees the bytes
        // that the converter prepared, and everything that the holders before it did.
        Word::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Applies a rule, once, atomically; returns the word it was applied to.
    ///
    /// # Errors
    /// What the rule said of the word that was found last.
    pub fn step(&self, rule: impl Fn(Word) -> Result<Word, Refusal>) -> Result<Word, Refusal> {
        let mut found = self.load();
        loop {
            let next = rule(found)?;
            // Release: pairs with the Acquire of `load` and of the next `step`. A pin that is
            // dropped hands its holder's accesses to the freeze that follows; a publish hands the
            // converter's work to the next pin. Acquire: pairs with the same Release, so that a
            // freeze comes after all of that and a pin after the conversion. On failure Acquire,
            // as in `load`, since the rule judges what was found.
            match self.0.compare_exchange_weak(
                found.bits(),
                next.bits(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Ok(found),
                Err(bits) => found = Word::from_bits(bits),
            }
        }
    }

    /// What a check followed by a store would do: the seeded bug of the canary models.
    ///
    /// # Errors
    /// What the rule said.
    #[cfg(all(loom, feature = "loom"))]
    pub fn step_by_check_then_store(
        &self,
        rule: impl Fn(Word) -> Result<Word, Refusal>,
    ) -> Result<Word, Refusal> {
        let found = self.load();
        // Release: pairs with the Acquire of `load`; the bug is the gap between the two.
        self.0.store(rule(found)?.bits(), Ordering::Release);
        Ok(found)
    }
}
