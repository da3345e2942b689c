//! A VMM that decides what becomes of a touch of a view: what it is told, and what its answers do.
//! Each in a process of its own, whose handler it is.

// UNSAFETY: signal handlers, and raw pointers that fault.
#![expect(unsafe_code, reason = "faults and signal handlers are what is tested")]

mod common;

use std::collections::HashMap;
use std::env;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::{mem, ptr, thread};

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FaultAnswer, FaultCause, FaultReason, FolioPool, GuestMemfd,
    HostFault, HostView, PartSpec, SigbusHandler, Touch, Visibility, Zone,
};

const CHILD: &str = "GMEM_TEST_SIGBUS_CHILD";
const SURVIVED: i32 = 3;
const HANDLED_BEFORE: i32 = 42;
const IN_A_CIRCLE: i32 = 77;

/// What becomes of a copy of this process that runs `body`, from which it does not return; `None` if the
/// host has no userfaultfd.
fn fate(test: &str, body: impl FnOnce()) -> Option<ExitStatus> {
    if !common::require(Capability::Uffd) {
        return None;
    }
    if env::var_os(CHILD).is_some() {
        body();
        std::process::exit(SURVIVED);
    }
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(CHILD, "1")
        .status();
    Some(child.unwrap())
}

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn object(initial: Visibility) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(4)).initial(initial).create(&pool).unwrap();
    (pool, memfd)
}

fn read_raw(view: &HostView, at: u64) -> u8 {
    let at = view.pointer(Offset::new(at), ByteSize::from_bytes(1)).unwrap();
    // SAFETY: a valid address in a mapping of ours; what a fault does is what is tested.
    unsafe { at.as_ptr().read_volatile() }
}

fn write_raw(view: &HostView, at: u64, byte: u8) {
    let at = view.pointer(Offset::new(at), ByteSize::from_bytes(1)).unwrap();
    // SAFETY: as in `read_raw`; nobody else is at it.
    unsafe { at.as_ptr().write_volatile(byte) }
}

/// What the callback has written down, one place for each fault. Nothing that is not atomic.
struct Seen {
    object: AtomicU64,
    view: AtomicU64,
    hva: AtomicUsize,
    offset: AtomicU64,
    reason: AtomicU32,
    is_written: AtomicBool,
    may_retry: AtomicBool,
}

static SEEN: [Seen; 64] = [const {
    Seen {
        object: AtomicU64::new(0),
        view: AtomicU64::new(0),
        hva: AtomicUsize::new(0),
        offset: AtomicU64::new(0),
        reason: AtomicU32::new(0),
        is_written: AtomicBool::new(false),
        may_retry: AtomicBool::new(false),
    }
}; 64];
static NR_SEEN: AtomicUsize = AtomicUsize::new(0);

const REASONS: [FaultReason; 6] = [
    FaultReason::Private,
    FaultReason::Absent,
    FaultReason::Hole,
    FaultReason::NotShown,
    FaultReason::Quarantined,
    FaultReason::MemoryFailure,
];

fn pause() {
    // SAFETY: takes nothing; async-signal-safe on Linux.
    unsafe { libc::sched_yield() };
}

/// Writes down what it was told, and waits for another thread to do something about it.
fn wait_for_help(fault: &HostFault) -> FaultAnswer {
    let Some(seen) = SEEN.get(NR_SEEN.fetch_add(1, Ordering::SeqCst)) else {
        return FaultAnswer::PassOn;
    };
    seen.object.store(fault.object.as_u64(), Ordering::SeqCst);
    seen.view.store(fault.view.as_u64(), Ordering::SeqCst);
    seen.hva.store(fault.hva.get(), Ordering::SeqCst);
    seen.offset.store(fault.offset.get(), Ordering::SeqCst);
    let reason = REASONS.iter().position(|&reason| reason == fault.reason).unwrap_or(99);
    seen.reason.store(reason as u32, Ordering::SeqCst);
    seen.is_written.store(true, Ordering::SeqCst);
    while !seen.may_retry.load(Ordering::SeqCst) {
        pause();
    }
    FaultAnswer::Retry
}

fn decide_by(decide: fn(&HostFault) -> FaultAnswer) -> SigbusHandler {
    let handler = SigbusHandler::install().unwrap();
    // SAFETY: every callback here loads and stores atomics and yields, and no more.
    unsafe { handler.decide_by(decide) };
    handler
}

