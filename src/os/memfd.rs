//! Memory files: the arena of a pool, and the empty file that names an object.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fstat, ftruncate,
    memfd_create,
};
use rustix::io::Errno;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::os::failed;
use crate::os::memory::require_file_size;

/// What the kernel makes the file's pages of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Plain,
    Hugetlb2M,
    Hugetlb1G,
}

impl PageKind {
    fn flags(self) -> MemfdFlags {
        let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        match self {
            Self::Plain => base,
            Self::Hugetlb2M => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Self::Hugetlb1G => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        }
    }

    fn lacking(self) -> &'static str {
        match self {
            Self::Plain => "this kernel has no memory files",
            Self::Hugetlb2M => "this kernel has no hugetlb pages of 2 MiB",
            Self::Hugetlb1G => "this kernel has no hugetlb pages of 1 GiB",
        }
    }

    /// What it means that there is not enough.
    pub(crate) fn too_few(self) -> &'static str {
        match self {
            Self::Plain => "the host has not that much memory",
            Self::Hugetlb2M => {
                "not enough free hugetlb pages of 2 MiB: see /proc/sys/vm/nr_hugepages"
            }
            Self::Hugetlb1G => {
                "not enough free hugetlb pages of 1 GiB: see \
                 /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
            }
        }
    }
}

/// A file of `size` bytes without memory, whose size nobody can change any more.
pub(crate) fn create_arena(kind: PageKind, size: ByteSize) -> Result<OwnedFd, Error> {
    let op = Op::CreatePool;
    require_file_size(size)?;
    let fd = memfd_create("gmem-arena", kind.flags()).map_err(|e| match e {
        Errno::INVAL | Errno::NODEV | Errno::NOENT => {
            Error::new(op, ErrorKind::MissingCapability).errno_is(e.into()).because(kind.lacking())
        }
        _ => failed(op, "memfd_create", e),
    })?;
    ftruncate(&fd, size.get()).map_err(|e| failed(op, "ftruncate", e))?;
    if fails(FailPoint::Seal) {
        return Ok(fd);
    }
    fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
        .map_err(|e| failed(op, "F_ADD_SEALS", e))?;
    Ok(fd)
}

/// Gives a file all of its memory, so that no later touch can fail for want of it.
pub(crate) fn commit(fd: BorrowedFd<'_>, kind: PageKind, size: ByteSize) -> Result<(), Error> {
    loop {
        match fallocate(fd, FallocateFlags::KEEP_SIZE, 0, size.get()) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e @ (Errno::NOMEM | Errno::NOSPC)) => {
                let error = Error::new(Op::CreatePool, ErrorKind::Exhausted).errno_is(e.into());
                let what = kind.too_few();
                return Err(error.because(format!("{} bytes wanted: {what}", size.get())));
            }
            Err(e) => return Err(failed(Op::CreatePool, "fallocate", e)),
        }
    }
}

/// How much memory a file has, by the kernel's account. Zero where it does not say.
pub(crate) fn committed(fd: BorrowedFd<'_>) -> ByteSize {
    // Of 512 bytes, whatever the file system's blocks are: stat(2).
    let blocks = fstat(fd).map_or(0, |stat| stat.st_blocks);
    ByteSize::from_bytes(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
}

/// An empty file that can never hold a byte: it names an object, and a mapping of it answers every
/// touch with `SIGBUS`, as a guest_memfd does whose pages are all private.
pub(crate) fn create_identity(name: &str) -> Result<OwnedFd, Error> {
    let op = Op::CreateObject;
    let fd =
        memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(
            |e| match e {
                Errno::INVAL => Error::new(op, ErrorKind::Unsupported)
                    .errno_is(e.into())
                    .because("the name is longer than a memfd's may be (249 bytes)"),
                _ => failed(op, "memfd_create", e),
            },
        )?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&fd, seals).map_err(|e| failed(op, "F_ADD_SEALS", e))?;
    Ok(fd)
}
