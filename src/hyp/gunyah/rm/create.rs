//! Memory goes into a parcel.

use super::message::{AclEntry, AttrEntry, Create, MOST_ENTRIES, SglEntry, Transfer};
use super::vm::Home;
use super::{MEM_IO, MOST_PARCELS, MOST_REGIONS, NO_HANDLE};
use super::{Member, Parcel, ParcelState, Region, Rm, Vmid};
use crate::addr::{Gfn, Pfn};
use crate::geometry::{PAGE_BYTES, PAGE_SHIFT};
use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::hyp::Hyp;

pub(crate) const SANITIZE: u8 = 1;
/// More will be appended.
pub(crate) const WILL_APPEND: u8 = 2;
/// Of APPEND: no more will be.
pub(crate) const APPEND_DONE: u8 = 1;

const X: u8 = 1;
const W: u8 = 2;
const R: u8 = 4;

/// What a VM maps memory as, unless told otherwise; and a device's registers.
const ATTR_NORMAL: u16 = 0;
const ATTR_DEVICE: u16 = 1;
const ATTR_LAST: u16 = 3;

/// Whether it is a whole number of pages that the resource manager can count.
pub(super) fn addr_valid(addr: u64) -> bool {
    addr >> PAGE_SHIFT < super::ADDRESS_LIMIT.get() && addr & (PAGE_BYTES as u64 - 1) == 0
}

fn rights_valid(rights: u8) -> bool {
    [R, R | X, R | W, R | W | X].contains(&rights)
}

impl Rm {
    /// Makes a parcel of a VM's memory.
    ///
    /// # Errors
    /// In the order of the checks in here. Nothing has changed then, but what was cleared on the way stays so.
    pub(super) fn create(
        &mut self,
        hyp: &mut Hyp,
        owner: Vmid,
        create: &Create,
    ) -> Result<u32, RmError> {
        let Create { transfer, mem_type, acl, sgl, attrs, .. } = create;
        let vm = self.vms.get(&owner).ok_or(RmError::VmidInvalid)?;
        if acl.is_empty() || sgl.is_empty() {
            return Err(RmError::ArgumentInvalid);
        }
        if *transfer == Transfer::Donate && acl.len() > 1 {
            return Err(RmError::ArgumentInvalid);
        }
        if vm.nr_parcels >= MOST_PARCELS {
            return Err(RmError::Denied);
        }
        if [acl.len(), sgl.len(), attrs.len()].into_iter().any(|nr| nr > MOST_ENTRIES) {
            return Err(RmError::ArgumentInvalid);
        }
        let io = *mem_type == MEM_IO;
        let sanitize = create.flags & SANITIZE != 0;
        if sanitize && io {
            return Err(RmError::ArgumentInvalid);
        }
        let handle = self.new_handle();
        let mut members = members(acl, *transfer, io)?;
        let owner_is_in = members.iter().any(|member| member.vmid == owner);
        if owner_is_in != (*transfer == Transfer::Share) {
            return Err(RmError::ArgumentInvalid);
        }
        set_attrs(&mut members, attrs, *transfer, io)?;
        let home = self.home(owner).ok_or(RmError::VmidInvalid)?;
        let extent = self.new_extent(hyp, io).map_err(|_| RmError::NoMem)?;
        let mut parcel = Parcel {
            extent,
            owner,
            transfer: *transfer,
            mem_type: *mem_type,
            label: create.label,
            tag: None,
            state: ParcelState::Init,
            share_count: 0,
            sanitize_create: sanitize,
            sanitize_reclaim: false,
            locked: false,
            members,
            attrs: attrs.clone(),
            regions: Vec::new(),
        };
        let done = create.flags & WILL_APPEND == 0;
        if let Err(error) = self.add(hyp, home, &mut parcel, sgl, done) {
            let deleted = hyp.delete_extent(extent);
            hyp.note(deleted);
            return Err(error);
        }
        self.parcels.insert(handle, parcel);
        if let Some(vm) = self.vms.get_mut(&owner) {
            vm.nr_parcels += 1;
        }
        Ok(handle)
    }

    fn new_handle(&mut self) -> u32 {
        loop {
            let handle = self.next_handle;
            self.next_handle = handle.wrapping_add(1);
            if handle != NO_HANDLE && !self.parcels.contains_key(&handle) {
                return handle;
            }
        }
    }

    /// Puts more into a parcel.
    ///
    /// # Errors
    /// In this order: `ArgumentInvalid` for nothing, `HandleInvalid`, `Denied` to others than the owner, `Denied`
    /// when the parcel is complete; and what [`Self::create`] says of memory.
    pub(super) fn append(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        handle: u32,
        flags: u8,
        sgl: &[SglEntry],
    ) -> Result<(), RmError> {
        if sgl.is_empty() {
            return Err(RmError::ArgumentInvalid);
        }
        let parcel = self.parcels.get(&handle).ok_or(RmError::HandleInvalid)?;
        if parcel.owner != from || parcel.state != ParcelState::Init {
            return Err(RmError::Denied);
        }
        let home = self.home(from).ok_or(RmError::VmidInvalid)?;
        let mut parcel = parcel.clone();
        self.add(hyp, home, &mut parcel, sgl, flags & APPEND_DONE != 0)?;
        self.parcels.insert(handle, parcel);
        Ok(())
    }

