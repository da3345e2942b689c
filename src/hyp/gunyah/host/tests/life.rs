//! VMs are made, run, and are gone, and the host has everything back.

use super::*;
use crate::hyp::gunyah::rm::vm::VmState;

#[test]
fn it_runs_pauses_stops_and_is_gone() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    guest.provide(&[run(0x10, 0x10, 1)], Side::Lent, true, &mut || ()).unwrap();
    assert_eq!(guest.state(), Some(VmState::Running));
    guest.pause(true).unwrap();
    assert_eq!((guest.state(), scene.store(&guest, 0x10, 1)), (Some(VmState::Paused), false));
    assert_eq!(guest.pause(true), Err(Errno::EINVAL));
    guest.pause(false).unwrap();
    assert!(scene.store(&guest, 0x10, 1));
    guest.stop().unwrap();
    assert_eq!((guest.state(), guest.stop()), (Some(VmState::Exited), Err(Errno::EINVAL)));
    guest.teardown().unwrap();
    assert_eq!((guest.state(), guest.teardown()), (None, Err(Errno::EINVAL)));
    scene.sound(&[&guest]);
}

#[test]
fn its_end_gives_everything_back_cleared() {
    let scene = Scene::new();
    let nr_free = |scene: &Scene| scene.gunyah.with(|world| world.hyp.heap.free.len());
    // The host's tables are taken apart once, and stay so.
    let mut first = scene.guest();
    first.provide(&[run(0, 0, NR_PAGES)], Side::Lent, true, &mut || ()).unwrap();
    for gfn in [0, 512] {
        first.reclaim(&[run(gfn, gfn, 1)], Contents::Clear).unwrap();
    }
    drop(first);
    let nr_before = nr_free(&scene);
    for by_hand in [true, false] {
        let mut guest = scene.guest();
        let scattered: Vec<_> = (0..20).map(|nth| run(nth * 0x3_0000 + nth, nth * 2, 1)).collect();
        guest.provide(&scattered, Side::Lent, true, &mut || ()).unwrap();
        guest.provide(&[run(0x1000, 520, 200)], Side::Shared, true, &mut || ()).unwrap();
        assert!(scene.store(&guest, 0, 7) && scene.store(&guest, 0x1000, 8));
        if by_hand {
            guest.teardown().unwrap();
        }
        drop(guest);
        assert_eq!((scene.host_load(0), scene.host_load(520)), (Some(0), Some(8)));
        scene.sound(&[]);
        assert_eq!(nr_free(&scene), nr_before);
        scene.gunyah.with(|world| {
            let host = world.rm.vms[&Vmid::HLOS].home.unwrap();
            let owner = crate::hyp::gunyah::memdb::Owner::Extent(host.memory);
            let all = crate::range::PfnRange::new(Pfn::new(0), NR_PAGES).unwrap();
            assert!(world.hyp.memdb.is_all(all, owner) && world.rm.parcels.is_empty());
        });
    }
}

/// If nobody took it back before, the resource manager does, and clears it.
#[test]
fn a_reset_alone_gives_memory_back_as_well() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    guest.provide(&[run(0x10, 0x10, 1)], Side::Lent, true, &mut || ()).unwrap();
    assert!(scene.store(&guest, 0x10, 7));
    scene.gunyah.with(|crate::hyp::gunyah::World { hyp, rm, .. }| {
        rm.stop_vm(Vmid::HLOS, guest.vmid().unwrap()).unwrap();
        rm.reset_vm(Vmid::HLOS, guest.vmid().unwrap()).unwrap();
        while rm.reset_step(hyp, guest.vmid().unwrap()).unwrap() {}
    });
    assert_eq!((guest.state(), scene.host_load(0x10)), (Some(VmState::Reset), Some(0)));
    assert_eq!(scene.gunyah.check(), [""; 0]);
}

#[test]
fn there_are_as_many_as_there_are_numbers() {
    let scene = Scene::of(2048);
    let guests: Vec<_> = (0..64).map(|_| scene.guest()).collect();
    assert_eq!(Guest::create(&scene.gunyah).err(), Some(Errno::ENODEV));
    drop(guests);
    scene.guest();
    scene.sound(&[]);
}

/// Wherever the heap ends, a VM that cannot be made leaves nothing behind.
#[test]
fn a_vm_that_cannot_be_made_leaves_nothing() {
    let scene = Scene::new();
    // With the host's tables as they are when a page was lent.
    drop(scene.guest());
    let rest = scene.exhaust();
    let mut nr_failed = 0;
    for frame in rest {
        // One that is made is gone at once.
        let refused = Guest::create(&scene.gunyah).map(drop).err();
        // The resource manager says MAP_FAILED where tables run out while the VM accepts its image.
        assert!(matches!(refused, None | Some(Errno::ENOMEM | Errno::EINVAL)), "{refused:?}");
        let is_made = refused.is_none();
        nr_failed += usize::from(!is_made);
        scene.sound(&[]);
        scene.gunyah.with(|world| {
            assert_eq!((world.rm.vms.len(), world.rm.parcels.len()), (2, 0));
            assert_eq!((world.hyp.extents.len(), world.kernel.free.len()), (6, 64));
        });
        scene.give_back(frame);
        if is_made {
            break;
        }
    }
    assert!(nr_failed >= 2, "{nr_failed}");
}
