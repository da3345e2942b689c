//! Bytes of an arena in and out, by instructions that a `SIGBUS` ends instead of the process.
//!
//! The memory of an arena can go from under its mapping: the machine finds an error in it, or somebody
//! punches a hole from outside and takes the last huge page. So all that touches an arena's bytes is in a
//! few routines in assembly, in a section of their own. The handler knows that section: it puts the
//! faulting address and the signal's code into the registers of the result, and goes on at a `ret`.
//! Without a handler the process dies, as it would by any other instruction.
//!
//! What they promise: an access to arena memory is aligned to its size; no byte beside those of the copy is
//! touched, and none twice; so aligned words of 2, 4 or 8 bytes are not torn. Copies of 512 bytes or more
//! promise this only where both sides are multiples of 8.
//!
//! To the compiler they are foreign functions. No Rust code reads or writes an arena's bytes, so none can race
//! with guests, devices or other threads that do so at the same time.

// UNSAFETY: instructions on memory that nobody has references to, and the registers that a signal saved.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use std::cell::Cell;

use libc::{c_void, siginfo_t, ucontext_t};

use super::sigbus::mask;
use crate::addr::{Access, Hva};
use crate::geometry::index;
use crate::os::sigbus::FaultCause;

#[cfg_attr(target_arch = "aarch64", path = "recoverable/aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "recoverable/x86_64.rs")]
mod arch;

/// Whether a `SIGBUS` in here can be recovered from.
pub(super) const RECOVERS: bool = true;

/// A `SIGBUS` that ended an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) hva: Hva,
    pub(crate) cause: FaultCause,
}

/// In the two registers of a returned pair: a result and 0, or the faulting address and its [`FaultCause::code`].
#[repr(C)]
struct Outcome {
    value: u64,
    code: u64,
}

// The names say which version they are of: two that do not get on may be linked into one program.
unsafe extern "C" {
    fn gmem01_touch_load(at: *mut u8) -> Outcome;
    fn gmem01_touch_store(at: *mut u8) -> Outcome;
    fn gmem01_copy_out(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gmem01_copy_in(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gmem01_copy_frames(to: *mut u8, from: *const u8, len: usize) -> Outcome;
    fn gmem01_zero(to: *mut u8, len: usize) -> Outcome;
    fn gmem01_is_zero(from: *const u8, len: usize) -> Outcome;
    fn gmem01_load(at: *const u8) -> Outcome;
    fn gmem01_store(at: *mut u8, value: u64) -> Outcome;
    fn gmem01_load_ordered(at: *const u8) -> Outcome;
    fn gmem01_store_ordered(at: *mut u8, value: u64) -> Outcome;
    fn gmem01_compare_exchange(at: *mut u8, current: u64, new: u64) -> Outcome;
    safe static gmem01_begin: u8;
    safe static gmem01_end: u8;
    safe static gmem01_recover: u8;
}

impl Outcome {
    #[inline]
    fn result(self) -> Result<u64, Fault> {
        match self.code {
            0 => Ok(self.value),
            code => Err(Fault { hva: Hva::new(index(self.value)), cause: FaultCause::of(code) }),
        }
    }
}

/// What a thread's mask said about SIGBUS when it was looked at.
#[derive(Clone, Copy)]
enum Mask {
    Unknown,
    LetsThrough,
    Blocks,
}

thread_local! {
    static MASK: Cell<Mask> = const { Cell::new(Mask::Unknown) };
}

/// Runs an access so that a fault of it reaches the handler: the kernel kills a process that faults with the
/// signal blocked.
#[inline]
fn reachable(access: impl FnOnce() -> Outcome) -> Outcome {
    match MASK.get() {
        Mask::LetsThrough => access(),
        Mask::Unknown | Mask::Blocks => reachable_if_blocked(access),
    }
}

#[cold]
fn reachable_if_blocked(access: impl FnOnce() -> Outcome) -> Outcome {
    if let Mask::Unknown = MASK.get() {
        match mask::blocks_sigbus() {
            false => MASK.set(Mask::LetsThrough),
            true => MASK.set(Mask::Blocks),
        }
    }
    match MASK.get() {
        // One that was sent waits for somebody else: better the small chance of a fault.
        Mask::Blocks if !mask::is_pending(&[libc::SIGBUS]) => {
            let before = mask::unblock(&[libc::SIGBUS]);
            let outcome = access();
            mask::restore(&before);
            outcome
        }
        _ => access(),
    }
}

/// Loads the byte at `at`, or stores it back unchanged. The caller sees to the signal mask.
///
/// # Safety
/// 1. A handler stands, if the byte may not be there. 2. It belongs to a mapping of guest memory, to
///    which there are no references.
pub(crate) unsafe fn touch(at: *mut u8, access: Access) -> Result<u8, Fault> {
    let outcome = match access {
        // SAFETY: the caller's promise.
        Access::Read => unsafe { gmem01_touch_load(at) },
        // SAFETY: the caller's promise; the value stored is the value found.
        Access::Write => unsafe { gmem01_touch_store(at) },
    };
    outcome.result().map(|value| value.to_le_bytes()[0])
}

/// Copies bytes out of an arena.
///
/// # Safety
/// `buf.len()` bytes from `from` on are mapped arena memory.
#[inline]
pub(crate) unsafe fn copy_out(from: *const u8, buf: &mut [u8]) -> Result<(), Fault> {
    if let (0, 8) = (from.addr() % 8, buf.len()) {
        // SAFETY: the caller's promise, for an aligned word.
        let word = unsafe { load(from) }?;
        buf.copy_from_slice(&word.to_ne_bytes());
        return Ok(());
    }
    let (to, len) = (buf.as_mut_ptr(), buf.len());
    // SAFETY: 1. the source is the caller's promise. 2. the target is borrowed for this, and nobody
    // borrows arena memory, so they do not overlap.
    reachable(|| unsafe { gmem01_copy_out(to, from, len) }).result().map(drop)
}

/// Copies bytes into an arena.
///
/// # Safety
/// `buf.len()` bytes from `to` on are mapped arena memory.
#[inline]
pub(crate) unsafe fn copy_in(to: *mut u8, buf: &[u8]) -> Result<(), Fault> {
    if let (0, Ok(word)) = (to.addr() % 8, <[u8; 8]>::try_from(buf)) {
        // SAFETY: the caller's promise, for an aligned word.
        return unsafe { store(to, u64::from_ne_bytes(word)) };
    }
    let (from, len) = (buf.as_ptr(), buf.len());
    // SAFETY: as in copy_out, the other way round.
    reachable(|| unsafe { gmem01_copy_in(to, from, len) }).result().map(drop)
}

/// Copies whole pages of an arena, which do not overlap.
///
/// # Safety
/// `len` bytes from `from` and from `to` on are mapped arena memory. They begin at multiples of 8, and
/// `len` is one of 64, not 0.
pub(crate) unsafe fn copy_frames(from: *const u8, to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_copy_frames(to, from, len) }).result().map(drop)
}

