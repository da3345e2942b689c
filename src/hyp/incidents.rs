//! What went wrong because of a host that does as it likes, and what did not because it was asked to stop.

use crate::stage2::Prevented;
use crate::sync::Mutex;

/// Times when a real host would have crashed, hung or lost memory, and times when an object refused what might have
/// come to that. All are counted since the hypervisor was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IncidentStat {
    /// The kernel touched what is not the host's by a pointer that nobody expects to fail, and could not have it.
    pub nr_oopses: u64,
    /// Guests' pages that were destroyed because the kernel touched them.
    pub nr_destroyed: u64,
    /// The kernel waits for a page that nobody will ever give back.
    pub nr_stuck: u64,
    /// Pages that VMs have kept which are gone.
    pub nr_orphaned: u64,
    /// A device reached what a guest has to itself.
    pub nr_dma_into_private: u64,
    /// Accesses that objects refused because the memory was private.
    pub nr_accesses_prevented: u64,
    /// Pins that objects refused because the memory was private.
    pub nr_pins_prevented: u64,
    /// Conversions, hole punches and moves that objects refused because the memory was pinned.
    pub nr_conversions_prevented: u64,
}

impl IncidentStat {
    pub(super) fn with_prevented(self, prevented: &PreventedCounts) -> Self {
        let [nr_accesses_prevented, nr_pins_prevented, nr_conversions_prevented] =
            *prevented.0.lock();
        Self { nr_accesses_prevented, nr_pins_prevented, nr_conversions_prevented, ..self }
    }
}

/// Accesses, pins and conversions, in this order.
#[derive(Debug)]
pub(super) struct PreventedCounts(Mutex<[u64; 3]>);

impl Default for PreventedCounts {
    fn default() -> Self {
        Self(Mutex::new([0; 3]))
    }
}

impl PreventedCounts {
    pub(super) fn note(&self, what: Prevented) {
        let [accesses, pins, conversions] = &mut *self.0.lock();
        let count = match what {
            Prevented::Access => accesses,
            Prevented::Pin => pins,
            Prevented::Conversion => conversions,
        };
        *count = count.saturating_add(1);
    }
}
