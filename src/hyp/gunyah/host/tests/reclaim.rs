//! Memory comes back, or turns from one side to the other.

use super::*;

fn lent(scene: &Scene, gfn: u64, pfn: u64, nr: u64) -> Guest {
    let mut guest = scene.guest();
    guest.provide(&[run(gfn, pfn, nr)], Side::Lent, true, &mut || ()).unwrap();
    guest
}

#[test]
fn it_comes_back_cleared_or_as_it_is() {
    for (contents, byte) in [(Contents::Clear, 0), (Contents::Keep, 7)] {
        let scene = Scene::new();
        let mut guest = lent(&scene, 0x100, 3, 2);
        assert!(scene.store(&guest, 0x100, 7));
        guest.reclaim(&[run(0x100, 3, 2)], contents).unwrap();
        assert_eq!((scene.host_load(3), scene.load(&guest, 0x100)), (Some(byte), None));
        assert_eq!(guest.given(Gfn::new(0x100), 2), (None, 2));
        assert!(scene.gunyah.with(|world| world.kernel.sees(Pfn::new(3))));
        scene.sound(&[&guest]);
    }
}

/// The hypervisor clears what was the guest's alone, and nothing else.
#[test]
fn what_was_shared_is_not_cleared() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    guest.provide(&[run(5, 5, 1)], Side::Shared, true, &mut || ()).unwrap();
    assert!(scene.store(&guest, 5, 9));
    guest.reclaim(&[run(5, 5, 1)], Contents::Clear).unwrap();
    assert_eq!(scene.host_load(5), Some(9));
}

#[test]
fn absent_pages_are_nothing_to_do_and_other_frames_are_refused() {
    let scene = Scene::new();
    let mut guest = lent(&scene, 0x100, 3, 2);
    let before = scene.picture(&guest);
    assert_eq!(guest.reclaim(&[run(0x200, 3, 5)], Contents::Clear), Ok(()));
    let other = guest.reclaim(&[run(0xff, 2, 2), run(0x101, 9, 1)], Contents::Clear);
    assert_eq!(other, Err(Errno::EAGAIN));
    assert!(scene.picture(&guest) == before);
    // Part of it, with nothing around it.
    guest
        .reclaim(&[run(0xf0, 0x400 + 0x13 - 0x20, 0x10), run(0x101, 4, 9)], Contents::Clear)
        .unwrap();
    assert_eq!(guest.given(Gfn::new(0x100), 9).1, 1);
    scene.sound(&[&guest]);
}

/// Out of the middle of a block, and the same again.
#[test]
fn blocks_are_taken_apart() {
    let scene = Scene::new();
    let mut guest = lent(&scene, 0x400, 0, 512);
    assert!(scene.store(&guest, 0x400 + 100, 7) && scene.store(&guest, 0x400 + 101, 8));
    guest.reclaim(&[run(0x400 + 100, 100, 1)], Contents::Clear).unwrap();
    assert_eq!(scene.host_load(100), Some(0));
    assert_eq!((scene.host_load(101), scene.load(&guest, 0x400 + 101)), (None, Some(8)));
    guest.provide(&[run(0x400 + 100, 100, 1)], Side::Lent, true, &mut || ()).unwrap();
    guest.reclaim(&[run(0x400, 0, 512)], Contents::Clear).unwrap();
    assert!((0..512).all(|pfn| scene.host_load(pfn) == Some(0)));
    assert_eq!(guest.all_given().count(), 0);
    scene.sound(&[&guest]);
}

#[test]
fn it_turns_and_keeps_its_bytes() {
    let scene = Scene::new();
    let mut guest = lent(&scene, 0x400, 0, 512);
    assert!(scene.store(&guest, 0x410, 7));
    let mut nr_prepared = 0;
    guest.turn(&[run(0x410, 0x10, 2)], Side::Shared, &mut || nr_prepared += 1).unwrap();
    assert_eq!((scene.host_load(0x10), scene.load(&guest, 0x410)), (Some(7), Some(7)));
    assert_eq!((scene.host_load(0xf), scene.host_load(0x12)), (None, None));
    scene.sound(&[&guest]);
    guest.turn(&[run(0x410, 0x10, 2)], Side::Lent, &mut || nr_prepared += 1).unwrap();
    assert_eq!((scene.host_load(0x10), scene.load(&guest, 0x410)), (None, Some(7)));
    assert_eq!(nr_prepared, 2);
    scene.sound(&[&guest]);
}

