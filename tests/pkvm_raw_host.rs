//! A raw host on a pKVM: it touches what is not its own, and what becomes of that.

#[path = "common/guest_world.rs"]
#[expect(dead_code, reason = "guests here are protected")]
mod guest_world;

use std::sync::atomic::{AtomicU64, Ordering};

use gmem::error::{Errno, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::hyp::{Exit, HvcResult, Hypercall, IncidentStat, Profile, RawOutcome, RawPath, VmKind};
use gmem::{PinMode, Visibility};

use guest_world::{World, agreed, at, ipa, pages, range};

const HUGE: u64 = 512;

#[test]
fn a_raw_host_meets_el2_where_the_object_would_have_refused() {
    let world = World::protected(Profile::Mainline72);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), b"secret").unwrap();
    let mut seen = [0xee; 6];
    assert_eq!(world.memfd.read(at(1), &mut seen).unwrap_err().kind(), ErrorKind::NotShared);
    let raw = world.raw();
    let by = |path, seen: &mut [u8]| raw.load(path, &world.memfd, at(1), seen).unwrap();
    assert_eq!(by(RawPath::User, &mut seen), RawOutcome::Sigsegv);
    assert_eq!(by(RawPath::Uaccess, &mut seen), RawOutcome::Efault);
    assert_eq!(seen, [0xee; 6], "not a byte");
    let none = raw.load(RawPath::User, &world.memfd, at(9), &mut seen).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound, "nobody has touched it");
    // A device is stopped by nobody, and it is counted.
    assert_eq!(by(RawPath::Dma, &mut seen), RawOutcome::Done);
    assert_eq!(&seen, b"secret");
    assert_eq!(world.hyp.incidents().nr_dma_into_private, 1);
    // What the guest shares is the host's to see, by any way.
    agreed(&mut vcpu, Hypercall::MemShare(ipa(1)));
    for path in [RawPath::User, RawPath::Uaccess, RawPath::KernelAlias, RawPath::Dma] {
        seen = [0; 6];
        assert_eq!(by(path, &mut seen), RawOutcome::Done);
        assert_eq!(&seen, b"secret", "{path:?}");
    }
    world.sound();
    drop(vcpu);
    world.end();
    // In Android's, EL2's own IOMMU stops it.
    let world = World::protected(Profile::Android618);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), b"secret").unwrap();
    let stopped = world.raw().load(RawPath::Dma, &world.memfd, at(1), &mut seen).unwrap();
    assert_eq!(stopped, RawOutcome::DmaFault);
    // Of what is the host's alone the kernel has told it.
    world.convert(range(4, 1), Visibility::Shared).unwrap();
    world.memfd.write(at(4), b"host's").unwrap();
    for _ in 0..2 {
        let reached = world.raw().load(RawPath::Dma, &world.memfd, at(4), &mut seen).unwrap();
        assert_eq!((reached, &seen), (RawOutcome::Done, b"host's"));
    }
    // And it is told when that is over: the page can be the guest's.
    world.convert(range(4, 1), Visibility::Private).unwrap();
    vcpu.load(ipa(4), &mut seen).unwrap();
    let stopped = world.raw().load(RawPath::Dma, &world.memfd, at(4), &mut seen).unwrap();
    assert_eq!(stopped, RawOutcome::DmaFault);
    world.sound();
}

