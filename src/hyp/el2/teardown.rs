//! The end of a VM. First nobody runs it, and the host asks its pages back; then what it was made of goes back, in pieces,
//! so that no lock is held for as long as all of it takes.

use super::guest_mmu::GuestMmu;
use super::host_mmu::HostMmu;
use super::host_struct::SharedStruct;
use super::hyp_space::HypSpace;
use super::incident::Incident;
use super::memcache::give_back;
use super::transition::unpin;
use super::vm::{Slot, VcpuSlot, Vm, nr_pgd_pages};
use super::{El2, Pages};
use crate::addr::Pfn;
use crate::error::Errno;
use crate::geometry::index;
use crate::stage2::Entry;
use crate::sync::Arc;

/// Pages that go back, or are found to be nobody's, while locks are held once.
const AT_ONCE: usize = 16;

impl El2 {
    /// From here on no vCPU is loaded, and pages can be asked back.
    ///
    /// # Errors
    /// `EINVAL` for no VM, while a vCPU is loaded, and the second time.
    pub(crate) fn start_teardown(&self, handle: u16) -> Result<(), Errno> {
        let mut vms = self.vms.lock();
        let entry = vms.get_mut(handle).ok_or(Errno::EINVAL)?;
        if entry.nr_refs > 0 || entry.dying {
            return Err(Errno::EINVAL);
        }
        entry.dying = true;
        // No vCPU runs any more, whatever somebody may still have of one.
        entry.vm.mmu.lock().tlbs.close();
        Ok(())
    }

    /// Ends a VM: what it was made of is cleared and the host's, but for pages that are broken. Pages that the host has not
    /// asked back stay where they are, for good.
    ///
    /// # Errors
    /// `EINVAL` unless it is dying and nobody uses it.
    pub(crate) fn finalize_teardown(&self, handle: u16) -> Result<(), Errno> {
        let vm = self.end(handle)?;
        self.orphan_leaves(&vm);
        vm.mmu.lock().dismantle();
        let mut returned = Vec::new();
        let said = loop {
            if let Some(said) = self.give_piece_back(handle, &vm, &mut returned)? {
                break said;
            }
        };
        // The host's list is empty, unless it says otherwise. Nothing is allocated while it is locked.
        let mut list = std::mem::take(&mut said.lock().returned);
        list.append(&mut returned);
        said.lock().returned = list;
        Ok(())
    }

    /// The same with a look at what is between the pieces, which is told of how many pages they were; how many pieces.
    #[cfg(test)]
    pub(super) fn in_pieces(&self, handle: u16, between: impl Fn(usize)) -> usize {
        let vm = self.end(handle).unwrap();
        self.orphan_leaves(&vm);
        between(0);
        vm.mmu.lock().dismantle();
        between(0);
        let mut returned = Vec::new();
        for nth in 1.. {
            let before = returned.len();
            if self.give_piece_back(handle, &vm, &mut returned).unwrap().is_some() {
                return nth;
            }
            between(returned.len() - before);
        }
        0
    }

    /// From here on nobody can name it.
    fn end(&self, handle: u16) -> Result<Arc<Vm>, Errno> {
        let mut vms = self.vms.lock();
        let slot = vms.slot(handle).ok_or(Errno::EINVAL)?;
        match std::mem::take(slot) {
            Slot::Live(entry) if entry.dying && entry.nr_refs == 0 => {
                let vm = Arc::clone(&entry.vm);
                *slot = Slot::Ending(entry);
                Ok(vm)
            }
            other => {
                *slot = other;
                Err(Errno::EINVAL)
            }
        }
    }

    /// What the host has not asked back is nobody's, before the tables that tell of it go.
    fn orphan_leaves(&self, vm: &Vm) {
        let mut kept = Vec::new();
        vm.mmu.lock().tree.visit(|_, level, pte| {
            if let Entry::Leaf(leaf) = pte.decode(level) {
                kept.push(Pages::new(leaf.pfn, GuestMmu::SHAPE.pages_at(level)));
            }
        });
        for pages in kept {
            self.host.lock().pages.orphan(pages);
            self.incidents.note(Incident::Orphaned);
        }
    }

    /// Some pages, by address. What the host said of the VM, once there are none left.
    fn give_piece_back(
        &self,
        handle: u16,
        vm: &Vm,
        returned: &mut Vec<u64>,
    ) -> Result<Option<Arc<SharedStruct>>, Errno> {
        returned.reserve(AT_ONCE + index(nr_pgd_pages()));
        let mut vms = self.vms.lock();
        let slot = vms.slot(handle).ok_or(Errno::EINVAL)?;
        let Slot::Ending(entry) = slot else { return Err(Errno::EINVAL) };
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let mut mmu = vm.mmu.lock();
        let mut give = |host: &mut HostMmu, hyp: &mut HypSpace, pfn: Pfn| {
            if give_back(host, hyp, pfn) {
                returned.push(pfn.pa().get());
            }
        };
        for _ in 0..AT_ONCE {
            if let Some(pfn) = mmu.pool.pop() {
                give(&mut host, &mut hyp, pfn);
            } else if let Some(mut vcpu) = entry.vcpus.first_entry() {
                // None is loaded: there are no references.
                let VcpuSlot::Here(of) = vcpu.get_mut() else { return Err(Errno::EINVAL) };
                match of.memcache.pop().or_else(|| of.frames.split_first()) {
                    Some(pfn) => give(&mut host, &mut hyp, pfn),
                    None => {
                        unpin(&mut host, &mut hyp, of.pinned());
                        vcpu.remove();
                    }
                }
            } else if let Some(pfn) = entry.frames.split_first() {
                give(&mut host, &mut hyp, pfn);
            } else {
                entry.pgd.iter().for_each(|pfn| give(&mut host, &mut hyp, pfn));
                unpin(&mut host, &mut hyp, entry.pinned());
                let said = Arc::clone(&entry.host);
                let gone = std::mem::take(slot);
                // Before what was the VM's is let go of.
                drop((mmu, hyp, host, vms));
                drop(gone);
                return Ok(Some(said));
            }
        }
        Ok(None)
    }
}
