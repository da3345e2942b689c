//! A VM gives back what it was lent, and the owner takes it home.

use super::{Member, Parcel, ParcelState, Rm, Vmid};
use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::hyp::Hyp;

/// Of RELEASE and of RECLAIM.
pub(crate) const SANITIZE: u8 = 1;
const W: u8 = 2;

impl Rm {
    /// Ends what ACCEPT began. The wish that memory be cleared is only noted: RECLAIM does it.
    ///
    /// # Errors
    /// In this order: `HandleInvalid` for no parcel, `Denied` if it is locked, `HandleInvalid` to who is not in its
    /// list, `Denied` to the owner, `MemReleased` to who has not accepted it, `ArgumentInvalid` if it cannot be
    /// cleared or the VM may not write; `MapFailed` if it cannot be unmapped, for want of tables.
    pub(super) fn release(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        handle: u32,
        flags: u8,
    ) -> Result<(), RmError> {
        let parcel = self.parcels.get(&handle).ok_or(RmError::HandleInvalid)?;
        if parcel.locked {
            return Err(RmError::Denied);
        }
        let member = parcel.member(from).ok_or(RmError::HandleInvalid)?;
        if from == parcel.owner {
            return Err(RmError::Denied);
        }
        if !member.shared {
            return Err(RmError::MemReleased);
        }
        let sanitize = flags & SANITIZE != 0;
        if sanitize && (parcel.is_io() || member.rights & W == 0) {
            return Err(RmError::ArgumentInvalid);
        }
        if sanitize {
            if let Some(parcel) = self.parcels.get_mut(&handle) {
                parcel.sanitize_reclaim = true;
            }
        }
        self.leave(hyp, from, handle)
    }

    /// Unmaps a parcel for a member, and forgets that it had it.
    fn leave(&mut self, hyp: &mut Hyp, from: Vmid, handle: u32) -> Result<(), RmError> {
        let parcel = self.parcels.get(&handle).cloned().ok_or(RmError::HandleInvalid)?;
        let member = parcel.member(from).ok_or(RmError::HandleInvalid)?;
        if member.mapped {
            self.unmap_member(hyp, &parcel, member)?;
        }
        let gfns = member.gfns.as_deref().unwrap_or_default();
        if let Some(vm) = self.vms.get_mut(&from) {
            for (nth, &gfn) in gfns.iter().enumerate() {
                let nr = match member.contiguous {
                    true => parcel.nr_pages(),
                    false => parcel.regions.get(nth).map_or(0, |region| region.nr),
                };
                vm.give(from, parcel.is_io(), gfn, nr);
            }
            vm.accepted.retain(|&accepted| accepted != handle);
        }
        let Some(parcel) = self.parcels.get_mut(&handle) else { return Ok(()) };
        for member in parcel.members.iter_mut().filter(|member| member.vmid == from) {
            let old = member.clone();
            *member = Member { gfns: None, contiguous: false, shared: false, mapped: false, ..old };
        }
        parcel.share_count = parcel.share_count.saturating_sub(1);
        if parcel.share_count == 0 {
            parcel.state = ParcelState::Sharing;
        }
        Ok(())
    }

    fn unmap_member(&self, hyp: &mut Hyp, parcel: &Parcel, member: &Member) -> Result<(), RmError> {
        let Some(home) = self.home(member.vmid) else { return Ok(()) };
        let places = parcel.places(member);
        for (nth, &(region, gfn)) in places.iter().enumerate() {
            let bytes = self.bytes_of(region, parcel.is_io());
            let unmapped = hyp.unmap_partial(parcel.extent, home.aspace, gfn.ipa().get(), bytes);
            if unmapped.is_err() {
                for &(region, gfn) in &places[..nth] {
                    let bytes = self.bytes_of(region, parcel.is_io());
                    let (ipa, attrs) = (gfn.ipa().get(), member.map_attrs());
                    let mapped = hyp.map_partial(parcel.extent, home.aspace, ipa, bytes, attrs);
                    hyp.note(mapped);
                }
                return Err(RmError::MapFailed);
            }
        }
        Ok(())
    }

    /// Takes memory back: cleared, if anybody asked for that, and mapped where and as it was.
    ///
    /// # Errors
    /// In this order: `HandleInvalid`, `Denied` to others than the owner, `MemInUse` while somebody has it, `Denied`
    /// if it is locked, `ArgumentInvalid` if it cannot be cleared; `NoMem` without tables for the owner's mapping,
    /// and then the parcel is as it was, but may have been cleared.
    pub(super) fn reclaim(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        handle: u32,
        flags: u8,
    ) -> Result<(), RmError> {
        let parcel = self.parcels.get_mut(&handle).ok_or(RmError::HandleInvalid)?;
        if from != parcel.owner {
            return Err(RmError::Denied);
        }
        if parcel.state == ParcelState::Shared {
            return Err(RmError::MemInUse);
        }
        if parcel.locked {
            return Err(RmError::Denied);
        }
        if flags & SANITIZE != 0 {
            if parcel.is_io() {
                return Err(RmError::ArgumentInvalid);
            }
            parcel.sanitize_reclaim = true;
        }
        let parcel = parcel.clone();
        let extent = self.home(from).ok_or(RmError::VmidInvalid)?.extent(parcel.is_io());
        for (nth, &region) in parcel.regions.iter().enumerate() {
            let bytes = self.bytes_of(region, parcel.is_io());
            let cleaned = match parcel.sanitize_reclaim {
                true => hyp.clean(parcel.extent, bytes, true),
                false => Ok(()),
            };
            let moved = cleaned.and_then(|()| hyp.donate_sibling(parcel.extent, extent, bytes));
            if moved.is_err() {
                for &region in &parcel.regions[..nth] {
                    let bytes = self.bytes_of(region, parcel.is_io());
                    let back = hyp.donate_sibling(extent, parcel.extent, bytes);
                    hyp.note(back);
                }
                return Err(RmError::NoMem);
            }
        }
        self.delete(hyp, handle);
        Ok(())
    }

    /// Forgets a parcel that has no memory any more.
    pub(super) fn delete(&mut self, hyp: &mut Hyp, handle: u32) {
        let Some(parcel) = self.parcels.remove(&handle) else { return };
        let deleted = hyp.delete_extent(parcel.extent);
        hyp.note(deleted);
        if let Some(vm) = self.vms.get_mut(&parcel.owner) {
            vm.nr_parcels = vm.nr_parcels.saturating_sub(1);
        }
    }

    /// One step of a reset: the parcel that was accepted last is released, locked or not, with no wish of its own
    /// that it be cleared, and its owner is told. Says whether none is left.
    pub(super) fn release_last(&mut self, hyp: &mut Hyp, vmid: Vmid) -> Result<bool, RmError> {
        let Some(vm) = self.vms.get(&vmid) else { return Ok(true) };
        let Some(&handle) = vm.accepted.last() else { return Ok(true) };
        self.leave(hyp, vmid, handle)?;
        self.spec.left(handle, vmid);
        self.settle();
        self.notify_owner(handle, vmid, false)?;
        Ok(self.vms.get(&vmid).is_none_or(|vm| vm.accepted.is_empty()))
    }
}
