//! Who touches bytes, by which way, and what becomes of that.
//!
//! A page that is not mapped for who touches it is nobody's concern here: the access is answered with a synchronous
//! external abort, the host's as well as a guest's. Nothing is taken back by force, and nothing is poisoned.

use super::aspace::Aspace;
use super::attrs::Access;
use super::hyp::Hyp;
use super::rm::Vmid;
use super::rm::vm::VmState;
use super::{Gunyah, World};
use crate::addr::{Ipa, Pa};
use crate::error::Errno;
use crate::geometry::PAGE_BYTES;

/// Which way bytes go. They are all of one page.
#[derive(Debug)]
pub(crate) enum Bytes<'a> {
    Load(&'a mut [u8]),
    Store(&'a [u8]),
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Load(buf) => buf.len(),
            Self::Store(buf) => buf.len(),
        }
    }
}

/// Why an access ends without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Abort {
    /// A synchronous external abort, which knows the address.
    External,
    /// No such VM, or one that does not run.
    NotRunning,
    /// Bytes of more than one page, or memory that is broken.
    Impossible,
}

/// What user space of the host gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Signal {
    Sigbus,
}

/// How it ends when the host's kernel uses a pointer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KernelOutcome {
    Done,
    /// There is no way on from this instruction: the kernel dies.
    Fatal,
}

impl Hyp {
    /// Translates for a VM, and copies, without a moment between.
    fn touch(
        &self,
        aspace: super::aspace::AspaceId,
        at: Ipa,
        bytes: Bytes<'_>,
    ) -> Result<(), Abort> {
        let within = at.in_page().get();
        if within + bytes.len() as u64 > PAGE_BYTES as u64 {
            return Err(Abort::Impossible);
        }
        let space = self.aspaces.get(&aspace).ok_or(Abort::NotRunning)?;
        let (pfn, leaf) = space.tree.translate(at.gfn()).ok_or(Abort::External)?;
        let needed = match bytes {
            Bytes::Load(_) => Access::R,
            Bytes::Store(_) => Access::W,
        };
        if !Access::from(leaf.prot).covers(needed) {
            return Err(Abort::External);
        }
        let at = Pa::new(pfn.pa().get() + within);
        let copied = match bytes {
            Bytes::Load(buf) => self.machine.read(at, buf),
            Bytes::Store(buf) => self.machine.write(at, buf),
        };
        copied.map_err(|_| Abort::Impossible)
    }
}

impl World {
    /// What a VM that runs sees.
    pub(super) fn space_of_running(&self, vmid: Vmid) -> Option<&Aspace> {
        let vm = self.rm.vms.get(&vmid).filter(|vm| vm.state == VmState::Running)?;
        self.hyp.aspaces.get(&vm.home?.aspace)
    }
}

impl Gunyah {
    /// A vCPU of a VM's.
    ///
    /// # Errors
    /// The abort that the guest sees.
    pub(crate) fn vcpu(&self, vmid: Vmid, at: Ipa, bytes: Bytes<'_>) -> Result<(), Abort> {
        let world = self.world.read();
        let vm = world.rm.vms.get(&vmid).filter(|vm| vm.state == VmState::Running);
        let home = vm.and_then(|vm| vm.home).ok_or(Abort::NotRunning)?;
        world.hyp.touch(home.aspace, at, bytes)
    }

    /// The same for whoever acts on the bytes: where they are stays so until it has acted. That must be short, and ask
    /// nothing of the hypervisor.
    ///
    /// # Errors
    /// The abort that the guest sees.
    pub(super) fn vcpu_act<T>(
        &self,
        vmid: Vmid,
        at: Ipa,
        access: crate::addr::Access,
        act: impl FnOnce(Pa) -> T,
    ) -> Result<T, Abort> {
        let world = self.world.read();
        let space = world.space_of_running(vmid).ok_or(Abort::NotRunning)?;
        let (pfn, leaf) = space.tree.translate(at.gfn()).ok_or(Abort::External)?;
        match leaf.prot.allows(access) {
            true => Ok(act(Pa::new(pfn.pa().get() + at.in_page().get()))),
            false => Err(Abort::External),
        }
    }

    /// User space of the host, by a mapping of that memory.
    ///
    /// # Errors
    /// `SIGBUS`.
    pub(crate) fn user(&self, at: Ipa, bytes: Bytes<'_>) -> Result<(), Signal> {
        self.vcpu(Vmid::HLOS, at, bytes).map_err(|_| Signal::Sigbus)
    }

    /// The host's kernel copying from or to user space: an instruction that knows where to go on.
    ///
    /// # Errors
    /// `EFAULT`.
    pub(crate) fn uaccess(&self, at: Ipa, bytes: Bytes<'_>) -> Result<(), Errno> {
        self.vcpu(Vmid::HLOS, at, bytes).map_err(|_| Errno::EFAULT)
    }

    /// The host's kernel by a pointer of its own.
    pub(crate) fn kernel_alias(&self, at: Ipa, bytes: Bytes<'_>) -> KernelOutcome {
        match self.vcpu(Vmid::HLOS, at, bytes) {
            Ok(()) => KernelOutcome::Done,
            Err(_) => KernelOutcome::Fatal,
        }
    }
}
