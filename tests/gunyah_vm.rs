//! VMs on a Gunyah, from the outside: what is lent and what is shared, who asked for it, and what comes back.

#[path = "common/guest_world.rs"]
mod guest_world;

use gmem::addr::{ByteSize, Gfn, Ipa};
use gmem::error::{Errno, Error, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::hyp::{
    Exit, HvcResult, Hypercall, MemslotId, Model, RawOutcome, RawPath, SharedMemory, VmKind,
};
use gmem::{ContentPolicy, PinMode, Visibility, Zone};

use guest_world::{BASE, PAGE, World, agreed, at, ipa, pages, range};

const SECRET: &[u8] = b"the guest's alone";
const FIRST_SLOT: Option<MemslotId> = MemslotId::from_u16(0);

fn dynamic() -> World {
    World::protected(SharedMemory::Dynamic)
}

fn found(world: &World, page: u64) -> Result<Vec<u8>, ErrorKind> {
    let mut bytes = vec![0xa5; SECRET.len()];
    world.memfd.read(at(page), &mut bytes).map_err(|error| error.kind())?;
    Ok(bytes)
}

fn why(outcome: Result<(), Error>) -> (ErrorKind, Errno) {
    let error = outcome.unwrap_err();
    (error.kind(), error.errno())
}

/// Gunyah clears nothing that nobody asks it to clear. What a guest has not asked for is none of these: it is cleared.
#[test]
fn what_the_guest_has_not_asked_for_comes_back_cleared() {
    let zeroes = vec![0; SECRET.len()];
    type TakesBack = fn(&World);
    let ways: [(&str, TakesBack); 2] = [
        ("unbind", |world| world.vm.unbind(FIRST_SLOT.unwrap()).unwrap()),
        ("teardown", |world| world.vm.teardown().unwrap()),
    ];
    for (way, take_back) in ways {
        let world = dynamic();
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(3), SECRET).unwrap();
        vcpu.store(ipa(4), SECRET).unwrap();
        agreed(&mut vcpu, Hypercall::MemShare(ipa(4)));
        drop(vcpu);
        assert_eq!(found(&world, 3), Err(ErrorKind::NotShared));
        take_back(&world);
        // No guest is there any more whose word would be needed.
        world.convert(range(3, 1), Visibility::Shared).unwrap();
        assert_eq!(found(&world, 3), Ok(zeroes.clone()), "{way}");
        assert_eq!(found(&world, 4), Ok(SECRET.to_vec()), "{way}: the host saw it anyway");
        world.sound();
        world.end();
    }
    // A punch, while the guest lives and after it was refused nothing.
    let world = dynamic();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(3), SECRET).unwrap();
    let used = world.pool.stat().used.whole_pages();
    let _ = world.memfd.punch_hole(range(3, 1)).unwrap();
    assert_eq!(world.pool.stat().used.whole_pages(), used - 1);
    assert_eq!(world.vm.stat().owned, pages(0));
    world.pool.verify_scrubbed().unwrap();
    let mut bytes = vec![1; SECRET.len()];
    vcpu.load(ipa(3), &mut bytes).unwrap();
    assert_eq!(bytes, zeroes);
    drop(vcpu);
    world.sound();
    world.end();
}

#[test]
fn what_the_guest_asks_for_keeps_its_bytes() {
    let world = dynamic();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(7), SECRET).unwrap();
    assert_eq!((world.vm.stat().owned, world.vm.stat().shared), (pages(1), pages(0)));
    // Nobody but the guest may ask.
    let refused = why(world.convert(range(7, 1), Visibility::Shared));
    assert_eq!(refused, (ErrorKind::HypervisorRefused, Errno::EPERM));
    for _ in 0..3 {
        assert!(agreed(&mut vcpu, Hypercall::MemShare(ipa(7))).is_success());
        assert_eq!(found(&world, 7), Ok(SECRET.to_vec()));
        assert_eq!((world.vm.stat().owned, world.vm.stat().shared), (pages(0), pages(1)));
        assert_eq!(world.hyp.stat().borrowed, pages(1));
        let refused = why(world.convert(range(7, 1), Visibility::Private));
        assert_eq!(refused, (ErrorKind::HypervisorRefused, Errno::EPERM));
        world.sound();
        assert!(agreed(&mut vcpu, Hypercall::MemUnshare(ipa(7))).is_success());
        assert_eq!(found(&world, 7), Err(ErrorKind::NotShared));
    }
    let mut bytes = vec![0; SECRET.len()];
    vcpu.load(ipa(7), &mut bytes).unwrap();
    assert_eq!(bytes, SECRET);
    drop(vcpu);
    world.sound();
    world.end();
}

