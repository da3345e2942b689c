//! The peers that are the kernel's, or the bare machine's: memory files, mapped.

// UNSAFETY: mappings that nobody else knows of, and bytes inside of them.
#![expect(unsafe_code, reason = "what the library is measured against is a raw mapping")]

use std::ffi::c_void;
use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What a file's pages are.
#[derive(Clone, Copy)]
pub(crate) enum Pages {
    Plain,
    Huge2M,
}

/// A new memory file, mapped. It has no page before one is touched.
pub(crate) struct Mapped {
    base: *mut c_void,
    len: usize,
}

impl Mapped {
    pub(crate) fn new(pages: Pages, len: usize) -> io::Result<Self> {
        let flags = match pages {
            Pages::Plain => MemfdFlags::CLOEXEC,
            Pages::Huge2M => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let file = memfd_create("peer", flags)?;
        ftruncate(&file, len as u64)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) }?;
        Ok(Self { base, len })
    }

    /// All of it there, and written to.
    pub(crate) fn resident(pages: Pages, len: usize) -> io::Result<Self> {
        let mapped = Self::new(pages, len)?;
        mapped.fill(1);
        Ok(mapped)
    }

    /// Stores one byte.
    pub(crate) fn touch(&self, at: usize) {
        assert!(at < self.len);
        let byte = self.base.cast::<u8>().wrapping_add(at);
        // SAFETY: inside of the mapping, which is this thread's alone.
        unsafe { byte.write_volatile(1) };
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: all of the mapping, which is this thread's alone.
        unsafe { self.base.cast::<u8>().write_bytes(byte, self.len) };
    }

    pub(crate) fn copy_from(&self, other: &Self) {
        assert_eq!(self.len, other.len);
        let (from, to) = (other.base.cast::<u8>(), self.base.cast::<u8>());
        // SAFETY: all of two mappings, which are this thread's alone; one has one place.
        unsafe { to.copy_from_nonoverlapping(from, self.len) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is nobody else's, and nothing points into it any more.
        let outcome = unsafe { munmap(self.base, self.len) };
        assert!(outcome.is_ok() || std::thread::panicking(), "a mapping is unmapped");
    }
}
