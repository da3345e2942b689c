//! The word of a block: who may see it, what is going on, and how many hold it.
//!
//! ```text
//!   63      51 50      38 37    22 21     6    5     4    3..1    0
//!  +----------+----------+--------+--------+-------+-----+-------+------+
//!  |  stamp   |  splits  | (zero) |  pins  | split | exc | phase | priv |
//!  +----------+----------+--------+--------+-------+-----+-------+------+
//! ```
//!
//! | phase | pins, exclusive | who may leave it |
//! |---|---|---|
//! | settled | any while shared; none while private | whoever wins the compare-and-swap |
//! | draining | those that are there may go, none may come | the conversion that waits |
//! | converting | none | the one that entered it, and nobody else |
//! | folding | none | as converting; the bytes are not touched, so accesses go on |
//! | quarantined | none, or of memory that failed those that were there, which may go | nobody: the state of the memory is unknown |
//!
//! A word with the split bit does not speak for its block any more: the words of its parts do. Its other
//! fields say what the parts were in the moment of the split, and stay as they are until the parts are
//! merged. `splits` numbers the splits of a block; `stamp` says under which split of the block above
//! a word was written. tree.rs tells from the two whether a word speaks.

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

/// What is going on with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Settled,
    /// A conversion waits for the pins to go.
    Draining,
    /// Somebody holds it exclusively to change it: a conversion or a hole punch.
    Converting,
    /// Somebody holds it to make one word of many. Nothing about the memory changes.
    Folding,
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
const PHASE: Field = PRIVATE.then(3);
const EXCLUSIVE: Field = PHASE.then(1);
const SPLIT: Field = EXCLUSIVE.then(1);

const SETTLED: u64 = 0;
const DRAINING: u64 = 1;
const CONVERTING: u64 = 2;
const FOLDING: u64 = 3;
const QUARANTINED: u64 = 4;

/// Everything about one block at one moment. The widths are parameters so that a test can go through
/// every word there is of a narrow one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AnyWord<const PIN_BITS: u32, const KEPT_BITS: u32, const SPLIT_BITS: u32>(u64);

/// The word of an object.
pub type Word = AnyWord<16, 16, 13>;

// The layout at the head of this file.
const _: () = assert!(Word::PINS.shift == 6 && Word::PINS.end() == 22);
const _: () = assert!(Word::SPLITS.shift == 38);
const _: () = assert!(Word::STAMP.shift == 51);
const _: () = assert!(Word::STAMP.end() == u64::BITS);

#[expect(clippy::cast_possible_truncation, reason = "a field of pins has at most 32 bits")]
const fn count(field: u64) -> u32 {
    field as u32
}

impl<const PIN_BITS: u32, const KEPT_BITS: u32, const SPLIT_BITS: u32>
    AnyWord<PIN_BITS, KEPT_BITS, SPLIT_BITS>
{
    const PINS: Field = {
        assert!(PIN_BITS <= u32::BITS);
        SPLIT.then(PIN_BITS)
    };
    /// For the count of held mappings.
    const KEPT: Field = Self::PINS.then(KEPT_BITS);
    const SPLITS: Field = Self::KEPT.then(SPLIT_BITS);
    const STAMP: Field = Self::SPLITS.then(SPLIT_BITS);

    /// The most pins that a word can count.
    pub const MAX_PINS: u32 = count(Self::PINS.max());

    /// The most splits that a word can number.
    pub(super) const MAX_SPLITS: u64 = Self::SPLITS.max();

    /// A block that nobody holds.
    pub const fn new(visibility: Visibility) -> Self {
        Self(0).with_visibility(visibility)
    }

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    /// What one pin adds to the bits.
    pub(super) const ONE_PIN: u64 = 1 << Self::PINS.shift;

    /// Who may see it. While a conversion is under way: who could, before.
    #[inline]
    pub const fn visibility(self) -> Visibility {
        match PRIVATE.get(self.0) {
            0 => Visibility::Shared,
            _ => Visibility::Private,
        }
    }

    /// What is going on.
    #[inline]
    pub const fn phase(self) -> Phase {
        match PHASE.get(self.0) {
            SETTLED => Phase::Settled,
            DRAINING => Phase::Draining,
            CONVERTING => Phase::Converting,
            FOLDING => Phase::Folding,
            // The other values are never written; to meet one is to know nothing.
            _ => Phase::Quarantined,
        }
    }

    /// Whether an exclusive pin is held.
    #[inline]
    pub const fn is_exclusive(self) -> bool {
        EXCLUSIVE.get(self.0) != 0
    }

    /// How many pins are held, an exclusive one not among them.
    #[inline]
    pub const fn pins(self) -> u32 {
        count(Self::PINS.get(self.0))
    }

    /// Whether any pin is held.
    #[inline]
    pub const fn is_held(self) -> bool {
        self.pins() > 0 || self.is_exclusive()
    }

    /// Whether the host may touch it now.
    #[inline]
    pub const fn is_open(self) -> bool {
        matches!(
            (self.visibility(), self.phase()),
            (Visibility::Shared, Phase::Settled | Phase::Draining | Phase::Folding)
        )
    }

    /// Whether the words of its parts speak for the block.
    #[inline]
    pub(super) const fn is_split(self) -> bool {
        SPLIT.get(self.0) != 0
    }

    /// The number of its last split; zero if there has been none.
    #[inline]
    pub(super) const fn splits(self) -> u64 {
        Self::SPLITS.get(self.0)
    }

    /// The number of the split under which it was written; zero if it never was.
    #[inline]
    pub(super) const fn stamp(self) -> u64 {
        Self::STAMP.get(self.0)
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
            Phase::Draining => DRAINING,
            Phase::Converting => CONVERTING,
            Phase::Folding => FOLDING,
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
        Self(Self::PINS.set(self.0, pins as u64))
    }

    pub(super) const fn with_stamp(self, stamp: u64) -> Self {
        Self(Self::STAMP.set(self.0, stamp))
    }

    pub(super) const fn with_splits(self, splits: u64) -> Self {
        Self(Self::SPLITS.set(self.0, splits))
    }

    pub(super) const fn with_split_bit(self) -> Self {
        Self(SPLIT.set(self.0, 1))
    }

    pub(super) const fn without_split_bit(self) -> Self {
        Self(SPLIT.set(self.0, 0))
    }

    /// What the word says, without where in the tree it was found.
    pub(super) const fn bare(self) -> Self {
        self.without_split_bit().with_splits(0).with_stamp(0)
    }
}

