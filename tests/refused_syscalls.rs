//! What remains where a seccomp filter refuses a system call.

// UNSAFETY: prctl, to install a filter for the calling thread.
#![expect(unsafe_code, reason = "a seccomp filter is installed by a raw system call")]

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::thread;

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd, SigbusHandler, Touch,
    ViewOptions, ViewPath, Visibility,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;

fn object() -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(2)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    (pool, memfd)
}

/// Where in seccomp_data the number of the system call is.
const NUMBER: u32 = 0;
/// And the low half of its fifth argument, which is mmap's descriptor.
const MMAP_FD: u32 = 16 + 4 * 8;

/// From here on the system call answers `EPERM` to this thread, and to no other.
fn refuse(syscall: libc::c_long) {
    refuse_where(NUMBER, u32::try_from(syscall).unwrap());
}

/// The same for what has this word in this place.
fn refuse_where(place: u32, number: u32) {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, place),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: number,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: takes no pointers.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the filter and its program outlive the call, which copies them.
    let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) };
    assert_eq!((privileges, installed), (0, 0), "{}", std::io::Error::last_os_error());
}

#[test]
fn without_userfaultfd_views_go_another_way_and_say_why() {
    thread::spawn(|| {
        refuse(libc::SYS_userfaultfd);
        let (pool, memfd) = object();
        let asked_for = ViewOptions::default().path(ViewPath::UserfaultfdSyscall);
        let error = memfd.map_view_with(&asked_for).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::MissingCapability, Errno::EPERM));
        assert_eq!(
            error.to_string(),
            "map a view: the host lacks a capability: userfaultfd(2): not permitted (a seccomp \
             filter?) (EPERM)"
        );
        let view = memfd.map_view().unwrap();
        assert_ne!(view.path(), ViewPath::UserfaultfdSyscall);
        assert_eq!(view.passed_over()[0], (ViewPath::UserfaultfdSyscall, error));
        memfd.write(Offset::new(0), b"still works").unwrap();
        let _ = memfd.convert(memfd.pages(), Visibility::Private, PRESERVE).unwrap();
        let handler = SigbusHandler::install().unwrap();
        let touch = view.touch(handler, Offset::new(0), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Fault(_)), "{touch:?}");
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    })
    .join()
    .unwrap();
}

/// Without one call for all of them, each page is revoked by its own.
#[test]
fn without_process_madvise_scattered_pages_are_hidden_all_the_same() {
    if !common::require(Capability::Uffd) {
        return;
    }
    thread::spawn(|| {
        refuse(libc::SYS_process_madvise);
        let (pool, memfd) = object();
        let view = memfd.map_view().unwrap();
        let page = |at| PgoffRange::new(Pgoff::new(at), 1).unwrap();
        let pages: Vec<_> = (0..512).step_by(3).map(page).collect();
        let to = Visibility::Private;
        let done = memfd.convert_ranges(&pages, to, &ConvertOptions::default()).unwrap();
        assert_eq!(done.changed_pages(), pages.len() as u64);
        // Which asks the kernel's page tables.
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        assert_eq!(memfd.stat().mapped, ByteSize::from_pages(512 - pages.len() as u64));
        drop(view);
    })
    .join()
    .unwrap();
}

/// Half an installation must not stay: the frame goes on to somebody else.
#[test]
fn a_folio_that_cannot_be_registered_leaves_no_mapping_behind() {
    if !common::require(Capability::Uffd) {
        return;
    }
    thread::spawn(|| {
        let size = ByteSize::from_mib(2);
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
        let first = GuestMemfd::builder(size).create(&pool).unwrap();
        let view = first.map_view().unwrap();
        let handler = SigbusHandler::install().unwrap();
        refuse(libc::SYS_ioctl);
        let error = first.allocate(first.pages()).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Os, Errno::EPERM));
        assert_eq!(first.stat().resident, ByteSize::default());

        let builder = GuestMemfd::builder(size).initial(Visibility::Shared);
        let second = builder.create(&pool).unwrap();
        second.write(Offset::new(0), &[7; 4096]).unwrap();
        let touch = view.touch(handler, Offset::new(0), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Fault(_)), "{touch:?}");
        assert_eq!(audit::check(&pool, &[&first, &second]).to_string(), "clean");
    })
    .join()
    .unwrap();
}

/// If it cannot even be undone, what is left of it is out of reach: the frame goes on to somebody else all the
/// same.
#[test]
fn a_folio_whose_mapping_stays_is_not_seen_there() {
    if !common::require(Capability::Uffd) {
        return;
    }
    thread::spawn(|| {
        let size = ByteSize::from_mib(2);
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
        let first = GuestMemfd::builder(size).create(&pool).unwrap();
        let view = first.map_view().unwrap();
        let handler = SigbusHandler::install().unwrap();
        refuse(libc::SYS_ioctl);
        refuse_where(MMAP_FD, u32::try_from(first.as_fd().as_raw_fd()).unwrap());
        let error = first.allocate(first.pages()).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Os, Errno::EPERM));
        assert_eq!(first.stat().resident, ByteSize::default());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let left = format!("{:x}-", view.hva().get());
        let left = maps.lines().find(|line| line.starts_with(&left)).unwrap();
        assert!(left.contains("---s") && left.contains("gmem-arena"), "{left}");

        let builder = GuestMemfd::builder(size).initial(Visibility::Shared);
        let [second, third] = [(); 2].map(|()| builder.clone().create(&pool));
        let second = second.unwrap();
        assert_eq!(
            third.unwrap_err().kind(),
            ErrorKind::Exhausted,
            "the first one is promised its own"
        );
        second.write(Offset::new(0), &[7; 2 << 20]).unwrap();
        for access in [Access::Read, Access::Write] {
            let touch = view.touch(handler, Offset::new(0), access).unwrap();
            assert!(matches!(touch, Touch::Fault(_)), "{touch:?}");
        }
        assert_eq!(pool.stat().quarantined, ByteSize::default());
        assert_eq!(audit::check(&pool, &[&first, &second]).to_string(), "clean");
        drop((view, first));
        assert_eq!((pool.stat().quarantined, pool.stat().free), (ByteSize::default(), size));
    })
    .join()
    .unwrap();
}

#[test]
fn without_membarrier_a_conversion_to_private_changes_nothing() {
    let (pool, memfd) = object();
    memfd.write(Offset::new(0), b"seen").unwrap();
    // The process registers for membarrier here, before it is refused.
    let page = PgoffRange::new(Pgoff::new(9), 1).unwrap();
    let _ = memfd.convert(page, Visibility::Private, PRESERVE).unwrap();
    thread::spawn(move || {
        refuse(libc::SYS_membarrier);
        let error = memfd.convert(memfd.pages(), Visibility::Private, PRESERVE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingCapability);
        let mut buf = [0; 4];
        memfd.read(Offset::new(0), &mut buf).unwrap();
        assert_eq!(&buf, b"seen");
        assert_eq!(memfd.stat().private, ByteSize::from_pages(1));
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    })
    .join()
    .unwrap();
}
