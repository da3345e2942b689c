//! What must hold between the host's record and the guests' tables whenever no transition is under
//! way. Each rule is a function that says what it found wrong.

use std::collections::HashMap;

use super::page::{GuestOwner, GuestPages, HostPage, HostPages, Life, VmHandle};
use super::{Host, Hypervisor};
use crate::addr::{Gfn, Pfn};
use crate::stage2::{Entry, Leaf, Level, PageState, Prot};

/// A mapping of a guest, copied out of its table.
#[derive(Clone, Copy)]
struct Mapping {
    owner: GuestOwner,
    level: Level,
    leaf: Leaf,
}

/// All guests' mappings by frame; a frame should have one.
type Mappings = HashMap<Pfn, Vec<Mapping>>;

impl Hypervisor {
    /// Everything that is wrong between the tables; empty if all is well. Transitions wait meanwhile.
    pub(crate) fn check_invariants(&self) -> Vec<String> {
        self.0.check_invariants()
    }
}

impl Host {
    fn check_invariants(&self) -> Vec<String> {
        let vms = self.vms.lock();
        let machines: Vec<_> = vms.iter().filter_map(|(_, vm)| vm.upgrade()).collect();
        // Whoever changes a guest's pages holds this lock, so all tables stand still. It is taken
        // before the other is let go: no machine is born and given a page in between.
        let host = self.pages.lock();
        drop(vms);
        let mut wrong = host.table.check();
        let mut mappings = Mappings::new();
        let mut handles = Vec::new();
        for vm in &machines {
            let state = vm.read();
            wrong.extend(state.pages.table.check());
            gather(&state.pages, &mut mappings);
            if state.pages.life != Life::Gone {
                handles.push(state.pages.handle);
            }
            wrong.extend(nothing_is_left_of_the_gone(&state.pages));
        }
        wrong.extend(leaves_are_what_a_protected_guest_has(&mappings));
        wrong.extend(a_frame_is_mapped_once(&mappings));
        wrong.extend(what_the_host_lacks_a_living_guest_has(&host, &mappings, &handles));
        wrong.extend(what_a_guest_has_the_host_knows(&host, &mappings));
        #[cfg(debug_assertions)]
        wrong.extend(the_tables_refine_the_specification(&host, &mappings));
        wrong
    }
}

fn gather(guest: &GuestPages, mappings: &mut Mappings) {
    for (gfn, level, entry) in guest.table.entries() {
        if let Entry::Leaf(leaf) = entry {
            let owner = guest.owner_of(gfn);
            mappings.entry(leaf.pfn).or_default().push(Mapping { owner, level, leaf });
        }
    }
}

/// No orphan after teardown: the table of a guest that is gone is empty.
fn nothing_is_left_of_the_gone(guest: &GuestPages) -> Option<String> {
    let (gfn, ..) = guest.table.next_entry(Gfn::new(0)).filter(|_| guest.life == Life::Gone)?;
    Some(format!("{:?} is gone and still maps {gfn:?}", guest.handle))
}

/// Legal states: pages of 4 KiB, all rights, and nothing borrowed.
fn leaves_are_what_a_protected_guest_has(mappings: &Mappings) -> Vec<String> {
    let legal = |mapping: &&Mapping| {
        mapping.level == Level::PAGE
            && mapping.leaf.prot == Prot::RWX
            && mapping.leaf.state != PageState::SharedBorrowed
    };
    let all = mappings.values().flatten();
    all.filter(|mapping| !legal(mapping))
        .map(|Mapping { owner, level, leaf }| format!("{owner:?} has {leaf:?} at {level:?}"))
        .collect()
}

/// Single owner: no two guest frames, of one guest or of two, lead to one frame.
fn a_frame_is_mapped_once(mappings: &Mappings) -> Vec<String> {
    let twice = mappings.iter().filter(|(_, owners)| owners.len() > 1);
    twice.map(|(pfn, owners)| format!("{pfn:?} is mapped {} times", owners.len())).collect()
}

/// A frame that the host has given away, or borrows, is mapped by the guest that the record names,
/// in the state that goes with it.
fn what_the_host_lacks_a_living_guest_has(
    host: &HostPages,
    mappings: &Mappings,
    handles: &[VmHandle],
) -> Vec<String> {
    let agrees = |pfn: &Pfn, page: &HostPage| {
        let mut mapped = mappings.get(pfn).into_iter().flatten();
        match page {
            HostPage::NoPage(owner) => {
                handles.contains(&owner.handle)
                    && mapped.any(|m| m.owner == *owner && m.leaf.state == PageState::Owned)
            }
            HostPage::SharedBorrowed => mapped.any(|m| m.leaf.state == PageState::SharedOwned),
            HostPage::Owned | HostPage::Unusable => false,
        }
    };
    host.taken()
        .filter(|(pfn, page)| !agrees(pfn, page))
        .map(|(pfn, page)| format!("the host has {pfn:?} as {page:?}, and no guest has it so"))
        .collect()
}

/// What a guest maps, the host has down as given or borrowed, to that guest at that place.
fn what_a_guest_has_the_host_knows(host: &HostPages, mappings: &Mappings) -> Vec<String> {
    let known = |mapping: &&Mapping| match (mapping.leaf.state, host.state(mapping.leaf.pfn)) {
        (PageState::Owned, HostPage::NoPage(owner)) => owner == mapping.owner,
        (PageState::SharedOwned, HostPage::SharedBorrowed) => true,
        _ => false,
    };
    let all = mappings.values().flatten();
    all.filter(|mapping| !known(mapping))
        .map(|Mapping { owner, leaf, .. }| {
            format!("{owner:?} maps {leaf:?}, which the host has as {:?}", host.state(leaf.pfn))
        })
        .collect()
}

/// The map of owners and the tables say the same of every frame that either knows.
#[cfg(debug_assertions)]
fn the_tables_refine_the_specification(host: &HostPages, mappings: &Mappings) -> Vec<String> {
    use super::spec::SpecPage;
    let view = |pfn: Pfn| {
        let mapping = mappings.get(&pfn).and_then(|all| all.first());
        match (host.state(pfn), mapping) {
            (HostPage::Owned, None) => SpecPage::Host,
            (HostPage::NoPage(owner), Some(_)) => SpecPage::Guest(owner),
            (HostPage::SharedBorrowed, Some(m)) => SpecPage::SharedByGuest(m.owner),
            _ => SpecPage::Illegal,
        }
    };
    let known = host.taken().map(|(pfn, _)| pfn).chain(mappings.keys().copied());
    known
        .chain(host.spec.taken().map(|(pfn, _)| pfn))
        .filter(|&pfn| view(pfn) != host.spec.get(pfn))
        .map(|pfn| format!("{pfn:?} is {:?}, and should be {:?}", view(pfn), host.spec.get(pfn)))
        .collect()
}
