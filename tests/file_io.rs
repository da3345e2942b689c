//! Files straight into guest memory and back, and why one pins before the kernel does.

// UNSAFETY: io_uring, and signals to a thread that reads.
#![expect(
    unsafe_code,
    reason = "a buffer of the kernel's, and an interrupted read, are what is tested"
)]

mod common;
#[path = "common/uring.rs"]
mod uring;

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FilePlace, FolioPool, GuestMemfd, OwnerTag, PinMode, Visibility,
};
use uring::Uring;

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const START: FilePlace = FilePlace::At(ByteSize::from_bytes(0));

struct World {
    pool: FolioPool,
    memfd: GuestMemfd,
    loader: OwnerTag,
}

fn world(backing: ArenaBacking, folio_size: FolioSize) -> World {
    let pool = FolioPool::new(backing, ByteSize::from_mib(12)).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(8))
        .folio_size(folio_size)
        .initial(Visibility::Shared)
        .create(&pool)
        .unwrap();
    let loader = memfd.register_owner("loader").unwrap();
    World { pool, memfd, loader }
}

fn page(at: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(at), nr_pages).unwrap()
}

fn bytes(number: u64) -> ByteSize {
    ByteSize::from_bytes(number)
}

/// Beside the test's own executable: `/tmp` may be a file system without O_DIRECT.
fn path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let nr = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut path = std::env::current_exe().unwrap();
    path.set_file_name(format!("gmem-file-io-{}-{nr}", std::process::id()));
    path
}

fn file(content: &[u8], flags: i32) -> File {
    let path = path();
    std::fs::write(&path, content).unwrap();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    std::fs::remove_file(path).unwrap();
    file.unwrap()
}

fn noise(len: usize) -> Vec<u8> {
    let mut word = 0x9e37_79b9_u32;
    let next = |_| {
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        word as u8
    };
    (0..len).map(next).collect()
}

#[test]
fn what_goes_in_comes_out_whatever_it_is_cut_into() {
    for (backing, size) in [
        (ArenaBacking::Memfd, FolioSize::Huge2M),
        (ArenaBacking::Memfd, FolioSize::Base),
        (ArenaBacking::Heap, FolioSize::Huge2M),
        (ArenaBacking::Heap, FolioSize::Base),
    ] {
        let World { pool, memfd, loader } = world(backing, size);
        let content = noise(5 << 20);
        let source = file(&content, 0);
        for (at, skip, len) in
            [(0, 0, 5 << 20), (4095, 1, 2), (0x1f_fff0, 17, 0x20), (77, 99, 3_000_001)]
        {
            let place = FilePlace::At(bytes(skip));
            let done =
                memfd.read_from_file(&source, place, Offset::new(at), bytes(len), loader).unwrap();
            assert!(done.is_complete() && done.stopped().is_none(), "{done:?}");
            let expected = &content[skip as usize..(skip + len) as usize];
            let mut seen = vec![0; len as usize];
            memfd.read(Offset::new(at), &mut seen).unwrap();
            assert!(seen == expected, "{backing} {at:#x}");
            let target = file(&[], 0);
            let place = FilePlace::At(bytes(5));
            let done =
                memfd.write_to_file(&target, place, Offset::new(at), bytes(len), loader).unwrap();
            assert!(done.is_complete());
            seen.fill(0);
            target.read_exact_at(&mut seen, 5).unwrap();
            assert!(seen == expected, "{backing} {at:#x}");
        }
        assert_eq!(memfd.stat().pinned, bytes(0), "nothing stays pinned");
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    }
}

#[test]
fn a_file_that_ends_early_says_how_far_it_came() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let mut source = file(&noise(5000), 0);
    let at = Offset::new(100);
    let done = memfd.read_from_file(&source, START, at, bytes(1 << 20), loader).unwrap();
    assert_eq!((done.moved(), done.stopped(), done.is_complete()), (bytes(5000), None, false));
    // By position, which the call above left alone, and which moves on.
    source.seek(SeekFrom::Start(4000)).unwrap();
    for expected in [900, 100, 0] {
        let done =
            memfd.read_from_file(&source, FilePlace::Position, at, bytes(900), loader).unwrap();
        assert_eq!(done.moved(), bytes(expected));
    }
    let none = memfd.read_from_file(&source, START, at, bytes(0), loader).unwrap();
    assert!(none.is_complete());
    for (at, len) in [(8 << 20, 1), (u64::MAX, 1), (0, (8 << 20) + 1), (0, u64::MAX)] {
        let refused = memfd.read_from_file(&source, START, Offset::new(at), bytes(len), loader);
        assert_eq!(refused.unwrap_err().errno(), Errno::EINVAL);
    }
    let beyond = FilePlace::At(bytes(u64::MAX - 5));
    let refused = memfd.read_from_file(&source, beyond, at, bytes(4), loader);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Overflow);
}

