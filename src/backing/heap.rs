//! Memory from the process's allocator.

// UNSAFETY: one allocation, freed with the layout it was made with.
#![expect(unsafe_code, reason = "the allocator deals in raw pointers")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::index;
use crate::os::memory::require_available;
use crate::sync::MODELLED;

/// Zeroed memory.
#[derive(Debug)]
pub(super) struct HeapMemory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is only reached by the raw copies of copies.rs, which are safe to run from any
// thread.
unsafe impl Send for HeapMemory {}
// SAFETY: as above.
unsafe impl Sync for HeapMemory {}

impl HeapMemory {
    /// `len` bytes, at least one, at a multiple of `align`, a power of two.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub(super) fn new(len: ByteSize, align: ByteSize) -> Result<Self, Error> {
        let exhausted = || Error::new(Op::CreatePool, ErrorKind::Exhausted);
        // An allocation of this alignment is zeroed by hand, and so committed at once. Models make thousands
        // of a few frames.
        if cfg!(not(miri)) && !MODELLED {
            require_available(len)?;
        }
        let layout = Layout::from_size_align(index(len.get()), index(align.get()))
            .map_err(|_| exhausted())?;
        if layout.size() == 0 {
            return Err(Error::new(Op::CreatePool, ErrorKind::InvalidSize));
        }
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        Ok(Self { base: NonNull::new(base).ok_or_else(exhausted)?, layout })
    }

    #[inline]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for HeapMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and nobody keeps a pointer beyond the arena.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
