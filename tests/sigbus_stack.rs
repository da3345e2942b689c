//! The handler beside handlers of other signals: the alternate stack that Rust gives its threads has room for two
//! at most, and a handler that asked for none runs on it all the same if it is in use.

// UNSAFETY: signal handlers and their stacks.
#![expect(unsafe_code, reason = "signal handlers and their stacks are what is tested")]

#[path = "common/arenas.rs"]
mod arenas;
#[path = "common/child.rs"]
mod child;
mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{mem, ptr, thread};

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::error::ErrorKind;
use gmem::failpoint::{FailPoint, arm};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FaultAnswer, FolioPool, GuestMemfd, HostFault, SigbusHandler,
    Visibility,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const SIGNALS: [libc::c_int; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM];
/// The first page that is gone.
const GONE: u64 = 5;

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

fn install(signal: libc::c_int, handler: Handler, flags: libc::c_int, blocked: &[libc::c_int]) {
    // SAFETY: all-zero is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | flags;
    for &signal in blocked {
        // SAFETY: a valid set and signal.
        unsafe { libc::sigaddset(&raw mut action.sa_mask, signal) };
    }
    // SAFETY: the action lives through the call, and the handlers here are async-signal-safe.
    assert_eq!(unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) }, 0);
}

fn shared_object() -> GuestMemfd {
    let size = ByteSize::from_mib(2);
    let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
    memfd.write(Offset::new(0), &[7; 2 << 20]).unwrap();
    memfd
}

/// One whose file has lost all but the first pages.
fn cut_object() -> GuestMemfd {
    let memfd = {
        let _unsealed = arm(FailPoint::Seal, 0);
        shared_object()
    };
    for arena in arenas::of_size(2 << 20) {
        arena.set_len(GONE << 12).unwrap();
    }
    memfd
}

fn read_what_is_gone(memfd: &GuestMemfd) {
    let error = memfd.read(Offset::new((GONE + 2) << 12), &mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MemoryFailure);
}

static NR_COUNTED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    NR_COUNTED.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn accesses_recover_in_a_storm_of_signals() {
    child::alone("accesses_recover_in_a_storm_of_signals", || {
        SIGNALS.iter().for_each(|&signal| install(signal, count, 0, &[]));
        let memfd = &cut_object();
        let is_over = &AtomicBool::new(false);
        thread::scope(|scope| {
            let readers = [(); 3].map(|()| {
                let (tell, told) = mpsc::channel();
                scope.spawn(move || {
                    // SAFETY: takes nothing.
                    tell.send(unsafe { libc::pthread_self() }).unwrap();
                    while !is_over.load(Ordering::SeqCst) {
                        read_what_is_gone(memfd);
                    }
                });
                told.recv().unwrap()
            });
            let end = Instant::now() + Duration::from_secs(3);
            while Instant::now() < end {
                for (&reader, signal) in readers.iter().flat_map(|it| SIGNALS.map(|nr| (it, nr))) {
                    // SAFETY: a thread that goes on until it is told that it is over.
                    assert_eq!(unsafe { libc::pthread_kill(reader, signal) }, 0);
                }
                thread::sleep(Duration::from_micros(50));
            }
            is_over.store(true, Ordering::SeqCst);
        });
        assert!(NR_COUNTED.load(Ordering::SeqCst) > 1000);
    });
}

fn is_on_alternate_stack() -> bool {
    let mut stack = mem::MaybeUninit::<libc::stack_t>::uninit();
    // SAFETY: nothing is set; the stack is written.
    assert_eq!(unsafe { libc::sigaltstack(ptr::null(), stack.as_mut_ptr()) }, 0);
    // SAFETY: written by the call.
    unsafe { stack.assume_init() }.ss_flags & libc::SS_ONSTACK != 0
}

static NR_NESTED: AtomicUsize = AtomicUsize::new(0);
static MAY_GO_ON: AtomicBool = AtomicBool::new(false);
static IS_ASKED: AtomicBool = AtomicBool::new(false);

