//! Who has a frame and where extents want it mapped, told in the plainest way: frame by frame, apart from the
//! radix tree, the records in pieces and the page tables that say the same.
//!
//! In builds with debug assertions every operation makes its step here as well and is compared at its end, in
//! machines small enough for that. In other builds there is nothing here.

#[cfg(debug_assertions)]
use std::collections::{BTreeMap, BTreeSet};

use super::aspace::AspaceId;
use super::attrs::{Access, MapAttrs};
use super::machine::Machine;
use super::memdb::{ExtentId, Owner};
use crate::addr::Gfn;
#[cfg(debug_assertions)]
use crate::addr::Pfn;
use crate::range::PfnRange;

/// Larger machines are not told frame by frame.
#[cfg(debug_assertions)]
const MOST_FRAMES: u64 = 1 << 10;

/// One frame at one address, as an extent wants it.
#[cfg(debug_assertions)]
type Claim = (ExtentId, AspaceId, Pfn, Gfn);

/// How often an extent wants the same, and with what rights. Once it was twice, which rights is not known.
#[cfg(debug_assertions)]
type Wanted = (u32, Option<MapAttrs>);

#[cfg(debug_assertions)]
#[derive(Debug, Default)]
pub(crate) struct Spec {
    owners: BTreeMap<Pfn, Owner>,
    claims: BTreeMap<Claim, Wanted>,
    /// Addresses that more than one frame was wanted at. Which one is there depends on what came last.
    contested: BTreeSet<(AspaceId, Gfn)>,
}

#[cfg(debug_assertions)]
impl Spec {
    pub(crate) fn of(machine: &Machine) -> Self {
        let banks = machine.banks().iter().map(|bank| bank.frames);
        let nr: u64 = banks.clone().map(|frames| frames.nr_pages()).sum();
        if nr.saturating_add(machine.device().nr_pages()) > MOST_FRAMES {
            return Self::default();
        }
        let memory = banks.flat_map(|frames| frames.iter()).map(|pfn| (pfn, Owner::Partition));
        let device = machine.device().iter().map(|pfn| (pfn, Owner::Nobody));
        Self { owners: memory.chain(device).collect(), ..Self::default() }
    }

    fn frames(&self, frames: PfnRange) -> Vec<Pfn> {
        self.owners.range(frames.start()..frames.end()).map(|(&pfn, _)| pfn).collect()
    }

    pub(crate) fn own(&mut self, frames: PfnRange, to: Owner) {
        for (_, owner) in self.owners.range_mut(frames.start()..frames.end()) {
            *owner = to;
        }
    }

    fn add(&mut self, claim: Claim, attrs: MapAttrs) {
        let wanted = self.claims.entry(claim).or_insert((0, Some(attrs)));
        wanted.0 += 1;
        if wanted.0 > 1 {
            wanted.1 = None;
        }
    }

    pub(crate) fn claim(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        frames: PfnRange,
        gfn: Gfn,
        attrs: MapAttrs,
    ) {
        for pfn in self.frames(frames) {
            let at = Gfn::new(gfn.get() + (pfn.get() - frames.start().get()));
            self.add((id, aspace, pfn, at), attrs);
        }
    }

    pub(crate) fn unclaim(&mut self, id: ExtentId, aspace: AspaceId, frames: PfnRange, gfn: Gfn) {
        for pfn in self.frames(frames) {
            let at = Gfn::new(gfn.get() + (pfn.get() - frames.start().get()));
            let claim = (id, aspace, pfn, at);
            if let Some(wanted) = self.claims.get_mut(&claim) {
                wanted.0 -= 1;
            }
        }
        self.claims.retain(|_, wanted| wanted.0 > 0);
    }

    pub(crate) fn derive(
        &mut self,
        id: ExtentId,
        from: ExtentId,
        frames: PfnRange,
        access: Access,
    ) {
        let of_parent = self
            .claims
            .iter()
            .filter(|((owner, _, pfn, _), _)| *owner == from && frames.contains(*pfn));
        let inherited: Vec<_> = of_parent.map(|(&claim, &wanted)| (claim, wanted)).collect();
        for ((_, aspace, pfn, gfn), (nr, attrs)) in inherited {
            let masked = attrs.map(|attrs| attrs.masked(access));
            self.claims.insert((id, aspace, pfn, gfn), (nr, masked));
        }
    }

    pub(crate) fn unclaim_all(&mut self, id: ExtentId) {
        self.claims.retain(|(owner, ..), _| *owner != id);
    }

    pub(crate) fn forget_extent(&mut self, id: ExtentId) {
        self.unclaim_all(id);
    }

    pub(crate) fn forget_aspace(&mut self, id: AspaceId) {
        self.claims.retain(|(_, aspace, ..), _| *aspace != id);
        self.contested.retain(|(aspace, _)| *aspace != id);
    }
}

#[cfg(debug_assertions)]
mod compare {
    use super::super::aspace::{Aspace, entry};
    use super::super::hyp::Hyp;
    use super::*;
    use crate::stage2::{Entry, Level, Pte};