/// The host sees nothing of what was the guest's before it is prepared, and the guest nothing of what comes.
#[test]
fn nobody_reaches_what_is_being_prepared() {
    let scene = Scene::new();
    let mut guest = lent(&scene, 0x10, 0x10, 1);
    let vmid = guest.vmid().unwrap();
    let gunyah = Arc::clone(&scene.gunyah);
    let sees = || {
        let mut byte = [0];
        let guest = gunyah.vcpu(vmid, ipa(0x10), Bytes::Load(&mut byte)).is_ok();
        (gunyah.user(ipa(0x10), Bytes::Load(&mut byte)).is_ok(), guest)
    };
    let mut seen = Vec::new();
    assert_eq!(sees(), (false, true));
    guest.turn(&[run(0x10, 0x10, 1)], Side::Shared, &mut || seen.push(sees())).unwrap();
    assert_eq!(sees(), (true, true));
    guest.turn(&[run(0x10, 0x10, 1)], Side::Lent, &mut || seen.push(sees())).unwrap();
    guest.reclaim(&[run(0x10, 0x10, 1)], Contents::Clear).unwrap();
    guest.provide(&[run(0x10, 0x10, 1)], Side::Lent, true, &mut || seen.push(sees())).unwrap();
    assert_eq!(seen, [(false, false); 3]);
}

#[test]
fn a_turn_that_is_refused_changes_nothing() {
    let scene = Scene::new();
    let mut guest = lent(&scene, 0x400, 0, 512);
    guest.provide(&[run(0x1000, 520, 200)], Side::Shared, true, &mut || ()).unwrap();
    scene.gunyah.with(|world| world.kernel.note_use(Pfn::new(719), |uses| uses.nr_pinned += 1));
    let before = scene.picture(&guest);
    let refused: [(&[GuestRun], Side, Errno); 5] = [
        (&[run(0x1000, 520, 200)], Side::Lent, Errno::EPERM),
        (&[run(0x1000, 520, 200)], Side::Shared, Errno::EAGAIN),
        (&[run(0x400, 0, 513)], Side::Shared, Errno::EAGAIN),
        (&[run(0x400, 1, 5)], Side::Shared, Errno::EAGAIN),
        (&[run(0x400, 0, 2), run(0x401, 5, 1)], Side::Shared, Errno::EINVAL),
    ];
    for (runs, to, errno) in refused {
        let answer = guest.turn(runs, to, &mut || panic!("it is not to be prepared"));
        assert_eq!(answer, Err(errno), "{runs:?}");
        assert!(scene.picture(&guest) == before, "{runs:?}");
    }
    scene.sound(&[&guest]);
}

/// A vCPU's store is there before the memory goes, or it never is.
#[test]
fn no_store_lands_behind_a_reclaim() {
    let scene = Scene::new();
    let mut guest = scene.guest();
    let vmid = guest.vmid().unwrap();
    // Closed when all is done.
    let (working, is_done) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|threads| {
        let gunyah = &scene.gunyah;
        threads.spawn(move || {
            while is_done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                let _ = gunyah.vcpu(vmid, ipa(0x10), Bytes::Store(&[0xee; 64]));
            }
        });
        for _ in 0..300 {
            guest.provide(&[run(0x10, 0x10, 1)], Side::Lent, true, &mut || ()).unwrap();
            guest.reclaim(&[run(0x10, 0x10, 1)], Contents::Clear).unwrap();
            assert_eq!(scene.byte(0x10), 0);
        }
        drop(working);
    });
}

type Act = fn(&mut Guest) -> Result<(), Errno>;

/// Wherever the hypervisor runs out of tables, nothing has changed.
#[test]
fn without_tables_nothing_comes_back_and_nothing_turns() {
    let all: [Act; 3] = [
        |guest| guest.reclaim(&[run(0x410, 0x10, 2), run(0x1010, 530, 2)], Contents::Clear),
        |guest| guest.turn(&[run(0x410, 0x10, 2)], Side::Shared, &mut || ()),
        |guest| guest.turn(&[run(0x1010, 530, 2)], Side::Lent, &mut || ()),
    ];
    for act in all {
        let scene = Scene::new();
        let mut guest = lent(&scene, 0x400, 0, 512);
        guest.provide(&[run(0x1000, 514, 200)], Side::Shared, true, &mut || ()).unwrap();
        assert!(scene.store(&guest, 0x410, 7));
        let rest = scene.exhaust();
        let before = scene.picture(&guest);
        let mut nr_failed = 0;
        for frame in rest {
            match act(&mut guest) {
                Ok(()) => {
                    scene.give_back(frame);
                    break;
                }
                Err(errno) => assert_eq!(errno, Errno::ENOMEM),
            }
            assert!(scene.picture(&guest) == before);
            assert_eq!(scene.load(&guest, 0x410), Some(7));
            nr_failed += 1;
            scene.give_back(frame);
        }
        assert!(nr_failed >= 4, "{nr_failed}");
        assert!(scene.picture(&guest) != before);
        scene.sound(&[&guest]);
    }
}
