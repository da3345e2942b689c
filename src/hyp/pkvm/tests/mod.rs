mod machine;
#[cfg(debug_assertions)]
mod order;
mod pieces;
mod random;

use super::*;
use crate::addr::{Access, Gfn, Ipa, Offset, Pgoff};
use crate::backing::ArenaBacking;
use crate::error::{Error, ErrorKind};
use crate::folio::FolioPool;
use crate::gmem::{ContentPolicy, GuestMemfd, PinMode};
use crate::hyp::{
    ConversionRequest, Exit, HostStat, HvcResult, Hypercall, Hypervisor, MmioAccess, Model, Vcpu,
    Vm, VmKind, VmStat,
};
use crate::range::PgoffRange;
use crate::stage2::GuestRun;

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const NR_PAGES: u64 = 32;
/// Where the guest sees the object.
const BASE: u64 = 0x80;

/// A pool, a hypervisor, an object that is private at first, and a guest that has all of it.
struct World {
    pool: FolioPool,
    machine: Arc<Machine>,
    hyp: Hypervisor,
    memfd: GuestMemfd,
    vm: Vm,
}

impl World {
    fn new() -> Self {
        Self::with(Visibility::Private)
    }

    fn with(initial: Visibility) -> Self {
        let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(2 * NR_PAGES)).unwrap();
        let (machine, hyp) = boot(&pool);
        let memfd = GuestMemfd::builder(ByteSize::from_pages(NR_PAGES))
            .initial(initial)
            .create(&pool)
            .unwrap();
        let vm = hyp.create_vm().unwrap();
        vm.bind(Gfn::new(BASE), &memfd, memfd.pages()).unwrap();
        Self { pool, machine, hyp, memfd, vm }
    }

    fn vcpu(&self) -> Vcpu {
        self.vm.create_vcpu().unwrap()
    }

    fn convert(&self, page: u64, nr: u64, to: Visibility) -> Result<(), Error> {
        self.memfd.convert(range(page, nr), to, PRESERVE).map(|_| ())
    }

    fn host_reads(&self, page: u64) -> Result<u8, ErrorKind> {
        let mut byte = [0];
        match self.memfd.read(Pgoff::new(page).offset(), &mut byte) {
            Ok(()) => Ok(byte[0]),
            Err(error) => Err(error.kind()),
        }
    }

    #[track_caller]
    fn sound(&self) {
        assert_eq!(self.hyp.check_invariants(Vec::new()), Vec::<String>::new());
        let frames = self.memfd.frames();
        self.hyp.each_frame_of_guests(|pfn, visibility| {
            assert!(frames.contains(&(pfn, visibility)), "{pfn:?} {visibility}");
        });
    }

    fn donated(&self) -> u64 {
        self.hyp.stat().donated.whole_pages()
    }

    fn borrowed(&self) -> u64 {
        self.hyp.stat().borrowed.whole_pages()
    }
}

/// A hypervisor, and what is behind it.
fn boot(pool: &FolioPool) -> (Arc<Machine>, Hypervisor) {
    let mut behind = None;
    let hyp = Hypervisor::of(pool, Model::default(), |arena| {
        let machine = Machine::boot(Profile::default(), arena)?;
        behind = Some(Arc::clone(&machine));
        Ok(machine)
    });
    (behind.unwrap(), hyp.unwrap())
}

/// A guest as this hypervisor has it.
fn core_of(vm: &Vm) -> Arc<VmCore> {
    Arc::clone(&vm.0.guest).as_any().downcast().unwrap()
}

fn range(page: u64, nr: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(page), nr).unwrap()
}

fn ipa(page: u64) -> Ipa {
    Gfn::new(BASE + page).ipa()
}

#[track_caller]
fn asked(result: Result<HvcResult, Exit>) -> ConversionRequest {
    match result {
        Err(Exit::Conversion(request)) => request,
        other => panic!("no conversion was asked for: {other:?}"),
    }
}

