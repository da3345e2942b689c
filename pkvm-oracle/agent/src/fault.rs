//! Single loads and stores that may raise a signal, and live.

// UNSAFETY: an access that may fault, and the handler that steps over it.
#![expect(unsafe_code, reason = "accesses that may fault")]

use std::arch::asm;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use pkvm_oracle::{Errno, Observation, Signal};

use crate::sys;

/// An access is under way, so a fault is its fault.
static ARMED: AtomicBool = AtomicBool::new(false);
/// The signal that the access raised, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);

/// Bytes of the instruction that accesses: it is stepped over.
#[cfg(target_arch = "aarch64")]
const INSTRUCTION: u64 = 4;
#[cfg(target_arch = "x86_64")]
const INSTRUCTION: i64 = 2;

/// Takes SIGSEGV and SIGBUS.
pub(crate) fn install() -> Result<(), Errno> {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler touches nothing but atomics and its own arguments.
        sys::checked(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) })?;
    }
    Ok(())
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Relaxed, here and below: both sides are the one thread, whose accesses are in order; the asm
    // of `access` may touch memory for all the compiler knows.
    if !ARMED.load(Ordering::Relaxed) {
        // SAFETY: takes numbers. The faulting instruction runs again and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid one.
    let code = unsafe { (*info).si_code };
    SIGNAL.store(signal, Ordering::Relaxed);
    CODE.store(code, Ordering::Relaxed);
    let context: *mut libc::ucontext_t = context.cast();
    // SAFETY: the kernel gives a handler its context, ours alone until we return.
    let context = unsafe { &mut *context };
    #[cfg(target_arch = "aarch64")]
    {
        context.uc_mcontext.pc += INSTRUCTION;
    }
    #[cfg(target_arch = "x86_64")]
    {
        context.uc_mcontext.gregs[libc::REG_RIP as usize] += INSTRUCTION;
    }
}

/// Runs one access, and says which signal it raised.
fn access(act: impl FnOnce()) -> Option<Observation> {
    SIGNAL.store(0, Ordering::Relaxed);
    // Relaxed, as in `handler`.
    ARMED.store(true, Ordering::Relaxed);
    act();
    ARMED.store(false, Ordering::Relaxed);
    let code = CODE.load(Ordering::Relaxed);
    match SIGNAL.load(Ordering::Relaxed) {
        0 => None,
        libc::SIGBUS => Some(Observation::Signal(Signal::Bus, code)),
        _ => Some(Observation::Signal(Signal::Segv, code)),
    }
}

/// One load instruction.
pub(crate) fn load(at: *const u8) -> Observation {
    let mut byte = 0_u8;
    let raised = access(|| {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: loads a byte, or faults and is stepped over: then the register keeps its 0.
        unsafe {
            let mut value = 0_u32;
            asm!("ldrb {value:w}, [{at}]", value = inout(reg) value, at = in(reg) at);
            byte = value as u8;
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: loads a byte, or faults and is stepped over (the encoding has two bytes).
        unsafe {
            asm!("mov al, byte ptr [rdi]", inout("al") byte, in("rdi") at);
        }
    });
    raised.unwrap_or(Observation::Byte(byte))
}

/// One store instruction.
pub(crate) fn store(at: *mut u8, byte: u8) -> Observation {
    let raised = access(|| {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: stores a byte, to which nobody has a reference, or faults and is stepped over.
        unsafe {
            asm!("strb {value:w}, [{at}]", value = in(reg) u32::from(byte), at = in(reg) at);
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: stores a byte, to which nobody has a reference, or faults and is stepped over
        // (the encoding has two bytes).
        unsafe {
            asm!("mov byte ptr [rdi], al", in("al") byte, in("rdi") at);
        }
    });
    raised.unwrap_or(Observation::Ok)
}
