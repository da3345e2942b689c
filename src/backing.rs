//! The bytes of a pool: one arena, addressed by [`Pa`], copied in and out and never borrowed.
//!
//! Guests, devices and other threads change these bytes at any time, so nobody gets a reference.
//! Every copy is made of relaxed atomic accesses to aligned words of eight bytes, and of no other size:
//! a race between two writers of shared memory is the guest's affair, and tears, but it is not
//! undefined behaviour here (`std::sync::atomic`: races of different sizes would be). What orders a
//! copy with a conversion is the subpage's word, not the copy.

// UNSAFETY: raw pointers into the arena. Offsets are checked against its size right here.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
// Not from the facade: guest bytes are no part of any model, and loom's atomics cannot live there.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{ByteSize, Hva, Pa};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, MAX_PAGES, PAGE_BYTES, index};
use crate::os::mapping::Mapping;
use crate::os::memfd::{PageKind, create_arena};
use crate::os::memory::require_available;
use crate::range::PfnRange;

mod holes;

pub use holes::WhyKept;

const WORD: usize = size_of::<u64>();

/// The memory of one pool, committed for as long as it lives but for what is
/// [released](Self::release).
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Memory,
    nr_pages: u64,
    sparse: holes::Sparse,
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
        let sparse = holes::Sparse::new(Some(WhyKept::Heap));
        Ok(Arc::new(Self { memory, nr_pages, sparse }))
    }

    /// An arena on a memory file of the given pages.
    pub(crate) fn file(kind: PageKind, nr_pages: u64) -> Result<Arc<Self>, Error> {
        len_bytes(nr_pages)?;
        let size = ByteSize::from_pages(nr_pages);
        let fd = create_arena(kind, size)?;
        let map = Mapping::of_file(Op::CreatePool, fd.as_fd(), size)?;
        map.forbid_collapse(0, map.len())?;
        let sparse = holes::Sparse::new(match kind {
            PageKind::Plain => None,
            PageKind::Hugetlb2M => Some(WhyKept::Hugetlb),
        });
        Ok(Arc::new(Self { memory: Memory::File { map, fd }, nr_pages, sparse }))
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
        map.forbid_collapse(0, map.len())?;
        let sparse = holes::Sparse::new(Some(WhyKept::TransparentHuge));
        Ok(Arc::new(Self { memory: Memory::File { map, fd }, nr_pages, sparse }))
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

    #[inline]
    fn base(&self) -> NonNull<u8> {
        match &self.memory {
            Memory::Heap(heap) => heap.base,
            Memory::File { map, .. } => map.base(),
        }
    }

    /// The aligned word that holds the byte at `at`, and which of its bytes that is, after checking
    /// that `len` bytes from there on are the arena's. So are the words that hold them: the arena is
    /// made of whole pages.
    #[inline]
    fn at(&self, op: Op, at: Pa, len: usize) -> Result<(*mut u8, usize), Error> {
        let size = ByteSize::from_pages(self.nr_pages).get();
        match at.get().checked_add(len as u64) {
            Some(end) if end <= size => {
                let skip = index(at.get()) % WORD;
                Ok((self.base().as_ptr().wrapping_add(index(at.get()) - skip), skip))
            }
            _ => Err(Error::new(op, ErrorKind::OutOfRange)),
        }
    }

    /// Copies bytes out.
    #[inline]
    pub(crate) fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Error> {
        let (from, skip) = self.at(Op::Read, at, buf.len())?;
        if let (0, Ok(whole)) = (skip, <&mut [u8; WORD]>::try_from(&mut *buf)) {
            *whole = load_word(from, 0).to_ne_bytes();
            return Ok(());
        }
        read_parts(from, skip, buf);
        Ok(())
    }

    /// Copies bytes in.
    #[inline]
    pub(crate) fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Error> {
        let (to, skip) = self.at(Op::Write, at, buf.len())?;
        if let (0, Ok(whole)) = (skip, <[u8; WORD]>::try_from(buf)) {
            store_word(to, 0, u64::from_ne_bytes(whole));
            return Ok(());
        }
        write_parts(to, skip, buf);
        Ok(())
    }

    /// Fills whole frames with zeroes.
    pub(crate) fn zero(&self, frames: PfnRange) -> Result<(), Error> {
        let (to, words) = self.words_of(Op::Write, frames)?;
        for word in words {
            store_word(to, word, 0);
        }
        Ok(())
    }

    /// Whether whole frames are all zeroes.
    pub(crate) fn is_zero(&self, frames: PfnRange) -> Result<bool, Error> {
        let (from, mut words) = self.words_of(Op::Read, frames)?;
        Ok(words.all(|word| load_word(from, word) == 0))
    }

    fn words_of(&self, op: Op, frames: PfnRange) -> Result<(*mut u8, Range<usize>), Error> {
        if frames.end().get() > self.nr_pages {
            return Err(Error::new(op, ErrorKind::OutOfRange));
        }
        let len = index(frames.nr_pages()) * PAGE_BYTES;
        let (start, _) = self.at(op, frames.start().pa(), len)?;
        Ok((start, 0..len / WORD))
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
        match self.at(Op::Atomic, at, WORD)? {
            (target, 0) => Ok(word_at(target, 0)),
            _ => Err(Error::new(Op::Atomic, ErrorKind::Unaligned)),
        }
    }
}

fn len_bytes(nr_pages: u64) -> Result<usize, Error> {
    if nr_pages == 0 || nr_pages > MAX_PAGES {
        return Err(Error::new(Op::CreatePool, ErrorKind::InvalidSize));
    }
    Ok(index(nr_pages) * PAGE_BYTES)
}

