//! Parts of a memory file that go back to the host, and are had again.

use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::os::failed;

/// Gives pages of the file back to the host. They read as zeroes, and a touch would have the host find
/// memory again, or kill somebody.
pub(crate) fn release(
    fd: BorrowedFd<'_>,
    at: u64,
    len: ByteSize,
) -> Result<(), crate::error::Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    repeated(fd, flags, at, len).map_err(Into::into)
}

/// Has memory for pages of the file, so that no touch of them can fail. Those that have some keep it.
pub(crate) fn commit(op: Op, fd: BorrowedFd<'_>, at: u64, len: ByteSize) -> Result<(), Error> {
    repeated(fd, FallocateFlags::KEEP_SIZE, at, len).map_err(|errno| match errno {
        Errno::NOMEM | Errno::NOSPC => Error::new(op, ErrorKind::Exhausted)
            .errno_is(errno.into())
            .because("the host has no memory to fill a hole with"),
        _ => failed(op, "fallocate", errno),
    })
}

fn repeated(
    fd: BorrowedFd<'_>,
    flags: FallocateFlags,
    at: u64,
    len: ByteSize,
) -> Result<(), Errno> {
    loop {
        match fallocate(fd, flags, at, len.get()) {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}
