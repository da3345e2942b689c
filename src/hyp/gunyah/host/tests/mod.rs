//! A small machine, and guests whose memory is provided.

mod life;
mod provide;
mod random;
mod reclaim;
pub(in crate::hyp::gunyah) mod rules;

use super::*;
use crate::addr::{Gfn, Ipa, Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::PAGE_BYTES;
use crate::hyp::gunyah::aspace::{Purpose, Purse};
use crate::hyp::gunyah::touch::Bytes;
use crate::stage2::GuestRun;

/// As much as the specification is kept for: a block, and half of one.
const NR_PAGES: u64 = 768;

/// A machine of one pool.
struct Scene {
    gunyah: Arc<Gunyah>,
    arena: Arc<Arena>,
}

fn run(gfn: u64, pfn: u64, nr_pages: u64) -> GuestRun {
    GuestRun { gfn: Gfn::new(gfn), pfn: Pfn::new(pfn), nr_pages }
}

fn ipa(gfn: u64) -> Ipa {
    Gfn::new(gfn).ipa()
}

impl Scene {
    fn new() -> Self {
        Self::of(NR_PAGES)
    }

    fn of(nr_pages: u64) -> Self {
        let arena = Arena::heap(nr_pages).unwrap();
        Self { gunyah: Arc::new(Gunyah::on_arena(&arena).unwrap()), arena }
    }

    fn guest(&self) -> Guest {
        Guest::create(&self.gunyah).unwrap()
    }

    fn load(&self, guest: &Guest, gfn: u64) -> Option<u8> {
        let mut byte = [0];
        let loaded = self.gunyah.vcpu(guest.vmid().unwrap(), ipa(gfn), Bytes::Load(&mut byte));
        loaded.ok().map(|()| byte[0])
    }

    fn store(&self, guest: &Guest, gfn: u64, byte: u8) -> bool {
        self.gunyah.vcpu(guest.vmid().unwrap(), ipa(gfn), Bytes::Store(&[byte])).is_ok()
    }

    /// A load of the host's user space, by a mapping of its own.
    fn host_load(&self, pfn: u64) -> Option<u8> {
        let mut byte = [0];
        self.gunyah.user(ipa(pfn), Bytes::Load(&mut byte)).ok().map(|()| byte[0])
    }

    /// What is in a frame, whoever has it.
    fn byte(&self, pfn: u64) -> u8 {
        let mut byte = [0];
        self.arena.read(Pa::new(pfn * PAGE_BYTES as u64), &mut byte).unwrap();
        byte[0]
    }

    fn fill(&self, pfn: u64, byte: u8) {
        self.arena.write(Pa::new(pfn * PAGE_BYTES as u64), &[byte]).unwrap();
    }

    fn sound(&self, guests: &[&Guest]) {
        assert_eq!(self.gunyah.check(), [""; 0]);
        for guest in guests {
            assert_eq!(guest.check(), [""; 0]);
        }
    }

    /// Leaves the hypervisor nothing for tables; it may have one frame after the other back.
    fn exhaust(&self) -> Vec<Purse> {
        self.gunyah.with(|world| {
            std::iter::from_fn(|| world.hyp.heap.fill(1, Purpose::TakeBack).ok()).collect()
        })
    }

    fn give_back(&self, frame: Purse) {
        self.gunyah.with(|world| world.hyp.heap.empty(frame));
    }

    /// Who has which frame, who has it mapped, and the host's books.
    fn picture(&self, guest: &Guest) -> String {
        let world = self.gunyah.world.read();
        let owners: Vec<_> =
            (0..NR_PAGES).map(|pfn| world.hyp.memdb.owner(Pfn::new(pfn))).collect();
        let mapped = super::super::invariants::mapped(&world.hyp);
        let given: Vec<_> = guest.all_given().collect();
        format!("{owners:?} {mapped:?} {given:?} {:?} {:?}", world.kernel, world.hyp.extents)
    }
}
