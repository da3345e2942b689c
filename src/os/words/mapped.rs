//! Words in a mapping of their own.

// UNSAFETY: atomics in an anonymous mapping that this file owns, or in zeroed memory of the allocator.
// Indices are checked right here.
#![expect(unsafe_code, reason = "words live in a mapping of their own")]

use std::alloc::{Layout, alloc_zeroed};
use std::ptr;
use std::sync::atomic::Ordering;

use super::{AtomicU64, Error, Op, Range, Words, exhausted};
use crate::addr::ByteSize;
use crate::geometry::PAGE_BYTES;
use crate::os::mapping::Mapping;

const WORD_BYTES: usize = size_of::<u64>();
const WORDS_PER_PAGE: usize = PAGE_BYTES / WORD_BYTES;

/// So many words of the allocator, which asks the kernel for zeroes where there are many; `None` if it has
/// no room.
pub(super) fn zeroed(len: usize) -> Option<Box<[AtomicU64]>> {
    let layout = Layout::array::<AtomicU64>(len).ok()?;
    if layout.size() == 0 {
        return Some(Box::default());
    }
    // SAFETY: the layout has a size.
    let words = unsafe { alloc_zeroed(layout) }.cast::<AtomicU64>();
    if words.is_null() {
        return None;
    }
    // SAFETY: 1. the global allocator has given us this block just now, for the layout of so many words, and
    // nobody else has it. 2. all of it is initialised: zero is a value of an atomic integer.
    Some(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(words, len)) })
}

#[derive(Debug)]
pub(super) struct Memory {
    map: Mapping,
    len: usize,
}

impl Words {
    /// So many words, all zero. They take addresses, and memory when they are written.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted) if there are no addresses, or
    /// if the host promises no more memory than it has (`vm.overcommit_memory` 2).
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        // A mapping has a byte at least.
        let bytes = (len.max(1) as u64).checked_mul(WORD_BYTES as u64).ok_or_else(exhausted)?;
        let map = Mapping::of_zeroes(Op::CreateObject, ByteSize::from_bytes(bytes));
        let map = map.map_err(|_| exhausted())?;
        Ok(Self(Memory { map, len }))
    }

    /// The word at this place.
    #[inline]
    pub(crate) fn get(&self, place: usize) -> Option<&AtomicU64> {
        if place >= self.0.len {
            return None;
        }
        let word = self.0.map.base().cast::<u64>().as_ptr().wrapping_add(place);
        // SAFETY: 1. aligned: a mapping begins at a page. 2. valid for reads and writes as long
        // as `self` is borrowed: the mapping is anonymous, writable, ours until it is dropped, and
        // `place` has been checked. 3. nobody makes an access there that is not atomic, and the
        // kernel's zeroing replaces whole pages.
        Some(unsafe { AtomicU64::from_ptr(word) })
    }

    /// Makes the words zero again; whole pages of them go back to the host. What runs at the same
    /// time finds each as it was, or zero.
    ///
    /// # Errors
    /// [`ErrorKind::Os`](crate::error::ErrorKind::Os). Some may be zero then.
    pub(crate) fn give_back(&self, places: Range<usize>) -> Result<(), Error> {
        let end = places.end.min(self.0.len);
        let first = places.start.next_multiple_of(WORDS_PER_PAGE).min(end);
        let last = (end - end % WORDS_PER_PAGE).max(first);
        for word in (places.start..first).chain(last..end).filter_map(|place| self.get(place)) {
            // Relaxed: who gives words back has seen to it that nobody looks for anything in them.
            word.store(0, Ordering::Relaxed);
        }
        match first..last {
            pages if pages.is_empty() => Ok(()),
            pages => self.0.map.discard(pages.start * WORD_BYTES, pages.len() * WORD_BYTES),
        }
    }
}
