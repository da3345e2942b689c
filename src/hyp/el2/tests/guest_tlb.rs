//! Accesses of a vCPU without its CPU.

use super::*;
use crate::addr::Access;
use crate::hyp::el2::guest_tlb::GuestTlb;
use crate::state::Reader;

const AT: Ipa = Ipa::new(0x10_000);

/// A vCPU that a thread runs.
struct Running<'a> {
    world: &'a World,
    tlb: GuestTlb,
    reader: Reader,
}

impl<'a> Running<'a> {
    fn on(world: &'a World, cpu: usize) -> Self {
        let tlb = world.el2.guest_tlb(cpu).unwrap();
        Self { world, reader: tlb.reader(), tlb }
    }

    fn hit(&self, access: Access) -> Option<u64> {
        self.tlb.hit(&self.reader, AT, access, |at| at.get())
    }

    fn walk(&self, access: Access) -> Option<u64> {
        self.tlb.walk(AT, access, |at| at.get())
    }

    /// Eight bytes at once, if the guest has the page.
    fn store(&self, at: Ipa, value: u64) -> bool {
        let machine = self.world.el2.machine();
        let hit = self.tlb.hit(&self.reader, at, Access::Write, |at| {
            // Here is the time for the host to take the page.
            std::thread::yield_now();
            machine.write(at, &value.to_le_bytes())
        });
        let done = hit.or_else(|| {
            self.tlb.walk(at, Access::Write, |at| machine.write(at, &value.to_le_bytes()))
        });
        done.is_some_and(|stored| stored.is_ok())
    }
}

#[test]
fn what_a_walk_finds_is_hit_until_the_page_goes() {
    let world = World::new();
    let guest = world.running(true);
    assert!(world.el2.guest_tlb(1).is_none() && world.el2.guest_tlb(99).is_none());
    let running = Running::on(&world, 0);
    assert_eq!((running.hit(Access::Read), running.walk(Access::Read)), (None, None));
    world.donate(GUEST, 0x10).unwrap();
    assert_eq!(running.hit(Access::Read), None);
    assert_eq!(running.walk(Access::Read), Some(GUEST << 12));
    assert_eq!(running.hit(Access::Write), Some(GUEST << 12));
    // The other vCPU remembers for itself.
    world.load(1, guest, 1);
    let other = Running::on(&world, 1);
    assert_eq!(other.hit(Access::Read), None);
    world.el2.vcpu(1, AT, Bytes::Store(b"mine")).unwrap();
    assert_eq!(other.hit(Access::Read), Some(GUEST << 12));
    world.sound();

    world.call(HostCall::ForceReclaimGuestPage, [GUEST << 12, 0, 0, 0]).unwrap();
    for running in [running, other] {
        assert_eq!((running.hit(Access::Read), running.walk(Access::Read)), (None, None));
    }
    world.sound();
}

#[test]
fn rights_are_those_of_the_entry() {
    let world = World::new();
    let guest = world.running(false);
    world.call(HostCall::ShareGuest, [GUEST, 0x10, 1, RWX & !2]).unwrap();
    let running = Running::on(&world, 0);
    for _ in 0..2 {
        assert_eq!((running.walk(Access::Write), running.hit(Access::Write)), (None, None));
        assert_eq!(running.walk(Access::Read), Some(GUEST << 12));
        assert_eq!(running.hit(Access::Read), Some(GUEST << 12));
    }
    assert_eq!(world.call(HostCall::RelaxPermsGuest, [0x10, RWX, 0, 0]), Ok(0));
    assert_eq!(running.hit(Access::Read), None);
    assert_eq!(running.walk(Access::Write), Some(GUEST << 12));
    // What is remembered stays until the host says so.
    world.call(HostCall::WrprotectGuest, [guest.handle, 0x10, 1, 0]).unwrap();
    assert_eq!(running.hit(Access::Write), Some(GUEST << 12));
    world.call(HostCall::TlbFlushVmid, [guest.handle, 0, 0, 0]).unwrap();
    assert_eq!((running.hit(Access::Write), running.walk(Access::Write)), (None, None));
    world.sound();
}

#[test]
fn what_outlives_its_vm_reaches_nothing() {
    let world = World::new();
    let guest = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    let running = Running::on(&world, 0);
    assert!(running.walk(Access::Write).is_some());
    let nothing = |when| {
        assert_eq!(running.walk(Access::Read), None, "{when}");
        assert_eq!(running.hit(Access::Read), None, "{when}");
    };
    world.put(0);
    assert!(running.hit(Access::Write).is_some(), "it may be loaded again");
    world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    nothing("dying");
    world.call(HostCall::ReclaimDyingGuestPage, [guest.handle, 0x10, 0, 0]).unwrap();
    world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    nothing("gone");
    // The next one has the same handle, and the page.
    let next = world.running(true);
    assert_eq!(next.handle, guest.handle);
    world.donate(GUEST, 0x10).unwrap();
    world.store(0x10, b"mine").unwrap();
    nothing("somebody else's");
    assert_eq!(running.tlb.hit(&Running::on(&world, 0).reader, AT, Access::Read, |_| ()), None);
    world.sound();
}

/// Ends the guest's thread, also when the host's has failed.
struct Over<'a>(&'a Mutex<Option<u64>>);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// A vCPU stores without any lock; the host takes the page by force, and must never see a store that came after.
#[test]
fn no_store_comes_after_the_page_was_taken() {
    const NR_ROUNDS: u64 = 150;
    let world = World::new();
    let guest = world.running(true);
    // Which page the guest is at; none when it is over.
    let next = Mutex::new(Some(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let running = Running::on(&world, 0);
            loop {
                let Some(nth) = *next.lock() else { return };
                let at = Ipa::new((0x10 + nth) << 12);
                // Most of them without a lock in between.
                let nr_stored = (0..64).filter(|_| running.store(at, 0xaa)).count();
                if nr_stored == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let _over = Over(&next);
        for nth in 1..=NR_ROUNDS {
            let (pfn, at) = (GUEST + nth % 8, Pa::new((GUEST + nth % 8) << 12));
            world.top_up(guest, 0, 2);
            world.donate(pfn, 0x10 + nth).unwrap();
            *next.lock() = Some(nth);
            let seen = || {
                let mut bytes = [0; 8];
                world.el2.machine().read(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
            };
            while seen() != Ok(0xaa) {
                std::thread::yield_now();
            }
            let mut buf = [0xee; 8];
            let outcome = world.el2.kernel_alias(1, at, Bytes::Load(&mut buf));
            assert_eq!((outcome, buf), (KernelOutcome::DoneAfterReclaim, [0; 8]), "{nth}");
            for _ in 0..50 {
                std::thread::yield_now();
                world.el2.uaccess(1, at, Bytes::Load(&mut buf)).unwrap();
                assert_eq!(buf, [0; 8], "{nth}: a store after it was taken");
            }
        }
    });
    world.sound();
}
