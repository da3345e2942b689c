//! VMs, memslots, vCPUs, and their end.

use std::collections::BTreeMap;

use super::frames::Frames;
use super::memory::{Backing, MemoryId, PageKind};
use super::run::GuestAct;
use super::{CPU, Linux, PROGRAM};
use crate::addr::{Gfn, Ipa, Pfn};
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, PAGE_BYTES};
use crate::hyp::MemslotId;
use crate::hyp::el2::HostCall;
use crate::hyp::kernel::{Calls, Made};

/// A VM of the process's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmId(pub(super) usize);

/// A vCPU of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VcpuId(pub(super) usize);

/// KVM's number of a vCPU, the VMM's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuNumber(pub u8);

/// The type of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmKind {
    /// Its memory is its own.
    Protected,
    /// The host keeps its view of it.
    Plain,
}

/// `KVM_MEM_READONLY`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SlotAccess {
    /// The guest may write.
    #[default]
    ReadWrite,
    /// The guest's stores go to the VMM.
    ReadOnly,
}

/// `KVM_MEM_LOG_DIRTY_PAGES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SlotLog {
    /// Nothing is logged.
    #[default]
    None,
    /// What the guest writes is logged.
    Dirty,
}

/// A memslot: pages of a memory at a guest address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Where the guest has it.
    pub ipa: Ipa,
    /// Of which memory.
    pub memory: MemoryId,
    /// Its first page there.
    pub first_page: u64,
    /// How many pages. With 0 the slot is deleted.
    pub nr_pages: u64,
    /// Whether the guest may write.
    pub access: SlotAccess,
    /// Whether writes are logged.
    pub log: SlotLog,
}

/// What a guest has mapped: one page, or a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) pfn: Pfn,
    pub(super) nr_pages: u64,
}

#[derive(Debug)]
pub(super) struct Vm {
    pub(super) kind: VmKind,
    pub(super) slots: BTreeMap<MemslotId, Slot>,
    /// What the guest has, by its first frame number.
    pub(super) mapped: BTreeMap<u64, Mapped>,
    /// The descriptor, vCPUs, guest_memfds. The VM lives as long as one of them.
    pub(super) nr_holders: usize,
    is_open: bool,
    nr_vcpus: u64,
    ids: BTreeMap<VcpuNumber, VcpuId>,
    /// The program's memory, once a vCPU has brought it.
    program: Option<MemoryId>,
    made: Option<Made>,
}

#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) vm: VmId,
    /// In the order of their creation.
    idx: u64,
    has_fd: bool,
    /// Whether the run structure is mapped.
    has_run: bool,
    /// The kernel's structure, once EL2 knows the vCPU.
    pub(super) host_at: Option<u64>,
    /// What it is at.
    pub(super) at: Option<GuestAct>,
}

/// The memslot of the program.
const PROGRAM_SLOT: u16 = 500;
/// Guest frame numbers that a VM has.
pub(super) const GFN_LIMIT: u64 = 1 << (40 - 12);
/// Pages for tables that a vCPU has at hand when it faults.
const NR_MEMCACHE: u64 = 8;

impl Slot {
    fn gfn(&self) -> u64 {
        self.ipa.gfn().get()
    }

    pub(super) fn contains(&self, gfn: Gfn) -> bool {
        gfn.get().wrapping_sub(self.gfn()) < self.nr_pages
    }

    /// The page of the memory that is at a guest frame.
    pub(super) fn page_at(&self, gfn: Gfn) -> u64 {
        self.first_page.saturating_add(gfn.get() - self.gfn())
    }

    /// Where the guest has a page of the memory.
    pub(super) fn gfn_of(&self, memory: MemoryId, page: u64) -> Option<Gfn> {
        let nth = page.checked_sub(self.first_page).filter(|&nth| nth < self.nr_pages)?;
        (memory == self.memory).then(|| Gfn::new(self.gfn() + nth))
    }

    /// Whether the block around a guest frame is in the slot, and lies there as it lies in the memory.
    pub(super) fn has_block(&self, gfn: Gfn) -> bool {
        let start = Gfn::new(gfn.get() / HUGE_PAGES * HUGE_PAGES);
        let last = Gfn::new(start.get() + HUGE_PAGES - 1);
        self.contains(start) && self.contains(last) && self.page_at(start) % HUGE_PAGES == 0
    }
}

impl Vm {
    pub(super) fn slot_at(&self, gfn: Gfn) -> Option<Slot> {
        self.slots.values().find(|slot| slot.contains(gfn)).copied()
    }

    /// What the guest has at a frame, and where that begins.
    pub(super) fn mapped_at(&self, gfn: Gfn) -> Option<(Gfn, Mapped)> {
        let (&start, &mapped) = self.mapped.range(..=gfn.get()).next_back()?;
        (gfn.get() - start < mapped.nr_pages).then(|| (Gfn::new(start), mapped))
    }

