//! A clock that interrupts KVM_RUN.

// UNSAFETY: a signal handler.
#![expect(unsafe_code, reason = "signals and timers")]

use std::mem;
use std::ptr;

use pkvm_oracle::Errno;

use crate::sys;

extern "C" fn nothing(_signal: i32) {}

/// From now on a SIGALRM comes twice a second. System calls that it interrupts fail with EINTR, or
/// are started anew by the kernel where they can be.
pub(crate) fn start() -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: the handler does nothing.
    sys::checked(unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) })?;
    let period = libc::timeval { tv_sec: 0, tv_usec: 500_000 };
    let timer = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: reads one structure. (As a system call: not every libc of the crate has it by name.)
    let set = unsafe {
        libc::syscall(libc::SYS_setitimer, 0, &raw const timer, ptr::null_mut::<libc::itimerval>())
    };
    sys::checked(set).map(drop)
}