/// How a copy of `len` bytes that begins `skip` bytes into a word falls on words: how many bytes are
/// in the first one if that is partial, which words are whole, and which one has the rest.
fn cut(skip: usize, len: usize) -> (usize, Range<usize>, usize) {
    let head = if skip == 0 { 0 } else { (WORD - skip).min(len) };
    let first_whole = usize::from(skip != 0);
    let behind = first_whole + (len - head) / WORD;
    (head, first_whole..behind, behind)
}

fn read_parts(from: *mut u8, skip: usize, buf: &mut [u8]) {
    let (head, whole, tail) = cut(skip, buf.len());
    let (first, rest) = buf.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(whole.len() * WORD);
    if !first.is_empty() {
        first.copy_from_slice(&load_word(from, 0).to_ne_bytes()[skip..skip + head]);
    }
    for (chunk, word) in middle.chunks_exact_mut(WORD).zip(whole) {
        chunk.copy_from_slice(&load_word(from, word).to_ne_bytes());
    }
    if !last.is_empty() {
        last.copy_from_slice(&load_word(from, tail).to_ne_bytes()[..last.len()]);
    }
}

fn write_parts(to: *mut u8, skip: usize, buf: &[u8]) {
    let (head, whole, tail) = cut(skip, buf.len());
    let (first, rest) = buf.split_at(head);
    let (middle, last) = rest.split_at(whole.len() * WORD);
    if !first.is_empty() {
        store_part(to, 0, skip, first);
    }
    for (chunk, word) in middle.chunks_exact(WORD).zip(whole) {
        let mut bytes = [0; WORD];
        bytes.copy_from_slice(chunk);
        store_word(to, word, u64::from_ne_bytes(bytes));
    }
    if !last.is_empty() {
        store_part(to, tail, 0, last);
    }
}

/// A word of the arena, counted from `base`.
#[inline]
fn word_at<'a>(base: *mut u8, word: usize) -> &'a AtomicU64 {
    // SAFETY: 1. every caller has `base` from `Arena::at`, which aligned it, and `word` from the
    // length that was checked there. 2. the arena outlives the borrow of `self` under which callers
    // use the result. 3. the memory is only accessed in atomic words, or outside of Rust.
    unsafe { AtomicU64::from_ptr(base.cast::<u64>().wrapping_add(word)) }
}

#[inline]
fn load_word(base: *mut u8, word: usize) -> u64 {
    // Relaxed: bytes race as the guest likes; words of state order what must be ordered.
    word_at(base, word).load(Ordering::Relaxed)
}

#[inline]
fn store_word(base: *mut u8, word: usize, value: u64) {
    // Relaxed: as in load_word.
    word_at(base, word).store(value, Ordering::Relaxed);
}

/// Replaces some bytes of a word and leaves the others to whoever writes them meanwhile.
fn store_part(base: *mut u8, word: usize, skip: usize, part: &[u8]) {
    let replace = |old: u64| {
        let mut bytes = old.to_ne_bytes();
        bytes[skip..skip + part.len()].copy_from_slice(part);
        Some(u64::from_ne_bytes(bytes))
    };
    // Relaxed: as in load_word. `replace` never declines, so there is no failure to look at.
    let _ = word_at(base, word).fetch_update(Ordering::Relaxed, Ordering::Relaxed, replace);
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
        // An allocation of this alignment is zeroed by hand, and so committed at once.
        if cfg!(not(miri)) {
            require_available(ByteSize::from_bytes(len as u64))?;
        }
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
    fn copies_of_any_alignment_arrive_and_touch_nothing_else() {
        let arena = Arena::heap(1).unwrap();
        let data: Vec<u8> = (1..=40).collect();
        for start in 0..17 {
            for len in 0..40 {
                arena.write(Pa::new(0), &[0xee; 64]).unwrap();
                arena.write(Pa::new(start as u64), &data[..len]).unwrap();
                let mut all = [0; 64];
                arena.read(Pa::new(0), &mut all).unwrap();
                let mut wanted = [0xee; 64];
                wanted[start..start + len].copy_from_slice(&data[..len]);
                assert_eq!(all, wanted, "start {start} len {len}");
                let mut part = vec![0; len];
                arena.read(Pa::new(start as u64), &mut part).unwrap();
                assert_eq!(part, data[..len], "start {start} len {len}");
            }
        }
        let end = Pa::new(4096 - 3);
        arena.write(end, b"end").unwrap();
        let mut part = [0; 3];
        arena.read(end, &mut part).unwrap();
        assert_eq!(&part, b"end");
    }

    #[test]
    fn neighbours_in_a_word_do_not_lose_each_others_bytes() {
        let arena = Arena::heap(1).unwrap();
        let rounds = if cfg!(miri) { 20 } else { 5_000 };
        std::thread::scope(|scope| {
            for byte in 0..2 {
                let arena = &arena;
                scope.spawn(move || {
                    for round in 1..=rounds {
                        let value = (round % 251) as u8;
                        arena.write(Pa::new(byte), &[value]).unwrap();
                        let mut seen = [0];
                        arena.read(Pa::new(byte), &mut seen).unwrap();
                        assert_eq!(seen, [value]);
                    }
                });
            }
        });
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
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri stops where an allocator fails")]
    fn more_than_there_can_be_is_refused() {
        let error = Arena::heap(MAX_PAGES).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(error.to_string().contains("available"), "{error}: not even asked");
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
