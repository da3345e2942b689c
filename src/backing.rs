//! The bytes of a pool: one arena, addressed by [`Pa`], copied in and out and never borrowed.
//!
//! Guests, devices and other threads change these bytes at any time, so nobody gets a reference.
//! Every copy is made of relaxed atomic accesses: a race between two writers of shared memory is the
//! guest's affair, and tears, but it is not undefined behaviour here. What orders a copy with a
//! conversion is the subpage's word, not the copy.

// UNSAFETY: raw pointers into the arena. Offsets are checked against its size right here.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
// Not from the facade: guest bytes are no part of any model, and loom's atomics cannot live there.
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::addr::{ByteSize, Hva, Pa};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, MAX_PAGES, PAGE_BYTES, index};
use crate::os::mapping::Mapping;
use crate::os::memfd::{PageKind, create_arena};
use crate::range::PfnRange;

const WORD: usize = size_of::<u64>();

/// The memory of one pool, committed for as long as it lives.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Memory,
    nr_pages: u64,
}

#[derive(Debug)]
enum Memory {
    Heap(HeapMemory),
    File { map: Mapping, fd: OwnedFd },
}

impl Arena {
    /// An arena that needs no operating system.
    pub(crate) fn heap(nr_pages: u64) -> Result<Arc<Self>, Error> {
        let memory = Memory::Heap(HeapMemory::new(len_bytes(nr_pages)?)?);
        Ok(Arc::new(Self { memory, nr_pages }))
    }

    /// An arena on a memory file of the given pages.
    pub(crate) fn file(kind: PageKind, nr_pages: u64) -> Result<Arc<Self>, Error> {
        len_bytes(nr_pages)?;
        let size = ByteSize::from_pages(nr_pages);
        let fd = create_arena(kind, size)?;
        let map = Mapping::of_file(Op::CreatePool, fd.as_fd(), size)?;
        Ok(Arc::new(Self { memory: Memory::File { map, fd }, nr_pages }))
    }

    /// An arena on a memory file for which the kernel was asked to find huge pages.
    pub(crate) fn huge_file(nr_pages: u64) -> Result<Arc<Self>, Error> {
        crate::os::thp::require_shmem()?;
        len_bytes(nr_pages)?;
        let size = ByteSize::from_pages(nr_pages);
        let fd = crate::os::memfd::create_sparse_arena(size)?;
        let map = Mapping::of_file(Op::CreatePool, fd.as_fd(), size)?;
        // Before the pages exist, and through the mapping: fallocate would not see the advice.
        map.want_huge()?;
        map.populate()?;
        Ok(Arc::new(Self { memory: Memory::File { map, fd }, nr_pages }))
    }

