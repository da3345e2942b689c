//! Addresses that a VM leaves to its VMM: an access there, where nothing is mapped, stops the vCPU, and whoever runs it
//! answers in a device's place. Everywhere else such an access is the guest's own abort.

use super::Gunyah;
use super::error::HypError;
use super::rm::Vmid;
use super::rm::vm::VmState;
use super::touch::{Abort, Bytes};
use crate::addr::Ipa;

/// An address space has no more of them, so that nobody fills the heap with small ones.
const MOST_RANGES: u32 = 128;
/// What is beyond is no address.
const ADDRESS_BITS: u32 = 52;

/// What is left of a range, by the address that it was added with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    base: u64,
    start: u64,
    end: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Vmmio {
    ranges: Vec<Range>,
    nr: u32,
}

fn end_of(base: u64, size: u64) -> Result<u64, HypError> {
    if size == 0 {
        return Err(HypError::ArgumentSize);
    }
    base.checked_add(size).ok_or(HypError::AddrOverflow)
}

fn within_limit(end: u64) -> Result<(), HypError> {
    match end <= 1 << ADDRESS_BITS {
        true => Ok(()),
        false => Err(HypError::ArgumentSize),
    }
}

impl Vmmio {
    /// # Errors
    /// In this order: `ArgumentSize` for none, `AddrOverflow`, `NoResources` if there are as many as there may be,
    /// `ArgumentSize` beyond what is an address, `Busy` if part of it was added before.
    pub(super) fn add(&mut self, base: u64, size: u64) -> Result<(), HypError> {
        let end = end_of(base, size)?;
        if self.nr == MOST_RANGES {
            return Err(HypError::NoResources);
        }
        within_limit(end)?;
        if self.ranges.iter().any(|range| range.start < end && base < range.end) {
            return Err(HypError::Busy);
        }
        self.ranges.push(Range { base, start: base, end });
        self.nr += 1;
        Ok(())
    }

    /// Takes a range back, from where it begins: all of it, or, as in the original, less.
    ///
    /// # Errors
    /// In this order: `ArgumentSize` for none, `AddrOverflow`, `ArgumentSize` beyond what is an address, `Busy` if it is
    /// not all of one range that begins there.
    pub(super) fn remove(&mut self, base: u64, size: u64) -> Result<(), HypError> {
        let end = end_of(base, size)?;
        within_limit(end)?;
        let fits = |range: &Range| range.base == base && range.start == base && end <= range.end;
        let at = self.ranges.iter().position(fits).ok_or(HypError::Busy)?;
        self.ranges[at].start = end;
        if self.ranges[at].start == self.ranges[at].end {
            self.ranges.swap_remove(at);
        }
        self.nr = self.nr.saturating_sub(1);
        Ok(())
    }

    /// Whether an access is all in what one call added.
    fn covers(&self, at: u64, size: u64) -> bool {
        let end = at.checked_add(size);
        let covers = |range: &Range| range.start <= at && end.is_some_and(|end| end <= range.end);
        size > 0 && self.ranges.iter().any(covers)
    }
}

/// Why a vCPU that was run stops, by the numbers of `vcpu_run`. Guests here neither sleep nor ask PSCI for anything, and
/// nothing of the hypervisor's takes long: `EXPECTS_WAKEUP` 1 and `PSCI_SYSTEM_RESET` 0x100 do not occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RunState {
    /// It can go on: the access is done, or the guest has its abort.
    Ready,
    /// Its VM has ended, or has not begun.
    PoweredOff,
    /// Its VM is halted.
    Blocked,
    /// An address, and how many bytes the guest waits for.
    VmmioRead(Ipa, usize),
    /// An address, how many bytes, and the value.
    VmmioWrite(Ipa, usize, u64),
    /// Nobody can make it go on.
    Fault,
}

impl RunState {
    /// What registers 1 to 4 say.
    pub(crate) fn registers(self) -> [u64; 4] {
        match self {
            Self::Ready => [0; 4],
            // Not for good: a VM may be made again.
            Self::PoweredOff => [2, 0, 0, 0],
            Self::Blocked => [3, 0, 0, 0],
            Self::VmmioRead(at, nr) => [4, at.get(), nr as u64, 0],
            Self::VmmioWrite(at, nr, value) => [5, at.get(), nr as u64, value],
            Self::Fault => [6, 0, 0, 0],
        }
    }
}

impl Gunyah {
    /// A vCPU makes an access, and whoever runs it sees how that ends. A load of a register's size or less.
    pub(crate) fn run(&self, vmid: Vmid, at: Ipa, bytes: Bytes<'_>) -> RunState {
        let (nr, stored) = match &bytes {
            Bytes::Load(buf) => (buf.len(), None),
            Bytes::Store(buf) => {
                let mut value = [0; 8];
                value.iter_mut().zip(buf.iter()).for_each(|(to, from)| *to = *from);
                (buf.len(), Some(u64::from_le_bytes(value)))
            }
        };
        match self.vcpu(vmid, at, bytes) {
            Ok(()) => RunState::Ready,
            Err(Abort::NotRunning) => match self.state(vmid) {
                Some(VmState::Paused) => RunState::Blocked,
                _ => RunState::PoweredOff,
            },
            Err(Abort::Impossible) => RunState::Fault,
            // More than a register holds is not decoded: the guest gets its abort.
            Err(Abort::External) if nr <= 8 && self.is_vmmio(vmid, at, nr as u64) => match stored {
                Some(value) => RunState::VmmioWrite(at, nr, value),
                None => RunState::VmmioRead(at, nr),
            },
            Err(Abort::External) => RunState::Ready,
        }
    }

    fn state(&self, vmid: Vmid) -> Option<VmState> {
        self.world.read().rm.vms.get(&vmid).map(|vm| vm.state)
    }

    fn is_vmmio(&self, vmid: Vmid, at: Ipa, nr: u64) -> bool {
        let world = self.world.read();
        let home = world.rm.vms.get(&vmid).and_then(|vm| vm.home);
        let space = home.and_then(|home| world.hyp.aspaces.get(&home.aspace));
        space.is_some_and(|space| {
            let is_mapped = space.tree.translate(at.gfn()).is_some();
            !is_mapped && space.vmmio.covers(at.get(), nr)
        })
    }
}