    /// Every page that is mapped: the frame, and the descriptor.
    fn mapped(hyp: &Hyp) -> BTreeMap<(AspaceId, Gfn), (Pfn, Pte)> {
        let mut found = BTreeMap::new();
        for (&id, aspace) in &hyp.aspaces {
            aspace.tree.visit(|gfn, level, pte| {
                let Entry::Leaf(leaf) = pte.decode(level) else { return };
                for nth in 0..Aspace::SHAPE.pages_at(level) {
                    let at = (id, Gfn::new(gfn.get() + nth));
                    let pfn = Pfn::new(leaf.pfn.get() + nth);
                    found.insert(at, (pfn, pte));
                }
            });
        }
        found
    }

    /// What extents record, frame by frame.
    fn recorded(hyp: &Hyp, spec: &Spec) -> BTreeMap<Claim, Wanted> {
        let mut told = Spec::default();
        for (&id, extent) in &hyp.extents {
            for slot in extent.slots() {
                for (frames, gfn, attrs) in slot.records.iter() {
                    for pfn in spec.frames(frames) {
                        let at = Gfn::new(gfn.get() + (pfn.get() - frames.start().get()));
                        told.add((id, slot.aspace, pfn, at), attrs);
                    }
                }
            }
        }
        told.claims
    }

    impl Spec {
        /// What is not as it should be.
        pub(crate) fn difference(&mut self, hyp: &Hyp) -> Option<String> {
            if self.owners.is_empty() {
                return None;
            }
            for (&pfn, &owner) in &self.owners {
                let found = hyp.memdb.owner(pfn);
                if found != owner {
                    return Some(format!("{pfn:?} is {found:?}'s, and should be {owner:?}'s"));
                }
            }
            let recorded = recorded(hyp, self);
            if recorded.len() != self.claims.len() {
                let (nr, wanted) = (recorded.len(), self.claims.len());
                return Some(format!("{nr} pages are recorded, and should be {wanted}"));
            }
            for (claim, wanted) in &self.claims {
                let found = recorded.get(claim).copied();
                let fits = found.is_some_and(|found| {
                    found.0 == wanted.0 && (wanted.1.is_none() || found.1 == wanted.1)
                });
                if !fits {
                    return Some(format!("{claim:?} is recorded as {found:?}, and is {wanted:?}"));
                }
            }
            self.pages_differ(hyp)
        }

        fn pages_differ(&mut self, hyp: &Hyp) -> Option<String> {
            let mut live: BTreeMap<(AspaceId, Gfn), Vec<(Pfn, Wanted)>> = BTreeMap::new();
            for (&(id, aspace, pfn, gfn), &wanted) in &self.claims {
                if self.owners.get(&pfn) == Some(&Owner::Extent(id)) {
                    live.entry((aspace, gfn)).or_default().push((pfn, wanted));
                }
            }
            let wanted_at: BTreeSet<_> =
                self.claims.keys().map(|&(_, aspace, _, gfn)| (aspace, gfn)).collect();
            self.contested.retain(|at| wanted_at.contains(at));
            let several = live.iter().filter(|(_, all)| all.len() > 1 || all[0].1.0 > 1);
            self.contested.extend(several.map(|(&at, _)| at));
            let mapped = mapped(hyp);
            for (at, &(pfn, pte)) in &mapped {
                let fits = live.get(at).into_iter().flatten().any(|&(wanted, (_, attrs))| {
                    let alike = |attrs| {
                        entry(Level::PAGE, pfn, attrs).is_ok_and(|wanted| wanted.is_like(pte))
                    };
                    wanted == pfn && attrs.is_none_or(alike)
                });
                if !fits {
                    return Some(format!("{at:?} maps {pfn:?}, {pte:?}: {:?}", live.get(at)));
                }
            }
            let missing =
                live.keys().find(|at| !mapped.contains_key(at) && !self.contested.contains(at));
            missing.map(|at| format!("{at:?} is not mapped, and should be: {:?}", live.get(at)))
        }
    }
}

/// Nothing, at no cost.
#[cfg(not(debug_assertions))]
#[derive(Debug, Default)]
pub(crate) struct Spec;

#[cfg(not(debug_assertions))]
impl Spec {
    pub(crate) fn of(_: &Machine) -> Self {
        Self
    }
    pub(crate) fn own(&mut self, _: PfnRange, _: Owner) {}
    pub(crate) fn claim(&mut self, _: ExtentId, _: AspaceId, _: PfnRange, _: Gfn, _: MapAttrs) {}
    pub(crate) fn unclaim(&mut self, _: ExtentId, _: AspaceId, _: PfnRange, _: Gfn) {}
    pub(crate) fn derive(&mut self, _: ExtentId, _: ExtentId, _: PfnRange, _: Access) {}
    pub(crate) fn unclaim_all(&mut self, _: ExtentId) {}
    pub(crate) fn forget_extent(&mut self, _: ExtentId) {}
    pub(crate) fn forget_aspace(&mut self, _: AspaceId) {}
}
