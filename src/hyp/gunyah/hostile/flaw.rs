//! Mistakes that the code can be made to seem to make, to see that somebody notices.

use super::super::World;
use super::super::aspace::Piece;
use super::super::attrs::{Access, MapAttrs, MapType};
use super::super::memdb::Owner;
use super::super::rm::{Parcel, Vmid};
use super::judge::{Snapshot, frames};
use crate::addr::Pfn;
use crate::range::PfnRange;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Flaw {
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
}

impl Flaw {
    pub(crate) const ALL: [Self; 8] = [
        Self::LendersKeepMappings,
        Self::OwnersAreForgotten,
        Self::RightsGrow,
        Self::CountsDrift,
        Self::RefusalsLeaveMarks,
        Self::NothingIsCleared,
        Self::EverythingIsCleared,
        Self::AddressesLeak,
    ];

    /// Leaves everything as if the mistake had been made in the step before.
    pub(super) fn spoil(self, world: &mut World, before: &Snapshot, refused: bool) {
        let parcels = world.rm.parcels.clone();
        let is_new = |handle: &u32| !before.parcels.contains_key(handle);
        let new = parcels.iter().find(|(handle, _)| is_new(handle)).map(|(_, parcel)| parcel);
        let gone = before.parcels.iter().find(|(handle, _)| !parcels.contains_key(handle));
        match (self, new) {
            (Self::LendersKeepMappings, Some(parcel)) if parcel.member(parcel.owner).is_none() => {
                let region = parcel.regions[0];
                let piece = Piece { gfn: region.owner_gfn, pfn: region.pfn, nr: 1 };
                let attrs = MapAttrs::new(Access::RW, MapType::CACHED);
                map(world, parcel.owner, piece, attrs);
            }
            (Self::OwnersAreForgotten, Some(parcel)) => {
                let Some(home) = world.rm.vms[&parcel.owner].home else { return };
                let frames = PfnRange::new(parcel.regions[0].pfn, 1).unwrap();
                let owner = Owner::Extent(home.extent(parcel.is_io()));
                world.hyp.memdb.update(frames, owner, Owner::Extent(parcel.extent)).unwrap();
            }
            (Self::RightsGrow, _) => {
                let lesser = parcels.values().find_map(|parcel| {
                    let is_lesser = |rights| rights == 4 || rights == 5;
                    let mut members = parcel.members.iter();
                    let member =
                        members.find(|member| member.mapped && is_lesser(member.rights))?;
                    let &(region, gfn) = parcel.places(member).first()?;
                    Some((member.vmid, Piece { gfn, pfn: region.pfn, nr: 1 }))
                });
                if let Some((vmid, piece)) = lesser {
                    map(world, vmid, piece, MapAttrs::new(Access::RWX, MapType::CACHED));
                }
            }
            (Self::CountsDrift, _) => {
                for parcel in world.rm.parcels.values_mut().filter(|parcel| parcel.share_count > 0)
                {
                    parcel.share_count += 1;
                }
            }
            (Self::RefusalsLeaveMarks, _) if refused => {
                if let Some(vm) = world.rm.vms.get_mut(&Vmid::HLOS) {
                    vm.nr_parcels += 1;
                }
            }
            (Self::NothingIsCleared, _) => {
                for (&pfn, head) in before.heads.iter().filter(|(_, head)| **head != 0) {
                    let mut now = [0; 8];
                    world.hyp.machine.read(pfn.pa(), &mut now).unwrap();
                    if now == [0; 8] {
                        world.hyp.machine.write(pfn.pa(), &head.to_le_bytes()).unwrap();
                    }
                }
            }
            (Self::EverythingIsCleared, _) => {
                let all: Vec<Pfn> = gone.iter().flat_map(|(_, parcel)| frames(parcel)).collect();
                for pfn in all {
                    world.hyp.machine.zero(PfnRange::new(pfn, 1).unwrap()).unwrap();
                }
            }
            (Self::AddressesLeak, _) => {
                let placed = |parcel: &Parcel| {
                    let direct = |vmid| parcel.is_io() || vmid == Vmid::HLOS;
                    let mut members = parcel.members.iter();
                    let member = members.find(|member| member.mapped && !direct(member.vmid))?;
                    let &(region, gfn) = parcel.places(member).first()?;
                    Some((member.vmid, gfn, region.nr))
                };
                if let Some((vmid, gfn, nr)) = parcels.values().find_map(placed) {
                    world.rm.vms.get_mut(&vmid).unwrap().ranges.give(gfn, nr);
                }
            }
            _ => {}
        }
    }
}

fn map(world: &mut World, vmid: Vmid, piece: Piece, attrs: MapAttrs) {
    let Some(home) = world.rm.vms[&vmid].home else { return };
    let mut undo = Vec::new();
    let space = world.hyp.aspaces.get_mut(&home.aspace).unwrap();
    space.map(home.aspace, &mut world.hyp.heap, piece, attrs, &mut undo).unwrap();
}