    pub(crate) fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// The file behind the arena, where there is one.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.memory {
            Memory::Heap(_) => None,
            Memory::File { fd, .. } => Some(fd.as_fd()),
        }
    }

    /// Where the arena's own alias is mapped.
    pub(crate) fn hva(&self) -> Hva {
        Hva::new(self.base().addr().get())
    }

    fn base(&self) -> NonNull<u8> {
        match &self.memory {
            Memory::Heap(heap) => heap.base,
            Memory::File { map, .. } => map.base(),
        }
    }

    /// The byte at `at`, after checking that `len` bytes from there on are the arena's.
    fn at(&self, op: Op, at: Pa, len: usize) -> Result<*mut u8, Error> {
        let size = ByteSize::from_pages(self.nr_pages).get();
        match at.get().checked_add(len as u64) {
            // Inside the arena, whose size fits in usize.
            Some(end) if end <= size => Ok(self.base().as_ptr().wrapping_add(index(at.get()))),
            _ => Err(Error::new(op, ErrorKind::OutOfRange)),
        }
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Error> {
        let from = self.at(Op::Read, at, buf.len())?;
        let (head, words) = split(from, buf.len());
        let (first, rest) = buf.split_at_mut(head);
        for (i, byte) in first.iter_mut().enumerate() {
            *byte = load_byte(from, i);
        }
        let (middle, last) = rest.split_at_mut(words * WORD);
        for (i, chunk) in middle.chunks_exact_mut(WORD).enumerate() {
            chunk.copy_from_slice(&load_word(from, head + i * WORD).to_ne_bytes());
        }
        for (i, byte) in last.iter_mut().enumerate() {
            *byte = load_byte(from, head + words * WORD + i);
        }
        Ok(())
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Error> {
        let to = self.at(Op::Write, at, buf.len())?;
        let (head, words) = split(to, buf.len());
        let (first, rest) = buf.split_at(head);
        for (i, byte) in first.iter().enumerate() {
            store_byte(to, i, *byte);
        }
        let (middle, last) = rest.split_at(words * WORD);
        for (i, chunk) in middle.chunks_exact(WORD).enumerate() {
            let mut word = [0; WORD];
            word.copy_from_slice(chunk);
            store_word(to, head + i * WORD, u64::from_ne_bytes(word));
        }
        for (i, byte) in last.iter().enumerate() {
            store_byte(to, head + words * WORD + i, *byte);
        }
        Ok(())
    }

    /// Fills whole frames with zeroes.
    pub(crate) fn zero(&self, frames: PfnRange) -> Result<(), Error> {
        let (to, words) = self.words_of(Op::Write, frames)?;
        for i in words {
            store_word(to, i * WORD, 0);
        }
        Ok(())
    }

    /// Whether whole frames are all zeroes.
    pub(crate) fn is_zero(&self, frames: PfnRange) -> Result<bool, Error> {
        let (from, mut words) = self.words_of(Op::Read, frames)?;
        Ok(words.all(|i| load_word(from, i * WORD) == 0))
    }

    fn words_of(&self, op: Op, frames: PfnRange) -> Result<(*mut u8, Range<usize>), Error> {
        if frames.end().get() > self.nr_pages {
            return Err(Error::new(op, ErrorKind::OutOfRange));
        }
        let len = index(frames.nr_pages()) * PAGE_BYTES;
        Ok((self.at(op, frames.start().pa(), len)?, 0..len / WORD))
    }

    /// An atomic load; sequentially consistent, because a guest may rely on it with its own.
    pub(crate) fn load_u64(&self, at: Pa) -> Result<u64, Error> {
        // SeqCst: pairs with store_u64 and compare_exchange_u64 of any other thread or guest.
        Ok(self.atomic(at)?.load(Ordering::SeqCst))
    }

    /// An atomic store.
    pub(crate) fn store_u64(&self, at: Pa, value: u64) -> Result<(), Error> {
        // SeqCst: pairs with load_u64 and compare_exchange_u64 of any other thread or guest.
        self.atomic(at)?.store(value, Ordering::SeqCst);
        Ok(())
    }

    /// An atomic compare-and-exchange; returns what was found.
    pub(crate) fn compare_exchange_u64(
        &self,
        at: Pa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, Error> {
        let cell = self.atomic(at)?;
        // SeqCst: pairs with load_u64 and store_u64 of any other thread or guest.
        Ok(cell.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst))
    }

    fn atomic(&self, at: Pa) -> Result<&AtomicU64, Error> {
        let target = self.at(Op::Atomic, at, WORD)?.cast::<u64>();
        if !target.is_aligned() {
            return Err(Error::new(Op::Atomic, ErrorKind::Unaligned));
        }
        // SAFETY: 1. `at` checked the bounds, the line above the alignment. 2. the memory lives as
        // long as `self`. 3. it is only ever accessed atomically or through raw copies.
        Ok(unsafe { AtomicU64::from_ptr(target) })
    }
}

fn len_bytes(nr_pages: u64) -> Result<usize, Error> {
    if nr_pages == 0 || nr_pages > MAX_PAGES {
        return Err(Error::new(Op::CreatePool, ErrorKind::InvalidSize));
    }
    Ok(index(nr_pages) * PAGE_BYTES)
}

/// Bytes up to the first aligned word, and whole words from there on.
fn split(start: *mut u8, len: usize) -> (usize, usize) {
    let head = start.align_offset(WORD).min(len);
    (head, (len - head) / WORD)
}

fn load_byte(base: *mut u8, at: usize) -> u8 {
    // SAFETY: every caller has checked `base..` against the arena for more than `at` bytes.
    let cell = unsafe { AtomicU8::from_ptr(base.wrapping_add(at)) };
    // Relaxed: bytes race as the guest likes; words order what must be ordered.
    cell.load(Ordering::Relaxed)
}

fn store_byte(base: *mut u8, at: usize, value: u8) {
    // SAFETY: as in `load_byte`.
    let cell = unsafe { AtomicU8::from_ptr(base.wrapping_add(at)) };
    // Relaxed: as in load_byte.
    cell.store(value, Ordering::Relaxed);
}

fn load_word(base: *mut u8, at: usize) -> u64 {
    // SAFETY: as in `load_byte`, for `at + 8` bytes; `split` and page alignment make it aligned.
    let cell = unsafe { AtomicU64::from_ptr(base.wrapping_add(at).cast()) };
    // Relaxed: as in load_byte.
    cell.load(Ordering::Relaxed)
}

fn store_word(base: *mut u8, at: usize, value: u64) {
    // SAFETY: as in `load_word`.
    let cell = unsafe { AtomicU64::from_ptr(base.wrapping_add(at).cast()) };
    // Relaxed: as in load_byte.
    cell.store(value, Ordering::Relaxed);
}

/// Page-aligned zeroed memory from the allocator.
#[derive(Debug)]
struct HeapMemory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is only reached by the atomic accesses above.
unsafe impl Send for HeapMemory {}
// SAFETY: as above.
unsafe impl Sync for HeapMemory {}

impl HeapMemory {
    fn new(len: usize) -> Result<Self, Error> {
        let exhausted = || Error::new(Op::CreatePool, ErrorKind::Exhausted);
        // As on a memory file: a huge folio starts at a multiple of its size.
        let huge = index(FolioSize::Huge2M.bytes().get());
        let align = if len % huge == 0 { huge } else { PAGE_BYTES };
        let layout = Layout::from_size_align(len, align).map_err(|_| exhausted())?;
        // SAFETY: the layout is not empty: a pool has at least a page.
        let base = unsafe { alloc_zeroed(layout) };
        Ok(Self { base: NonNull::new(base).ok_or_else(exhausted)?, layout })
    }
}

impl Drop for HeapMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and nobody keeps a pointer beyond the arena.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;

    #[test]
    fn copies_of_any_alignment_arrive() {
        let arena = Arena::heap(2).unwrap();
        let data: Vec<u8> = (0..100).collect();
        for start in 0..20 {
            for len in [0, 1, 7, 8, 9, 31, 100] {
                arena.zero(PfnRange::new(Pfn::new(0), 2).unwrap()).unwrap();
                arena.write(Pa::new(start), &data[..len]).unwrap();
                let mut out = vec![0xff; len + 1];
                arena.read(Pa::new(start), &mut out).unwrap();
                assert_eq!(out[..len], data[..len], "start {start} len {len}");
                assert_eq!(out[len], 0, "nothing beyond was written");
            }
        }
    }

    #[test]
    fn nothing_beyond_the_arena_is_reached() {
        let arena = Arena::heap(1).unwrap();
        let mut byte = [0];
        for at in [4096, u64::MAX] {
            let error = arena.read(Pa::new(at), &mut byte).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
            assert!(arena.write(Pa::new(at), &byte).is_err());
            assert!(arena.load_u64(Pa::new(at & !7)).is_err());
        }
        assert!(arena.zero(PfnRange::new(Pfn::new(0), 2).unwrap()).is_err());
        assert_eq!(Arena::heap(0).unwrap_err().kind(), ErrorKind::InvalidSize);
        assert_eq!(Arena::heap(u64::MAX).unwrap_err().kind(), ErrorKind::InvalidSize);
        assert_eq!(Arena::heap(MAX_PAGES).unwrap_err().kind(), ErrorKind::Exhausted);
    }

    #[test]
    fn atomics_must_be_aligned() {
        let arena = Arena::heap(1).unwrap();
        assert_eq!(arena.load_u64(Pa::new(4)).unwrap_err().kind(), ErrorKind::Unaligned);
        arena.store_u64(Pa::new(8), 7).unwrap();
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Ok(7));
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Err(9));
    }
}
