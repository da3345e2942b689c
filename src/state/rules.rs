//! Every change that a word can go through, as pure and total functions.
//!
//! | rule | from | to |
//! |---|---|---|
//! | `pin` | shared, settled, no exclusive pin | one pin more |
//! | `unpin` | at least one pin | one pin less |
//! | `pin_exclusive` | shared, settled, no pin at all | the exclusive bit |
//! | `unpin_exclusive` | the exclusive bit | none |
//! | `freeze` | settled, no pin at all | converting |
//! | `drain` | settled | draining |
//! | `freeze_drained` | draining, no pin at all | converting |
//! | `thaw` | converting or draining | settled |
//! | `publish` | converting | settled, with the new visibility |
//! | `quarantine` | converting | quarantined |
//! | `condemn` | settled, whoever has it pinned | quarantined, with its pins |
//! | `fold` | settled, no pin at all | folding |
//! | `unfold` | folding | settled |
//!
//! And three that are about the tree: `split`, `inherit` and `merged`.

use super::word::{AnyWord, Phase, Visibility};

/// Why a rule does not apply: what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The memory is private.
    Private,
    /// So many pins.
    Pinned(u32),
    /// An exclusive pin.
    Exclusive,
    /// A change by somebody else, under way or waiting for its turn.
    Converting,
    /// Many words becoming one: over in a moment.
    Folding,
    /// Unknown state.
    Quarantined,
    /// No room for another pin.
    Saturated,
    /// A release of what is not held.
    NotHeld,
}

impl<const P: u32, const K: u32, const S: u32> AnyWord<P, K, S> {
    /// Whether anybody stands in the way of a change.
    const fn unheld(self) -> Result<(), Refusal> {
        match self.pins() {
            _ if self.is_exclusive() => Err(Refusal::Exclusive),
            0 => Ok(()),
            pins => Err(Refusal::Pinned(pins)),
        }
    }

    /// Whether anything is going on.
    const fn settled(self) -> Result<(), Refusal> {
        match self.phase() {
            Phase::Settled => Ok(()),
            Phase::Draining | Phase::Converting => Err(Refusal::Converting),
            Phase::Folding => Err(Refusal::Folding),
            Phase::Quarantined => Err(Refusal::Quarantined),
        }
    }

    /// One more pin.
    ///
    /// # Errors
    /// What stands in the way.
    #[inline]
    pub const fn pin(self) -> Result<Self, Refusal> {
        match (self.settled(), self.visibility()) {
            (Err(refusal), _) => Err(refusal),
            (Ok(()), Visibility::Private) => Err(Refusal::Private),
            (Ok(()), Visibility::Shared) if self.is_exclusive() => Err(Refusal::Exclusive),
            (Ok(()), Visibility::Shared) if self.pins() == Self::MAX_PINS => {
                Err(Refusal::Saturated)
            }
            (Ok(()), Visibility::Shared) => Ok(Self::from_bits(self.bits() + Self::ONE_PIN)),
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

    /// Takes the block out of everybody's reach, to change it.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn freeze(self) -> Result<Self, Refusal> {
        match (self.settled(), self.unheld()) {
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
            (Ok(()), Ok(())) => Ok(self.with_phase(Phase::Converting)),
        }
    }

    /// Sees to it that no more pins come. Those that are there may go, and accesses go on.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn drain(self) -> Result<Self, Refusal> {
        match self.settled() {
            Ok(()) => Ok(self.with_phase(Phase::Draining)),
            Err(refusal) => Err(refusal),
        }
    }

    /// Takes the block once it is drained.
    ///
    /// # Errors
    /// Who is still there, or [`Refusal::NotHeld`] if it is not draining.
    pub const fn freeze_drained(self) -> Result<Self, Refusal> {
        match (self.phase(), self.unheld()) {
            (Phase::Draining, Ok(())) => Ok(self.with_phase(Phase::Converting)),
            (Phase::Draining, Err(refusal)) => Err(refusal),
            _ => Err(Refusal::NotHeld),
        }
    }

