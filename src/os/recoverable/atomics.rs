//! Bytes of an arena in and out where there is no assembly for it: under Miri, and on other architectures.
//! Nothing recovers here: a fault kills.
//!
//! Every copy is made of relaxed atomic accesses to aligned words of eight bytes, and of no other size:
//! a race between two writers of shared memory is the guest's affair, and tears, but it is not
//! undefined behaviour (`std::sync::atomic`: races of different sizes would be).

// UNSAFETY: raw pointers into the arena, which the callers have checked.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use std::ops::Range;
// Not from the facade: guest bytes are no part of any model, and loom's atomics cannot live there.
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_void, siginfo_t};

use crate::addr::{Access, Hva};
use crate::os::sigbus::FaultCause;

/// Whether a `SIGBUS` in here can be recovered from.
pub(super) const RECOVERS: bool = false;

const WORD: usize = size_of::<u64>();

/// A `SIGBUS` that ended an access: there is none here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) hva: Hva,
    pub(crate) cause: FaultCause,
}

/// Never reached: no `SigbusHandler` exists here. Answers as a fault would.
///
/// # Safety
/// None needed.
pub(crate) unsafe fn touch(at: *mut u8, _access: Access) -> Result<u8, Fault> {
    Err(Fault { hva: Hva::new(at.addr()), cause: FaultCause::NotMapped })
}

/// Copies bytes out of an arena.
///
/// # Safety
/// The words that hold `buf.len()` bytes from `from` on are mapped arena memory.
pub(crate) unsafe fn copy_out(from: *const u8, buf: &mut [u8]) -> Result<(), Fault> {
    let (base, skip) = aligned(from.cast_mut());
    let (head, whole, tail) = cut(skip, buf.len());
    let (first, rest) = buf.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(whole.len() * WORD);
    if !first.is_empty() {
        first.copy_from_slice(&load_word(base, 0).to_ne_bytes()[skip..skip + head]);
    }
    for (chunk, word) in middle.chunks_exact_mut(WORD).zip(whole) {
        chunk.copy_from_slice(&load_word(base, word).to_ne_bytes());
    }
    if !last.is_empty() {
        last.copy_from_slice(&load_word(base, tail).to_ne_bytes()[..last.len()]);
    }
    Ok(())
}

/// Copies bytes into an arena.
///
/// # Safety
/// The words that hold `buf.len()` bytes from `to` on are mapped arena memory.
pub(crate) unsafe fn copy_in(to: *mut u8, buf: &[u8]) -> Result<(), Fault> {
    let (base, skip) = aligned(to);
    let (head, whole, tail) = cut(skip, buf.len());
    let (first, rest) = buf.split_at(head);
    let (middle, last) = rest.split_at(whole.len() * WORD);
    if !first.is_empty() {
        store_part(base, 0, skip, first);
    }
    for (chunk, word) in middle.chunks_exact(WORD).zip(whole) {
        let mut bytes = [0; WORD];
        bytes.copy_from_slice(chunk);
        store_word(base, word, u64::from_ne_bytes(bytes));
    }
    if !last.is_empty() {
        store_part(base, tail, 0, last);
    }
    Ok(())
}

/// Copies whole pages of an arena, which do not overlap.
///
/// # Safety
/// 1. `len` bytes from `from` and from `to` on are mapped arena memory. They begin at multiples of 8, and
///    `len` is one of 64, not 0. 2. Nobody else reaches them.
pub(crate) unsafe fn copy_frames(from: *const u8, to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise; frames do not overlap unless they are the same.
    unsafe { to.copy_from(from, len) };
    Ok(())
}

/// Fills whole pages of an arena with zeroes.
///
/// # Safety
/// The first of [`copy_frames`].
pub(crate) unsafe fn zero(to: *mut u8, len: usize) -> Result<(), Fault> {
    (0..len / WORD).for_each(|word| store_word(to, word, 0));
    Ok(())
}

/// The same for pages that are the caller's alone.
///
/// # Safety
/// As for [`copy_frames`].
pub(crate) unsafe fn scrub(to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe { to.write_bytes(0, len) };
    Ok(())
}

/// Whether whole pages of an arena are all zeroes.
///
/// # Safety
/// The first of [`copy_frames`].
pub(crate) unsafe fn is_zero(from: *const u8, len: usize) -> Result<bool, Fault> {
    Ok((0..len / WORD).all(|word| load_word(from.cast_mut(), word) == 0))
}

/// Loads an aligned word, sequentially consistent.
///
/// # Safety
/// Eight bytes from `at` on, a multiple of 8, are mapped arena memory.
pub(crate) unsafe fn load_ordered(at: *const u8) -> Result<u64, Fault> {
    // SeqCst: pairs with store_ordered and compare_exchange of any other thread or guest.
    Ok(word_at(at.cast_mut(), 0).load(Ordering::SeqCst))
}

/// Stores an aligned word, sequentially consistent.
///
/// # Safety
/// As for [`load_ordered`].
pub(crate) unsafe fn store_ordered(at: *mut u8, value: u64) -> Result<(), Fault> {
    // SeqCst: pairs with load_ordered and compare_exchange of any other thread or guest.
    word_at(at, 0).store(value, Ordering::SeqCst);
    Ok(())
}

/// Compares an aligned word and exchanges it, sequentially consistent; what was found.
///
/// # Safety
/// As for [`load_ordered`].
pub(crate) unsafe fn compare_exchange(at: *mut u8, current: u64, new: u64) -> Result<u64, Fault> {
    // SeqCst: pairs with load_ordered and store_ordered of any other thread or guest.
    let found = word_at(at, 0).compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst);
    Ok(found.unwrap_or_else(|found| found))
}

/// Never: no instruction of here is known.
///
/// # Safety
/// None needed.
pub(super) unsafe fn recover(_: *mut c_void, _: &siginfo_t) -> bool {
    false
}

/// The word that holds a byte, and which of its bytes that is.
fn aligned(at: *mut u8) -> (*mut u8, usize) {
    let skip = at.addr() % WORD;
    (at.wrapping_sub(skip), skip)
}

/// How a copy of `len` bytes that begins `skip` bytes into a word falls on words: how many bytes are
/// in the first one if that is partial, which words are whole, and which one has the rest.
fn cut(skip: usize, len: usize) -> (usize, Range<usize>, usize) {
    let head = if skip == 0 { 0 } else { (WORD - skip).min(len) };
    let first_whole = usize::from(skip != 0);
    let behind = first_whole + (len - head) / WORD;
    (head, first_whole..behind, behind)
}

/// A word of the arena, counted from `base`.
fn word_at<'a>(base: *mut u8, word: usize) -> &'a AtomicU64 {
    // SAFETY: 1. every caller has `base` aligned, and `word` from a length that its own caller vouches for.
    // 2. the arena outlives the call in which the result is used. 3. the memory is only accessed in atomic
    // words, or outside of Rust, or by somebody whom it belongs to alone.
    unsafe { AtomicU64::from_ptr(base.cast::<u64>().wrapping_add(word)) }
}

fn load_word(base: *mut u8, word: usize) -> u64 {
    // Relaxed: bytes race as the guest likes; words of state order what must be ordered.
    word_at(base, word).load(Ordering::Relaxed)
}

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
