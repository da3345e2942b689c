//! Bits with summaries above them: the first set one is found in a handful of words, however many
//! there are.

use bitvec::vec::BitVec;

use crate::error::{Error, ErrorKind, Op};
use crate::geometry::index;

/// log2 of the bits in a word.
const WORD_SHIFT: u32 = usize::BITS.trailing_zeros();
const IN_WORD: usize = usize::BITS as usize - 1;

/// So many bits, all clear.
///
/// # Errors
/// [`ErrorKind::Exhausted`], where [`BitVec::repeat`] would abort.
pub(crate) fn try_bits(op: Op, nr_bits: u64) -> Result<BitVec, Error> {
    let exhausted = || Error::new(op, ErrorKind::Exhausted);
    let len = index(nr_bits.div_ceil(u64::from(usize::BITS)));
    let mut words = Vec::new();
    words.try_reserve_exact(len).map_err(|_| exhausted())?;
    words.resize(len, 0usize);
    let mut bits = BitVec::try_from_vec(words).map_err(|_| exhausted())?;
    bits.truncate(index(nr_bits));
    Ok(bits)
}

/// A fixed number of bits. What lies past the end is clear and stays so.
#[derive(Debug)]
pub(super) struct Bits {
    /// A bit of a level says whether a word of the level before it has any. The last has one word.
    levels: Vec<BitVec>,
    nr_ones: u64,
}

impl Bits {
    pub(super) fn new(op: Op, nr_bits: u64) -> Result<Self, Error> {
        let mut levels = vec![try_bits(op, nr_bits)?];
        let mut nr_words = nr_bits.div_ceil(u64::from(usize::BITS));
        while nr_words > 1 {
            levels.push(try_bits(op, nr_words)?);
            nr_words = nr_words.div_ceil(u64::from(usize::BITS));
        }
        Ok(Self { levels, nr_ones: 0 })
    }

    pub(super) fn nr_ones(&self) -> u64 {
        self.nr_ones
    }

    /// What all levels take of the host's memory.
    pub(super) fn metadata_bytes(&self) -> u64 {
        self.levels.iter().map(|level| size_of_val(level.as_raw_slice()) as u64).sum()
    }

    #[inline]
    pub(super) fn get(&self, bit: u64) -> bool {
        let Some(level) = self.levels.first() else { return false };
        let (word, mask) = place(index(bit));
        index(bit) < level.len() && level.as_raw_slice()[word] & mask != 0
    }

    /// Sets a bit; says whether it was clear.
    #[inline]
    pub(super) fn set(&mut self, bit: u64) -> bool {
        let mut at = index(bit);
        for (nr, level) in self.levels.iter_mut().enumerate() {
            if at >= level.len() {
                return false;
            }
            let (word, mask) = place(at);
            let bits = &mut level.as_raw_mut_slice()[word];
            let before = *bits;
            *bits |= mask;
            if nr == 0 {
                if before & mask != 0 {
                    return false;
                }
                self.nr_ones += 1;
            }
            if before != 0 {
                break;
            }
            at = word;
        }
        true
    }

    /// Clears a bit; says whether it was set.
    #[inline]
    pub(super) fn clear(&mut self, bit: u64) -> bool {
        if !self.get(bit) {
            return false;
        }
        self.nr_ones -= 1;
        let mut at = index(bit);
        for level in &mut self.levels {
            let (word, mask) = place(at);
            level.as_raw_mut_slice()[word] &= !mask;
            if level.as_raw_slice()[word] != 0 {
                break;
            }
            at = word;
        }
        true
    }

    /// The first set bit.
    #[inline]
    pub(super) fn first(&self) -> Option<u64> {
        if self.nr_ones == 0 {
            return None;
        }
        let down = |word: usize, level: &BitVec| {
            Some((word << WORD_SHIFT) + level.as_raw_slice().get(word)?.trailing_zeros() as usize)
        };
        self.levels.iter().rev().try_fold(0, down).map(|bit| bit as u64)
    }

