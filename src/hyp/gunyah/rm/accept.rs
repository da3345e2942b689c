//! A VM takes what it was lent, shown or given.

use super::create::addr_valid;
use super::message::{Accept, MOST_ENTRIES, SglEntry, Transfer};
use super::vm::Vm;
use super::{Member, Parcel, ParcelState, Region, Rm, Vmid};
use crate::addr::{Gfn, Pfn};
use crate::geometry::{HUGE_PAGES, PAGE_SHIFT};
use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::hyp::Hyp;
use crate::hyp::gunyah::memdb::ExtentId;

pub(crate) const VALIDATE_SANITIZED: u8 = 1;
pub(crate) const VALIDATE_ACL_ATTR: u8 = 2;
pub(crate) const VALIDATE_LABEL: u8 = 4;
pub(crate) const MAP_OTHER: u8 = 8;
pub(crate) const MAP_CONTIGUOUS: u8 = 16;
pub(crate) const SANITIZE: u8 = 32;
pub(crate) const DONE: u8 = 128;

const W: u8 = 2;

/// Where a parcel was put, if the VM left that open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) sgl: Vec<SglEntry>,
    /// There are regions that have no address yet.
    pub(crate) incomplete: bool,
}

impl Placed {
    pub(super) fn encode(&self) -> Vec<u8> {
        let nr = u16::try_from(self.sgl.len()).unwrap_or(u16::MAX);
        let mut bytes = nr.to_le_bytes().to_vec();
        bytes.extend([u8::from(self.incomplete), 0]);
        for entry in &self.sgl {
            bytes.extend(entry.ipa.to_le_bytes());
            bytes.extend(entry.size.to_le_bytes());
        }
        bytes
    }
}

/// What an accept is about to do, checked.
struct Plan {
    contiguous: bool,
    /// How many addresses there are to be, how many there are, and how many come now.
    nr_places: usize,
    nr_before: usize,
    nr_now: usize,
}

impl Parcel {
    fn validate(&self, accept: &Accept) -> Result<(), RmError> {
        if accept.mem_type != self.mem_type || accept.transfer != self.transfer as u8 {
            return Err(RmError::ArgumentInvalid);
        }
        let is_asked = |flag| accept.flags & flag != 0;
        if is_asked(VALIDATE_SANITIZED) && !self.sanitize_create {
            return Err(RmError::ValidateFailed);
        }
        if is_asked(VALIDATE_LABEL) && accept.label != self.label {
            return Err(RmError::ValidateFailed);
        }
        if is_asked(VALIDATE_ACL_ATTR) {
            let members = self.members.iter().map(|member| (member.vmid, member.rights));
            let is_same = members.eq(accept.acl.iter().map(|entry| (entry.vmid, entry.rights)));
            if !is_same || accept.attrs != self.attrs {
                return Err(RmError::ValidateFailed);
            }
        }
        Ok(())
    }

    fn member_for(&self, vmid: Vmid) -> Result<&Member, RmError> {
        let member = self.member(vmid).ok_or(RmError::VmidInvalid)?;
        match vmid == self.owner || member.mapped {
            true => Err(RmError::Denied),
            false => Ok(member),
        }
    }

    fn check_flags(&self, member: &Member, accept: &Accept) -> Result<(), RmError> {
        if accept.flags & MAP_CONTIGUOUS != 0 {
            // Who has begun in pieces goes on in pieces.
            let has_begun_so = member.gfns.is_none() || member.contiguous;
            if self.mem_type != super::MEM_NORMAL || !has_begun_so {
                return Err(RmError::ArgumentInvalid);
            }
        }
        if accept.flags & SANITIZE != 0 && (self.is_io() || member.rights & W == 0) {
            return Err(RmError::ArgumentInvalid);
        }
        Ok(())
    }

    fn plan(&self, member: &Member, accept: &Accept) -> Result<Plan, RmError> {
        let asked = accept.flags & MAP_CONTIGUOUS != 0;
        let contiguous = if member.gfns.is_some() { member.contiguous } else { asked };
        if contiguous && !asked && self.regions.len() > 1 {
            // The original writes behind its list of addresses then.
            return Err(RmError::ArgumentInvalid);
        }
        let nr_before = member.gfns.as_ref().map_or(0, Vec::len);
        let nr_places = if contiguous { 1 } else { self.regions.len() };
        let left = nr_places.saturating_sub(nr_before).min(MOST_ENTRIES);
        let nr_now = match accept.sgl.len() {
            0 => left,
            nr if nr <= left => nr,
            _ => return Err(RmError::ArgumentInvalid),
        };
        Ok(Plan { contiguous, nr_places, nr_before, nr_now })
    }
}

