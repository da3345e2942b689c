//! Raw pointers that keep touching a view while folios come, views go and pages change sides.

// UNSAFETY: system calls on raw pointers, which may fail with EFAULT and must not see private bytes, and stores
// that fault.
#![expect(unsafe_code, reason = "a system call on a raw pointer is what is tested")]

mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use common::Capability;
use gmem::addr::{ByteSize, Gfn, Hva, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::Errno;
use gmem::hyp::{Hypervisor, Vm};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FaultAnswer, FolioPool, GuestMemfd, HostFault, PinMode,
    SigbusHandler, Visibility,
};

const SIZE: ByteSize = ByteSize::from_mib(2);
const SECRET: u8 = b'S';

/// The byte at an address, by a system call: it fails instead of faulting, mapped or not.
fn peek(at: Hva) -> Option<u8> {
    let (out, into) = rustix::pipe::pipe().unwrap();
    let from = std::ptr::with_exposed_provenance::<libc::c_void>(at.get());
    // SAFETY: the kernel checks the address itself.
    let written = unsafe { libc::write(into.as_raw_fd(), from, 1) };
    let mut byte = [0];
    (written == 1).then(|| rustix::io::read(&out, &mut byte).map(|_| byte[0]).unwrap())
}

/// Peeks from another thread until `work` is done; all that was seen, each once.
fn peek_during(at: Hva, work: impl FnOnce()) -> Vec<u8> {
    let (stop, begun) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let peeker = scope.spawn(|| {
            let mut seen = Vec::new();
            while !stop.load(Ordering::Acquire) {
                seen.extend(peek(at));
                seen.dedup();
                begun.store(true, Ordering::Release);
            }
            seen
        });
        while !begun.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        work();
        stop.store(true, Ordering::Release);
        peeker.join().unwrap()
    })
}

fn object(initial: Visibility) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(ArenaBacking::Memfd, SIZE).unwrap();
    let memfd = GuestMemfd::builder(SIZE).initial(initial).create(&pool).unwrap();
    (pool, memfd)
}

/// A folio that is installed under a raw pointer's eyes stays out of sight once it is private.
#[test]
fn a_guests_first_touch_is_not_seen() {
    if !common::require(Capability::Uffd) {
        return;
    }
    for _ in 0..200 {
        let (pool, memfd) = object(Visibility::Private);
        let view = memfd.map_view().unwrap();
        let host = Hypervisor::new(&pool).unwrap();
        let vm = host.create_vm().unwrap();
        vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
        let mut vcpu = vm.create_vcpu().unwrap();
        let seen = peek_during(view.hva(), || vcpu.store(Ipa::new(0), &[SECRET]).unwrap());
        assert!(!seen.contains(&SECRET), "the host has seen {seen:?}");
        assert_eq!(peek(view.hva()), None);
        assert_eq!(memfd.stat().mapped, ByteSize::default());
        assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
    }
}

/// What comes to a page that raw pointers are at all the time holds nothing of theirs: they reach the guest's
/// memory at no moment.
#[test]
fn a_guests_first_touch_finds_zeroes() {
    if !common::require(Capability::Uffd) {
        return;
    }
    for _ in 0..200 {
        let (pool, memfd) = object(Visibility::Private);
        let view = memfd.map_view().unwrap();
        let zero = std::fs::File::open("/dev/urandom").unwrap();
        let stop = AtomicBool::new(false);
        let at = view.pointer(Offset::new(64), ByteSize::from_bytes(64)).unwrap();
        let at = Hva::new(at.as_ptr().expose_provenance());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let into = std::ptr::with_exposed_provenance_mut(at.get());
                while !stop.load(Ordering::Acquire) {
                    // SAFETY: nobody has a reference to the memory; the kernel checks the address.
                    unsafe { libc::read(zero.as_raw_fd(), into, 64) };
                }
            });
            memfd.allocate(memfd.pages()).unwrap();
            stop.store(true, Ordering::Release);
        });
        let vm = Hypervisor::new(&pool).unwrap().create_vm().unwrap();
        vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
        let mut found = [1; 64];
        vm.create_vcpu().unwrap().load(Ipa::new(64), &mut found).unwrap();
        assert_eq!(found, [0; 64]);
    }
}

