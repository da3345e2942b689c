//! Memslots: the kernel's rules, with the kernel as the judge where it can be asked, and slots that come and
//! go while the guest runs.

// UNSAFETY: ioctls of KVM, which no crate here wraps.
#![expect(unsafe_code, reason = "the kernel's own memslots are what ours are held against")]

mod common;
#[path = "common/kvm.rs"]
mod kvm;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use common::Capability;
use gmem::addr::{ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::hyp::{Exit, HvcResult, Hypercall, Hypervisor, MemslotId, Model, Profile, Vcpu, Vm};
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, Visibility};
use kvm::KernelVm;

// linux/kvm.h.
const KVM_SET_USER_MEMORY_REGION2: libc::c_ulong = 0x40a0_ae49;
const MEM_LOG_DIRTY: u32 = 1;
const MEM_READONLY: u32 = 2;
const MEM_GUEST_MEMFD: u32 = 4;

/// `struct kvm_userspace_memory_region2`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    slot: u32,
    flags: u32,
    gpa: u64,
    size: u64,
    hva: u64,
    offset: u64,
    fd: u32,
    pad1: u32,
    pad2: [u64; 14],
}

fn set_memory_region(vm: &KernelVm, region: &Region) -> Result<(), i32> {
    let region: *const Region = region;
    // SAFETY: reads one such structure.
    match unsafe { libc::ioctl(vm.0.as_raw_fd(), KVM_SET_USER_MEMORY_REGION2 as _, region) } {
        0 => Ok(()),
        _ => Err(kvm::errno()),
    }
}

const PAGE: u64 = 4096;
const FILE_PAGES: u64 = 16;
const DONE: i32 = 0;

/// One call: machine, slot number, guest address, which object (each of the first machine, but for number 2), and
/// where and how much of it. A size of zero deletes.
#[derive(Clone, Copy, Debug)]
struct Set {
    machine: usize,
    slot: u16,
    gpa: u64,
    object: usize,
    offset: u64,
    size: u64,
}

const fn set(slot: u16, gpa: u64, object: usize, offset: u64, pages: u64) -> Set {
    let (gpa, offset, size) = (gpa * PAGE, offset * PAGE, pages * PAGE);
    Set { machine: 0, slot, gpa, object, offset, size }
}

const fn delete(slot: u16) -> Set {
    Set { machine: 0, slot, gpa: 0, object: 0, offset: 0, size: 0 }
}

/// Each call, what it answers, and what Linux 6.18 answers if that is something else.
///
/// Newer kernels say `EEXIST` where part of an object is bound already; 6.18 says `EINVAL`. We follow the newer.
#[rustfmt::skip]
const VECTORS: &[(Set, i32, Option<i32>, &str)] = &[
    (set(0, 0x100, 0, 0, 4), DONE, None, "a part of an object"),
    (set(1, 0x200, 0, 4, 4), DONE, None, "another part of it in a second slot"),
    (set(2, 0x300, 1, 0, 16), DONE, None, "all of a second object"),
    (set(3, 0x103, 0, 8, 1), libc::EEXIST, None, "over the last page of a slot"),
    (set(3, 0x0fe, 0, 8, 3), libc::EEXIST, None, "over the first page of a slot"),
    (set(3, 0x0fe, 0, 8, 2), DONE, None, "up to a slot"),
    (set(4, 0x104, 0, 10, 1), DONE, None, "right behind a slot"),
    (set(5, 0x400, 0, 0, 1), libc::EEXIST, Some(libc::EINVAL), "pages that are bound"),
    (set(5, 0x400, 0, 3, 2), libc::EEXIST, Some(libc::EINVAL), "pages that are bound, over two slots"),
    (set(5, 0x100, 0, 0, 1), libc::EEXIST, None, "both at once"),
    (set(5, 0x400, 0, 11, 6), libc::EINVAL, None, "beyond the end of the object"),
    (set(5, 0x400, 0, 16, 1), libc::EINVAL, None, "at the end of the object"),
    (set(5, 0x400, 0, 1 << 40, 1), libc::EINVAL, None, "far beyond the end of the object"),
    (Set { gpa: 0x40_0800, ..set(5, 0, 0, 11, 1) }, libc::EINVAL, None, "unaligned guest address"),
    (Set { offset: 0xb800, ..set(5, 0x400, 0, 0, 1) }, libc::EINVAL, None, "unaligned offset"),
    (Set { size: 0x1800, ..set(5, 0x400, 0, 11, 0) }, libc::EINVAL, None, "unaligned size"),
    (set(0, 0x100, 0, 0, 4), libc::EINVAL, None, "the same slot again"),
    (set(0, 0x500, 0, 0, 4), libc::EINVAL, None, "a slot moved"),
    (set(0, 0x100, 0, 12, 4), libc::EINVAL, None, "a slot with other pages"),
    (set(0, 0x100, 1, 0, 4), libc::EINVAL, None, "a slot with another object"),
    (set(0, 0x100, 0, 0, 2), libc::EINVAL, None, "a slot made smaller"),
    (set(5, 0x400, 2, 0, 1), libc::EINVAL, None, "another machine's object"),
    (set(u16::MAX, 0x400, 0, 11, 1), libc::EINVAL, None, "a number that no slot has"),
    (delete(9), libc::EINVAL, None, "no such slot"),
    (delete(0), DONE, None, "deleted"),
    (delete(0), libc::EINVAL, None, "deleted twice"),
    (set(6, 0x600, 0, 0, 4), DONE, None, "its pages elsewhere"),
    (set(0, 0x100, 0, 12, 4), DONE, None, "its number, its place, other pages"),
    (delete(6), DONE, None, ""), (delete(0), DONE, None, ""), (delete(1), DONE, None, ""),
    (delete(3), DONE, None, ""), (delete(4), DONE, None, ""),
    (set(7, 0x100, 0, 0, 16), DONE, None, "all of it, once nothing of it is bound"),
];

