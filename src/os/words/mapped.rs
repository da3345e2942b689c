//! Words in a mapping of their own, or if they fit in a page, of the allocator: a mapping takes longer to make
//! than all else that a small object needs but its file.

// UNSAFETY: atomics in memory that this file owns. Indices are checked right here.
#![expect(unsafe_code, reason = "words live in a mapping of their own")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::{AtomicU64, Error, Op, Range, Words, boxed, exhausted};
use crate::addr::ByteSize;
use crate::geometry::PAGE_BYTES;
use crate::os::mapping::Mapping;

const WORD_BYTES: usize = size_of::<u64>();
const WORDS_PER_PAGE: usize = PAGE_BYTES / WORD_BYTES;

#[derive(Debug)]
pub(super) struct Memory {
    words: NonNull<[AtomicU64]>,
    /// What they lie in; `None` if that is a box of their own.
    map: Option<Mapping>,
}

// SAFETY: the words are atomics, owned by this, and a mapping can be used from any thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.map.is_none() {
            // SAFETY: from `Box::leak` in `Words::new`, and nobody borrows `self` any more.
            drop(unsafe { Box::from_raw(self.words.as_ptr()) });
        }
    }
}

impl Words {
    /// So many words, all zero. If there are more than fit in a page, they take addresses, and memory when they
    /// are written.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted) if there are no addresses, or
    /// if the host promises no more memory than it has (`vm.overcommit_memory` 2).
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        if len <= WORDS_PER_PAGE {
            let words = NonNull::from(Box::leak(boxed(len)?));
            return Ok(Self(Memory { words, map: None }));
        }
        let bytes = (len as u64).checked_mul(WORD_BYTES as u64).ok_or_else(exhausted)?;
        let map = Mapping::of_zeroes(Op::CreateObject, ByteSize::from_bytes(bytes));
        let map = map.map_err(|_| exhausted())?;
        let words = NonNull::slice_from_raw_parts(map.base().cast(), len);
        Ok(Self(Memory { words, map: Some(map) }))
    }

    /// The word at this place.
    #[inline]
    pub(crate) fn get(&self, place: usize) -> Option<&AtomicU64> {
        if place >= self.0.words.len() {
            return None;
        }
        let word = self.0.words.cast::<AtomicU64>().as_ptr().wrapping_add(place);
        // SAFETY: 1. aligned: a mapping begins at a page, and a box is of words. 2. valid for reads and
        // writes as long as `self` is borrowed: a box, or an anonymous writable mapping, is ours until
        // `self` is dropped, and `place` has been checked. 3. nobody makes an access there that is not
        // atomic, and the kernel's zeroing replaces whole pages.
        unsafe { word.as_ref() }
    }

    /// Makes the words zero again; whole pages of a mapping go back to the host. What runs at the same
    /// time finds each as it was, or zero.
    ///
    /// # Errors
    /// [`ErrorKind::Os`](crate::error::ErrorKind::Os). Some may be zero then.
    pub(crate) fn give_back(&self, places: Range<usize>) -> Result<(), Error> {
        let end = places.end.min(self.0.words.len());
        let whole =
            |map| (map, places.start.next_multiple_of(WORDS_PER_PAGE), end - end % WORDS_PER_PAGE);
        let whole = self.0.map.as_ref().map(whole).filter(|(_, first, last)| first < last);
        let (first, last) = whole.map_or((end, end), |(_, first, last)| (first, last));
        for word in (places.start..first).chain(last..end).filter_map(|place| self.get(place)) {
            // Relaxed: who gives words back has seen to it that nobody looks for anything in them.
            word.store(0, Ordering::Relaxed);
        }
        match whole {
            None => Ok(()),
            Some((map, ..)) => map.discard(first * WORD_BYTES, (last - first) * WORD_BYTES),
        }
    }
}
