//! The machine behind the guests: its kernel's pages, its CPUs, its limits, and what tells that something is wrong.

use super::*;
use crate::hyp::el2::MAX_VMS;
use crate::hyp::kernel::KernelPages;

/// All of the kernel's own pages, taken by somebody else.
fn kernel_pages(machine: &Machine, left: u64) -> Vec<u64> {
    let mut kernel = machine.kernel.lock();
    (left..kernel.nr()).map(|_| kernel.take(1).unwrap()).collect()
}

#[test]
fn without_memory_for_tables_nothing_is_given() {
    let world = World::with(Visibility::Shared);
    world.memfd.allocate(world.memfd.pages()).unwrap();
    let taken = kernel_pages(&world.machine, 1);
    let error = world.convert(0, NR_PAGES, Visibility::Private).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::ENOMEM));
    assert_eq!((world.donated(), world.host_reads(0)), (0, Ok(0)));
    let error = world.hyp.create_vm().unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Exhausted, Errno::ENOMEM));
    assert_eq!(world.vm.create_vcpu().unwrap_err().kind(), ErrorKind::Exhausted);
    world.sound();
    taken.into_iter().for_each(|at| world.machine.kernel.lock().give(at));
    world.convert(0, 16, Visibility::Private).unwrap();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(15), &[1]).unwrap();
    world.sound();
}

#[test]
fn the_kernel_has_all_of_its_pages_back() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(4)).unwrap();
    let (machine, hyp) = boot(&pool);
    let before = machine.kernel.lock().nr();
    for make in [Hypervisor::create_vm, Hypervisor::create_non_protected_vm] {
        let initial = Visibility::Shared;
        let object = GuestMemfd::builder(ByteSize::from_mib(2)).initial(initial).create(&pool);
        let object = object.unwrap();
        let vm = make(&hyp).unwrap();
        // Each page has tables of its own.
        for page in 0..64 {
            vm.bind(Gfn::new(page << 18), &object, range(page, 1)).unwrap();
        }
        if vm.kind() == VmKind::Protected {
            let _ = object.convert(object.pages(), Visibility::Private, PRESERVE).unwrap();
        }
        let mut vcpus: Vec<_> = (0..5).map(|_| vm.create_vcpu().unwrap()).collect();
        for page in 0..64 {
            vcpus[4].store(Gfn::new(page << 18).ipa(), &[1]).unwrap();
        }
        assert!(machine.kernel.lock().nr() < before - 128);
        drop(vcpus);
        drop(vm);
        assert_eq!((machine.kernel.lock().nr(), hyp.stat()), (before, HostStat::default()));
        assert_eq!(hyp.check_invariants(Vec::new()), Vec::<String>::new());
    }
}

/// More vCPUs than the machine has CPUs, at once and one after the other.
#[test]
fn vcpus_take_turns() {
    let world = World::new();
    let mut vcpus: Vec<_> = (0..80).map(|_| world.vcpu()).collect();
    for round in 0..3 {
        for (nr, vcpu) in vcpus.iter_mut().enumerate() {
            let at = ipa(nr as u64 % NR_PAGES);
            vcpu.store(at, &[nr as u8, round]).unwrap();
        }
        for (nr, vcpu) in vcpus.iter_mut().enumerate() {
            let mut seen = [0; 2];
            vcpu.load(ipa((nr as u64 + 1) % NR_PAGES), &mut seen).unwrap();
            assert_eq!(seen[1], round);
        }
        world.sound();
        // Numbers of those that are gone are used again.
        vcpus.truncate(40);
        vcpus.extend((0..40).map(|_| world.vcpu()));
    }
    assert_eq!(world.vm.stat().owned, ByteSize::from_pages(NR_PAGES));
}

#[test]
fn there_is_room_for_so_many() {
    let world = World::new();
    let mut vms: Vec<Vm> = Vec::new();
    let refused = loop {
        match world.hyp.create_vm() {
            Ok(vm) => vms.push(vm),
            Err(error) => break error,
        }
    };
    assert_eq!((vms.len() + 1, refused.kind()), (MAX_VMS, ErrorKind::Exhausted));
    vms.pop();
    vms.push(world.hyp.create_vm().unwrap());
    let mut vcpus = Vec::new();
    let refused = loop {
        match world.vm.create_vcpu() {
            Ok(vcpu) => vcpus.push(vcpu),
            Err(error) => break error,
        }
    };
    assert_eq!((vcpus.len(), refused.kind()), (512, ErrorKind::Saturated));
}

#[test]
fn the_invariants_notice_what_is_wrong() {
    for state in [State::Owned, State::SharedBorrowed, State::SharedOwned] {
        let world = World::new();
        world.vcpu().store(ipa(1), &[1]).unwrap();
        world.sound();
        let mut frames = Vec::new();
        world.hyp.each_frame_of_guests(|pfn, _| frames.push(pfn));
        let [pfn] = frames[..] else { panic!("{frames:?}") };
        world.machine.el2.mistake(pfn, state);
        assert_ne!(world.hyp.check_invariants(Vec::new()), Vec::<String>::new(), "{state:?}");
    }
}

/// A handle that is free is another's at once, whatever the one before still has to do.
#[test]
fn handles_are_used_again_while_machines_come_and_go() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(1)).unwrap();
    let hyp = &Hypervisor::new(&pool).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(move || {
                for _ in 0..60 {
                    let vm = hyp.create_vm().unwrap();
                    std::thread::yield_now();
                    // It is there, and nobody else has taken it away.
                    assert_ne!(hyp.stat().nr_vms, 0);
                    assert_eq!(vm.create_vcpu().map(drop).map_err(|error| error.errno()), Ok(()));
                    drop(vm);
                }
            });
        }
    });
    assert_eq!((hyp.stat().nr_vms, hyp.check_invariants(Vec::new())), (0, Vec::new()));
}
