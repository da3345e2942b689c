//! userfaultfd: turns "page not mapped" into `SIGBUS`, and maps pages back in.
//!
//! Registered for missing and minor faults with the SIGBUS feature, a page of a shared file mapping
//! that has no entry in the page table answers a load or store with `SIGBUS` (`BUS_ADRERR`, exact
//! address) and a system call with `EFAULT`, while its bytes stay in the file. Sources:
//! Documentation/admin-guide/mm/userfaultfd.rst; `mfill_atomic` and `handle_userfault` in mm.

// UNSAFETY: the ioctls of userfaultfd on ranges of a `Mapping` that the caller owns.
#![expect(unsafe_code, reason = "the only file that speaks to userfaultfd")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_FEATURE_EXACT_ADDRESS, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS,
    UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, uffdio_api,
    uffdio_continue, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_REGISTER};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::error::{Error, ErrorKind, Op};
use crate::os::failed;
use crate::os::mapping::Mapping;

/// `UFFD_API` of linux/userfaultfd.h, the only version there has been.
const API: u64 = 0xAA;

const DEVICE: &str = "/dev/userfaultfd";

/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h: `_IO(0xAA, 0x00)`.
const NEW: libc::Ioctl = 0xAA00;

/// `UFFDIO_CONTINUE_MODE_DONTWAKE` of linux/userfaultfd.h: with [`FEATURES`] no fault ever waits, so nobody is to
/// be woken.
const DONT_WAKE: u64 = 1;

const FEATURES: u64 = (UFFD_FEATURE_SIGBUS
    | UFFD_FEATURE_EXACT_ADDRESS
    | UFFD_FEATURE_MISSING_SHMEM
    | UFFD_FEATURE_MINOR_SHMEM
    | UFFD_FEATURE_MISSING_HUGETLBFS
    | UFFD_FEATURE_MINOR_HUGETLBFS) as u64;

/// One userfaultfd with the features above. Asks for user-mode faults only, which needs no
/// privilege: a fault inside a system call then ends in `EFAULT`.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

/// Where [`Userfault::map_pages`] has stopped, and why.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) at: usize,
    pub(crate) error: Error,
}

/// Where a userfaultfd comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// userfaultfd(2).
    Syscall,
    /// `/dev/userfaultfd`, for whoever may open it.
    Device,
}

impl Userfault {
    pub(crate) fn open(source: Source) -> Result<Self, Error> {
        let user_mode_only = UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        let flags = UserfaultfdFlags::CLOEXEC | user_mode_only;
        let this = Self(match source {
            Source::Syscall => from_syscall(flags)?,
            Source::Device => from_device(flags)?,
        });
        let mut api = uffdio_api { api: API, features: FEATURES, ioctls: 0 };
        this.call::<{ UFFDIO_API as Opcode }, _>(&mut api)
            .map_err(|e| unavailable(e, "UFFDIO_API with SIGBUS, MISSING and MINOR on shmem"))?;
        Ok(this)
    }

