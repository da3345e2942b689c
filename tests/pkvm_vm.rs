//! VMs on a pKVM, from the outside: its versions, and guests that are not protected.

#[path = "common/guest_world.rs"]
#[expect(dead_code, reason = "no host here touches what is not its own")]
mod guest_world;

use gmem::addr::{ByteSize, Gfn, Ipa};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::hyp::{Exit, HvcResult, Hypercall, Profile, VmKind};
use gmem::{GuestMemfd, PinMode, Visibility, Zone};

use guest_world::{PAGE, World, agreed, at, ipa, pages, range};

const HUGE: u64 = 512;
const PROFILES: [Profile; 3] = [Profile::Mainline72, Profile::Android618, Profile::HugeProtected];

#[test]
fn each_version_answers_what_it_has() {
    for profile in PROFILES {
        let world = World::protected(profile);
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(1), b"mine").unwrap();
        let is_android = profile == Profile::Android618;
        let features = vcpu.hvc(Hypercall::Features).unwrap().regs().0;
        let relinquishes = 1 << 9;
        assert_eq!(features[0], 0b1_1101 | if is_android { relinquishes } else { 0 });
        let meminfo = vcpu.hvc(Hypercall::HypMeminfo).unwrap().regs().0;
        assert_eq!(meminfo, [4096, is_android.into(), 0, 0]);
        let gone = vcpu.hvc(Hypercall::MemRelinquish(ipa(1))).unwrap();
        let expected = if is_android { HvcResult::SUCCESS } else { HvcResult::NOT_SUPPORTED };
        assert_eq!(gone, expected);
        assert_eq!(world.vm.stat().owned, pages(if is_android { 0 } else { 1 }));
        let refused = world.vm.unbind(gmem::hyp::MemslotId::from_u16(0).unwrap());
        assert_eq!(refused.is_ok(), is_android, "{profile:?}");
        world.sound();
        drop(vcpu);
        world.end();
    }
}

#[test]
fn android_shares_runs_of_pages() {
    let world = World::protected(Profile::Android618);
    let mut vcpu = world.vcpu();
    for page in [0, 1, 2, 4] {
        vcpu.store(ipa(page), &[page as u8]).unwrap();
    }
    let [share, ..] = Hypercall::MemShare(ipa(0)).regs().0;
    let [unshare, ..] = Hypercall::MemUnshare(ipa(0)).regs().0;
    // Up to what is not there; the guest asks again for that, and it faults.
    let done = agreed(&mut vcpu, [share, ipa(0).get(), 8, 0]);
    assert_eq!(done.regs().0, [0, 3, 0, 0]);
    assert_eq!(world.hyp.stat().borrowed, pages(3));
    let done = agreed(&mut vcpu, [share, ipa(3).get(), 5, 0]);
    assert_eq!(done.regs().0, [0, 2, 0, 0]);
    let mut byte = [0];
    world.memfd.read(at(4), &mut byte).unwrap();
    assert_eq!(byte, [4]);
    // One that is pinned keeps all of them.
    let owner = world.memfd.register_owner("virtio").unwrap();
    let pin = world.memfd.pin(range(3, 1), owner, PinMode::Counted).unwrap();
    match vcpu.hvc([unshare, ipa(0).get(), 5, 0]) {
        Err(Exit::Conversion(request)) => {
            assert_eq!(request.pages, range(0, 5));
            assert_eq!(request.convert().unwrap_err().kind(), ErrorKind::Busy);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    assert_eq!(world.hyp.stat().borrowed, pages(5));
    drop(pin);
    let done = agreed(&mut vcpu, [unshare, ipa(0).get(), 5, 0]);
    assert_eq!(done.regs().0, [0, 5, 0, 0]);
    world.sound();
    // In mainline the third register must be zero.
    drop(vcpu);
    world.end();
    let world = World::protected(Profile::Mainline72);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(0), &[1]).unwrap();
    let refused = vcpu.hvc([share, ipa(0).get(), 1, 0]).unwrap();
    assert_eq!(refused, HvcResult::INVALID_PARAMETER);
}

#[test]
fn huge_folios_are_given_by_blocks_where_the_version_has_them() {
    for profile in PROFILES {
        let world = World::new(profile, VmKind::Protected, FolioSize::Huge2M, Visibility::Shared);
        world.memfd.write(at(0), b"payload").unwrap();
        world.memfd.write(at(HUGE + 7), b"more").unwrap();
        world.convert(world.memfd.pages(), Visibility::Private).unwrap();
        assert_eq!(world.hyp.stat().donated, pages(2 * HUGE));
        // The root, and one table below; by pages two more.
        let by_blocks = profile != Profile::Mainline72;
        let nr_tables = world.vm.stat().nr_tables;
        assert_eq!(nr_tables, if by_blocks { 3 } else { 5 }, "{profile:?}");
        world.sound();
        let mut vcpu = world.vcpu();
        let mut seen = [0; 4];
        vcpu.load(ipa(HUGE + 7), &mut seen).unwrap();
        assert_eq!(&seen, b"more");
        // A share of one page splits the block, and the rest stays as it was.
        vcpu.store(ipa(3), b"here").unwrap();
        assert!(agreed(&mut vcpu, Hypercall::MemShare(ipa(3))).is_success());
        world.memfd.read(at(3), &mut seen).unwrap();
        assert_eq!(&seen, b"here");
        assert_eq!(world.vm.stat().nr_tables, if by_blocks { 4 } else { 5 });
        let stat = world.hyp.stat();
        assert_eq!((stat.donated, stat.borrowed), (pages(2 * HUGE - 1), pages(1)));
        vcpu.load(ipa(0), &mut seen).unwrap();
        assert_eq!(&seen, b"payl");
        if profile == Profile::Android618 {
            // So does a page that is given up.
            let done = vcpu.hvc(Hypercall::MemRelinquish(ipa(HUGE + 1))).unwrap();
            assert_eq!(done, HvcResult::SUCCESS);
            assert_eq!(world.hyp.stat().donated, pages(2 * HUGE - 2));
        }
        world.sound();
        drop(vcpu);
        world.end();
    }
}

#[test]
fn a_fault_brings_a_block_if_all_of_it_is_there() {
    let kind = VmKind::Protected;
    for (profile, nr) in [(Profile::Mainline72, 1), (Profile::HugeProtected, HUGE)] {
        let world = World::new(profile, kind, FolioSize::Huge2M, Visibility::Private);
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(HUGE + 5), b"x").unwrap();
        assert_eq!(world.hyp.stat().donated, pages(nr));
        // A page of the other block is on the other side: the rest comes one by one.
        world.convert(range(9, 1), Visibility::Shared).unwrap();
        vcpu.store(ipa(0), b"y").unwrap();
        assert_eq!(world.hyp.stat().donated, pages(nr + 1));
        world.sound();
        drop(vcpu);
        world.end();
    }
}