impl Rm {
    /// Gives a VM what is in a parcel: addresses at once, the memory with `DONE`. A gift is its own then, and the
    /// parcel is gone.
    ///
    /// # Errors
    /// In the order of the checks in here. Nothing has changed then, but that the memory is to be cleared, if that
    /// was asked for.
    pub(super) fn accept(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        accept: &Accept,
    ) -> Result<Option<Placed>, RmError> {
        let parcel = self.parcels.get(&accept.handle).ok_or(RmError::HandleInvalid)?;
        parcel.validate(accept)?;
        if accept.flags & MAP_OTHER != 0 {
            return Err(RmError::Denied);
        }
        if accept.map_vmid != Vmid(0) {
            return Err(RmError::ArgumentInvalid);
        }
        let home = self.home(from).ok_or(RmError::VmidInvalid)?;
        let member = parcel.member_for(from)?;
        parcel.check_flags(member, accept)?;
        if accept.flags & SANITIZE != 0 {
            self.want_clean(accept.handle);
        }
        let parcel = self.parcels.get(&accept.handle).cloned().ok_or(RmError::HandleInvalid)?;
        let plan = parcel.plan(parcel.member_for(from)?, accept)?;
        let vm = self.vms.get_mut(&from).ok_or(RmError::VmidInvalid)?;
        let new = place(vm, from, &parcel, &plan, &accept.sgl)?;
        let mut all =
            parcel.member(from).and_then(|member| member.gfns.clone()).unwrap_or_default();
        all.extend(new.iter().map(|&(gfn, _)| gfn));
        let done = accept.flags & DONE != 0;
        let answer = match done && all.len() != plan.nr_places {
            true => Err(RmError::ArgumentInvalid),
            false => Ok(()),
        };
        let member = Member {
            vmid: from,
            gfns: Some(all),
            contiguous: plan.contiguous,
            shared: true,
            mapped: done,
            ..parcel.member(from).cloned().ok_or(RmError::VmidInvalid)?
        };
        let extent = match parcel.transfer {
            Transfer::Donate => home.extent(parcel.is_io()),
            _ => parcel.extent,
        };
        let answer = answer.and_then(|()| match done {
            true => self.take(hyp, &parcel, &member, extent),
            false => Ok(()),
        });
        if let Err(error) = answer {
            if let Some(vm) = self.vms.get_mut(&from) {
                new.iter().for_each(|&(gfn, nr)| vm.give(from, parcel.is_io(), gfn, nr));
            }
            return Err(error);
        }
        let sgl =
            new.iter().map(|&(gfn, nr)| SglEntry { ipa: gfn.ipa().get(), size: nr << PAGE_SHIFT });
        let incomplete = plan.nr_before + plan.nr_now < plan.nr_places;
        let placed = Placed { sgl: sgl.collect(), incomplete };
        match done && parcel.transfer == Transfer::Donate {
            true => self.given(hyp, accept.handle, &parcel, from),
            false => self.joined(accept.handle, member),
        }
        Ok(accept.sgl.is_empty().then_some(placed))
    }

    fn want_clean(&mut self, handle: u32) {
        if let Some(parcel) = self.parcels.get_mut(&handle) {
            parcel.sanitize_reclaim = true;
        }
    }

    /// Maps all of a parcel for a member; a gift is moved to its own extent first. All or nothing.
    fn take(
        &self,
        hyp: &mut Hyp,
        parcel: &Parcel,
        member: &Member,
        extent: ExtentId,
    ) -> Result<(), RmError> {
        let home = self.home(member.vmid).ok_or(RmError::VmidInvalid)?;
        let bytes = |region: Region| self.bytes_of(region, parcel.is_io());
        let places = parcel.places(member);
        if extent != parcel.extent {
            for (nth, &(region, _)) in places.iter().enumerate() {
                if hyp.donate_sibling(parcel.extent, extent, bytes(region)).is_err() {
                    self.hand_back(hyp, parcel, extent, &places[..nth]);
                    return Err(RmError::MemInvalid);
                }
            }
        }
        for (nth, &(region, gfn)) in places.iter().enumerate() {
            let (ipa, attrs) = (gfn.ipa().get(), member.map_attrs());
            if hyp.map_partial(extent, home.aspace, ipa, bytes(region), attrs).is_err() {
                for &(region, gfn) in &places[..nth] {
                    let ipa = gfn.ipa().get();
                    let unmapped = hyp.unmap_partial(extent, home.aspace, ipa, bytes(region));
                    hyp.note(unmapped);
                }
                if extent != parcel.extent {
                    self.hand_back(hyp, parcel, extent, &places);
                }
                return Err(RmError::MapFailed);
            }
        }
        Ok(())
    }

