//! What must hold, by name. Each rule is a function that says what it found wrong.
//!
//! | file | rules about |
//! |---|---|
//! | `memory` | owners, extents, and what is mapped |
//! | `paging` | memory that the host provides on demand |
//! | `parcels` | parcels, those who have them, and VMs |
//!
//! The numbers are those of the list that all simulators of this kind share. Rules about single operations are
//! checked around them, by tests and by `hostile`.

mod memory;
mod paging;
mod parcels;

use std::collections::BTreeMap;

use super::World;
use super::aspace::{Aspace, AspaceId};
use super::attrs::Access;
use super::host::kernel::Kernel;
use super::hyp::Hyp;
use super::rm::Rm;
use crate::addr::{Gfn, Pfn};
use crate::stage2::Entry;

/// A page that an address space maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) aspace: AspaceId,
    pub(super) gfn: Gfn,
    pub(super) access: Access,
}

/// Everything, standing still.
pub(super) struct View<'a> {
    hyp: &'a Hyp,
    rm: &'a Rm,
    kernel: &'a Kernel,
    /// Who maps a frame.
    pub(super) mapped: BTreeMap<Pfn, Vec<Mapped>>,
}

type Rule = fn(&View<'_>) -> Vec<String>;

/// The rules that hold whenever nothing is under way.
pub(super) const RULES: &[(&str, Rule)] = &[
    ("41 a frame has one owner, and is in its range", memory::owners_have_what_is_theirs),
    ("42 what is mapped, its owner records", memory::mappings_follow_owners),
    ("42b rights are no more than the extent's", memory::rights_are_the_extents),
    ("43 children are within their parents", memory::children_are_within),
    ("tables are sound, and of the heap", memory::tables_are_sound),
    ("nothing failed that cannot", memory::nothing_impossible),
    ("44 the owner has what it shares, and no more", parcels::owners_see_what_they_share),
    ("45 who has accepted has it, and nobody else", parcels::members_have_what_they_accepted),
    ("45b those who have accepted are counted", parcels::members_are_counted),
    ("a parcel has its regions", parcels::parcels_have_their_regions),
    ("48 what is in no parcel is one VM's", parcels::the_rest_is_one_vms),
    ("52 what is lent, nobody of the host's has", paging::the_host_has_nothing_lent),
    (
        "52b what is paged, its VM has, and the host what is shared",
        paging::paged_memory_is_where_it_should_be,
    ),
    ("49 VMs know what they have accepted", parcels::vms_know_their_parcels),
];

impl World {
    /// Everything that is wrong, with the name of the rule.
    pub(super) fn check(&self) -> Vec<String> {
        let view =
            View { hyp: &self.hyp, rm: &self.rm, kernel: &self.kernel, mapped: mapped(&self.hyp) };
        let told = RULES.iter().flat_map(|(name, rule)| {
            rule(&view).into_iter().map(move |wrong| format!("{name}: {wrong}"))
        });
        told.collect()
    }
}

/// Who maps each frame.
pub(super) fn mapped(hyp: &Hyp) -> BTreeMap<Pfn, Vec<Mapped>> {
    let mut mapped: BTreeMap<Pfn, Vec<Mapped>> = BTreeMap::new();
    for (&id, aspace) in &hyp.aspaces {
        aspace.tree.visit(|gfn, level, pte| {
            let Entry::Leaf(leaf) = pte.decode(level) else { return };
            for nth in 0..Aspace::SHAPE.pages_at(level) {
                let page = Mapped {
                    aspace: id,
                    gfn: Gfn::new(gfn.get() + nth),
                    access: Access::from(leaf.prot),
                };
                mapped.entry(Pfn::new(leaf.pfn.get() + nth)).or_default().push(page);
            }
        });
    }
    mapped
}

impl View<'_> {
    fn of(&self, pfn: Pfn) -> &[Mapped] {
        self.mapped.get(&pfn).map_or(&[], |mapped| &mapped[..])
    }

    /// What can be owned, as ranges.
    fn frames(&self) -> Vec<crate::range::PfnRange> {
        let machine = &self.hyp.machine;
        machine.banks().iter().map(|bank| bank.frames).chain([machine.device()]).collect()
    }
}
