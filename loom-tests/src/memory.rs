//! The judge: one cell for the bytes of each page. Loom lets an execution fail as soon as two
//! accesses to a cell, one of them a write, are not ordered by what the code under test does.
//!
// UNSAFETY: the bytes are plain memory on purpose, since atomics would hide the races that the
// models look for. Loom checks each access before it is made.
#![expect(unsafe_code, reason = "plain bytes that several threads reach")]

use gmem::addr::Pgoff;
use gmem::range::PgoffRange;
use loom::cell::UnsafeCell;

/// The bytes of an object, one number for each page.
#[derive(Debug)]
pub struct Memory(Box<[UnsafeCell<u64>]>);

// SAFETY: all access is through `with` and `with_mut`, which panic instead of letting two accesses
// race; and loom's threads take turns on one thread of the system.
unsafe impl Sync for Memory {}

impl Memory {
    /// So many pages, all holding `value`.
    pub fn new(nr_pages: u64, value: u64) -> Self {
        Self((0..nr_pages).map(|_| UnsafeCell::new(value)).collect())
    }

    /// What the page holds.
    ///
    /// # Panics
    /// If a write is not ordered with this read.
    pub fn read(&self, page: Pgoff) -> u64 {
        // SAFETY: loom has checked that no write is concurrent with this read.
        self.cell(page).with(|bytes| unsafe { *bytes })
    }

    /// What the pages hold, if all hold the same.
    ///
    /// # Panics
    /// As [`Memory::read`], and if they do not.
    pub fn read_all(&self, pages: PgoffRange) -> u64 {
        let first = self.read(pages.start());
        for page in pages.iter() {
            assert_eq!(self.read(page), first, "{page:?} is not like the pages before it");
        }
        first
    }

    /// Replaces what the page holds.
    ///
    /// # Panics
    /// If another access is not ordered with this write.
    pub fn write(&self, page: Pgoff, value: u64) {
        // SAFETY: loom has checked that no other access is concurrent with this write.
        self.cell(page).with_mut(|bytes| unsafe { *bytes = value });
    }

    /// Replaces what the pages hold.
    ///
    /// # Panics
    /// As [`Memory::write`].
    pub fn write_all(&self, pages: PgoffRange, value: u64) {
        pages.iter().for_each(|page| self.write(page, value));
    }

    fn cell(&self, page: Pgoff) -> &UnsafeCell<u64> {
        &self.0[page.get() as usize]
    }
}