/// Waits for another thread, among signals.
fn wait_among_signals(_: &HostFault) -> FaultAnswer {
    for signal in SIGNALS {
        // SAFETY: async-signal-safe, and takes no pointers.
        unsafe { libc::raise(signal) };
    }
    NR_NESTED.store(NR_COUNTED.load(Ordering::SeqCst), Ordering::SeqCst);
    IS_ASKED.store(true, Ordering::SeqCst);
    while !MAY_GO_ON.load(Ordering::SeqCst) {
        // SAFETY: takes nothing; async-signal-safe on Linux.
        unsafe { libc::sched_yield() };
    }
    FaultAnswer::Retry
}

#[test]
fn signals_wait_until_the_callback_has_answered() {
    if !common::require(Capability::Uffd) {
        return;
    }
    child::alone("signals_wait_until_the_callback_has_answered", || {
        SIGNALS.iter().for_each(|&signal| install(signal, count, 0, &[]));
        let memfd = shared_object();
        let view = memfd.map_view().unwrap();
        let page = PgoffRange::single(Pgoff::new(3)).unwrap();
        let convert = |to| {
            let _ = memfd.convert(page, to, ContentPolicy::Preserve).unwrap();
        };
        convert(Visibility::Private);
        // SAFETY: it raises signals, yields, and uses atomics.
        unsafe { SigbusHandler::install().unwrap().decide_by(wait_among_signals) };
        thread::scope(|scope| {
            let toucher = scope.spawn(|| {
                let at = view.pointer(page.start_offset(), ByteSize::from_bytes(1)).unwrap();
                // SAFETY: a valid address in a mapping of ours.
                let byte = unsafe { at.as_ptr().read_volatile() };
                (byte, NR_COUNTED.load(Ordering::SeqCst))
            });
            while !IS_ASKED.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            convert(Visibility::Shared);
            MAY_GO_ON.store(true, Ordering::SeqCst);
            assert_eq!(toucher.join().unwrap(), (7, SIGNALS.len()), "they came then");
        });
        assert_eq!(NR_NESTED.load(Ordering::SeqCst), 0, "none came while it was at work");
    });
}

/// What a handler that stood before has found: whether on the alternate stack, and which signals were blocked.
static FOUND: Mutex<Option<(bool, Vec<libc::c_int>)>> = Mutex::new(None);

/// Looks around, and maps something where the fault was. Not for the world outside of tests: it locks and allocates.
extern "C" fn mend(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let mut mask = mem::MaybeUninit::uninit();
    // SAFETY: no set is given; the old one is written.
    unsafe { libc::pthread_sigmask(0, ptr::null(), mask.as_mut_ptr()) };
    // SAFETY: a set that the call above has written.
    let mask = unsafe { mask.assume_init() };
    // SAFETY: a valid set and signal.
    let is_blocked = |&signal: &_| unsafe { libc::sigismember(&raw const mask, signal) == 1 };
    let blocked = (1..32).filter(is_blocked).collect();
    *FOUND.lock().unwrap() = Some((is_on_alternate_stack(), blocked));
    // SAFETY: what a handler with SA_SIGINFO is passed for a fault.
    let info = unsafe { &*info };
    // SAFETY: a fault has an address.
    let page = unsafe { info.si_addr() }.map_addr(|at| at & !4095);
    let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the page is the test's, and nobody has references to it.
    unsafe { libc::mmap(page, 4096, prot, flags | libc::MAP_FIXED, -1, 0) };
}

/// A page of a file that has none.
fn foreign() -> *mut u8 {
    let file = memfd_create("foreign", MemfdFlags::empty()).unwrap();
    ftruncate(&file, 0).unwrap();
    let (prot, fd) = (libc::PROT_READ, file.as_raw_fd());
    // SAFETY: no address is asked for, so nothing that exists is replaced.
    let map = unsafe { libc::mmap(ptr::null_mut(), 4096, prot, libc::MAP_SHARED, fd, 0) };
    assert_ne!(map, libc::MAP_FAILED);
    map.cast()
}

