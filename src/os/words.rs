//! Memory for words of state: zero until somebody writes, and paid for by the page that is written.
//!
//! An object's tables are laid out as if every one of them existed, and a table is exactly a page. One
//! that nobody needs costs addresses and nothing else, so there is no allocation that could fail or
//! race in the middle of a split, and no pointer to follow.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Op};
use crate::sync::AtomicU64;

#[cfg(not(any(miri, all(loom, feature = "loom"))))]
use mapped::Memory;

/// Under loom and Miri there is no mapping: words of the allocator, zeroed one by one.
#[cfg(any(miri, all(loom, feature = "loom")))]
type Memory = Box<[AtomicU64]>;

/// A row of words.
#[derive(Debug)]
pub(crate) struct Words(Memory);

fn exhausted() -> Error {
    Error::new(Op::CreateObject, ErrorKind::Exhausted)
}

/// So many words of the allocator, all zero. Many take memory when they are written.
///
/// # Errors
/// [`ErrorKind::Exhausted`].
#[cfg(not(any(miri, all(loom, feature = "loom"))))]
pub(crate) fn boxed(len: usize) -> Result<Box<[AtomicU64]>, Error> {
    mapped::zeroed(len).ok_or_else(exhausted)
}

/// The same, one by one.
#[cfg(any(miri, all(loom, feature = "loom")))]
pub(crate) fn boxed(len: usize) -> Result<Box<[AtomicU64]>, Error> {
    let mut words = Vec::new();
    words.try_reserve_exact(len).map_err(|_| exhausted())?;
    words.resize_with(len, || AtomicU64::new(0));
    Ok(words.into_boxed_slice())
}

#[cfg(any(miri, all(loom, feature = "loom")))]
impl Words {
    /// So many words, all zero.
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        boxed(len).map(Self)
    }

    /// The same, where there are few.
    pub(crate) fn few(len: usize) -> Result<Self, Error> {
        Self::new(len)
    }

    /// The word at this place.
    pub(crate) fn get(&self, place: usize) -> Option<&AtomicU64> {
        self.0.get(place)
    }

    /// Makes the words zero again. What runs at the same time finds each as it was, or zero.
    pub(crate) fn give_back(&self, places: Range<usize>) -> Result<(), Error> {
        for word in self.0.get(places).unwrap_or_default() {
            // Relaxed: who gives words back has seen to it that nobody looks for anything in them.
            word.store(0, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(not(any(miri, all(loom, feature = "loom"))))]
mod mapped;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_are_zero_until_written_and_after_they_are_given_back() {
        for words in [Words::new(3 * 512).unwrap(), Words::few(3 * 512).unwrap()] {
            are_zero_until_written_and_after_they_are_given_back(&words);
        }
        assert!(Words::new(0).unwrap().get(0).is_none());
        assert!(Words::few(0).unwrap().get(0).is_none());
    }

    fn are_zero_until_written_and_after_they_are_given_back(words: &Words) {
        // Relaxed: one thread.
        let load = |at: usize| words.get(at).unwrap().load(Ordering::Relaxed);
        for at in [0, 511, 512, 1535] {
            assert_eq!(load(at), 0);
            // Relaxed: one thread.
            words.get(at).unwrap().store(7, Ordering::Relaxed);
            assert_eq!(load(at), 7);
        }
        words.give_back(512..1024).unwrap();
        assert_eq!([0, 511, 512, 1535].map(load), [7, 7, 0, 7]);
        words.give_back(500..1500).unwrap();
        assert_eq!([0, 511, 512, 1535].map(load), [7, 0, 0, 7]);
        assert!(words.get(1536).is_none());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri's words are of the allocator")]
    fn more_than_there_are_addresses_for_is_refused() {
        for len in [usize::MAX, usize::MAX / 8, 1 << 58] {
            for outcome in [Words::new(len), Words::few(len)] {
                assert_eq!(outcome.unwrap_err().kind(), crate::error::ErrorKind::Exhausted);
            }
        }
    }
}
