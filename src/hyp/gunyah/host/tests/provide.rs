//! Memory is lent and shared, or refused, and then nothing has changed.

use super::*;
use crate::hyp::gunyah::attrs::Access;

fn rights(scene: &Scene, guest: &Guest, gfn: u64) -> Option<Access> {
    let world = scene.gunyah.world.read();
    let home = world.rm.vms[&guest.vmid().unwrap()].home.unwrap();
    let (_, leaf) = world.hyp.aspaces[&home.aspace].tree.translate(Gfn::new(gfn))?;
    Some(Access::from(leaf.prot))
}

#[test]
fn what_is_lent_is_the_guests_and_what_is_shared_is_both() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    for (pfn, byte) in [(3, 33), (4, 44)] {
        scene.fill(pfn, byte);
    }
    let mut nr_prepared = 0;
    guest.provide(&[run(0x100, 3, 1)], Side::Lent, true, &mut || nr_prepared += 1).unwrap();
    guest.provide(&[run(0x200, 4, 1)], Side::Shared, true, &mut || nr_prepared += 1).unwrap();
    assert_eq!(nr_prepared, 2);
    assert_eq!((scene.load(&guest, 0x100), scene.load(&guest, 0x200)), (Some(33), Some(44)));
    assert_eq!((scene.host_load(3), scene.host_load(4)), (None, Some(44)));
    assert_eq!(scene.load(&guest, 0x101), None);
    scene.gunyah.with(|world| {
        assert!(!world.kernel.sees(Pfn::new(3)) && world.kernel.sees(Pfn::new(4)));
    });
    scene.sound(&[&guest]);
}

#[test]
fn rights_are_those_of_the_side() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    let all = [
        (Side::Lent, true, Access::RWX),
        (Side::Lent, false, Access::RX),
        (Side::Shared, true, Access::RW),
        (Side::Shared, false, Access::R),
    ];
    for (nth, (side, writes, access)) in (0..).zip(all) {
        guest.provide(&[run(nth, nth, 1)], side, writes, &mut || ()).unwrap();
        assert_eq!(rights(&scene, &guest, nth), Some(access), "{side:?} {writes}");
        assert_eq!(scene.store(&guest, nth, 1), writes);
    }
}

#[test]
fn a_huge_folio_is_one_entry() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    guest.provide(&[run(0x400, 0, 512)], Side::Lent, true, &mut || ()).unwrap();
    let world = scene.gunyah.world.read();
    let home = world.rm.vms[&guest.vmid().unwrap()].home.unwrap();
    let (level, _) = world.hyp.aspaces[&home.aspace].tree.leaf(Gfn::new(0x5ff)).unwrap();
    assert_eq!(level, crate::stage2::Level::BLOCK_2M);
}

/// Every refusal leaves all as it was, also where the first pieces had been moved already.
#[test]
fn a_refusal_changes_nothing() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    let mut other = scene.guest();
    other.provide(&[run(0, 600, 1)], Side::Lent, true, &mut || ()).unwrap();
    guest.provide(&[run(0x40, 700, 1)], Side::Shared, true, &mut || ()).unwrap();
    scene.gunyah.with(|world| {
        world.kernel.note_use(Pfn::new(610), |uses| uses.nr_mapped += 1);
        world.kernel.note_use(Pfn::new(620), |uses| uses.nr_pinned += 1);
    });
    let before = scene.picture(&guest);
    let many = |last| [run(0x1000, 8, 4), run(0x2000, 16, 600 - 16), last];
    let lend = [
        (many(run(0x40, 30, 1)), Errno::EINVAL),
        (many(run(0x1003, 760, 1)), Errno::EINVAL),
        ([run(1, 1, 1), run(0x30, 2, 0x20), run(2, 50, 1)], Errno::EAGAIN),
        (many(run(0x3000, 600, 1)), Errno::EINVAL),
        (many(run(0x3000, 608, 8)), Errno::EPERM),
        (many(run(0x3000, 620, 1)), Errno::EPERM),
        (many(run(0x3000, NR_PAGES - 1, 2)), Errno::EINVAL),
        (many(run(0x3000, 1, 0)), Errno::EINVAL),
        (many(run(1 << 36, 1, 1)), Errno::EINVAL),
        (many(run(u64::MAX, 1, 1)), Errno::EINVAL),
        (many(run(1, u64::MAX, 1)), Errno::EINVAL),
    ];
    for (runs, errno) in lend {
        let refused =
            guest.provide(&runs, Side::Lent, true, &mut || panic!("it is not to be prepared"));
        assert_eq!(refused, Err(errno), "{runs:?}");
        assert!(scene.picture(&guest) == before, "{runs:?}");
    }
    // What user space has can be shared.
    guest.provide(&[run(0x3000, 608, 16)], Side::Shared, true, &mut || ()).unwrap();
    scene.sound(&[&guest, &other]);
}