/// The hazard, and what is left of it: the bytes, and nothing else that anybody trusts in.
#[test]
fn a_kernels_pointer_destroys_a_page_and_no_more() {
    for (profile, folio) in [
        (Profile::Mainline72, FolioSize::Base),
        (Profile::Mainline72, FolioSize::Huge2M),
        (Profile::Android618, FolioSize::Huge2M),
        (Profile::HugeProtected, FolioSize::Huge2M),
    ] {
        let world = World::new(profile, VmKind::Protected, folio, Visibility::Private);
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(1), b"secret").unwrap();
        vcpu.store(ipa(2), b"neighbour").unwrap();
        vcpu.store(ipa(HUGE), b"far away").unwrap();
        let donated = world.hyp.stat().donated;
        let by_blocks = profile != Profile::Mainline72;
        let nr_lost = if by_blocks { HUGE } else { 1 };

        let mut seen = [0xee; 6];
        let raw = world.raw();
        let outcome = raw.load(RawPath::KernelAlias, &world.memfd, at(1), &mut seen).unwrap();
        assert_eq!((outcome, seen), (RawOutcome::Destroyed, [0; 6]), "zeroes, not the secret");
        assert_eq!(world.hyp.incidents().nr_destroyed, 1);
        assert_eq!(world.hyp.stat().donated, pages(donated.whole_pages() - nr_lost));
        world.sound();

        // The guest learns of it, as often as it asks.
        for _ in 0..2 {
            match vcpu.load(ipa(1), &mut seen) {
                Err(Exit::Poisoned { ipa: found }) => assert_eq!(found, ipa(1)),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(vcpu.store_u64(ipa(1), 1), Err(Exit::Poisoned { .. })));
        let share = vcpu.hvc(Hypercall::MemShare(ipa(1))).unwrap();
        assert_eq!(share, HvcResult::INVALID_PARAMETER);
        let neighbour = vcpu.load(ipa(2), &mut seen);
        match by_blocks {
            true => assert!(matches!(neighbour, Err(Exit::Poisoned { .. }))),
            false => assert_eq!((neighbour.is_ok(), &seen), (true, b"neighb")),
        }
        vcpu.load(ipa(HUGE), &mut seen).unwrap();
        assert_eq!(&seen, b"far aw");

        // To the object the page is as private as before, and stays so.
        assert_eq!(world.memfd.read(at(1), &mut seen).unwrap_err().kind(), ErrorKind::NotShared);
        let refused = world.convert(range(1, 1), Visibility::Shared).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.errno()),
            (ErrorKind::HypervisorRefused, Errno::EHWPOISON)
        );
        world.convert(range(1, 1), Visibility::Private).unwrap();
        // The kernel has its page by now, and nothing is destroyed a second time.
        let again = raw.store(RawPath::KernelAlias, &world.memfd, at(1), b"kernel's").unwrap();
        assert_eq!((again, world.hyp.incidents().nr_destroyed), (RawOutcome::Done, 1));
        assert!(matches!(vcpu.load(ipa(1), &mut seen), Err(Exit::Poisoned { .. })));
        world.sound();

        // It goes back to the pool like any other, cleared.
        drop(vcpu);
        world.end();
    }
}

#[test]
fn a_destroyed_page_can_be_punched_and_its_frame_used_again() {
    let world = World::protected(Profile::Mainline72);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), b"secret").unwrap();
    let raw = world.raw();
    raw.store(RawPath::KernelAlias, &world.memfd, at(1), b"kernel's").unwrap();
    world.memfd.punch_hole(range(1, 1)).unwrap();
    // Another page of the guest's gets the frame, and finds zeroes.
    for page in 2..64 {
        let mut seen = [1; 8];
        vcpu.load(ipa(page), &mut seen).unwrap();
        assert_eq!(seen, [0; 8]);
    }
    assert!(matches!(vcpu.load(ipa(1), &mut [0]), Err(Exit::Poisoned { .. })));
    world.sound();
    drop(vcpu);
    world.end();
}

