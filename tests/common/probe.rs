//! What the host offers, found out without the library: a fault in there must not turn into a skip.

// UNSAFETY: calls into userfaultfd, which rustix marks unsafe because of what could be done
// with the descriptor, and into io_uring, which no crate here wraps. Nothing is done with either.
#![expect(unsafe_code, reason = "asks the kernel for a userfaultfd, its features, and an io_uring")]

use std::fs::{self, OpenOptions};
use std::io;

use linux_raw_sys::general::{
    UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY,
    uffdio_api,
};
use linux_raw_sys::ioctl::UFFDIO_API;
use rustix::fs::{FlockOperation, flock};
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
        Capability::Hugetlb1G => giant_page(),
        Capability::Numa => exists("/proc/self/numa_maps"),
        Capability::Thp => writable("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        Capability::Mlock => mlock(),
        Capability::Hwpoison => hwpoison(),
        Capability::Uring => uring(),
    }
}

/// Writable like `setting::NR_HUGEPAGES`, and locked like it.
pub(crate) const NR_GIANT_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

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

/// Whether a page of 1 GiB is to be had, by taking one and giving it back.
fn giant_page() -> Result<(), String> {
    let failed = |error: io::Error| format!("{NR_GIANT_PAGES}: {error}");
    let lock = OpenOptions::new().read(true).write(true).open(NR_GIANT_PAGES).map_err(failed)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    let number = || -> io::Result<u64> {
        let text = fs::read_to_string(NR_GIANT_PAGES)?;
        text.trim().parse().map_err(io::Error::other)
    };
    let before = number().map_err(failed)?;
    fs::write(NR_GIANT_PAGES, (before + 1).to_string()).map_err(failed)?;
    let after = number().map_err(failed)?;
    fs::write(NR_GIANT_PAGES, before.to_string()).map_err(failed)?;
    match after {
        after if after > before => Ok(()),
        _ => Err("the host has no consecutive GiB of memory to spare".into()),
    }
}

/// Poison takes a page of memory from the machine for good, so somebody has to ask for it.
fn hwpoison() -> Result<(), String> {
    exists("/proc/sys/vm/memory_failure_recovery")?;
    match std::env::var_os("GMEM_HWPOISON") {
        Some(_) if geteuid().is_root() => Ok(()),
        Some(_) => Err("only root may poison memory".into()),
        None => Err("takes a page from the machine for good: set GMEM_HWPOISON to allow it".into()),
    }
}

fn uring() -> Result<(), String> {
    let mut params = [0_u32; 30];
    // SAFETY: reads and writes one `io_uring_params`, which are as many words.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: made above, used no more.
            unsafe { libc::close(fd) };
            Ok(())
        }
        _ => Err(format!("io_uring_setup: {}", io::Error::last_os_error())),
    }
}

fn exists(path: &str) -> Result<(), String> {
    fs::metadata(path).map(drop).map_err(|error| format!("{path}: {error}"))
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
