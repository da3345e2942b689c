//! What the kernel's page tables really hold, from /proc/self/pagemap.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::addr::Hva;
use crate::geometry::PAGE_BYTES;

/// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst); they need no privilege.
const PRESENT: u64 = 1 << 63;
/// Of shared memory, only for as long as the kernel moves the page, or if its memory has failed: what is
/// swapped out has no entry. Whoever touches it waits, and does not fault.
const SWAPPED: u64 = 1 << 62;
const ENTRY: usize = size_of::<u64>();

/// Whether each of `nr_pages` pages of shared memory from `start` on has a page-table entry.
pub(crate) fn present(start: Hva, nr_pages: usize) -> io::Result<Vec<bool>> {
    let mut entries = vec![0; nr_pages * ENTRY];
    let at = start.get() / PAGE_BYTES * ENTRY;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, at as u64)?;
    Ok(entries
        .chunks_exact(ENTRY)
        .map(|entry| {
            let mut bytes = [0; ENTRY];
            bytes.copy_from_slice(entry);
            u64::from_ne_bytes(bytes) & (PRESENT | SWAPPED) != 0
        })
        .collect())
}
