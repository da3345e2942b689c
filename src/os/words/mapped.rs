//! Words in a mapping of their own, or a few of the allocator.

// UNSAFETY: atomics in an anonymous mapping or in zeroed memory of the allocator, which this file owns.
// Indices are checked right here.
#![expect(unsafe_code, reason = "words live in memory that is handed out by place")]

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::{self, NonNull};
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
    base: NonNull<AtomicU64>,
    len: usize,
    owner: Owner,
}

/// Whose memory the words lie in.
#[derive(Debug)]
enum Owner {
    Mapping(Mapping),
    Allocator,
}

// SAFETY: all that is ever done to the words through the pointer is atomic, or happens when they are dropped.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn boxed(words: Box<[AtomicU64]>) -> Self {
        let len = words.len();
        Self { base: NonNull::from(Box::leak(words)).cast(), len, owner: Owner::Allocator }
    }

    fn mapped(map: Mapping, len: usize) -> Self {
        Self { base: map.base().cast(), len, owner: Owner::Mapping(map) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Owner::Allocator = self.owner {
            let words = ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.len);
            // SAFETY: `boxed` has taken exactly this out of a box, and nobody borrows from it any more.
            drop(unsafe { Box::from_raw(words) });
        }
    }
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
        Ok(Self(Memory::mapped(map, len)))
    }

    /// A few words, all zero, which take memory at once: the allocator has them without a system call and the
    /// fault of the first look.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted).
    pub(crate) fn few(len: usize) -> Result<Self, Error> {
        zeroed(len).map(|words| Self(Memory::boxed(words))).ok_or_else(exhausted)
    }

    /// The word at this place.
    #[inline]
    pub(crate) fn get(&self, place: usize) -> Option<&AtomicU64> {
        if place >= self.0.len {
            return None;
        }
        let word = self.0.base.as_ptr().wrapping_add(place);
        // SAFETY: 1. aligned: a mapping begins at a page, and the allocator was asked for such words. 2. valid for
        // reads and writes as long as `self` is borrowed: the mapping is anonymous, writable, ours until it
        // is dropped, and so is what the allocator gave; `place` has been checked. 3. nobody makes an access
        // there that is not atomic, and the kernel's zeroing replaces whole pages.
        Some(unsafe { &*word })
    }

    /// Makes the words zero again; whole pages of a mapping go back to the host. What runs at the same
    /// time finds each as it was, or zero.
    ///
    /// # Errors
    /// [`ErrorKind::Os`](crate::error::ErrorKind::Os). Some may be zero then.
    pub(crate) fn give_back(&self, places: Range<usize>) -> Result<(), Error> {
        let end = places.end.min(self.0.len);
        let pages = match &self.0.owner {
            Owner::Mapping(_) => {
                let first = places.start.next_multiple_of(WORDS_PER_PAGE).min(end);
                first..(end - end % WORDS_PER_PAGE).max(first)
            }
            Owner::Allocator => end..end,
        };
        let beside = (places.start..pages.start).chain(pages.end..end);
        for word in beside.filter_map(|place| self.get(place)) {
            // Relaxed: who gives words back has seen to it that nobody looks for anything in them.
            word.store(0, Ordering::Relaxed);
        }
        match &self.0.owner {
            Owner::Mapping(map) if !pages.is_empty() => {
                map.discard(pages.start * WORD_BYTES, pages.len() * WORD_BYTES)
            }
            Owner::Mapping(_) | Owner::Allocator => Ok(()),
        }
    }
}
