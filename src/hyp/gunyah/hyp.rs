//! The hypervisor's objects in one place, and how an operation that fails is taken back.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::aspace::{Aspace, AspaceId, BbmLevel, Heap, Undo};
use super::error::HypError;
use super::extent::Extent;
use super::machine::Machine;
use super::memdb::{ExtentId, Memdb, Owner};
use super::spec::Spec;

/// Memory, extents and address spaces. Whoever holds it alone may change it.
#[derive(Debug)]
pub(crate) struct Hyp {
    pub(super) machine: Arc<Machine>,
    pub(super) memdb: Memdb,
    pub(super) extents: BTreeMap<ExtentId, Extent>,
    pub(super) nr_extents_ever: u32,
    pub(super) aspaces: BTreeMap<AspaceId, Aspace>,
    nr_aspaces_ever: u32,
    pub(super) heap: Heap,
    bbm: BbmLevel,
    pub(super) spec: Spec,
    /// Frames that were cleared.
    pub(super) nr_zeroed: u64,
    /// Times that something which cannot fail did.
    pub(super) nr_incidents: u64,
}

impl Hyp {
    /// Everything is the partition's, but for the heap.
    ///
    /// # Errors
    /// `NotOwner` if the machine's parts overlap.
    pub(crate) fn boot(machine: Arc<Machine>, bbm: BbmLevel) -> Result<Self, HypError> {
        let mut memdb = Memdb::new();
        for bank in machine.banks() {
            memdb.insert(bank.frames, Owner::Partition)?;
        }
        memdb.insert(machine.heap(), Owner::Allocator)?;
        let heap = Heap::new(machine.heap().iter().rev().collect());
        let spec = Spec::of(&machine);
        Ok(Self {
            machine,
            memdb,
            extents: BTreeMap::new(),
            nr_extents_ever: 0,
            aspaces: BTreeMap::new(),
            nr_aspaces_ever: 0,
            heap,
            bbm,
            spec,
            nr_zeroed: 0,
            nr_incidents: 0,
        })
    }

    /// An empty address space.
    ///
    /// # Errors
    /// `NoMem`.
    pub(crate) fn create_aspace(&mut self) -> Result<AspaceId, HypError> {
        let id = AspaceId(self.nr_aspaces_ever);
        self.nr_aspaces_ever = self.nr_aspaces_ever.checked_add(1).ok_or(HypError::NoMem)?;
        let aspace = Aspace::new(self.bbm, &mut self.heap)?;
        self.aspaces.insert(id, aspace);
        Ok(id)
    }

    /// Gives an address space up. Extents that were mapped in it forget that.
    pub(crate) fn delete_aspace(&mut self, id: AspaceId) {
        if let Some(aspace) = self.aspaces.remove(&id) {
            aspace.destroy(&mut self.heap);
        }
        self.unslot(id);
        self.spec.forget_aspace(id);
        self.settle();
    }

    /// Takes changes back, the last first.
    pub(super) fn roll_back(&mut self, undo: Vec<Undo>) {
        for undo in undo.into_iter().rev() {
            let restored = match self.aspaces.get_mut(&undo.aspace) {
                Some(aspace) => aspace.restore(&mut self.heap, undo),
                None => Ok(()),
            };
            self.note(restored);
        }
    }

    /// For what cannot fail.
    pub(super) fn note<E>(&mut self, answer: Result<(), E>) {
        self.nr_incidents += u64::from(answer.is_err());
    }

    /// The end of an operation: compares with the specification, in builds that have one.
    #[cfg(debug_assertions)]
    pub(super) fn settle(&mut self) {
        let mut spec = std::mem::take(&mut self.spec);
        let wrong = spec.difference(self);
        self.spec = spec;
        assert!(wrong.is_none(), "the tables are not what was specified: {wrong:?}");
    }

    #[cfg(not(debug_assertions))]
    pub(super) fn settle(&mut self) {}
}
