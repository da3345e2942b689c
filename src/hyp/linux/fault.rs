//! How a guest's fault is resolved, and how a guest loses what the host drops.

use super::kvm::{GFN_LIMIT, Mapped, SlotAccess, VcpuId, VmId, VmKind};
use super::memory::Want;
use super::{CPU, Linux, MemoryId};
use crate::addr::{Access, Gfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::hyp::el2::{Fault, FaultKind, HostCall};

/// KVM's bits for rights: execute, write, read.
const PROT_X: u64 = 1;
const PROT_W: u64 = 2;
const PROT_R: u64 = 4;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resolved {
    /// The guest may try again.
    Again,
    /// The VMM is asked: there is no memory, or none to write to.
    Vmm,
    /// The guest has no such address.
    Beyond,
}

impl Linux {
    /// The map path of KVM, on a CPU that has the vCPU loaded.
    pub(super) fn resolve(
        &mut self,
        vcpu: VcpuId,
        fault: Fault,
        access: Access,
    ) -> Result<Resolved, Errno> {
        let Fault { gfn, kind } = fault;
        if gfn.get() >= GFN_LIMIT {
            return Ok(Resolved::Beyond);
        }
        let (vm, host_at) = (self.vcpus[vcpu.0].vm, self.vcpus[vcpu.0].host_at);
        let found = &self.vms[vm.0];
        let Some(slot) = found.slot_at(gfn) else { return Ok(Resolved::Vmm) };
        if slot.access == SlotAccess::ReadOnly && access == Access::Write {
            return Ok(Resolved::Vmm);
        }
        self.top_up(host_at.ok_or(Errno::EINVAL)?)?;
        let place = (slot.memory, slot.page_at(gfn));
        match self.vms[vm.0].kind {
            VmKind::Protected => self.give(vm, gfn, place)?,
            VmKind::Plain => {
                let may_write = slot.access == SlotAccess::ReadWrite;
                let block = slot.has_block(gfn);
                self.show(vm, (gfn, kind), place, access, may_write, block)?;
            }
        }
        Ok(Resolved::Again)
    }

    /// A protected guest gets a page for good. It is charged and pinned first.
    fn give(&mut self, vm: VmId, gfn: Gfn, (memory, page): (MemoryId, u64)) -> Result<(), Errno> {
        if self.vms[vm.0].mapped_at(gfn).is_some() {
            // It had it once: either somebody else was faster, or it was destroyed.
            return match self.el2.call(CPU, HostCall::VcpuInPoisonFault, [0; 4])? {
                0 => Ok(()),
                _ => Err(Errno::EFAULT),
            };
        }
        self.locked.charge()?;
        let given = self.pinned_frame(memory, page).and_then(|pfn| {
            let donated = self.el2.call(CPU, HostCall::DonateGuest, [pfn.get(), gfn.get(), 1, 0]);
            donated.map(|_| pfn).inspect_err(|_| self.frames.unpin(pfn))
        });
        match given {
            Ok(pfn) => {
                self.vms[vm.0].mapped.insert(gfn.get(), Mapped { pfn, nr_pages: 1 });
                Ok(())
            }
            Err(errno) => {
                self.locked.uncharge();
                Err(errno)
            }
        }
    }

    fn pinned_frame(&mut self, memory: MemoryId, page: u64) -> Result<crate::addr::Pfn, Errno> {
        let frame = self.frame_of(memory, page, Want::Write).map_err(|_| Errno::EFAULT)?;
        let pfn = frame.ok_or(Errno::EFAULT)?;
        if !self.memories[memory.0].is_swap_backed() {
            return Err(Errno::EIO);
        }
        self.frames.pin(pfn);
        Ok(pfn)
    }

    /// A plain guest is shown what the VMM has mapped there, by a block if that is one huge page.
    fn show(
        &mut self,
        vm: VmId,
        (gfn, kind): (Gfn, FaultKind),
        (memory, page): (MemoryId, u64),
        access: Access,
        may_write: bool,
        has_block: bool,
    ) -> Result<(), Errno> {
        let want = if access == Access::Write { Want::Write } else { Want::Read };
        let frame = self.frame_of(memory, page, want).map_err(|_| Errno::EFAULT)?;
        let vma = self.memories[memory.0].vma(page).ok_or(Errno::EFAULT)?;
        let is_huge = has_block && frame.is_some() && self.memories[memory.0].is_huge(page);
        // Nobody writes to the frame of zeroes.
        let writes = frame.is_some() && vma.is_writable && may_write;
        let prot = PROT_R | PROT_X | if writes { PROT_W } else { 0 };
        let pfn = frame.unwrap_or(self.frames.zero);
        let (start, pfn, nr_pages) = match is_huge {
            true => {
                let nth = gfn.get() % HUGE_PAGES;
                (gfn.get() - nth, crate::addr::Pfn::new(pfn.get() - nth), HUGE_PAGES)
            }
            false => (gfn.get(), pfn, 1),
        };
        if let Some((old, mapped)) = self.vms[vm.0].mapped_at(gfn) {
            if mapped.nr_pages == nr_pages && mapped.pfn == pfn {
                if kind == FaultKind::Permission {
                    self.el2.call(CPU, HostCall::RelaxPermsGuest, [gfn.get(), prot, 0, 0])?;
                }
                return Ok(());
            }
            self.hide(vm, old, mapped);
        }
        let inside: Vec<_> = self.vms[vm.0]
            .mapped
            .range(start..start + nr_pages)
            .map(|(&at, &mapped)| (at, mapped))
            .collect();
        inside.into_iter().for_each(|(at, mapped)| self.hide(vm, Gfn::new(at), mapped));
        self.el2.call(CPU, HostCall::ShareGuest, [pfn.get(), start, nr_pages, prot])?;
        self.vms[vm.0].mapped.insert(start, Mapped { pfn, nr_pages });
        Ok(())
    }

    /// A plain guest is not shown something any more.
    fn hide(&mut self, vm: VmId, start: Gfn, mapped: Mapped) {
        let found = &mut self.vms[vm.0];
        let Some(handle) = found.handle() else { return };
        found.mapped.remove(&start.get());
        let x = [handle, start.get(), mapped.nr_pages, 0];
        let hidden = self.el2.call(CPU, HostCall::UnshareGuest, x);
        debug_assert!(hidden.is_ok(), "the kernel knows what it has shown: {hidden:?}");
    }

    /// The host drops what it has at a page, or its right to write there. Guests that are only shown it lose it; a
    /// protected guest keeps what is pinned.
    pub(super) fn dropped_by_host(&mut self, memory: MemoryId, page: u64) {
        let mut lost = Vec::new();
        for (id, vm) in self.vms.iter().filter(|(_, vm)| vm.kind == VmKind::Plain) {
            let gfns = vm.slots.values().filter_map(|slot| slot.gfn_of(memory, page));
            lost.extend(gfns.filter_map(|gfn| Some((VmId(id), vm.mapped_at(gfn)?))));
        }
        lost.into_iter().for_each(|(vm, (start, mapped))| self.hide(vm, start, mapped));
    }

    /// A slot has gone or moved: guests lose what no slot has any more.
    pub(super) fn lose_outside_of_slots(&mut self) {
        let mut lost = Vec::new();
        for (id, vm) in self.vms.iter().filter(|(_, vm)| vm.kind == VmKind::Plain) {
            let outside = |&(&start, _): &(&u64, &Mapped)| vm.slot_at(Gfn::new(start)).is_none();
            lost.extend(
                vm.mapped.iter().filter(outside).map(|(&at, &mapped)| (VmId(id), at, mapped)),
            );
        }
        lost.into_iter().for_each(|(vm, at, mapped)| self.hide(vm, Gfn::new(at), mapped));
    }
}