/// The guest shares or unshares, and the VMM agrees.
#[track_caller]
fn agreed(vcpu: &mut Vcpu, call: Hypercall) {
    asked(vcpu.hvc(call)).convert().unwrap();
    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);
}

#[test]
fn memory_is_given_when_it_is_touched() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    let mut byte = [1];
    vcpu.load(ipa(3), &mut byte).unwrap();
    assert_eq!((byte, world.donated()), ([0], 1));
    vcpu.store(ipa(3), b"secret").unwrap();
    assert_eq!(world.donated(), 1);
    let mut back = [0; 6];
    vcpu.load(ipa(3), &mut back).unwrap();
    assert_eq!(&back, b"secret");
    assert_eq!(world.host_reads(3), Err(ErrorKind::NotShared));
    world.sound();
}

#[test]
fn a_payload_is_there_when_the_guest_starts() {
    let world = World::with(Visibility::Shared);
    world.memfd.write(Offset::new(0x1ffe), b"boot").unwrap();
    world.convert(0, NR_PAGES, Visibility::Private).unwrap();
    assert_eq!(world.donated(), 2, "pages without a folio are given when they are touched");
    let mut vcpu = world.vcpu();
    let mut boot = [0; 4];
    vcpu.load(Ipa::new(ipa(1).get() + 0xffe), &mut boot).unwrap();
    assert_eq!(&boot, b"boot");
    assert_eq!(world.host_reads(1), Err(ErrorKind::NotShared));
    world.sound();
}

#[test]
fn accesses_cross_pages_one_by_one() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    let data: Vec<u8> = (0..=255).cycle().take(3 * 4096).collect();
    let at = Ipa::new(ipa(1).get() + 100);
    vcpu.store(at, &data).unwrap();
    let mut back = vec![0; data.len()];
    vcpu.load(at, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(world.donated(), 4);
    vcpu.load(at, &mut []).unwrap();
    // The last page of the slot and the first behind it.
    let end = Ipa::new(ipa(NR_PAGES).get() - 2);
    match vcpu.store(end, b"abcd") {
        Err(Exit::Mmio { ipa: at, access }) => {
            assert_eq!(at, ipa(NR_PAGES));
            assert_eq!(access, MmioAccess::Write(b"cd".to_vec()));
        }
        other => panic!("{other:?}"),
    }
    let mut tail = [0; 2];
    vcpu.load(end, &mut tail).unwrap();
    assert_eq!(&tail, b"ab", "what lies before the exit is done");
    world.sound();
}

#[test]
fn no_address_is_without_an_answer() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    for at in [0, 0x7_ffff, 1 << 40, 1 << 52, i64::MAX as u64, u64::MAX - 7, u64::MAX] {
        let at = Ipa::new(at);
        let mut buf = [0; 16];
        assert!(matches!(vcpu.load(at, &mut buf), Err(Exit::Mmio { ipa, .. }) if ipa == at));
        assert!(matches!(vcpu.store(at, &buf), Err(Exit::Mmio { ipa, .. }) if ipa == at));
        let aligned = Ipa::new(at.get() & !7);
        let atomic = vcpu.load_u64(aligned);
        assert!(matches!(atomic, Err(Exit::Mmio { access: MmioAccess::Atomic(_), .. })));
    }
    assert_eq!(world.donated(), 0);
}

#[test]
fn atomics_are_aligned_or_refused() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    let at = Ipa::new(ipa(2).get() + 8);
    vcpu.store_u64(at, 7).unwrap();
    assert_eq!(vcpu.compare_exchange_u64(at, 7, 8).unwrap(), Ok(7));
    assert_eq!(vcpu.compare_exchange_u64(at, 7, 9).unwrap(), Err(8));
    assert_eq!(vcpu.load_u64(at).unwrap(), 8);
    for odd in [1, 4, 7] {
        let at = Ipa::new(at.get() + odd);
        let refused = vcpu.load_u64(at);
        assert!(
            matches!(refused, Err(Exit::Failed(error)) if error.kind() == ErrorKind::Unaligned)
        );
    }
}

