//! A vCPU's accesses without its CPU: by what it remembers, without any lock; or by a walk, under that of the tables.

use super::El2;
use super::tlb::Lines;
use super::vm::Vm;
use crate::addr::{Access, Ipa, Pa, Pfn};
use crate::state::Reader;
use crate::sync::Arc;

/// For whoever runs a vCPU. It outlives the vCPU and the VM, and is good for nothing from the VM's end on: then everything
/// is forgotten, whoever still uses something is waited for, and nothing is remembered any more.
#[derive(Clone, Debug)]
pub(crate) struct GuestTlb {
    vm: Arc<Vm>,
    vcpu: usize,
    lines: Lines,
}

impl GuestTlb {
    /// A place in the VM's domain of grace periods, for one thread. Whoever makes accesses needs one.
    pub(crate) fn reader(&self) -> Reader {
        self.lines.reader()
    }

    /// Acts on the address that this one leads to, if that is remembered and the access allowed. The page stays the
    /// guest's until `act` returns, which must be short and ask nothing of EL2: who takes the page waits for it.
    ///
    /// `None`: [`Self::walk`] may know more. So it is with a reader of another VM's.
    #[inline]
    pub(crate) fn hit<T>(
        &self,
        reader: &Reader,
        at: Ipa,
        access: Access,
        act: impl FnOnce(Pa) -> T,
    ) -> Option<T> {
        self.lines.hit(reader, at.gfn(), access, |pfn| act(within(pfn, at)))
    }

    /// The same by the tables, and remembers what it finds. The lock is held until `act` returns.
    ///
    /// `None`: the guest faults, and [`El2::vcpu_act`] says how.
    #[inline]
    pub(crate) fn walk<T>(&self, at: Ipa, access: Access, act: impl FnOnce(Pa) -> T) -> Option<T> {
        let mut guest = self.vm.mmu.lock();
        if guest.tlbs.is_closed() {
            return None;
        }
        let to = guest.translate(self.vcpu, at.gfn())?;
        to.prot.allows(access).then(|| act(within(to.pfn, at)))
    }
}

impl El2 {
    /// For whoever runs the vCPU that the CPU has loaded: a way to make its accesses without the CPU.
    pub(crate) fn guest_tlb(&self, cpu: usize) -> Option<GuestTlb> {
        let cpu = self.cpu(cpu)?;
        let loaded = cpu.loaded.as_ref()?;
        let vcpu = loaded.vcpu.tlb;
        let lines = loaded.vm.mmu.lock().tlbs.lines(vcpu)?;
        Some(GuestTlb { vm: Arc::clone(&loaded.vm), vcpu, lines })
    }
}

/// The byte of a frame that an address means.
#[inline]
pub(crate) const fn within(pfn: Pfn, at: Ipa) -> Pa {
    Pa::new(pfn.pa().get() + at.in_page().get())
}
