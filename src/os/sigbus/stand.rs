//! Getting the handler in front of others, and handing on to them what is theirs.

// UNSAFETY: sigaction, and calls of what other handlers left there.
#![expect(unsafe_code, reason = "signal handling is outside of what safe Rust can say")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use super::fault::SEGV_ACCERR;
use super::{FaultAnswer, FaultCause, HostFault, SIGNALS, mask, views};
use crate::addr::Hva;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::os::recoverable;

/// Proof that the handler stands. It stays for the life of the process, since a handler that was
/// installed later may chain to it.
///
/// The first pool on files installs it, so that a checked access to memory that is gone is an error
/// ([`ErrorKind::MemoryFailure`]) and no death. To every other fault it is as if it were not there, until
/// [`decide_by`](Self::decide_by) says who is to be asked about those in views. Whoever replaces it without
/// chaining to it takes that away; [`install`](Self::install) puts it back on top.
#[derive(Clone, Copy, Debug)]
pub struct SigbusHandler(());

type Entry = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
type Callback = fn(&HostFault) -> FaultAnswer;

/// One for each time that the handler is put on top of others. Each knows its own predecessor: were it one
/// function, it and another that chains to it would call each other for ever.
static ENTRIES: [Entry; 8] = [
    entry::<0>, entry::<1>, entry::<2>, entry::<3>, entry::<4>, entry::<5>, entry::<6>, entry::<7>,
];

/// How often the handler can be put on top.
const NR_LEVELS: usize = ENTRIES.len();

/// What there is to know of a signal's handlers.
struct Line {
    signal: c_int,
    /// The action that stood before an entry, never freed; written before the entry is installed, so that
    /// it finds one always.
    previous: [AtomicPtr<libc::sigaction>; NR_LEVELS],
    /// Whether that one wanted to be called once, and was.
    spent: [AtomicBool; NR_LEVELS],
    /// The entry that the kernel calls, if nobody has put another handler in front of it.
    top: AtomicUsize,
}

/// One for each signal, in the order of [`SIGNALS`].
static LINES: [Line; SIGNALS.len()] = [Line::of(SIGNALS[0]), Line::of(SIGNALS[1])];

/// A [`Callback`], or null.
static CALLBACK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());
/// How many entries of each line were used.
static NR_USED: Mutex<[usize; SIGNALS.len()]> = Mutex::new([0; SIGNALS.len()]);

impl SigbusHandler {
    /// Sees to it that the handler stands, in front of any that was installed since the library did so
    /// last. The first pool on files has installed it already, so that accesses recover.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on architectures other than x86_64 and aarch64; [`ErrorKind::Os`] if
    /// `sigaction` fails; [`ErrorKind::Saturated`] if others have replaced it eight times.
    pub fn install() -> Result<Self, Error> {
        let op = Op::InstallSigbusHandler;
        if !recoverable::RECOVERS {
            return Err(Error::new(op, ErrorKind::Unsupported).because("unknown architecture"));
        }
        let mut nr_used = NR_USED.lock().unwrap_or_else(PoisonError::into_inner);
        for (line, nr_used) in LINES.iter().zip(nr_used.iter_mut()) {
            let standing = line.sigaction(None).map_err(|errno| failed(op, errno))?;
            match ENTRIES.iter().position(|&entry| entry as usize == standing.sa_sigaction) {
                // Relaxed: only says whose turn it is to ask, and a handler that is late asks once more.
                Some(level) => line.top.store(level, Ordering::Relaxed),
                None => line.put_on_top(op, nr_used, standing)?,
            }
        }
        Ok(Self(()))
    }

    /// Lets `decide` say what becomes of a `SIGBUS` that a raw pointer into a view runs into, or of a `SIGSEGV`
    /// while a folio comes there, new or [moved](crate::GuestMemfd::migrate), in place of any callback before it. Without one, and for every other fault, the handler that stood before decides, or
    /// the process dies.
    ///
    /// It is called on the thread that touched the memory, once for each time the instruction faults. All signals are blocked
    /// meanwhile, but for `SIGSYS`, `SIGTRAP`, `SIGILL`, `SIGFPE` and the C library's own: an alternate stack has no
    /// room for their handlers. It may wait for another thread that converts the page, by what means a signal handler has
    /// (a futex, a pipe), if the thread that touched the memory held nothing that the other one needs, and need not handle
    /// a signal for it.
    ///
    /// # Safety
    /// `decide` is async-signal-safe (signal-safety(7)): it allocates nothing, takes no lock, does not panic,
    /// and calls nothing of this library, except for reading what it was passed. It touches no memory of a
    /// view: a fault in it kills the process.
    ///
    /// ```no_run
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// use gmem::{FaultAnswer, HostFault, SigbusHandler};
    ///
    /// static LAST: AtomicU64 = AtomicU64::new(0);
    ///
    /// fn write_down(fault: &HostFault) -> FaultAnswer {
    ///     LAST.store(fault.offset.get(), Ordering::Relaxed);
    ///     FaultAnswer::PassOn
    /// }
    ///
    /// let handler = SigbusHandler::install()?;
    /// // SAFETY: it stores an atomic, and no more.
    /// unsafe { handler.decide_by(write_down) };
    /// # Ok::<(), gmem::error::Error>(())
    /// ```
    pub unsafe fn decide_by(self, decide: fn(&HostFault) -> FaultAnswer) {
        let callback: Callback = decide;
        // Release: pairs with the Acquire in `asked`.
        CALLBACK.store(callback as *mut (), Ordering::Release);
    }
}