trait Subject {
    /// The errno, or 0.
    fn set(&mut self, call: Set) -> i32;
}

struct Ours {
    machines: [Vm; 2],
    objects: [GuestMemfd; 3],
}

impl Subject for Ours {
    /// What our types cannot say is refused by whoever makes them, the VMM: the guest address is a frame, and a
    /// slot's number a slot's number.
    fn set(&mut self, call: Set) -> i32 {
        let Some(id) = MemslotId::from_u16(call.slot) else { return libc::EINVAL };
        let machine = &self.machines[call.machine];
        if call.size == 0 {
            return machine.unbind(id).map_or_else(|error| error.errno().get(), |()| DONE);
        }
        let gpa = Ipa::new(call.gpa);
        if !gpa.is_page_aligned() {
            return libc::EINVAL;
        }
        let size = ByteSize::from_bytes(call.size);
        PgoffRange::from_bytes(Offset::new(call.offset), size)
            .and_then(|pages| machine.bind_slot(id, gpa.gfn(), &self.objects[call.object], pages))
            .map_or_else(|error| error.errno().get(), |()| DONE)
    }
}

struct Kernels {
    machines: [KernelVm; 2],
    objects: [OwnedFd; 3],
}

impl Subject for Kernels {
    fn set(&mut self, call: Set) -> i32 {
        let region = Region {
            slot: call.slot.into(),
            flags: MEM_GUEST_MEMFD,
            gpa: call.gpa,
            size: call.size,
            offset: call.offset,
            fd: self.objects[call.object].as_raw_fd().try_into().unwrap(),
            ..Region::default()
        };
        // A deletion has no flags.
        let region = if call.size == 0 { Region { flags: 0, ..region } } else { region };
        set_memory_region(&self.machines[call.machine], &region)
            .map_or_else(|errno| errno, |()| DONE)
    }
}

fn ours(model: Model) -> Ours {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(1)).unwrap();
    let hyp = Hypervisor::with(&pool, model).unwrap();
    let object = || GuestMemfd::builder(ByteSize::from_pages(FILE_PAGES)).create(&pool).unwrap();
    let machines = [hyp.create_vm().unwrap(), hyp.create_vm().unwrap()];
    let objects = [object(), object(), object()];
    // Ours belong to nobody until they are bound; the kernel's belong to the machine that made them.
    machines[1].bind(Gfn::new(0), &objects[2], page(3, 1)).unwrap();
    Ours { machines, objects }
}

#[test]
fn ours_follow_the_rules() {
    for model in Model::ALL {
        let mut ours = ours(model);
        for &(call, expected, _, what) in VECTORS {
            assert_eq!(ours.set(call), expected, "{model}: {what}: {call:?}");
        }
    }
}

