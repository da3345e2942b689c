//! Who owns a frame: the same answer from records, tables and annotations.

use super::super::State;
use super::super::host_mmu::{HostMmu, Owner};
use super::View;
use crate::addr::Pfn;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Level, PageState, Prot};

const fn owns(state: State) -> bool {
    matches!(state, State::Owned | State::SharedOwned)
}

/// 1: the host, EL2, the secure world, or one page of one guest.
pub(super) fn a_frame_has_one_owner(view: &View<'_>) -> Vec<String> {
    let count = |pfn: Pfn| {
        let page = view.host.page(pfn);
        let guests = view.mappings_of(pfn).iter().filter(|mapping| owns(mapping.state)).count();
        let secure = usize::from(view.ffa.owns(pfn));
        guests + secure + usize::from(owns(page.host())) + usize::from(owns(page.hyp()))
    };
    let wrong = view.frames().filter(|&pfn| count(pfn) != 1);
    wrong
        .filter(|&pfn| count(pfn) != 0 || !view.is_orphan(pfn))
        .map(|pfn| format!("{pfn:?} has {} owners", count(pfn)))
        .collect()
}

/// 1b. Transitions to guests rely on it: they never look at EL2's state.
pub(super) fn states_go_together(view: &View<'_>) -> Vec<String> {
    let legal = |host, hyp| {
        matches!(
            (host, hyp),
            (State::SharedOwned, State::SharedBorrowed | State::NoPage)
                | (State::Owned | State::SharedBorrowed, State::NoPage)
                | (State::NoPage, State::Owned | State::NoPage)
        )
    };
    let touched = view.host.pages.touched();
    let wrong = touched.filter(|(_, page)| !legal(page.host(), page.hyp()));
    wrong.map(|(pfn, page)| format!("{pfn:?} is {:?} and {:?}", page.host(), page.hyp())).collect()
}

/// 2 and 3.
pub(super) fn annotations_tell(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for pfn in view.frames() {
        let page = view.host.page(pfn);
        let owner = view.annotated.get(&pfn);
        let fits = match (page.host(), owner) {
            (State::NoPage, Some(Owner::Hyp)) => page.hyp() == State::Owned,
            (State::NoPage, Some(Owner::Guest(_))) => page.hyp() == State::NoPage,
            (State::NoPage, Some(Owner::Ffa)) => page.hyp() == State::NoPage && view.ffa.owns(pfn),
            (State::NoPage, None) => false,
            (_, owner) => owner.is_none(),
        };
        if !fits {
            wrong.push(format!("{pfn:?} is {:?} and annotated {owner:?}", page.host()));
        }
    }
    wrong
}

/// 4.
pub(super) fn the_host_reaches_its_own(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for &(gfn, nr, leaf) in &view.leaves {
        let memory = view.host.machine().is_memory(leaf.pfn);
        let prot = if memory { Prot::RWX } else { Prot::RW };
        if leaf.pfn.get() != gfn.get() || leaf.prot != prot || leaf.state != PageState::Owned {
            wrong.push(format!("the host has {leaf:?} at {gfn:?}"));
        }
        for pfn in (leaf.pfn.get()..leaf.pfn.get() + nr).map(Pfn::new) {
            // Beyond memory there are no records, and nothing to look at.
            if pfn >= view.host.machine().end() {
                break;
            }
            if view.host.page(pfn).host() == State::NoPage {
                wrong.push(format!("the host reaches {pfn:?}, which it has not"));
            }
        }
    }
    wrong
}

/// 5.
pub(super) fn annotations_and_leaves_agree(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&pfn, owner) in &view.annotated {
        let Owner::Guest(page) = *owner else { continue };
        let has = |mapping: &&super::Mapping| {
            mapping.guest == page && mapping.state == State::Owned && mapping.protected
        };
        if view.mappings_of(pfn).iter().filter(has).count() != 1 && !view.is_orphan(pfn) {
            wrong.push(format!("{pfn:?} is said to be at {page:?}, and is not"));
        }
    }
    for (pfn, mappings) in &view.mappings {
        for mapping in mappings.iter().filter(|mapping| mapping.state == State::Owned) {
            let owner = Owner::Guest(mapping.guest);
            if view.annotated.get(pfn) != Some(&owner) {
                wrong.push(format!("{pfn:?} is at {:?}, and not said to be", mapping.guest));
            }
        }
    }
    wrong
}

/// 6.
pub(super) fn borrowed_is_shown_once(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for pfn in view.frames() {
        let shown = |mapping: &&super::Mapping| mapping.state == State::SharedOwned;
        let showing: Vec<_> = view.mappings_of(pfn).iter().filter(shown).collect();
        let borrowed = view.host.page(pfn).host() == State::SharedBorrowed;
        let fits = match (borrowed, &showing[..]) {
            (true, [one]) => one.protected,
            (true, []) => view.is_orphan(pfn),
            (false, []) => true,
            _ => false,
        };
        if !fits {
            wrong.push(format!("{pfn:?} is shown by {showing:?}, and borrowed: {borrowed}"));
        }
    }
    wrong
}

