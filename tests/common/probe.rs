//! What the host offers, found out without the library: a fault in there must not turn into a skip.

// UNSAFETY: two calls into userfaultfd, which rustix marks unsafe because of what could be done
// with the descriptor. Nothing is done with it.
#![expect(unsafe_code, reason = "asks the kernel for a userfaultfd and its features")]

use std::fs::OpenOptions;

use linux_raw_sys::general::{
    UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY,
    uffdio_api,
};
use linux_raw_sys::ioctl::UFFDIO_API;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::process::{Resource, geteuid, getrlimit};

use super::Capability;

/// `Ok` if the host offers this, else why not.
pub(crate) fn probe(capability: Capability) -> Result<(), String> {
    match capability {
        Capability::Uffd => uffd(),
        Capability::Kvm => writable("/dev/kvm"),
        // The tests set how many they need, and put it back.
        Capability::Hugetlb => writable("/proc/sys/vm/nr_hugepages"),
        Capability::Thp => writable("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        Capability::Mlock => mlock(),
    }
}

/// `UFFD_API` of linux/userfaultfd.h.
const UFFD_API: u64 = 0xAA;

fn uffd() -> Result<(), String> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
    // SAFETY: no range is registered with the descriptor.
    let fd = unsafe { userfaultfd(flags) }.map_err(|e| format!("userfaultfd: {e}"))?;
    let features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
    let mut api = uffdio_api { api: UFFD_API, features: u64::from(features), ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`.
    let call = unsafe { Updater::<{ UFFDIO_API as Opcode }, _>::new(&mut api) };
    // SAFETY: as above.
    unsafe { ioctl(fd, call) }
        .map_err(|e| format!("userfaultfd without SIGBUS, MISSING or MINOR on shared memory: {e}"))
}

/// Opens for writing, writes nothing.
fn writable(path: &str) -> Result<(), String> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

/// Enough address space that can be locked for what the tests map.
fn mlock() -> Result<(), String> {
    let enough = 1 << 32;
    match getrlimit(Resource::Memlock).maximum {
        Some(limit) if limit < enough && !geteuid().is_root() => {
            Err(format!("RLIMIT_MEMLOCK is {limit}"))
        }
        _ => Ok(()),
    }
}
