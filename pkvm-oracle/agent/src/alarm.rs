//! A clock that interrupts KVM_RUN.

// UNSAFETY: a signal handler.
#![expect(unsafe_code, reason = "signals and timers")]

use std::mem;
use std::ptr;

use pkvm_oracle::Errno;

use crate::sys;

extern "C" fn nothing(_signal: i32) {}

/// From now on a SIGALRM comes twice a second. KVM_RUN fails with EINTR then, whatever a handler
/// asks for; all other system calls are begun again.
pub(crate) fn start() -> Result<(), Errno> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Fork;
    use std::thread;
    use std::time::Duration;

    /// A slow step must not show EINTR, which is no answer of the machine's. In a child, whose one
    /// thread has to take every alarm.
    #[test]
    fn a_read_that_waits_is_not_interrupted() {
        let (from, to) = sys::pipe().unwrap();
        match sys::fork().unwrap() {
            Fork::Child => {
                let mut byte = 0_u8;
                let result = start().and_then(|()| sys::read_to(&from, &raw mut byte));
                sys::leave(result.map_or_else(|errno| errno.0, |nr_read| (nr_read != 1).into()))
            }
            Fork::Parent(pid) => {
                // Longer than two alarms.
                thread::sleep(Duration::from_millis(1200));
                let byte = 0x5a_u8;
                assert_eq!(sys::write_from(&to, &raw const byte), Ok(1));
                let status = sys::reap(pid, true).unwrap().unwrap();
                assert_eq!(libc::WEXITSTATUS(status), 0, "the child's read failed with this errno");
            }
        }
    }
}
