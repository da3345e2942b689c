//! Memory that goes from under checked accesses: they say so, and nothing dies.

// UNSAFETY: signal masks, a mapping of a file that is cut short, and poison.
#![expect(unsafe_code, reason = "faults and signal masks are what is tested")]

mod common;
#[expect(dead_code, reason = "other tests change the other setting")]
#[path = "common/setting.rs"]
mod setting;

use std::env;
use std::fs::{self, File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{ptr, slice, thread};

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, Error, ErrorKind, Found};
use gmem::failpoint::{FailPoint, arm};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, ContentPolicy, FilePlace, FolioPool, GuestMemfd, Visibility};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_get_seals, ftruncate, memfd_create,
};
use setting::{NR_HUGEPAGES, Setting};

const PAGE: u64 = 4096;
/// The first page that is gone.
const GONE: u64 = 5;

fn at(page: u64, byte: u64) -> Offset {
    Offset::new(page * PAGE + byte)
}

/// An object whose arena can be cut short, and who may do that.
struct Cut {
    pool: FolioPool,
    memfd: GuestMemfd,
    arena: File,
    _alone: MutexGuard<'static, ()>,
}

impl Cut {
    fn new() -> Self {
        Self::on(ArenaBacking::Memfd)
    }

    fn on(backing: ArenaBacking) -> Self {
        // There is to be only one such file in the process.
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let size = ByteSize::from_mib(2);
        let pool = {
            let _unsealed = arm(FailPoint::Seal, 0);
            FolioPool::new(backing, size).unwrap()
        };
        let builder = GuestMemfd::builder(size).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        memfd.write(at(0, 0), &[7; 2 << 20]).unwrap();
        Self { pool, memfd, arena: unsealed_arena(), _alone: alone }
    }

    fn shorten(&self) {
        self.arena.set_len(GONE * PAGE).unwrap();
    }
}

fn unsealed_arena() -> File {
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let is_arena = fs::read_link(&path)
            .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:gmem-arena"));
        let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else { continue };
        if is_arena && !fcntl_get_seals(&file).unwrap().contains(SealFlags::SHRINK) {
            return file;
        }
    }
    panic!("no arena of this process can be cut short");
}

fn is_gone<T: std::fmt::Debug>(outcome: Result<T, Error>, page: u64) {
    let error = outcome.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::MemoryFailure, Errno::EIO), "{error}");
    let culprit = error.culprit().unwrap();
    assert_eq!((culprit.offset, &culprit.found), (at(page, 0), &Found::Failed));
}

fn accesses_fail_where_memory_is_gone(memfd: &GuestMemfd) {
    for len in [1, 2, 3, 7, 8, 9, 31, 64, 500, 512, 600, 4000] {
        for skip in [0, 1, 4, 8] {
            let mut buf = vec![0; len];
            memfd.read(at(GONE - 1, skip), &mut buf).unwrap();
            assert!(buf.iter().all(|&byte| byte == 7));
            is_gone(memfd.read(at(GONE, skip), &mut buf), GONE);
            is_gone(memfd.write(at(GONE, skip), &buf), GONE);
        }
    }
    let mut pages = vec![0; 3 * 4096];
    is_gone(memfd.read(at(GONE - 2, 0), &mut pages), GONE);
    assert!(pages[..8192].iter().all(|&byte| byte == 7), "what came before it is there");
    let mut all = vec![0; 1 << 20];
    is_gone(memfd.read(at(GONE + 3, 0), &mut all), GONE + 3);
    is_gone(memfd.write(at(GONE - 1, 4095), &[7; 2]), GONE);
    is_gone(memfd.load_u64(at(GONE, 8)), GONE);
    is_gone(memfd.store_u64(at(GONE + 1, 16), 1), GONE + 1);
    memfd.store_u64(at(0, 0), 0x0707_0707_0707_0707).unwrap();
}

#[test]
fn a_file_that_is_cut_short_is_an_error_and_no_death() {
    let cut = Cut::new();
    cut.shorten();
    accesses_fail_where_memory_is_gone(&cut.memfd);
    let line = cut.memfd.read(at(GONE, 0), &mut [0; 8]).unwrap_err().to_string();
    assert_eq!(
        line,
        "read: the memory failed: subpage 0x5000 has failed: the pool's file has lost it \
         (BUS_ADRERR)"
    );

    // What comes back is zero, and all is well again.
    cut.arena.set_len(2 << 20).unwrap();
    let mut byte = [9];
    cut.memfd.read(at(GONE, 0), &mut byte).unwrap();
    assert_eq!(byte, [0]);
    cut.memfd.write(at(GONE, 0), &[7; 4096]).unwrap();
}