#[test]
fn a_guest_that_is_not_protected_sees_what_the_host_sees() {
    let world = World::plain(Profile::Mainline72, FolioSize::Base);
    let mut vcpu = world.vcpu();
    world.memfd.write(at(2), b"from the host").unwrap();
    let mut seen = [0; 13];
    vcpu.load(ipa(2), &mut seen).unwrap();
    assert_eq!(&seen, b"from the host");
    vcpu.store(ipa(2), b"FROM").unwrap();
    world.memfd.read(at(2), &mut seen).unwrap();
    assert_eq!(&seen, b"FROM the host");
    assert_eq!((world.hyp.stat().shown, world.hyp.stat().donated), (pages(1), pages(0)));
    assert_eq!(world.vm.stat().borrowed, pages(1));
    // Hypercalls of protected guests are none of its.
    let call = vcpu.hvc(Hypercall::MemShare(ipa(2))).unwrap();
    assert_eq!(call, HvcResult::NOT_SUPPORTED);
    assert_eq!(vcpu.hvc(Hypercall::Features).unwrap().regs().0[0], 3, "KVM's own");
    world.sound();
    // The host may do as it likes: the guest loses the page, and faults again.
    world.memfd.punch_hole(range(2, 1)).unwrap();
    assert_eq!(world.hyp.stat().shown, pages(0));
    vcpu.load(ipa(2), &mut seen).unwrap();
    assert_eq!(seen, [0; 13]);
    world.sound();
    let slot = gmem::hyp::MemslotId::from_u16(0).unwrap();
    world.vm.unbind(slot).unwrap();
    assert_eq!(world.hyp.stat().shown, pages(0));
    assert!(matches!(vcpu.load(ipa(2), &mut seen), Err(Exit::Mmio { .. })));
    drop(vcpu);
    world.end();
}

