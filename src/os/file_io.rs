//! Bytes from files into memory and back, by the kernel.

// UNSAFETY: readv and writev on memory that whoever made the pieces vouches for.
#![expect(unsafe_code, reason = "the kernel reads and writes through raw pointers")]

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::Errno;

/// Memory that the kernel may write to, for as long as `'a`.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Target<'a>(libc::iovec, PhantomData<&'a ()>);

/// Memory that the kernel may read, for as long as `'a`.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Source<'a>(libc::iovec, PhantomData<&'a ()>);

/// What a source of zeroes is made of. Aligned as memory of a guest is: O_DIRECT asks for that.
#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);

static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

impl Target<'_> {
    /// # Safety
    /// For as long as the piece lives, the memory stays mapped, and is accessed by other means only in ways that
    /// go with writes at any time: raw, in atomic words, or outside of Rust.
    pub(crate) unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len }, PhantomData)
    }
}

impl<'a> Source<'a> {
    /// What may be written may be read.
    pub(crate) fn of(target: Target<'a>) -> Self {
        Self(target.0, PhantomData)
    }

    /// At most `len` bytes that are all zeroes.
    pub(crate) fn of_zeroes(len: usize) -> Self {
        let start = ZEROES.0.as_ptr().cast_mut().cast();
        Self(libc::iovec { iov_base: start, iov_len: len.min(ZEROES.0.len()) }, PhantomData)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }
}

/// Where in a file: at its own position, which moves on, or that many bytes from its beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Position,
    At(i64),
}

/// Reads what comes at once, at least a byte unless the file is at its end.
pub(crate) fn read(
    file: BorrowedFd<'_>,
    place: Place,
    into: &[Target<'_>],
) -> Result<usize, Errno> {
    let (fd, first, nr) = (file.as_raw_fd(), into.as_ptr().cast(), count(into.len()));
    repeat(|| match place {
        // SAFETY: 1. `into` is a slice of as many iovecs: the wrapper is transparent. 2. the kernel
        // may write to each: who made them vouched for it.
        Place::Position => unsafe { libc::readv(fd, first, nr) },
        // SAFETY: as above.
        Place::At(at) => unsafe { libc::preadv(fd, first, nr, at) },
    })
}

/// Writes what the file takes at once.
pub(crate) fn write(
    file: BorrowedFd<'_>,
    place: Place,
    from: &[Source<'_>],
) -> Result<usize, Errno> {
    let (fd, first, nr) = (file.as_raw_fd(), from.as_ptr().cast(), count(from.len()));
    repeat(|| match place {
        // SAFETY: 1. `from` is a slice of as many iovecs: the wrapper is transparent. 2. the kernel
        // may read each, and only reads: they are targets, or the zeroes above.
        Place::Position => unsafe { libc::writev(fd, first, nr) },
        // SAFETY: as above.
        Place::At(at) => unsafe { libc::pwritev(fd, first, nr, at) },
    })
}

fn count(nr_pieces: usize) -> libc::c_int {
    libc::c_int::try_from(nr_pieces).unwrap_or(libc::c_int::MAX)
}

/// A signal that comes before the first byte is none of our business.
fn repeat(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        if let Ok(nr) = usize::try_from(call()) {
            return Ok(nr);
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            errno => return Err(errno.map_or(Errno::EIO, Errno::new)),
        }
    }
}
