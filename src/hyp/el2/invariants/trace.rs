//! An operation: what it may change. Callers look before and after.

use std::collections::{BTreeMap, BTreeSet};

use super::super::hyp_page::HypPage;
use super::super::{El2, State};
use super::*;
#[cfg(test)]
use crate::addr::Pa;
use crate::stage2::Pte;

/// What was done, as far as it matters to what may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Done,
    /// Nothing may have changed.
    Refused,
    /// Nothing but bytes: pages for EL2 itself are cleared when they come and when they go.
    RefusedAfterClearing,
    /// Refused, or a vCPU's list was emptied first.
    RefusedAfterRefill,
    /// More than one operation.
    Many,
    /// One operation about a list.
    Listed,
    /// The guest gave a page up as it was.
    GivenUpAsItWas,
    GuestStored,
    DeviceStored,
    /// The host reached the frame as it was.
    HostReached(Pfn),
    /// The host's kernel reached it after it had destroyed what was there.
    HostDestroyed(Pfn),
}

/// An operation, and everything before and after it.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) before: &'a Snapshot,
    pub(crate) after: &'a Snapshot,
    pub(crate) el2: &'a El2,
    pub(crate) kind: Kind,
}

type StepRule = fn(Step<'_>) -> Option<String>;

/// The rules about single operations.
pub(crate) const STEP_RULES: &[(&str, StepRule)] = &[
    ("14 what is refused changes nothing", refused_changes_nothing),
    ("17 nothing else changes", only_one_run_changes),
    ("18 only steps that exist are taken", only_edges_are_taken),
    (
        "22, 23 what comes back to the host is cleared before it can look",
        what_comes_back_is_cleared,
    ),
    ("24 what a guest has to itself stays", what_is_private_stays),
    ("25 what is given keeps what is in it", what_is_given_is_kept),
    ("26 what is destroyed stays so", what_is_destroyed_stays_so),
    (
        "38 the host reaches what it has; its own pointer destroys what it has not",
        the_host_reaches_its_own,
    ),
];

fn refused_changes_nothing(step: Step<'_>) -> Option<String> {
    match step.kind {
        Kind::Refused => step.before.difference(step.after),
        Kind::RefusedAfterClearing => step.before.states_difference(step.after),
        Kind::RefusedAfterRefill => step.before.more_than_refilled(step.after, step.el2),
        _ => None,
    }
}

fn only_one_run_changes(step: Step<'_>) -> Option<String> {
    match step.kind {
        Kind::Many | Kind::Listed => None,
        _ => step.before.scattered(step.after),
    }
}

fn only_edges_are_taken(step: Step<'_>) -> Option<String> {
    match step.kind {
        Kind::Many => None,
        _ => step.before.missing_edge(step.after),
    }
}

fn what_comes_back_is_cleared(step: Step<'_>) -> Option<String> {
    let spared = match step.kind {
        // What the host has stored since.
        Kind::HostDestroyed(pfn) => Some(pfn),
        Kind::GivenUpAsItWas => return None,
        _ => None,
    };
    step.before.not_cleared(step.after, step.el2, spared)
}

fn what_is_private_stays(step: Step<'_>) -> Option<String> {
    match step.kind {
        // The one is its own, the other the incident that only an IOMMU prevents.
        Kind::GuestStored | Kind::DeviceStored => None,
        _ => step.before.private_bytes_changed(step.after, step.el2),
    }
}

fn what_is_given_is_kept(step: Step<'_>) -> Option<String> {
    step.before.gift_changed(step.after, step.el2)
}

fn what_is_destroyed_stays_so(step: Step<'_>) -> Option<String> {
    match step.kind {
        // A new VM may have the handle of one that is gone.
        Kind::Many => None,
        _ => step.before.unpoisoned(step.after),
    }
}

fn the_host_reaches_its_own(step: Step<'_>) -> Option<String> {
    match step.kind {
        Kind::HostReached(pfn) if !step.before.is_reached_by_host(pfn) => {
            Some(format!("it reached {pfn:?}, which it had not"))
        }
        Kind::HostDestroyed(pfn) if step.before.is_reached_by_host(pfn) => {
            Some(format!("it destroyed {pfn:?}, which it could reach"))
        }
        _ => None,
    }
}

impl Step<'_> {
    /// What is wrong, if something is, with the name of the rule.
    pub(crate) fn wrong(self) -> Option<String> {
        let told = STEP_RULES.iter().find_map(|(name, rule)| Some((name, rule(self)?)));
        told.map(|(name, wrong)| format!("{name}: {wrong}"))
            .or_else(|| self.el2.check().into_iter().next())
    }
}

/// Entries of a tree.
type Entries = BTreeMap<(Gfn, Level), Pte>;

