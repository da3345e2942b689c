//! A VM whose memory the host provides and takes back folio by folio, with the hypervisor alone. The resource manager only
//! makes what that takes: two extents beside those that VMs own, and says who has which.
//!
//! | extent | what it has | who has that mapped |
//! |---|---|---|
//! | the host's own | what nobody was given | the host |
//! | private | what is lent | the VM, where the host says so |
//! | shared | what is shared | the host, where it always is; and the VM |
//!
//! What one of them lends and what it shares the host has in one extent: the original has two names for it, and two
//! extents on some platforms only.

use super::vm::VmState;
use super::{MapAttrs, MapType, Rm, Vmid};
use crate::hyp::gunyah::attrs::Access;
use crate::hyp::gunyah::error::{HypError, RmError};
use crate::hyp::gunyah::hyp::Hyp;
use crate::hyp::gunyah::memdb::{ExtentId, Owner};

/// The extents of such a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paging {
    pub(crate) private: ExtentId,
    pub(crate) shared: ExtentId,
}

impl Rm {
    /// Lets the host provide memory of a VM on demand.
    ///
    /// # Errors
    /// In this order: `Denied`, `VmidInvalid`, `Denied`, `VmState` unless the VM waits for its first memory; `NoMem`.
    pub(crate) fn set_demand_paging(
        &mut self,
        hyp: &mut Hyp,
        client: Vmid,
        vmid: Vmid,
    ) -> Result<Paging, RmError> {
        self.check_owned(client, vmid, VmState::Init)?;
        let vm = self.vms.get_mut(&vmid).ok_or(RmError::VmidInvalid)?;
        if let Some(paging) = vm.paging {
            return Ok(paging);
        }
        let paging = self.new_paging(hyp).map_err(|_| RmError::NoMem)?;
        if let Some(vm) = self.vms.get_mut(&vmid) {
            vm.paging = Some(paging);
        }
        Ok(paging)
    }

    fn new_paging(&self, hyp: &mut Hyp) -> Result<Paging, HypError> {
        let host = self.home(Vmid::HLOS).ok_or(HypError::Failure)?;
        let private = self.new_extent(hyp, false)?;
        let shared = self.new_extent(hyp, false)?;
        // Nothing is in it yet, so no table changes.
        let attrs = MapAttrs::new(Access::RWX, MapType::CACHED);
        for bank in hyp.machine.banks().to_vec() {
            let (at, size) = (bank.frames.start().pa().get(), bank.frames.len_bytes().get());
            hyp.map_partial(shared, host.aspace, at, (at, size), attrs)?;
        }
        Ok(Paging { private, shared })
    }

    /// What the host has not taken back by now it gets, and nobody finds in it what the VM had alone.
    ///
    /// # Errors
    /// `NoMem`, and it may be tried again.
    pub(super) fn end_paging(&mut self, hyp: &mut Hyp, vmid: Vmid) -> Result<(), RmError> {
        let Some(paging) = self.vms.get(&vmid).and_then(|vm| vm.paging) else { return Ok(()) };
        let host = self.home(Vmid::HLOS).ok_or(RmError::VmidInvalid)?;
        for (extent, is_private) in [(paging.private, true), (paging.shared, false)] {
            for bank in hyp.machine.banks().to_vec() {
                for piece in hyp.memdb.walk(bank.frames, Owner::Extent(extent)) {
                    let bytes = (piece.start().pa().get(), piece.len_bytes().get());
                    let cleaned = if is_private { hyp.clean(extent, bytes, true) } else { Ok(()) };
                    let given =
                        cleaned.and_then(|()| hyp.donate_sibling(extent, host.memory, bytes));
                    given.map_err(|_| RmError::NoMem)?;
                }
            }
        }
        for extent in [paging.private, paging.shared] {
            let deleted = hyp.delete_extent(extent);
            hyp.note(deleted);
        }
        if let Some(vm) = self.vms.get_mut(&vmid) {
            vm.paging = None;
        }
        Ok(())
    }
}
