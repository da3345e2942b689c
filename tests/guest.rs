//! A protected guest from the outside, under each hypervisor where a guest can ask for memory to change sides: a VMM,
//! its vCPUs, and conversions meanwhile.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset};
use gmem::error::ErrorKind;
use gmem::hyp::{Exit, HostStat, Hypercall, Hypervisor, Model, Vcpu, Vm};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, HostView, SigbusHandler, Touch};

const BASE: u64 = 0x8000_0000;

struct World {
    pool: FolioPool,
    hyp: Hypervisor,
    memfd: GuestMemfd,
    vm: Vm,
}

fn models() -> impl Iterator<Item = Model> {
    Model::ALL.into_iter().filter(|model| !model.fixes_sides())
}

fn world(backing: ArenaBacking, model: Model) -> World {
    let pool = FolioPool::new(backing, ByteSize::from_mib(8)).unwrap();
    let hyp = Hypervisor::with(&pool, model).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(4)).create(&pool).unwrap();
    let vm = hyp.create_vm().unwrap();
    vm.bind(Ipa::new(BASE).gfn(), &memfd, memfd.pages()).unwrap();
    World { pool, hyp, memfd, vm }
}

fn ipa(offset: u64) -> Ipa {
    Ipa::new(BASE + offset)
}

/// The guest asks, the VMM does what it asks for.
#[track_caller]
fn agreed(vcpu: &mut Vcpu, call: Hypercall) {
    match vcpu.hvc(call) {
        Err(Exit::Conversion(request)) => assert_eq!(request.convert().unwrap().changed_pages(), 1),
        other => panic!("no conversion was asked for: {other:?}"),
    }
    assert!(vcpu.answer().unwrap().is_success());
}

/// Everything is back, and nothing is left in it.
fn end(world: World) {
    let World { pool, hyp, memfd, vm } = world;
    drop(vm);
    assert_eq!(hyp.stat(), HostStat::default());
    drop(memfd);
    assert_eq!(pool.stat().free, pool.stat().capacity);
    assert_eq!(pool.verify_scrubbed().unwrap(), pool.stat().capacity);
}

#[test]
fn a_page_that_comes_and_goes_is_seen_whole_or_not_at_all() {
    models().for_each(a_page_comes_and_goes);
}

fn a_page_comes_and_goes(model: Model) {
    const COUNTER: u64 = 0;
    const TRAVELLER: u64 = 0x1000;
    const fn twice(half: u64) -> u64 {
        half << 32 | half
    }
    let world = world(ArenaBacking::Heap, model);
    let (memfd, vm) = (&world.memfd, &world.vm);
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut first = vm.create_vcpu().unwrap();
        first.store_u64(ipa(COUNTER), 0).unwrap();
        let second = scope.spawn(move || {
            let mut vcpu = vm.create_vcpu().unwrap();
            let mut nr = 0_u64;
            while nr == 0 || !stop.load(Ordering::Relaxed) {
                let now = vcpu.load_u64(ipa(COUNTER)).unwrap();
                if vcpu.compare_exchange_u64(ipa(COUNTER), now, now + 1).unwrap().is_ok() {
                    nr += 1;
                }
                let seen = vcpu.load_u64(ipa(TRAVELLER)).unwrap();
                assert_eq!(seen, twice(seen >> 32));
            }
            nr
        });
        let host = scope.spawn(move || {
            let mut nr = 0_u64;
            while nr == 0 || !stop.load(Ordering::Relaxed) {
                match memfd.load_u64(Offset::new(TRAVELLER)) {
                    Ok(seen) => {
                        assert_eq!(seen % 2, 0, "odd values are written while it is private");
                        nr += 1;
                    }
                    Err(error) => {
                        let kinds = [ErrorKind::NotShared, ErrorKind::Busy];
                        assert!(kinds.contains(&error.kind()), "{error}");
                    }
                }
            }
        });
        let mut nr_first = 0;
        for round in 0..400 {
            first.store_u64(ipa(TRAVELLER), twice(2 * round + 1)).unwrap();
            first.store_u64(ipa(TRAVELLER), twice(2 * round)).unwrap();
            agreed(&mut first, Hypercall::MemShare(ipa(TRAVELLER)));
            let now = first.load_u64(ipa(COUNTER)).unwrap();
            if first.compare_exchange_u64(ipa(COUNTER), now, now + 1).unwrap().is_ok() {
                nr_first += 1;
            }
            agreed(&mut first, Hypercall::MemUnshare(ipa(TRAVELLER)));
        }
        // Left shared, so that the host sees it once at least.
        agreed(&mut first, Hypercall::MemShare(ipa(TRAVELLER)));
        stop.store(true, Ordering::Relaxed);
        let nr_second = second.join().unwrap();
        host.join().unwrap();
        assert_eq!(first.load_u64(ipa(COUNTER)).unwrap(), nr_first + nr_second);
    });
    end(world);
}

