//! The machine: which frames are memory, which of them the kernel keeps out of its own map, what is a device's;
//! and the bytes behind frames.
//!
//! Frames of guests' memory have bytes. Others, where the host's kernel keeps its own things and from which EL2
//! is given what it needs, have none: they read as zeroes. So a machine of a TiB is a few numbers.
//! What the host's kernel says in structures that EL2 reads is kept beside, by address.

use std::fmt;

use super::host_struct::HostStructs;
use crate::addr::{Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::PAGE_BYTES;
use crate::range::PfnRange;

/// The bytes of frames.
pub(crate) trait FrameBytes: Send + Sync {
    /// Copies bytes out.
    ///
    /// # Errors
    /// `EIO` if the memory is gone.
    fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno>;
    /// Copies bytes in.
    ///
    /// # Errors
    /// `EIO` if the memory is gone.
    fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno>;
    /// Fills frames with zeroes.
    ///
    /// # Errors
    /// `EIO` if the memory is gone.
    fn zero(&self, frames: PfnRange) -> Result<(), Errno>;
}

impl FrameBytes for std::sync::Arc<Arena> {
    fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno> {
        Arena::read(self, at, buf).map_err(|error| error.errno())
    }

    fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno> {
        Arena::write(self, at, buf).map_err(|error| error.errno())
    }

    fn zero(&self, frames: PfnRange) -> Result<(), Errno> {
        Arena::zero(self, frames).map_err(|error| error.errno())
    }
}

/// What the firmware says of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegionKind {
    Memory,
    /// Memory that the host must not map by itself, and may give to nobody.
    #[cfg_attr(
        not(any(test, feature = "oracle")),
        expect(dead_code, reason = "a pool has none; it is here for hosts that do anything")
    )]
    NoMap,
}

/// Frames of one kind. What is of no region is a device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) frames: PfnRange,
    pub(crate) kind: RegionKind,
    /// The frame of the arena that the first one is, if they have bytes.
    pub(crate) bytes: Option<Pfn>,
}