    /// The first set bit at or behind `from`.
    pub(super) fn first_from(&self, from: u64) -> Option<u64> {
        let mut at = index(from);
        // Up, until a word has one at or behind the place, and then down again.
        for (nr, level) in self.levels.iter().enumerate() {
            let (word, _) = place(at);
            let behind = level.as_raw_slice().get(word).map(|bits| bits >> (at & IN_WORD));
            match behind {
                None => return None,
                Some(0) => at = word + 1,
                Some(bits) => {
                    let found = at + bits.trailing_zeros() as usize;
                    let down = |word: usize, level: &BitVec| {
                        let bits = level.as_raw_slice().get(word)?;
                        Some((word << WORD_SHIFT) + bits.trailing_zeros() as usize)
                    };
                    let below = self.levels.get(..nr)?;
                    return below.iter().rev().try_fold(found, down).map(|bit| bit as u64);
                }
            }
        }
        None
    }

    /// The last set bit at or before `to`.
    pub(super) fn last_to(&self, to: u64) -> Option<u64> {
        let mut at = index(to);
        for (nr, level) in self.levels.iter().enumerate() {
            let (word, _) = place(at);
            let before = *level.as_raw_slice().get(word)? << (IN_WORD - (at & IN_WORD));
            if before != 0 {
                let found = at - before.leading_zeros() as usize;
                let down = |word: usize, level: &BitVec| {
                    let bits = level.as_raw_slice().get(word)?;
                    Some((word << WORD_SHIFT) + bits.checked_ilog2()? as usize)
                };
                return self
                    .levels
                    .get(..nr)?
                    .iter()
                    .rev()
                    .try_fold(found, down)
                    .map(|bit| bit as u64);
            }
            at = word.checked_sub(1)?;
        }
        None
    }

    /// The set bits, in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut next = self.first();
        std::iter::from_fn(move || {
            let bit = next?;
            next = self.first_from(bit + 1);
            Some(bit)
        })
    }
}

/// The word that holds a bit, and the bit in it.
#[inline]
const fn place(bit: usize) -> (usize, usize) {
    (bit >> WORD_SHIFT, 1 << (bit & IN_WORD))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn behaves_like_a_set() {
        for nr_bits in [1, 63, 64, 65, 4096, 4097, 300_000] {
            let mut bits = Bits::new(Op::CreatePool, nr_bits).unwrap();
            let mut set = BTreeSet::new();
            let mut seed = nr_bits;
            for _ in 0..if cfg!(miri) { 40 } else { 2_000 } {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let bit = (seed >> 20) % nr_bits;
                if seed >> 63 == 0 {
                    assert_eq!(bits.set(bit), set.insert(bit));
                } else {
                    assert_eq!(bits.clear(bit), set.remove(&bit));
                }
                assert_eq!(bits.get(bit), set.contains(&bit));
                assert_eq!(bits.nr_ones(), set.len() as u64);
                assert_eq!(bits.first(), set.first().copied());
                let from = (seed >> 10) % nr_bits;
                assert_eq!(bits.first_from(from), set.range(from..).next().copied());
                assert_eq!(bits.last_to(from), set.range(..=from).next_back().copied());
            }
            assert!(bits.iter().eq(set.iter().copied()));
        }
    }

    #[test]
    fn nothing_is_past_the_end() {
        let mut bits = Bits::new(Op::CreatePool, 65).unwrap();
        assert!(!bits.set(65) && !bits.set(1 << 40) && !bits.get(65) && !bits.clear(127));
        assert_eq!(bits.first_from(65), None);
        assert_eq!(bits.first_from(u64::MAX), None);
        let mut none = Bits::new(Op::CreatePool, 0).unwrap();
        assert!(!none.set(0) && !none.get(0) && none.first().is_none());
    }
}