#[test]
fn shared_memory_is_not_what_a_protected_guest_expects() {
    let world = World::with(Visibility::Shared);
    let mut vcpu = world.vcpu();
    world.memfd.write(Offset::new(0x5000), b"hello").unwrap();
    let at = Ipa::new(ipa(5).get() + 1);
    match vcpu.store(at, b"J") {
        Err(Exit::MemoryFault { ipa, size, access, expected }) => {
            assert_eq!((ipa, size), (at, ByteSize::from_bytes(1)));
            assert_eq!((access, expected), (Access::Write, Visibility::Private));
        }
        other => panic!("{other:?}"),
    }
    // The VMM resolves it as KVM's would: by a conversion, then the guest tries again.
    let (memfd, offset) = world.vm.memslot(at).unwrap();
    let page = PgoffRange::single(offset.pgoff()).unwrap();
    let _ = memfd.convert(page, Visibility::Private, PRESERVE).unwrap();
    vcpu.store(at, b"J").unwrap();
    let mut back = [0; 5];
    vcpu.load(ipa(5), &mut back).unwrap();
    assert_eq!(&back, b"hJllo", "what the host had written is there");
    world.sound();
}

#[test]
fn sharing_shows_the_bytes_and_unsharing_hides_them() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(4), &[42]).unwrap();
    assert_eq!(world.host_reads(4), Err(ErrorKind::NotShared));
    let request = asked(vcpu.hvc(Hypercall::MemShare(ipa(4))));
    assert_eq!(request.gfns.start(), Gfn::new(BASE + 4));
    assert_eq!((request.pages, request.to), (range(4, 1), Visibility::Shared));
    assert_eq!(request.convert().unwrap().changed_pages(), 1);
    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);
    assert_eq!((world.host_reads(4), world.borrowed()), (Ok(42), 1));
    world.sound();
    // Both sides write.
    world.memfd.write(Offset::new(0x4001), &[43]).unwrap();
    let mut both = [0; 2];
    vcpu.load(ipa(4), &mut both).unwrap();
    assert_eq!(both, [42, 43]);
    agreed(&mut vcpu, Hypercall::MemUnshare(ipa(4)));
    assert_eq!((world.host_reads(4), world.borrowed()), (Err(ErrorKind::NotShared), 0));
    vcpu.load(ipa(4), &mut both).unwrap();
    assert_eq!(both, [42, 43]);
    world.sound();
}

#[test]
fn sharing_memory_that_was_never_touched_gives_it_first() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    agreed(&mut vcpu, Hypercall::MemShare(ipa(9)));
    assert_eq!((world.donated(), world.borrowed()), (0, 1));
    assert_eq!(world.host_reads(9), Ok(0));
    world.sound();
}

#[test]
fn a_refused_request_leaves_the_page_as_it_was() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), &[1]).unwrap();
    asked(vcpu.hvc(Hypercall::MemShare(ipa(1))));
    assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    assert_eq!(vcpu.answer().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(world.host_reads(1), Err(ErrorKind::NotShared));
    // Pinned memory is not unshared; once it is unpinned the guest may ask again.
    agreed(&mut vcpu, Hypercall::MemShare(ipa(1)));
    let owner = world.memfd.register_owner("virtio-blk").unwrap();
    let pin = world.memfd.pin(range(1, 1), owner, PinMode::Counted).unwrap();
    let request = asked(vcpu.hvc(Hypercall::MemUnshare(ipa(1))));
    assert_eq!(request.convert().unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
    assert_eq!(world.host_reads(1), Ok(1));
    drop(pin);
    agreed(&mut vcpu, Hypercall::MemUnshare(ipa(1)));
    world.sound();
}

#[track_caller]
fn eperm(result: Result<(), Error>) {
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::EPERM));
}