/// Everything that an operation could change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pages: BTreeMap<Pfn, HypPage>,
    /// Annotations only: what the host maps lazily is nobody's business.
    host: Entries,
    guests: BTreeMap<u16, Entries>,
    /// What the secure world owns.
    secure: BTreeSet<Pfn>,
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
        let ffa = el2.ffa.lock();
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
        let touched = host.pages.touched().map(|(pfn, _)| pfn);
        let annotations = entries(&host.tree).into_iter().filter(|(_, pte)| !pte.is_valid());
        Self {
            pages: host.pages.touched().collect(),
            host: annotations.collect(),
            guests: guests.collect(),
            secure: touched.filter(|&pfn| ffa.owns(pfn)).collect(),
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
    fn missing_edge(&self, after: &Self) -> Option<String> {
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
        (page.host(), page.hyp()) == (State::NoPage, State::NoPage) && !self.secure.contains(&pfn)
    }

    fn is_reached_by_host(&self, pfn: Pfn) -> bool {
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

    /// 22, 23: what was a guest's alone and is the host's again, is zeroes.
    fn not_cleared(&self, after: &Self, el2: &El2, but: Option<Pfn>) -> Option<String> {
        let back = |pfn| self.is_private(pfn) && after.page(pfn).host() == State::Owned;
        let mut heads = after.heads(el2).filter(|&(pfn, _)| back(pfn) && Some(pfn) != but);
        let (pfn, _) = heads.find(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))?;
        Some(format!("{pfn:?} came back with what was in it"))
    }

    /// 24: what guests have to themselves has not changed, unless they changed it.
    fn private_bytes_changed(&self, after: &Self, el2: &El2) -> Option<String> {
        let both =
            self.private_heads(el2).zip(after.heads(el2).filter(|&(pfn, _)| self.is_private(pfn)));
        let mut kept = both.filter(|((pfn, _), _)| after.is_private(*pfn));
        let ((pfn, _), _) = kept.find(|((_, old), (_, new))| old != new)?;
        Some(format!("{pfn:?} is a guest's alone, and changed"))
    }

    /// 14, for an operation that may have emptied a vCPU's list first: nothing but that.
    fn more_than_refilled(&self, after: &Self, el2: &El2) -> Option<String> {
        let frames = self.frames_changed(after);
        let is_taken = |pfn: &Pfn| {
            let (old, new) = (self.page(*pfn), after.page(*pfn));
            (old.host(), old.hyp(), new.hyp()) == (State::Owned, State::NoPage, State::Owned)
        };
        if let Some(pfn) = frames.iter().find(|pfn| !is_taken(pfn)) {
            return Some(format!("{pfn:?} changed"));
        }
        let others = |of: &Self| -> Entries {
            let is_other = |at: &(Gfn, Level)| !frames.contains(&Pfn::new(at.0.get()));
            of.host.iter().filter(|(at, _)| is_other(at)).map(|(&at, &pte)| (at, pte)).collect()
        };
        if self.guests != after.guests || others(self) != others(after) {
            return Some("tables changed".to_owned());
        }
        let mut both = self.heads(el2).zip(after.heads(el2));
        let changed = both.find(|((pfn, old), (_, new))| old != new && !frames.contains(pfn));
        changed.map(|((pfn, _), _)| format!("bytes of {pfn:?} changed"))
    }

    /// 25: what the host gave to a guest is as it was.
    fn gift_changed(&self, after: &Self, el2: &El2) -> Option<String> {
        let given = |pfn| {
            let is_new = self.page(pfn).host() == State::Owned && after.is_private(pfn);
            is_new && !el2.has_firmware(pfn)
        };
        let both = self.heads(el2).zip(after.heads(el2));
        let mut given = both.filter(|((pfn, _), _)| given(*pfn));
        let ((pfn, _), _) = given.find(|((_, old), (_, new))| old != new)?;
        Some(format!("{pfn:?} was given, and changed"))
    }

    /// 26: as long as the guest lives, what was destroyed stays so.
    fn unpoisoned(&self, after: &Self) -> Option<String> {
        for (handle, entries) in &self.guests {
            let Some(now) = after.guests.get(handle) else { continue };
            let mut marks = entries.iter().filter(|(_, pte)| !pte.is_valid());
            if let Some((at, _)) = marks.find(|&(at, pte)| now.get(at) != Some(pte)) {
                return Some(format!(
                    "what was destroyed at {at:?} of {handle:#x} is not any more"
                ));
            }
        }
        None
    }

    /// 17: one operation is about one run of frames; beside it are pages that EL2 takes or gives back, and its pins.
    fn scattered(&self, after: &Self) -> Option<String> {
        let is_el2s = |pfn| {
            let (old, new) = (self.page(pfn).hyp(), after.page(pfn).hyp());
            old == State::Owned || new == State::Owned || old == new && old != State::NoPage
        };
        let mut frames = self.frames_changed(after);
        frames.retain(|&pfn| !is_el2s(pfn));
        let (first, last) = (frames.first()?.get(), frames.last()?.get());
        (last - first >= frames.len() as u64).then(|| format!("{frames:?} changed at once"))
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
