//! Where memory goes out to another process: files and ranges, as vhost-user wants them.

use std::os::fd::BorrowedFd;

use super::layout::Exported;
use super::object::{GuestMemfd, Inner};
use super::pin::{OwnerTag, PinGuard, PinMode};
use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::range::{PfnRange, PgoffRange};

/// Pages that another process has mapped, or may have. They count as mapped, and stay shared and in place, until
/// this is dropped, which says that the other process has given them back.
///
/// # What such a peer can do
/// It has the file, not the range: it can map **all** memory of the object, private pages among them, read and
/// write it, and punch holes into it. It keeps what it has mapped for as long as it lives, whatever it says.
/// It cannot change the file's size, take its seals away or add others, and it reaches no other object: the pool is
/// this one's alone, and once anything was exported no other object ever comes. So a peer is
/// trusted like the VMM itself; what a guest has private is kept from it by a hypervisor, if by anybody.
#[derive(Debug)]
#[must_use = "the memory counts as given back when this is dropped"]
pub struct Export {
    pin: PinGuard,
    runs: Vec<(PgoffRange, PfnRange)>,
    key: usize,
}

/// Consecutive pages of an export that are consecutive in their file.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ExportedRegion<'a> {
    /// Which pages of the object.
    pub pages: PgoffRange,
    /// The file that holds them; to be sent over a socket.
    pub file: BorrowedFd<'a>,
    /// Where in the file the first of them begins.
    pub file_start: ByteSize,
}

impl GuestMemfd {
    /// Lends shared pages to another process, under the name of `owner`. Pages without memory get some.
    ///
    /// The object must have a pool of its own, made with
    /// [`PoolBuilder::dedicated`](crate::PoolBuilder::dedicated). See [`Export`] for what the other process can
    /// do then.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the pool is not dedicated, or on the heap; [`ErrorKind::Unaligned`] on
    /// hugetlb unless the range is of whole huge pages; those of [`pin`](Self::pin) and
    /// [`allocate`](Self::allocate).
    pub fn export(&self, range: PgoffRange, owner: OwnerTag) -> Result<Export, Error> {
        let op = Op::Export;
        let object = &*self.0;
        object.check_range(op, range)?;
        object.reservation.check_exportable().map_err(|error| error.on(range))?;
        if !object.arena.has_files() {
            return Err(Error::new(op, ErrorKind::Unsupported).because("the pool is on the heap"));
        }
        let granule = object.reservation.pool().view_granule().nr_pages();
        if range.start().get() % granule != 0 || range.nr_pages() % granule != 0 {
            return Err(Error::new(op, ErrorKind::Unaligned)
                .on(range)
                .because("on hugetlb files are mapped by huge pages"));
        }
        let pin = self.pin(range, owner, PinMode::Counted).map_err(|error| error.of(op))?;
        let pin = pin.into_owned();
        self.allocate(range).map_err(|error| error.of(op))?;
        let runs = object.file_runs(range)?;
        // From here on the file is out.
        object.reservation.spend().map_err(|error| error.on(range))?;
        let key = object.layout.write().exports.insert(Exported { pages: range, owner });
        Ok(Export { pin, runs, key })
    }
}

impl Inner {
    /// Pinned pages as runs of a file each.
    fn file_runs(&self, range: PgoffRange) -> Result<Vec<(PgoffRange, PfnRange)>, Error> {
        let mut runs: Vec<(PgoffRange, PfnRange)> = Vec::new();
        for (pages, frames) in self.frames.resident(range) {
            // Frames that follow one another are of one file.
            if let Some((last_pages, last_frames)) = runs.last_mut() {
                let joined = (last_pages.end() == pages.start()
                    && last_frames.end() == frames.start())
                .then(|| last_pages.hull_if_joined(&pages).zip(last_frames.hull_if_joined(&frames)))
                .flatten();
                if let Some((pages, frames)) = joined {
                    (*last_pages, *last_frames) = (pages, frames);
                    continue;
                }
            }
            if fails(FailPoint::Memory) || runs.try_reserve(1).is_err() {
                return Err(Error::new(Op::Export, ErrorKind::Exhausted).on(range));
            }
            runs.push((pages, frames));
        }
        Ok(runs)
    }
}

impl Export {
    /// The object whose pages these are.
    pub fn memfd(&self) -> &GuestMemfd {
        self.pin.memfd()
    }

    /// All pages that are lent.
    pub fn range(&self) -> PgoffRange {
        self.pin.range()
    }

    /// Under whose name.
    pub fn owner(&self) -> OwnerTag {
        self.pin.owner()
    }

    /// What to send: for each run of the range the file, and where in it. Ascending, and together all of the
    /// range.
    pub fn regions(&self) -> impl Iterator<Item = ExportedRegion<'_>> {
        let arena = &self.memfd().0.arena;
        self.runs.iter().filter_map(|&(pages, frames)| {
            let (file, start) = arena.file_of(frames)?;
            Some(ExportedRegion { pages, file, file_start: ByteSize::from_bytes(start) })
        })
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.memfd().0.layout.write().exports.try_remove(self.key);
    }
}