impl<const P: u32, const K: u32, const S: u32> fmt::Debug for AnyWord<P, K, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{{{:?}", self.visibility(), self.phase())?;
        if self.is_exclusive() {
            f.write_str(", exclusive")?;
        }
        if self.pins() > 0 {
            write!(f, ", pins:{}", self.pins())?;
        }
        match (self.is_split(), self.splits()) {
            (true, splits) => write!(f, ", split:{splits}")?,
            (false, 0) => {}
            (false, splits) => write!(f, ", merged:{splits}")?,
        }
        if self.stamp() > 0 {
            write!(f, ", stamp:{}", self.stamp())?;
        }
        f.write_str("}")
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_touch_each_other() {
        let word: Word = Word::new(Visibility::Private)
            .with_phase(Phase::Quarantined)
            .with_exclusive()
            .with_pins(Word::MAX_PINS)
            .with_split_bit()
            .with_splits(Word::MAX_SPLITS)
            .with_stamp(Word::MAX_SPLITS - 1);
        assert_eq!(word.visibility(), Visibility::Private);
        assert_eq!(word.phase(), Phase::Quarantined);
        assert!(word.is_exclusive());
        assert!(word.is_split());
        assert_eq!(word.pins(), Word::MAX_PINS);
        assert_eq!(word.splits(), Word::MAX_SPLITS);
        assert_eq!(word.stamp(), Word::MAX_SPLITS - 1);
        let bare = word.bare();
        assert_eq!(bare.with_pins(0).without_exclusive().with_phase(Phase::Settled).bits(), 1);
    }

    #[test]
    fn a_phase_that_nobody_writes_is_quarantine() {
        let phases = (0..1 << PHASE.width).map(|value| {
            let word: Word = Word::from_bits(PHASE.set(0, value));
            word.phase()
        });
        let known = [Phase::Settled, Phase::Draining, Phase::Converting, Phase::Folding];
        let unknown = [Phase::Quarantined; 4];
        assert_eq!(phases.collect::<Vec<_>>(), [known, unknown].concat());
        for phase in known.into_iter().chain([Phase::Quarantined]) {
            let word: Word = Word::new(Visibility::Shared).with_phase(phase);
            assert_eq!(word.phase(), phase);
        }
    }

    #[test]
    fn debug_prints_words() {
        let word: Word = Word::new(Visibility::Shared).with_pins(2);
        assert_eq!(format!("{word:?}"), "Shared{Settled, pins:2}");
        let split = word.with_split_bit().with_splits(3).with_stamp(1);
        assert_eq!(format!("{split:?}"), "Shared{Settled, pins:2, split:3, stamp:1}");
        let merged = split.without_split_bit().with_pins(0).with_exclusive();
        assert_eq!(format!("{merged:?}"), "Shared{Settled, exclusive, merged:3, stamp:1}");
    }
}