    pub(super) fn handle(&self) -> Option<u64> {
        self.made.map(|made| made.handle)
    }
}

impl Linux {
    /// `KVM_CREATE_VM`.
    pub fn create_vm(&mut self, kind: VmKind) -> VmId {
        VmId(self.vms.insert(Vm {
            kind,
            slots: BTreeMap::new(),
            mapped: BTreeMap::new(),
            nr_holders: 1,
            is_open: true,
            nr_vcpus: 0,
            ids: BTreeMap::new(),
            program: None,
            made: None,
        }))
    }

    /// A VM whose descriptor is open.
    pub(super) fn open_vm(&mut self, vm: VmId) -> Option<&mut Vm> {
        self.vms.get_mut(vm.0).filter(|vm| vm.is_open)
    }

    /// `KVM_SET_USER_MEMORY_REGION`, with an address that need not be aligned.
    ///
    /// # Errors
    /// `EBADF` if the VM is closed, else in this order: `EINVAL` for what is misaligned, wraps around, is no such slot to
    /// delete, or changes size, memory or access of one; `EEXIST` for what overlaps another; `EPERM` for what a
    /// protected VM may not have, or not any more; `EFAULT` beyond the guest's addresses.
    pub fn set_slot(&mut self, vm: VmId, number: MemslotId, slot: Slot) -> Result<(), Errno> {
        let vm = self.open_vm(vm).ok_or(Errno::EBADF)?;
        let bytes = slot.nr_pages.checked_mul(PAGE_BYTES as u64);
        let end = bytes.and_then(|bytes| slot.ipa.get().checked_add(bytes));
        if !slot.ipa.is_page_aligned() || end.is_none() {
            return Err(Errno::EINVAL);
        }
        let old = vm.slots.get(&number).copied();
        let is_fixed = vm.kind == VmKind::Protected && vm.made.is_some();
        if slot.nr_pages == 0 {
            old.ok_or(Errno::EINVAL)?;
            if is_fixed {
                return Err(Errno::EPERM);
            }
            vm.slots.remove(&number);
            self.lose_outside_of_slots();
            return Ok(());
        }
        let mut moves = old.is_none();
        if let Some(old) = old {
            let same = |slot: Slot| (slot.memory, slot.first_page, slot.nr_pages, slot.access);
            if same(old) != same(slot) {
                return Err(Errno::EINVAL);
            }
            if old == slot {
                return Ok(());
            }
            moves = old.ipa != slot.ipa;
        }
        let end = slot.gfn() + slot.nr_pages;
        let overlaps =
            |other: &Slot| slot.gfn() < other.gfn() + other.nr_pages && other.gfn() < end;
        let mut others = vm.slots.iter().filter(|&(&other, _)| other != number);
        if moves && others.any(|(_, other)| overlaps(other)) {
            return Err(Errno::EEXIST);
        }
        let is_special = slot.access == SlotAccess::ReadOnly || slot.log == SlotLog::Dirty;
        let is_change = old.is_some_and(|old| old.ipa != slot.ipa);
        if vm.kind == VmKind::Protected && (is_special || is_change && is_fixed) {
            return Err(Errno::EPERM);
        }
        if end > GFN_LIMIT {
            return Err(Errno::EFAULT);
        }
        vm.slots.insert(number, slot);
        if is_change {
            self.lose_outside_of_slots();
        }
        Ok(())
    }

    /// `KVM_CREATE_VCPU`. The first one brings the program.
    ///
    /// # Errors
    /// `EBADF` if the VM is closed, `EEXIST` for a number that is taken.
    pub fn create_vcpu(&mut self, vm: VmId, id: VcpuNumber) -> Result<VcpuId, Errno> {
        let found = self.open_vm(vm).ok_or(Errno::EBADF)?;
        if found.ids.contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        let needs_program = found.program.is_none();
        if needs_program {
            let memory = self.map(Backing::Shared, 1, PageKind::Base)?;
            // The VMM writes the program there, byte by byte.
            self.bring(memory, 0).map_err(|_| Errno::ENOMEM)?;
            let slot = Slot {
                ipa: PROGRAM,
                memory,
                first_page: 0,
                nr_pages: 1,
                access: SlotAccess::ReadWrite,
                log: SlotLog::None,
            };
            let number = MemslotId::from_u16(PROGRAM_SLOT).ok_or(Errno::EINVAL)?;
            self.set_slot(vm, number, slot)?;
            self.vms[vm.0].program = Some(memory);
        }
        let found = &mut self.vms[vm.0];
        let idx = found.nr_vcpus;
        found.nr_vcpus += 1;
        found.nr_holders += 1;
        let vcpu = Vcpu { vm, idx, has_fd: true, has_run: true, host_at: None, at: None };
        let id_of = VcpuId(self.vcpus.insert(vcpu));
        found.ids.insert(id, id_of);
        Ok(id_of)
    }