    /// Gives it back unchanged.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`] if it is neither frozen nor draining.
    pub const fn thaw(self) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Converting | Phase::Draining => Ok(self.with_phase(Phase::Settled)),
            _ => Err(Refusal::NotHeld),
        }
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

    /// Gives it up for good while others have it pinned, who keep it until they let go.
    ///
    /// # Errors
    /// What is going on.
    pub const fn condemn(self) -> Result<Self, Refusal> {
        match self.settled() {
            Ok(()) => Ok(self.with_phase(Phase::Quarantined)),
            Err(refusal) => Err(refusal),
        }
    }

    /// Keeps the block as it is until it is unfolded.
    ///
    /// # Errors
    /// What stands in the way.
    pub const fn fold(self) -> Result<Self, Refusal> {
        match self.freeze() {
            Ok(_) => Ok(self.with_phase(Phase::Folding)),
            Err(refusal) => Err(refusal),
        }
    }

    /// Ends that.
    ///
    /// # Errors
    /// [`Refusal::NotHeld`] if it is not folding.
    pub const fn unfold(self) -> Result<Self, Refusal> {
        match self.phase() {
            Phase::Folding => Ok(self.with_phase(Phase::Settled)),
            _ => Err(Refusal::NotHeld),
        }
    }

    /// The number after `splits`. Zero is kept for words that never were written.
    pub(super) const fn split_after(splits: u64, nr_splits: u64) -> u64 {
        if splits >= nr_splits { 1 } else { splits + 1 }
    }

    /// Lets the parts speak from now on. Only a word to which the rule applies that a part is wanted
    /// for may be split: never a frozen one.
    pub(super) const fn split(self, nr_splits: u64) -> Self {
        self.with_splits(Self::split_after(self.splits(), nr_splits)).with_split_bit()
    }

    /// What a part that was not written since `parent` was split has inherited from it.
    pub(super) const fn inherit(parent: Self, part: Self) -> Self {
        parent.without_split_bit().with_stamp(parent.splits()).with_splits(part.splits())
    }

    /// The word of a split block all of whose parts are held by the caller and become one. Its
    /// number of splits stays, so that the parts are known to be out of date.
    pub(super) const fn merged(self, like: Self) -> Self {
        like.without_split_bit().with_stamp(self.stamp()).with_splits(self.splits())
    }

    /// Whether a part speaks for itself, under a parent that is split.
    ///
    /// Three numbers must be told apart: during one section a block is merged and split again once at
    /// the most, so whoever has read the parent before that finds parts of the split before, of that
    /// one, or of the next. With two numbers the first and the last would look alike.
    #[inline]
    pub(super) const fn standing(self, parent: Self, nr_splits: u64) -> Standing {
        let now = parent.splits();
        match self.stamp() {
            stamp if stamp == now => Standing::Speaks,
            0 => Standing::Inherits,
            stamp if Self::split_after(stamp, nr_splits) == now => Standing::Inherits,
            _ => Standing::Stale,
        }
    }
}

