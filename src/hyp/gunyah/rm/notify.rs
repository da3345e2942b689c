//! What VMs tell each other by way of the resource manager. Nothing else changes.

use super::message::{ACCEPTED, MOST_ENTRIES, Notification, RECALL, RELEASED, SHARED, vmid_list};
use super::vm::VmState;
use super::{Parcel, Rm, Vmid};
use crate::geometry::PAGE_SHIFT;
use crate::hyp::gunyah::error::RmError;

pub(crate) const OF_SHARED: u8 = 1;
pub(crate) const OF_RELEASED: u8 = 2;
pub(crate) const OF_ACCEPTED: u8 = 4;
pub(crate) const OF_RECALL: u8 = 8;

impl Rm {
    /// Tells members of a parcel of it, or its owner of a member.
    ///
    /// # Errors
    /// In this order: `HandleInvalid`; `ArgumentInvalid` for another tag than before; and then for those in the
    /// list `Denied` to others than the owner, what [`vmid_list`] says, `VmidInvalid` for a VM that is not there,
    /// `ArgumentInvalid` for one that is no member; to the owner `HandleInvalid` from who is no member, `MemInUse`
    /// and `MemReleased` for what is not so; `ArgumentInvalid` for no such flag.
    pub(super) fn notify(
        &mut self,
        from: Vmid,
        handle: u32,
        flags: u8,
        tag: u32,
        list: &[u8],
    ) -> Result<(), RmError> {
        let parcel = self.parcels.get(&handle).ok_or(RmError::HandleInvalid)?;
        if parcel.tag.is_some_and(|known| known != tag) {
            return Err(RmError::ArgumentInvalid);
        }
        match flags {
            OF_SHARED => self.notify_shared(from, handle, tag, list),
            OF_RELEASED => self.notify_owner(handle, from, false),
            OF_ACCEPTED => self.notify_owner(handle, from, true),
            OF_RECALL => {
                let targets = self.targets(from, parcel, list)?;
                let body = owner_head(handle, parcel);
                for target in targets {
                    self.tell(target, Notification { id: RECALL, body: body.clone() });
                }
                Ok(())
            }
            _ => Err(RmError::ArgumentInvalid),
        }
    }

    fn targets(&self, from: Vmid, parcel: &Parcel, list: &[u8]) -> Result<Vec<Vmid>, RmError> {
        if from != parcel.owner {
            return Err(RmError::Denied);
        }
        let targets = vmid_list(list, parcel.members.len())?;
        for &target in &targets {
            if !self.vms.contains_key(&target) {
                return Err(RmError::VmidInvalid);
            }
            if parcel.member(target).is_none() {
                return Err(RmError::ArgumentInvalid);
            }
        }
        Ok(targets)
    }

    fn notify_shared(
        &mut self,
        from: Vmid,
        handle: u32,
        tag: u32,
        list: &[u8],
    ) -> Result<(), RmError> {
        let parcel = self.parcels.get(&handle).ok_or(RmError::HandleInvalid)?;
        let targets = self.targets(from, parcel, list)?;
        let parcel = self.parcels.get_mut(&handle).ok_or(RmError::HandleInvalid)?;
        parcel.tag.get_or_insert(tag);
        let body = shared(handle, parcel);
        let mut answer = Ok(());
        for target in targets {
            let state = self.vms.get(&target).map(|vm| vm.state);
            if state == Some(VmState::Ready) {
                // It does not run yet, and what it is configured with has no use for this: so the owner hears.
                answer = self.notify_owner(handle, target, false);
            } else {
                self.tell(target, Notification { id: SHARED, body: body.clone() });
            }
        }
        answer
    }

    /// Tells the owner that a member has accepted, or no longer has, a parcel.
    ///
    /// # Errors
    /// `HandleInvalid` from who is no member; `MemInUse` or `MemReleased` if it is the other way round.
    pub(super) fn notify_owner(
        &mut self,
        handle: u32,
        vmid: Vmid,
        accepted: bool,
    ) -> Result<(), RmError> {
        let parcel = self.parcels.get(&handle).ok_or(RmError::HandleInvalid)?;
        let member = parcel.member(vmid).ok_or(RmError::HandleInvalid)?;
        match (accepted, member.shared) {
            (false, true) => return Err(RmError::MemInUse),
            (true, false) => return Err(RmError::MemReleased),
            _ => {}
        }
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(vmid.0.to_le_bytes());
        body.extend([0; 2]);
        body.extend(parcel.tag.unwrap_or(0).to_le_bytes());
        let (id, owner) = (if accepted { ACCEPTED } else { RELEASED }, parcel.owner);
        self.tell(owner, Notification { id, body });
        Ok(())
    }

    fn tell(&mut self, vmid: Vmid, notification: Notification) {
        if let Some(vm) = self.vms.get_mut(&vmid) {
            vm.tell(notification);
        }
    }
}

fn owner_head(handle: u32, parcel: &Parcel) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(parcel.tag.unwrap_or(0).to_le_bytes());
    body
}

/// All that there is to know of a parcel; of its regions only the sizes, and of no more than 512.
fn shared(handle: u32, parcel: &Parcel) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([parcel.mem_type, parcel.transfer as u8, u8::from(parcel.sanitize_create), 0]);
    body.extend(parcel.owner.0.to_le_bytes());
    body.extend([0; 2]);
    body.extend(parcel.label.to_le_bytes());
    body.extend(parcel.tag.unwrap_or(0).to_le_bytes());
    let count = |nr: usize| u16::try_from(nr).unwrap_or(u16::MAX).to_le_bytes();
    body.extend(count(parcel.members.len()));
    body.extend([0; 2]);
    for member in &parcel.members {
        body.extend(member.vmid.0.to_le_bytes());
        body.extend([member.rights, 0]);
    }
    let nr_regions = parcel.regions.len().min(MOST_ENTRIES);
    body.extend(count(nr_regions));
    body.extend([0; 2]);
    for region in &parcel.regions[..nr_regions] {
        body.extend((region.nr << PAGE_SHIFT).to_le_bytes());
    }
    body.extend(count(parcel.attrs.len()));
    body.extend([0; 2]);
    for entry in &parcel.attrs {
        body.extend(entry.attr.to_le_bytes());
        body.extend(entry.vmid.0.to_le_bytes());
    }
    body
}
