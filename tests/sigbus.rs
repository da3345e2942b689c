//! Faults that nobody asked to survive: each in a process of its own, which is to die of it.

// UNSAFETY: reads private memory through a raw pointer, and installs a signal handler.
#![expect(unsafe_code, reason = "the fault of a raw pointer is what is tested")]

mod common;

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, HostView, SigbusHandler, Touch};

const CHILD: &str = "GMEM_TEST_SIGBUS_CHILD";
const SURVIVED: i32 = 3;
const HANDLED_BEFORE: i32 = 42;

/// What becomes of a copy of this process that runs `body` on a view of private memory; in that copy
/// it does not return. `test` is the caller's name, so that the copy ends up here again.
fn fate(test: &str, body: impl FnOnce(&HostView)) -> ExitStatus {
    if env::var_os(CHILD).is_some() {
        let size = ByteSize::from_mib(2);
        let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
        let memfd = GuestMemfd::builder(size).create(&pool).unwrap();
        body(&memfd.map_view().unwrap());
        std::process::exit(SURVIVED);
    }
    Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(CHILD, "1")
        .status()
        .unwrap()
}

fn read_raw(view: &HostView) {
    let at = view.pointer(Offset::new(0x1234), ByteSize::from_bytes(1)).unwrap();
    // SAFETY: a valid address in a mapping of ours; the fault is what is wanted.
    std::hint::black_box(unsafe { at.as_ptr().read_volatile() });
}

#[test]
fn without_a_handler_a_raw_access_kills() {
    if !common::require(Capability::Uffd) {
        return;
    }
    // Rust's runtime has one of its own, for stack overflows, which passes this on.
    let fate = fate("without_a_handler_a_raw_access_kills", read_raw);
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

#[test]
fn the_handler_is_for_touches_only() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let fate = fate("the_handler_is_for_touches_only", |view| {
        let handler = SigbusHandler::install().unwrap();
        let touch = view.touch(handler, Offset::new(0), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Fault(_)));
        read_raw(view);
    });
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

#[test]
fn a_signal_that_was_sent_kills_as_well() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let fate = fate("a_signal_that_was_sent_kills_as_well", |_| {
        // Rust's runtime, which would take the first signal that is sent for one of its own.
        // SAFETY: the default action takes no handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        SigbusHandler::install().unwrap();
        // SAFETY: takes no pointers.
        unsafe { libc::raise(libc::SIGBUS) };
    });
    assert_eq!(fate.signal(), Some(libc::SIGBUS), "{fate}");
}

extern "C" fn earlier(_signal: libc::c_int) {
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(HANDLED_BEFORE) };
}

#[test]
fn a_handler_that_stood_before_gets_what_is_not_ours() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let fate = fate("a_handler_that_stood_before_gets_what_is_not_ours", |view| {
        let handler: extern "C" fn(libc::c_int) = earlier;
        // SAFETY: the handler is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
        let handler = SigbusHandler::install().unwrap();
        let touch = view.touch(handler, Offset::new(0), Access::Write).unwrap();
        assert!(matches!(touch, Touch::Fault(_)));
        read_raw(view);
    });
    assert_eq!(fate.code(), Some(HANDLED_BEFORE), "{fate}");
}