/// 7.
pub(super) fn pins_are_of_shown_pages(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (pfn, page) in view.host.pages.touched() {
        let shown = page.hyp() == State::SharedBorrowed;
        if shown && (page.host() != State::SharedOwned || page.nr_guests > 0) {
            wrong.push(format!("{pfn:?} is shown to EL2, and {page:?}"));
        }
        if page.nr_pins > 0 && !shown && !view.profile.is_android() {
            wrong.push(format!("{pfn:?} is pinned, and {page:?}"));
        }
        let maps = page.hyp() == State::Owned || shown && page.nr_pins > 0;
        if maps != view.hyp.maps(pfn) {
            wrong.push(format!("EL2 maps {pfn:?}: {}, and it is {page:?}", !maps));
        }
    }
    let strange = view.hyp.mapped().filter(|&pfn| view.host.page(pfn).hyp() == State::NoPage);
    wrong.extend(strange.map(|pfn| format!("EL2 maps {pfn:?}, which is not shown to it")));
    wrong
}

/// 8.
pub(super) fn shares_are_counted(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for pfn in view.frames() {
        let page = view.host.page(pfn);
        let borrowed = |mapping: &&super::Mapping| mapping.state == State::SharedBorrowed;
        let nr = view.mappings_of(pfn).iter().filter(borrowed).count();
        // Shares that a VM took with it are never given back.
        let kept = match page.nr_orphaned {
            u8::MAX => usize::MAX,
            nr => usize::from(nr),
        };
        let nr_guests = page.nr_guests as usize;
        if nr_guests != nr && !(nr..=nr.saturating_add(kept)).contains(&nr_guests) {
            wrong.push(format!("{pfn:?} is shown to {nr_guests} pages, and {nr} map it"));
        }
        let shown = page.host() == State::SharedOwned;
        if nr_guests > 0 && !(shown && page.hyp() == State::NoPage) {
            wrong.push(format!("{pfn:?} is shown to guests, and {page:?}"));
        }
        let secure = shown && page.hyp() == State::NoPage && nr_guests == 0;
        if secure != view.ffa.sees(pfn) {
            wrong.push(format!("{pfn:?}: held by the secure world: {}, {page:?}", !secure));
        }
    }
    wrong
}

/// 9. Guests that are not protected may map a frame as often as they like.
pub(super) fn protected_frames_are_mapped_once(view: &View<'_>) -> Vec<String> {
    let of_protected = view.mappings.iter().filter(|(_, mappings)| {
        mappings.iter().any(|mapping| mapping.protected) && mappings.len() > 1
    });
    of_protected.map(|(pfn, mappings)| format!("{pfn:?} is mapped by {mappings:?}")).collect()
}

/// 10 and 13.
pub(super) fn leaves_fit_their_guest(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for mapping in view.mappings.values().flatten() {
        let block = mapping.level == Level::BLOCK_2M;
        let sized = block || mapping.level == Level::PAGE;
        let fits = match mapping.protected {
            true => {
                owns(mapping.state)
                    && mapping.leaf.prot == Prot::RWX
                    && (!block
                        || view.profile.donates(HUGE_PAGES)
                            && (mapping.state == State::Owned || view.profile.is_android()))
            }
            false => mapping.state == State::SharedBorrowed,
        };
        if !fits || !sized {
            wrong.push(format!("{mapping:?}"));
        }
    }
    wrong
}

/// 11.
pub(super) fn blocks_are_one_thing(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (&pfn, mappings) in &view.mappings {
        for mapping in mappings.iter().filter(|mapping| mapping.level != Level::PAGE) {
            let base = mapping.leaf.pfn;
            let alike = (pfn.get() ^ mapping.guest.gfn.get()) % HUGE_PAGES == 0;
            let state = view.host.page(pfn).host();
            if !alike || base.get() % HUGE_PAGES != 0 || state != view.host.page(base).host() {
                wrong.push(format!("{pfn:?} in {mapping:?} is {state:?}"));
            }
        }
    }
    if view.profile.annotates_blocks() {
        // Where a guest has a block, the host's table has one too: sizes agree.
        for (&pfn, mappings) in &view.mappings {
            for mapping in mappings.iter().filter(|mapping| mapping.protected) {
                let here = view.host.tree.get(crate::addr::Gfn::new(pfn.get()));
                let same = here.is_ok_and(|(level, _)| level == mapping.level);
                if mapping.state == State::Owned && !same {
                    wrong.push(format!("{mapping:?}, and the host's table has {here:?}"));
                }
            }
        }
    }
    wrong
}

/// 12.
pub(super) fn only_memory_changes_hands(view: &View<'_>) -> Vec<String> {
    let strange = view.frames().filter(|&pfn| view.host.machine().check_allowed(pfn, 1).is_err());
    let told = strange.map(|pfn| format!("{pfn:?} is no memory, and {:?}", view.host.page(pfn)));
    let beyond = view.frames().filter(|&pfn| pfn >= HostMmu::LIMIT);
    told.chain(beyond.map(|pfn| format!("{pfn:?} is nowhere"))).collect()
}