#[test]
fn the_kernels_follow_the_same_rules() {
    if !common::require(Capability::Kvm) || !common::settle(Capability::Kvm, kvm::probe()) {
        return;
    }
    let machines = [KernelVm::new(), KernelVm::new()];
    let object = |machine: usize| {
        let flags = kvm::MMAP | kvm::INIT_SHARED;
        machines[machine].create_guest_memfd(FILE_PAGES * PAGE, flags).unwrap()
    };
    let objects = [object(0), object(0), object(1)];
    let mut kernels = Kernels { machines, objects };
    for &(call, expected, on_6_18, what) in VECTORS {
        let answer = kernels.set(call);
        let fits = answer == expected || Some(answer) == on_6_18;
        assert!(fits, "{what}: {call:?} answers {answer}, not {expected}");
    }
    // What no call of ours can say: a slot on such memory can be neither read-only nor logged.
    for flags in [MEM_READONLY, MEM_LOG_DIRTY] {
        let flags = flags | MEM_GUEST_MEMFD;
        let fd = kernels.objects[1].as_raw_fd().try_into().unwrap();
        let region = Region { slot: 8, flags, gpa: 1 << 30, size: PAGE, fd, ..Region::default() };
        assert_eq!(set_memory_region(&kernels.machines[0], &region), Err(libc::EINVAL));
    }
}

fn page(at: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(at), nr_pages).unwrap()
}

fn world(profile: Profile) -> (FolioPool, Hypervisor, GuestMemfd, Vm) {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(4)).unwrap();
    let hyp = Hypervisor::with(&pool, profile).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(2)).create(&pool).unwrap();
    let vm = hyp.create_vm().unwrap();
    (pool, hyp, memfd, vm)
}