/// What the handler with these flags and this mask finds, when a thread that blocks SIGHUP faults.
fn found(flags: libc::c_int, blocked: &[libc::c_int], is_under_ours: bool) -> (bool, Vec<i32>) {
    install(libc::SIGBUS, mend, flags, blocked);
    if is_under_ours {
        SigbusHandler::install().unwrap();
    }
    thread::spawn(|| {
        let mut hangup = mem::MaybeUninit::uninit();
        // SAFETY: writes the set.
        unsafe { libc::sigemptyset(hangup.as_mut_ptr()) };
        // SAFETY: a set that the call above has written, and a valid signal.
        unsafe { libc::sigaddset(hangup.as_mut_ptr(), libc::SIGHUP) };
        // SAFETY: as above; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, hangup.as_ptr(), ptr::null_mut()) };
        // SAFETY: mapped; the fault is what is wanted.
        assert_eq!(unsafe { foreign().read_volatile() }, 0);
    })
    .join()
    .unwrap();
    FOUND.lock().unwrap().take().unwrap()
}

#[test]
fn who_stood_before_is_called_as_the_kernel_would_have_called_it() {
    child::alone("who_stood_before_is_called_as_the_kernel_would_have_called_it", || {
        let _object = shared_object();
        let masks: [&[libc::c_int]; 3] = [&[], &[libc::SIGUSR2], &[libc::SIGUSR2, libc::SIGBUS]];
        let with = |flags| masks.map(|blocked| (flags, blocked));
        // Seven, since the library's stands eight times at most.
        let each = [with(0), with(libc::SA_NODEFER)].concat();
        for (flags, blocked) in each.into_iter().chain([(libc::SA_ONSTACK, masks[1])]) {
            let by_kernel = found(flags, blocked, false);
            assert_eq!(by_kernel.0, flags == libc::SA_ONSTACK);
            assert!(by_kernel.1.contains(&libc::SIGHUP));
            assert_eq!(found(flags, blocked, true), by_kernel, "{flags:#x} {blocked:?}");
        }
    });
}

/// How much of an alternate stack is not as it was after `run`.
fn stack_used_by(run: impl FnOnce()) -> usize {
    const PAINT: u8 = 0xa5;
    let mut memory = vec![PAINT; 64 << 10];
    let (ss_sp, ss_size) = (memory.as_mut_ptr().cast(), memory.len());
    let stack = libc::stack_t { ss_sp, ss_size, ss_flags: 0 };
    let mut before = mem::MaybeUninit::uninit();
    // SAFETY: the memory lives until the one before is put back.
    assert_eq!(unsafe { libc::sigaltstack(&raw const stack, before.as_mut_ptr()) }, 0);
    run();
    // SAFETY: written by the call above.
    assert_eq!(unsafe { libc::sigaltstack(before.as_ptr(), ptr::null_mut()) }, 0);
    memory.len() - memory.iter().take_while(|&&byte| byte == PAINT).count()
}

/// What the kernel puts there is a matter of the machine, and most of it.
#[test]
fn the_handler_takes_little_of_the_stack() {
    child::alone("the_handler_takes_little_of_the_stack", || {
        let memfd = cut_object();
        install(libc::SIGUSR1, count, libc::SA_ONSTACK, &[]);
        // SAFETY: takes no pointers.
        let by_kernel = stack_used_by(|| assert_eq!(unsafe { libc::raise(libc::SIGUSR1) }, 0));
        let all = stack_used_by(|| read_what_is_gone(&memfd));
        println!("{by_kernel} by the kernel, {} by the handler", all - by_kernel);
        assert!(all - by_kernel < 2048, "{by_kernel}, {all}");
    });
}