    fn hand_back(&self, hyp: &mut Hyp, parcel: &Parcel, from: ExtentId, places: &[(Region, Gfn)]) {
        for &(region, _) in places {
            let bytes = self.bytes_of(region, parcel.is_io());
            let back = hyp.donate_sibling(from, parcel.extent, bytes);
            hyp.note(back);
        }
    }

    /// A gift has arrived: who gave it has no address for it any more, and the parcel is gone.
    fn given(&mut self, hyp: &mut Hyp, handle: u32, parcel: &Parcel, to: Vmid) {
        let io = parcel.is_io();
        if let Some(home) = self.home(parcel.owner) {
            for &region in &parcel.regions {
                let ipa = region.owner_gfn.ipa().get();
                let bytes = self.bytes_of(region, io);
                let unmapped = hyp.unmap_partial(home.extent(io), home.aspace, ipa, bytes);
                hyp.note(unmapped);
                if let Some(vm) = self.vms.get_mut(&parcel.owner) {
                    vm.give(parcel.owner, io, region.owner_gfn, region.nr);
                }
            }
        }
        if let Some(vm) = self.vms.get_mut(&to) {
            vm.accepted.retain(|&accepted| accepted != handle);
        }
        self.delete(hyp, handle);
    }

    fn joined(&mut self, handle: u32, member: Member) {
        let Some(parcel) = self.parcels.get_mut(&handle) else { return };
        let Some(at) = parcel.members.iter().position(|old| old.vmid == member.vmid) else {
            return;
        };
        if !parcel.members[at].shared {
            parcel.share_count += 1;
            parcel.state = ParcelState::Shared;
            if let Some(vm) = self.vms.get_mut(&member.vmid) {
                vm.accepted.push(handle);
            }
        }
        parcel.members[at] = member;
    }
}

/// Finds addresses for the next regions, or for all in one piece.
fn place(
    vm: &mut Vm,
    vmid: Vmid,
    parcel: &Parcel,
    plan: &Plan,
    sgl: &[SglEntry],
) -> Result<Vec<(Gfn, u64)>, RmError> {
    let io = parcel.is_io();
    let mut placed: Vec<(Gfn, u64)> = Vec::new();
    for nth in 0..plan.nr_now {
        let region = parcel.regions.get(plan.nr_before + nth);
        let (pfn, nr) = match (plan.contiguous, region) {
            (true, _) => (None, parcel.nr_pages()),
            (false, Some(region)) => (Some(region.pfn), region.nr),
            (false, None) => break,
        };
        let answer = place_one(vm, vmid, io, (pfn, nr), sgl.get(nth));
        match answer {
            Ok(gfn) => placed.push((gfn, nr)),
            Err(error) => {
                placed.iter().for_each(|&(gfn, nr)| vm.give(vmid, io, gfn, nr));
                return Err(error);
            }
        }
    }
    Ok(placed)
}

fn place_one(
    vm: &mut Vm,
    vmid: Vmid,
    io: bool,
    (pfn, nr): (Option<Pfn>, u64),
    wanted: Option<&SglEntry>,
) -> Result<Gfn, RmError> {
    let wanted = match wanted {
        Some(entry) if !addr_valid(entry.ipa) || entry.size != nr << PAGE_SHIFT => {
            return Err(RmError::ArgumentInvalid);
        }
        Some(entry) => Some(Gfn::new(entry.ipa >> PAGE_SHIFT)),
        None => None,
    };
    if Vm::is_direct(vmid, io) {
        let same = pfn.map(|pfn| Gfn::new(pfn.get()));
        let fits = same.filter(|&same| wanted.is_none_or(|wanted| wanted == same));
        return fits.ok_or(RmError::NoResource);
    }
    let align = if nr >= HUGE_PAGES { HUGE_PAGES } else { 1 };
    let found = match wanted {
        Some(at) => vm.ranges.take(at, nr),
        None => vm.ranges.take_any(nr, align),
    };
    found.ok_or(RmError::NoResource)
}