#[test]
fn a_guest_keeps_what_it_has_not_given_up() {
    let (pool, _hyp, memfd, vm) = world(Profile::Android618);
    let stays = vm.bind(Gfn::new(0), &memfd, page(0, 4)).unwrap();
    let goes = vm.bind(Gfn::new(0x100), &memfd, page(4, 4)).unwrap();
    assert_eq!((stays.to_u16(), goes.to_u16()), (0, 1));
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(Ipa::new(0x10_1000), b"private").unwrap();
    vcpu.store(Ipa::new(0x10_2000), b"shared").unwrap();
    agreed(&mut vcpu, Hypercall::MemShare(Ipa::new(0x10_2000)));

    for at in [0x10_1000, 0x10_2000] {
        let refused = vm.unbind(goes).unwrap_err();
        assert_eq!((refused.kind(), refused.errno()), (ErrorKind::HypervisorRefused, Errno::EBUSY));
        assert!(vm.memslot(Ipa::new(at)).is_some(), "a refused deletion changes nothing");
        let mut buf = [0; 6];
        vcpu.load(Ipa::new(at), &mut buf).unwrap();
        assert_ne!(buf, [0; 6]);
        let gives_up = Hypercall::MemRelinquish(Ipa::new(at));
        if at == 0x10_2000 {
            // What is shared is taken back first.
            assert_eq!(vcpu.hvc(gives_up).unwrap(), HvcResult::INVALID_PARAMETER);
            agreed(&mut vcpu, Hypercall::MemUnshare(Ipa::new(at)));
        }
        assert_eq!(vcpu.hvc(gives_up).unwrap(), HvcResult::SUCCESS);
        assert_eq!(vcpu.hvc(gives_up).unwrap(), HvcResult::SUCCESS, "nothing there is no error");
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    }
    vm.unbind(goes).unwrap();
    assert!(vm.memslot(Ipa::new(0x10_1000)).is_none());
    assert!(matches!(vcpu.load(Ipa::new(0x10_1000), &mut [0]), Err(Exit::Mmio { .. })));
    assert_eq!(vm.unbind(goes).unwrap_err().errno(), Errno::EINVAL);
    // Whoever gets the memory next finds nothing of it.
    let _ = memfd.convert(page(4, 4), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    let mut buf = [1; 7];
    for page in [5, 6] {
        memfd.read(Offset::new(page * PAGE), &mut buf).unwrap();
        assert_eq!(buf, [0; 7]);
    }
    memfd.write(Offset::new(6 * PAGE), b"again!").unwrap();
    let _ = memfd.convert(page(4, 4), Visibility::Private, ContentPolicy::Preserve).unwrap();
    // And the guest may have it again, elsewhere.
    vm.bind_slot(goes, Gfn::new(0x200), &memfd, page(4, 4)).unwrap();
    vcpu.load(Ipa::new(0x20_2000), &mut buf[..6]).unwrap();
    assert_eq!(&buf[..6], b"again!");
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

/// The guest asks, and the VMM does it.
#[track_caller]
fn agreed(vcpu: &mut Vcpu, call: Hypercall) {
    match vcpu.hvc(call) {
        Err(Exit::Conversion(request)) => assert!(request.convert().is_ok()),
        other => panic!("{other:?}"),
    }
    assert!(vcpu.answer().unwrap().is_success());
}

/// In mainline a guest has no way to give anything up, and a memslot that it uses stays.
#[test]
fn mainline_has_no_way_out_of_a_memslot() {
    let (_pool, hyp, memfd, vm) = world(Profile::Mainline72);
    let used = vm.bind(Gfn::new(0), &memfd, page(0, 4)).unwrap();
    let idle = vm.bind(Gfn::new(0x100), &memfd, page(4, 4)).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(Ipa::new(0), b"private").unwrap();
    let gives_up = vcpu.hvc(Hypercall::MemRelinquish(Ipa::new(0))).unwrap();
    assert_eq!(gives_up, HvcResult::NOT_SUPPORTED);
    let refused = vm.unbind(used).unwrap_err();
    assert_eq!((refused.kind(), refused.errno()), (ErrorKind::HypervisorRefused, Errno::EPERM));
    vm.unbind(idle).unwrap();
    assert_eq!(hyp.stat().donated, ByteSize::from_pages(1));
}

/// One vCPU works in memory that stays, another in memory that is plugged and unplugged under it.
#[test]
fn memory_comes_and_goes_while_guests_run() {
    let (pool, hyp, memfd, vm) = world(Profile::Android618);
    vm.bind(Gfn::new(0), &memfd, page(0, 8)).unwrap();
    let stop = AtomicBool::new(false);
    let (stop, vm) = (&stop, &vm);
    std::thread::scope(|scope| {
        let steady = scope.spawn(move || {
            let mut vcpu = vm.create_vcpu().unwrap();
            let mut nr = 0_u64;
            while nr < 100 || !stop.load(Ordering::Relaxed) {
                let at = Ipa::new(nr % 8 * PAGE);
                vcpu.store_u64(at, nr).unwrap();
                assert_eq!(vcpu.load_u64(at).unwrap(), nr);
                nr += 1;
            }
        });
        let plugged = scope.spawn(move || {
            let mut vcpu = vm.create_vcpu().unwrap();
            let (mut nr_there, mut nr_gone) = (0_u64, 0_u64);
            while !stop.load(Ordering::Relaxed) {
                match vcpu.store(Ipa::new(0x10_0000), &[1; 16]) {
                    Ok(()) => {
                        nr_there += 1;
                        let mut seen = [0; 16];
                        vcpu.load(Ipa::new(0x10_0000), &mut seen).unwrap();
                        assert_eq!(seen, [1; 16], "what the guest has nobody takes away");
                        let call = Hypercall::MemRelinquish(Ipa::new(0x10_0000));
                        assert_eq!(vcpu.hvc(call).unwrap(), HvcResult::SUCCESS);
                    }
                    Err(Exit::Mmio { .. }) => nr_gone += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            (nr_there, nr_gone)
        });
        let (mut nr_removed, mut nr_refused) = (0, 0);
        while nr_removed < 500 {
            let slot = vm.bind(Gfn::new(0x100), &memfd, page(8, 8)).unwrap();
            loop {
                match vm.unbind(slot) {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.errno(), Errno::EBUSY, "{error}"),
                }
                nr_refused += 1;
            }
            nr_removed += 1;
        }
        stop.store(true, Ordering::Relaxed);
        steady.join().unwrap();
        let (nr_there, nr_gone) = plugged.join().unwrap();
        println!("there {nr_there}, gone {nr_gone}, refused {nr_refused}");
    });
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    vm.teardown().unwrap();
    assert_eq!(hyp.stat().donated, ByteSize::default());
    drop(memfd);
    assert_eq!(pool.verify_scrubbed().unwrap(), pool.stat().capacity);
}
