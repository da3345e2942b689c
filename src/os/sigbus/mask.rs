//! The calling thread's signal mask, as far as the handler's signals go.

// UNSAFETY: system calls on sets of signals.
#![expect(unsafe_code, reason = "rustix has no signal masks")]

use std::mem::MaybeUninit;
use std::ptr;

use libc::{c_int, sigset_t};

/// Whether the thread blocks SIGBUS. `false` if the kernel does not say.
#[cfg_attr(
    any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))),
    expect(dead_code, reason = "asked only where there is something to recover")
)]
pub(crate) fn blocks_sigbus() -> bool {
    // SIG_BLOCK of nothing.
    change(libc::SIG_BLOCK, &empty()).is_some_and(|mask| has(&mask, libc::SIGBUS))
}

/// Whether one of the signals waits for this thread to let it through.
pub(crate) fn is_pending(signals: &[c_int]) -> bool {
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    if unsafe { libc::sigpending(set.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: written by the call that has succeeded.
    let set = unsafe { set.assume_init() };
    signals.iter().any(|&signal| has(&set, signal))
}

/// Lets the signals through to this thread; the mask that stood before, or none if that failed.
pub(crate) fn unblock(signals: &[c_int]) -> Option<sigset_t> {
    let mut set = empty();
    for &signal in signals {
        // SAFETY: takes a valid set and a valid signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    change(libc::SIG_UNBLOCK, &set)
}

/// Blocks these signals and no others; the mask that stood before.
pub(super) fn set(mask: &sigset_t) -> Option<sigset_t> {
    change(libc::SIG_SETMASK, mask)
}

/// All that can come from elsewhere. Not those by which an instruction or a system call says that it failed: the kernel
/// kills who blocks them. Nor the C library's own, which it leaves out itself.
pub(super) fn all_but_faults() -> sigset_t {
    let mut set = empty();
    // SAFETY: takes a valid set.
    unsafe { libc::sigfillset(&raw mut set) };
    for signal in [libc::SIGILL, libc::SIGTRAP, libc::SIGFPE, libc::SIGSYS] {
        // SAFETY: takes a valid set and a valid signal.
        unsafe { libc::sigdelset(&raw mut set, signal) };
    }
    set
}

/// The signals of both, and one more if there is one.
pub(super) fn union(one: &sigset_t, other: &sigset_t, more: Option<c_int>) -> sigset_t {
    let mut set = *one;
    let others = (1..=libc::SIGRTMAX()).filter(|&signal| has(other, signal));
    for signal in others.chain(more) {
        // SAFETY: takes a valid set and a valid signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

pub(crate) fn restore(mask: &Option<sigset_t>) {
    if let Some(mask) = mask {
        change(libc::SIG_SETMASK, mask);
    }
}

fn empty() -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the line above.
    unsafe { set.assume_init() }
}

fn has(set: &sigset_t, signal: c_int) -> bool {
    // SAFETY: takes a valid set and a valid signal.
    unsafe { libc::sigismember(ptr::from_ref(set), signal) == 1 }
}

/// Changes the mask; the one that stood before.
fn change(how: c_int, set: &sigset_t) -> Option<sigset_t> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: both point to sets that live through the call.
    let failed = unsafe { libc::pthread_sigmask(how, ptr::from_ref(set), before.as_mut_ptr()) };
    // SAFETY: written by the call that has succeeded.
    (failed == 0).then(|| unsafe { before.assume_init() })
}
