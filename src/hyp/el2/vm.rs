//! VMs and their life, vCPUs, and who is loaded where.
//!
//! reserved → alive → dying → gone; how they go is `teardown`'s. A vCPU that is loaded lies with its CPU and not in the table, so nobody else can
//! load it. Every structure is memory that the host gave and gets back.

use std::collections::BTreeMap;

use super::guest_mmu::GuestMmu;
use super::host_mmu::HostMmu;
use super::host_struct::{HostStruct, SharedStruct};
use super::hyp_space::HypSpace;
use super::memcache::give_back;
use super::on_cpu::OnCpu;
use super::transition::{donate_hyp, pin, unpin};
use super::{El2, Pages};
use crate::addr::{Gfn, Ipa, Pa, Pfn};
use crate::error::Errno;
use crate::stage2::Tree;
use crate::sync::{Arc, SpinMutex as Mutex};

/// The first handle; smaller numbers are none.
pub(crate) const FIRST_HANDLE: u16 = 0x1000;
pub(crate) const MAX_VMS: usize = 255;

const PAGE: u64 = 4096;
/// Bytes of EL2's own structures, about as large as upstream's.
const VM_BYTES: u64 = 6 << 10;
const VCPU_BYTES: u64 = 10 << 10;

/// How many pages EL2 wants for a VM of so many vCPUs, without its root table.
pub(crate) fn nr_vm_pages(nr_vcpus: u64) -> u64 {
    nr_vcpus.saturating_mul(8).saturating_add(VM_BYTES).div_ceil(PAGE)
}

/// And for a vCPU.
pub(crate) const fn nr_vcpu_pages() -> u64 {
    VCPU_BYTES.div_ceil(PAGE)
}

/// And for a root table.
pub(crate) fn nr_pgd_pages() -> u64 {
    Tree::nr_root_pages(GuestMmu::SHAPE)
}

/// The pages that a structure at an address lies in.
pub(super) fn pages_of(at: u64, bytes: u64) -> Pages {
    let last = at.saturating_add(bytes - 1);
    Pages::new(Pa::new(at).pfn(), last / PAGE - at / PAGE + 1)
}

/// Why a vCPU could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// Nothing is mapped there.
    Translation,
    /// Not with these rights.
    Permission,
}

/// What EL2 remembers of a vCPU's last fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) gfn: Gfn,
    pub(crate) kind: FaultKind,
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) idx: usize,
    /// The host's structure, pinned, and its address.
    pub(crate) host: Arc<SharedStruct>,
    pub(crate) host_at: u64,
    pub(crate) memcache: Vec<Pfn>,
    pub(crate) fault: Option<Fault>,
    /// Which TLB of the guest's is this one's.
    pub(crate) tlb: usize,
    pub(super) frames: Pages,
}

/// A VM.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) handle: u16,
    pub(crate) protected: bool,
    pub(crate) mmu: Mutex<GuestMmu>,
}

/// A vCPU, as the table knows it.
#[derive(Debug)]
pub(super) enum VcpuSlot {
    Here(Box<Vcpu>),
    Loaded { cpu: usize },
}

/// What the table knows of a VM.
#[derive(Debug)]
pub(crate) struct VmEntry {
    pub(crate) vm: Arc<Vm>,
    /// Loaded vCPUs, and calls under way that name the VM.
    pub(crate) nr_refs: u32,
    pub(crate) dying: bool,
    nr_vcpus: u64,
    pub(super) vcpus: BTreeMap<usize, VcpuSlot>,
    /// The host's structure, pinned, and its address.
    pub(super) host: Arc<SharedStruct>,
    host_kvm: u64,
    /// What the host gave for the VM, and for its root table.
    pub(super) frames: Pages,
    pub(super) pgd: Pages,
}

impl Vcpu {
    /// Every frame that EL2 has for it.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Pfn> {
        self.frames.iter().chain(self.memcache.iter().copied())
    }

    /// What is pinned for it.
    pub(crate) fn pinned(&self) -> Pages {
        pages_of(self.host_at, HostStruct::BYTES)
    }
}

impl VmEntry {
    pub(crate) fn pinned(&self) -> Pages {
        pages_of(self.host_kvm, HostStruct::BYTES)
    }

    /// vCPUs that no CPU has.
    pub(crate) fn resting(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.values().filter_map(|slot| match slot {
            VcpuSlot::Here(vcpu) => Some(&**vcpu),
            VcpuSlot::Loaded { .. } => None,
        })
    }

    /// CPUs that have a vCPU of this VM.
    pub(crate) fn loaded_on(&self) -> impl Iterator<Item = (usize, usize)> {
        self.vcpus.iter().filter_map(|(&idx, slot)| match slot {
            VcpuSlot::Loaded { cpu } => Some((idx, *cpu)),
            VcpuSlot::Here(_) => None,
        })
    }

    /// Every frame that EL2 has for the VM, without its tables and vCPUs.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Pfn> {
        self.frames.iter().chain(self.pgd.iter())
    }
}