#[test]
fn the_host_converts_nothing_of_the_guests_without_its_consent() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), &[1]).unwrap();
    vcpu.store(ipa(2), &[2]).unwrap();
    eperm(world.convert(1, 1, Visibility::Shared));
    agreed(&mut vcpu, Hypercall::MemShare(ipa(2)));
    eperm(world.convert(2, 1, Visibility::Private));
    // Consent is for the page that was named, and ends with the request.
    let request = asked(vcpu.hvc(Hypercall::MemShare(ipa(1))));
    eperm(world.convert(2, 1, Visibility::Private));
    vcpu.store(ipa(3), &[3]).unwrap();
    assert_eq!(request.convert().unwrap_err().errno(), Errno::EPERM);
    assert_eq!(vcpu.answer().unwrap_err().kind(), ErrorKind::NotFound);
    // A page with consent among some without: nothing changes.
    asked(vcpu.hvc(Hypercall::MemShare(ipa(1))));
    eperm(world.convert(0, 4, Visibility::Shared));
    assert_eq!((world.host_reads(0), world.borrowed()), (Err(ErrorKind::NotShared), 1));
    world.convert(1, 1, Visibility::Shared).unwrap();
    // It goes one way: a VMM that went back could leave bytes of its own in a page that the guest
    // would believe it never shared.
    eperm(world.convert(1, 1, Visibility::Private));
    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);
    eperm(world.convert(1, 1, Visibility::Private));
    world.sound();
}