/// Waits for the fault number `nr`, checks it, lets `help` do something, and lets the thread go on.
fn help(nr: usize, wanted: impl Fn(&Seen), help: impl FnOnce(&Seen)) {
    let seen = &SEEN[nr];
    while !seen.is_written.load(Ordering::SeqCst) {
        pause();
    }
    wanted(seen);
    help(seen);
    seen.may_retry.store(true, Ordering::SeqCst);
}

fn reason(seen: &Seen) -> FaultReason {
    REASONS[seen.reason.load(Ordering::SeqCst) as usize]
}

#[test]
fn several_threads_are_told_what_they_touched_and_go_on_when_it_is_shared() {
    let test = "several_threads_are_told_what_they_touched_and_go_on_when_it_is_shared";
    let Some(fate) = fate(test, || {
        decide_by(wait_for_help);
        let objects = [(); 3].map(|()| object(Visibility::Shared).1);
        for memfd in &objects {
            memfd.write(Offset::new(0), &[7; 2 << 20]).unwrap();
            let all = memfd.pages();
            let _ = memfd.convert(all, Visibility::Private, ContentPolicy::Preserve).unwrap();
        }
        let views: Vec<_> =
            objects.iter().flat_map(|memfd| [(); 2].map(|()| memfd.map_view().unwrap())).collect();
        thread::scope(|scope| {
            for (nr, view) in views.iter().enumerate() {
                let at = (nr as u64 + 1) * 4096 + 5;
                scope.spawn(move || assert_eq!(read_raw(view, at), 7));
            }
            let mut left: HashMap<_, _> =
                views.iter().map(|view| (view.id().as_u64(), view)).collect();
            for nr in 0..views.len() {
                let convert = |seen: &Seen| {
                    let view = left.remove(&seen.view.load(Ordering::SeqCst)).unwrap();
                    let nr = views.iter().position(|it| it.id() == view.id()).unwrap() as u64;
                    assert_eq!(seen.object.load(Ordering::SeqCst), view.memfd().id().as_u64());
                    let offset = Offset::new(seen.offset.load(Ordering::SeqCst));
                    assert_eq!(offset, Offset::new((nr + 1) * 4096 + 5));
                    let hva = view.hva_of(offset).unwrap().get();
                    assert_eq!(seen.hva.load(Ordering::SeqCst), hva);
                    let page = PgoffRange::single(offset.pgoff()).unwrap();
                    let to = Visibility::Shared;
                    let _ = view.memfd().convert(page, to, ContentPolicy::Preserve).unwrap();
                };
                help(nr, |seen| assert_eq!(reason(seen), FaultReason::Private), convert);
            }
        });
        assert_eq!(NR_SEEN.load(Ordering::SeqCst), 6, "each touch is asked about once");
    }) else {
        return;
    };
    assert_eq!(fate.code(), Some(SURVIVED), "{fate}");
}