#[derive(Debug, Default)]
pub(super) enum Slot {
    #[default]
    Free,
    Reserved,
    Live(VmEntry),
    /// Nobody can name it any more, and what it was made of goes back piece by piece.
    Ending(VmEntry),
}

/// All VMs.
#[derive(Debug, Default)]
pub(crate) struct VmTable {
    slots: Vec<Slot>,
}

impl VmTable {
    pub(crate) fn get(&self, handle: u16) -> Option<&VmEntry> {
        match self.slots.get(handle.checked_sub(FIRST_HANDLE).map(usize::from)?)? {
            Slot::Live(entry) => Some(entry),
            _ => None,
        }
    }

    pub(super) fn slot(&mut self, handle: u16) -> Option<&mut Slot> {
        self.slots.get_mut(handle.checked_sub(FIRST_HANDLE).map(usize::from)?)
    }

    pub(super) fn get_mut(&mut self, handle: u16) -> Option<&mut VmEntry> {
        match self.slot(handle)? {
            Slot::Live(entry) => Some(entry),
            _ => None,
        }
    }

    /// All that EL2 has something for.
    pub(crate) fn live(&self) -> impl Iterator<Item = &VmEntry> {
        self.slots.iter().filter_map(|slot| match slot {
            Slot::Live(entry) | Slot::Ending(entry) => Some(entry),
            _ => None,
        })
    }
}

/// A vCPU on a CPU.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) vm: Arc<Vm>,
    pub(crate) vcpu: Box<Vcpu>,
}

/// What a CPU's lock guards.
#[derive(Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) loaded: Option<Loaded>,
}

impl El2 {
    /// A handle for a VM to come.
    ///
    /// # Errors
    /// `ENOMEM` if there are too many.
    pub(crate) fn reserve_vm(&self) -> Result<u16, Errno> {
        let mut vms = self.vms.lock();
        let free = vms.slots.iter().position(|slot| matches!(slot, Slot::Free));
        let at = free.unwrap_or(vms.slots.len());
        let handle = u16::try_from(at).ok().filter(|_| at < MAX_VMS).ok_or(Errno::ENOMEM)?;
        if at == vms.slots.len() {
            vms.slots.push(Slot::Free);
        }
        vms.slots[at] = Slot::Reserved;
        Ok(FIRST_HANDLE + handle)
    }

    /// Gives a handle up that no VM has come for.
    pub(crate) fn unreserve_vm(&self, handle: u16) {
        let mut vms = self.vms.lock();
        let slot = vms.slot(handle);
        if let Some(slot @ Slot::Reserved) = slot {
            *slot = Slot::Free;
        }
    }

    /// The host's memory, at a kernel address, for EL2 to keep.
    ///
    /// # Errors
    /// `ENOMEM`, whatever is wrong with it.
    fn accept(
        host: &mut HostMmu,
        hyp: &mut HypSpace,
        at: u64,
        nr_pages: u64,
    ) -> Result<Pages, Errno> {
        let start = Pa::new(at);
        if !start.is_page_aligned() {
            return Err(Errno::ENOMEM);
        }
        let pages = Pages::checked(start.pfn().get(), nr_pages).map_err(|_| Errno::ENOMEM)?;
        donate_hyp(host, hyp, pages).map_err(|_| Errno::ENOMEM)?;
        Ok(pages)
    }

    /// Makes a VM of what the host says in its own structure, which stays pinned as long as the VM lives.
    ///
    /// # Errors
    /// In this order: as for pins, if the structure is not shared with EL2; `EINVAL` for no vCPU or a number that
    /// is no handle; `ENOMEM` for pages that are not the host's to give; `EINVAL` for a handle that is not
    /// reserved.
    pub(crate) fn init_vm(&self, host_kvm: u64, vm_at: u64, pgd_at: u64) -> Result<(), Errno> {
        let pinned = pages_of(host_kvm, HostStruct::BYTES);
        let mut vms = self.vms.lock();
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        pin(&mut host, &mut hyp, pinned)?;
        // Where nobody has written there are zeroes.
        let structure = self.machine.structs.get(host_kvm).unwrap_or_default();
        let (nr_vcpus, handle, protected, firmware_at) = {
            let said = structure.lock();
            let firmware_at = said.firmware_at.filter(|_| said.protected).map(Ipa::new);
            (said.nr_vcpus, said.handle, said.protected, firmware_at)
        };
        let mut given = Vec::new();
        let made = (|| {
            if nr_vcpus < 1 {
                return Err(Errno::EINVAL);
            }
            let handle = u16::try_from(handle).ok().filter(|&handle| handle >= FIRST_HANDLE);
            let handle = handle.ok_or(Errno::EINVAL)?;
            let frames = Self::accept(&mut host, &mut hyp, vm_at, nr_vm_pages(nr_vcpus))?;
            given.push(frames);
            let pgd = Self::accept(&mut host, &mut hyp, pgd_at, nr_pgd_pages())?;
            given.push(pgd);
            let slot = vms.slot(handle);
            let Some(slot @ Slot::Reserved) = slot else { return Err(Errno::EINVAL) };
            let mut mmu = GuestMmu::new(handle, pgd.start());
            mmu.firmware_at = firmware_at;
            let mmu = Mutex::new(mmu);
            *slot = Slot::Live(VmEntry {
                vm: Arc::new(Vm { handle, protected, mmu }),
                nr_refs: 0,
                dying: false,
                nr_vcpus,
                vcpus: BTreeMap::new(),
                host: structure,
                host_kvm,
                frames,
                pgd,
            });
            Ok(())
        })();
        if made.is_err() {
            for pfn in given.iter().flat_map(|pages: &Pages| pages.iter()) {
                give_back(&mut host, &mut hyp, pfn);
            }
            unpin(&mut host, &mut hyp, pinned);
        }
        made
    }

