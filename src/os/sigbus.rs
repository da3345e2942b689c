//! An opt-in `SIGBUS` handler, and a touch of one byte that survives the signal.
//!
//! It stands for `SIGSEGV` as well, which is how a fault is reported in the moment in which a folio that moves is
//! taken out of a view.
//!
//! Without it a touch of private memory through a raw pointer kills the process, as it does with
//! the kernel's own object. With it, [`HostView::touch`](crate::HostView::touch) reports the fault
//! instead. A fault from any other instruction goes to whatever handler stood before, or kills.

// UNSAFETY: sigaction, and instructions that may fault and are known by their addresses.
#![expect(unsafe_code, reason = "signal handling is outside of what safe Rust can say")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void, siginfo_t};

use crate::addr::{Access, Hva};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::os::mapping::Mapping;

/// Proof that the handler stands. It stays for the life of the process, since a handler that was
/// installed later may chain to it.
#[derive(Clone, Copy, Debug)]
pub struct SigbusHandler(());

/// The `si_code` of a `SIGBUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultCause {
    /// `BUS_ADRERR`: nothing is mapped there; the page is private or absent.
    NotMapped,
    /// `BUS_MCEERR_AR`: the memory itself failed.
    MemoryFailure,
    /// Something else.
    Other,
}

impl FaultCause {
    fn of(si_code: usize) -> Self {
        match c_int::try_from(si_code) {
            Ok(libc::BUS_ADRERR) => Self::NotMapped,
            Ok(libc::BUS_MCEERR_AR) => Self::MemoryFailure,
            _ => Self::Other,
        }
    }
}

/// A `SIGBUS` that a touch ran into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawFault {
    pub(crate) hva: Hva,
    pub(crate) cause: FaultCause,
}

/// Why a touch has no byte to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotTouched {
    OutOfRange,
    SignalPending,
    Fault(RawFault),
}

/// The signals that a touch survives, in this order everywhere.
const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// The actions that stood before ours, never freed; written before ours is installed, so that the
/// handler finds one always.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 2] =
    [AtomicPtr::new(ptr::null_mut()), AtomicPtr::new(ptr::null_mut())];
static INSTALLED: Mutex<bool> = Mutex::new(false);

impl SigbusHandler {
    /// Installs the handler, once for the process; later calls only return the proof.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on architectures other than x86_64 and aarch64;
    /// [`ErrorKind::Os`] if `sigaction` fails.
    pub fn install() -> Result<Self, Error> {
        let op = Op::InstallSigbusHandler;
        if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            return Err(Error::new(op, ErrorKind::Unsupported).because("unknown architecture"));
        }
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
                remember(previous, sigaction(signal, None).map_err(|e| os_error(op, e))?);
                // Once more: somebody may have installed another in between.
                let before = sigaction(signal, Some(&ours())).map_err(|e| os_error(op, e))?;
                remember(previous, before);
            }
            *installed = true;
        }
        Ok(Self(()))
    }

    /// Loads the byte at `at` of the mapping, or stores it back unchanged.
    pub(crate) fn touch(self, map: &Mapping, at: usize, access: Access) -> Result<u8, NotTouched> {
        if at >= map.len() {
            return Err(NotTouched::OutOfRange);
        }
        let target = map.base().as_ptr().wrapping_add(at);
        // A fault while the signal is blocked kills the process, whatever the handler.
        if is_pending() {
            return Err(NotTouched::SignalPending);
        }
        let blocked = unblock();
        let touched = touch::touch(target, access);
        restore(&blocked);
        match touched {
            touch::Touched { value, code: 0 } => Ok(value.to_le_bytes()[0]),
            touch::Touched { value, code } => Err(NotTouched::Fault(RawFault {
                hva: Hva::new(value),
                cause: FaultCause::of(code),
            })),
        }
    }
}

fn remember(at: &AtomicPtr<libc::sigaction>, previous: libc::sigaction) {
    // Release: pairs with the Acquire in `on_fault`.
    at.store(Box::into_raw(Box::new(previous)), Ordering::Release);
}

fn os_error(op: Op, errno: Errno) -> Error {
    Error::new(op, ErrorKind::Os).errno_is(errno).because("sigaction")
}

fn ours() -> libc::sigaction {
    // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_fault;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    action
}

/// Sets the action of a signal where one is given; returns the one that stood before.
fn sigaction(signal: c_int, new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let new = new.map_or(ptr::null(), ptr::from_ref);
    let mut old = MaybeUninit::uninit();
    // SAFETY: both pointers are null or valid for the call; the handler that may be installed is
    // async-signal-safe (see `on_fault`).
    if unsafe { libc::sigaction(signal, new, old.as_mut_ptr()) } != 0 {
        let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Errno::new(raw));
    }
    // SAFETY: the call succeeded, so it has written the old action.
    Ok(unsafe { old.assume_init() })
}

