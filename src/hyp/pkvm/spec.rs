//! What the page states ought to be, told again in the plainest way: one owner for each frame.
//!
//! In builds with debug assertions every transition is also made here, on a map, and the tables are
//! compared with the map afterwards. A difference is a bug of this crate, and stops it. Without debug
//! assertions there is no map.

#[cfg(debug_assertions)]
use std::collections::HashMap;

use super::page::GuestOwner;
#[cfg(debug_assertions)]
use crate::addr::Pfn;

/// The owner of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpecPage {
    /// The host; nobody else sees it.
    Host,
    /// A guest; nobody else sees it.
    Guest(GuestOwner),
    /// A guest, and the host sees it.
    SharedByGuest(GuestOwner),
    /// Host and guest disagree, or the frame is in no state that a transition leaves behind.
    #[cfg(debug_assertions)]
    Illegal,
}

/// The map: frames that are not simply the host's.
#[cfg(debug_assertions)]
#[derive(Debug, Default)]
pub(super) struct Spec {
    pages: HashMap<Pfn, SpecPage>,
}

#[cfg(debug_assertions)]
impl Spec {
    /// Makes the step, if it is one that the state table has.
    pub(super) fn step(&mut self, pfn: Pfn, to: SpecPage) {
        use SpecPage::{Guest, Host, SharedByGuest};
        let from = self.get(pfn);
        let legal = match (from, to) {
            (Host, Guest(_)) | (Guest(_) | SharedByGuest(_), Host) => true,
            (Guest(a), SharedByGuest(b)) | (SharedByGuest(a), Guest(b)) => a == b,
            _ => false,
        };
        assert!(legal, "{pfn:?} went from {from:?} to {to:?}");
        match to {
            Host => self.pages.remove(&pfn),
            _ => self.pages.insert(pfn, to),
        };
    }

    pub(super) fn get(&self, pfn: Pfn) -> SpecPage {
        self.pages.get(&pfn).copied().unwrap_or(SpecPage::Host)
    }

    pub(super) fn taken(&self) -> impl Iterator<Item = (Pfn, SpecPage)> {
        self.pages.iter().map(|(&pfn, &page)| (pfn, page))
    }
}