#[test]
fn holes_and_absent_pages_are_told_apart() {
    let Some(fate) = fate("holes_and_absent_pages_are_told_apart", || {
        let handler = decide_by(wait_for_help);
        let (_pool, memfd) = object(Visibility::Shared);
        let view = memfd.map_view().unwrap();
        memfd.write(Offset::new(0), &[7; 4096]).unwrap();
        memfd.punch_hole(range(3, 2)).unwrap();
        memfd.punch_hole(range(512, 512)).unwrap();
        let _ = memfd.convert(range(9, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
        for (page, reason) in
            [(3, FaultReason::Hole), (512, FaultReason::Absent), (9, FaultReason::Private)]
        {
            for access in [Access::Read, Access::Write] {
                let touch = view.touch(handler, Offset::new(page * 4096 + 1), access).unwrap();
                let Touch::Fault(fault) = touch else { panic!("{page} is there") };
                assert_eq!((fault.reason, fault.cause), (reason, FaultCause::NotMapped));
                assert_eq!((fault.object, fault.view), (memfd.id(), view.id()));
                assert_eq!(fault.offset, Offset::new(page * 4096 + 1));
            }
        }
        assert_eq!(NR_SEEN.load(Ordering::SeqCst), 0, "a touch is nobody's business");
        thread::scope(|scope| {
            scope.spawn(|| {
                write_raw(&view, 4 * 4096, 1);
                write_raw(&view, 600 * 4096, 2);
            });
            let allocate = |page| memfd.allocate(range(page, 1)).unwrap();
            help(0, |seen| assert_eq!(reason(seen), FaultReason::Hole), |_| allocate(4));
            help(1, |seen| assert_eq!(reason(seen), FaultReason::Absent), |_| allocate(600));
        });
        let mut byte = [0];
        memfd.read(Offset::new(600 * 4096), &mut byte).unwrap();
        assert_eq!((byte, read_raw(&view, 4 * 4096)), ([2], 1));
    }) else {
        return;
    };
    assert_eq!(fate.code(), Some(SURVIVED), "{fate}");
}

static RAW: AtomicUsize = AtomicUsize::new(0);

/// The handler of another signal, which touches a view.
extern "C" fn touches_a_view(_signal: libc::c_int) {
    let at = ptr::with_exposed_provenance::<u8>(RAW.load(Ordering::SeqCst));
    // SAFETY: an address in a view that lives as long as the test.
    let byte = unsafe { at.read_volatile() };
    RAW.store(usize::from(byte), Ordering::SeqCst);
}

#[test]
fn a_fault_inside_of_another_handler_is_asked_about_too() {
    let Some(fate) = fate("a_fault_inside_of_another_handler_is_asked_about_too", || {
        decide_by(wait_for_help);
        let (_pool, memfd) = object(Visibility::Shared);
        memfd.write(Offset::new(0), &[9; 4096]).unwrap();
        let view = memfd.map_view().unwrap();
        let _ = memfd.convert(range(0, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
        RAW.store(view.hva().get(), Ordering::SeqCst);
        let handler: extern "C" fn(libc::c_int) = touches_a_view;
        // SAFETY: the handler is async-signal-safe.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        thread::scope(|scope| {
            // SAFETY: takes no pointers.
            scope.spawn(|| unsafe { libc::raise(libc::SIGUSR1) });
            let to = Visibility::Shared;
            help(0, |_| {}, |_| drop(memfd.convert(range(0, 1), to, ContentPolicy::Preserve)));
        });
        assert_eq!(RAW.load(Ordering::SeqCst), 9);
    }) else {
        return;
    };
    assert_eq!(fate.code(), Some(SURVIVED), "{fate}");
}

fn pass_on(_: &HostFault) -> FaultAnswer {
    NR_SEEN.fetch_add(1, Ordering::SeqCst);
    FaultAnswer::PassOn
}

fn never(_: &HostFault) -> FaultAnswer {
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(IN_A_CIRCLE) };
}

#[test]
fn what_is_passed_on_kills_where_nobody_stood_before() {
    let Some(fate) = fate("what_is_passed_on_kills_where_nobody_stood_before", || {
        decide_by(pass_on);
        let (_pool, memfd) = object(Visibility::Private);
        read_raw(&memfd.map_view().unwrap(), 0);
    }) else {
        return;
    };
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

/// A page of somebody else's file, which is gone.
fn foreign() -> *mut u8 {
    let path = env::temp_dir().join(format!("gmem-foreign-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(4096).unwrap();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: no address is asked for, so nothing that exists is replaced.
    let map =
        unsafe { libc::mmap(ptr::null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(map, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    map.cast()
}

static FOREIGN: AtomicUsize = AtomicUsize::new(0);

/// Makes sure that it is called as the kernel would call it.
extern "C" fn earlier(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what a handler with SA_SIGINFO is passed.
    let info = unsafe { &*info };
    // SAFETY: this is a fault.
    let address = unsafe { info.si_addr() }.addr();
    let mut mask = mem::MaybeUninit::uninit();
    // SAFETY: no set is given; the old one is written.
    unsafe { libc::pthread_sigmask(0, ptr::null(), mask.as_mut_ptr()) };
    // SAFETY: a set that the call above has written.
    let mask = unsafe { mask.assume_init() };
    // SAFETY: a valid set.
    let blocks = |signal| unsafe { libc::sigismember(&raw const mask, signal) == 1 };
    let as_wanted = signal == libc::SIGBUS
        && info.si_code == libc::BUS_ADRERR
        && address == FOREIGN.load(Ordering::SeqCst)
        && !context.is_null()
        && blocks(libc::SIGUSR2)
        && blocks(libc::SIGBUS)
        && !blocks(libc::SIGUSR1);
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(if as_wanted { HANDLED_BEFORE } else { 1 }) };
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler that blocks SIGUSR2; what stood before it.
fn install(handler: Handler) -> libc::sigaction {
    // SAFETY: all-zero is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: a valid set and signal.
    unsafe { libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR2) };
    let mut before = mem::MaybeUninit::uninit();
    // SAFETY: both live through the call, and the handlers here are async-signal-safe.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr()) };
    assert_eq!(done, 0);
    // SAFETY: written by the call.
    unsafe { before.assume_init() }
}

#[test]
fn a_foreign_fault_is_not_asked_about_and_goes_on_as_it_came() {
    let Some(fate) = fate("a_foreign_fault_is_not_asked_about_and_goes_on_as_it_came", || {
        install(earlier);
        let (_pool, memfd) = object(Visibility::Private);
        let _view = memfd.map_view().unwrap();
        decide_by(never);
        let at = foreign().wrapping_add(17);
        FOREIGN.store(at.addr(), Ordering::SeqCst);
        // SAFETY: mapped; the fault is what is wanted.
        std::hint::black_box(unsafe { at.read_volatile() });
    }) else {
        return;
    };
    assert_eq!(fate.code(), Some(HANDLED_BEFORE), "{fate}");
}

#[test]
fn a_foreign_fault_kills_where_nobody_stood_before() {
    let Some(fate) = fate("a_foreign_fault_kills_where_nobody_stood_before", || {
        let (_pool, memfd) = object(Visibility::Private);
        let _view = memfd.map_view().unwrap();
        decide_by(never);
        // SAFETY: mapped; the fault is what is wanted.
        std::hint::black_box(unsafe { foreign().read_volatile() });
    }) else {
        return;
    };
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

#[test]
fn a_foreign_segfault_kills_where_nobody_stood_before() {
    let Some(fate) = fate("a_foreign_segfault_kills_where_nobody_stood_before", || {
        let (_pool, memfd) = object(Visibility::Private);
        let _view = memfd.map_view().unwrap();
        decide_by(never);
        let map = foreign();
        // SAFETY: a mapping of ours, which nobody has a reference to.
        assert_eq!(unsafe { libc::mprotect(map.cast(), 4096, libc::PROT_NONE) }, 0);
        // SAFETY: mapped; the fault is what is wanted.
        std::hint::black_box(unsafe { map.read_volatile() });
    }) else {
        return;
    };
    assert_eq!(fate.signal(), Some(libc::SIGSEGV), "{fate}");
}

fn again(fault: &HostFault) -> FaultAnswer {
    let page_is_right = fault.offset.pgoff() == Pgoff::new(3);
    let may_be = matches!(fault.cause, FaultCause::NotMapped | FaultCause::Inaccessible);
    if !may_be || !page_is_right {
        // SAFETY: async-signal-safe, and does not return.
        unsafe { libc::_exit(1) };
    }
    NR_SEEN.fetch_add(1, Ordering::SeqCst);
    FaultAnswer::Retry
}

/// While a folio moves the fault is a SIGSEGV for a moment, which goes the same way.
#[test]
fn a_folio_that_moves_under_raw_pointers_is_asked_about_and_they_go_on() {
    let Some(fate) =
        fate("a_folio_that_moves_under_raw_pointers_is_asked_about_and_they_go_on", || {
            decide_by(again);
            let part = || PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(2));
            let builder = FolioPool::builder().part(part(), Zone::Normal);
            let pool = builder.part(part(), Zone::Movable).create().unwrap();
            let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
            let memfd = builder.zones(&[Zone::Normal, Zone::Movable]).create(&pool).unwrap();
            let view = memfd.map_view().unwrap();
            let is_over = AtomicBool::new(false);
            thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut nr = 0_u8;
                    while !is_over.load(Ordering::SeqCst) {
                        nr = nr.wrapping_add(1);
                        write_raw(&view, 3 << 12, nr);
                        assert_eq!(read_raw(&view, 3 << 12), nr);
                    }
                });
                for to in [Zone::Movable, Zone::Normal].into_iter().cycle().take(400) {
                    assert!(memfd.migrate(memfd.pages(), to).unwrap().refused.is_empty());
                }
                is_over.store(true, Ordering::SeqCst);
                writer.join().unwrap();
            });
            assert!(NR_SEEN.load(Ordering::SeqCst) > 0);
        })
    else {
        return;
    };
    assert_eq!(fate.code(), Some(SURVIVED), "{fate}");
}

fn never_unless_inaccessible(fault: &HostFault) -> FaultAnswer {
    match fault.cause {
        FaultCause::Inaccessible => pass_on(fault),
        _ => never(fault),
    }
}

/// Somebody else may do that, and the callback can tell it from what is private.
#[test]
fn a_page_that_somebody_has_protected_is_not_taken_for_a_private_one() {
    let test = "a_page_that_somebody_has_protected_is_not_taken_for_a_private_one";
    let Some(fate) = fate(test, || {
        let handler = decide_by(never_unless_inaccessible);
        let (_pool, memfd) = object(Visibility::Shared);
        let view = memfd.map_view().unwrap();
        let at = view.pointer(Offset::new(0), ByteSize::from_bytes(4096)).unwrap().as_ptr();
        // SAFETY: a page of a view, to which there are no references.
        assert_eq!(unsafe { libc::mprotect(at.cast(), 4096, libc::PROT_NONE) }, 0);
        let touch = view.touch(handler, Offset::new(5), Access::Read).unwrap();
        let Touch::Fault(fault) = touch else { panic!("{touch:?}") };
        assert_eq!((fault.cause, fault.reason), (FaultCause::Inaccessible, FaultReason::NotShown));
        read_raw(&view, 5);
    }) else {
        return;
    };
    assert_eq!(fate.signal(), Some(libc::SIGSEGV), "{fate}");
}

static BEFORE: AtomicUsize = AtomicUsize::new(0);
static NR_CALLS: AtomicUsize = AtomicUsize::new(0);

/// Chains to whatever stood before it, which may be the library.
extern "C" fn chains(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if NR_CALLS.fetch_add(1, Ordering::SeqCst) > 0 {
        // SAFETY: async-signal-safe, and does not return.
        unsafe { libc::_exit(IN_A_CIRCLE) };
    }
    let before = ptr::with_exposed_provenance::<()>(BEFORE.load(Ordering::SeqCst));
    // SAFETY: what stood before takes a siginfo.
    let before = unsafe { mem::transmute::<*const (), Handler>(before) };
    before(signal, info, context);
}

#[test]
fn handlers_that_chain_to_each_other_do_not_go_round_in_circles() {
    let Some(fate) = fate("handlers_that_chain_to_each_other_do_not_go_round_in_circles", || {
        let (_pool, memfd) = object(Visibility::Private);
        let view = memfd.map_view().unwrap();
        let before = install(chains);
        BEFORE.store(before.sa_sigaction, Ordering::SeqCst);
        let handler = decide_by(pass_on);
        let touch = view.touch(handler, Offset::new(0), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Fault(_)), "in front of the one that came later");
        let touched = SigbusHandler::install().unwrap();
        assert!(matches!(view.touch(touched, Offset::new(0), Access::Read), Ok(Touch::Fault(_))));
        read_raw(&view, 0);
    }) else {
        return;
    };
    // The callback is asked once, then the other handler, then the library's first entry, then nobody.
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

#[test]
fn a_handler_that_replaces_the_librarys_and_chains_leaves_accesses_as_they_were() {
    let test = "a_handler_that_replaces_the_librarys_and_chains_leaves_accesses_as_they_were";
    let Some(fate) = fate(test, || {
        let handler = decide_by(pass_on);
        let (_pool, memfd) = object(Visibility::Private);
        let view = memfd.map_view().unwrap();
        let before = install(chains);
        BEFORE.store(before.sa_sigaction, Ordering::SeqCst);
        let touch = view.touch(handler, Offset::new(0), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Fault(_)));
    }) else {
        return;
    };
    assert_eq!(fate.code(), Some(SURVIVED), "{fate}");
}

fn faults_itself(_: &HostFault) -> FaultAnswer {
    let at = ptr::with_exposed_provenance::<u8>(RAW.load(Ordering::SeqCst));
    // SAFETY: mapped; the fault is what is wanted.
    std::hint::black_box(unsafe { at.read_volatile() });
    FaultAnswer::Retry
}

#[test]
fn a_callback_that_faults_kills() {
    let Some(fate) = fate("a_callback_that_faults_kills", || {
        RAW.store(foreign().expose_provenance(), Ordering::SeqCst);
        decide_by(faults_itself);
        let (_pool, memfd) = object(Visibility::Private);
        read_raw(&memfd.map_view().unwrap(), 0);
    }) else {
        return;
    };
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}
