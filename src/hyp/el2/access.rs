//! Who touches bytes, and what becomes of that. Each kind of access has its own observable result when the page is
//! somebody else's.

use super::Pages;
use super::guest_tlb::within;
use super::host_call::HostCall;
use super::incident::Incident;
use super::transition::{unuse_dma, use_dma};
use super::vm::{Fault, FaultKind};
use super::{El2, State};
use crate::addr::{Access, Ipa, Pa};
use crate::error::Errno;
use crate::state::{Flaw, seeded};

/// Bytes on their way out of memory or into it. All of them are of one page.
#[derive(Debug)]
pub(crate) enum Bytes<'a> {
    Load(&'a mut [u8]),
    Store(&'a [u8]),
}

#[cfg(any(test, feature = "oracle", all(loom, feature = "loom")))]
impl Bytes<'_> {
    pub(crate) const fn access(&self) -> Access {
        match self {
            Self::Load(_) => Access::Read,
            Self::Store(_) => Access::Write,
        }
    }
}

/// Why user space was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// `SIGSEGV` with `SEGV_ACCERR`: the page is mapped, and not the host's.
    SegvAccerr,
    /// `SIGBUS`: nothing answers there, or it is broken.
    Bus,
}

/// What the kernel did in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelOutcome {
    Done,
    /// A guest's page was destroyed first, and the access was made again.
    DoneAfterReclaim,
    /// "Access to hypervisor-protected memory": a real host stops here.
    Oops,
    /// A real host asks for the page for ever.
    Stuck,
}

/// Why a vCPU did not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestStop {
    /// The host is to do something about it.
    Fault(Fault),
    /// No vCPU is loaded, or the bytes are not of one page.
    Invalid,
    /// The memory is broken.
    #[cfg(any(test, feature = "oracle", all(loom, feature = "loom")))]
    Broken,
}

impl El2 {
    fn copy(&self, at: Pa, bytes: &mut Bytes<'_>) -> Result<(), Errno> {
        match bytes {
            Bytes::Load(buf) => self.machine.read(at, buf),
            Bytes::Store(buf) => self.machine.write(at, buf),
        }
    }

    /// An access of the host's at a physical address: translated by stage 2, which maps lazily. The lock is held until
    /// the bytes are copied, so nobody takes the page in between.
    fn host_access(&self, cpu: usize, at: Pa, bytes: &mut Bytes<'_>) -> Result<(), Errno> {
        let mut host = self.host.lock();
        let to = host.translate(cpu, at.pfn())?;
        let at = Pa::new(to.pfn.pa().get() + at.in_page().get());
        self.copy(at, bytes)
    }

    /// The host's user space loads or stores through a mapping of its own.
    ///
    /// # Errors
    /// The signal that it gets.
    pub(crate) fn user(&self, cpu: usize, at: Pa, mut bytes: Bytes<'_>) -> Result<(), Signal> {
        self.host_access(cpu, at, &mut bytes).map_err(|errno| match errno {
            Errno::EPERM => Signal::SegvAccerr,
            _ => Signal::Bus,
        })
    }

    /// The host's kernel copies from or to user space, and expects that to fail at times.
    ///
    /// # Errors
    /// `EFAULT`, whatever the reason.
    pub(crate) fn uaccess(&self, cpu: usize, at: Pa, mut bytes: Bytes<'_>) -> Result<(), Errno> {
        self.host_access(cpu, at, &mut bytes).map_err(|_| Errno::EFAULT)
    }

    /// The host's kernel loads or stores by a pointer of its own, which never fails. If the page is a guest's, it takes
    /// that by force and tries again.
    pub(crate) fn kernel_alias(&self, cpu: usize, at: Pa, mut bytes: Bytes<'_>) -> KernelOutcome {
        // Upstream asks for ever; what can change between two questions, changes before the second.
        const MOST: usize = 3;
        let mut reclaimed = false;
        for _ in 0..MOST {
            match self.host_access(cpu, at, &mut bytes) {
                Ok(()) if reclaimed => return KernelOutcome::DoneAfterReclaim,
                Ok(()) => return KernelOutcome::Done,
                Err(Errno::EPERM) => {}
                Err(_) => break,
            }
            match self.call(cpu, HostCall::ForceReclaimGuestPage, [at.get(), 0, 0, 0]) {
                Ok(_) => reclaimed = true,
                Err(Errno::EAGAIN) => {}
                Err(_) => break,
            }
        }
        let gone = self.host.lock().page(at.pfn()).nr_orphaned > 0;
        let (outcome, incident) = match gone {
            true => (KernelOutcome::Stuck, Incident::Stuck),
            false => (KernelOutcome::Oops, Incident::Oops),
        };
        self.incidents.note(incident);
        outcome
    }