/// Both sides are there for a protected guest: it touches what is shared, and has it with the host.
#[test]
fn what_is_shared_is_provided_like_what_is_lent() {
    for policy in [SharedMemory::Dynamic, SharedMemory::Static] {
        let kind = VmKind::Protected;
        let world = World::new(policy, kind, FolioSize::Base, Visibility::Shared);
        world.memfd.write(at(1), b"from the host").unwrap();
        let mut vcpu = world.vcpu();
        let mut bytes = [0; 13];
        vcpu.load(ipa(1), &mut bytes).unwrap();
        assert_eq!(&bytes, b"from the host");
        vcpu.store(ipa(1), SECRET).unwrap();
        assert_eq!(found(&world, 1), Ok(SECRET.to_vec()));
        assert_eq!(world.vm.stat().shared, pages(1));
        drop(vcpu);
        world.sound();
        world.end();
    }
}

#[test]
fn memory_that_is_pinned_is_not_lent() {
    let world = dynamic();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(0), SECRET).unwrap();
    agreed(&mut vcpu, Hypercall::MemShare(ipa(0)));
    let owner = world.memfd.register_owner("device").unwrap();
    let pin = world.memfd.pin(range(0, 1), owner, PinMode::Counted).unwrap();
    match vcpu.hvc(Hypercall::MemUnshare(ipa(0))) {
        Err(Exit::Conversion(request)) => {
            assert_eq!(request.convert().unwrap_err().kind(), ErrorKind::Busy);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    assert_eq!(world.vm.stat().shared, pages(1));
    assert_eq!(world.hyp.incidents().nr_conversions_prevented, 1);
    drop(pin);
    assert!(agreed(&mut vcpu, Hypercall::MemUnshare(ipa(0))).is_success());
    drop(vcpu);
    world.sound();
    world.end();
}

/// Every way to touch what is lent ends as the model says, and nothing of the guest's is lost by it.
#[test]
fn nothing_is_taken_by_force() {
    for model in [SharedMemory::Dynamic, SharedMemory::Static].map(Model::from) {
        let world = World::protected(model);
        let (mut vcpu, raw) = (world.vcpu(), world.raw());
        vcpu.store(ipa(2), SECRET).unwrap();
        let paths = [RawPath::User, RawPath::Uaccess, RawPath::KernelAlias, RawPath::Dma];
        let ends = [RawOutcome::Sigbus, RawOutcome::Efault, RawOutcome::Oops, RawOutcome::DmaFault];
        for (by, end) in paths.into_iter().zip(ends) {
            let mut bytes = [0xa5; 4];
            assert_eq!(raw.load(by, &world.memfd, at(2), &mut bytes).unwrap(), end);
            assert_eq!(bytes, [0xa5; 4]);
            assert_eq!(raw.store(by, &world.memfd, at(2), b"spoilt").unwrap(), end);
            assert_eq!(model.answer_to_stray(by), end);
        }
        let mut bytes = vec![0; SECRET.len()];
        vcpu.load(ipa(2), &mut bytes).unwrap();
        assert_eq!(bytes, SECRET);
        let seen = world.hyp.incidents();
        assert_eq!((seen.nr_oopses, seen.nr_destroyed, seen.nr_dma_into_private), (2, 0, 0));
        drop(vcpu);
        world.sound();
        world.end();
    }
}

/// The shared region of a static guest: bound so, for good.
fn with_region() -> (World, MemslotId) {
    let world = World::protected(SharedMemory::Static);
    world.vm.unbind(FIRST_SLOT.unwrap()).unwrap();
    world.convert(range(8, 8), Visibility::Shared).unwrap();
    let gfn = Ipa::new(BASE).gfn();
    let slot = world.vm.bind(gfn, &world.memfd, world.memfd.pages()).unwrap();
    (world, slot)
}

#[test]
fn a_static_region_is_neither_left_nor_joined() {
    let (world, slot) = with_region();
    let refused = (ErrorKind::HypervisorRefused, Errno::EOPNOTSUPP);
    let mut vcpu = world.vcpu();
    for has_memory in [false, true] {
        // Out of it, into it, and across both of its ends.
        for (pages, to) in [
            (range(8, 1), Visibility::Private),
            (range(15, 1), Visibility::Private),
            (range(7, 1), Visibility::Shared),
            (range(16, 1), Visibility::Shared),
            (range(7, 3), Visibility::Private),
            (range(15, 2), Visibility::Shared),
        ] {
            assert_eq!(why(world.convert(pages, to)), refused, "{pages} {to} {has_memory}");
        }
        // What is so already is no conversion.
        world.convert(range(8, 8), Visibility::Shared).unwrap();
        world.convert(range(0, 8), Visibility::Private).unwrap();
        (0..24).for_each(|page| vcpu.store(ipa(page), SECRET).unwrap());
    }
    assert_eq!((world.vm.stat().owned, world.vm.stat().shared), (pages(16), pages(8)));
    world.sound();
    drop(vcpu);
    // The region is one of the memslot: without it the object is anybody's to convert.
    world.vm.unbind(slot).unwrap();
    world.convert(range(8, 8), Visibility::Private).unwrap();
    world.end();
}

#[test]
fn a_guest_may_ask_a_static_hypervisor_for_what_is_so() {
    let (world, _) = with_region();
    let mut vcpu = world.vcpu();
    for (page, call) in [
        (9, Hypercall::MemShare as fn(Ipa) -> Hypercall),
        (1, Hypercall::MemUnshare as fn(Ipa) -> Hypercall),
    ] {
        vcpu.store(ipa(page), SECRET).unwrap();
        assert_eq!(vcpu.hvc(call(ipa(page))).unwrap(), HvcResult::SUCCESS);
    }
    // Also for what it has not touched yet.
    assert_eq!(vcpu.hvc(Hypercall::MemShare(ipa(10))).unwrap(), HvcResult::SUCCESS);
    for (page, call) in [(1, Hypercall::MemShare(ipa(1))), (9, Hypercall::MemUnshare(ipa(9)))] {
        match vcpu.hvc(call) {
            Err(Exit::Conversion(request)) => {
                let error = request.convert().unwrap_err();
                assert_eq!(error.errno(), Errno::EOPNOTSUPP, "{page}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    }
    drop(vcpu);
    world.sound();
    world.end();
}

#[test]
fn what_is_shared_moves_and_what_is_lent_stays() {
    let world = dynamic();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(0), SECRET).unwrap();
    vcpu.store(ipa(1), SECRET).unwrap();
    agreed(&mut vcpu, Hypercall::MemShare(ipa(1)));
    let moved = world.memfd.migrate(range(0, 2), Zone::Movable).unwrap();
    assert_eq!(moved.moved, pages(1));
    let [(refused, why)] = &moved.refused[..] else { panic!("{moved:?}") };
    assert_eq!((*refused, why.errno()), (range(0, 1), Errno::EOPNOTSUPP));
    for page in [0, 1] {
        let mut bytes = vec![0; SECRET.len()];
        vcpu.load(ipa(page), &mut bytes).unwrap();
        assert_eq!(bytes, SECRET);
    }
    drop(vcpu);
    world.sound();
    world.end();
}

#[test]
fn a_folio_is_lent_and_shared_as_one() {
    for (kind, initial) in
        [(VmKind::Protected, Visibility::Private), (VmKind::NonProtected, Visibility::Shared)]
    {
        let world = World::new(SharedMemory::Dynamic, kind, FolioSize::Huge2M, initial);
        world.memfd.allocate(world.memfd.pages()).unwrap();
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(700), SECRET).unwrap();
        let stat = world.vm.stat();
        assert_eq!(stat.owned.max(stat.borrowed), ByteSize::from_mib(2));
        let nr_tables = stat.nr_tables;
        vcpu.store(ipa(3), SECRET).unwrap();
        assert_eq!(world.vm.stat().nr_tables, nr_tables, "no table of pages");
        if kind == VmKind::Protected {
            // A page of it turns, and the others stay.
            agreed(&mut vcpu, Hypercall::MemShare(ipa(701)));
            assert_eq!(world.vm.stat().shared, pages(1));
            assert_eq!(world.vm.stat().owned, pages(1023));
            let mut bytes = vec![0; SECRET.len()];
            vcpu.load(ipa(700), &mut bytes).unwrap();
            assert_eq!(bytes, SECRET);
        }
        drop(vcpu);
        world.sound();
        world.end();
    }
}

#[test]
fn a_guest_that_is_not_protected_has_nothing_to_itself() {
    for policy in [SharedMemory::Dynamic, SharedMemory::Static] {
        let world = World::plain(policy, FolioSize::Base);
        let mut vcpu = world.vcpu();
        vcpu.store(ipa(1), SECRET).unwrap();
        assert_eq!(found(&world, 1), Ok(SECRET.to_vec()));
        assert_eq!((world.vm.stat().borrowed, world.hyp.stat().shown), (pages(1), pages(1)));
        for page in [1, 5] {
            let refused = why(world.convert(range(page, 1), Visibility::Private));
            assert_eq!(refused, (ErrorKind::HypervisorRefused, Errno::EOPNOTSUPP));
        }
        // The host may have it back at any time.
        let _ = world.memfd.punch_hole(range(1, 1)).unwrap();
        let mut bytes = [1];
        vcpu.load(ipa(1), &mut bytes).unwrap();
        assert_eq!(bytes, [0]);
        drop(vcpu);
        world.sound();
        world.end();
    }
}

/// What a page is prepared with the guest finds, whatever it had there.
#[test]
fn a_conversion_may_zero_what_it_turns() {
    let world = dynamic();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(4), SECRET).unwrap();
    match vcpu.hvc(Hypercall::MemShare(ipa(4))) {
        Err(Exit::Conversion(request)) => {
            let zero = ContentPolicy::Zero;
            let _ = world.memfd.convert(request.pages, request.to, zero).unwrap();
        }
        other => panic!("{other:?}"),
    }
    assert!(vcpu.answer().unwrap().is_success());
    assert_eq!(found(&world, 4), Ok(vec![0; SECRET.len()]));
    drop(vcpu);
    world.sound();
    world.end();
}

#[test]
fn machines_come_and_go() {
    let world = dynamic();
    let before = world.hyp.stat();
    let mut vms = Vec::new();
    let refused = loop {
        match world.hyp.create_vm() {
            Ok(vm) => vms.push(vm),
            Err(error) => break error,
        }
        assert!(vms.len() < 1000, "there is an end");
    };
    assert_eq!(refused.kind(), ErrorKind::HypervisorRefused);
    assert_eq!(world.hyp.stat().nr_vms, before.nr_vms + vms.len());
    let nr = vms.len();
    vms.clear();
    vms.extend((0..nr).map(|_| world.hyp.create_vm().unwrap()));
    drop(vms);
    assert_eq!(world.hyp.stat(), before);
    // Beyond its addresses a guest has nothing, and is told so.
    let mut vcpu = world.vcpu();
    let beyond = Gfn::new(1 << 28).ipa();
    assert!(matches!(vcpu.store(beyond, &[1]), Err(Exit::Mmio { .. })));
    assert_eq!(vcpu.hvc(Hypercall::MemShare(beyond)).unwrap(), HvcResult::INVALID_PARAMETER);
    let unit = vcpu.hvc(Hypercall::HypMeminfo).unwrap().regs();
    assert_eq!(unit.0, [PAGE, 0, 0, 0]);
    drop(vcpu);
    world.end();
}
