//! What the kernel's page tables really hold, from /proc/self/pagemap.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::addr::Hva;
use crate::geometry::PAGE_BYTES;

/// Bit 63 of an entry (Documentation/admin-guide/mm/pagemap.rst); needs no privilege.
const PRESENT: u64 = 1 << 63;
const ENTRY: usize = size_of::<u64>();

/// Whether each of `nr_pages` pages from `start` on has a present page-table entry.
pub(crate) fn present(start: Hva, nr_pages: usize) -> io::Result<Vec<bool>> {
    let mut entries = vec![0; nr_pages * ENTRY];
    let at = start.get() / PAGE_BYTES * ENTRY;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, at as u64)?;
    Ok(entries
        .chunks_exact(ENTRY)
        .map(|entry| {
            let mut bytes = [0; ENTRY];
            bytes.copy_from_slice(entry);
            u64::from_ne_bytes(bytes) & PRESENT != 0
        })
        .collect())
}