/// Fills whole pages of an arena with zeroes.
///
/// # Safety
/// As for [`copy_frames`].
pub(crate) unsafe fn zero(to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_zero(to, len) }).result().map(drop)
}

/// The same for pages that are the caller's alone.
///
/// # Safety
/// As for [`copy_frames`].
pub(crate) unsafe fn scrub(to: *mut u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    unsafe { zero(to, len) }
}

/// Whether whole pages of an arena are all zeroes.
///
/// # Safety
/// As for [`copy_frames`].
pub(crate) unsafe fn is_zero(from: *const u8, len: usize) -> Result<bool, Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_is_zero(from, len) }).result().map(|bits| bits == 0)
}

/// Loads an aligned word, in no order.
///
/// # Safety
/// Eight bytes from `at` on, a multiple of 8, are mapped arena memory.
#[inline]
unsafe fn load(at: *const u8) -> Result<u64, Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_load(at) }).result()
}

/// Stores an aligned word, in no order.
///
/// # Safety
/// As for [`load`].
#[inline]
unsafe fn store(at: *mut u8, value: u64) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_store(at, value) }).result().map(drop)
}

/// Loads an aligned word, sequentially consistent.
///
/// # Safety
/// As for [`load`].
#[inline]
pub(crate) unsafe fn load_ordered(at: *const u8) -> Result<u64, Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_load_ordered(at) }).result()
}

/// Stores an aligned word, sequentially consistent.
///
/// # Safety
/// As for [`load`].
pub(crate) unsafe fn store_ordered(at: *mut u8, value: u64) -> Result<(), Fault> {
    // SAFETY: the caller's promise.
    reachable(|| unsafe { gmem01_store_ordered(at, value) }).result().map(drop)
}

/// Compares an aligned word and exchanges it, sequentially consistent; what was found.
///
/// # Safety
/// As for [`load`].
pub(crate) unsafe fn compare_exchange(at: *mut u8, current: u64, new: u64) -> Result<u64, Fault> {
    // SAFETY: the caller's promise.
    let outcome = reachable(|| unsafe { gmem01_compare_exchange(at, current, new) });
    outcome.result()
}

/// Where an interrupted thread was, and at which arena memory if it was in a routine.
struct Interrupted {
    pc: usize,
    places: [usize; 2],
    len: usize,
}

impl Interrupted {
    /// Whether a fault in these bytes is one of arena memory in a routine. If it is not, the routine was
    /// at the memory of its caller.
    fn is_ours(&self, fault: Extent) -> bool {
        let section = (&raw const gmem01_begin).addr()..(&raw const gmem01_end).addr();
        let at_arena = |&place: &usize| fault.touches(place, self.len);
        section.contains(&self.pc) && self.places.iter().any(at_arena)
    }
}

/// The bytes that a signal speaks of.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    first: usize,
    last: usize,
}

