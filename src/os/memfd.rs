//! Memory files: the arena of a pool, and the empty file that names an object.

use std::os::fd::OwnedFd;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::os::failed;
use crate::os::memory::{require_available, require_file_size};

/// What the kernel makes the file's pages of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Plain,
    Hugetlb2M,
}

/// A file of `size` bytes whose size nobody can change any more. Plain pages are committed here,
/// so that no later touch of them can fail.
pub(crate) fn create_arena(kind: PageKind, size: ByteSize) -> Result<OwnedFd, Error> {
    if kind == PageKind::Plain {
        require_available(size)?;
    }
    let fd = create_sealed(kind, size)?;
    commit(&fd, kind, size)?;
    Ok(fd)
}

/// The same without the commitment, for a caller who has advice to give before pages exist.
pub(crate) fn create_sparse_arena(size: ByteSize) -> Result<OwnedFd, Error> {
    require_available(size)?;
    create_sealed(PageKind::Plain, size)
}

fn create_sealed(kind: PageKind, size: ByteSize) -> Result<OwnedFd, Error> {
    let op = Op::CreatePool;
    require_file_size(size)?;
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = match kind {
        PageKind::Plain => base,
        PageKind::Hugetlb2M => base | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
    };
    let fd = memfd_create("gmem-arena", flags).map_err(|e| match e {
        Errno::INVAL | Errno::NODEV | Errno::NOENT => Error::new(op, ErrorKind::MissingCapability)
            .errno_is(e.into())
            .because("this kernel has no hugetlb pages of 2 MiB"),
        _ => failed(op, "memfd_create", e),
    })?;
    ftruncate(&fd, size.get()).map_err(|e| failed(op, "ftruncate", e))?;
    fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
        .map_err(|e| failed(op, "F_ADD_SEALS", e))?;
    Ok(fd)
}

fn commit(fd: &OwnedFd, kind: PageKind, size: ByteSize) -> Result<(), Error> {
    loop {
        match fallocate(fd, FallocateFlags::KEEP_SIZE, 0, size.get()) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e @ (Errno::NOMEM | Errno::NOSPC)) => {
                let what = match kind {
                    PageKind::Plain => "the host has not that much memory",
                    PageKind::Hugetlb2M => {
                        "not enough free hugetlb pages of 2 MiB: see /proc/sys/vm/nr_hugepages"
                    }
                };
                let error = Error::new(Op::CreatePool, ErrorKind::Exhausted).errno_is(e.into());
                return Err(error.because(format!("{} bytes wanted: {what}", size.get())));
            }
            Err(e) => return Err(failed(Op::CreatePool, "fallocate", e)),
        }
    }
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
