//! What must hold, by name. Each rule is a function that says what it found wrong.
//!
//! | file | rules about |
//! |---|---|
//! | `ownership` | who owns a frame, in records, tables and annotations |
//! | `tables` | the trees themselves, and what is remembered of them |
//! | `life` | VMs, vCPUs, and what EL2 was given for them |
//! | `refinement` | the specification |
//! | `trace` | an operation: what it may change, for callers to check around it |
//! | `books` | what a host that means well keeps, for that host to ask |
//!
//! The numbers are those of the list that all simulators of this kind share.

mod books;
mod life;
mod ownership;
mod refinement;
mod tables;
#[cfg(any(test, feature = "oracle"))]
pub(crate) mod trace;

use std::collections::BTreeMap;

use super::guest_mmu::{GuestMmu, state_of};
use super::host_mmu::{HostMmu, Owner};
use super::hyp_space::HypSpace;
use super::incident::IncidentCounts;
use super::profile::Profile;
use super::transition::Ffa;
use super::vm::{Cpu, VmTable};
use super::{El2, GuestPage, Pages, State};
use crate::addr::{Gfn, Pfn};
use crate::stage2::{Entry, Leaf, Level};
use crate::sync::SpinGuard;

pub(crate) use books::{Books, HOST_RULES};
#[cfg(debug_assertions)]
pub(crate) use refinement::frame_refines;

/// A guest, locked.
struct GuestView<'a> {
    handle: u16,
    protected: bool,
    mmu: SpinGuard<'a, GuestMmu>,
}

/// A page that a guest maps.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    guest: GuestPage,
    protected: bool,
    level: Level,
    leaf: Leaf,
    state: State,
}

/// Everything, locked and standing still.
pub(crate) struct View<'a> {
    profile: Profile,
    carveout: Pages,
    host: &'a HostMmu,
    hyp: &'a HypSpace,
    ffa: &'a Ffa,
    vms: &'a VmTable,
    cpus: &'a [SpinGuard<'a, Cpu>],
    incidents: IncidentCounts,
    guests: &'a [GuestView<'a>],
    /// Guests' leaves, a page at a time, by frame.
    mappings: BTreeMap<Pfn, Vec<Mapping>>,
    /// Who has what the host has not, by the host's table.
    annotated: BTreeMap<Pfn, Owner>,
    /// The host's leaves: where, how many pages, and where they lead.
    leaves: Vec<(Gfn, u64, Leaf)>,
}