fn touch(view: &HostView, at: u64) -> Touch {
    let handler = SigbusHandler::install().unwrap();
    view.touch(handler, Offset::new(at), Access::Read).unwrap()
}

#[test]
fn a_raw_pointer_follows_the_guests_wish() {
    if !common::require(Capability::Uffd) {
        return;
    }
    models().for_each(a_pointer_follows);
}

fn a_pointer_follows(model: Model) {
    let world = world(ArenaBacking::Memfd, model);
    let view = world.memfd.map_view().unwrap();
    let mut vcpu = world.vm.create_vcpu().unwrap();
    vcpu.store(ipa(0x5123), b"x").unwrap();
    assert!(matches!(touch(&view, 0x5123), Touch::Fault(fault) if fault.offset.get() == 0x5123));
    for _ in 0..3 {
        agreed(&mut vcpu, Hypercall::MemShare(ipa(0x5000)));
        assert_eq!(touch(&view, 0x5123), Touch::Byte(b'x'));
        assert!(matches!(touch(&view, 0x6000), Touch::Fault(_)), "the neighbour stays private");
        agreed(&mut vcpu, Hypercall::MemUnshare(ipa(0x5000)));
        assert!(matches!(touch(&view, 0x5123), Touch::Fault(_)));
    }
    let mut byte = [0];
    vcpu.load(ipa(0x5123), &mut byte).unwrap();
    assert_eq!(&byte, b"x");
    drop((vcpu, view));
    end(world);
}

#[test]
fn two_guests_of_one_pool_know_nothing_of_each_other() {
    models().for_each(two_guests);
}

fn two_guests(model: Model) {
    let world = world(ArenaBacking::Heap, model);
    let other = GuestMemfd::builder(ByteSize::from_mib(2)).create(&world.pool).unwrap();
    let second = world.hyp.create_vm().unwrap();
    second.bind(Gfn::new(BASE >> 12), &other, other.pages()).unwrap();
    let mut vcpus = [world.vm.create_vcpu().unwrap(), second.create_vcpu().unwrap()];
    for (i, vcpu) in vcpus.iter_mut().enumerate() {
        vcpu.store_u64(ipa(0x1000), 10 + i as u64).unwrap();
    }
    agreed(&mut vcpus[1], Hypercall::MemShare(ipa(0x1000)));
    assert_eq!(vcpus[0].load_u64(ipa(0x1000)).unwrap(), 10);
    assert_eq!(other.load_u64(Offset::new(0x1000)).unwrap(), 11);
    let hidden = world.memfd.load_u64(Offset::new(0x1000));
    assert_eq!(hidden.unwrap_err().kind(), ErrorKind::NotShared);
    drop(vcpus);
    second.teardown().unwrap();
    let left = world.vm.stat().owned;
    assert!(left >= ByteSize::from_pages(1), "the first goes on");
    assert_eq!(world.hyp.stat().donated, left);
    drop((second, other));
    end(world);
}