    /// Makes a vCPU of what the host says in its own structure.
    ///
    /// # Errors
    /// In this order: `ENOMEM` for pages that are not the host's to give; `ENOENT` for no VM; `EBUSY` if the
    /// structure is not shared with EL2; `EINVAL` for a number that is too large or taken.
    pub(crate) fn init_vcpu(&self, handle: u16, host_at: u64, vcpu_at: u64) -> Result<(), Errno> {
        let mut vms = self.vms.lock();
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let frames = Self::accept(&mut host, &mut hyp, vcpu_at, nr_vcpu_pages())?;
        let pinned = pages_of(host_at, HostStruct::BYTES);
        let made = (|| {
            let entry = vms.get_mut(handle).ok_or(Errno::ENOENT)?;
            pin(&mut host, &mut hyp, pinned).map_err(|_| Errno::EBUSY)?;
            let said = self.machine.structs.get(host_at);
            let idx = said.as_ref().map_or(0, |said| said.lock().vcpu_idx);
            let at = usize::try_from(idx).ok().filter(|at| !entry.vcpus.contains_key(at));
            let Some(idx) = at.filter(|_| idx < entry.nr_vcpus) else {
                unpin(&mut host, &mut hyp, pinned);
                return Err(Errno::EINVAL);
            };
            let tlb = entry.vm.mmu.lock().tlbs.add();
            let memcache = Vec::new();
            // What the host writes there later is read, too.
            let host = said.unwrap_or_else(|| self.machine.structs.write(host_at));
            let vcpu = Vcpu { idx, host, host_at, memcache, fault: None, tlb, frames };
            entry.vcpus.insert(idx, VcpuSlot::Here(Box::new(vcpu)));
            Ok(())
        })();
        if made.is_err() {
            for pfn in frames.iter() {
                give_back(&mut host, &mut hyp, pfn);
            }
        }
        made
    }

    /// Loads a vCPU on a CPU. Nothing happens if the CPU has one, the vCPU is loaded somewhere, or the VM is dying.
    pub(super) fn vcpu_load(&self, on: &mut OnCpu<'_>, handle: u16, idx: u64) {
        let loaded = self.with_cpu(on, |cpu, nr| {
            if cpu.loaded.is_some() {
                return Err(Errno::EBUSY);
            }
            let mut vms = self.vms.lock();
            let entry = vms.get_mut(handle).filter(|entry| !entry.dying).ok_or(Errno::ENOENT)?;
            let idx = usize::try_from(idx).map_err(|_| Errno::ENOENT)?;
            let slot = entry.vcpus.get_mut(&idx).ok_or(Errno::ENOENT)?;
            if let VcpuSlot::Loaded { .. } = slot {
                return Err(Errno::EBUSY);
            }
            if let VcpuSlot::Here(vcpu) = std::mem::replace(slot, VcpuSlot::Loaded { cpu: nr }) {
                entry.nr_refs += 1;
                cpu.loaded = Some(Loaded { vm: Arc::clone(&entry.vm), vcpu });
            }
            Ok(())
        });
        // Nothing is said of it.
        loaded.ok();
    }

    /// Puts a CPU's vCPU back, if it has one.
    pub(super) fn vcpu_put(&self, on: &mut OnCpu<'_>) {
        let put = self.with_cpu(on, |cpu, _| {
            let Loaded { vm, vcpu } = cpu.loaded.take().ok_or(Errno::ENOENT)?;
            let mut vms = self.vms.lock();
            let entry = vms.get_mut(vm.handle).ok_or(Errno::ENOENT)?;
            entry.nr_refs -= 1;
            entry.vcpus.insert(vcpu.idx, VcpuSlot::Here(vcpu));
            Ok(())
        });
        // As above.
        put.ok();
    }

    /// Does something with a VM that is not protected, which stays meanwhile. It may be dying.
    ///
    /// # Errors
    /// `EINVAL` for another; what `act` says.
    pub(crate) fn with_np_vm<T>(
        &self,
        handle: u16,
        act: impl FnOnce(&Vm) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let vm = {
            let mut vms = self.vms.lock();
            let entry = vms.get_mut(handle).filter(|entry| !entry.vm.protected);
            let entry = entry.ok_or(Errno::EINVAL)?;
            entry.nr_refs += 1;
            Arc::clone(&entry.vm)
        };
        let done = act(&vm);
        if let Some(entry) = self.vms.lock().get_mut(handle) {
            entry.nr_refs -= 1;
        }
        done
    }
}
