//! Rules that are the host's to keep, or of whoever manages memory for it. EL2 lives with a host that breaks them;
//! one that means well asks now and then.

use std::collections::BTreeMap;

use super::super::incident::IncidentCounts;
use super::super::{GuestPage, State};
use super::View;
use crate::addr::Pfn;

/// What the host believes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books {
    /// What protected guests were given, the destroyed pages too.
    pub(crate) given: BTreeMap<GuestPage, Pfn>,
    /// How often it has pinned a frame so that it stays where it is; `None` for a host that keeps it there otherwise.
    pub(crate) pins: Option<BTreeMap<Pfn, u64>>,
    /// How many pages count as locked.
    pub(crate) nr_locked: Option<u64>,
    /// Frames that somebody of the host's may reach at any moment: pinned, mapped for longer, or handed out.
    pub(crate) borrowed: Vec<Pfn>,
}

pub(crate) type HostRule = fn(&View<'_>, &Books) -> Vec<String>;

/// The rules.
pub(crate) const HOST_RULES: &[(&str, HostRule)] = &[
    ("28 what a guest was given is in the books, pinned and locked", what_is_given_is_booked),
    ("31 a guest that is gone has nothing", nothing_is_left_with_the_dead),
    ("39 no kernel pointer and no device met what is a guest's", no_accident_happened),
    ("40 what is borrowed is the host's to see", borrowed_is_visible),
];

fn what_is_given_is_booked(view: &View<'_>, books: &Books) -> Vec<String> {
    let mut wrong = Vec::new();
    let has = |page: &GuestPage, pfn: Pfn| {
        view.mappings_of(pfn).iter().any(|mapping| mapping.guest == *page && mapping.protected)
    };
    for (page, &pfn) in &books.given {
        let guest = view.guests.iter().find(|guest| guest.handle == page.handle);
        let destroyed = guest.is_some_and(|guest| guest.mmu.state(page.gfn) == Ok(State::Poison));
        if !has(page, pfn) && !destroyed {
            wrong.push(format!("{page:?} was given {pfn:?}, and has it not"));
        }
    }
    for mapping in view.mappings.iter().flat_map(|(&pfn, all)| all.iter().map(move |m| (pfn, m))) {
        let (pfn, mapping) = mapping;
        if mapping.protected && books.given.get(&mapping.guest) != Some(&pfn) {
            wrong.push(format!("{:?} has {pfn:?}, and nobody knows", mapping.guest));
        }
    }
    if let Some(pins) = &books.pins {
        let mut wanted = BTreeMap::<Pfn, u64>::new();
        books.given.values().for_each(|&pfn| *wanted.entry(pfn).or_default() += 1);
        if *pins != wanted {
            wrong.push(format!("pins are {pins:?}, and should be {wanted:?}"));
        }
    }
    if let Some(nr) = books.nr_locked.filter(|&nr| nr != books.given.len() as u64) {
        wrong.push(format!("{nr} pages are locked, and {} were given", books.given.len()));
    }
    wrong
}

fn nothing_is_left_with_the_dead(view: &View<'_>, _: &Books) -> Vec<String> {
    view.host.pages.orphans().map(|pfn| format!("{pfn:?} is nobody's any more")).collect()
}

fn no_accident_happened(view: &View<'_>, _: &Books) -> Vec<String> {
    let IncidentCounts { nr_oopses, nr_stuck, nr_destroyed, nr_dma_into_private, .. } =
        view.incidents;
    match nr_oopses + nr_stuck + nr_destroyed + nr_dma_into_private {
        0 => Vec::new(),
        _ => vec![format!("{:?}", view.incidents)],
    }
}

fn borrowed_is_visible(view: &View<'_>, books: &Books) -> Vec<String> {
    let hidden = |pfn: &&Pfn| view.host.page(**pfn).host() == State::NoPage;
    let hidden = books.borrowed.iter().filter(hidden);
    hidden.map(|pfn| format!("{pfn:?} is borrowed, and not the host's to see")).collect()
}
