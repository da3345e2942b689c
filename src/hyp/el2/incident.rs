//! Times when a real host would have crashed, hung, or lost memory.

use crate::sync::Mutex;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Incident {
    /// The kernel touched what is not the host's by a pointer that nobody expects to fail.
    Oops,
    /// The kernel waits for a page that nobody will ever give back.
    Stuck,
    /// A guest's page was destroyed because the kernel touched it.
    Destroyed,
    /// A VM went while the host had not asked all of its pages back.
    Orphaned,
    /// A device reached what is not the host's, and nothing stopped it.
    DmaIntoPrivate,
}

/// How often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IncidentCounts {
    pub(crate) nr_oopses: u64,
    pub(crate) nr_stuck: u64,
    pub(crate) nr_destroyed: u64,
    pub(crate) nr_orphaned: u64,
    pub(crate) nr_dma_into_private: u64,
}

/// The counts.
#[derive(Debug)]
pub(crate) struct Incidents(Mutex<IncidentCounts>);

impl Default for Incidents {
    fn default() -> Self {
        Self(Mutex::new(IncidentCounts::default()))
    }
}

impl Incidents {
    pub(crate) fn note(&self, incident: Incident) {
        let mut counts = self.0.lock();
        let count = match incident {
            Incident::Oops => &mut counts.nr_oopses,
            Incident::Stuck => &mut counts.nr_stuck,
            Incident::Destroyed => &mut counts.nr_destroyed,
            Incident::Orphaned => &mut counts.nr_orphaned,
            Incident::DmaIntoPrivate => &mut counts.nr_dma_into_private,
        };
        *count = count.saturating_add(1);
    }

    pub(crate) fn counts(&self) -> IncidentCounts {
        *self.0.lock()
    }
}