    /// Whether a vCPU can be run: its descriptor is open and its run structure mapped.
    pub fn can_run(&self, vcpu: VcpuId) -> bool {
        self.vcpus.get(vcpu.0).is_some_and(|vcpu| vcpu.has_fd && vcpu.has_run)
    }

    /// What this kernel does with EL2 and its own pages.
    pub(super) fn kernel(&mut self) -> Calls<'_, Frames> {
        Calls { el2: &self.el2, cpu: CPU, pages: &mut self.frames }
    }

    /// Has EL2 make the VM, as its first run does.
    pub(super) fn make_vm(&mut self, vm: VmId) -> Result<Made, Errno> {
        if let Some(made) = self.vms[vm.0].made {
            return Ok(made);
        }
        let (kind, nr_vcpus) = (self.vms[vm.0].kind, self.vms[vm.0].nr_vcpus);
        let made = self.kernel().make_vm(nr_vcpus, kind == VmKind::Protected)?;
        self.vms[vm.0].made = Some(made);
        Ok(made)
    }

    /// Has EL2 make the vCPU, as its first run does.
    pub(super) fn make_vcpu(&mut self, vcpu: VcpuId, made: Made) -> Result<u64, Errno> {
        if let Some(at) = self.vcpus[vcpu.0].host_at {
            return Ok(at);
        }
        let idx = self.vcpus[vcpu.0].idx;
        let at = self.kernel().make_vcpu(made, idx)?;
        self.vcpus[vcpu.0].host_at = Some(at);
        Ok(at)
    }

    /// Pages for tables, on the vCPU's list, as before every fault.
    pub(super) fn top_up(&mut self, host_at: u64) -> Result<(), Errno> {
        self.kernel().top_up(host_at, NR_MEMCACHE)
    }

    /// Closes a VM's descriptor.
    pub fn close_vm(&mut self, vm: VmId) {
        if let Some(found) = self.open_vm(vm) {
            found.is_open = false;
            self.release(vm);
        }
    }

    /// Closes a vCPU's descriptor. Its run structure stays mapped, and keeps it.
    pub fn close_vcpu_fd(&mut self, vcpu: VcpuId) {
        self.close_parts(vcpu, |vcpu| vcpu.has_fd = false);
    }

    /// Closes a vCPU's descriptor and unmaps its run structure.
    pub fn close_vcpu(&mut self, vcpu: VcpuId) {
        self.close_parts(vcpu, |vcpu| (vcpu.has_fd, vcpu.has_run) = (false, false));
    }

    fn close_parts(&mut self, id: VcpuId, close: impl FnOnce(&mut Vcpu)) {
        let Some(vcpu) = self.vcpus.get_mut(id.0) else { return };
        let was_held = vcpu.has_fd || vcpu.has_run;
        close(vcpu);
        let (is_held, vm) = (vcpu.has_fd || vcpu.has_run, vcpu.vm);
        if was_held && !is_held {
            self.release(vm);
        }
    }

    /// One holder fewer; the last one takes the VM down.
    fn release(&mut self, vm: VmId) {
        let found = &mut self.vms[vm.0];
        found.nr_holders -= 1;
        if found.nr_holders == 0 {
            self.destroy(vm);
        }
    }

    fn destroy(&mut self, id: VmId) {
        let vm = self.vms.remove(id.0);
        let vcpus: Vec<_> = vm.ids.values().map(|id| self.vcpus.remove(id.0)).collect();
        let Some(made) = vm.made else { return };
        // A kernel that is refused here has lost the memory; EL2 says so when it is asked to check.
        let _ = self.el2.call(CPU, HostCall::StartTeardownVm, [made.handle, 0, 0, 0]);
        for (&gfn, &Mapped { pfn, nr_pages }) in &vm.mapped {
            match vm.kind {
                VmKind::Protected => {
                    let _ = self.el2.call(
                        CPU,
                        HostCall::ReclaimDyingGuestPage,
                        [made.handle, gfn, 0, 0],
                    );
                    self.locked.uncharge();
                    self.frames.unpin(pfn);
                }
                VmKind::Plain => {
                    let _ =
                        self.el2.call(CPU, HostCall::UnshareGuest, [made.handle, gfn, nr_pages, 0]);
                }
            }
        }
        let _ = self.kernel().finish(made, vcpus.iter().filter_map(|vcpu| vcpu.host_at));
    }
}