    /// A device loads or stores. Nothing stands between, but in profiles with an IOMMU of EL2's, which lets devices at
    /// what it was told of and at nothing else.
    ///
    /// # Errors
    /// `EPERM` if the IOMMU stops it; `EIO` if the memory is broken.
    pub(crate) fn dma(&self, at: Pa, mut bytes: Bytes<'_>) -> Result<(), Errno> {
        let host = self.host.lock();
        let page = host.page(at.pfn());
        if self.profile.is_android() {
            if !page.is_for_dma() {
                return Err(Errno::EPERM);
            }
        } else if page.host() == State::NoPage {
            self.incidents.note(Incident::DmaIntoPrivate);
        }
        self.copy(at, &mut bytes)
    }

    /// The host tells the IOMMU of pages for devices, in profiles that have one.
    ///
    /// # Errors
    /// `ENOSYS` in others; as for the transition.
    pub(crate) fn map_dma(&self, pages: Pages) -> Result<(), Errno> {
        match self.profile.is_android() {
            true => use_dma(&mut self.host.lock(), pages),
            false => Err(Errno::ENOSYS),
        }
    }

    /// And that they are done.
    ///
    /// # Errors
    /// As for [`Self::map_dma`].
    pub(crate) fn unmap_dma(&self, pages: Pages) -> Result<(), Errno> {
        match self.profile.is_android() {
            true => unuse_dma(&mut self.host.lock(), pages),
            false => Err(Errno::ENOSYS),
        }
    }

    /// The guest whose vCPU the CPU has loaded loads or stores.
    ///
    /// # Errors
    /// Why it stops.
    #[cfg(any(test, feature = "oracle", all(loom, feature = "loom")))]
    pub(crate) fn vcpu(&self, cpu: usize, at: Ipa, mut bytes: Bytes<'_>) -> Result<(), GuestStop> {
        let access = bytes.access();
        let copied = self.vcpu_act(cpu, at, access, |at| self.copy(at, &mut bytes))?;
        copied.map_err(|errno| match errno {
            Errno::EINVAL => GuestStop::Invalid,
            _ => GuestStop::Broken,
        })
    }

    /// The same for anything that can be done at an address. The page stays the guest's until `act` returns, which must
    /// ask nothing of EL2. What was found is remembered: [`GuestTlb::hit`](super::guest_tlb::GuestTlb::hit) has it next time.
    ///
    /// # Errors
    /// Why it stops.
    #[inline]
    pub(crate) fn vcpu_act<T>(
        &self,
        cpu: usize,
        at: Ipa,
        access: Access,
        act: impl FnOnce(Pa) -> T,
    ) -> Result<T, GuestStop> {
        let Some(mut cpu) = self.cpu(cpu) else { return Err(GuestStop::Invalid) };
        let Some(loaded) = cpu.loaded.as_mut() else { return Err(GuestStop::Invalid) };
        let gfn = at.gfn();
        let mut guest = loaded.vm.mmu.lock();
        let found = guest.translate(loaded.vcpu.tlb, gfn);
        let Some(to) = found.filter(|to| to.prot.allows(access)) else {
            let kind = if found.is_none() { FaultKind::Translation } else { FaultKind::Permission };
            let fault = Fault { gfn, kind };
            loaded.vcpu.fault = Some(fault);
            return Err(GuestStop::Fault(fault));
        };
        // With the lock held: whoever unmaps the page waits until it is done.
        let done = act(within(to.pfn, at));
        if seeded(Flaw::RemembersOldNews) {
            drop(guest);
            loaded.vm.mmu.lock().tlbs.fill(loaded.vcpu.tlb, gfn, to);
        }
        Ok(done)
    }
}
