//! An operation: what it may change. Callers look before and after.

use std::collections::BTreeMap;

use super::super::hyp_page::HypPage;
use super::super::{El2, State};
use super::*;
use crate::addr::Pa;
use crate::stage2::Pte;

/// Entries of a tree.
type Entries = BTreeMap<(Gfn, Level), Pte>;

/// Everything that an operation could change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pages: BTreeMap<Pfn, HypPage>,
    /// Annotations only: what the host maps lazily is nobody's business.
    host: Entries,
    guests: BTreeMap<u16, Entries>,
    bytes: Vec<u8>,
}

fn entries(tree: &crate::stage2::Tree) -> Entries {
    let mut all = Entries::new();
    tree.visit(|gfn, level, pte| {
        all.insert((gfn, level), pte);
    });
    all
}

impl Snapshot {
    pub(crate) fn of(el2: &El2) -> Self {
        let vms = el2.vms.lock();
        let host = el2.host.lock();
        let guests = vms.live().map(|entry| (entry.vm.handle, entries(&entry.vm.mmu.lock().tree)));
        let mut bytes = Vec::new();
        for region in el2.machine.regions().iter().filter(|region| region.bytes.is_some()) {
            for pfn in region.frames.iter() {
                let mut page = [0; 4096];
                el2.machine.read(pfn.pa(), &mut page).unwrap();
                bytes.extend_from_slice(&page);
            }
        }
        let annotations = entries(&host.tree).into_iter().filter(|(_, pte)| !pte.is_valid());
        Self {
            pages: host.pages.touched().collect(),
            host: annotations.collect(),
            guests: guests.collect(),
            bytes,
        }
    }

    /// 14: an operation that failed has changed nothing. Access flags are not what is meant.
    pub(crate) fn nothing_changed(&self, after: &Self) {
        self.states_kept(after);
        assert!(self.bytes == after.bytes, "bytes");
    }

    /// The same for an operation that clears what it was given before it can fail.
    pub(crate) fn states_kept(&self, after: &Self) {
        assert_eq!(self.pages, after.pages, "records");
        assert_eq!(self.host, after.host, "the host's annotations");
        assert_eq!(self.guests, after.guests, "guests' tables");
    }

    /// 17: frames whose record differs, but for those that went into a vCPU's memcache on the way.
    pub(crate) fn frames_touched(&self, after: &Self) -> Vec<Pfn> {
        let mut frames = self.frames_changed(after);
        frames.retain(|pfn| after.pages.get(pfn).is_none_or(|page| page.hyp() != State::Owned));
        frames
    }

    fn frames_changed(&self, after: &Self) -> Vec<Pfn> {
        let mut frames: Vec<_> = self.pages.keys().chain(after.pages.keys()).copied().collect();
        frames.sort_unstable();
        frames.dedup();
        frames.retain(|pfn| self.pages.get(pfn) != after.pages.get(pfn));
        frames
    }

    /// 18: no frame goes from the host's to a guest's and back, or from guest to guest, but along the edges.
    pub(crate) fn edges_exist(&self, after: &Self) {
        use State::{NoPage, Owned, SharedBorrowed, SharedOwned};
        for pfn in self.frames_changed(after) {
            let state = |of: &Self| of.pages.get(&pfn).copied().unwrap_or_default();
            let (old, new) = (state(self), state(after));
            let edge = ((old.host(), old.hyp()), (new.host(), new.hyp()));
            let exists = matches!(
                edge,
                ((Owned, NoPage), (SharedOwned, SharedBorrowed | NoPage))
                    | ((SharedOwned, SharedBorrowed | NoPage), (Owned, NoPage))
                    | ((Owned, NoPage), (NoPage, NoPage | Owned))
                    | ((NoPage, NoPage | Owned), (Owned, NoPage))
                    | ((NoPage, NoPage), (SharedBorrowed, NoPage))
                    | ((SharedBorrowed, NoPage), (NoPage | Owned, NoPage))
                    // More or fewer guests or pins, in the same state.
                    | ((SharedOwned, SharedBorrowed), (SharedOwned, SharedBorrowed))
                    | ((SharedOwned, NoPage), (SharedOwned, NoPage))
            );
            assert!(exists, "{pfn:?} went from {old:?} to {new:?}");
        }
    }

    /// 24: what guests have to themselves has not changed, unless they changed it.
    pub(crate) fn private_bytes_kept(&self, after: &Self, el2: &El2) {
        let regions = el2.machine.regions().iter().filter(|region| region.bytes.is_some());
        let frames = regions.flat_map(|region| region.frames.iter());
        for (pfn, at) in frames.zip((0..).step_by(4096)) {
            let private = |of: &Self| {
                let page = of.pages.get(&pfn).copied().unwrap_or_default();
                (page.host(), page.hyp()) == (State::NoPage, State::NoPage)
            };
            if private(self) && private(after) {
                let kept = self.bytes[at..at + 4096] == after.bytes[at..at + 4096];
                assert!(kept, "{pfn:?} is a guest's alone, and changed");
            }
        }
    }
}

/// The bytes of one frame, whoever has it.
pub(crate) fn frame_bytes(el2: &El2, pfn: Pfn) -> Vec<u8> {
    let mut page = vec![0; 4096];
    el2.machine.read(Pa::new(pfn.pa().get()), &mut page).unwrap();
    page
}
