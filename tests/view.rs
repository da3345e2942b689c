//! The object mapped into the host: what is shared can be touched, what is private faults.

// UNSAFETY: one read(2) into a raw pointer, to see what the kernel makes of it.
#![expect(unsafe_code, reason = "a system call on a raw pointer is what is tested")]

mod common;

use std::os::fd::AsRawFd;

use common::Capability;

use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::error::{ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FaultCause, FolioPool, GuestMemfd, HostView, PinMode,
    SigbusHandler, Touch, Visibility,
};

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn object(initial: Visibility) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(4)).initial(initial).create(&pool).unwrap();
    (pool, memfd)
}

fn touch(view: &HostView, at: u64) -> Touch {
    let handler = SigbusHandler::install().unwrap();
    view.touch(handler, Offset::new(at), Access::Read).unwrap()
}

#[test]
fn private_pages_fault_with_the_exact_address_and_keep_their_bytes() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Shared);
    let view = memfd.map_view().unwrap();
    memfd.write(Offset::new(0x5123), b"x").unwrap();
    assert_eq!(touch(&view, 0x5123), Touch::Byte(b'x'));

    let converted =
        memfd.convert(range(5, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    assert_eq!(converted.changed_pages(), 1);
    let Touch::Fault(fault) = touch(&view, 0x5123) else { panic!("private memory was read") };
    assert_eq!(Some(fault.hva), view.hva_of(Offset::new(0x5123)));
    assert_eq!(fault.offset, Offset::new(0x5123));
    assert_eq!(fault.cause, FaultCause::NotMapped);
    let handler = SigbusHandler::install().unwrap();
    let store = view.touch(handler, Offset::new(0x5fff), Access::Write).unwrap();
    assert!(matches!(store, Touch::Fault(_)));
    assert_eq!(touch(&view, 0x4fff), Touch::Byte(0));
    assert_eq!(touch(&view, 0x6000), Touch::Byte(0));

    let _ = memfd.convert(range(5, 1), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    assert_eq!(touch(&view, 0x5123), Touch::Byte(b'x'));
}

#[test]
fn a_refused_conversion_leaves_the_view_as_it_was() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Shared);
    let view = memfd.map_view().unwrap();
    let owner = memfd.register_owner("virtio-blk").unwrap();
    let pin = memfd.pin(range(7, 2), owner, PinMode::Counted).unwrap();
    let error =
        memfd.convert(range(0, 16), Visibility::Private, ContentPolicy::Preserve).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let culprit = error.culprit().unwrap();
    assert_eq!(culprit.offset, Offset::new(0x7000));
    assert_eq!(culprit.found, Found::Pinned { pins: 1, owners: vec!["virtio-blk".into()] });
    for page in 0..16 {
        assert_eq!(touch(&view, page * 4096), Touch::Byte(0));
    }
    drop(pin);
    let _ = memfd.convert(range(0, 16), Visibility::Private, ContentPolicy::Preserve).unwrap();
    for page in 0..16 {
        assert!(matches!(touch(&view, page * 4096), Touch::Fault(_)));
    }
    assert_eq!(memfd.stat().mapped, ByteSize::from_bytes((4 << 20) - (16 << 12)));
}

#[test]
fn absent_pages_fault_for_loads_and_stores_alike() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Private);
    let view = memfd.map_view().unwrap();
    let handler = SigbusHandler::install().unwrap();
    for at in [0, (4 << 20) - 1] {
        for access in [Access::Read, Access::Write] {
            let touch = view.touch(handler, Offset::new(at), access).unwrap();
            let Touch::Fault(fault) = touch else { panic!("{access:?} at {at:#x} went through") };
            assert_eq!((fault.offset, fault.cause), (Offset::new(at), FaultCause::NotMapped));
        }
    }
    let past = view.touch(handler, Offset::new(4 << 20), Access::Read).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::OutOfRange);
    assert_eq!(memfd.stat().resident, ByteSize::default());
}

