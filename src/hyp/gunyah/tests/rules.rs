//! Every rule can be broken, and says so; and every seeded mistake is found.

use super::super::hostile::{Flaw, bytes, run};
use super::super::invariants::RULES;
use super::super::rm::message::{Create, Transfer};
use super::full::*;
use super::*;

/// A parcel that was lent, one that is shared, and a gift.
fn scene() -> (Full, [u32; 2]) {
    let full = Full::small();
    let lent = full.create(HOST, &lend(&[(A, 5)], &[(RAM, 2)])).unwrap();
    full.accept(A, &take(lent, Transfer::Lend)).unwrap();
    let shared = full.create(HOST, &share(&[(HOST, 4), (B, 6)], &[(RAM + 8, 1)])).unwrap();
    full.accept(B, &take(shared, Transfer::Share)).unwrap();
    let gift = full.create(HOST, &Create { ..donate(B, &[(RAM + 16, 1)]) }).unwrap();
    full.accept(B, &take(gift, Transfer::Donate)).unwrap();
    full.sound();
    (full, [lent, shared])
}

fn breaks(name: &str, full: &Full, [lent, shared]: [u32; 2]) {
    full.gunyah.with(|world| {
        let host = world.rm.vms[&HOST].home.unwrap();
        let guest = world.rm.vms[&A].home.unwrap();
        let one = |pfn| range(pfn, 1);
        let adjust = |world: &mut super::super::World, id: AspaceId, gfn: u64| {
            let space = world.hyp.aspaces.get_mut(&id).unwrap();
            space.tree.adjust(Gfn::new(gfn), |pte| pte.with_prot(Access::RWX.prot())).unwrap();
        };
        match name.split(' ').next().unwrap() {
            "41" => {
                let extent = world.rm.parcels[&lent].extent;
                world.hyp.memdb.update(one(RAM), Owner::Trace, Owner::Extent(extent)).unwrap();
            }
            "42" => {
                let extent = world.rm.parcels[&lent].extent;
                let to = Owner::Extent(host.memory);
                world.hyp.memdb.update(one(RAM), to, Owner::Extent(extent)).unwrap();
            }
            "42b" | "45" => adjust(world, guest.aspace, 0),
            "43" => {
                let extent = world.rm.parcels[&lent].extent;
                world.hyp.extents.get_mut(&extent).unwrap().parent = Some(host.memory);
            }
            "tables" => drop(world.hyp.heap.free.pop()),
            "nothing" => world.hyp.nr_incidents = 1,
            "44" => adjust(world, host.aspace, RAM + 8),
            "45b" => world.rm.parcels.get_mut(&shared).unwrap().share_count = 2,
            "a" => world.rm.parcels.get_mut(&lent).unwrap().regions[0].nr = 1,
            "48" => {
                let space = world.hyp.aspaces.get_mut(&guest.aspace).unwrap();
                let piece = super::super::aspace::Piece {
                    gfn: Gfn::new(0x77),
                    pfn: Pfn::new(RAM + 16),
                    nr: 1,
                };
                space.map(guest.aspace, &mut world.hyp.heap, piece, RW, &mut Vec::new()).unwrap();
            }
            "49" => world.rm.vms.get_mut(&B).unwrap().accepted.clear(),
            other => panic!("no way to break rule {other}"),
        }
    });
}

#[test]
fn every_rule_says_when_it_is_broken() {
    for (name, _) in RULES {
        let told = match name.starts_with("52") {
            true => super::super::host::tests::rules::broken(name),
            false => {
                let (full, parcels) = scene();
                breaks(name, &full, parcels);
                full.gunyah.check()
            }
        };
        assert!(told.iter().any(|told| told.starts_with(name)), "{name}: {told:#?}");
    }
}

#[test]
#[cfg(debug_assertions)]
fn the_specification_notices_what_it_was_not_told() {
    let spoil: [fn(&mut super::super::World); 3] = [
        |world| {
            let host = world.rm.vms[&HOST].home.unwrap();
            let frames = range(RAM + 40, 1);
            world.hyp.memdb.update(frames, Owner::Trace, Owner::Extent(host.memory)).unwrap();
        },
        |world| {
            let host = world.rm.vms[&HOST].home.unwrap();
            let slot = world.hyp.extents.get_mut(&host.memory).unwrap().slots[0].as_mut().unwrap();
            assert!(slot.records.remove(range(RAM + 40, 1), Gfn::new(RAM + 40)));
        },
        |world| {
            let host = world.rm.vms[&HOST].home.unwrap();
            let space = world.hyp.aspaces.get_mut(&host.aspace).unwrap();
            let rx = Access::RX.prot();
            space.tree.adjust(Gfn::new(RAM + 0x280), |pte| pte.with_prot(rx)).unwrap();
        },
    ];
    for spoil in spoil {
        let (full, _) = scene();
        let settles = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            full.gunyah.with(|world| {
                spoil(world);
                world.hyp.settle();
            });
        }));
        assert!(settles.is_err());
    }
}

#[test]
fn every_mistake_is_found() {
    for flaw in Flaw::ALL {
        let found = (1..30).find_map(|seed| run(&bytes(seed, 2000), Some(flaw)).err());
        println!("{flaw:?}: {found:?}");
        assert!(found.is_some(), "{flaw:?}");
    }
}