/// The other way round: what a store did reach, it reached for good.
#[test]
fn a_store_during_the_first_touch_is_not_lost() {
    fn again(_: &HostFault) -> FaultAnswer {
        FaultAnswer::Retry
    }

    if !common::require(Capability::Uffd) {
        return;
    }
    let handler = SigbusHandler::install().unwrap();
    // SAFETY: it does nothing at all.
    unsafe { handler.decide_by(again) };
    let (pool, memfd) = object(Visibility::Shared);
    let view = memfd.map_view().unwrap();
    let at = view.pointer(Offset::new(64), ByteSize::from_bytes(8)).unwrap();
    let at = at.as_ptr().expose_provenance();
    for round in 1..=400_u64 {
        // From here on it faults, and again, until there is a folio.
        memfd.punch_hole(memfd.pages()).unwrap();
        let begun = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begun.store(true, Ordering::Release);
                let at = std::ptr::with_exposed_provenance_mut::<u64>(at);
                // SAFETY: aligned, in a view that outlives this, and nobody has a reference to it.
                unsafe { at.write_volatile(round) };
            });
            while !begun.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            memfd.allocate(memfd.pages()).unwrap();
        });
        assert_eq!(memfd.load_u64(Offset::new(64)).unwrap(), round, "a store is lost");
        memfd.store_u64(Offset::new(64), 0).unwrap();
    }
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

/// A view that goes away shows nothing on its way out.
#[test]
fn a_view_that_is_dropped_shows_nothing() {
    if !common::require(Capability::Uffd) {
        return;
    }
    for keep_object in [true, false].repeat(100) {
        let (_pool, memfd) = object(Visibility::Shared);
        memfd.write(Offset::new(0), &[SECRET; 4096]).unwrap();
        let view = memfd.map_view().unwrap();
        let all = memfd.pages();
        let _ = memfd.convert(all, Visibility::Private, ContentPolicy::Preserve).unwrap();
        let kept = keep_object.then(|| memfd.clone());
        drop(memfd);
        let seen = peek_during(view.hva(), || drop(view));
        assert!(!seen.contains(&SECRET), "the host has seen {seen:?}");
        drop(kept);
    }
}

/// Has the guest own a page, with a secret in it.
fn own_a_page(vm: &Vm, memfd: &GuestMemfd) -> PgoffRange {
    vm.bind(Gfn::new(0), memfd, memfd.pages()).unwrap();
    let page = PgoffRange::new(Pgoff::new(5), 1).unwrap();
    let _ = memfd.convert(page, Visibility::Private, ContentPolicy::Preserve).unwrap();
    vm.create_vcpu().unwrap().store(Ipa::new(5 << 12), &[SECRET]).unwrap();
    page
}

/// A punch that the hypervisor refuses changes nothing in the view, however closely it is watched.
#[test]
fn a_refused_punch_leaves_the_view_as_it_was() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(Visibility::Shared);
    memfd.write(Offset::new(0), &[1; 2 << 20]).unwrap();
    let view = memfd.map_view().unwrap();
    let host = Hypervisor::new(&pool).unwrap();
    let vm = host.create_vm().unwrap();
    let guests = own_a_page(&vm, &memfd);
    let owner = memfd.register_owner("disk").unwrap();
    let neighbour = PgoffRange::new(Pgoff::new(6), 1).unwrap();
    let _pin = memfd.pin(neighbour, owner, PinMode::Counted).unwrap();

    let private = view.hva_of(Offset::new(5 << 12)).unwrap();
    let seen = peek_during(private, || {
        for _ in 0..2_000 {
            assert_eq!(memfd.punch_hole(guests).unwrap_err().errno(), Errno::EBUSY);
        }
    });
    assert_eq!(seen, []);
    assert_eq!(peek(view.hva_of(Offset::new(6 << 12)).unwrap()), Some(1), "the pinned one");
    assert_eq!(memfd.stat().mapped.get(), SIZE.get() - 4096);
    assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
}

