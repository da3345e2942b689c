//! Every change that a word can go through, as pure and total functions.
//!
//! | rule | from | to |
//! |---|---|---|
//! | `pin` | shared, settled, no exclusive pin | one pin more |
//! | `unpin` | at least one pin | one pin less |
//! | `pin_exclusive` | shared, settled, no pin at all | the exclusive bit |
//! | `unpin_exclusive` | the exclusive bit | none |
//! | `freeze` | settled, no pin at all | converting |
//! | `thaw` | converting | settled |
//! | `publish` | converting | settled, with the new visibility |
//! | `quarantine` | converting | quarantined |

use super::word::{Phase, Visibility, Word};

/// Why a rule does not apply: what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The memory is private.
    Private,
    /// So many pins.
    Pinned(u32),
    /// An exclusive pin.
    Exclusive,
    /// A change by somebody else.
    Converting,
    /// Unknown state.
    Quarantined,
    /// No room for another pin.
    Saturated,
    /// A release of what is not held.
    NotHeld,
}

impl Word {
    /// One more pin.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn pin(self) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Quarantined => Err(Refusal::Quarantined),
            Phase::Converting => Err(Refusal::Converting),
            Phase::Settled => match self.visibility() {
                Visibility::Private => Err(Refusal::Private),
                Visibility::Shared if self.is_exclusive() => Err(Refusal::Exclusive),
                Visibility::Shared if self.pins() == Self::MAX_PINS => Err(Refusal::Saturated),
                Visibility::Shared => Ok(self.with_pins(self.pins() + 1)),
            },
        }
    }

    /// One pin less.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`].
    pub const fn unpin(self) -> Result<Self, Refusal> {
        match self.pins() {
            0 => Err(Refusal::NotHeld),
            pins => Ok(self.with_pins(pins - 1)),
        }
    }

    /// The pin that ends all pins.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn pin_exclusive(self) -> Result<Self, Refusal> {
        match self.pin() {
            Ok(_) | Err(Refusal::Saturated) if self.pins() > 0 => Err(Refusal::Pinned(self.pins())),
            Err(refusal) => Err(refusal),
            Ok(_) => Ok(self.with_exclusive()),
        }
    }

    /// Ends an exclusive pin.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`].
    pub const fn unpin_exclusive(self) -> Result<Self, Refusal> {
        if self.is_exclusive() { Ok(self.without_exclusive()) } else { Err(Refusal::NotHeld) }
    }

    /// Takes the subpage out of everybody's reach, to change it.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn freeze(self) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Quarantined => Err(Refusal::Quarantined),
            Phase::Converting => Err(Refusal::Converting),
            Phase::Settled if self.is_exclusive() => Err(Refusal::Exclusive),
            Phase::Settled if self.pins() > 0 => Err(Refusal::Pinned(self.pins())),
            Phase::Settled => Ok(self.with_phase(Phase::Converting)),
        }
    }

    /// Gives it back unchanged.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`] if it is not frozen.
    pub const fn thaw(self) -> Result<Self, Refusal> {
        self.publish(self.visibility())
    }

    /// Gives it back with a visibility.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`] if it is not frozen.
    pub const fn publish(self, to: Visibility) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Converting => Ok(self.with_visibility(to).with_phase(Phase::Settled)),
            _ => Err(Refusal::NotHeld),
        }
    }

    /// Gives it up for good.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`] if it is not frozen.
    pub const fn quarantine(self) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Converting => Ok(self.with_phase(Phase::Quarantined)),
            _ => Err(Refusal::NotHeld),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every word that the fields can express, with the counts that differ in kind.
    fn all_words() -> impl Iterator<Item = Word> {
        let visibilities = [Visibility::Shared, Visibility::Private];
        let phases = [Phase::Settled, Phase::Converting, Phase::Quarantined];
        let counts = [0, 1, 2, Word::MAX_PINS - 1, Word::MAX_PINS];
        visibilities.into_iter().flat_map(move |visibility| {
            phases.into_iter().flat_map(move |phase| {
                counts.into_iter().flat_map(move |pins| {
                    let word = Word::new(visibility).with_phase(phase).with_pins(pins);
                    [word, word.with_exclusive()]
                })
            })
        })
    }

    /// The invariant of a word: pins exist only where the table in word.rs says so.
    fn is_legal(word: Word) -> bool {
        let held = word.pins() > 0 || word.is_exclusive();
        let free_to_hold = word.is_open();
        (!held || free_to_hold) && !(word.pins() > 0 && word.is_exclusive())
    }

    #[test]
    fn a_rule_leads_from_legal_words_to_legal_words_only() {
        type Rule = fn(Word) -> Result<Word, Refusal>;
        let rules: [Rule; 9] = [
            Word::pin,
            Word::unpin,
            Word::pin_exclusive,
            Word::unpin_exclusive,
            Word::freeze,
            Word::thaw,
            |w| w.publish(Visibility::Private),
            |w| w.publish(Visibility::Shared),
            Word::quarantine,
        ];
        let mut applied = 0;
        for word in all_words().filter(|&w| is_legal(w)) {
            for rule in rules {
                if let Ok(next) = rule(word) {
                    applied += 1;
                    assert!(is_legal(next), "{word:?} -> {next:?}");
                }
            }
        }
        // Pins: 4 up, 4 down; exclusive: 1 up, 1 down; freeze: 2; out of a frozen word: 2 times 4.
        assert_eq!(applied, 20);
    }

    #[test]
    fn each_rule_applies_exactly_where_its_table_says() {
        for word in all_words() {
            let open = word.is_open();
            let held = word.pins() > 0 || word.is_exclusive();
            let room = word.pins() < Word::MAX_PINS;
            assert_eq!(word.pin().is_ok(), open && !word.is_exclusive() && room, "{word:?}");
            assert_eq!(word.pin_exclusive().is_ok(), open && !held, "{word:?}");
            assert_eq!(word.freeze().is_ok(), word.phase() == Phase::Settled && !held, "{word:?}");
            let frozen = word.phase() == Phase::Converting;
            assert_eq!(word.thaw().is_ok(), frozen, "{word:?}");
            assert_eq!(word.publish(Visibility::Private).is_ok(), frozen, "{word:?}");
            assert_eq!(word.quarantine().is_ok(), frozen, "{word:?}");
            assert_eq!(word.unpin().is_ok(), word.pins() > 0, "{word:?}");
            assert_eq!(word.unpin_exclusive().is_ok(), word.is_exclusive(), "{word:?}");
        }
    }

    #[test]
    fn every_rule_has_its_inverse() {
        for word in all_words() {
            if let Ok(next) = word.pin() {
                assert_eq!(next.unpin(), Ok(word));
            }
            if let Ok(next) = word.pin_exclusive() {
                assert_eq!(next.unpin_exclusive(), Ok(word));
            }
            if let Ok(next) = word.freeze() {
                assert_eq!(next.thaw(), Ok(word));
                for to in [Visibility::Shared, Visibility::Private] {
                    assert_eq!(next.publish(to), Ok(word.with_visibility(to)));
                }
            }
        }
    }

    #[test]
    fn the_first_reason_is_the_gravest() {
        let word = Word::new(Visibility::Private).with_phase(Phase::Quarantined).with_pins(1);
        assert_eq!(word.pin(), Err(Refusal::Quarantined));
        assert_eq!(word.freeze(), Err(Refusal::Quarantined));
        let pinned = Word::new(Visibility::Shared).with_pins(3);
        assert_eq!(pinned.freeze(), Err(Refusal::Pinned(3)));
        assert_eq!(pinned.pin_exclusive(), Err(Refusal::Pinned(3)));
        assert_eq!(pinned.with_pins(Word::MAX_PINS).pin(), Err(Refusal::Saturated));
        let saturated = pinned.with_pins(Word::MAX_PINS).pin_exclusive();
        assert_eq!(saturated, Err(Refusal::Pinned(Word::MAX_PINS)));
    }
}
