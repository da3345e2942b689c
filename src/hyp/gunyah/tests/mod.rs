//! A small machine, and everything that VMs, good or bad, do to it.

mod accept;
mod create;
mod donate;
mod firmware;
mod full;
mod hypercalls;
mod map;
mod messages;
mod order;
mod random;
mod release;
mod rules;
mod sanitize;
mod taint;
mod touch;
mod vmmio;
mod vms;

use std::sync::Arc;

use super::aspace::{AspaceId, BbmLevel};
use super::attrs::{Access, MapAttrs, MapType};
use super::cspace::{CapId, Cspace, Object, Rights};
use super::error::HypError;
use super::hyp::Hyp;
use super::hypercall::*;
use super::machine::{Bank, Machine};
use super::memdb::{ExtentId, Owner};
use crate::addr::{Gfn, Pa, Pfn};
use crate::backing::Arena;
use crate::range::PfnRange;

/// Memory with bytes: four blocks of 2 MiB.
const RAM: u64 = 0x2000;
const NR_RAM: u64 = 0x800;
const DEVICE: u64 = 0x9000;
const NR_DEVICE: u64 = 8;
const HEAP: u64 = 0x100;
const NR_HEAP: u64 = 0x80;

const PAGE: u64 = 4096;
const RWX: MapAttrs = MapAttrs::new(Access::RWX, MapType::CACHED);
const RW: MapAttrs = MapAttrs::new(Access::RW, MapType::CACHED);
const R: MapAttrs = MapAttrs::new(Access::R, MapType::CACHED);
/// An extent of any memory with all rights.
const BASIC: u64 = 7;
const SPARSE: u64 = 7 | 1 << 16;

fn range(start: u64, nr: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start), nr).unwrap()
}

fn machine(nr_heap: u64) -> Machine {
    machine_of(NR_RAM, nr_heap)
}

/// As much memory as the specification is kept for.
const SMALL: u64 = 0x300;

fn machine_of(nr_ram: u64, nr_heap: u64) -> Machine {
    let banks = vec![Bank { frames: range(RAM, nr_ram), bytes: Some(Pfn::new(0)) }];
    let arena = Arena::heap(nr_ram).unwrap();
    Machine::new(banks, range(DEVICE, NR_DEVICE), range(HEAP, nr_heap), Some(arena)).unwrap()
}

/// The hypervisor alone, and somebody with capabilities.
struct Bare {
    hyp: Hyp,
    caps: Cspace,
    partition: u64,
}

impl Bare {
    fn new() -> Self {
        Self::with(NR_HEAP, BbmLevel::Zero)
    }

    fn with(nr_heap: u64, bbm: BbmLevel) -> Self {
        Self::of(machine(nr_heap), bbm)
    }

    fn of(machine: Machine, bbm: BbmLevel) -> Self {
        let hyp = Hyp::boot(Arc::new(machine), bbm).unwrap();
        let mut caps = Cspace::default();
        let partition = caps.insert(Object::Partition, Rights::ALL).unwrap().0;
        Self { hyp, caps, partition }
    }

    fn call(&mut self, number: u64, x: &[u64]) -> Result<[u64; 3], u64> {
        let mut all = [0; 7];
        all[..x.len()].copy_from_slice(x);
        match self.hyp.hypercall(&mut self.caps, number, all) {
            [0, a, b, c] => Ok([a, b, c]),
            [error, rest @ ..] => {
                assert_eq!(rest, [0; 3]);
                Err(error)
            }
        }
    }

    /// A call that must fail so, and change nothing.
    fn refused(&mut self, number: u64, x: &[u64], error: HypError) {
        let before = self.picture();
        assert_eq!(self.call(number, x), Err(error.register()), "{number:#x} {x:x?}");
        assert!(self.picture() == before, "{number:#x} {x:x?} changed something");
    }

    /// An extent of frames of the partition's.
    fn extent(&mut self, start: u64, nr: u64, attrs: u64) -> u64 {
        self.call(EXTENT_CONFIGURE, &[self.partition, start * PAGE, nr * PAGE, attrs]).unwrap()[0]
    }

