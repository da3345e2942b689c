//! How much of an arena is there, and in huge pages: by the kernel's own counters.

use std::ops::Range;
use std::os::fd::AsFd;

use super::obtain::bytes;
use super::{Arena, ArenaBacking, Memory, Part};
use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::HUGE_PAGES;
use crate::os::memfd;
use crate::os::smaps::Smaps;
use crate::range::PfnRange;

impl Arena {
    /// How much the kernel backs by huge pages. On hugetlb that is what the files have; elsewhere it is
    /// what is mapped by huge entries here, and of the heap at least so much.
    pub(crate) fn huge_bytes(&self) -> ByteSize {
        let smaps = Self::smaps_for(&self.parts);
        let sizes = self.parts.iter().map(|part| self.huge_by(part, &smaps).get());
        ByteSize::from_bytes(sizes.sum())
    }

    /// The same for one part.
    pub(crate) fn huge_bytes_of(&self, part: &Part) -> ByteSize {
        self.huge_by(part, &Self::smaps_for(std::slice::from_ref(part)))
    }

    /// Reading them takes the longer the more the process has mapped, so not without need.
    fn smaps_for(parts: &[Part]) -> Smaps {
        match parts.iter().all(|part| part.backing.is_hugetlb()) {
            true => Smaps::default(),
            false => Smaps::read(),
        }
    }

    fn huge_by(&self, part: &Part, smaps: &Smaps) -> ByteSize {
        match part.backing {
            ArenaBacking::Heap => smaps.private_huge(&self.addresses(part.frames)),
            ArenaBacking::Memfd | ArenaBacking::MemfdThp => {
                smaps.shared_huge(&self.addresses(part.frames))
            }
            ArenaBacking::MemfdHugetlb2M | ArenaBacking::MemfdHugetlb1G => part.committed(),
        }
    }

    /// How much memory the files have, which is less than the capacity if somebody punched a hole from
    /// outside. The heap has all of it.
    pub(crate) fn committed(&self) -> ByteSize {
        ByteSize::from_bytes(self.parts.iter().map(|part| part.committed().get()).sum())
    }

    /// How much has no memory where it should always have some.
    pub(crate) fn missing(&self) -> ByteSize {
        self.uncommitted(|part| part.backing != ArenaBacking::Memfd)
    }

    /// How much has no memory where [`release`](Self::release) gives it back.
    pub(crate) fn released(&self) -> ByteSize {
        self.uncommitted(|part| part.backing == ArenaBacking::Memfd)
    }

    fn uncommitted(&self, of: impl Fn(&Part) -> bool) -> ByteSize {
        let lacks = |part: &&Part| of(part);
        let parts = self.parts.iter().filter(lacks);
        let lacking =
            |part: &Part| part.frames.len_bytes().get().saturating_sub(part.committed().get());
        ByteSize::from_bytes(parts.map(lacking).sum())
    }

    fn addresses(&self, frames: PfnRange) -> Range<u64> {
        let (at, len) = bytes(frames);
        let start = self.base().addr().get() + at;
        start as u64..(start + len) as u64
    }

    /// Makes huge pages of the frames, whole blocks of 2 MiB, and memory of what is a hole. The kernel
    /// takes entries out of other mappings for it: the caller has hidden the frames from views. If it
    /// fails, some may be huge.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] but for [`ArenaBacking::MemfdThp`]; [`ErrorKind::Unaligned`];
    /// [`ErrorKind::OutOfRange`] if they are not all of one part; [`ErrorKind::Exhausted`] if the host
    /// has no huge page left; [`ErrorKind::Busy`] if somebody holds one of the small ones;
    /// [`ErrorKind::MissingCapability`] before Linux 6.1, and where the host denies it.
    pub(crate) fn collapse(&self, frames: PfnRange) -> Result<(), Error> {
        let refused = |kind| Error::new(Op::Collapse, kind);
        let part = self.part_of(frames.start()).filter(|part| part.frames.covers(&frames));
        let part = part.ok_or_else(|| refused(ErrorKind::OutOfRange))?;
        let map = match &self.memory {
            Memory::Files(map) if part.backing == ArenaBacking::MemfdThp => map,
            _ => {
                return Err(refused(ErrorKind::Unsupported)
                    .because(format!("{}: pages have the size they have", part.backing)));
            }
        };
        if [frames.start().get(), frames.nr_pages()].iter().any(|at| at % HUGE_PAGES != 0) {
            return Err(refused(ErrorKind::Unaligned));
        }
        let (at, len) = bytes(frames);
        map.collapse(at, len).map_err(|error| error.of(Op::Collapse))
    }
}

impl Part {
    /// How much memory it has.
    pub(crate) fn committed(&self) -> ByteSize {
        match &self.file {
            Some(file) => memfd::committed(file.as_fd()),
            None => self.frames.len_bytes(),
        }
    }
}