/// What a conversion prepares it prepares once, and while no vCPU can get to the page.
#[test]
fn a_page_is_prepared_before_its_guest_can_store() {
    let world = World::new();
    world.memfd.allocate(world.memfd.pages()).unwrap();
    let pfn = world.memfd.frames()[0].0;
    let runs = [GuestRun { gfn: Gfn::new(BASE), pfn, nr_pages: 1 }];
    let core = Arc::clone(&world.vm.0.guest);
    let mut vcpu = Some(world.vcpu());
    let stored = std::sync::OnceLock::new();
    let mut nr_prepared = 0;
    std::thread::scope(|scope| {
        let stored = &stored;
        core.make_private(&runs, &mut |_| {
            nr_prepared += 1;
            let mut vcpu = vcpu.take().unwrap();
            scope.spawn(move || {
                vcpu.store(ipa(0), &[1]).unwrap();
                stored.set(()).unwrap();
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(stored.get(), None, "a vCPU got in");
        })
        .unwrap();
    });
    assert_eq!(stored.get(), Some(&()));
    core.make_shared(&runs, &mut |_| nr_prepared += 10).unwrap_err();
    assert_eq!(nr_prepared, 1, "once if it goes well, never if not");
}

#[test]
fn requests_end_with_their_vcpu() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    let request = asked(vcpu.hvc(Hypercall::MemShare(ipa(1))));
    drop(vcpu);
    assert_eq!(request.convert().unwrap_err().errno(), Errno::EPERM);
}

#[test]
fn one_vcpus_request_is_no_other_ones() {
    let world = World::new();
    let (mut first, mut second) = (world.vcpu(), world.vcpu());
    let request = asked(first.hvc(Hypercall::MemShare(ipa(1))));
    // The other goes on, and withdraws nothing.
    second.store(ipa(1), &[1]).unwrap();
    assert!(second.answer().is_err());
    request.convert().unwrap();
    assert_eq!(first.answer().unwrap(), HvcResult::SUCCESS);
}

#[test]
fn a_hostile_guest_gets_an_answer_to_everything() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), &[1]).unwrap();
    agreed(&mut vcpu, Hypercall::MemShare(ipa(2)));
    let mut nasty = vec![0, 1, 3, 0xfff, 0x1000, 0x1001, u64::MAX, u64::MAX - 0xfff, 1 << 63];
    nasty.extend((0..64).map(|bit| 1_u64 << bit));
    nasty.extend([ipa(0), ipa(1), ipa(2), ipa(NR_PAGES - 1), ipa(NR_PAGES)].map(Ipa::get));
    let ids = [0x8600_0000, 0xc600_0002, 0xc600_0003, 0xc600_0004, 0xc600_0005, 0, u64::MAX];
    let (mut answers, mut exits) = (0, 0);
    for id in ids {
        for &r1 in &nasty {
            for [r2, r3] in [[0, 0], [1, 0], [0, 1], [u64::MAX, 1 << 63]] {
                match vcpu.hvc([id, r1, r2, r3]) {
                    Ok(_) => answers += 1,
                    Err(Exit::Conversion(_)) => {
                        assert_eq!(vcpu.answer().unwrap(), HvcResult::INVALID_PARAMETER);
                        exits += 1;
                    }
                    Err(Exit::Hypercall { regs }) => {
                        assert_eq!(regs.0, [id, r1, r2, r3]);
                        exits += 1;
                    }
                    Err(Exit::MemoryFault { ipa, .. }) => {
                        assert_eq!(ipa, Ipa::new(r1));
                        exits += 1;
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
        }
    }
    assert!(answers > 0 && exits > 0);
    assert_eq!(world.borrowed(), 1, "no call did anything by itself");
    world.sound();
}

#[test]
fn hypercalls_that_cannot_be_met_are_refused() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    let invalid = HvcResult::INVALID_PARAMETER;
    assert_eq!(vcpu.hvc(Hypercall::MemUnshare(ipa(1))).unwrap(), invalid, "never touched");
    assert_eq!(world.donated(), 0, "unsharing gives nothing");
    vcpu.store(ipa(1), &[1]).unwrap();
    assert_eq!(vcpu.hvc(Hypercall::MemUnshare(ipa(1))).unwrap(), invalid, "not shared");
    agreed(&mut vcpu, Hypercall::MemShare(ipa(1)));
    assert_eq!(vcpu.hvc(Hypercall::MemShare(ipa(1))).unwrap(), invalid, "shared already");
    let beyond = Ipa::new(1 << 40);
    assert_eq!(vcpu.hvc(Hypercall::MemShare(beyond)).unwrap(), invalid, "no such address");
    let outside = vcpu.hvc(Hypercall::MemShare(Ipa::new(0)));
    assert!(matches!(outside, Err(Exit::MemoryFault { ipa, .. }) if ipa == Ipa::new(0)));
    assert_eq!(vcpu.hvc(Hypercall::Features).unwrap().regs().0[0], 0b1_1101);
    assert_eq!(vcpu.hvc(Hypercall::HypMeminfo).unwrap().regs().0[0], 4096);
}

#[test]
fn a_living_guests_memory_is_not_punched() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    vcpu.store(ipa(1), &[1]).unwrap();
    agreed(&mut vcpu, Hypercall::MemShare(ipa(2)));
    for page in [1, 2] {
        let error = world.memfd.punch_hole(range(page, 1)).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::EBUSY));
    }
    world.memfd.punch_hole(range(3, 8)).unwrap();
    let mut byte = [0];
    vcpu.load(ipa(1), &mut byte).unwrap();
    assert_eq!(byte, [1]);
    world.sound();
}

#[test]
fn teardown_zeroes_what_was_private_and_returns_everything() {
    let world = World::new();
    let mut vcpu = world.vcpu();
    for page in 0..NR_PAGES {
        vcpu.store(ipa(page), &[7]).unwrap();
    }
    agreed(&mut vcpu, Hypercall::MemShare(ipa(30)));
    let error = world.vm.teardown().unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::EINVAL));
    assert_eq!(world.donated() + world.borrowed(), NR_PAGES, "nothing has changed");
    drop(vcpu);
    world.vm.teardown().unwrap();
    assert_eq!(world.hyp.stat(), HostStat::default());
    // The root, which is two pages.
    assert_eq!(world.vm.stat(), VmStat { nr_tables: 2, ..VmStat::default() });
    world.sound();
    assert_eq!(world.host_reads(30), Ok(7), "the host saw it anyway");
    // Without a guest the host may convert as it likes, and finds zeroes.
    world.convert(0, NR_PAGES, Visibility::Shared).unwrap();
    assert_eq!(world.host_reads(29), Ok(0));
    // A dead guest does nothing more.
    assert_eq!(world.vm.teardown().unwrap_err().errno(), Errno::EINVAL);
    assert_eq!(world.vm.create_vcpu().map(|_| ()).unwrap_err().errno(), Errno::EINVAL);
    let bind = world.vm.bind(Gfn::new(0), &world.memfd, range(0, 1));
    assert_eq!(bind.unwrap_err().errno(), Errno::EINVAL);
    // The object may have another.
    let next = world.hyp.create_vm().unwrap();
    next.bind(Gfn::new(0), &world.memfd, world.memfd.pages()).unwrap();
}

