//! Devices: transfers by addresses that their domain translates, and the faults that they end in.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use super::Core;
use super::tlb::Iotlb;
use crate::addr::{Access, ByteSize, Ipa, Pa};
use crate::backing::Arena;
use crate::error::Error;
use crate::geometry::{PAGE_BYTES, index};

/// How many faults a domain remembers.
const MOST_FAULTS: usize = 64;

/// Why a transfer was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaFaultKind {
    /// The domain maps nothing there.
    NotMapped,
    /// The domain is fenced off.
    Detached,
    /// There is no such address, or no such memory.
    NoSuchAddress,
}

/// A transfer that was stopped: the pages before this one were transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA {access:?} at {at}: {kind:?}")]
pub struct DmaFault {
    /// Where.
    pub at: Ipa,
    /// What was tried.
    pub access: Access,
    /// Why not.
    pub kind: DmaFaultKind,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    nr: u64,
    last: VecDeque<DmaFault>,
}

impl Faults {
    fn record(&mut self, fault: DmaFault) {
        self.nr = self.nr.saturating_add(1);
        if self.last.len() == MOST_FAULTS {
            self.last.pop_front();
        }
        self.last.push_back(fault);
    }

    pub(super) fn nr(&self) -> u64 {
        self.nr
    }

    pub(super) fn last(&self) -> Vec<DmaFault> {
        self.last.iter().copied().collect()
    }
}

/// A device of a domain, whose driver may be anybody: any address gets an answer.
pub struct Device {
    core: Arc<Core>,
    tlb: Arc<Iotlb>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("tlb", &self.tlb).finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn new(core: Arc<Core>, tlb: Arc<Iotlb>) -> Self {
        Self { core, tlb }
    }

    /// Transfers bytes from memory to the device.
    ///
    /// # Errors
    /// The first page that the domain does not let it reach; those before it are transferred.
    pub fn read(&self, at: Ipa, buf: &mut [u8]) -> Result<(), DmaFault> {
        let mut at = at;
        let mut left = buf;
        while !left.is_empty() {
            let (now, later) = left.split_at_mut(left.len().min(to_page_end(at)));
            let size = ByteSize::of(now);
            self.transfer(at, Access::Read, |arena, pa| arena.read(pa, now))?;
            at = self.behind(at, size, Access::Read)?;
            left = later;
        }
        Ok(())
    }

    /// Transfers bytes from the device to memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, at: Ipa, data: &[u8]) -> Result<(), DmaFault> {
        let mut at = at;
        let mut left = data;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(to_page_end(at)));
            self.transfer(at, Access::Write, |arena, pa| arena.write(pa, now))?;
            at = self.behind(at, ByteSize::of(now), Access::Write)?;
            left = later;
        }
        Ok(())
    }

    /// A transfer inside of one page. The IOTLB is held until it is over.
    fn transfer(
        &self,
        at: Ipa,
        access: Access,
        copy: impl FnOnce(&Arena, Pa) -> Result<(), Error>,
    ) -> Result<(), DmaFault> {
        let gfn = at.gfn();
        let mut tlb = self.tlb.lock();
        let found = match tlb.find(gfn) {
            Some(frame) => Ok(Some(frame)),
            None => self.core.translate(gfn).map(|translation| {
                tlb.remember(translation);
                translation.frame_of(gfn)
            }),
        };
        let outcome = found.and_then(|frame| {
            let pa = frame.and_then(|frame| frame.pa().checked_add(at.in_page()));
            let pa = pa.ok_or(DmaFaultKind::NoSuchAddress)?;
            copy(&self.core.arena, pa).map_err(|_| DmaFaultKind::NoSuchAddress)
        });
        drop(tlb);
        outcome.map_err(|kind| self.fault(at, access, kind))
    }

    fn behind(&self, at: Ipa, size: ByteSize, access: Access) -> Result<Ipa, DmaFault> {
        let end = at.checked_add(size);
        end.ok_or_else(|| self.fault(at, access, DmaFaultKind::NoSuchAddress))
    }

    fn fault(&self, at: Ipa, access: Access, kind: DmaFaultKind) -> DmaFault {
        let fault = DmaFault { at, access, kind };
        self.core.faults.lock().record(fault);
        fault
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.core.tlbs.lock().retain(|tlb| !Arc::ptr_eq(tlb, &self.tlb));
    }
}

fn to_page_end(at: Ipa) -> usize {
    PAGE_BYTES - index(at.in_page().get())
}
