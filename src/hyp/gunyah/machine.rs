//! The machine: banks of memory, a device's registers, frames for the hypervisor's tables; and the bytes behind
//! frames, or none of them, so that a machine of a TiB is a few numbers.

use std::fmt;
use std::sync::Arc;

use super::error::HypError;
use crate::addr::{Pa, Pfn};
use crate::backing::Arena;
use crate::geometry::PAGE_BYTES;
use crate::range::PfnRange;

/// Memory in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bank {
    pub(crate) frames: PfnRange,
    /// The frame of the arena that the first one is, if they have bytes.
    pub(crate) bytes: Option<Pfn>,
}

/// What there is.
pub(crate) struct Machine {
    /// Ascending, without overlap. The host's.
    banks: Vec<Bank>,
    /// What devices answer to.
    device: PfnRange,
    /// The hypervisor's heap.
    heap: PfnRange,
    bytes: Option<Arc<Arena>>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("banks", &self.banks).finish_non_exhaustive()
    }
}

impl Machine {
    /// # Errors
    /// `ArgumentInvalid` for parts that overlap, or that lie beyond what the resource manager counts in.
    pub(crate) fn new(
        mut banks: Vec<Bank>,
        device: PfnRange,
        heap: PfnRange,
        bytes: Option<Arc<Arena>>,
    ) -> Result<Self, HypError> {
        banks.sort_by_key(|bank| bank.frames.start());
        let mut all: Vec<_> = banks.iter().map(|bank| bank.frames).collect();
        all.extend([device, heap]);
        all.sort_by_key(PfnRange::start);
        let overlap = all.windows(2).any(|two| two[0].end() > two[1].start());
        let beyond = all.last().is_some_and(|last| last.end() > super::rm::ADDRESS_LIMIT);
        match overlap || beyond {
            true => Err(HypError::ArgumentInvalid),
            false => Ok(Self { banks, device, heap, bytes }),
        }
    }

    pub(crate) fn banks(&self) -> &[Bank] {
        &self.banks
    }

    pub(crate) fn device(&self) -> PfnRange {
        self.device
    }

    pub(crate) fn heap(&self) -> PfnRange {
        self.heap
    }

    fn backed(&self, pfn: Pfn) -> Option<(&Arc<Arena>, Pfn)> {
        let at = self.banks.partition_point(|bank| bank.frames.end() <= pfn);
        let bank = self.banks.get(at).filter(|bank| bank.frames.contains(pfn))?;
        let skip = pfn.get() - bank.frames.start().get();
        Some((self.bytes.as_ref()?, bank.bytes?.checked_add(skip)?))
    }

    /// Copies bytes of one frame out. What has none reads as zeroes.
    ///
    /// # Errors
    /// `ArgumentSize` if they are not all of one frame, `Failure` if the memory is gone.
    pub(crate) fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), HypError> {
        let within = in_one_frame(at, buf.len())?;
        match self.backed(at.pfn()) {
            Some((arena, pfn)) => {
                arena.read(Pa::new(pfn.pa().get() + within), buf).map_err(|_| HypError::Failure)
            }
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
    pub(crate) fn write(&self, at: Pa, buf: &[u8]) -> Result<(), HypError> {
        let within = in_one_frame(at, buf.len())?;
        match self.backed(at.pfn()) {
            Some((arena, pfn)) => {
                arena.write(Pa::new(pfn.pa().get() + within), buf).map_err(|_| HypError::Failure)
            }
            None => Ok(()),
        }
    }

    /// Fills frames with zeroes.
    ///
    /// # Errors
    /// `Failure` if the memory is gone.
    pub(crate) fn zero(&self, frames: PfnRange) -> Result<(), HypError> {
        let Some(arena) = &self.bytes else { return Ok(()) };
        for bank in &self.banks {
            let Some((part, first)) = bank.frames.intersection(&frames).zip(bank.bytes) else {
                continue;
            };
            let skip = part.start().get() - bank.frames.start().get();
            let behind = first.checked_add(skip).ok_or(HypError::Failure)?;
            let behind = PfnRange::new(behind, part.nr_pages()).map_err(|_| HypError::Failure)?;
            arena.zero(behind).map_err(|_| HypError::Failure)?;
        }
        Ok(())
    }
}

fn in_one_frame(at: Pa, len: usize) -> Result<u64, HypError> {
    let within = at.in_page().get();
    match within + len as u64 <= PAGE_BYTES as u64 {
        true => Ok(within),
        false => Err(HypError::ArgumentSize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, nr: u64) -> PfnRange {
        PfnRange::new(Pfn::new(start), nr).unwrap()
    }

    #[test]
    fn parts_do_not_overlap_and_bytes_are_where_they_were_put() {
        let bank = |start, nr, bytes: Option<u64>| Bank {
            frames: range(start, nr),
            bytes: bytes.map(Pfn::new),
        };
        let banks = vec![bank(0x40, 2, Some(1)), bank(0x10, 4, None)];
        let (device, heap) = (range(0x80, 1), range(0x50, 1));
        let arena = Arena::heap(3).unwrap();
        for wrong in
            [range(0x41, 1), range(0x0f, 2), range(super::super::rm::ADDRESS_LIMIT.get(), 1)]
        {
            assert!(Machine::new(banks.clone(), device, wrong, None).is_err());
        }
        let machine = Machine::new(banks, device, heap, Some(arena)).unwrap();
        let mut buf = [7; 4];
        for (at, kept) in [(0x41_ffc, true), (0x10_000, false), (0x80_000, false)] {
            machine.write(Pa::new(at), b"gmem").unwrap();
            machine.read(Pa::new(at), &mut buf).unwrap();
            assert_eq!(&buf, if kept { b"gmem" } else { &[0; 4] }, "{at:#x}");
        }
        machine.zero(range(0x30, 0x20)).unwrap();
        machine.read(Pa::new(0x41_ffc), &mut buf).unwrap();
        assert_eq!(buf, [0; 4]);
        assert_eq!(machine.read(Pa::new(0x41_ffd), &mut buf), Err(HypError::ArgumentSize));
        assert_eq!(machine.write(Pa::new(u64::MAX), &buf), Err(HypError::ArgumentSize));
    }
}