#[test]
fn pages_without_memory_get_some_or_are_zeroes() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    // Nothing there at all: written as zeroes, and nothing is allocated for that.
    let target = file(&[1; 100], 0);
    let done = memfd.write_to_file(&target, START, Offset::new(0), bytes(5 << 20), loader).unwrap();
    assert!(done.is_complete());
    assert_eq!(memfd.stat().resident, bytes(0));
    assert_eq!(target.metadata().unwrap().len(), 5 << 20);
    let mut seen = vec![1; 5 << 20];
    target.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0));
    // Holes between pages that are there.
    memfd.write(Offset::new(0), &[7; 64 << 12]).unwrap();
    for at in (0..64).step_by(2) {
        memfd.punch_hole(page(at, 1)).unwrap();
    }
    let _ = memfd.write_to_file(&target, START, Offset::new(0), bytes(64 << 12), loader).unwrap();
    target.read_exact_at(&mut seen, 0).unwrap();
    let is_right = |(at, &byte): (usize, &u8)| byte == if at >> 12 & 1 == 1 { 7 } else { 0 };
    assert!(seen[..64 << 12].iter().enumerate().all(is_right));
    // And filled.
    let content = noise(64 << 12);
    let done = memfd
        .read_from_file(file(&content, 0), START, Offset::new(0), bytes(64 << 12), loader)
        .unwrap();
    assert!(done.is_complete());
    assert_eq!(memfd.stat().holes, bytes(0));
    let mut seen = vec![0; 64 << 12];
    memfd.read(Offset::new(0), &mut seen).unwrap();
    assert!(seen == content);
}

#[test]
fn past_the_page_cache_as_well() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let content = noise(3 << 20);
    let source = file(&content, libc::O_DIRECT);
    let len = bytes(3 << 20);
    let done = memfd.read_from_file(&source, START, Offset::new(4096), len, loader).unwrap();
    assert!(done.is_complete(), "{done:?}");
    let target = file(&[], libc::O_DIRECT);
    let done = memfd.write_to_file(&target, START, Offset::new(4096), len, loader).unwrap();
    assert!(done.is_complete(), "{done:?}");
    memfd.punch_hole(page(3, 40)).unwrap();
    let done = memfd.write_to_file(&target, START, Offset::new(4096), len, loader).unwrap();
    assert!(done.is_complete(), "with pages that have no memory: {done:?}");
    let odd = memfd.read_from_file(&source, START, Offset::new(1), len, loader).unwrap();
    assert_eq!(odd.moved(), bytes(0), "this file system wants alignment: the answer is the file's");
    assert_eq!(odd.stopped().map(|error| error.errno()), Some(Errno::EINVAL));
}