#[test]
fn a_heap_that_is_too_small_is_noticed_before_anything_happens() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    let runs = [run(0x1000, 8, 4), run(0x2000, 16, 300), run(0x3000, 1, 1)];
    let rest = scene.exhaust();
    let before = scene.picture(&guest);
    let mut nr_needed = 0;
    for frame in rest {
        let done = guest.provide(&runs, Side::Lent, true, &mut || ());
        if done.is_err() {
            assert_eq!(done, Err(Errno::ENOMEM));
            assert!(scene.picture(&guest) == before);
            nr_needed += 1;
        }
        scene.give_back(frame);
        if done.is_ok() {
            break;
        }
    }
    // What is given does without what is kept for taking back.
    let nr_needed = nr_needed - scene.gunyah.with(|world| world.hyp.heap.reserve);
    assert!((4..40).contains(&nr_needed), "{nr_needed}");
    scene.sound(&[&guest]);
}

/// Only a hypervisor that refuses to map gets as far as that; and then all is taken back as well.
#[test]
fn what_cannot_be_mapped_goes_back() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    let set_read_only = |read_only| {
        scene.gunyah.with(|world| {
            let home = world.rm.vms[&guest.vmid().unwrap()].home.unwrap();
            world.hyp.aspaces.get_mut(&home.aspace).unwrap().read_only = read_only;
        });
    };
    set_read_only(true);
    let before = scene.picture(&guest);
    let vmid = guest.vmid().unwrap();
    for side in [Side::Lent, Side::Shared] {
        let refused = guest.provide(&[run(0x10, 0, 600)], side, true, &mut || ());
        assert_eq!(refused, Err(Errno::EACCES));
        assert!(scene.picture(&guest) == before);
    }
    scene.gunyah.with(|world| {
        let home = world.rm.vms[&vmid].home.unwrap();
        world.hyp.aspaces.get_mut(&home.aspace).unwrap().read_only = false;
    });
    guest.provide(&[run(0x10, 0, 600)], Side::Lent, true, &mut || ()).unwrap();
    scene.sound(&[&guest]);
}

/// A guest cannot make a parcel of what was lent to it, nor the host of what it has lent.
#[test]
fn what_is_provided_is_in_no_parcel() {
    let scene = Scene::new();
    let (mut guest, other) = (scene.guest(), scene.guest());
    guest.provide(&[run(0x10, 0x10, 1)], Side::Lent, true, &mut || ()).unwrap();
    for from in [guest.vmid().unwrap(), Vmid::HLOS] {
        let (lend, body) = (
            crate::hyp::gunyah::rm::message::LEND,
            super::super::life::lend(
                other.vmid().unwrap(),
                crate::range::PfnRange::single(Pfn::new(0x10)).unwrap(),
            ),
        );
        let reply = scene.gunyah.message(from, lend, &body);
        assert_eq!(reply.error, Some(crate::hyp::gunyah::error::RmError::MemInvalid), "{from:?}");
    }
    scene.sound(&[&guest, &other]);
}