/// Whether one of the signals waits for this thread to let it through.
fn is_pending() -> bool {
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    if unsafe { libc::sigpending(set.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: written by the call that has succeeded.
    SIGNALS.iter().any(|&signal| unsafe { libc::sigismember(set.as_ptr(), signal) == 1 })
}

/// Lets the signals through to this thread; the mask that stood before, or none if that failed.
fn unblock() -> Option<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: writes the set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the line above.
    let mut set = unsafe { set.assume_init() };
    for signal in SIGNALS {
        // SAFETY: takes a valid set and a valid signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    let mut before = MaybeUninit::uninit();
    // SAFETY: both point to sets that live through the call.
    let failed =
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, before.as_mut_ptr()) };
    // SAFETY: written by the call that has succeeded.
    (failed == 0).then(|| unsafe { before.assume_init() })
}

fn restore(mask: &Option<libc::sigset_t>) {
    if let Some(mask) = mask {
        // SAFETY: the mask came from the kernel; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, ptr::from_ref(mask), ptr::null_mut()) };
    }
}

/// The handler. Async-signal-safe: it loads one atomic pointer, edits the saved registers,
/// or calls `sigaction` and `raise`, which POSIX lists as safe.
extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let details = unsafe { &*info };
    let code = details.si_code;
    // SAFETY: the address is only meaningful for faults, and only used for those.
    let address = unsafe { details.si_addr() }.addr();
    let is_fault = is_fault(signal, code);
    // Of what was taken out of a view: as if it were not mapped.
    let code = if signal == libc::SIGSEGV { libc::BUS_ADRERR } else { code };
    // SAFETY: the kernel passes a valid ucontext, and nobody else refers to it while we run.
    if is_fault && unsafe { touch::recover(context, address, code) } {
        return;
    }
    let at = SIGNALS.iter().position(|&it| it == signal).and_then(|at| PREVIOUS.get(at));
    // Acquire: pairs with the Release in `remember`.
    let previous = at.map_or(ptr::null_mut(), |at| at.load(Ordering::Acquire));
    // SAFETY: null or a leaked box, which nobody changes.
    match unsafe { previous.as_ref() } {
        Some(previous) if previous.sa_sigaction == libc::SIG_IGN && !is_fault => {}
        Some(previous) if !matches!(previous.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            // SAFETY: the previous owner installed this function for exactly this call.
            unsafe { chain(previous, signal, info, context) };
        }
        _ => die(signal, is_fault),
    }
}

/// Whether the interrupted instruction has raised the signal, and nobody sent it. Of `SIGBUS` that is
/// BUS_ADRALN, BUS_ADRERR, BUS_OBJERR and BUS_MCEERR_AR, not BUS_MCEERR_AO; of `SIGSEGV` whatever the kernel says.
fn is_fault(signal: c_int, code: c_int) -> bool {
    match signal {
        libc::SIGSEGV => code > 0,
        _ => (1..=libc::BUS_MCEERR_AR).contains(&code),
    }
}

/// # Safety
/// `previous` must be an action with a handler function, called with what the kernel passed.
unsafe fn chain(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut c_void,
) {
    let handler = ptr::with_exposed_provenance::<c_void>(previous.sa_sigaction);
    if previous.sa_flags & libc::SA_SIGINFO != 0 {
        type WithInfo = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
        // SAFETY: the flag says that the function has this signature.
        let handler = unsafe { std::mem::transmute::<*const c_void, WithInfo>(handler) };
        handler(signal, info, context);
    } else {
        type Plain = extern "C" fn(c_int);
        // SAFETY: without the flag it has this one.
        let handler = unsafe { std::mem::transmute::<*const c_void, Plain>(handler) };
        handler(signal);
    }
}

/// Puts the default action back. The instruction then faults again and the process dies of the
/// fault itself; a signal that was sent has to be sent again.
fn die(signal: c_int, is_fault: bool) {
    // SAFETY: all-zero is the default action.
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let _ = sigaction(signal, Some(&default));
    if !is_fault {
        // SAFETY: raise takes no pointers.
        unsafe { libc::raise(signal) };
    }
}