type Rule = fn(&View<'_>) -> Vec<String>;

/// The rules that hold whenever nothing is under way.
pub(crate) const RULES: &[(&str, Rule)] = &[
    ("1 a frame has one owner", ownership::a_frame_has_one_owner),
    ("1b the host's and EL2's states go together", ownership::states_go_together),
    ("2, 3 an annotation says who has what the host has not", ownership::annotations_tell),
    ("4 the host reaches what it may see, where it is", ownership::the_host_reaches_its_own),
    ("5 annotations and guests' leaves agree", ownership::annotations_and_leaves_agree),
    ("6 what the host borrows, one protected guest shows", ownership::borrowed_is_shown_once),
    ("7 pins are of pages shown to EL2, which maps them", ownership::pins_are_of_shown_pages),
    ("8 shares with guests are counted", ownership::shares_are_counted),
    ("9 protected guests map a frame once", ownership::protected_frames_are_mapped_once),
    ("10, 13 leaves are what their guest may have", ownership::leaves_fit_their_guest),
    ("11 blocks are aligned, and one thing", ownership::blocks_are_one_thing),
    ("12 only memory changes hands", ownership::only_memory_changes_hands),
    ("19 what is remembered is what the tables say", tables::no_translation_is_stale),
    ("33 tables count their entries, and are EL2's", tables::tables_are_sound),
    ("29 what EL2 owns, it owns for something", life::what_el2_owns_is_used),
    ("32 a vCPU is loaded once, and references count", life::vcpus_are_loaded_once),
    ("34 pins have their reasons", life::pins_have_reasons),
    ("the tables refine the specification", refinement::all_refine),
];

impl El2 {
    /// Everything that is wrong, with the name of the rule. Everybody waits meanwhile.
    pub(crate) fn check(&self) -> Vec<String> {
        self.view(|view| {
            let told = RULES.iter().flat_map(|(name, rule)| {
                rule(view).into_iter().map(move |wrong| format!("{name}: {wrong}"))
            });
            told.collect()
        })
    }

    /// The same for rules that are the host's to keep: those whose name begins with one of the numbers.
    pub(crate) fn check_books(&self, books: &Books, numbers: &[&str]) -> Vec<String> {
        let is_wanted = |name: &str| name.split(' ').next().is_some_and(|nr| numbers.contains(&nr));
        self.view(|view| {
            let rules = HOST_RULES.iter().filter(|(name, _)| is_wanted(name));
            let told = rules.flat_map(|(name, rule)| {
                rule(view, books).into_iter().map(move |wrong| format!("{name}: {wrong}"))
            });
            told.collect()
        })
    }

    fn view<T>(&self, look: impl FnOnce(&View<'_>) -> T) -> T {
        let cpus: Vec<_> = self.cpus.iter().map(|cpu| cpu.lock()).collect();
        let vms = self.vms.lock();
        let ffa = self.ffa.lock();
        let host = self.host.lock();
        let hyp = self.hyp.lock();
        let guests = vms.live().map(|entry| GuestView {
            handle: entry.vm.handle,
            protected: entry.vm.protected,
            mmu: entry.vm.mmu.lock(),
        });
        let guests: Vec<_> = guests.collect();
        let mut view = View {
            profile: self.profile,
            carveout: self.carveout,
            host: &host,
            hyp: &hyp,
            ffa: &ffa,
            vms: &vms,
            cpus: &cpus,
            incidents: self.incidents.counts(),
            guests: &guests,
            mappings: BTreeMap::new(),
            annotated: BTreeMap::new(),
            leaves: Vec::new(),
        };
        view.gather();
        look(&view)
    }

    /// Rule 31, which is the host's to keep: frames that VMs which are gone have kept.
    #[cfg(test)]
    pub(crate) fn orphans(&self) -> Vec<Pfn> {
        self.host.lock().pages.orphans().collect()
    }
}

impl View<'_> {
    fn gather(&mut self) {
        for guest in self.guests {
            let mappings = &mut self.mappings;
            guest.mmu.tree.visit(|gfn, level, pte| {
                let Entry::Leaf(leaf) = pte.decode(level) else { return };
                let pages = Pages::new(leaf.pfn, GuestMmu::SHAPE.pages_at(level));
                for (pfn, nth) in pages.iter().zip(0..) {
                    let guest_page = GuestPage { handle: guest.handle, gfn }.after(nth);
                    mappings.entry(pfn).or_default().push(Mapping {
                        guest: guest_page,
                        protected: guest.protected,
                        level,
                        leaf,
                        state: state_of(level, pte),
                    });
                }
            });
        }
        let (annotated, leaves, host) = (&mut self.annotated, &mut self.leaves, self.host);
        host.tree.visit(|gfn, level, pte| {
            let nr = HostMmu::SHAPE.pages_at(level);
            match pte.decode(level) {
                Entry::Leaf(leaf) => leaves.push((gfn, nr, leaf)),
                _ => {
                    for pfn in Pages::new(Pfn::new(gfn.get()), nr).iter() {
                        if let Ok(Some(owner)) = host.owner(pfn) {
                            annotated.insert(pfn, owner);
                        }
                    }
                }
            }
        });
    }

    fn mappings_of(&self, pfn: Pfn) -> &[Mapping] {
        self.mappings.get(&pfn).map_or(&[], |mappings| &mappings[..])
    }

    fn is_orphan(&self, pfn: Pfn) -> bool {
        self.host.page(pfn).nr_orphaned > 0
    }

    /// Frames that are not simply the host's, by any account.
    fn frames(&self) -> impl Iterator<Item = Pfn> {
        let touched = self.host.pages.touched().map(|(pfn, _)| pfn);
        touched.chain(self.mappings.keys().copied()).chain(self.annotated.keys().copied())
    }
}