/// The memory map, and what is in it.
pub(crate) struct Machine {
    /// Ascending, without overlap.
    regions: Vec<Region>,
    bytes: Option<Box<dyn FrameBytes>>,
    pub(super) structs: HostStructs,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl Machine {
    /// # Errors
    /// `EINVAL` for regions that overlap.
    pub(crate) fn new(
        mut regions: Vec<Region>,
        bytes: Option<Box<dyn FrameBytes>>,
    ) -> Result<Self, Errno> {
        regions.sort_by_key(|region| region.frames.start());
        let overlap = |pair: &[Region]| pair[0].frames.end() > pair[1].frames.start();
        if regions.windows(2).any(overlap) {
            return Err(Errno::EINVAL);
        }
        Ok(Self { regions, bytes, structs: HostStructs::default() })
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// One past the last frame of memory.
    pub(crate) fn end(&self) -> Pfn {
        self.regions.last().map_or(Pfn::new(0), |region| region.frames.end())
    }

    #[inline(always)]
    pub(crate) fn region_of(&self, pfn: Pfn) -> Option<&Region> {
        let at = match &self.regions[..] {
            // Most machines have one or two; no search then.
            [only] => return Some(only).filter(|region| region.frames.contains(pfn)),
            regions => regions.partition_point(|region| region.frames.end() <= pfn),
        };
        self.regions.get(at).filter(|region| region.frames.contains(pfn))
    }

    /// Whether the frame is memory, kept out of the kernel's map or not.
    pub(crate) fn is_memory(&self, pfn: Pfn) -> bool {
        self.region_of(pfn).is_some()
    }

    /// The frames around one that are all of its region, or all of the same hole.
    pub(crate) fn neighbourhood(&self, pfn: Pfn, limit: Pfn) -> (Pfn, Pfn) {
        let at = self.regions.partition_point(|region| region.frames.end() <= pfn);
        match self.regions.get(at) {
            Some(region) if region.frames.contains(pfn) => {
                (region.frames.start(), region.frames.end())
            }
            next => {
                let before = at.checked_sub(1).and_then(|at| self.regions.get(at));
                let start = before.map_or(Pfn::new(0), |region| region.frames.end());
                (start, next.map_or(limit, |region| region.frames.start()))
            }
        }
    }

    /// Whether frames are memory that may change hands.
    ///
    /// # Errors
    /// `EINVAL` if they are not all of one region or hole, `EPERM` if they are no memory, or memory that is kept
    /// out of the map.
    #[inline(always)]
    pub(crate) fn check_allowed(&self, pfn: Pfn, nr_pages: u64) -> Result<(), Errno> {
        let last = pfn.checked_add(nr_pages.saturating_sub(1)).ok_or(Errno::EINVAL)?;
        // Nearly always it is memory.
        match self.region_of(pfn) {
            Some(region) if region.kind == RegionKind::Memory && region.frames.contains(last) => {
                Ok(())
            }
            _ => Err(self.why_not_allowed(pfn, last)),
        }
    }

    #[cold]
    fn why_not_allowed(&self, pfn: Pfn, last: Pfn) -> Errno {
        let at = self.regions.partition_point(|region| region.frames.end() <= pfn);
        match self.regions.get(at) {
            Some(region) if region.frames.contains(pfn) => match region.kind {
                _ if !region.frames.contains(last) => Errno::EINVAL,
                // Memory would be allowed, and was.
                RegionKind::Memory | RegionKind::NoMap => Errno::EPERM,
            },
            Some(next) if next.frames.start() <= last => Errno::EINVAL,
            _ => Errno::EPERM,
        }
    }

    /// Where the bytes of a frame are, if it has any.
    fn backed(&self, pfn: Pfn) -> Option<(&dyn FrameBytes, Pfn)> {
        let region = self.region_of(pfn)?;
        let skip = pfn.get() - region.frames.start().get();
        Some((self.bytes.as_deref()?, region.bytes?.checked_add(skip)?))
    }

    /// Copies bytes of one frame out.
    ///
    /// # Errors
    /// `EINVAL` if they are not all of one frame, `EIO` if the memory is gone.
    pub(crate) fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno> {
        let within = in_one_frame(at, buf.len())?;
        match self.backed(at.pfn()) {
            Some((bytes, pfn)) => bytes.read(Pa::new(pfn.pa().get() + within), buf),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// Copies bytes into one frame.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub(crate) fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno> {
        let within = in_one_frame(at, buf.len())?;
        match self.backed(at.pfn()) {
            Some((bytes, pfn)) => bytes.write(Pa::new(pfn.pa().get() + within), buf),
            None => Ok(()),
        }
    }

    /// Fills a frame with zeroes.
    ///
    /// # Errors
    /// `EIO` if the memory is gone.
    pub(crate) fn zero(&self, pfn: Pfn) -> Result<(), Errno> {
        let Some((bytes, pfn)) = self.backed(pfn) else { return Ok(()) };
        bytes.zero(PfnRange::new(pfn, 1).map_err(|error| error.errno())?)
    }
}

fn in_one_frame(at: Pa, len: usize) -> Result<u64, Errno> {
    let within = at.in_page().get();
    match within + len as u64 <= PAGE_BYTES as u64 {
        true => Ok(within),
        false => Err(Errno::EINVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, nr: u64, kind: RegionKind, bytes: Option<u64>) -> Region {
        let frames = PfnRange::new(Pfn::new(start), nr).unwrap();
        Region { frames, kind, bytes: bytes.map(Pfn::new) }
    }

    fn machine() -> Machine {
        let regions = vec![
            region(0x100, 0x10, RegionKind::Memory, None),
            region(0x40, 2, RegionKind::Memory, Some(1)),
            region(0x110, 4, RegionKind::NoMap, None),
        ];
        Machine::new(regions, Some(Box::new(Arena::heap(3).unwrap()))).unwrap()
    }

    #[test]
    fn only_memory_of_one_region_may_change_hands() {
        let machine = machine();
        let check = |pfn, nr| machine.check_allowed(Pfn::new(pfn), nr).err();
        assert_eq!(check(0x40, 2), None);
        assert_eq!(check(0x40, 3), Some(Errno::EINVAL), "into a hole");
        assert_eq!(check(0x3f, 2), Some(Errno::EINVAL), "out of a hole");
        assert_eq!(check(0x10f, 2), Some(Errno::EINVAL), "into another region");
        assert_eq!(check(0x110, 1), Some(Errno::EPERM), "kept out of the map");
        for pfn in [0, 0x3f, 0x42, 0xff, 0x114, u64::MAX] {
            assert_eq!(check(pfn, 1), Some(Errno::EPERM), "{pfn:#x} is a device's");
        }
        assert_eq!(check(u64::MAX, 2), Some(Errno::EINVAL));
        assert_eq!(machine.end(), Pfn::new(0x114));
        assert!(machine.is_memory(Pfn::new(0x110)) && !machine.is_memory(Pfn::new(0x42)));
        let hole = machine.neighbourhood(Pfn::new(0x50), Pfn::new(1 << 36));
        assert_eq!(hole, (Pfn::new(0x42), Pfn::new(0x100)));
        let last = machine.neighbourhood(Pfn::new(0x200), Pfn::new(1 << 36));
        assert_eq!(last, (Pfn::new(0x114), Pfn::new(1 << 36)));
    }

    #[test]
    fn overlap_is_refused() {
        let twice = [0x10, 0x13].map(|start| region(start, 4, RegionKind::Memory, None));
        assert_eq!(Machine::new(twice.to_vec(), None).err(), Some(Errno::EINVAL));
    }

    #[test]
    fn frames_have_bytes_or_read_as_zeroes() {
        let machine = machine();
        let mut buf = [7; 4];
        for (at, kept) in [(0x41_ffc, true), (0x100_000, false), (0x9000, false)] {
            machine.write(Pa::new(at), b"gmem").unwrap();
            machine.read(Pa::new(at), &mut buf).unwrap();
            assert_eq!(&buf, if kept { b"gmem" } else { &[0; 4] }, "{at:#x}");
        }
        machine.zero(Pfn::new(0x41)).unwrap();
        machine.read(Pa::new(0x41_ffc), &mut buf).unwrap();
        assert_eq!(buf, [0; 4]);
        assert_eq!(machine.read(Pa::new(0x41_ffd), &mut buf), Err(Errno::EINVAL));
        assert_eq!(machine.write(Pa::new(u64::MAX), &buf), Err(Errno::EINVAL));
    }
}