    /// Moves memory into a parcel's extent, piece by piece; all of it, or nothing.
    fn add(
        &self,
        hyp: &mut Hyp,
        home: Home,
        parcel: &mut Parcel,
        sgl: &[SglEntry],
        done: bool,
    ) -> Result<(), RmError> {
        let old_len = parcel.regions.len();
        for entry in sgl {
            let mut offset = 0;
            loop {
                let moved = self.add_first(hyp, home, parcel, entry, offset);
                match moved {
                    Ok(size) => offset += size,
                    Err(error) => {
                        self.take_back(hyp, home, parcel, old_len);
                        return Err(error);
                    }
                }
                if offset >= entry.size {
                    break;
                }
            }
        }
        if done {
            parcel.state = ParcelState::Sharing;
        }
        Ok(())
    }

    /// Moves the first piece of what is left of an entry.
    fn add_first(
        &self,
        hyp: &mut Hyp,
        home: Home,
        parcel: &mut Parcel,
        entry: &SglEntry,
        offset: u64,
    ) -> Result<u64, RmError> {
        let ipa = entry.ipa.checked_add(offset).ok_or(RmError::ArgumentInvalid)?;
        let left = entry.size.saturating_sub(offset);
        if !addr_valid(ipa) || !addr_valid(left) {
            return Err(RmError::ArgumentInvalid);
        }
        let io = parcel.is_io();
        let extent = home.extent(io);
        let found = hyp.lookup(home.aspace, extent, ipa, left).map_err(|_| RmError::MemInvalid)?;
        let (at, size, _) = found;
        let base = if io { self.device_base.get() } else { 0 };
        let region = Region {
            pfn: Pfn::new(base + (at >> PAGE_SHIFT)),
            nr: size >> PAGE_SHIFT,
            owner_gfn: Gfn::new(ipa >> PAGE_SHIFT),
        };
        let shared = match parcel.transfer {
            Transfer::Share => parcel.member(parcel.owner).map(super::Member::map_attrs),
            _ => None,
        };
        if let Some(attrs) = shared {
            // It takes effect when the parcel has the memory.
            let mapped = hyp.map_partial(parcel.extent, home.aspace, ipa, (at, size), attrs);
            mapped.map_err(|_| RmError::MapFailed)?;
        }
        let donated = hyp.donate_sibling(extent, parcel.extent, (at, size));
        let has_room = parcel.regions.len() < MOST_REGIONS;
        if donated.is_err() || !has_room {
            if donated.is_ok() {
                let back = hyp.donate_sibling(parcel.extent, extent, (at, size));
                hyp.note(back);
            }
            if shared.is_some() {
                let unmapped = hyp.unmap_partial(parcel.extent, home.aspace, ipa, (at, size));
                hyp.note(unmapped);
            }
            return Err(if has_room { RmError::MemInvalid } else { RmError::Denied });
        }
        parcel.regions.push(region);
        if parcel.sanitize_create {
            hyp.clean(parcel.extent, (at, size), true).map_err(|_| RmError::MemInvalid)?;
        }
        Ok(size)
    }

    /// Gives the last regions back to where they came from.
    fn take_back(&self, hyp: &mut Hyp, home: Home, parcel: &mut Parcel, len: usize) {
        let io = parcel.is_io();
        while parcel.regions.len() > len {
            let Some(region) = parcel.regions.pop() else { return };
            let bytes = self.bytes_of(region, io);
            let back = hyp.donate_sibling(parcel.extent, home.extent(io), bytes);
            hyp.note(back);
            if parcel.transfer == Transfer::Share {
                let ipa = region.owner_gfn.ipa().get();
                let unmapped = hyp.unmap_partial(parcel.extent, home.aspace, ipa, bytes);
                hyp.note(unmapped);
            }
        }
    }
}

fn members(acl: &[AclEntry], transfer: Transfer, io: bool) -> Result<Vec<Member>, RmError> {
    let most = if io { R | W } else { R | W | X };
    let mut members: Vec<Member> = Vec::new();
    for &AclEntry { vmid, rights } in acl {
        if members.iter().any(|member| member.vmid == vmid) {
            return Err(RmError::ArgumentInvalid);
        }
        if !vmid.is_valid() || !rights_valid(rights) {
            return Err(RmError::ArgumentInvalid);
        }
        if io && rights & X != 0 {
            return Err(RmError::ArgumentInvalid);
        }
        if transfer == Transfer::Donate && rights != most {
            return Err(RmError::Denied);
        }
        members.push(Member {
            vmid,
            rights,
            attr: if io { ATTR_DEVICE } else { ATTR_NORMAL },
            gfns: None,
            contiguous: false,
            shared: false,
            mapped: false,
        });
    }
    Ok(members)
}

fn set_attrs(
    members: &mut [Member],
    attrs: &[AttrEntry],
    transfer: Transfer,
    io: bool,
) -> Result<(), RmError> {
    for (nth, &AttrEntry { attr, vmid }) in attrs.iter().enumerate() {
        let is_twice = attrs[..nth].iter().any(|before| before.vmid == vmid);
        let of_its_kind = io == (attr == ATTR_DEVICE);
        // A gift is mapped in the usual way.
        let usual = transfer != Transfer::Donate || io || attr == ATTR_NORMAL;
        if is_twice || attr > ATTR_LAST || !of_its_kind || !usual {
            return Err(RmError::ArgumentInvalid);
        }
        let member = members.iter_mut().find(|member| member.vmid == vmid);
        member.ok_or(RmError::VmidInvalid)?.attr = attr;
    }
    Ok(())
}