#[test]
fn pins_keep_what_a_kernel_would_destroy() {
    let world = World::protected(Profile::Mainline72);
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), b"buffer").unwrap();
    let owner = world.memfd.register_owner("virtio-blk").unwrap();
    let incidents = || world.hyp.incidents();
    assert_eq!(incidents(), IncidentStat::default());

    // Without gmem's rules: the kernel reads a buffer that the guest has not shared, and destroys it.
    // With them it does not come to that: there is no pin to be had.
    let refused = world.memfd.pin(range(1, 1), owner, PinMode::Counted).unwrap_err();
    assert_eq!((refused.kind(), incidents().nr_pins_prevented), (ErrorKind::NotShared, 1));
    assert!(world.memfd.read(at(1), &mut [0; 6]).is_err());
    assert!(world.memfd.load_u64(at(1)).is_err());
    assert_eq!(incidents().nr_accesses_prevented, 2);

    // Shared and pinned, it stays shared as long as the kernel may come to it by its own pointer.
    agreed(&mut vcpu, Hypercall::MemShare(ipa(1)));
    let pin = world.memfd.pin(range(1, 1), owner, PinMode::Counted).unwrap();
    match vcpu.hvc(Hypercall::MemUnshare(ipa(1))) {
        Err(Exit::Conversion(request)) => {
            assert_eq!(request.convert().unwrap_err().kind(), ErrorKind::Busy);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    let mut seen = [0; 6];
    let by_kernel = world.raw().load(RawPath::KernelAlias, &world.memfd, at(1), &mut seen);
    assert_eq!((by_kernel.unwrap(), &seen), (RawOutcome::Done, b"buffer"));
    let counts = incidents();
    assert_eq!((counts.nr_conversions_prevented, counts.nr_destroyed), (1, 0));
    drop(pin);
    // Accesses that succeed are counted nowhere.
    world.memfd.read(at(1), &mut seen).unwrap();
    assert_eq!(incidents(), counts);
    drop(vcpu);
    world.end();
}

/// Whatever a kernel destroys in which moment, nobody is left with half of a page.
#[test]
fn a_raw_host_gets_in_everybodys_way() {
    const NR: u64 = 200;
    for (profile, folio) in [
        (Profile::Mainline72, FolioSize::Base),
        (Profile::Android618, FolioSize::Huge2M),
        (Profile::HugeProtected, FolioSize::Huge2M),
    ] {
        let world = &World::new(profile, VmKind::Protected, folio, Visibility::Private);
        // The page that all of them are at.
        let now = &AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(move || {
                    let mut vcpu = world.vcpu();
                    let (mut nr_lost, mut nr_converted) = (0, 0);
                    loop {
                        let page = now.load(Ordering::Relaxed);
                        if page == NR {
                            break;
                        }
                        match vcpu.store_u64(ipa(page), page) {
                            Ok(()) => {}
                            Err(Exit::Poisoned { .. }) => nr_lost += 1,
                            Err(other) => panic!("{other:?}"),
                        }
                        for call in
                            [Hypercall::MemShare(ipa(page)), Hypercall::MemUnshare(ipa(page))]
                        {
                            if let Err(Exit::Conversion(request)) = vcpu.hvc(call) {
                                // Refused if the page was destroyed, or the other vCPU was faster.
                                let _ = request.convert();
                                nr_converted += u64::from(vcpu.answer().unwrap().is_success());
                            }
                        }
                    }
                    println!("{profile:?}: {nr_lost} lost, {nr_converted} conversions");
                });
            }
            scope.spawn(move || {
                let raw = world.raw();
                let mut nr_destroyed = 0;
                for page in 0..NR {
                    std::thread::sleep(std::time::Duration::from_micros(300));
                    let mut seen = [0; 8];
                    match raw.load(RawPath::KernelAlias, &world.memfd, at(page), &mut seen) {
                        // It was shared just then, or nobody has it.
                        Ok(RawOutcome::Done) => {}
                        Ok(RawOutcome::Destroyed) => {
                            nr_destroyed += 1;
                            assert_eq!(seen, [0; 8]);
                        }
                        Ok(other) => panic!("{other:?}"),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
                    }
                    now.store(page + 1, Ordering::Relaxed);
                }
                assert_eq!(world.hyp.incidents().nr_destroyed, nr_destroyed);
                assert!(nr_destroyed > 0);
            });
        });
        world.sound();
    }
}