#[test]
fn private_memory_is_refused_before_anything_is_read() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let _ = memfd.convert(page(9, 1), Visibility::Private, PRESERVE).unwrap();
    let mut source = file(&noise(1 << 20), 0);
    let len = bytes(1 << 20);
    let read = memfd
        .read_from_file(&source, FilePlace::Position, Offset::new(0), len, loader)
        .unwrap_err();
    let write = memfd.write_to_file(&source, START, Offset::new(0), len, loader).unwrap_err();
    for error in [read, write] {
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NotShared, Errno::EFAULT));
        let culprit = error.culprit().unwrap();
        assert_eq!((culprit.offset, &culprit.found), (Offset::new(9 << 12), &Found::Private));
    }
    assert_eq!(source.stream_position().unwrap(), 0);
    assert_eq!(memfd.stat().pinned, bytes(0));
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// A pipe that gives little at a time, a thread that is signalled all the while, and a conversion that is told who
/// is at work.
#[test]
fn short_and_interrupted_reads_lose_nothing_and_keep_the_pages() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: the handler does nothing. System calls are not restarted after it.
    unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) };
    let (read, write) = rustix::pipe::pipe().unwrap();
    let content = noise(300_000);
    let is_done = AtomicBool::new(false);
    // SAFETY: takes nothing; so does the next one.
    let process = unsafe { libc::getpid() };
    // SAFETY: as above.
    let reader = unsafe { libc::syscall(libc::SYS_gettid) };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                // SAFETY: takes numbers. The reader outlives this scope.
                unsafe { libc::syscall(libc::SYS_tgkill, process, reader, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        scope.spawn(|| {
            let mut write = File::from(write);
            for (nr, part) in content.chunks(7001).enumerate() {
                write.write_all(part).unwrap();
                if nr == 20 {
                    let refused =
                        memfd.convert(page(0, 1), Visibility::Private, PRESERVE).unwrap_err();
                    let owners = vec!["loader".into()];
                    assert_eq!(refused.culprit().unwrap().found, Found::Pinned { pins: 1, owners });
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let len = bytes(1 << 20);
        let place = FilePlace::Position;
        let done = memfd.read_from_file(&read, place, Offset::new(3), len, loader).unwrap();
        is_done.store(true, Ordering::Relaxed);
        assert_eq!((done.moved(), done.stopped()), (bytes(300_000), None));
    });
    let mut seen = vec![0; 300_000];
    memfd.read(Offset::new(3), &mut seen).unwrap();
    assert!(seen == content);
    let _ = memfd.convert(page(0, 1), Visibility::Private, PRESERVE).unwrap();
}

#[test]
fn a_file_that_has_no_more_to_give_now_is_gone_on_with() {
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let flags = rustix::pipe::PipeFlags::NONBLOCK;
    let (read, write) = rustix::pipe::pipe_with(flags).unwrap();
    let mut write = File::from(write);
    let content = noise(9000);
    let mut at = 0;
    for (part, moved) in [(0..4000, 4000), (4000..4000, 0), (4000..9000, 5000)] {
        write.write_all(&content[part]).unwrap();
        let len = bytes(9001 - at);
        let place = FilePlace::Position;
        let done = memfd.read_from_file(&read, place, Offset::new(at), len, loader).unwrap();
        assert_eq!(done.moved(), bytes(moved));
        let error = done.stopped().unwrap();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Os, Errno::EAGAIN));
        at += moved;
    }
    let mut seen = vec![0; 9000];
    memfd.read(Offset::new(0), &mut seen).unwrap();
    assert!(seen == content);

    // The other way, into a pipe that is full.
    let len = bytes(8 << 20);
    let done =
        memfd.write_to_file(&write, FilePlace::Position, Offset::new(0), len, loader).unwrap();
    assert_eq!(done.stopped().map(|error| error.errno()), Some(Errno::EAGAIN));
    let mut arrived = vec![0; usize::try_from(done.moved().get()).unwrap()];
    File::from(read).read_exact(&mut arrived).unwrap();
    assert!(arrived[..9000] == content);
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let done = memfd.write_to_file(&full, START, Offset::new(0), len, loader).unwrap();
    assert_eq!(
        (done.moved(), done.stopped().map(|it| it.errno())),
        (bytes(0), Some(Errno::ENOSPC))
    );
}

/// What the kernel has pinned by itself the library cannot know: a registered buffer goes on into memory that
/// has turned private. With a pin it cannot turn.
#[test]
fn a_registered_buffer_needs_a_pin() {
    if !common::require(Capability::Uffd) || !common::require(Capability::Uring) {
        return;
    }
    let World { memfd, loader, .. } = world(ArenaBacking::Memfd, FolioSize::Huge2M);
    let view = memfd.map_view().unwrap();
    let at = view.pointer(Offset::new(5 << 12), ByteSize::from_pages(1)).unwrap().as_ptr();
    let ring = Uring::new().unwrap();
    let pin = memfd.pin(page(5, 1), loader, PinMode::Counted).unwrap();
    ring.register(at, 4096).unwrap();
    let refused = memfd.convert(page(5, 1), Visibility::Private, PRESERVE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    drop(pin);

    let _ = memfd.convert(page(5, 1), Visibility::Private, PRESERVE).unwrap();
    let other = Uring::new().unwrap();
    assert_eq!(other.register(at, 4096), Err(libc::EFAULT), "private memory is no new buffer");
    let content = file(&[0x77; 4096], 0);
    assert_eq!(ring.read_fixed(content.as_raw_fd(), at, 4096), 4096);
    let _ = memfd.convert(page(5, 1), Visibility::Shared, PRESERVE).unwrap();
    let mut seen = [0; 4];
    memfd.read(Offset::new(5 << 12), &mut seen).unwrap();
    assert_eq!(seen, [0x77; 4], "the kernel wrote to private memory: nobody had pinned it");
}