/// What a part is to a block that is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It was written since.
    Speaks,
    /// It was not: it is as the block was.
    Inherits,
    /// It is ahead of the block's word, which the reader has read too early.
    Stale,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A word of twelve bits: pins up to 3, three splits.
    type Narrow = AnyWord<2, 0, 2>;

    type Rule = fn(Narrow) -> Result<Narrow, Refusal>;

    /// All of them, with whatever in their fields.
    fn all_words() -> impl Iterator<Item = Narrow> {
        (0..1 << 12).map(Narrow::from_bits)
    }

    /// The invariant of a word: pins exist only where the table in word.rs says so.
    fn is_legal(word: Narrow) -> bool {
        let may_be_held = word.visibility() == Visibility::Shared
            && matches!(word.phase(), Phase::Settled | Phase::Draining | Phase::Quarantined);
        (!word.is_held() || may_be_held) && !(word.pins() > 0 && word.is_exclusive())
    }

    /// What the word says, and what it says of the tree.
    fn tree_part(word: Narrow) -> (bool, u64, u64) {
        (word.is_split(), word.splits(), word.stamp())
    }

    fn publish_shared(word: Narrow) -> Result<Narrow, Refusal> {
        word.publish(Visibility::Shared)
    }

    fn publish_private(word: Narrow) -> Result<Narrow, Refusal> {
        word.publish(Visibility::Private)
    }

    const RULES: [Rule; 14] = [
        Narrow::pin,
        Narrow::unpin,
        Narrow::pin_exclusive,
        Narrow::unpin_exclusive,
        Narrow::freeze,
        Narrow::drain,
        Narrow::freeze_drained,
        Narrow::thaw,
        publish_shared,
        publish_private,
        Narrow::quarantine,
        Narrow::condemn,
        Narrow::fold,
        Narrow::unfold,
    ];

    /// What the other tests measure with.
    #[test]
    fn the_yardsticks_tell_words_apart() {
        assert_eq!(all_words().count(), 1 << 12);
        // A split bit, and two numbers of two bits.
        assert_eq!(all_words().map(tree_part).collect::<BTreeSet<_>>().len(), 32);
        // Not held: two sides and eight phases, four of which are quarantine. Held: shared, six phases, three counts
        // or exclusively.
        assert_eq!(all_words().filter(|&word| is_legal(word)).count(), 32 * (2 * 8 + 6 * (3 + 1)));
    }

    #[test]
    fn a_rule_leads_from_legal_words_to_legal_words_only() {
        for word in all_words().filter(|&word| is_legal(word)) {
            for rule in RULES {
                if let Ok(next) = rule(word) {
                    assert!(is_legal(next), "{word:?} -> {next:?}");
                    assert_eq!(tree_part(next), tree_part(word), "{word:?} -> {next:?}");
                }
            }
        }
    }

    /// The table at the head of this file, read as a table.
    #[test]
    fn each_rule_applies_exactly_where_its_table_says() {
        for word in all_words() {
            let (phase, held, pins) = (word.phase(), word.is_held(), word.pins());
            let idle = phase == Phase::Settled && !held;
            let pinnable = word.visibility() == Visibility::Shared
                && phase == Phase::Settled
                && !word.is_exclusive();
            let with = |phase| Some(word.with_phase(phase));
            let only = |condition: bool, next| if condition { next } else { None };

            let taken = matches!(phase, Phase::Converting | Phase::Draining);
            let drained = only(phase == Phase::Settled, with(Phase::Draining));
            let published = |to| only(phase == Phase::Converting, settled_as(word, to));
            // In the order of `RULES`.
            let wanted: [Option<Narrow>; 14] = [
                only(pinnable && pins < Narrow::MAX_PINS, Some(word.with_pins(pins + 1))),
                only(pins > 0, Some(word.with_pins(pins.saturating_sub(1)))),
                only(pinnable && !held, Some(word.with_exclusive())),
                only(word.is_exclusive(), Some(word.without_exclusive())),
                only(idle, with(Phase::Converting)),
                drained,
                only(phase == Phase::Draining && !held, with(Phase::Converting)),
                only(taken, with(Phase::Settled)),
                published(Visibility::Shared),
                published(Visibility::Private),
                only(phase == Phase::Converting, with(Phase::Quarantined)),
                only(phase == Phase::Settled, with(Phase::Quarantined)),
                only(idle, with(Phase::Folding)),
                only(phase == Phase::Folding, with(Phase::Settled)),
            ];
            for (rule, wanted) in RULES.iter().zip(wanted) {
                assert_eq!(rule(word).ok(), wanted, "{word:?}");
            }
        }
    }

    fn settled_as(word: Narrow, to: Visibility) -> Option<Narrow> {
        Some(word.with_phase(Phase::Settled).with_visibility(to))
    }

    #[test]
    fn refusals_say_what_was_found() {
        for word in all_words() {
            let going_on = match word.phase() {
                Phase::Settled => None,
                Phase::Draining | Phase::Converting => Some(Refusal::Converting),
                Phase::Folding => Some(Refusal::Folding),
                Phase::Quarantined => Some(Refusal::Quarantined),
            };
            let exclusive = word.is_exclusive().then_some(Refusal::Exclusive);
            let private = (word.visibility() == Visibility::Private).then_some(Refusal::Private);
            let pinned = (word.pins() > 0).then_some(Refusal::Pinned(word.pins()));
            let full = (word.pins() == Narrow::MAX_PINS).then_some(Refusal::Saturated);

            let before_pin = going_on.or(private).or(exclusive);
            assert_eq!(word.pin().err(), before_pin.or(full), "{word:?}");
            assert_eq!(word.pin_exclusive().err(), before_pin.or(pinned), "{word:?}");
            assert_eq!(word.freeze().err(), going_on.or(exclusive).or(pinned), "{word:?}");
            assert_eq!(word.fold().err(), word.freeze().err(), "{word:?}");
            assert_eq!(word.drain().err(), going_on, "{word:?}");
            assert_eq!(word.condemn().err(), going_on, "{word:?}");
            let drained = match word.phase() {
                Phase::Draining => exclusive.or(pinned),
                _ => Some(Refusal::NotHeld),
            };
            assert_eq!(word.freeze_drained().err(), drained, "{word:?}");
            for release in [Narrow::unpin, Narrow::unpin_exclusive, Narrow::thaw, Narrow::unfold] {
                assert!(matches!(release(word), Ok(_) | Err(Refusal::NotHeld)), "{word:?}");
            }
        }
    }

    #[test]
    fn undoing_a_step_gives_the_word_back() {
        for word in all_words().filter(|&word| is_legal(word)) {
            let steps: [(Rule, Rule); 5] = [
                (Narrow::pin, Narrow::unpin),
                (Narrow::pin_exclusive, Narrow::unpin_exclusive),
                (Narrow::freeze, Narrow::thaw),
                (Narrow::drain, Narrow::thaw),
                (Narrow::fold, Narrow::unfold),
            ];
            for (step, undo) in steps {
                if let Ok(next) = step(word) {
                    assert_eq!(undo(next), Ok(word), "{word:?}");
                }
            }
        }
    }

    #[test]
    fn a_part_inherits_all_but_its_own_splits() {
        let nr_splits = Narrow::MAX_SPLITS;
        // Two million pairs are hours when they are interpreted.
        let step = if cfg!(miri) { 499 } else { 1 };
        for parent in all_words().step_by(step) {
            let split = parent.split(nr_splits);
            assert!(split.is_split() && split.splits() != 0);
            assert_eq!(split.with_splits(0).without_split_bit().bits(), {
                parent.with_splits(0).without_split_bit().bits()
            });
            for part in all_words().step_by(7) {
                let part = Narrow::inherit(split, part);
                assert_eq!(part.bare(), parent.bare());
                assert_eq!(part.standing(split, nr_splits), Standing::Speaks);
                let merged = split.merged(part);
                assert_eq!(merged.bare(), part.bare());
                let again = merged.split(nr_splits);
                assert_eq!(part.standing(again, nr_splits), Standing::Inherits);
                let twice = again.merged(part).split(nr_splits);
                assert_eq!(part.standing(twice, nr_splits), Standing::Stale);
                assert_eq!(Narrow::from_bits(0).standing(twice, nr_splits), Standing::Inherits);
            }
        }
    }
}