/// Installs the handler unless that has been done. What happens without it: a fault of an access kills.
///
/// # Errors
/// [`ErrorKind::Os`].
pub(crate) fn stand_once(op: Op) -> Result<(), Error> {
    if !recoverable::RECOVERS {
        return Ok(());
    }
    let mut nr_used = NR_USED.lock().unwrap_or_else(PoisonError::into_inner);
    for (line, nr_used) in LINES.iter().zip(nr_used.iter_mut()).filter(|(_, used)| **used == 0) {
        let standing = line.sigaction(None).map_err(|errno| failed(op, errno))?;
        line.put_on_top(op, nr_used, standing)?;
    }
    Ok(())
}

impl Line {
    const fn of(signal: c_int) -> Self {
        Self {
            signal,
            previous: [const { AtomicPtr::new(ptr::null_mut()) }; NR_LEVELS],
            spent: [const { AtomicBool::new(false) }; NR_LEVELS],
            top: AtomicUsize::new(0),
        }
    }

    fn put_on_top(
        &self,
        op: Op,
        nr_used: &mut usize,
        standing: libc::sigaction,
    ) -> Result<(), Error> {
        let level = *nr_used;
        let Some(&entry) = ENTRIES.get(level) else {
            return Err(Error::new(op, ErrorKind::Saturated).because("replaced eight times"));
        };
        let ours = action_of(entry, &standing);
        self.remember(level, standing);
        let replaced = self.sigaction(Some(&ours)).map_err(|errno| failed(op, errno))?;
        // Once more: somebody may have installed another in between.
        self.remember(level, replaced);
        *nr_used += 1;
        // Relaxed: as in `install`.
        self.top.store(level, Ordering::Relaxed);
        Ok(())
    }

    fn remember(&self, level: usize, previous: libc::sigaction) {
        // Release: pairs with the Acquire in `hand_on`.
        self.previous[level].store(Box::into_raw(Box::new(previous)), Ordering::Release);
    }

    /// Sets the action of the signal where one is given; returns the one that stood before.
    fn sigaction(&self, new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
        let new = new.map_or(ptr::null(), ptr::from_ref);
        let mut old = MaybeUninit::uninit();
        // SAFETY: both pointers are null or valid for the call; the handler that may be installed is
        // async-signal-safe (see `serve`).
        if unsafe { libc::sigaction(self.signal, new, old.as_mut_ptr()) } != 0 {
            let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(Errno::new(raw));
        }
        // SAFETY: the call succeeded, so it has written the old action.
        Ok(unsafe { old.assume_init() })
    }
}

fn failed(op: Op, errno: Errno) -> Error {
    Error::new(op, ErrorKind::Os).errno_is(errno).because("sigaction")
}

fn action_of(entry: Entry, before: &libc::sigaction) -> libc::sigaction {
    // SAFETY: all-zero is a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = entry as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // Handlers of other signals, on a stack that has room for one or two.
    action.sa_mask = mask::all_but_faults();
    // Whom we call, who may want more room than an alternate stack has, runs where the kernel would have run it.
    if is_nobody(before) || before.sa_flags & libc::SA_ONSTACK != 0 {
        action.sa_flags |= libc::SA_ONSTACK;
    }
    // A signal that somebody sends interrupts system calls as it did, or does not.
    if before.sa_flags & libc::SA_RESTART != 0 || before.sa_sigaction == libc::SIG_IGN {
        action.sa_flags |= libc::SA_RESTART;
    }
    action
}

fn is_nobody(action: &libc::sigaction) -> bool {
    matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN)
}

/// What the kernel calls, or a handler that chains to this one.
extern "C" fn entry<const LEVEL: usize>(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: passed on as it came.
    unsafe { serve(LEVEL, signal, info, context) };
}