impl Extent {
    /// One byte, but memory fails in units of a page.
    pub(super) fn of(info: &siginfo_t) -> Self {
        // SAFETY: the address is only meaningful for faults, and only used for those.
        let address = unsafe { info.si_addr() }.addr();
        if info.si_code != libc::BUS_MCEERR_AR {
            return Self { first: address, last: address };
        }
        // `si_addr_lsb`, which libc has no name for, lies behind the address.
        let place = (&raw const *info).cast::<u8>().wrapping_add(16 + size_of::<usize>());
        // SAFETY: inside of the structure, aligned for it, and written by the kernel with this code.
        let shift = unsafe { place.cast::<i16>().read() };
        let unit = 1_usize << shift.clamp(0, 40);
        Self { first: address & !(unit - 1), last: address | (unit - 1) }
    }

    fn touches(self, start: usize, len: usize) -> bool {
        len > 0 && self.first <= start.saturating_add(len - 1) && start <= self.last
    }
}

/// If the fault came from a routine at arena memory: ends it with address and code.
///
/// # Safety
/// `context` must be the `ucontext_t` of the interrupted thread, with no other reference to it.
pub(super) unsafe fn recover(context: *mut c_void, info: &siginfo_t) -> bool {
    // SAFETY: the caller's promise.
    let context = unsafe { &mut *context.cast::<ucontext_t>() };
    if !arch::interrupted(context).is_ours(Extent::of(info)) {
        return false;
    }
    // SAFETY: as in `Extent::of`.
    let address = unsafe { info.si_addr() }.addr();
    let code = FaultCause::code(info.si_signo, info.si_code);
    arch::resume(context, (&raw const gmem01_recover).addr(), address, code);
    true
}

#[cfg(test)]
mod tests {
    use libc::c_int;

    use super::*;

    #[test]
    fn the_names_are_of_this_version() {
        let version = concat!(env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"));
        assert_eq!(version, "01", "rename the routines, from gmem01_... on");
    }

    /// A signal as the kernel reports it.
    fn info(code: c_int, address: usize, shift: i16) -> siginfo_t {
        // SAFETY: all-zero is a valid siginfo.
        let mut info: siginfo_t = unsafe { std::mem::zeroed() };
        info.si_signo = libc::SIGBUS;
        info.si_code = code;
        let fields = (&raw mut info).cast::<u8>().wrapping_add(16);
        // SAFETY: `si_addr` of a fault: inside, and aligned.
        unsafe { fields.cast::<usize>().write(address) };
        // SAFETY: `si_addr_lsb` of a fault: inside, and aligned.
        unsafe { fields.wrapping_add(size_of::<usize>()).cast::<i16>().write(shift) };
        info
    }

    fn inside(places: [usize; 2], len: usize) -> Interrupted {
        Interrupted { pc: (&raw const gmem01_begin).addr() + 1, places, len }
    }

    #[test]
    fn a_fault_is_ours_in_a_routine_and_at_its_arena_memory_only() {
        let at = |address| Extent::of(&info(libc::BUS_ADRERR, address, 0));
        let copy = inside([0x7000, 0x9000], 0x100);
        for (address, is_ours) in [
            (0x7000, true),
            (0x70ff, true),
            (0x6fff, false),
            (0x7100, false),
            (0x9000, true),
            (0x90ff, true),
            (0x9100, false),
        ] {
            assert_eq!(copy.is_ours(at(address)), is_ours, "{address:#x}");
        }
        assert!(!inside([0x7000; 2], 0).is_ours(at(0x7000)));
        for pc in [(&raw const gmem01_begin).addr() - 1, (&raw const gmem01_end).addr()] {
            assert!(!Interrupted { pc, ..inside([0x7000; 2], 0x100) }.is_ours(at(0x7000)));
        }
    }

    #[test]
    fn memory_fails_in_units_larger_than_a_byte() {
        let at = |address, shift| Extent::of(&info(libc::BUS_MCEERR_AR, address, shift));
        let copy = inside([0x20_7f00; 2], 0x100);
        assert!(copy.is_ours(at(0x20_7000, 12)));
        assert!(!copy.is_ours(at(0x20_8000, 12)));
        assert!(!copy.is_ours(at(0x20_6fff, 12)));
        assert!(copy.is_ours(at(0x20_0000, 21)), "a huge page");
        assert!(!copy.is_ours(at(0x40_0000, 21)));
        // Nonsense is no panic.
        for shift in [-1, 64, i16::MAX] {
            let _ = copy.is_ours(at(usize::MAX, shift));
        }
    }

    /// What the handler does to the registers, without a signal.
    #[test]
    fn a_routine_ends_with_address_and_code() {
        // SAFETY: all-zero is a valid context.
        let mut context: ucontext_t = unsafe { std::mem::zeroed() };
        let poisoned = info(libc::BUS_MCEERR_AR, 0x7000, 12);
        // SAFETY: nobody else refers to it.
        let recovered = unsafe { recover((&raw mut context).cast(), &poisoned) };
        assert!(!recovered, "that is nowhere in a routine");
        assert_eq!(arch::interrupted(&context).pc, 0);

        arch::resume(&mut context, 5, 6, 7);
        let after = arch::interrupted(&context);
        assert_eq!((after.pc, after.places, after.len), (5, [0, 0], 0));
    }
}
