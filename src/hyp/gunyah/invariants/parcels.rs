//! Parcels, those who have them, and VMs.

use std::collections::{BTreeMap, BTreeSet};

use super::super::attrs::Access;
use super::super::memdb::Owner;
use super::super::rm::message::Transfer;
use super::super::rm::vm::VmState;
use super::super::rm::{Parcel, ParcelState, Vmid};
use super::{Mapped, View};
use crate::addr::{Gfn, Pfn};
use crate::range::PfnRange;

/// Who a page of a parcel is to be mapped for, told from the parcel alone.
fn wanted(view: &View<'_>, parcel: &Parcel) -> BTreeMap<Pfn, Vec<Mapped>> {
    let mut wanted: BTreeMap<Pfn, Vec<Mapped>> = BTreeMap::new();
    let mut add = |vmid: Vmid, pfn: Pfn, gfn: Gfn, nr: u64, rights: u8| {
        let Some(home) = view.rm.vms.get(&vmid).and_then(|vm| vm.home) else { return };
        for nth in 0..nr {
            wanted.entry(Pfn::new(pfn.get() + nth)).or_default().push(Mapped {
                aspace: home.aspace,
                gfn: Gfn::new(gfn.get() + nth),
                access: Access::of(rights),
            });
        }
    };
    for member in &parcel.members {
        if member.vmid == parcel.owner {
            for region in &parcel.regions {
                add(member.vmid, region.pfn, region.owner_gfn, region.nr, member.rights);
            }
        } else if member.mapped {
            for (region, gfn) in parcel.places(member) {
                add(member.vmid, region.pfn, gfn, region.nr, member.rights);
            }
        }
    }
    wanted
}

fn differences(view: &View<'_>, of_owner: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for (handle, parcel) in &view.rm.parcels {
        let owner = view.rm.vms.get(&parcel.owner).and_then(|vm| vm.home).map(|home| home.aspace);
        let wanted = wanted(view, parcel);
        let frames = parcel
            .regions
            .iter()
            .flat_map(|region| (0..region.nr).map(|nth| Pfn::new(region.pfn.get() + nth)));
        for pfn in frames {
            let counts = |page: &&Mapped| (Some(page.aspace) == owner) == of_owner;
            let found: Vec<_> = view.of(pfn).iter().filter(counts).collect();
            let should: Vec<_> = wanted.get(&pfn).into_iter().flatten().filter(counts).collect();
            let is_same =
                found.len() == should.len() && should.iter().all(|page| found.contains(page));
            if !is_same {
                wrong
                    .push(format!("parcel {handle}, {pfn:?}: {found:?}, and should be {should:?}"));
            }
        }
    }
    wrong
}

pub(super) fn owners_see_what_they_share(view: &View<'_>) -> Vec<String> {
    let mut wrong = differences(view, true);
    for (handle, parcel) in &view.rm.parcels {
        let owner_is_in = parcel.member(parcel.owner).is_some();
        if owner_is_in != (parcel.transfer == Transfer::Share) {
            wrong.push(format!("parcel {handle} is {:?}", parcel.transfer));
        }
    }
    wrong
}

pub(super) fn members_have_what_they_accepted(view: &View<'_>) -> Vec<String> {
    differences(view, false)
}

pub(super) fn members_are_counted(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (handle, parcel) in &view.rm.parcels {
        let shared: Vec<_> = parcel.members.iter().filter(|member| member.shared).collect();
        let state_fits = (parcel.state == ParcelState::Shared) == (parcel.share_count > 0);
        let mapped_only = parcel.members.iter().any(|member| member.mapped && !member.shared);
        let owner_is_in = shared.iter().any(|member| member.vmid == parcel.owner);
        if shared.len() != parcel.share_count as usize || !state_fits || mapped_only || owner_is_in
        {
            wrong.push(format!(
                "parcel {handle} is {:?}, counts {} and is had by {shared:?}",
                parcel.state, parcel.share_count
            ));
        }
    }
    wrong
}

pub(super) fn parcels_have_their_regions(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (handle, parcel) in &view.rm.parcels {
        let mut nr_owned = 0;
        for frames in view.frames() {
            let owned = view.hyp.memdb.walk(frames, Owner::Extent(parcel.extent));
            nr_owned += owned.iter().map(PfnRange::nr_pages).sum::<u64>();
        }
        let has_all = parcel.regions.iter().all(|region| {
            PfnRange::new(region.pfn, region.nr)
                .is_ok_and(|frames| view.hyp.memdb.is_all(frames, Owner::Extent(parcel.extent)))
        });
        if !has_all || nr_owned != parcel.nr_pages() {
            wrong.push(format!("parcel {handle} has {nr_owned} pages, and not just its regions"));
        }
    }
    wrong
}

pub(super) fn the_rest_is_one_vms(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut homes = BTreeMap::new();
    for home in view.rm.vms.values().filter_map(|vm| vm.home) {
        homes.insert(home.memory, home.aspace);
        homes.insert(home.device, home.aspace);
    }
    let parcels: BTreeSet<_> = view.rm.parcels.values().map(|parcel| parcel.extent).collect();
    let paged: BTreeSet<_> =
        view.pagings().flat_map(|(_, paging)| [paging.private, paging.shared]).collect();
    for pfn in view.frames().iter().flat_map(|frames| frames.iter()) {
        let mapped = view.of(pfn);
        let fits = match view.hyp.memdb.owner(pfn) {
            Owner::Extent(id) if parcels.contains(&id) || paged.contains(&id) => true,
            Owner::Extent(id) => match homes.get(&id) {
                Some(&aspace) => {
                    mapped.len() <= 1 && mapped.iter().all(|page| page.aspace == aspace)
                }
                None => mapped.is_empty(),
            },
            _ => mapped.is_empty(),
        };
        if !fits {
            wrong.push(format!("{pfn:?} is mapped by {mapped:?}"));
        }
    }
    wrong
}

pub(super) fn vms_know_their_parcels(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&vmid, vm) in &view.rm.vms {
        let has = |parcel: &Parcel| parcel.member(vmid).is_some_and(|member| member.shared);
        let shared = view.rm.parcels.iter().filter(|(_, parcel)| has(parcel));
        let shared: BTreeSet<u32> = shared.map(|(&handle, _)| handle).collect();
        let known: BTreeSet<u32> = vm.accepted.iter().copied().collect();
        if shared != known || vm.accepted.len() != known.len() {
            wrong.push(format!("{vmid:?} has {shared:?} and knows of {:?}", vm.accepted));
        }
        if vm.state == VmState::Reset && !(known.is_empty() && vm.home.is_none()) {
            wrong.push(format!("{vmid:?} was taken apart, and still has {known:?}"));
        }
        let is_missing = |parcel: &Parcel| {
            let Some(member) = parcel.member(vmid) else { return false };
            let direct = parcel.is_io() || vmid == Vmid::HLOS;
            let lost =
                |&(region, gfn): &(super::super::rm::Region, Gfn)| !vm.ranges.has(gfn, region.nr);
            !direct && parcel.places(member).iter().any(lost)
        };
        if view.rm.parcels.values().any(is_missing) {
            wrong.push(format!("{vmid:?} uses addresses that are free"));
        }
    }
    // Numbers are used again, parcels may outlive who made them.
    for (&vmid, vm) in &view.rm.vms {
        let owned = view.rm.parcels.values().filter(|parcel| parcel.owner == vmid).count();
        if vm.nr_parcels as usize > owned {
            wrong.push(format!("{vmid:?} counts {} parcels of {owned}", vm.nr_parcels));
        }
    }
    wrong
}
