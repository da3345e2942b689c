//! The operating system: the only floor that makes system calls. It and `backing` hold the library's
//! `unsafe` code, but for the slices of the vm-memory adapter. What it offers upwards is safe.

pub(crate) mod barrier;
pub(crate) mod file_io;
pub(crate) mod hugetlb;
pub(crate) mod mapping;
pub(crate) mod maps;
pub(crate) mod memfd;
pub(crate) mod memory;
pub(crate) mod numa;
pub(crate) mod pagemap;
#[cfg_attr(
    any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))),
    path = "recoverable/atomics.rs"
)]
pub(crate) mod recoverable;
pub mod requirements;
pub(crate) mod sigbus;
pub(crate) mod smaps;
pub(crate) mod sparse;
pub(crate) mod thp;
pub(crate) mod uffd;
pub(crate) mod words;

use crate::error::{Errno, Error, ErrorKind, Op};

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::new(errno.raw_os_error())
    }
}

/// The error of a failed system call. Running out is told apart, because callers act on it.
pub(crate) fn failed(op: Op, call: &'static str, errno: rustix::io::Errno) -> Error {
    let kind = match errno {
        rustix::io::Errno::NOMEM | rustix::io::Errno::NOSPC => ErrorKind::Exhausted,
        _ => ErrorKind::Os,
    };
    Error::new(op, kind).errno_is(errno.into()).because(call)
}
