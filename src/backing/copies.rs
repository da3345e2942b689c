//! Bytes in and out of an arena, never borrowed.
//!
//! Guests, devices and other threads change these bytes at any time, so nobody gets a reference.
//! Every copy is made of relaxed atomic accesses to aligned words of eight bytes, and of no other size:
//! a race between two writers of shared memory is the guest's affair, and tears, but it is not
//! undefined behaviour here (`std::sync::atomic`: races of different sizes would be). What orders a
//! copy with a conversion is the subpage's word, not the copy. Frames that belong to nobody need none
//! of this: they are scrubbed and moved as fast as the machine can.

// UNSAFETY: raw pointers into the arena. Offsets are checked against its size right here.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use std::ops::Range;
// Not from the facade: guest bytes are no part of any model, and loom's atomics cannot live there.
use std::sync::atomic::{AtomicU64, Ordering};

use super::Arena;
use crate::addr::{ByteSize, Pa, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{PAGE_BYTES, index};
use crate::range::PfnRange;

const WORD: usize = size_of::<u64>();

impl Arena {
    /// The aligned word that holds the byte at `at`, and which of its bytes that is, after checking
    /// that `len` bytes from there on are the arena's. So are the words that hold them: the arena is
    /// made of whole pages. That they lie in no gap between two parts is not checked: no frame of a gap
    /// is ever given to anybody.
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

    /// Fills whole frames with zeroes, as fast as the machine can. They are the caller's alone: no
    /// access section, view, guest or subscriber reaches them, and whoever did before has left them in
    /// a way that orders what it did with what the caller does. Others need [`Arena::zero`].
    pub(crate) fn scrub(&self, frames: PfnRange) -> Result<(), Error> {
        let (to, words) = self.words_of(Op::Write, frames)?;
        // SAFETY: 1. valid for writes: `words_of` has checked that all of the frames are backed, and
        // the arena is borrowed. 2. aligned for bytes. 3. no race: the frames are the caller's alone.
        unsafe { to.write_bytes(0, words.len() * WORD) };
        Ok(())
    }

    /// Copies whole frames to others, as fast as the machine can. Both are the caller's alone, as for
    /// [`Arena::scrub`].
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Unsupported`] if they overlap.
    pub(crate) fn copy_frames(&self, from: PfnRange, to: Pfn) -> Result<(), Error> {
        let target = PfnRange::new(to, from.nr_pages()).map_err(|error| error.of(Op::Write))?;
        if from.intersection(&target).is_some() {
            return Err(Error::new(Op::Write, ErrorKind::Unsupported)
                .because("frames are copied to others, not onto themselves"));
        }
        let (source, words) = self.words_of(Op::Read, from)?;
        let (target, _) = self.words_of(Op::Write, target)?;
        // SAFETY: 1. valid for reads and writes: `words_of` has checked that all of both are backed,
        // and the arena is borrowed. 2. they do not overlap: checked above, and a frame has one place.
        // 3. aligned for bytes. 4. no race: the frames are the caller's alone.
        unsafe { target.copy_from_nonoverlapping(source, words.len() * WORD) };
        Ok(())
    }

    fn words_of(&self, op: Op, frames: PfnRange) -> Result<(*mut u8, Range<usize>), Error> {
        if !self.backs(frames) {
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
    if middle.len() >= MANY {
        let source = from.wrapping_add(whole.start * WORD);
        // SAFETY: the target is a slice of that many bytes; of the source see `copy_words`.
        unsafe { copy_words(source, middle.as_mut_ptr(), whole.len()) };
    } else {
        for (chunk, word) in middle.chunks_exact_mut(WORD).zip(whole) {
            chunk.copy_from_slice(&load_word(from, word).to_ne_bytes());
        }
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
    if middle.len() >= MANY {
        let target = to.wrapping_add(whole.start * WORD);
        // SAFETY: the source is a slice of that many bytes; of the target see `copy_words`.
        unsafe { copy_words(middle.as_ptr(), target, whole.len()) };
    } else {
        for (chunk, word) in middle.chunks_exact(WORD).zip(whole) {
            let mut bytes = [0; WORD];
            bytes.copy_from_slice(chunk);
            store_word(to, word, u64::from_ne_bytes(bytes));
        }
    }
    if !last.is_empty() {
        store_part(to, tail, 0, last);
    }
}

/// From how many bytes on one instruction copies faster than a loop, which the compiler may not widen.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const MANY: usize = 512;
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
const MANY: usize = usize::MAX;

/// Copies words between the arena and a buffer, in any order and each as by a relaxed atomic access: the
/// processor is asked to move aligned words of eight bytes, and the compiler knows nothing of how.
///
/// # Safety
/// Both are valid for so many words and do not overlap. What is in the arena is aligned to words.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_words(from: *const u8, to: *mut u8, nr_words: usize) {
    // SAFETY: 1. the caller vouches for the memory. 2. the direction flag is clear on entry to asm, by the
    // rules of the ABI. 3. no flag is changed.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") nr_words => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Never called: `MANY` is out of reach.
///
/// # Safety
/// None is needed.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn copy_words(_: *const u8, _: *mut u8, _: usize) {}

/// A word of the arena, counted from `base`.
#[inline]
fn word_at<'a>(base: *mut u8, word: usize) -> &'a AtomicU64 {
    // SAFETY: 1. every caller has `base` from `Arena::at`, which aligned it, and `word` from the
    // length that was checked there; the frames were given out, so they lie in no gap. 2. the arena outlives the borrow of `self` under which callers
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
    fn atomics_must_be_aligned() {
        let arena = Arena::heap(1).unwrap();
        assert_eq!(arena.load_u64(Pa::new(4)).unwrap_err().kind(), ErrorKind::Unaligned);
        arena.store_u64(Pa::new(8), 7).unwrap();
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Ok(7));
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Err(9));
    }

    #[test]
    fn what_is_nobody_elses_is_scrubbed_and_copied() {
        let arena = Arena::heap(6).unwrap();
        let frames = |start, nr_pages| PfnRange::new(Pfn::new(start), nr_pages).unwrap();
        for page in 0..6 {
            arena.write(Pfn::new(page).pa(), &[0x10 + page as u8; PAGE_BYTES]).unwrap();
        }
        arena.copy_frames(frames(0, 2), Pfn::new(3)).unwrap();
        arena.scrub(frames(1, 1)).unwrap();
        let first = |page| {
            let mut bytes = [0; PAGE_BYTES];
            arena.read(Pfn::new(page).pa(), &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
            bytes[0]
        };
        assert_eq!((0..6).map(first).collect::<Vec<_>>(), [0x10, 0, 0x12, 0x10, 0x11, 0x15]);
        assert!(arena.is_zero(frames(1, 1)).unwrap() && !arena.is_zero(frames(1, 2)).unwrap());

        let kind = |result: Result<(), Error>| result.unwrap_err().kind();
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(1))), ErrorKind::Unsupported);
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(5))), ErrorKind::OutOfRange);
        assert_eq!(kind(arena.copy_frames(frames(5, 2), Pfn::new(0))), ErrorKind::OutOfRange);
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(u64::MAX))), ErrorKind::Overflow);
        assert_eq!(kind(arena.scrub(frames(5, 2))), ErrorKind::OutOfRange);
    }
}