/// A device thread may have blocked every signal, and a fault cannot be blocked.
#[test]
fn a_touch_survives_where_the_signal_is_blocked() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Private);
    let view = memfd.map_view().unwrap();
    std::thread::spawn(move || {
        let mut all = std::mem::MaybeUninit::uninit();
        // SAFETY: fills the set, which lives until the call below is over.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: the set is filled; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut()) };
        for _ in 0..2 {
            assert!(matches!(touch(&view, 0), Touch::Fault(_)));
        }
        // One that was sent stays blocked: the touch would have to let it through.
        // SAFETY: takes no pointers. The signal is this thread's and ends with it.
        unsafe { libc::raise(libc::SIGBUS) };
        let handler = SigbusHandler::install().unwrap();
        let refused = view.touch(handler, Offset::new(0), Access::Read).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        let mut after = std::mem::MaybeUninit::uninit();
        // SAFETY: no set is given; the old one is written.
        unsafe { libc::pthread_sigmask(0, std::ptr::null(), after.as_mut_ptr()) };
        // SAFETY: a set that the call above has written.
        let blocked = unsafe { libc::sigismember(after.as_ptr(), libc::SIGBUS) };
        assert_eq!(blocked, 1, "the thread's mask is as it was");
    })
    .join()
    .unwrap();
}

#[test]
fn zeroing_conversions_leave_nothing_to_either_side() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Shared);
    let view = memfd.map_view().unwrap();
    memfd.write(Offset::new(0), &[7; 8192]).unwrap();
    let _ = memfd.convert(range(0, 1), Visibility::Private, ContentPolicy::Zero).unwrap();
    let _ = memfd.convert(range(0, 1), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    assert_eq!(touch(&view, 0), Touch::Byte(0));
    let _ = memfd.convert(range(1, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    let _ = memfd.convert(range(1, 1), Visibility::Shared, ContentPolicy::Zero).unwrap();
    assert_eq!(touch(&view, 4096), Touch::Byte(0));
}

#[test]
fn holes_fault_and_come_back_as_zeroes() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(Visibility::Shared);
    let view = memfd.map_view().unwrap();
    memfd.write(Offset::new(0), &[7; 4096]).unwrap();
    let used = pool.stat().used;
    memfd.punch_hole(range(0, 512)).unwrap();
    assert_eq!(pool.stat().used.get(), used.get() - FolioSize::Huge2M.bytes().get());
    assert!(matches!(touch(&view, 0), Touch::Fault(_)));
    memfd.allocate(range(0, 1)).unwrap();
    assert_eq!(touch(&view, 0), Touch::Byte(0));

    memfd.write(Offset::new(0), &[7; 8192]).unwrap();
    memfd.punch_hole(range(1, 1)).unwrap();
    assert_eq!(touch(&view, 0), Touch::Byte(7));
    assert!(matches!(touch(&view, 4096), Touch::Fault(_)), "a hole in a folio that stays");
    memfd.write(Offset::new(4097), &[8]).unwrap();
    assert_eq!([touch(&view, 4096), touch(&view, 4097)], [Touch::Byte(0), Touch::Byte(8)]);
}

#[test]
fn system_calls_on_private_memory_get_efault() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Private);
    let view = memfd.map_view().unwrap();
    let _ = memfd.convert(range(0, 1), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let read_into = |page: u64| {
        let at = view.pointer(Offset::new(page * 4096), ByteSize::from_pages(1)).unwrap();
        // SAFETY: nobody has a reference to the memory, and the kernel checks the address itself.
        let got = unsafe { libc::read(zero.as_raw_fd(), at.as_ptr().cast(), 16) };
        (got, std::io::Error::last_os_error().raw_os_error())
    };
    assert_eq!(read_into(0).0, 16);
    assert_eq!(read_into(1), (-1, Some(14)));
}
