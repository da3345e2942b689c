//! A guest that uses up Gunyah's memory for tables: it gets no more, and what it has can be taken back all the same.

use gmem::addr::{ByteSize, Gfn, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::hyp::{
    Exit, Hypercall, Hypervisor, MemslotId, RawOutcome, RawPath, SharedMemory, Vcpu, Vm,
};
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, Visibility};

const POOL: ByteSize = ByteSize::from_mib(48);
/// A table of pages for each page.
const APART: u64 = 512;
const HUGE_AT: Gfn = Gfn::new(1 << 18);

struct World {
    pool: FolioPool,
    hypervisor: Hypervisor,
    /// In pieces of a page each, as far apart as it takes.
    scattered: GuestMemfd,
    /// In one piece.
    huge: GuestMemfd,
    vm: Vm,
    nr: u16,
}

fn range(start: u64, nr: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr).unwrap()
}

fn far(nth: u16) -> Gfn {
    Gfn::new((1 << 20) + u64::from(nth) * APART)
}

fn slot(nr: u16) -> MemslotId {
    MemslotId::from_u16(nr).unwrap()
}

impl World {
    /// The guest has touched pages until there were no tables for more. A block that the host sees too it had first.
    fn used_up(initial: Visibility) -> (Self, Vcpu) {
        let pool = FolioPool::new(ArenaBacking::Heap, POOL).unwrap();
        let hypervisor = Hypervisor::with(&pool, SharedMemory::Dynamic).unwrap();
        let object = |mib, folio, initial| {
            let builder = GuestMemfd::builder(ByteSize::from_mib(mib)).folio_size(folio);
            builder.initial(initial).create(&pool).unwrap()
        };
        let huge = object(4, FolioSize::Huge2M, Visibility::Shared);
        huge.allocate(huge.pages()).unwrap();
        let scattered = object(36, FolioSize::Base, initial);
        let vm = hypervisor.create_vm().unwrap();
        let mut vcpu = vm.create_vcpu().unwrap();
        vm.bind_slot(slot(30_000), HUGE_AT, &huge, huge.pages()).unwrap();
        vcpu.store(HUGE_AT.ipa(), b"x").unwrap();
        let mut world = Self { pool, hypervisor, scattered, huge, vm, nr: 0 };
        loop {
            let page = range(u64::from(world.nr), 1);
            world.vm.bind_slot(slot(world.nr), far(world.nr), &world.scattered, page).unwrap();
            match vcpu.store(far(world.nr).ipa(), b"secret") {
                Ok(()) => world.nr += 1,
                Err(Exit::Failed(error)) => {
                    assert_eq!(error.errno(), Errno::ENOMEM);
                    return (world, vcpu);
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    fn sound(&self) {
        let objects = [&self.scattered, &self.huge];
        let report = audit::check_under(&self.pool, &objects, &self.hypervisor);
        assert!(report.is_clean(), "{report}");
    }
}

#[test]
fn what_was_lent_comes_back_and_the_next_guest_has_it() {
    let (world, vcpu) = World::used_up(Visibility::Private);
    assert!(world.nr > 1000);
    // While it lives, in pieces and cleared.
    world.scattered.punch_hole(range(0, 8)).unwrap();
    world.vm.unbind(slot(9)).unwrap();
    world.sound();
    drop(vcpu);
    world.vm.teardown().unwrap();
    world.sound();
    let World { pool, hypervisor, scattered, huge, .. } = world;
    drop((scattered, huge));
    assert_eq!(pool.stat().free, POOL);

    let size = ByteSize::from_mib(46);
    let next = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
    next.allocate(next.pages()).unwrap();
    let raw = hypervisor.raw_host();
    for page in next.pages().iter() {
        let mut seen = [1; 6];
        let outcome = raw.load(RawPath::User, &next, page.offset(), &mut seen).unwrap();
        assert_eq!((outcome, seen), (RawOutcome::Done, [0; 6]), "{page:?}");
    }
    let vm = hypervisor.create_vm().unwrap();
    vm.bind(Gfn::new(0), &next, next.pages()).unwrap();
    vm.create_vcpu().unwrap().store(Gfn::new(5).ipa(), b"here").unwrap();
    let report = audit::check_under(&pool, &[&next], &hypervisor);
    assert!(report.is_clean(), "{report}");
}

#[test]
fn what_is_shared_can_be_hidden() {
    let (world, mut vcpu) = World::used_up(Visibility::Shared);
    world.scattered.punch_hole(range(3, 1)).unwrap();
    let at = Offset::new(9 << 12);
    world.scattered.report_memory_failure(at).unwrap();
    let after = vcpu.load(far(9).ipa(), &mut [0]);
    assert!(after.is_err(), "the guest has failed memory still: {after:?}");
    world.sound();
    drop(vcpu);
    world.vm.teardown().unwrap();
    world.sound();
}

#[test]
fn what_turns_and_what_is_new_come_together_or_not_at_all() {
    let (world, mut vcpu) = World::used_up(Visibility::Private);
    let asked = Gfn::new(HUGE_AT.get() + APART - 1);
    let mut nr_refused = 0;
    for given_up in 0..world.nr {
        match vcpu.hvc(Hypercall::MemUnshare(asked.ipa())) {
            Err(Exit::Conversion(_)) => {}
            other => panic!("{other:?}"),
        }
        // A page of the block, and one behind it that the guest has not touched.
        let both = range(APART - 1, 2);
        let done = world.huge.convert(both, Visibility::Private, ContentPolicy::Preserve);
        let _ = vcpu.answer();
        world.sound();
        let Err(error) = done else { break };
        assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::ENOMEM));
        nr_refused += 1;
        world.huge.read(Pgoff::new(APART - 1).offset(), &mut [0]).unwrap();
        world.vm.unbind(slot(given_up)).unwrap();
    }
    assert!(nr_refused > 1 && nr_refused < 64, "refused {nr_refused} times");
    let private = world.huge.read(Pgoff::new(APART - 1).offset(), &mut [0]).unwrap_err();
    assert_eq!(private.kind(), ErrorKind::NotShared);
    drop(vcpu);
    world.vm.teardown().unwrap();
    world.sound();
}
