//! Owners, extents, and what is mapped.

use std::collections::BTreeSet;

use super::super::memdb::Owner;
use super::View;
use crate::addr::{Gfn, Pfn};

pub(super) fn owners_have_what_is_theirs(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for pfn in view.frames().iter().flat_map(|frames| frames.iter()) {
        let owner = view.hyp.memdb.owner(pfn);
        let fits = match owner {
            Owner::Partition | Owner::Nobody => true,
            Owner::Allocator | Owner::Trace => false,
            Owner::Extent(id) => {
                view.hyp.extents.get(&id).is_some_and(|extent| extent.frames.contains(pfn))
            }
        };
        if !fits {
            wrong.push(format!("{pfn:?} is {owner:?}'s"));
        }
    }
    if !view.hyp.memdb.is_all(view.hyp.machine.heap(), Owner::Allocator) {
        wrong.push("the heap is not the hypervisor's".into());
    }
    wrong
}

pub(super) fn mappings_follow_owners(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&pfn, mapped) in &view.mapped {
        for page in mapped {
            let recorded = view.hyp.records(page.aspace, page.gfn, pfn);
            if recorded.is_none() {
                wrong.push(format!("{page:?} maps {pfn:?}, which its owner does not record"));
            }
        }
    }
    // The other way round for VMs' own spaces: in those no two frames are wanted at one address.
    let spaces: BTreeSet<_> =
        view.rm.vms.values().filter_map(|vm| vm.home).map(|home| home.aspace).collect();
    for (&id, extent) in &view.hyp.extents {
        for slot in extent.slots().filter(|slot| spaces.contains(&slot.aspace)) {
            for (frames, gfn, _) in slot.records.iter() {
                for piece in view.hyp.memdb.walk(frames, Owner::Extent(id)) {
                    for pfn in piece.iter() {
                        let at = Gfn::new(gfn.get() + pfn.get() - frames.start().get());
                        let is_there =
                            |page: &super::Mapped| (page.aspace, page.gfn) == (slot.aspace, at);
                        if !view.of(pfn).iter().any(is_there) {
                            wrong.push(format!("{pfn:?} is not at {at:?} of {:?}", slot.aspace));
                        }
                    }
                }
            }
        }
    }
    wrong
}

pub(super) fn rights_are_the_extents(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&pfn, mapped) in &view.mapped {
        for page in mapped {
            let recorded = view.hyp.records(page.aspace, page.gfn, pfn);
            if recorded.is_some_and(|attrs| !attrs.access().covers(page.access)) {
                wrong.push(format!("{page:?} has more than {recorded:?}"));
            }
        }
    }
    for (id, extent) in &view.hyp.extents {
        for (frames, _, attrs) in extent.slots().flat_map(|slot| slot.records.iter()) {
            if !extent.access.covers(attrs.access()) || !extent.frames.covers(&frames) {
                wrong.push(format!("{id:?} records {frames:?} {attrs:?}"));
            }
        }
    }
    wrong
}

pub(super) fn children_are_within(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&id, extent) in &view.hyp.extents {
        let Some(parent) = extent.parent else { continue };
        let fits = view.hyp.extents.get(&parent).is_some_and(|parent| {
            parent.frames.covers(&extent.frames)
                && parent.access.covers(extent.access)
                && parent.children.contains(&id)
        });
        if !fits {
            wrong.push(format!("{id:?} is not within its parent {parent:?}"));
        }
    }
    for (id, extent) in &view.hyp.extents {
        let gone = extent
            .slots()
            .find(|slot| slot.records.is_empty() || !view.hyp.aspaces.contains_key(&slot.aspace));
        if let Some(slot) = gone {
            wrong.push(format!("{id:?} keeps a place for {:?}", slot.aspace));
        }
    }
    wrong
}

pub(super) fn tables_are_sound(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut used: Vec<Pfn> = view.hyp.heap.unused().collect();
    for (id, aspace) in &view.hyp.aspaces {
        wrong.extend(aspace.tree.check().into_iter().map(|told| format!("{id:?}: {told}")));
        used.extend(aspace.tree.table_frames());
    }
    used.sort();
    if !used.iter().copied().eq(view.hyp.machine.heap().iter()) {
        wrong.push("tables and what is free are not all of the heap, each frame once".into());
    }
    wrong
}

pub(super) fn nothing_impossible(view: &View<'_>) -> Vec<String> {
    match view.hyp.nr_incidents {
        0 => Vec::new(),
        nr => vec![format!("{nr} times")],
    }
}
