//! What only hosts have that are written for tests, benches and the oracle: threads that are CPUs, and looks at what EL2 has
//! in its hands.

use super::access::Bytes;
use super::guest_call::GuestAnswer;
use super::host_mmu::Owner;
use super::on_cpu::OnCpu;
use super::vm::{Cpu, Loaded};
use super::{El2, Pages};
use crate::addr::Pfn;
use crate::error::Errno;
use crate::sync::SpinGuard;

/// A CPU that a thread is. Its lock is the first of all, so nothing else may be locked by who enters.
#[derive(Debug)]
pub(crate) struct EnteredCpu<'a> {
    el2: &'a El2,
    nr: usize,
    cpu: SpinGuard<'a, Cpu>,
}

impl EnteredCpu<'_> {
    /// As [`El2::host_call`].
    #[inline]
    pub(crate) fn host_call(&mut self, x: [u64; 5]) -> [u64; 2] {
        self.el2.host_call_on(&mut OnCpu::Entered { nr: self.nr, cpu: &mut self.cpu }, x)
    }

    /// As [`El2::guest_call`].
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub(crate) fn guest_call(&mut self, x: [u64; 4]) -> Result<GuestAnswer, Errno> {
        self.el2.guest_call_on(&mut OnCpu::Entered { nr: self.nr, cpu: &mut self.cpu }, x)
    }
}

impl El2 {
    /// The calling thread is this CPU until it drops what it gets. `None` for a CPU that the machine has not.
    pub(crate) fn enter(&self, nr: usize) -> Option<EnteredCpu<'_>> {
        Some(EnteredCpu { el2: self, nr, cpu: self.cpu(nr)? })
    }

    /// Does something with the vCPU that a CPU has loaded.
    ///
    /// # Errors
    /// `EINVAL` if it has none; what `act` says.
    pub(crate) fn with_vcpu<T>(
        &self,
        cpu: usize,
        act: impl FnOnce(&mut Loaded) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.with_vcpu_on(&mut OnCpu::Number(cpu), act)
    }

    /// Whether a guest has a frame where its firmware is to be.
    pub(crate) fn has_firmware(&self, pfn: Pfn) -> bool {
        let vms = self.vms.lock();
        let host = self.host.lock();
        let Ok(Some(Owner::Guest(page))) = host.owner(pfn) else { return false };
        let at = vms.get(page.handle).and_then(|entry| entry.vm.mmu.lock().firmware_at);
        host.firmware_for(at, page.gfn, Pages::one(pfn)).is_ok_and(|load| load.is_some())
    }
}

impl Bytes<'_> {
    /// The same once more.
    pub(crate) fn again(&mut self) -> Bytes<'_> {
        match self {
            Self::Load(buf) => Bytes::Load(buf),
            Self::Store(buf) => Bytes::Store(buf),
        }
    }
}
