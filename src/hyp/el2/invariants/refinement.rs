//! The records and tables say what the specification says.

use super::View;

#[cfg(debug_assertions)]
mod compare {
    use super::super::super::host_mmu::{HostMmu, Owner};
    use super::super::super::spec::SpecPage;
    use super::super::super::{State, host_mmu};
    use crate::addr::Pfn;

    /// Whether a frame is what the specification says it is, as far as the host's side tells.
    pub(crate) fn frame_refines(host: &HostMmu, pfn: Pfn) -> Option<String> {
        let page = host.page(pfn);
        let owner = host.owner(pfn).ok().flatten();
        let wanted = host.spec.get(pfn);
        let guest_of = |owner: Option<host_mmu::Owner>| match owner {
            Some(Owner::Guest(guest)) => Some(guest),
            _ => None,
        };
        let (states, nr_guests) = ((page.host(), page.hyp()), page.nr_guests as usize);
        let fits = match &wanted {
            SpecPage::Host => states == (State::Owned, State::NoPage) && nr_guests == 0,
            SpecPage::Hyp => states == (State::NoPage, State::Owned) && owner == Some(Owner::Hyp),
            SpecPage::HostAndHyp => {
                states == (State::SharedOwned, State::SharedBorrowed) && nr_guests == 0
            }
            SpecPage::HostAndFfa => states == (State::SharedOwned, State::NoPage) && nr_guests == 0,
            SpecPage::HostAndGuests(guests) => {
                states == (State::SharedOwned, State::NoPage) && nr_guests == guests.len()
            }
            SpecPage::Ffa => states == (State::NoPage, State::NoPage) && owner == Some(Owner::Ffa),
            SpecPage::Guest(guest) => {
                states == (State::NoPage, State::NoPage) && guest_of(owner) == Some(*guest)
            }
            SpecPage::GuestAndHost(_) => {
                states == (State::SharedBorrowed, State::NoPage) && owner.is_none()
            }
        };
        (!fits).then(|| format!("{pfn:?} is {page:?}, {owner:?}, and should be {wanted:?}"))
    }

    /// The same for what guests map.
    pub(super) fn guests_refine(view: &super::View<'_>) -> Vec<String> {
        let mut wrong = Vec::new();
        for (&pfn, mappings) in &view.mappings {
            let wanted = view.host.spec.get(pfn);
            for mapping in mappings {
                let fits = match (&wanted, mapping.state) {
                    (SpecPage::Guest(guest), State::Owned)
                    | (SpecPage::GuestAndHost(guest), State::SharedOwned) => {
                        *guest == mapping.guest
                    }
                    (SpecPage::HostAndGuests(guests), State::SharedBorrowed) => {
                        guests.contains(&mapping.guest)
                    }
                    _ => false,
                };
                if !fits {
                    wrong.push(format!("{mapping:?} has {pfn:?}, which should be {wanted:?}"));
                }
            }
        }
        wrong
    }
}

#[cfg(debug_assertions)]
pub(crate) use compare::frame_refines;

#[cfg(debug_assertions)]
pub(super) fn all_refine(view: &View<'_>) -> Vec<String> {
    let specified = view.host.spec.pages().map(|(pfn, _)| pfn);
    let frames = view.frames().chain(specified);
    let mut wrong: Vec<_> = frames.filter_map(|pfn| frame_refines(view.host, pfn)).collect();
    wrong.extend(compare::guests_refine(view));
    wrong
}

/// There is no specification in this build.
#[cfg(not(debug_assertions))]
pub(super) fn all_refine(_: &View<'_>) -> Vec<String> {
    Vec::new()
}
