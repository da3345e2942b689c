//! Files straight into guest memory and back: pinned first, then moved by the kernel in large pieces.

use std::os::fd::{AsFd, BorrowedFd};

use super::access::failed_at;
use super::host_view::HostView;
use super::object::{GuestMemfd, Inner};
use super::pin::{OwnerTag, PinMode};
use crate::addr::{ByteSize, Offset, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::Behind;
use crate::geometry::index;
use crate::os::file_io::{self, Place, Source};
use crate::range::PfnRange;

/// How many pieces go into one system call. A piece is as long as frames are consecutive.
const MOST_PIECES: usize = 256;

/// Where in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FilePlace {
    /// At the file's own position, which moves on: all that pipes and sockets have.
    Position,
    /// So many bytes from its beginning. The file's own position stays.
    At(ByteSize),
}

/// What came of moving bytes between a file and memory. Nothing is lost: whoever goes on does so at as many
/// bytes as have moved, in the file and in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "less may have moved than was asked for"]
pub struct Transfer {
    wanted: ByteSize,
    moved: ByteSize,
    stopped: Option<Error>,
}

impl Transfer {
    /// How much has moved.
    pub fn moved(&self) -> ByteSize {
        self.moved
    }

    /// Why it stopped there; `None` if all has moved, or the file is at its end.
    pub fn stopped(&self) -> Option<&Error> {
        self.stopped.as_ref()
    }

    /// Whether all has moved that was asked for.
    pub fn is_complete(&self) -> bool {
        self.moved == self.wanted
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl Direction {
    fn op(self) -> Op {
        match self {
            Self::Read => Op::ReadFile,
            Self::Write => Op::WriteFile,
        }
    }

    fn call(self) -> &'static str {
        match self {
            Self::Read => "preadv",
            Self::Write => "pwritev",
        }
    }
}

impl GuestMemfd {
    /// Reads from a file into shared memory until `len` bytes are there, the file is at its end, or it has no more to
    /// give now. No byte goes through a buffer of ours. Pages without memory get some.
    ///
    /// The whole range is pinned under the name of `owner` until this returns: whoever wants to convert part of
    /// it is told who is at work there. A file that makes readers wait (a pipe) keeps it pinned as long.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`], [`ErrorKind::Overflow`], and those of [`pin`](Self::pin) and
    /// [`allocate`](Self::allocate); nothing has been read then. What the file answers after that is in
    /// [`Transfer::stopped`], and [`ErrorKind::MemoryFailure`], with the page, if the memory is not there any more.
    pub fn read_from_file(
        &self,
        file: impl AsFd,
        from: FilePlace,
        at: Offset,
        len: ByteSize,
        owner: OwnerTag,
    ) -> Result<Transfer, Error> {
        self.transfer(Direction::Read, file.as_fd(), from, at, len, owner)
    }

    /// Writes shared memory to a file until `len` bytes are there, or it takes no more. Pages without memory are
    /// written as zeroes, and get none.
    ///
    /// The range is pinned meanwhile, as in [`read_from_file`](Self::read_from_file). The guest may change it
    /// while it is being written, as with any device.
    ///
    /// # Errors
    /// As [`read_from_file`](Self::read_from_file), but for those of `allocate`.
    pub fn write_to_file(
        &self,
        file: impl AsFd,
        to: FilePlace,
        at: Offset,
        len: ByteSize,
        owner: OwnerTag,
    ) -> Result<Transfer, Error> {
        self.transfer(Direction::Write, file.as_fd(), to, at, len, owner)
    }