    fn derive(&mut self, parent: u64, offset: u64, nr: u64, attrs: u64) -> u64 {
        self.call(EXTENT_DERIVE, &[parent, offset * PAGE, nr * PAGE, attrs]).unwrap()[0]
    }

    fn aspace(&mut self) -> u64 {
        let id = self.hyp.create_aspace().unwrap();
        self.caps.insert(Object::Aspace(id), Rights::ALL).unwrap().0
    }

    /// A capability for the same with fewer rights.
    fn with_rights(&mut self, cap: u64, rights: u32) -> u64 {
        let object = self.caps.remove(CapId(cap)).unwrap();
        let copy = self.caps.insert(object, Rights::of(rights)).unwrap().0;
        // The original keeps its number in tests: it is put back under a new one.
        let again = self.caps.insert(object, Rights::ALL).unwrap().0;
        self.alias(cap, again);
        copy
    }

    fn alias(&mut self, number: u64, of: u64) {
        self.caps.rename(CapId(of), CapId(number));
    }

    fn extent_id(&self, cap: u64) -> ExtentId {
        self.caps.extent(cap, Rights::of(0)).unwrap()
    }

    fn aspace_id(&self, cap: u64) -> AspaceId {
        self.caps.aspace(cap, Rights::of(0)).unwrap()
    }

    /// Frames of the extent, counted in frames of the machine.
    fn give(&mut self, from: u64, to: u64, how: u64, offset: u64, nr: u64) -> Result<(), u64> {
        self.call(EXTENT_DONATE, &[how, from, to, offset * PAGE, nr * PAGE]).map(drop)
    }

    fn owner(&self, pfn: u64) -> Owner {
        self.hyp.memdb.owner(Pfn::new(pfn))
    }

    /// Where a page leads.
    fn at(&self, aspace: u64, gfn: u64) -> Option<u64> {
        let space = &self.hyp.aspaces[&self.aspace_id(aspace)];
        space.tree.translate(Gfn::new(gfn)).map(|(pfn, _)| pfn.get())
    }

    fn rights_at(&self, aspace: u64, gfn: u64) -> Option<Access> {
        let space = &self.hyp.aspaces[&self.aspace_id(aspace)];
        space.tree.translate(Gfn::new(gfn)).map(|(_, leaf)| Access::from(leaf.prot))
    }

    /// Owners, records and pages.
    fn picture(&self) -> String {
        let mut pages = Vec::new();
        for (id, space) in &self.hyp.aspaces {
            space.tree.visit(|gfn, level, pte| {
                for nth in 0..super::aspace::Aspace::SHAPE.pages_at(level) {
                    let (pfn, leaf) = space.tree.translate(Gfn::new(gfn.get() + nth)).unwrap();
                    pages.push((id, gfn, nth, pfn, (leaf.prot, leaf.prot.executes_at())));
                }
                let _ = pte;
            });
        }
        // A block that was split looks as it did.
        let pages: Vec<_> = pages
            .iter()
            .map(|(id, gfn, nth, pfn, prot)| (id, gfn.get() + nth, pfn.get(), format!("{prot:?}")))
            .collect();
        let frames = (RAM..RAM + NR_RAM).chain(DEVICE..DEVICE + NR_DEVICE);
        let owners: Vec<_> = frames.map(|pfn| self.owner(pfn)).collect();
        let vmmio: Vec<_> = self.hyp.aspaces.values().map(|space| &space.vmmio).collect();
        format!("{owners:?} {pages:?} {vmmio:?} {:?}", self.hyp.extents)
    }

    /// That nothing is wrong with tables and heap.
    fn sound(&self) {
        assert_eq!(self.hyp.nr_incidents, 0);
        let mut nr_tables = 0;
        for space in self.hyp.aspaces.values() {
            assert_eq!(space.tree.check(), [""; 0]);
            nr_tables += space.tree.nr_tables();
        }
        assert_eq!(
            nr_tables + self.hyp.heap.free.len(),
            self.hyp.machine.heap().nr_pages() as usize
        );
    }
}

/// Bytes for a seed.
fn bytes(seed: u64, nr: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    (0..nr).map(next).collect()
}