#[test]
fn every_thread_recovers_whatever_signals_it_blocks() {
    let cut = Cut::new();
    cut.shorten();
    let memfd = &cut.memfd;
    thread::scope(|scope| {
        for nr in 0..4 {
            scope.spawn(move || {
                if nr % 2 == 0 {
                    block_all();
                }
                for _ in 0..20 {
                    accesses_fail_where_memory_is_gone(memfd);
                }
                assert_eq!(blocks_sigbus(), nr % 2 == 0, "the mask is as it was");
            });
        }
    });
}

fn files_are_told_as_well(memfd: &GuestMemfd) {
    let loader = memfd.register_owner("loader").unwrap();
    let file = memfd_create("file", MemfdFlags::empty()).unwrap();
    ftruncate(&file, 3 * PAGE).unwrap();
    let (place, len) = (FilePlace::Position, ByteSize::from_pages(3));
    for done in [
        memfd.read_from_file(&file, place, at(6, 9), len, loader).unwrap(),
        memfd.write_to_file(&file, place, at(6, 9), len, loader).unwrap(),
    ] {
        assert_eq!(done.moved(), ByteSize::default());
        is_gone(Err::<(), _>(done.stopped().unwrap().clone()), 6);
    }
}

/// What needs no failpoint, but a host without a huge page to spare.
#[test]
fn a_hole_from_outside_that_nothing_is_left_to_fill_is_an_error_and_no_death() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "1");
    let cut = Cut::on(ArenaBacking::MemfdHugetlb2M);
    let size = 2 << 20;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&cut.arena, punch, 0, size).unwrap();
    let thief = memfd_create("thief", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    ftruncate(&thief, size).unwrap();
    fallocate(&thief, FallocateFlags::KEEP_SIZE, 0, size).unwrap();
    is_gone(cut.memfd.read(at(3, 5), &mut [0; 100]), 3);
    is_gone(cut.memfd.write(at(4, 0), &[0; 4096]), 4);
    is_gone(cut.memfd.load_u64(at(5, 0)), 5);
    files_are_told_as_well(&cut.memfd);
    drop(thief);
    let mut byte = [9];
    cut.memfd.read(at(3, 5), &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

/// Not even the stack for signals that Rust gives its threads.
#[test]
fn a_thread_without_a_stack_for_signals_recovers() {
    extern "C" fn run(memfd: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: the object outlives the thread, which is joined.
        let memfd = unsafe { &*memfd.cast::<GuestMemfd>() };
        let failed = memfd.read(at(GONE, 0), &mut [0; 64]).is_err();
        ptr::without_provenance_mut(usize::from(failed))
    }
    let cut = Cut::new();
    cut.shorten();
    let mut thread = MaybeUninit::uninit();
    let object = ptr::from_ref(&cut.memfd).cast_mut().cast();
    // SAFETY: the function takes the object, which outlives the thread.
    let started = unsafe { libc::pthread_create(thread.as_mut_ptr(), ptr::null(), run, object) };
    assert_eq!(started, 0);
    let mut result = ptr::null_mut();
    // SAFETY: written by the call above.
    let thread = unsafe { thread.assume_init() };
    // SAFETY: a thread that is joined once.
    unsafe { libc::pthread_join(thread, &raw mut result) };
    assert_eq!(result.addr(), 1);
}

#[test]
fn pages_that_cannot_be_zeroed_go_to_nobody() {
    let cut = Cut::new();
    cut.shorten();
    let pages = PgoffRange::new(Pgoff::new(GONE), 2).unwrap();
    let zeroed = cut.memfd.convert(pages, Visibility::Private, ContentPolicy::Zero);
    assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::Quarantined);
    let read = cut.memfd.read(at(GONE, 0), &mut [0; 8]);
    assert_eq!(read.unwrap_err().kind(), ErrorKind::Quarantined);
}

#[test]
fn a_folio_that_cannot_be_scrubbed_goes_to_nobody() {
    let cut = Cut::new();
    cut.shorten();
    let Cut { pool, memfd, _alone, .. } = cut;
    drop(memfd);
    assert_eq!(pool.scrub(), ByteSize::default());
    let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
    if let Ok(next) = builder.create(&pool) {
        let error = next.write(at(0, 0), b"x").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::MemoryFailure | ErrorKind::Exhausted), "{error}");
    }
}

/// Nor does somebody who wants a page of it scrub it for ever.
#[test]
fn of_a_folio_that_cannot_be_scrubbed_nobody_gets_a_page() {
    let Cut { pool, memfd, arena, _alone } = Cut::new();
    let lazy = pool.start_scrubber(ByteSize::default()).unwrap();
    drop(memfd);
    drop(lazy);
    assert_eq!(pool.stat().dirty, ByteSize::from_mib(2));
    arena.set_len(GONE * PAGE).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_bytes(8 * PAGE));
    let small = builder.folio_size(FolioSize::Base).initial(Visibility::Shared);
    let small = small.create(&pool).unwrap();
    let error = small.write(at(0, 0), b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    assert_eq!(pool.stat().quarantined, ByteSize::from_mib(2));
    // What is quarantined need have no memory.
    assert_eq!(audit::check(&pool, &[&small]).to_string(), "clean");
}