    /// Makes every page of `at..at + len` that has no page-table entry answer with SIGBUS.
    pub(crate) fn register(&self, map: &Mapping, at: usize, len: usize) -> Result<(), Error> {
        let mode = u64::from(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
        let mut arg = uffdio_register { range: range(map, at, len)?, mode, ioctls: 0 };
        self.call::<{ UFFDIO_REGISTER as Opcode }, _>(&mut arg)
            .map_err(|e| failed(Op::MapView, "UFFDIO_REGISTER", e))
    }

    /// Maps ranges back in none of which is mapped; says how many, from the first on. What to do about the next one
    /// [`map_pages`](Self::map_pages) knows.
    #[inline]
    pub(crate) fn map_each(
        &self,
        map: &Mapping,
        ranges: impl Iterator<Item = (usize, usize)>,
    ) -> usize {
        let is_mapped = |&(at, len): &(usize, usize)| {
            let Ok(range) = range(map, at, len) else { return false };
            let mut arg = uffdio_continue { range, mode: DONT_WAKE, mapped: 0 };
            self.call::<{ UFFDIO_CONTINUE as Opcode }, _>(&mut arg).is_ok()
        };
        ranges.take_while(is_mapped).count()
    }

    /// Maps the file's pages at `at..at + len` back in. Pages that are mapped already stay as they
    /// are; `step` is how far to go for one of those.
    ///
    /// # Errors
    /// Where it has stopped. All before that is mapped.
    pub(crate) fn map_pages(
        &self,
        map: &Mapping,
        at: usize,
        len: usize,
        step: usize,
    ) -> Result<(), Stopped> {
        let end = at + len;
        let mut at = at;
        while at < end {
            let range = range(map, at, end - at).map_err(|error| Stopped { at, error })?;
            let mut arg = uffdio_continue { range, mode: DONT_WAKE, mapped: 0 };
            match self.call::<{ UFFDIO_CONTINUE as Opcode }, _>(&mut arg) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => at += step,
                // The kernel stopped half way and says how far it came, or had to retry.
                Err(Errno::AGAIN) => at += usize::try_from(arg.mapped).unwrap_or(0),
                Err(Errno::INTR) => {}
                Err(e) => {
                    return Err(Stopped { at, error: failed(Op::MapView, "UFFDIO_CONTINUE", e) });
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn call<const OPCODE: Opcode, T>(&self, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: each caller pairs the opcode with the structure that linux/userfaultfd.h names
        // for it.
        let ioctl_arg = unsafe { Updater::<OPCODE, T>::new(arg) };
        // SAFETY: 1. the structure outlives the call. 2. the ranges in it lie in a mapping of ours
        // that nobody holds references into, so pages may appear there.
        unsafe { ioctl(&self.0, ioctl_arg) }
    }
}

fn from_syscall(flags: UserfaultfdFlags) -> Result<OwnedFd, Error> {
    // SAFETY: the descriptor does nothing until a range is registered with it.
    unsafe { userfaultfd(flags) }.map_err(|e| unavailable(e, "userfaultfd(2)"))
}

fn from_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Error> {
    let device = open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let device = device.map_err(|e| unavailable(e, DEVICE))?;
    // SAFETY: the call takes flags and no pointer.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags.bits()) };
    if fd < 0 {
        let os_error = std::io::Error::last_os_error();
        let errno = Errno::from_io_error(&os_error).unwrap_or(Errno::IO);
        return Err(unavailable(errno, "USERFAULTFD_IOC_NEW"));
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[inline]
fn range(map: &Mapping, at: usize, len: usize) -> Result<uffdio_range, Error> {
    match at.checked_add(len) {
        Some(end) if end <= map.len() => {
            Ok(uffdio_range { start: (map.hva().get() + at) as u64, len: len as u64 })
        }
        _ => Err(Error::new(Op::MapView, ErrorKind::OutOfRange)),
    }
}

/// The error that names what is missing, so that somebody can do something about it.
fn unavailable(errno: Errno, what: &str) -> Error {
    let why = match errno {
        Errno::NOSYS => "the kernel was built without userfaultfd",
        Errno::NOENT | Errno::NODEV | Errno::NXIO => "the kernel or the container lacks it",
        Errno::ACCESS => "not permitted (the device's mode)",
        Errno::PERM => "not permitted (a seccomp filter?)",
        Errno::INVAL => "the kernel lacks it (Linux 5.19 or newer is needed)",
        e @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM) => {
            return failed(Op::MapView, "userfaultfd", e);
        }
        _ => "the kernel refused",
    };
    Error::new(Op::MapView, ErrorKind::MissingCapability)
        .errno_is(errno.into())
        .because(format!("{what}: {why} ({})", crate::error::Errno::from(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_capability() {
        let error = unavailable(Errno::PERM, "userfaultfd(2)");
        assert_eq!(error.kind(), ErrorKind::MissingCapability);
        assert_eq!(error.errno(), crate::error::Errno::EPERM);
        assert!(error.to_string().contains("userfaultfd(2): not permitted"), "{error}");
    }

    #[test]
    fn running_out_of_descriptors_is_no_missing_capability() {
        assert_eq!(unavailable(Errno::MFILE, "userfaultfd(2)").kind(), ErrorKind::Os);
    }
}
