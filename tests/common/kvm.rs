//! The kernel's own guest_memfd, by raw ioctls: what the library is held against.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

// linux/kvm.h.
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_CHECK_EXTENSION: libc::c_ulong = 0xae03;
const KVM_CREATE_GUEST_MEMFD: libc::c_ulong = 0xc040_aed4;
const KVM_CAP_GUEST_MEMFD_FLAGS: libc::c_ulong = 244;
pub(crate) const MMAP: u64 = 1;
pub(crate) const INIT_SHARED: u64 = 2;

#[repr(C)]
struct CreateGuestMemfd {
    size: u64,
    flags: u64,
    reserved: [u64; 6],
}

/// A virtual machine of the kernel's. It has no vCPU: only its memory is of interest.
pub(crate) struct KernelVm(pub(crate) OwnedFd);

/// Whether there is a guest_memfd that can be mapped, else why not.
pub(crate) fn probe() -> Result<(), String> {
    let kvm = open().map_err(|error| format!("/dev/kvm: {error}"))?;
    // SAFETY: takes a number.
    let flags = unsafe {
        libc::ioctl(kvm.as_raw_fd(), KVM_CHECK_EXTENSION as _, KVM_CAP_GUEST_MEMFD_FLAGS)
    };
    match u64::try_from(flags) {
        Ok(flags) if flags & (MMAP | INIT_SHARED) == MMAP | INIT_SHARED => Ok(()),
        _ => Err(format!("no guest_memfd with MMAP and INIT_SHARED: flags are {flags}")),
    }
}

fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm")
}

pub(crate) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn owned(fd: RawFd) -> Result<OwnedFd, i32> {
    match fd {
        // SAFETY: the kernel has just made it for us.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(errno()),
    }
}

impl KernelVm {
    pub(crate) fn new() -> Self {
        // SAFETY: takes a number, the type of machine: the ordinary one.
        let fd = unsafe { libc::ioctl(open().unwrap().as_raw_fd(), KVM_CREATE_VM as _, 0) };
        Self(owned(fd).unwrap())
    }

    pub(crate) fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, i32> {
        let mut args = CreateGuestMemfd { size, flags, reserved: [0; 6] };
        // SAFETY: reads one such structure.
        owned(unsafe {
            libc::ioctl(self.0.as_raw_fd(), KVM_CREATE_GUEST_MEMFD as _, &raw mut args)
        })
    }
}
