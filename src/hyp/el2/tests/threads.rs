//! Several CPUs at once.

use super::*;

/// Ends the guest's thread, also when the host's has failed.
struct Over<'a>(&'a Mutex<Option<u64>>);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// A vCPU writes its own bytes; the host takes the page by force, clears it, and must never read what the guest wrote after.
#[test]
fn a_page_that_is_taken_is_never_read_with_the_guests_bytes() {
    let world = World::new();
    let guest = world.running(true);
    // Which page the guest is at; none when it is over.
    let next = Mutex::new(Some(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let Some(nth) = *next.lock() else { return };
                // Refused before it is given and after it is taken.
                world.store(0x10 + nth, &[0xaa; 4096]).ok();
            }
        });
        let _over = Over(&next);
        for nth in 0..200 {
            let pfn = GUEST + nth % 8;
            // The guest's CPU is busy; its lock is waited for.
            world.top_up(guest, 0, 2);
            world.donate(pfn, 0x10 + nth).unwrap();
            *next.lock() = Some(nth);
            while world.bytes(pfn)[0] != 0xaa {
                std::thread::yield_now();
            }
            let mut buf = [0xee; 4096];
            let outcome = world.el2.kernel_alias(1, Pa::new(pfn << 12), Bytes::Load(&mut buf));
            assert_eq!(outcome, KernelOutcome::DoneAfterReclaim);
            assert!(buf.iter().all(|&byte| byte == 0), "the guest's bytes");
            world.el2.uaccess(1, Pa::new(pfn << 12), Bytes::Load(&mut buf)).unwrap();
            assert!(buf.iter().all(|&byte| byte == 0), "bytes written after it was taken");
        }
    });
    world.sound();
}

/// All locks in all orders that there are.
#[test]
pub(super) fn nobody_waits_for_ever() {
    let world = World::new();
    let guests = [world.vm(true), world.vm(false), world.vm(true)];
    std::thread::scope(|scope| {
        for (cpu, guest) in guests.into_iter().enumerate() {
            let world = &world;
            scope.spawn(move || {
                let on = |call, x| world.on(cpu, call, x).ok();
                for round in 0..150_u64 {
                    let (pfn, gfn) = (GUEST + round % 5, round % 7);
                    world.load(cpu, guest, round % 2);
                    on(HostCall::DonateGuest, [pfn, gfn, 1, 0]);
                    on(HostCall::ShareGuest, [pfn, gfn, 1, RWX]);
                    world.el2.guest_call(cpu, [MEM_SHARE, gfn << 12, 0, 0]).ok();
                    world.el2.vcpu(cpu, Ipa::new(gfn << 12), Bytes::Store(b"mine")).ok();
                    world.el2.kernel_alias(cpu, Pa::new(pfn << 12), Bytes::Store(b"host"));
                    on(HostCall::UnshareGuest, [guest.handle, gfn, 1, 0]);
                    on(HostCall::ShareHyp, [pfn, 0, 0, 0]);
                    on(HostCall::UnshareHyp, [pfn, 0, 0, 0]);
                    world.put(cpu);
                    on(HostCall::ReclaimDyingGuestPage, [guest.handle, gfn, 0, 0]);
                    if round % 50 == 0 {
                        world.sound();
                    }
                }
                world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
            });
        }
    });
    world.sound();
}

/// A thread that has entered a CPU is answered as one that names it, and nobody else is that CPU meanwhile.
#[test]
fn a_thread_may_be_a_cpu_for_many_calls() {
    let world = World::new();
    let guest = world.running(true);
    let mut cpu = world.el2.enter(0).unwrap();
    assert_eq!(cpu.host_call([HostCall::DonateGuest.id(), GUEST, 5, 1, 0]), [0, 0]);
    assert_eq!(cpu.guest_call([MEM_SHARE, 5 << 12, 0, 0]), Ok(DONE));
    assert_eq!(cpu.guest_call([MEM_SHARE, 5 << 12, 0, 0]), Ok(INVALID));
    std::thread::scope(|scope| {
        let put = scope.spawn(|| world.put(0));
        assert_eq!(cpu.guest_call([MEM_UNSHARE, 5 << 12, 0, 0]), Ok(DONE), "still loaded");
        drop(cpu);
        put.join().unwrap();
    });
    let mut cpu = world.el2.enter(0).unwrap();
    assert_eq!(cpu.guest_call([MEM_SHARE, 5 << 12, 0, 0]), Err(Errno::EINVAL));
    assert_eq!(cpu.host_call([HostCall::VcpuLoad.id(), guest.handle, 1, 0, 0]), [0, 0]);
    assert_eq!(cpu.guest_call([MEM_SHARE, 5 << 12, 0, 0]), Ok(DONE));
    drop(cpu);
    assert!(world.el2.enter(NR_CPUS).is_none());
    assert_eq!(world.host_state(GUEST), State::SharedBorrowed);
    world.sound();
}
