//! The bytes of a pool: one arena, addressed by [`Pa`](crate::addr::Pa), copied in and out and never
//! borrowed.
//!
//! It consists of parts, each a run of frames on a backing of its own. All are mapped into one range
//! of addresses, so that a frame number is all it takes to find its bytes. Between two parts on files
//! lies a gap of frame numbers that stand for nothing and are given to nobody.
//!
//! | file | holds |
//! |---|---|
//! | `kind` | what a part can be made of |
//! | `part` | what is wanted of a part, where parts lie, what they were obtained as |
//! | `obtain` | getting the memory |
//! | `heap` | memory from the allocator |
//! | `copies` | bytes in and out |
//! | `coverage` | how much is there, and in huge pages, by the kernel's account; making it so |
//! | `holes` | memory that goes back to the host and is had again |
//! | `probe` | what the host could provide now |

mod copies;
mod coverage;
mod heap;
mod holes;
mod kind;
mod obtain;
mod part;
mod probe;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

pub use holes::WhyKept;
pub use kind::ArenaBacking;
pub(crate) use part::Part;
pub use part::{PartReport, PartSpec};
pub(crate) use probe::probe;
pub use probe::{HostOffer, Offer};

use crate::addr::{ByteSize, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::os::mapping::Mapping;
use crate::range::PfnRange;
use heap::HeapMemory;

/// The memory of one pool, committed for as long as it lives but for what is [released](Self::release).
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Memory,
    /// In ascending order.
    parts: Box<[Part]>,
    nr_pages: u64,
    view_granule: FolioSize,
    credit: holes::Credit,
}

#[derive(Debug)]
enum Memory {
    Heap(HeapMemory),
    Files(Mapping),
}

impl Arena {
    fn new(memory: Memory, parts: Box<[Part]>, nr_pages: u64) -> Self {
        let granules = parts.iter().map(|part| part.backing.view_granule());
        let view_granule = granules.max().unwrap_or(FolioSize::Base);
        Self { memory, parts, nr_pages, view_granule, credit: holes::Credit::default() }
    }

    /// One past the last frame number, gaps included.
    pub(crate) fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// How much memory there is.
    pub(crate) fn capacity(&self) -> ByteSize {
        ByteSize::from_pages(self.parts.iter().map(|part| part.frames.nr_pages()).sum())
    }

    /// The parts, in ascending order of frames.
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The part that a frame is of; `None` in a gap and past the end.
    pub(crate) fn part_of(&self, pfn: Pfn) -> Option<&Part> {
        let at = self.parts.partition_point(|part| part.frames.end() <= pfn);
        self.parts.get(at).filter(|part| part.frames.contains(pfn))
    }

    /// Whether all of these frames are of some part.
    pub(crate) fn backs(&self, frames: PfnRange) -> bool {
        let first = self.parts.partition_point(|part| part.frames.end() <= frames.start());
        let parts = self.parts.get(first..).unwrap_or_default().iter();
        let backed = parts.map_while(|part| part.frames.intersection(&frames));
        backed.map(|backed| backed.nr_pages()).sum::<u64>() == frames.nr_pages()
    }

    /// The frames that are one page of the host's with this one, where such a page is made once and for all.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`].
    pub(crate) fn page_of(&self, pfn: Pfn) -> Result<PfnRange, Error> {
        let out_of_range = || Error::new(Op::Poison, ErrorKind::OutOfRange);
        let part = self.part_of(pfn).ok_or_else(out_of_range)?;
        let unit = part.backing.view_granule().nr_pages();
        let start = pfn.get() - (pfn.get() - part.frames.start().get()) % unit;
        PfnRange::new(Pfn::new(start), unit)
    }

    /// Whether there are files behind the arena, which views can map.
    pub(crate) fn has_files(&self) -> bool {
        matches!(self.memory, Memory::Files(_))
    }

    /// The file that holds the frames, and from which byte on. `None` on the heap, and if they are not
    /// all of one part.
    pub(crate) fn file_of(&self, frames: PfnRange) -> Option<(BorrowedFd<'_>, u64)> {
        let part = self.part_of(frames.start()).filter(|part| part.frames.covers(&frames))?;
        let skip = frames.start().get() - part.frames.start().get();
        Some((part.file.as_ref()?.as_fd(), ByteSize::from_pages(skip).get()))
    }

    /// The unit in which host views can change sides: the largest of any part.
    #[inline]
    pub(crate) fn view_granule(&self) -> FolioSize {
        self.view_granule
    }

    #[inline]
    fn base(&self) -> NonNull<u8> {
        match &self.memory {
            Memory::Heap(heap) => heap.base(),
            Memory::Files(map) => map.base(),
        }
    }
}
