//! Memory that goes back to the host from inside of an arena, and is had again.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Arena, ArenaBacking};
use crate::addr::ByteSize;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::os::memory::require_available;
use crate::os::sparse;
use crate::range::PfnRange;

/// So much is asked for at once, since the host's answer is spread over several files.
const ASKED: ByteSize = ByteSize::from_mib(16);
/// So long an answer is believed.
const BELIEVED: Duration = Duration::from_millis(100);

/// Why the memory of punched pages stays with the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WhyKept {
    /// The pool is on the heap.
    Heap,
    /// The kernel would split a transparent huge page.
    TransparentHuge,
    /// The kernel takes hugetlb pages back whole or not at all.
    Hugetlb,
    /// The host did not take it.
    Refused(Errno),
}

impl fmt::Display for WhyKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Heap => f.write_str("the pool is on the heap"),
            Self::TransparentHuge => f.write_str("a transparent huge page would be split"),
            Self::Hugetlb => f.write_str("a hugetlb page goes back whole or not at all"),
            Self::Refused(errno) => write!(f, "the host did not take it ({errno})"),
        }
    }
}

impl ArenaBacking {
    /// Why its pages do not go back one by one, if they do not.
    const fn why_kept(self) -> Option<WhyKept> {
        match self {
            Self::Heap => Some(WhyKept::Heap),
            Self::Memfd => None,
            Self::MemfdThp => Some(WhyKept::TransparentHuge),
            Self::MemfdHugetlb2M | Self::MemfdHugetlb1G => Some(WhyKept::Hugetlb),
        }
    }
}

/// What the host had when it was asked last, less what was committed since.
#[derive(Debug, Default)]
pub(super) struct Credit(Mutex<Option<(Instant, u64)>>);

impl Credit {
    /// Refuses what the host does not have.
    fn ask(&self, bytes: u64) -> Result<(), Error> {
        let mut credit = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let believed = credit.filter(|(since, _)| since.elapsed() < BELIEVED);
        let left = believed.and_then(|(since, left)| Some((since, left.checked_sub(bytes)?)));
        if left.is_some() {
            *credit = left;
            return Ok(());
        }
        // With little left, one is asked about what one needs, each time.
        *credit = match require_available(ASKED) {
            Ok(()) => ASKED.get().checked_sub(bytes).map(|left| (Instant::now(), left)),
            Err(_) => None,
        };
        match *credit {
            Some(_) => Ok(()),
            None => require_available(ByteSize::from_bytes(bytes)),
        }
    }
}

impl Arena {
    /// Why these frames, which are all of one folio, do not go back to the host one by one, if they do not.
    pub(crate) fn why_kept(&self, frames: PfnRange) -> Option<WhyKept> {
        self.part_of(frames.start())?.backing.why_kept()
    }

    /// Gives the memory of frames back to the host. Nobody touches them until it is
    /// [committed](Self::commit) again; they are zero then.
    ///
    /// # Errors
    /// Why it was kept. The frames are as before.
    pub(crate) fn release(&self, frames: PfnRange) -> Result<(), WhyKept> {
        if let Some(why) = self.why_kept(frames) {
            return Err(why);
        }
        let (fd, at) = self.file_of(frames).ok_or(WhyKept::Refused(Errno::EINVAL))?;
        sparse::release(fd, at, frames.len_bytes()).map_err(WhyKept::Refused)
    }

    /// Has memory for frames that were released, or were not: for all of them, or for none more than
    /// before.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], [`ErrorKind::Os`].
    pub(crate) fn commit(
        &self,
        op: Op,
        runs: impl Iterator<Item = PfnRange> + Clone,
    ) -> Result<(), Error> {
        let released = runs.clone().filter(|&run| self.why_kept(run).is_none());
        let bytes: u64 = released.map(|run| run.len_bytes().get()).sum();
        if bytes > 0 {
            self.credit.ask(bytes).map_err(|error| error.of(op))?;
        }
        let mut done = 0;
        let outcome = runs.clone().try_for_each(|run| {
            self.commit_run(op, run)?;
            done += 1;
            Ok(())
        });
        if outcome.is_err() {
            for run in runs.take(done) {
                // What the host does not take back now it has lost until the next touch.
                let _ = self.release(run);
            }
        }
        outcome
    }

    /// Sees to it that frames which are to be touched have memory, where the host may have none for a touch:
    /// of its hugetlb pages there are so many, and somebody may have punched a hole from outside.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], [`ErrorKind::Os`].
    pub(crate) fn require(&self, op: Op, frames: PfnRange) -> Result<(), Error> {
        let is_hugetlb = |part: &super::Part| part.backing.is_hugetlb();
        if !self.part_of(frames.start()).is_some_and(is_hugetlb) {
            return Ok(());
        }
        self.refill(op, frames)
    }

    /// Has memory for frames that are in use, should somebody have punched holes there from outside.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], [`ErrorKind::Os`].
    pub(crate) fn refill(&self, op: Op, frames: PfnRange) -> Result<(), Error> {
        let (fd, at) = self.file_of(frames).ok_or_else(|| Error::new(op, ErrorKind::OutOfRange))?;
        sparse::commit(op, fd, at, frames.len_bytes())
    }

    fn commit_run(&self, op: Op, run: PfnRange) -> Result<(), Error> {
        if fails(FailPoint::Commit) {
            return Err(Error::new(op, ErrorKind::Exhausted));
        }
        if self.why_kept(run).is_some() {
            return Ok(());
        }
        let (fd, at) = self.file_of(run).ok_or_else(|| Error::new(op, ErrorKind::OutOfRange))?;
        sparse::commit(op, fd, at, run.len_bytes())
    }
}
