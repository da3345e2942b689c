//! Memory lent to another process: a real one, which gets the file over a socket and does what it can with it.

// UNSAFETY: descriptors over a socket, and a mapping in another process.
#![expect(unsafe_code, reason = "what a peer does with a file is what is tested")]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::{env, io, mem, ptr, slice};

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind, Found};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PartSpec, PinMode, Visibility, Zone,
};
use rustix::fs::{FallocateFlags, SealFlags};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const CHILD: &str = "GMEM_TEST_EXPORT_CHILD";

fn page(at: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(at), nr_pages).unwrap()
}

fn pages(nr_pages: u64) -> ByteSize {
    ByteSize::from_pages(nr_pages)
}

fn dedicated() -> FolioPool {
    let part = |mib| PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(mib));
    let builder = FolioPool::builder().part(part(6), Zone::Normal).part(part(4), Zone::Normal);
    builder.dedicated().create().unwrap()
}

fn shared(pool: &FolioPool) -> GuestMemfd {
    let builder = GuestMemfd::builder(ByteSize::from_mib(8)).initial(Visibility::Shared);
    builder.create(pool).unwrap()
}

/// Sends three numbers, and a file with them.
fn send(socket: &UnixStream, numbers: [u64; 3], file: BorrowedFd<'_>) {
    let mut control = [0_u64; 4];
    let mut part = libc::iovec {
        iov_base: ptr::from_ref(&numbers).cast_mut().cast(),
        iov_len: mem::size_of_val(&numbers),
    };
    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: takes numbers.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
    // SAFETY: a message with room for one header.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it points into `control`, all of which is zero, and nobody else does meanwhile.
    let header = unsafe { &mut *header };
    // SAFETY: takes numbers.
    header.cmsg_len = unsafe { libc::CMSG_LEN(4) } as _;
    (header.cmsg_level, header.cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    // SAFETY: a header of ours.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: room for one number behind the header.
    unsafe { data.cast::<i32>().write_unaligned(file.as_raw_fd()) };
    // SAFETY: everything it points to lives.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    assert_eq!(sent, 24, "{}", io::Error::last_os_error());
}

fn receive(socket: &UnixStream) -> ([u64; 3], OwnedFd) {
    let mut numbers = [0_u64; 3];
    let mut control = [0_u64; 4];
    let mut part = libc::iovec { iov_base: numbers.as_mut_ptr().cast(), iov_len: 24 };
    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    // SAFETY: everything it points to lives.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    assert_eq!(got, 24, "{}", io::Error::last_os_error());
    // SAFETY: the message that was received.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: it carries one descriptor.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: as above.
    let fd = unsafe { data.cast::<i32>().read_unaligned() };
    // SAFETY: made for us by the kernel.
    (numbers, unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A peer as vhost-user has them: maps what it is told, checks and changes it, and waits to be told to go.
#[test]
fn the_peer() {
    if env::var_os(CHILD).is_none() {
        return;
    }
    // SAFETY: the parent made it the standard input, and nobody else reads that.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let ([start, len, whole], file) = receive(&socket);
    let map = |at: u64, len: u64| {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: no address is asked for, so nothing is replaced.
        let mapped = unsafe {
            let fd = file.as_raw_fd();
            libc::mmap(ptr::null_mut(), len as usize, prot, flags, fd, at as libc::off_t)
        };
        assert_ne!(mapped, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        mapped.cast::<u8>()
    };
    let range = map(start, len);
    // SAFETY: mapped above; the parent does nothing with it until it is told to.
    let seen = unsafe { slice::from_raw_parts_mut(range, len as usize) };
    assert!(seen.iter().all(|&byte| byte == 0xa1), "what the parent wrote");
    seen.fill(0xb2);
    // What it can do besides: all of the file is there.
    let all = map(0, whole);
    // SAFETY: a byte of the file, which is mapped.
    unsafe { all.wrapping_add(whole as usize - 1).write_volatile(0xc3) };
    // What it cannot do.
    let perm = Err(rustix::io::Errno::PERM);
    assert_eq!(rustix::fs::ftruncate(&file, 0), perm);
    assert_eq!(rustix::fs::ftruncate(&file, whole + 4096), perm);
    assert_eq!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE), perm);
    let seals = rustix::fs::fcntl_get_seals(&file).unwrap();
    assert!(seals.contains(SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL));
    let grow = rustix::fs::fallocate(&file, FallocateFlags::empty(), whole, 4096);
    assert_eq!(grow, perm);
    socket.write_all(b"!").unwrap();
    socket.read_exact(&mut [0]).unwrap();
}

fn peer() -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "the_peer", "--test-threads=1", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    (child, ours)
}

#[test]
fn what_another_process_has_mapped_stays_until_it_is_returned() {
    let pool = dedicated();
    let memfd = shared(&pool);
    let backend = memfd.register_owner("vhost-user-blk").unwrap();
    let lent = page(100, 20);
    memfd.write(lent.start_offset(), &[0xa1; 20 << 12]).unwrap();

    let export = memfd.export(lent, backend).unwrap();
    assert_eq!((export.range(), export.owner()), (lent, backend));
    let regions: Vec<_> = export.regions().collect();
    assert_eq!(regions.len(), 1);
    assert_eq!(regions[0].pages, lent);
    let whole = rustix::fs::fstat(regions[0].file).unwrap().st_size as u64;
    let (mut child, mut socket) = peer();
    let numbers = [regions[0].file_start.get(), lent.len_bytes().get(), whole];
    send(&socket, numbers, regions[0].file);
    socket.read_exact(&mut [0]).unwrap();

    let mut seen = vec![0; 20 << 12];
    memfd.read(lent.start_offset(), &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0xb2), "what the peer wrote");
    let stat = memfd.stat();
    assert_eq!((stat.mapped, stat.pinned), (pages(20), pages(20)));
    let refused = memfd.convert(page(110, 1), Visibility::Private, PRESERVE).unwrap_err();
    assert_eq!((refused.kind(), refused.errno()), (ErrorKind::Busy, Errno::EAGAIN));
    let owners = vec!["vhost-user-blk".into()];
    assert_eq!(refused.culprit().unwrap().found, Found::Pinned { pins: 1, owners });
    assert_eq!(memfd.punch_hole(page(0, 512)).unwrap_err().kind(), ErrorKind::Busy);
    let moved = memfd.migrate(lent, Zone::Normal).unwrap();
    assert_eq!(moved.moved, pages(0));
    let _ = memfd.convert(page(120, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");

    socket.write_all(b"!").unwrap();
    assert!(child.wait().unwrap().success());
    drop(export);
    assert_eq!((memfd.stat().mapped, memfd.stat().pinned), (pages(0), pages(0)));
    let _ = memfd.convert(lent, Visibility::Private, PRESERVE).unwrap();
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

#[test]
fn a_pool_of_many_exports_nothing() {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(16)).unwrap();
    let memfd = shared(&pool);
    let owner = memfd.register_owner("x").unwrap();
    let refused = memfd.export(page(0, 1), owner).unwrap_err();
    assert_eq!((refused.kind(), refused.errno()), (ErrorKind::Unsupported, Errno::EOPNOTSUPP));
    assert!(refused.to_string().contains("not dedicated"), "{refused}");
    assert_eq!(memfd.stat().pinned, pages(0));

    let part = PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(8));
    let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
    let memfd = shared(&pool);
    let owner = memfd.register_owner("x").unwrap();
    assert_eq!(memfd.export(page(0, 1), owner).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Who guarantees that no other guest's memory is in the file: the pool does.
#[test]
fn a_dedicated_pool_has_one_object_and_after_an_export_never_another() {
    let pool = dedicated();
    let create = |size| GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool);
    let first = create(ByteSize::from_mib(8)).unwrap();
    let second = create(pages(1)).unwrap_err();
    assert_eq!((second.kind(), second.errno()), (ErrorKind::Exists, Errno::EEXIST));
    drop(first);
    // One that does not come about does not count.
    assert_eq!(create(ByteSize::from_mib(64)).unwrap_err().kind(), ErrorKind::Exhausted);
    let second = create(ByteSize::from_mib(8)).unwrap();
    let owner = second.register_owner("x").unwrap();
    // A refused export does not, either.
    let _ = second.convert(page(1, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(second.export(page(0, 2), owner).unwrap_err().kind(), ErrorKind::NotShared);
    drop(second);
    let third = create(ByteSize::from_mib(8)).unwrap();
    let owner = third.register_owner("x").unwrap();
    let export = third.export(page(0, 1), owner).unwrap();
    drop(third);
    assert_eq!(create(pages(1)).unwrap_err().kind(), ErrorKind::Exists);
    drop(export);
    let never = create(pages(1)).unwrap_err();
    assert!(never.to_string().contains("exported"), "{never}");
}

#[test]
fn regions_are_runs_of_a_file_each_and_exports_count_once() {
    let pool = dedicated();
    let memfd = shared(&pool);
    let owner = memfd.register_owner("x").unwrap();
    // All of it: more than the first part has, so that there are two files at least.
    let all = memfd.export(memfd.pages(), owner).unwrap();
    let regions: Vec<_> = all.regions().collect();
    assert!(regions.len() >= 2, "{regions:?}");
    let mut next = Pgoff::new(0);
    for region in &regions {
        assert_eq!(region.pages.start(), next);
        next = region.pages.end();
        // The page is where the region says.
        let at = region.pages.start_offset();
        memfd.write(at, &at.get().to_ne_bytes()).unwrap();
        let mut seen = [0; 8];
        rustix::io::pread(region.file, &mut seen, region.file_start.get()).unwrap();
        assert_eq!(u64::from_ne_bytes(seen), at.get());
    }
    assert_eq!(next, memfd.pages().end());
    drop(all);
    let one = memfd.export(page(10, 10), owner).unwrap();
    let other = memfd.export(page(15, 10), owner).unwrap();
    let inner = memfd.export(page(12, 2), owner).unwrap();
    assert_eq!(memfd.stat().mapped, pages(15));
    drop((one, inner));
    assert_eq!(memfd.stat().mapped, pages(10));
    drop(other);
    assert_eq!(memfd.stat().mapped, pages(0));
    let pin = memfd.pin(page(15, 1), owner, PinMode::Exclusive).unwrap();
    assert_eq!(memfd.export(page(10, 10), owner).unwrap_err().kind(), ErrorKind::Busy);
    drop(pin);
    let offset = Offset::new(15 << 12);
    memfd.write(offset, b"x").unwrap();
}

#[test]
fn what_a_view_shows_as_well_is_counted_once() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let pool = dedicated();
    let memfd = shared(&pool);
    let owner = memfd.register_owner("x").unwrap();
    let export = memfd.export(page(10, 10), owner).unwrap();
    let view = memfd.map_view().unwrap();
    assert_eq!(memfd.stat().mapped, memfd.size());
    let _ = memfd.convert(page(0, 10), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(memfd.stat().mapped.get(), memfd.size().get() - pages(10).get());
    drop(view);
    assert_eq!(memfd.stat().mapped, pages(10));
    drop(export);
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}
