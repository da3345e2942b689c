//! What a step may have changed: nothing if it was refused, and bytes only if somebody asked for zeroes.

use std::collections::BTreeMap;

use super::super::World;
use super::super::invariants::{Mapped, mapped};
use super::super::memdb::Owner;
use super::super::rm::vm::{Home, VmState};
use super::super::rm::{Parcel, Vmid};
use crate::addr::{Pa, Pfn};
use crate::range::PfnRange;

/// Everything that counts, at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(super) owners: Vec<(Pfn, Owner)>,
    pub(super) mapped: BTreeMap<Pfn, Vec<Mapped>>,
    pub(crate) parcels: BTreeMap<u32, Parcel>,
    vms: Vec<String>,
    pub(super) states: BTreeMap<Vmid, VmState>,
    pub(super) homes: BTreeMap<Vmid, Option<Home>>,
    extents: String,
    /// The first bytes of every frame.
    pub(crate) heads: BTreeMap<Pfn, u64>,
}

impl Snapshot {
    pub(crate) fn of(world: &World) -> Self {
        let machine = &world.hyp.machine;
        let frames = machine.banks().iter().map(|bank| bank.frames).chain([machine.device()]);
        let frames: Vec<Pfn> = frames.flat_map(|frames| frames.iter()).collect();
        let head = |pfn: Pfn| {
            let mut buf = [0; 8];
            // Memory that is broken reads as what nobody stores.
            machine.read(pfn.pa(), &mut buf).map_or(u64::MAX, |()| u64::from_le_bytes(buf))
        };
        let mut parcels = world.rm.parcels.clone();
        for parcel in parcels.values_mut() {
            // A wish for zeroes stays, even of an accept that was refused.
            parcel.sanitize_reclaim = false;
        }
        let vms = world.rm.vms.iter().map(|(vmid, vm)| {
            let kept = (vm.owner, vm.home, &vm.ranges, vm.nr_parcels, &vm.accepted);
            format!("{vmid:?} {kept:?}")
        });
        let vmmio: Vec<_> = world.hyp.aspaces.values().map(|space| &space.vmmio).collect();
        Self {
            owners: frames.iter().map(|&pfn| (pfn, world.hyp.memdb.owner(pfn))).collect(),
            mapped: mapped(&world.hyp),
            parcels,
            vms: vms.collect(),
            states: world.rm.vms.iter().map(|(&vmid, vm)| (vmid, vm.state)).collect(),
            homes: world.rm.vms.iter().map(|(&vmid, vm)| (vmid, vm.home)).collect(),
            extents: format!("{:?} {vmmio:?}", world.hyp.extents),
            heads: frames.iter().map(|&pfn| (pfn, head(pfn))).collect(),
        }
    }

    /// What is not as it was, bytes aside.
    pub(crate) fn difference(&self, after: &Self) -> Option<String> {
        let owner = self.owners.iter().zip(&after.owners).find(|(was, is)| was != is);
        if let Some(moved) = owner {
            return Some(format!("owners changed: {moved:?}"));
        }
        if self.mapped != after.mapped {
            return Some("mappings changed".into());
        }
        if self.parcels != after.parcels {
            return Some("parcels changed".into());
        }
        let vm = self.vms.iter().zip(&after.vms).find(|(was, is)| was != is);
        if self.vms.len() != after.vms.len() || vm.is_some() {
            return Some(format!("VMs changed: {vm:?}"));
        }
        (self.extents != after.extents).then(|| "extents changed".into())
    }

    /// What is not as it was of parcels, of VMs, and of all frames but some.
    pub(super) fn difference_outside(&self, after: &Self, frames: &PfnRange) -> Option<String> {
        let owners = self.owners.iter().zip(&after.owners);
        let moved = { owners }.find(|(was, is)| !frames.contains(was.0) && was != is);
        if let Some(moved) = moved {
            return Some(format!("owners elsewhere changed: {moved:?}"));
        }
        let outside = |mapped: &BTreeMap<Pfn, Vec<Mapped>>| {
            let mut mapped = mapped.clone();
            mapped.retain(|&pfn, _| !frames.contains(pfn));
            mapped
        };
        if outside(&self.mapped) != outside(&after.mapped) {
            return Some("mappings elsewhere changed".into());
        }
        let same = self.parcels == after.parcels && self.vms == after.vms;
        (!same).then(|| "parcels or VMs changed".into())
    }
}

/// Frames of a parcel.
pub(super) fn frames(parcel: &Parcel) -> impl Iterator<Item = Pfn> {
    parcel
        .regions
        .iter()
        .flat_map(|region| (0..region.nr).map(|nth| Pfn::new(region.pfn.get() + nth)))
}

/// What happened to bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Zeroed {
    /// Nothing, as far as anybody asked.
    None,
    /// These, and no others.
    Exactly(Vec<Pfn>),
    /// Some of any, on the way to a refusal.
    Some,
    /// One was stored to.
    Stored(Pfn, u64),
}

/// Whether the bytes are what they should be now.
pub(super) fn bytes_are_right(
    before: &Snapshot,
    after: &Snapshot,
    zeroed: &Zeroed,
) -> Option<String> {
    for (pfn, &was) in &before.heads {
        let is = after.heads[pfn];
        let fits = match zeroed {
            Zeroed::None => is == was,
            Zeroed::Exactly(frames) if frames.contains(pfn) => is == 0,
            Zeroed::Exactly(_) => is == was,
            Zeroed::Some => is == was || is == 0,
            Zeroed::Stored(at, value) if at == pfn => is == *value,
            Zeroed::Stored(..) => is == was,
        };
        if !fits {
            return Some(format!("{pfn:?} was {was:#x} and is {is:#x}, {zeroed:?}"));
        }
    }
    None
}

/// The frame behind a VM's address, if it may store there or load.
pub(super) fn behind(world: &World, vmid: Vmid, at: crate::addr::Ipa) -> Option<Pa> {
    let home = world.rm.vms.get(&vmid)?.home?;
    let (pfn, _) = world.hyp.aspaces.get(&home.aspace)?.tree.translate(at.gfn())?;
    Some(pfn.pa())
}