/// Who pins a page after a punch was refused finds it in the view.
#[test]
fn a_refused_punch_is_over_when_its_pages_can_be_pinned() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(Visibility::Shared);
    memfd.write(Offset::new(0), &[1; 2 << 20]).unwrap();
    let view = memfd.map_view().unwrap();
    let host = Hypervisor::new(&pool).unwrap();
    let vm = host.create_vm().unwrap();
    own_a_page(&vm, &memfd);
    let owner = memfd.register_owner("disk").unwrap();
    let neighbour = PgoffRange::new(Pgoff::new(6), 1).unwrap();
    let at = view.hva_of(Offset::new(6 << 12)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pinner = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                let pin = memfd.pin(neighbour, owner, PinMode::Counted).unwrap();
                assert_eq!(peek(at), Some(1), "pinned, and not there");
                drop(pin);
                std::thread::yield_now();
            }
        });
        let both = PgoffRange::new(Pgoff::new(5), 2).unwrap();
        for _ in 0..5_000 {
            let error = memfd.punch_hole(both).unwrap_err();
            assert!(matches!(error.errno(), Errno::EBUSY | Errno::EAGAIN), "{error}");
        }
        done.store(true, Ordering::Release);
        pinner.join().unwrap();
    });
    assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
}

/// Collapsing a view into huge pages would map what is hidden in it.
#[test]
fn a_view_cannot_be_collapsed() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(Visibility::Shared);
    memfd.write(Offset::new(0), &[SECRET; 2 << 20]).unwrap();
    let view = memfd.map_view().unwrap();
    let half = PgoffRange::new(Pgoff::new(0), 256).unwrap();
    let _ = memfd.convert(half, Visibility::Private, ContentPolicy::Preserve).unwrap();
    let at = view.pointer(Offset::new(0), SIZE).unwrap();
    // MADV_COLLAPSE of linux/mman.h.
    // SAFETY: the range is the view's; nobody has a reference into it.
    let outcome = unsafe { libc::madvise(at.as_ptr().cast(), 2 << 20, 25) };
    assert_eq!(outcome, -1);
    assert_eq!(peek(view.hva()), None);
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

/// Nor can the kernel collapse them by itself: neither views nor the pool's alias allow it.
#[test]
fn no_mapping_of_an_arena_may_be_collapsed() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (_pool, memfd) = object(Visibility::Shared);
    let _view = memfd.map_view().unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut nr_arenas = 0;
    let mut is_arena = false;
    for line in smaps.lines() {
        if line.split_once('-').is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok()) {
            is_arena = line.contains("gmem-arena");
            nr_arenas += usize::from(is_arena);
        }
        if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| is_arena) {
            // proc(5): nh no huge pages, dd not dumped, dc not copied to children.
            for flag in ["nh", "dd", "dc"] {
                assert!(flags.split_whitespace().any(|it| it == flag), "{flag} in {flags}");
            }
        }
    }
    assert!(nr_arenas >= 2, "alias and view, at least");
}

/// Views that come while pages turn shared show all of them.
#[test]
fn a_view_that_comes_during_a_conversion_shows_what_is_shared() {
    if !common::require(Capability::Uffd) {
        return;
    }
    for _ in 0..200 {
        let (pool, memfd) = object(Visibility::Private);
        let view = std::thread::scope(|scope| {
            let mapper = scope.spawn(|| memfd.map_view().unwrap());
            let all = memfd.pages();
            let _ = memfd.convert(all, Visibility::Shared, ContentPolicy::Preserve).unwrap();
            mapper.join().unwrap()
        });
        assert_eq!(memfd.stat().mapped, SIZE);
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(view);
    }
}
