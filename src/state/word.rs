//! The word of a subpage: who may see it, what is going on, and how many hold it.
//!
//! ```text
//!   63                    20 19        4   3    2..1    0
//!  +------------------------+-----------+-----+-------+------+
//!  |         (zero)         |   pins    | exc | phase | priv |
//!  +------------------------+-----------+-----+-------+------+
//! ```
//!
//! | phase | pins, exclusive | who may leave it |
//! |---|---|---|
//! | settled | any while shared; none while private | whoever wins the compare-and-swap |
//! | converting | none | the one that entered it, and nobody else |
//! | quarantined | none | nobody: the state of the memory is unknown |
//!
//! The phase value 1 is kept for draining, which a conversion that waits will enter. The upper bits
//! are kept for held mappings and for the generations of the block tree.

use std::fmt;

/// Who may see a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Visibility {
    /// Host and guest.
    Shared,
    /// The guest alone.
    #[default]
    Private,
}

impl fmt::Display for Visibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Private => "private",
        })
    }
}

/// What is going on with a subpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Settled,
    /// Somebody holds it exclusively to change it: a conversion or a hole punch.
    Converting,
    /// An earlier change failed half way; nobody gets it any more.
    Quarantined,
}

/// A run of bits.
#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    width: u32,
}

impl Field {
    const fn first(width: u32) -> Self {
        Self { shift: 0, width }
    }

    /// The field of `width` bits right above this one.
    const fn then(self, width: u32) -> Self {
        Self { shift: self.end(), width }
    }

    const fn end(self) -> u32 {
        self.shift + self.width
    }

    const fn max(self) -> u64 {
        (1 << self.width) - 1
    }

    const fn get(self, word: u64) -> u64 {
        word >> self.shift & self.max()
    }

    /// The word with this field replaced. Values too large cannot come up: rules check `max` first.
    const fn set(self, word: u64, value: u64) -> u64 {
        word & !(self.max() << self.shift) | (value & self.max()) << self.shift
    }
}

const PRIVATE: Field = Field::first(1);
const PHASE: Field = PRIVATE.then(2);
const EXCLUSIVE: Field = PHASE.then(1);
const PINS: Field = EXCLUSIVE.then(16);

const _: () = assert!(PINS.end() <= u64::BITS);
const _: () = assert!(PINS.max() <= u32::MAX as u64);

#[expect(clippy::cast_possible_truncation, reason = "asserted above: a field fits")]
const fn count(field: u64) -> u32 {
    field as u32
}

const SETTLED: u64 = 0;
const CONVERTING: u64 = 2;
const QUARANTINED: u64 = 3;

/// Everything about one subpage at one moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    /// The most pins that a word can count.
    pub const MAX_PINS: u32 = count(PINS.max());

    /// A subpage that nobody holds.
    pub const fn new(visibility: Visibility) -> Self {
        Self(0).with_visibility(visibility)
    }

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    /// Who may see it. While a conversion is under way: who could, before.
    pub const fn visibility(self) -> Visibility {
        match PRIVATE.get(self.0) {
            0 => Visibility::Shared,
            _ => Visibility::Private,
        }
    }

    /// What is going on.
    pub const fn phase(self) -> Phase {
        match PHASE.get(self.0) {
            SETTLED => Phase::Settled,
            CONVERTING => Phase::Converting,
            // The value kept for draining is never written; to meet it is to know nothing.
            _ => Phase::Quarantined,
        }
    }

    /// Whether an exclusive pin is held.
    pub const fn is_exclusive(self) -> bool {
        EXCLUSIVE.get(self.0) != 0
    }

    /// How many pins are held, an exclusive one not among them.
    pub const fn pins(self) -> u32 {
        count(PINS.get(self.0))
    }

    /// Whether the host may touch it now.
    pub const fn is_open(self) -> bool {
        matches!((self.visibility(), self.phase()), (Visibility::Shared, Phase::Settled))
    }

    pub(super) const fn with_visibility(self, visibility: Visibility) -> Self {
        let bit = match visibility {
            Visibility::Shared => 0,
            Visibility::Private => 1,
        };
        Self(PRIVATE.set(self.0, bit))
    }

    pub(super) const fn with_phase(self, phase: Phase) -> Self {
        let value = match phase {
            Phase::Settled => SETTLED,
            Phase::Converting => CONVERTING,
            Phase::Quarantined => QUARANTINED,
        };
        Self(PHASE.set(self.0, value))
    }

    pub(super) const fn with_exclusive(self) -> Self {
        Self(EXCLUSIVE.set(self.0, 1))
    }

    pub(super) const fn without_exclusive(self) -> Self {
        Self(EXCLUSIVE.set(self.0, 0))
    }

    pub(super) const fn with_pins(self, pins: u32) -> Self {
        Self(PINS.set(self.0, pins as u64))
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{{{:?}", self.visibility(), self.phase())?;
        if self.is_exclusive() {
            f.write_str(", exclusive")?;
        }
        if self.pins() > 0 {
            write!(f, ", pins:{}", self.pins())?;
        }
        f.write_str("}")
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_touch_each_other() {
        let word = Word::new(Visibility::Private)
            .with_phase(Phase::Quarantined)
            .with_exclusive()
            .with_pins(Word::MAX_PINS);
        assert_eq!(word.visibility(), Visibility::Private);
        assert_eq!(word.phase(), Phase::Quarantined);
        assert!(word.is_exclusive());
        assert_eq!(word.pins(), Word::MAX_PINS);
        assert_eq!(word.with_pins(0).without_exclusive().with_phase(Phase::Settled).bits(), 1);
    }

    #[test]
    fn debug_prints_words() {
        let word = Word::new(Visibility::Shared).with_pins(2);
        assert_eq!(format!("{word:?}"), "Shared{Settled, pins:2}");
    }
}