fn block_all() {
    let mut all = MaybeUninit::uninit();
    // SAFETY: fills the set, which lives until the call below is over.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set is filled; the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), ptr::null_mut()) };
}

fn blocks_sigbus() -> bool {
    let mut mask = MaybeUninit::uninit();
    // SAFETY: no set is given; the old one is written.
    unsafe { libc::pthread_sigmask(0, ptr::null(), mask.as_mut_ptr()) };
    // SAFETY: a set that the call above has written.
    unsafe { libc::sigismember(mask.as_ptr(), libc::SIGBUS) == 1 }
}

const CHILD: &str = "GMEM_TEST_SIGBUS_CHILD";
const HANDLED_BEFORE: i32 = 42;

/// What becomes of a copy of this process that runs `body`, from which it does not return.
fn fate(test: &str, body: impl FnOnce()) -> ExitStatus {
    if env::var_os(CHILD).is_some() {
        body();
        std::process::exit(3);
    }
    Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(CHILD, "1")
        .status()
        .unwrap()
}

/// A page of somebody else's file, which is gone.
fn foreign() -> &'static mut [u8] {
    let path = env::temp_dir().join(format!("gmem-foreign-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file.set_len(PAGE).unwrap();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: no address is asked for, so nothing that exists is replaced.
    let map =
        unsafe { libc::mmap(ptr::null_mut(), 4096, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(map, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    // SAFETY: mapped until the process ends. That a touch faults is what is tested.
    unsafe { slice::from_raw_parts_mut(map.cast(), 4096) }
}

fn object() -> GuestMemfd {
    let size = ByteSize::from_mib(2);
    let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
    GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap()
}

extern "C" fn earlier(_signal: libc::c_int) {
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(HANDLED_BEFORE) };
}

fn install_earlier() {
    let handler: extern "C" fn(libc::c_int) = earlier;
    // SAFETY: the handler is async-signal-safe.
    unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
}

/// The instruction is one of the library's, the memory is not: nobody may swallow that.
#[test]
fn a_buffer_of_the_caller_that_is_gone_is_the_callers_fault() {
    let fate = fate("a_buffer_of_the_caller_that_is_gone_is_the_callers_fault", || {
        object().read(at(0, 0), foreign()).unwrap();
    });
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

#[test]
fn and_goes_to_the_handler_that_stood_before_the_pool() {
    let fate = fate("and_goes_to_the_handler_that_stood_before_the_pool", || {
        install_earlier();
        object().write(at(0, 0), foreign()).unwrap();
    });
    assert_eq!(fate.code(), Some(HANDLED_BEFORE), "{fate}");
}

#[test]
fn so_does_a_signal_that_somebody_sends() {
    let fate = fate("so_does_a_signal_that_somebody_sends", || {
        install_earlier();
        let _object = object();
        // SAFETY: takes no pointers.
        unsafe { libc::raise(libc::SIGBUS) };
    });
    assert_eq!(fate.code(), Some(HANDLED_BEFORE), "{fate}");
}

#[test]
fn what_was_ignored_is_ignored_and_a_fault_kills_all_the_same() {
    let fate = fate("what_was_ignored_is_ignored_and_a_fault_kills_all_the_same", || {
        // SAFETY: ignoring takes no handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
        let object = object();
        // SAFETY: takes no pointers.
        unsafe { libc::raise(libc::SIGBUS) };
        object.write(at(0, 0), b"still here").unwrap();
        object.write(at(0, 0), foreign()).unwrap();
    });
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

/// It is the real thing, and costs a page of memory until the next boot.
#[test]
fn poisoned_memory_is_an_error_and_no_death() {
    if !common::require(Capability::Hwpoison) || !common::require(Capability::Uffd) {
        return;
    }
    let memfd = object();
    let view = memfd.map_view().unwrap();
    memfd.write(at(GONE, 0), &[7; 4096]).unwrap();
    let page = view.pointer(at(GONE, 0), ByteSize::from_pages(1)).unwrap();
    // SAFETY: a page of ours, to which there are no references.
    let poisoned = unsafe { libc::madvise(page.as_ptr().cast(), 4096, libc::MADV_HWPOISON) };
    assert_eq!(poisoned, 0, "{}", std::io::Error::last_os_error());
    let error = memfd.read(at(GONE, 100), &mut [0; 8]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::MemoryFailure, Errno::EHWPOISON));
    assert_eq!(error.culprit().unwrap().offset, at(GONE, 0));
    memfd.read(at(GONE - 1, 0), &mut [0; 8]).unwrap();
}