    fn transfer(
        &self,
        direction: Direction,
        file: BorrowedFd<'_>,
        place: FilePlace,
        at: Offset,
        len: ByteSize,
        owner: OwnerTag,
    ) -> Result<Transfer, Error> {
        let op = direction.op();
        let object = &*self.0;
        let mut transfer = Transfer { wanted: len, moved: ByteSize::default(), stopped: None };
        let too_far = || Error::new(op, ErrorKind::Overflow);
        let place = |moved: ByteSize| match place {
            FilePlace::Position => Ok(Place::Position),
            FilePlace::At(start) => {
                let at = start.get().checked_add(moved.get()).ok_or_else(too_far)?;
                i64::try_from(at).map(Place::At).map_err(|_| too_far())
            }
        };
        place(len)?;
        let bytes = usize::try_from(len.get()).map_err(|_| too_far())?;
        let Some(pages) = object.pages_of(op, at, bytes)? else { return Ok(transfer) };
        // From here on the pages stay shared, and whatever frames they have stay theirs.
        let _pin = self.pin(pages, owner, PinMode::Counted).map_err(|error| error.of(op))?;
        if direction == Direction::Read && !object.is_resident(pages) {
            self.allocate(pages).map_err(|error| error.of(op))?;
        }
        while !transfer.is_complete() {
            let moved = transfer.moved;
            let more = at.checked_add(moved).ok_or_else(too_far).and_then(|at| {
                let left = index(len.get().saturating_sub(moved.get()));
                object.move_some(direction, file, place(moved)?, at, left)
            });
            match more {
                Ok(0) => break,
                Ok(nr) => transfer.moved = ByteSize::from_bytes(moved.get() + nr as u64),
                // Not as an error of all of it: somebody would lose count of what has moved.
                Err(error) => {
                    transfer.stopped = Some(error.on(pages));
                    break;
                }
            }
        }
        Ok(transfer)
    }
}

impl Inner {
    /// One system call's worth of pinned memory; says how many bytes that were.
    fn move_some(
        &self,
        direction: Direction,
        file: BorrowedFd<'_>,
        place: Place,
        at: Offset,
        len: usize,
    ) -> Result<usize, Error> {
        let op = direction.op();
        let moved = match direction {
            Direction::Read => {
                let mut pieces = Vec::new();
                self.each_piece(op, at, len, |behind, _| match behind {
                    Some((frames, skip, len)) => {
                        push(op, &mut pieces, self.arena.target(frames, skip, len)?)
                    }
                    // All of it was there, and is pinned.
                    None => Err(Error::new(op, ErrorKind::OutOfRange)),
                })?;
                file_io::read(file, place, &pieces)
            }
            Direction::Write => {
                let mut pieces = Vec::new();
                self.each_piece(op, at, len, |behind, mut len| {
                    if let Some((frames, skip, len)) = behind {
                        let target = self.arena.target(frames, skip, len)?;
                        return push(op, &mut pieces, Source::of(target));
                    }
                    while len > 0 && pieces.len() < MOST_PIECES {
                        let zeroes = Source::of_zeroes(len);
                        len -= zeroes.len();
                        push(op, &mut pieces, zeroes)?;
                    }
                    // What is left of them would have to come before what follows.
                    if len > 0 { Ok(More::No) } else { Ok(More::Yes) }
                })?;
                file_io::write(file, place, &pieces)
            }
        };
        moved.map_err(|errno| {
            // EFAULT says private, and that is what none of it is.
            let lost = (errno == Errno::EFAULT).then(|| self.first_lost(op, at, len)).flatten();
            lost.unwrap_or_else(|| {
                Error::new(op, ErrorKind::Os).errno_is(errno).because(direction.call())
            })
        })
    }

    /// Why the first page of the bytes whose memory is gone cannot be read.
    #[cold]
    fn first_lost(&self, op: Op, at: Offset, len: usize) -> Option<Error> {
        let pages = self.pages_of(op, at, len).ok()??;
        let failed = |page: Pgoff| {
            let place = self.frames.frame(page)?.pa();
            let error = self.arena.read(place, &mut [0]).err()?;
            Some(failed_at(error.of(op), page.offset()))
        };
        pages.iter().find_map(failed)
    }

    /// Goes through the bytes piece by piece: what is behind each (the frames, how many bytes to skip in them, and
    /// how many then follow), if anything is, and how long it is.
    fn each_piece(
        &self,
        op: Op,
        at: Offset,
        len: usize,
        mut piece: impl FnMut(Option<(PfnRange, usize, usize)>, usize) -> Result<More, Error>,
    ) -> Result<(), Error> {
        let Some(pages) = self.pages_of(op, at, len)? else { return Ok(()) };
        let mut left = len;
        let mut skip = index(at.in_page().get());
        for (part, behind) in self.frames.parts(pages) {
            let here = index(part.len_bytes().get()).saturating_sub(skip).min(left);
            let frames = match behind {
                Behind::Frames(frames) => Some((frames, skip, here)),
                Behind::Nothing | Behind::Holes(_) => None,
            };
            if matches!(piece(frames, here)?, More::No) {
                break;
            }
            left -= here;
            skip = 0;
        }
        Ok(())
    }
}

/// Whether there is room for another piece.
enum More {
    Yes,
    No,
}

fn push<T>(op: Op, pieces: &mut Vec<T>, piece: T) -> Result<More, Error> {
    if fails(FailPoint::Memory) || pieces.try_reserve(1).is_err() {
        return Err(Error::new(op, ErrorKind::Exhausted));
    }
    pieces.push(piece);
    Ok(if pieces.len() < MOST_PIECES { More::Yes } else { More::No })
}

impl HostView {
    /// Reads from a file into shared memory; as [`GuestMemfd::read_from_file`].
    ///
    /// # Errors
    /// As [`GuestMemfd::read_from_file`].
    pub fn read_from_file(
        &self,
        file: impl AsFd,
        from: FilePlace,
        at: Offset,
        len: ByteSize,
        owner: OwnerTag,
    ) -> Result<Transfer, Error> {
        self.memfd().read_from_file(file, from, at, len, owner)
    }

    /// Writes shared memory to a file; as [`GuestMemfd::write_to_file`].
    ///
    /// # Errors
    /// As [`GuestMemfd::write_to_file`].
    pub fn write_to_file(
        &self,
        file: impl AsFd,
        to: FilePlace,
        at: Offset,
        len: ByteSize,
        owner: OwnerTag,
    ) -> Result<Transfer, Error> {
        self.memfd().write_to_file(file, to, at, len, owner)
    }
}