/// The handler. Async-signal-safe: it loads atomics, edits the saved registers, reads the words of a page, or
/// calls `pthread_sigmask` and `sigaction`, which POSIX lists as safe, and system calls.
///
/// # Safety
/// The arguments are what the kernel passes to an SA_SIGINFO handler.
unsafe fn serve(level: usize, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo.
    let details = unsafe { &*info };
    let Some(line) = LINES.iter().find(|line| line.signal == signal) else { return };
    let is_fault = is_fault(signal, details.si_code);
    if is_fault && may_be_ours(signal, details) {
        // SAFETY: the kernel passes a valid ucontext, and nobody else refers to it while we run.
        if unsafe { recoverable::recover(context, details) } {
            return;
        }
        // Relaxed: as in `install`. An entry further down has been asked by the one on top.
        let is_on_top = level == line.top.load(Ordering::Relaxed);
        if is_on_top && asked(details) == Some(FaultAnswer::Retry) {
            return;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { hand_on(line, level, info, context, is_fault) };
}

/// Whether the interrupted instruction has raised the signal, and nobody sent it. Of `SIGBUS` that is
/// BUS_ADRALN, BUS_ADRERR, BUS_OBJERR and BUS_MCEERR_AR, not BUS_MCEERR_AO; of `SIGSEGV` whatever the kernel says.
fn is_fault(signal: c_int, code: c_int) -> bool {
    match signal {
        libc::SIGSEGV => code > 0,
        _ => (1..=libc::BUS_MCEERR_AR).contains(&code),
    }
}

/// Of `SIGSEGV` only that a page of a view is mapped, and is not to be touched, as while a folio comes there.
fn may_be_ours(signal: c_int, details: &siginfo_t) -> bool {
    if signal != libc::SIGSEGV {
        return true;
    }
    // SAFETY: only looked at with this code, which is a fault's, which has an address.
    let address = || Hva::new(unsafe { details.si_addr() }.addr());
    details.si_code == SEGV_ACCERR && views::decode(address(), FaultCause::Inaccessible).is_some()
}

/// What the callback says of a fault in a view; `None` without one, and for any other address.
fn asked(details: &siginfo_t) -> Option<FaultAnswer> {
    // Acquire: pairs with the Release in `decide_by`.
    let callback = CALLBACK.load(Ordering::Acquire);
    if callback.is_null() {
        return None;
    }
    // SAFETY: stored by `decide_by` from a function of this type.
    let callback = unsafe { std::mem::transmute::<*mut (), Callback>(callback) };
    let cause = FaultCause::of(FaultCause::code(details.si_signo, details.si_code));
    // SAFETY: the caller has checked that this is a fault, which has an address.
    let hva = Hva::new(unsafe { details.si_addr() }.addr());
    let fault = views::decode(hva, cause)?;
    // SAFETY: takes nothing, and the result is this thread's for as long as it runs.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let answer = callback(&fault);
    // SAFETY: as above.
    unsafe { *errno = before };
    Some(answer)
}

/// # Safety
/// As for `serve`.
unsafe fn hand_on(
    line: &Line,
    level: usize,
    info: *mut siginfo_t,
    context: *mut c_void,
    is_fault: bool,
) {
    // Acquire: pairs with the Release in `remember`.
    let previous = line.previous[level].load(Ordering::Acquire);
    // SAFETY: null or a leaked box, which nobody changes.
    match unsafe { previous.as_ref() } {
        Some(previous) if previous.sa_sigaction == libc::SIG_IGN && !is_fault => {}
        Some(previous) if !is_nobody(previous) && !is_spent(line, level, previous) => {
            // SAFETY: the caller's promise.
            let interrupted = unsafe { &*context.cast::<ucontext_t>() };
            let before = take_mask_of(line.signal, previous, &interrupted.uc_sigmask);
            // SAFETY: the previous owner installed this function for exactly this call.
            unsafe { call(previous, line.signal, info, context) };
            mask::restore(&before);
        }
        _ => line.die(is_fault),
    }
}

/// Whether the handler wanted to be called only once, and has been before.
fn is_spent(line: &Line, level: usize, previous: &libc::sigaction) -> bool {
    let once = previous.sa_flags & libc::SA_RESETHAND != 0;
    // Relaxed: one of two threads that come at once is the first, and nothing hangs on the order.
    once && line.spent[level].swap(true, Ordering::Relaxed)
}

/// Gives this thread the mask that the kernel would have given it for the handler, interrupted under this one; the one
/// before.
fn take_mask_of(
    signal: c_int,
    previous: &libc::sigaction,
    interrupted: &libc::sigset_t,
) -> Option<libc::sigset_t> {
    let itself = (previous.sa_flags & libc::SA_NODEFER == 0).then_some(signal);
    mask::set(&mask::union(interrupted, &previous.sa_mask, itself))
}

/// # Safety
/// `previous` must be an action with a handler function, called with what the kernel passed.
unsafe fn call(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut c_void,
) {
    let handler = ptr::with_exposed_provenance::<c_void>(previous.sa_sigaction);
    if previous.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: the flag says that the function has this signature.
        let handler = unsafe { std::mem::transmute::<*const c_void, Entry>(handler) };
        handler(signal, info, context);
    } else {
        type Plain = extern "C" fn(c_int);
        // SAFETY: without the flag it has this one.
        let handler = unsafe { std::mem::transmute::<*const c_void, Plain>(handler) };
        handler(signal);
    }
}

impl Line {
    /// Puts the default action back. The instruction then faults again and the process dies of the
    /// fault itself; a signal that was sent has to be sent again.
    fn die(&self, is_fault: bool) {
        // SAFETY: all-zero is the default action.
        let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        let _ = self.sigaction(Some(&default));
        if !is_fault {
            // Not raise: which system calls those are is the C library's affair, and a filter's.
            // SAFETY: takes nothing.
            let process = unsafe { libc::getpid() };
            // SAFETY: as above.
            let thread = unsafe { libc::syscall(libc::SYS_gettid) };
            // SAFETY: takes no pointers.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, self.signal) };
        }
    }
}