/// The instructions that may fault, and what follows from their addresses. Each architecture has the
/// code between the same five labels, and knows where its registers are saved. The labels are weak: a
/// build of the tests may link the library twice, and either copy will do.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod touch {
    use libc::{c_int, c_void, ucontext_t};

    use super::arch;
    use crate::addr::Access;

    /// In the two registers of a returned pair: the byte and 0, or the faulting address and the
    /// signal's code.
    #[repr(C)]
    pub(super) struct Touched {
        pub(super) value: usize,
        pub(super) code: usize,
    }

    unsafe extern "C" {
        fn gmem_touch_load(at: *mut u8) -> Touched;
        fn gmem_touch_store(at: *mut u8) -> Touched;
        safe static gmem_touch_begin: u8;
        safe static gmem_touch_end: u8;
        safe static gmem_touch_recover: u8;
    }

    pub(super) fn touch(at: *mut u8, access: Access) -> Touched {
        match access {
            // SAFETY: a fault is recovered from, since a `SigbusHandler` exists; the byte belongs
            // to a mapping of guest memory, to which there are no references.
            Access::Read => unsafe { gmem_touch_load(at) },
            // SAFETY: as above; the value stored is the value found.
            Access::Write => unsafe { gmem_touch_store(at) },
        }
    }

    /// If the fault came from a touch: makes it return address and code.
    ///
    /// # Safety
    /// `context` must be the `ucontext_t` of the interrupted thread, with no other reference to it.
    pub(super) unsafe fn recover(context: *mut c_void, address: usize, code: c_int) -> bool {
        // SAFETY: the caller's promise.
        let context = unsafe { &mut *context.cast::<ucontext_t>() };
        let begin = (&raw const gmem_touch_begin).addr() as u64;
        let end = (&raw const gmem_touch_end).addr() as u64;
        let is_ours = (begin..end).contains(&arch::pc(context));
        if is_ours {
            arch::resume(context, (&raw const gmem_touch_recover).addr(), address, code);
        }
        is_ours
    }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::global_asm;

    use libc::{REG_RAX, REG_RDX, REG_RIP, c_int, greg_t, ucontext_t};

    // A store of the same value must be one instruction, or it could undo somebody else's store.
    global_asm!(
        ".pushsection .text.gmem_touch, \"ax\", @progbits",
        // Visible to other objects of this crate, which may not be compiled as one, and to nobody else.
        ".weak gmem_touch_load, gmem_touch_store",
        ".weak gmem_touch_begin, gmem_touch_end, gmem_touch_recover",
        ".hidden gmem_touch_load, gmem_touch_store",
        ".hidden gmem_touch_begin, gmem_touch_end, gmem_touch_recover",
        "gmem_touch_load:",
        "xor edx, edx",
        "gmem_touch_begin:",
        "movzx eax, byte ptr [rdi]",
        "ret",
        "gmem_touch_store:",
        "xor edx, edx",
        "xor eax, eax",
        "lock xadd byte ptr [rdi], al",
        "gmem_touch_end:",
        "gmem_touch_recover:",
        "ret",
        ".popsection",
    );

    pub(super) fn pc(context: &ucontext_t) -> u64 {
        context.uc_mcontext.gregs[REG_RIP as usize] as u64
    }

    pub(super) fn resume(context: &mut ucontext_t, pc: usize, value: usize, code: c_int) {
        let registers = &mut context.uc_mcontext.gregs;
        registers[REG_RAX as usize] = value as greg_t;
        registers[REG_RDX as usize] = greg_t::from(code);
        registers[REG_RIP as usize] = pc as greg_t;
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::global_asm;

    use libc::{c_int, ucontext_t};

    // The exclusive pair stores the value it loaded only if nobody stored in between.
    global_asm!(
        ".pushsection .text.gmem_touch, \"ax\", %progbits",
        // Visible to other objects of this crate, which may not be compiled as one, and to nobody else.
        ".weak gmem_touch_load, gmem_touch_store",
        ".weak gmem_touch_begin, gmem_touch_end, gmem_touch_recover",
        ".hidden gmem_touch_load, gmem_touch_store",
        ".hidden gmem_touch_begin, gmem_touch_end, gmem_touch_recover",
        "gmem_touch_load:",
        "mov x1, #0",
        "gmem_touch_begin:",
        "ldrb w0, [x0]",
        "ret",
        "gmem_touch_store:",
        "mov x1, #0",
        "1: ldxrb w2, [x0]",
        "stxrb w3, w2, [x0]",
        "cbnz w3, 1b",
        "mov x0, x2",
        "gmem_touch_end:",
        "gmem_touch_recover:",
        "ret",
        ".popsection",
    );

    pub(super) fn pc(context: &ucontext_t) -> u64 {
        context.uc_mcontext.pc
    }

    pub(super) fn resume(context: &mut ucontext_t, pc: usize, value: usize, code: c_int) {
        let machine = &mut context.uc_mcontext;
        machine.regs[0] = value as u64;
        machine.regs[1] = code as u64;
        machine.pc = pc as u64;
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod touch {
    use libc::{c_int, c_void};

    use crate::addr::Access;

    pub(super) struct Touched {
        pub(super) value: usize,
        pub(super) code: usize,
    }

    /// Never reached: no `SigbusHandler` exists here. Answers as a fault would.
    pub(super) fn touch(at: *mut u8, _access: Access) -> Touched {
        Touched { value: at.addr(), code: 1 }
    }

    /// # Safety
    /// None needed.
    pub(super) unsafe fn recover(_: *mut c_void, _: usize, _: c_int) -> bool {
        false
    }
}