#[test]
fn huge_folios_are_shown_by_blocks() {
    let world = World::plain(Profile::Mainline72, FolioSize::Huge2M);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(7), b"one").unwrap();
    assert_eq!(world.hyp.stat().shown, pages(HUGE));
    assert_eq!(world.vm.stat().nr_tables, 3);
    // A hole in the other: no block, and the hole is filled when it is touched.
    world.memfd.allocate(range(HUGE, HUGE)).unwrap();
    world.memfd.punch_hole(range(HUGE + 100, 1)).unwrap();
    vcpu.store(ipa(HUGE), b"two").unwrap();
    world.sound();
    // Part of a block goes: all of it does, and comes back.
    world.memfd.punch_hole(range(6, 1)).unwrap();
    let mut seen = [0; 3];
    vcpu.load(ipa(7), &mut seen).unwrap();
    assert_eq!(&seen, b"one");
    vcpu.load(ipa(6), &mut seen).unwrap();
    assert_eq!(seen, [0; 3]);
    world.sound();
    drop(vcpu);
    world.end();
}

#[test]
fn what_is_shown_can_move() {
    for folio in [FolioSize::Base, FolioSize::Huge2M] {
        let world = World::plain(Profile::Mainline72, folio);
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(0), b"moving").unwrap();
        let before: Vec<_> = world.memfd.frames_of(range(0, 1)).unwrap().collect();
        let migration = world.memfd.migrate(range(0, 1), Zone::Normal).unwrap();
        assert_eq!((migration.moved, migration.refused.len()), (folio.bytes(), 0));
        assert_ne!(before, world.memfd.frames_of(range(0, 1)).unwrap().collect::<Vec<_>>());
        assert_eq!(world.hyp.stat().shown, pages(0));
        world.sound();
        let mut seen = [0; 6];
        vcpu.load(ipa(0), &mut seen).unwrap();
        assert_eq!(&seen, b"moving");
        world.sound();
        drop(vcpu);
        world.end();
    }
}

#[test]
fn nothing_turns_private_under_a_guest_that_is_not_protected() {
    let world = World::plain(Profile::Mainline72, FolioSize::Base);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), b"shown").unwrap();
    for page in [1, 2] {
        let refused = world.convert(range(page, 1), Visibility::Private).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.errno()),
            (ErrorKind::HypervisorRefused, Errno::EOPNOTSUPP),
            "with memory or without"
        );
    }
    let mut seen = [0; 5];
    world.memfd.read(at(1), &mut seen).unwrap();
    assert_eq!(&seen, b"shown");
    world.sound();
    drop(vcpu);
    world.end();

    // What was private when it was bound faults, until it is shared.
    let kind = VmKind::NonProtected;
    let world = World::new(Profile::Mainline72, kind, FolioSize::Base, Visibility::Private);
    let mut vcpu = world.vcpu();
    match vcpu.load(ipa(1), &mut seen) {
        Err(Exit::MemoryFault { ipa: found, expected, .. }) => {
            assert_eq!((found, expected), (ipa(1), Visibility::Shared));
        }
        other => panic!("{other:?}"),
    }
    world.convert(range(1, 1), Visibility::Shared).unwrap();
    vcpu.load(ipa(1), &mut seen).unwrap();
    world.sound();
    drop(vcpu);
    world.end();
}

#[test]
fn guests_of_both_kinds_share_a_pool() {
    let world = World::protected(Profile::Mainline72);
    let plain = GuestMemfd::builder(ByteSize::from_mib(2)).create(&world.pool).unwrap();
    let shared = GuestMemfd::builder(ByteSize::from_mib(1))
        .initial(Visibility::Shared)
        .create(&world.pool)
        .unwrap();
    let second = world.hyp.create_non_protected_vm().unwrap();
    second.bind(Gfn::new(0), &shared, shared.pages()).unwrap();
    drop(plain);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut vcpu = world.vcpu();
            for round in 0..200_u64 {
                vcpu.store_u64(ipa(round % 16), round).unwrap();
                assert_eq!(vcpu.load_u64(ipa(round % 16)).unwrap(), round);
                if round % 20 == 0 {
                    agreed(&mut vcpu, Hypercall::MemShare(ipa(100 + round)));
                }
            }
        });
        scope.spawn(|| {
            let mut vcpu = second.create_vcpu().unwrap();
            for round in 0..200_u64 {
                vcpu.store_u64(Ipa::new(round % 16 * PAGE), round).unwrap();
                let seen = vcpu.load_u64(Ipa::new(round % 16 * PAGE)).unwrap();
                assert!(seen == round || seen == 0, "somebody punches");
            }
        });
        scope.spawn(|| {
            for round in 0..200_u64 {
                shared.punch_hole(range(round % 16, 1)).unwrap();
            }
        });
    });
    let report = audit::check_under(&world.pool, &[&world.memfd, &shared], &world.hyp);
    assert_eq!(report.to_string(), "clean");
    drop((second, shared));
    world.end();
}
