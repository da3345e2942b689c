//! Mistakes that the code can be made to seem to make, to see that somebody notices.

use std::collections::BTreeMap;

use super::super::World;
use super::super::aspace::Piece;
use super::super::attrs::{Access, MapAttrs, MapType};
use super::super::memdb::Owner;
use super::super::rm::{Parcel, Vmid};
use super::Step;
use super::judge::{Snapshot, Zeroed, frames};
use super::vms::BARE;
use crate::addr::Pfn;
use crate::range::PfnRange;

type Parcels = BTreeMap<u32, Parcel>;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// Who lends memory keeps it mapped.
    LendersKeepMappings,
    /// Memory that goes into a parcel stays its owner's in the database.
    OwnersAreForgotten,
    /// Who has accepted a parcel may do anything with it.
    RightsGrow,
    /// Those who have a parcel are counted wrongly.
    CountsDrift,
    /// What is refused is counted all the same.
    RefusalsLeaveMarks,
    /// What was to be cleared is not.
    NothingIsCleared,
    /// What nobody wants cleared is, to be on the safe side.
    EverythingIsCleared,
    /// Who gives a parcel back keeps its addresses.
    AddressesLeak,
    /// A call that is refused has moved memory.
    RefusedCallsMoveMemory,
    /// A call that clears memory clears more than was asked for.
    ZeroesReachTooFar,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::LendersKeepMappings,
        Self::OwnersAreForgotten,
        Self::RightsGrow,
        Self::CountsDrift,
        Self::RefusalsLeaveMarks,
        Self::NothingIsCleared,
        Self::EverythingIsCleared,
        Self::AddressesLeak,
        Self::RefusedCallsMoveMemory,
        Self::ZeroesReachTooFar,
    ];

    /// Leaves everything as if the mistake had been made in the step before, if that gave occasion.
    pub(super) fn spoil(self, world: &mut World, before: &Snapshot, step: &Step) {
        let parcels = world.rm.parcels.clone();
        let new = parcels.iter().find(|(handle, _)| !before.parcels.contains_key(handle));
        let new = new.map(|(_, parcel)| parcel);
        match self {
            Self::LendersKeepMappings => new.and_then(|parcel| lender_keeps(world, parcel)),
            Self::OwnersAreForgotten => new.and_then(|parcel| owner_is_forgotten(world, parcel)),
            Self::RightsGrow => rights_grow(world, &parcels),
            Self::CountsDrift => {
                for parcel in world.rm.parcels.values_mut().filter(|parcel| parcel.share_count > 0)
                {
                    parcel.share_count += 1;
                }
                None
            }
            Self::RefusalsLeaveMarks if step.refused => {
                world.rm.vms.get_mut(&Vmid::HLOS).map(|vm| vm.nr_parcels += 1)
            }
            Self::RefusalsLeaveMarks => None,
            Self::NothingIsCleared => nothing_is_cleared(world, before),
            Self::EverythingIsCleared => {
                let gone = before.parcels.iter().find(|(handle, _)| !parcels.contains_key(handle));
                gone.and_then(|(_, parcel)| clear(world, frames(parcel)))
            }
            Self::AddressesLeak => address_leaks(world, &parcels),
            Self::RefusedCallsMoveMemory if step.refused && step.within.is_some() => {
                call_moves(world)
            }
            Self::RefusedCallsMoveMemory => None,
            Self::ZeroesReachTooFar => match (&step.zeroed, step.within) {
                (Zeroed::Exactly(cleared), Some(_)) => {
                    clear(world, before.heads.keys().copied().filter(|pfn| !cleared.contains(pfn)))
                }
                _ => None,
            },
        };
    }
}

fn call_moves(world: &mut World) -> Option<()> {
    let frames = PfnRange::new(Pfn::new(BARE), 1).ok()?;
    let owner = world.hyp.memdb.owner(frames.start());
    world.hyp.memdb.update(frames, Owner::Partition, owner).ok()
}

fn lender_keeps(world: &mut World, parcel: &Parcel) -> Option<()> {
    if parcel.member(parcel.owner).is_some() {
        return None;
    }
    let region = parcel.regions.first()?;
    let piece = Piece { gfn: region.owner_gfn, pfn: region.pfn, nr: 1 };
    map(world, parcel.owner, piece, MapAttrs::new(Access::RW, MapType::CACHED))
}

fn owner_is_forgotten(world: &mut World, parcel: &Parcel) -> Option<()> {
    let home = world.rm.vms.get(&parcel.owner)?.home?;
    let frames = PfnRange::new(parcel.regions.first()?.pfn, 1).ok()?;
    let owner = Owner::Extent(home.extent(parcel.is_io()));
    world.hyp.memdb.update(frames, owner, Owner::Extent(parcel.extent)).ok()
}

fn rights_grow(world: &mut World, parcels: &Parcels) -> Option<()> {
    let (vmid, piece) = parcels.values().find_map(|parcel| {
        let is_lesser = |rights| rights == 4 || rights == 5;
        let mut members = parcel.members.iter();
        let member = members.find(|member| member.mapped && is_lesser(member.rights))?;
        let &(region, gfn) = parcel.places(member).first()?;
        Some((member.vmid, Piece { gfn, pfn: region.pfn, nr: 1 }))
    })?;
    map(world, vmid, piece, MapAttrs::new(Access::RWX, MapType::CACHED))
}

fn nothing_is_cleared(world: &mut World, before: &Snapshot) -> Option<()> {
    for (&pfn, head) in before.heads.iter().filter(|(_, head)| **head != 0) {
        let mut now = [0; 8];
        world.hyp.machine.read(pfn.pa(), &mut now).ok()?;
        if now == [0; 8] {
            world.hyp.machine.write(pfn.pa(), &head.to_le_bytes()).ok()?;
        }
    }
    None
}

fn clear(world: &mut World, all: impl Iterator<Item = Pfn>) -> Option<()> {
    for pfn in all {
        world.hyp.machine.zero(PfnRange::new(pfn, 1).ok()?).ok()?;
    }
    None
}

fn address_leaks(world: &mut World, parcels: &Parcels) -> Option<()> {
    let (vmid, gfn, nr) = parcels.values().find_map(|parcel| {
        let direct = |vmid| parcel.is_io() || vmid == Vmid::HLOS;
        let mut members = parcel.members.iter();
        let member = members.find(|member| member.mapped && !direct(member.vmid))?;
        let &(region, gfn) = parcel.places(member).first()?;
        Some((member.vmid, gfn, region.nr))
    })?;
    world.rm.vms.get_mut(&vmid).map(|vm| vm.ranges.give(gfn, nr))
}

fn map(world: &mut World, vmid: Vmid, piece: Piece, attrs: MapAttrs) -> Option<()> {
    let home = world.rm.vms.get(&vmid)?.home?;
    let space = world.hyp.aspaces.get_mut(&home.aspace)?;
    space.map(home.aspace, &mut world.hyp.heap, piece, attrs, &mut Vec::new()).ok()
}
