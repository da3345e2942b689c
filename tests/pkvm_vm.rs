//! VMs on a pKVM, from the outside: its versions, guests that are not protected, and hosts that touch what is not theirs.

use std::sync::atomic::{AtomicU64, Ordering};

use gmem::addr::{ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::hyp::{
    Exit, HostStat, HvcResult, Hypercall, Hypervisor, IncidentStat, Profile, RawHost, RawOutcome,
    RawPath, Vcpu, Vm, VmKind,
};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PartSpec, PinMode, Visibility, Zone,
};

const PAGE: u64 = 4096;
const HUGE: u64 = 512;
/// Where guests see their objects: a block may begin there.
const BASE: u64 = 0x4000_0000;
const PROFILES: [Profile; 3] = [Profile::Mainline72, Profile::Android618, Profile::HugeProtected];

struct World {
    pool: FolioPool,
    hyp: Hypervisor,
    memfd: GuestMemfd,
    vm: Vm,
}

impl World {
    fn new(profile: Profile, kind: VmKind, folio: FolioSize, initial: Visibility) -> Self {
        let part = |mib| PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(mib));
        let pool = FolioPool::builder()
            .part(part(12), Zone::Normal)
            .part(part(8), Zone::Movable)
            .create()
            .unwrap();
        let hyp = Hypervisor::with(&pool, profile).unwrap();
        let memfd = GuestMemfd::builder(ByteSize::from_mib(4))
            .folio_size(folio)
            .initial(initial)
            .zones(&[Zone::Normal, Zone::Movable])
            .create(&pool)
            .unwrap();
        let vm = match kind {
            VmKind::Protected => hyp.create_vm().unwrap(),
            VmKind::NonProtected => hyp.create_non_protected_vm().unwrap(),
        };
        assert_eq!((vm.kind(), hyp.model()), (kind, profile.into()));
        vm.bind(Ipa::new(BASE).gfn(), &memfd, memfd.pages()).unwrap();
        Self { pool, hyp, memfd, vm }
    }

    fn protected(profile: Profile) -> Self {
        Self::new(profile, VmKind::Protected, FolioSize::Base, Visibility::Private)
    }

    fn plain(folio: FolioSize) -> Self {
        let kind = VmKind::NonProtected;
        Self::new(Profile::Mainline72, kind, folio, Visibility::Shared)
    }

    fn vcpu(&self) -> Vcpu {
        self.vm.create_vcpu().unwrap()
    }

    fn raw(&self) -> RawHost {
        self.hyp.raw_host()
    }

    fn convert(&self, range: PgoffRange, to: Visibility) -> Result<(), gmem::error::Error> {
        self.memfd.convert(range, to, ContentPolicy::Preserve).map(|_| ())
    }

    #[track_caller]
    fn sound(&self) {
        let report = audit::check_under(&self.pool, &[&self.memfd], &self.hyp);
        assert_eq!(report.to_string(), "clean");
    }

    /// Nothing is left, and nothing of anybody in it.
    #[track_caller]
    fn end(self) {
        let Self { pool, hyp, memfd, vm } = self;
        drop(vm);
        assert_eq!(hyp.stat(), HostStat::default());
        assert_eq!(audit::check_under(&pool, &[&memfd], &hyp).to_string(), "clean");
        drop(memfd);
        assert_eq!(pool.stat().free, pool.stat().capacity);
        assert_eq!(pool.verify_scrubbed().unwrap(), pool.stat().capacity);
    }
}

fn range(page: u64, nr: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(page), nr).unwrap()
}

fn ipa(page: u64) -> Ipa {
    Ipa::new(BASE + page * PAGE)
}

fn at(page: u64) -> Offset {
    Pgoff::new(page).offset()
}

fn pages(nr: u64) -> ByteSize {
    ByteSize::from_pages(nr)
}

/// The guest asks, and the VMM does it.
#[track_caller]
fn agreed(vcpu: &mut Vcpu, call: impl Into<gmem::hyp::Registers>) -> HvcResult {
    match vcpu.hvc(call) {
        Err(Exit::Conversion(request)) => drop(request.convert().unwrap()),
        other => panic!("no conversion was asked for: {other:?}"),
    }
    vcpu.answer().unwrap()
}

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
    let world = World::plain(FolioSize::Base);
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
    let world = World::plain(FolioSize::Huge2M);
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
        let world = World::plain(folio);
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
    let world = World::plain(FolioSize::Base);
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
