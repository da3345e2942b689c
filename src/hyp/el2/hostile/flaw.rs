//! Mistakes that EL2 can be made to seem to make, to see that somebody notices.

use std::collections::BTreeMap;

use super::super::El2;
use super::super::State;
use super::super::invariants::trace::{Kind, Snapshot};

/// A mistake of EL2's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// The host's translations are remembered whatever becomes of its tables.
    StaleHostTranslations,
    /// And those of guests.
    StaleGuestTranslations,
    /// Pages of guests come back to the host as they were.
    NothingIsCleared,
    /// What is refused is counted all the same.
    RefusalsLeaveMarks,
    /// A page that a guest was given is still the host's in its record.
    GiftsAreForgotten,
    /// Bytes that a guest has for itself change while others work.
    PrivateBytesChange,
}

impl Flaw {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::StaleHostTranslations,
        Self::StaleGuestTranslations,
        Self::NothingIsCleared,
        Self::RefusalsLeaveMarks,
        Self::GiftsAreForgotten,
        Self::PrivateBytesChange,
    ];
}

/// Lines of TLBs.
type Words = Vec<[u64; 64]>;

/// What was remembered before a step.
#[derive(Debug)]
pub(crate) struct Remembered {
    host: Words,
    guests: BTreeMap<u16, Words>,
}

impl Flaw {
    pub(crate) fn remember(self, el2: &El2) -> Remembered {
        let vms = el2.vms.lock();
        let guests = vms.live().map(|entry| (entry.vm.handle, entry.vm.mmu.lock().tlbs.words()));
        Remembered { guests: guests.collect(), host: el2.host.lock().tlbs.words() }
    }

    /// Leaves EL2 as if it had made the mistake in the step before.
    pub(crate) fn spoil(self, el2: &El2, before: &Snapshot, was: Remembered, kind: Kind) {
        match self {
            Self::StaleHostTranslations => el2.host.lock().tlbs.recall(&was.host),
            Self::StaleGuestTranslations => {
                for entry in el2.vms.lock().live() {
                    if let Some(tlbs) = was.guests.get(&entry.vm.handle) {
                        entry.vm.mmu.lock().tlbs.recall(tlbs);
                    }
                }
            }
            Self::NothingIsCleared => {
                for (pfn, bytes) in before.private_heads(el2) {
                    if el2.host.lock().page(pfn).host() == State::Owned {
                        el2.machine.write(pfn.pa(), bytes).ok();
                    }
                }
            }
            Self::RefusalsLeaveMarks => {
                let first = before.private_heads(el2).next();
                if let (Kind::Refused, Some((pfn, _))) = (kind, first) {
                    el2.host.lock().pages.update(pfn, |page| page.nr_pins += 1);
                }
            }
            Self::GiftsAreForgotten => {
                let first = Snapshot::of_heads(el2).private_heads(el2).map(|(pfn, _)| pfn).next();
                if let Some(pfn) = first {
                    el2.host.lock().pages.update(pfn, |page| page.set_host(State::Owned));
                }
            }
            Self::PrivateBytesChange => {
                let first = before.private_heads(el2).next();
                // Those that are refused may change no byte anyway.
                if let (Kind::Done, Some((pfn, _))) = (kind, first) {
                    el2.machine.write(pfn.pa(), b"changed").ok();
                }
            }
        }
    }
}