#[test]
fn the_last_handle_tears_down() {
    let world = World::new();
    let World { pool, hyp, memfd, vm, machine: _ } = world;
    let clone = vm.clone();
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(ipa(1), &[9]).unwrap();
    drop((vm, clone));
    let mut byte = [0];
    vcpu.load(ipa(1), &mut byte).unwrap();
    assert_eq!((byte, hyp.stat().nr_vms), ([9], 1));
    drop(vcpu);
    assert_eq!(hyp.stat(), HostStat::default());
    drop(memfd);
    assert_eq!(pool.stat().free, pool.stat().capacity);
    assert_eq!(pool.verify_scrubbed().unwrap(), pool.stat().capacity);
}

#[test]
fn memslots_do_not_overlap_and_lie_within() {
    let world = World::new();
    let other = GuestMemfd::builder(ByteSize::from_pages(8)).create(&world.pool).unwrap();
    let kind = |gfn, pages| {
        let bound = world.vm.bind(Gfn::new(gfn), &other, pages);
        bound.map(drop).map_err(|error| error.kind())
    };
    for gfn in [BASE, BASE - 1, BASE + NR_PAGES - 1] {
        assert_eq!(kind(gfn, range(0, 2)), Err(ErrorKind::Exists));
    }
    assert_eq!(kind((1 << 28) - 1, range(0, 2)), Err(ErrorKind::OutOfRange));
    assert_eq!(kind(u64::MAX, range(0, 1)), Err(ErrorKind::OutOfRange));
    assert_eq!(kind(0, range(0, 9)), Err(ErrorKind::OutOfRange), "beyond the object");
    assert_eq!(kind(0, range(0, 2)), Ok(()));
    assert_eq!(kind(2, range(1, 2)), Err(ErrorKind::Exists), "page 1 is bound");
    assert_eq!(kind(2, range(2, 2)), Ok(()));
    assert_eq!(kind((1 << 28) - 1, range(4, 1)), Ok(()));
    let (_, offset) = world.vm.memslot(Ipa::new(0x3123)).unwrap();
    assert_eq!(offset, Offset::new(0x3123));
    assert!(world.vm.memslot(Ipa::new(0x4000)).is_none());
    let elsewhere = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(1)).unwrap();
    let foreign = GuestMemfd::builder(ByteSize::from_pages(1)).create(&elsewhere).unwrap();
    let refused = world.vm.bind(Gfn::new(64), &foreign, foreign.pages());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
    let second = world.hyp.create_vm().unwrap();
    let refused = second.bind(Gfn::new(0), &world.memfd, range(0, 1));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Exists);
    assert!(second.memslot(Ipa::new(0)).is_none(), "a refused memslot leaves nothing");
    second.bind(Gfn::new(0), &foreign, foreign.pages()).unwrap_err();
}

#[test]
fn a_pool_has_one_hypervisor_at_a_time() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2)).unwrap();
    let first = Hypervisor::new(&pool).unwrap();
    assert_eq!(Hypervisor::new(&pool).unwrap_err().kind(), ErrorKind::Exists);
    let vm = first.create_vm().unwrap();
    drop(first);
    assert!(Hypervisor::new(&pool).is_err(), "its machine still lives");
    drop(vm);
    assert!(Hypervisor::new(&pool).is_ok());
}
