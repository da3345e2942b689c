//! Who owns a frame and who may see it, told in the plainest way, and apart from the tables and records that
//! say the same in pKVM's.
//!
//! In builds with debug assertions every transition makes its step here as well, and what it touched is
//! compared at once. Without them there is nothing here, and all comparisons agree.

#[cfg(debug_assertions)]
use std::collections::HashMap;

use super::GuestPage;
use crate::addr::Pfn;

/// A frame, in words.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) enum SpecPage {
    /// The host's alone.
    #[default]
    Host,
    /// EL2's.
    Hyp,
    /// The host's, shown to EL2.
    HostAndHyp,
    /// The host's, shown to the secure world.
    HostAndFfa,
    /// The secure world's.
    Ffa,
    #[cfg(debug_assertions)]
    /// The host's, in non-protected guests, once for each time that it is mapped.
    HostAndGuests(Vec<GuestPage>),
    /// A protected guest's alone.
    Guest(GuestPage),
    /// A protected guest's, shown to the host.
    GuestAndHost(GuestPage),
}

/// All frames that are not simply the host's.
#[cfg(debug_assertions)]
#[derive(Debug, Default)]
pub(crate) struct Spec {
    pages: HashMap<Pfn, SpecPage>,
}

#[cfg(debug_assertions)]
impl Spec {
    pub(crate) fn get(&self, pfn: Pfn) -> SpecPage {
        self.pages.get(&pfn).cloned().unwrap_or_default()
    }

    /// A step, which must be one of those that exist.
    pub(crate) fn step(&mut self, pfn: Pfn, to: SpecPage) {
        use SpecPage::{Ffa, Guest, GuestAndHost, Host, HostAndFfa, HostAndHyp, Hyp};
        let from = self.get(pfn);
        let exists = match (&from, &to) {
            (Host, Hyp | HostAndHyp | HostAndFfa | Ffa | Guest(_)) => true,
            (Hyp | HostAndHyp | HostAndFfa | Ffa | Guest(_) | GuestAndHost(_), Host) => true,
            (Guest(a), GuestAndHost(b)) | (GuestAndHost(a), Guest(b)) => a == b,
            _ => false,
        };
        assert!(exists, "{pfn:?} went from {from:?} to {to:?}");
        match to {
            Host => self.pages.remove(&pfn),
            _ => self.pages.insert(pfn, to),
        };
    }

    /// The host shows a page of its own to a guest, perhaps not the first.
    pub(crate) fn lend(&mut self, pfn: Pfn, to: GuestPage) {
        let mut guests = self.borrowers(pfn);
        guests.push(to);
        self.pages.insert(pfn, SpecPage::HostAndGuests(guests));
    }

    /// And hides it again.
    pub(crate) fn unlend(&mut self, pfn: Pfn, from: GuestPage) {
        let mut guests = self.borrowers(pfn);
        let nr = guests.len();
        if let Some(at) = guests.iter().position(|&guest| guest == from) {
            guests.swap_remove(at);
        }
        assert!(guests.len() < nr, "{pfn:?} is not lent to {from:?}");
        match guests.is_empty() {
            true => self.pages.remove(&pfn),
            false => self.pages.insert(pfn, SpecPage::HostAndGuests(guests)),
        };
    }

    fn borrowers(&mut self, pfn: Pfn) -> Vec<GuestPage> {
        let page = self.pages.remove(&pfn).unwrap_or_default();
        assert!(
            matches!(page, SpecPage::Host | SpecPage::HostAndGuests(_)),
            "{pfn:?} is {page:?}, and lent"
        );
        match page {
            SpecPage::HostAndGuests(guests) => guests,
            _ => Vec::new(),
        }
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = (Pfn, &SpecPage)> {
        self.pages.iter().map(|(&pfn, page)| (pfn, page))
    }
}

/// Nothing, at no cost.
#[cfg(not(debug_assertions))]
#[derive(Debug, Default)]
pub(crate) struct Spec;

#[cfg(not(debug_assertions))]
impl Spec {
    pub(crate) fn step(&mut self, _: Pfn, _: SpecPage) {}
    pub(crate) fn lend(&mut self, _: Pfn, _: GuestPage) {}
    pub(crate) fn unlend(&mut self, _: Pfn, _: GuestPage) {}
}
