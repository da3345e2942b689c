//! An operation: what it may change. Callers look before and after.

use std::collections::BTreeMap;

use super::super::hyp_page::HypPage;
use super::super::{El2, State};
use super::*;
#[cfg(test)]
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
    /// How many bytes of each frame.
    stride: usize,
}

/// So many bytes of a frame tell most: whether it was cleared, and what is written to its beginning.
const HEAD: usize = 16;

fn entries(tree: &crate::stage2::Tree) -> Entries {
    let mut all = Entries::new();
    tree.visit(|gfn, level, pte| {
        all.insert((gfn, level), pte);
    });
    all
}

impl Snapshot {
    #[cfg(test)]
    pub(crate) fn of(el2: &El2) -> Self {
        Self::with_stride(el2, 4096)
    }

    /// The same with the beginning of each frame alone.
    pub(crate) fn of_heads(el2: &El2) -> Self {
        Self::with_stride(el2, HEAD)
    }

    fn with_stride(el2: &El2, stride: usize) -> Self {
        let vms = el2.vms.lock();
        let host = el2.host.lock();
        let guests = vms.live().map(|entry| (entry.vm.handle, entries(&entry.vm.mmu.lock().tree)));
        let mut bytes = Vec::new();
        for region in el2.machine.regions().iter().filter(|region| region.bytes.is_some()) {
            for pfn in region.frames.iter() {
                let at = bytes.len();
                bytes.resize(at + stride, 0);
                // Memory that is gone has no bytes to keep.
                el2.machine.read(pfn.pa(), &mut bytes[at..]).ok();
            }
        }
        let annotations = entries(&host.tree).into_iter().filter(|(_, pte)| !pte.is_valid());
        Self {
            pages: host.pages.touched().collect(),
            host: annotations.collect(),
            guests: guests.collect(),
            bytes,
            stride,
        }
    }

    /// 14: an operation that failed has changed nothing. Access flags are not what is meant.
    pub(crate) fn difference(&self, after: &Self) -> Option<String> {
        let bytes = || (self.bytes != after.bytes).then(|| "bytes changed".to_owned());
        self.states_difference(after).or_else(bytes)
    }

    /// The same for an operation that clears what it was given before it can fail.
    pub(crate) fn states_difference(&self, after: &Self) -> Option<String> {
        let frames = self.frames_changed(after);
        if !frames.is_empty() {
            return Some(format!("records of {frames:?} changed"));
        }
        if self.host != after.host {
            return Some("the host's annotations changed".to_owned());
        }
        (self.guests != after.guests).then(|| "guests' tables changed".to_owned())
    }

    #[cfg(test)]
    pub(crate) fn nothing_changed(&self, after: &Self) {
        assert_eq!(self.difference(after), None);
    }

    /// 17: frames whose record differs, but for those that went into a vCPU's memcache on the way.
    #[cfg(test)]
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
    pub(crate) fn missing_edge(&self, after: &Self) -> Option<String> {
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
            ) || matches!(edge, ((Owned, NoPage), (Owned, NoPage)))
                // Devices come and go, where that is counted.
                && old.nr_guests == new.nr_guests;
            if !exists {
                return Some(format!("{pfn:?} went from {old:?} to {new:?}"));
            }
        }
        None
    }

    #[cfg(test)]
    pub(crate) fn edges_exist(&self, after: &Self) {
        assert_eq!(self.missing_edge(after), None);
    }

    fn page(&self, pfn: Pfn) -> HypPage {
        self.pages.get(&pfn).copied().unwrap_or_default()
    }

    /// A guest's alone, or nobody's any more.
    fn is_private(&self, pfn: Pfn) -> bool {
        let page = self.page(pfn);
        (page.host(), page.hyp()) == (State::NoPage, State::NoPage)
    }

    pub(crate) fn is_reached_by_host(&self, pfn: Pfn) -> bool {
        self.page(pfn).host() != State::NoPage
    }

    /// Frames that have bytes, and the bytes.
    fn heads<'a>(&'a self, el2: &'a El2) -> impl Iterator<Item = (Pfn, &'a [u8])> {
        let regions = el2.machine.regions().iter().filter(|region| region.bytes.is_some());
        regions.flat_map(|region| region.frames.iter()).zip(self.bytes.chunks(self.stride))
    }

    /// The same of frames that guests have to themselves.
    pub(crate) fn private_heads<'a>(
        &'a self,
        el2: &'a El2,
    ) -> impl Iterator<Item = (Pfn, &'a [u8])> {
        self.heads(el2).filter(|&(pfn, _)| self.is_private(pfn))
    }

    /// 22: what was a guest's alone and is the host's again, is zeroes.
    pub(crate) fn not_cleared(&self, after: &Self, el2: &El2, but: Option<Pfn>) -> Option<String> {
        let back = |pfn| self.is_private(pfn) && after.page(pfn).host() == State::Owned;
        let mut heads = after.heads(el2).filter(|&(pfn, _)| back(pfn) && Some(pfn) != but);
        let (pfn, _) = heads.find(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))?;
        Some(format!("{pfn:?} came back with what was in it"))
    }

    /// 24: what guests have to themselves has not changed, unless they changed it.
    pub(crate) fn private_bytes_changed(&self, after: &Self, el2: &El2) -> Option<String> {
        let both =
            self.private_heads(el2).zip(after.heads(el2).filter(|&(pfn, _)| self.is_private(pfn)));
        let mut kept = both.filter(|((pfn, _), _)| after.is_private(*pfn));
        let ((pfn, _), _) = kept.find(|((_, old), (_, new))| old != new)?;
        Some(format!("{pfn:?} is a guest's alone, and changed"))
    }

    #[cfg(test)]
    pub(crate) fn private_bytes_kept(&self, after: &Self, el2: &El2) {
        assert_eq!(self.private_bytes_changed(after, el2), None);
    }
}

/// The bytes of one frame, whoever has it.
#[cfg(test)]
pub(crate) fn frame_bytes(el2: &El2, pfn: Pfn) -> Vec<u8> {
    let mut page = vec![0; 4096];
    el2.machine.read(Pa::new(pfn.pa().get()), &mut page).unwrap();
    page
}
