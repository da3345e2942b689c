//! A host and guests that do anything, with any argument. EL2 answers, and the rules hold.

use super::*;
use crate::hyp::el2::guest_call::{FEATURES, HYP_MEMINFO, MEM_RELINQUISH};

/// Frames and addresses that much is done with.
const NEAR: [u64; 12] = [0, 1, 2, 3, 4, 5, 510, 511, 512, 513, 514, 515];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 33) % bound
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A number that nobody should send.
    fn odd(&mut self) -> u64 {
        let any = self.next();
        self.of(&[
            0,
            1,
            2,
            511,
            512,
            513,
            1 << 12,
            1 << 16,
            1 << 28,
            1 << 36,
            1 << 40,
            1 << 52,
            u64::MAX,
            u64::MAX >> 12,
            u64::MAX - 0xfff,
            i64::MAX as u64,
            any,
        ])
    }

    fn frame(&mut self) -> u64 {
        let guest = GUEST + self.of(&NEAR);
        match self.below(20) {
            0 => self.odd(),
            1 => self.of(&[DEVICE, NO_MAP, CARVEOUT, KERNEL, KERNEL + 1, 1 << 52 | GUEST]),
            2 => SPARE + self.below(NR_SPARE),
            _ => guest,
        }
    }

    fn gfn(&mut self) -> u64 {
        match self.below(20) {
            0 => self.odd(),
            1 => self.of(&[(1 << 28) - 1, (1 << 28) - 512, 1 << 18, 1 << 20]),
            _ => self.of(&NEAR),
        }
    }

    /// A frame, and mostly the one address of the guest's that goes with it.
    fn pair(&mut self) -> (u64, u64) {
        let pfn = self.frame();
        match self.below(4) {
            0 => (pfn, self.gfn()),
            _ => (pfn, pfn.wrapping_sub(GUEST)),
        }
    }

    fn nr(&mut self) -> u64 {
        match self.below(10) {
            0 => self.odd(),
            1 | 2 => 512,
            _ => 1,
        }
    }

    fn handle(&mut self, guests: &[Guest]) -> u64 {
        match self.below(20) {
            0 => self.odd(),
            1 => 0x1000 + self.below(8),
            _ => self.of(guests).handle,
        }
    }
}

/// The arguments of a call, mostly such that it could work.
fn arguments(random: &mut Random, world: &World, guests: &[Guest], call: HostCall) -> [u64; 4] {
    let guest = random.of(guests);
    match call {
        HostCall::ShareHyp | HostCall::UnshareHyp => [random.frame(), 0, 0, 0],
        HostCall::DonateGuest => {
            let (pfn, gfn) = random.pair();
            [pfn, gfn, random.nr(), 0]
        }
        HostCall::ShareGuest => {
            let prot = if random.below(8) == 0 { random.odd() } else { random.below(8) };
            let (pfn, gfn) = random.pair();
            [pfn, gfn, random.nr(), prot]
        }
        HostCall::UnshareGuest | HostCall::WrprotectGuest | HostCall::TestClearYoungGuest => {
            [random.handle(guests), random.gfn(), random.nr(), random.below(2)]
        }
        HostCall::RelaxPermsGuest => [random.gfn(), random.below(9), 0, 0],
        HostCall::MkyoungGuest => [random.gfn(), 0, 0, 0],
        HostCall::SplitGuest => [random.gfn(), random.nr(), 0, 0],
        HostCall::ForceReclaimGuestPage => {
            [random.frame().wrapping_shl(12) | random.below(4096), 0, 0, 0]
        }
        HostCall::ReclaimDyingGuestPage => [random.handle(guests), random.gfn(), 0, 0],
        HostCall::InitVm => [guest.kvm, world.page_or_odd(random), world.page_or_odd(random), 0],
        HostCall::InitVcpu => [random.handle(guests), guest.vcpus[0], world.page_or_odd(random), 0],
        HostCall::VcpuLoad => [random.handle(guests), random.below(3), 0, 0],
        HostCall::VcpuRun => [random.of(&guest.vcpus), 0, 0, 0],
        _ => [random.handle(guests), random.odd(), random.odd(), random.odd()],
    }
}

impl World {
    fn page_or_odd(&self, random: &mut Random) -> u64 {
        match random.below(4) {
            0 => random.odd(),
            _ => random.frame().wrapping_shl(12),
        }
    }
}

/// Calls that take from a vCPU's list before they fail.
fn may_take_first(call: HostCall) -> bool {
    matches!(call, HostCall::DonateGuest | HostCall::ShareGuest | HostCall::SplitGuest)
}

fn hammer(profile: Profile, seed: u64, steps: u64) {
    let random = &mut Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let world = World::with(profile);
    let mut guests = vec![world.vm(true), world.vm(false), world.vm(true), world.vm(false)];
    for (cpu, &guest) in guests.iter().enumerate().take(NR_CPUS) {
        world.load(cpu, guest, 0);
        world.top_up(guest, 0, 12);
    }
    let (mut nr_done, mut nr_refused) = (0, 0);
    let mut before = Snapshot::of(&world.el2);
    for step in 0..steps {
        let cpu = random.below(NR_CPUS as u64) as usize;
        let (mut failed, mut is_one_step) = (None, true);
        match random.below(10) {
            0..=5 => {
                let call = match random.below(5) {
                    0 => random.of(HostCall::ALL),
                    _ => world.moving_call(random, cpu),
                };
                if may_take_first(call) && random.below(3) == 0 {
                    world.refresh_list(random, cpu);
                }
                let x = arguments(random, &world, &guests, call);
                match world.on(cpu, call, x) {
                    Ok(_) => nr_done += 1,
                    Err(_) => {
                        nr_refused += 1;
                        failed = Some(call).filter(|&call| !may_take_first(call));
                    }
                }
            }
            6 => {
                let id =
                    random.of(&[FEATURES, HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH, 7]);
                let ipa = random.gfn().wrapping_shl(12) | if random.below(9) == 0 { 8 } else { 0 };
                let nr = if random.below(3) == 0 { random.odd() } else { 0 };
                world.el2.guest_call(cpu, [id, ipa, nr, 0]).ok();
            }
            7 => {
                let ipa = Ipa::new(random.gfn().wrapping_shl(12));
                world.el2.vcpu(cpu, ipa, Bytes::Store(&step.to_le_bytes())).ok();
            }
            8 => {
                let at = Pa::new(random.frame().wrapping_shl(12));
                let bytes = step.to_le_bytes();
                match random.below(8) {
                    0 => drop(world.el2.kernel_alias(cpu, at, Bytes::Store(&bytes))),
                    1..=3 => drop(world.el2.uaccess(cpu, at, Bytes::Store(&bytes))),
                    _ => drop(world.el2.user(cpu, at, Bytes::Store(&bytes))),
                }
            }
            _ => match random.below(6) {
                0 | 1 => {
                    let nr = random.below(3);
                    if let Ok(handle) = world.el2.ffa_share(random.frame(), nr) {
                        world.el2.ffa_reclaim(handle).unwrap();
                    }
                }
                2 => world.put(cpu),
                3 => {
                    let at = random.below(guests.len() as u64) as usize;
                    is_one_step = false;
                    if let Some(next) = world.replace(&guests[at], random) {
                        guests[at] = next;
                    }
                }
                _ => {
                    let guest = random.of(&guests);
                    world.load(cpu, guest, random.below(2));
                }
            },
        }
        let after = Snapshot::of(&world.el2);
        if let Some(call) = failed {
            println!("{step}: {call:?}");
            match call {
                // Pages for EL2 itself are cleared when they come and when they go.
                HostCall::InitVm | HostCall::InitVcpu => before.states_kept(&after),
                _ => before.nothing_changed(&after),
            }
        }
        if is_one_step {
            before.edges_exist(&after);
        }
        before = after;
        if step % 4 == 0 {
            world.sound();
        }
    }
    world.sound();
    println!("{nr_done} done, {nr_refused} refused");
    assert!(nr_done > steps / 20 && nr_refused > steps / 20);
}

impl World {
    /// A call that moves pages, mostly one that suits the VM that the CPU has.
    fn moving_call(&self, random: &mut Random, cpu: usize) -> HostCall {
        let loaded = self.el2.cpus[cpu].lock().loaded.as_ref().map(|loaded| loaded.vm.protected);
        let fill = match loaded {
            Some(true) => HostCall::DonateGuest,
            Some(false) => HostCall::ShareGuest,
            None => HostCall::VcpuLoad,
        };
        random.of(&[
            fill,
            fill,
            fill,
            HostCall::DonateGuest,
            HostCall::ShareGuest,
            HostCall::UnshareGuest,
            HostCall::UnshareGuest,
            HostCall::ForceReclaimGuestPage,
            HostCall::ReclaimDyingGuestPage,
            HostCall::ShareHyp,
            HostCall::UnshareHyp,
            HostCall::SplitGuest,
        ])
    }

    /// The list of the vCPU that the CPU has gets pages.
    fn refresh_list(&self, random: &mut Random, cpu: usize) {
        let cpu = self.el2.cpus[cpu].lock();
        let (Some(loaded), true) = (cpu.loaded.as_ref(), self.free.lock().len() > 64) else {
            return;
        };
        let mut list = loaded.vcpu.host.lock();
        list.memcache.extend((0..random.below(6)).map(|_| self.page()));
        list.nr_memcache = list.memcache.len() as u64;
    }

    /// Ends a VM, with or without asking its pages back, and makes another. Not if a vCPU is loaded.
    fn replace(&self, guest: &Guest, random: &mut Random) -> Option<Guest> {
        if self.free.lock().len() < 64 {
            return None;
        }
        let x = [guest.handle, 0, 0, 0];
        self.call(HostCall::StartTeardownVm, x).ok();
        if random.below(4) > 0 {
            let far = [1 << 18, 1 << 20, (1 << 28) - 1, (1 << 28) - 512];
            for gfn in NEAR.into_iter().chain(far) {
                for nr in [1, 512] {
                    self.call(HostCall::ReclaimDyingGuestPage, [guest.handle, gfn, 0, 0]).ok();
                    self.call(HostCall::UnshareGuest, [guest.handle, gfn, nr, 0]).ok();
                }
            }
        }
        let gone = self.el2.vms.lock().get(guest.handle as u16).is_none();
        if !gone && self.call(HostCall::FinalizeTeardownVm, x).is_err() {
            return None;
        }
        let said = self.el2.machine().host_struct(guest.kvm);
        self.free.lock().extend(said.lock().returned.drain(..).map(|at| at >> 12));
        // What was a spare page, or a guest's, is not the allocator's.
        self.free.lock().retain(|&pfn| pfn < SPARE);
        Some(self.vm(random.below(2) == 0))
    }
}

#[test]
fn mainline_stands_anything() {
    (1..3).for_each(|seed| hammer(Profile::Mainline72, seed, 800));
}

#[test]
fn android_stands_anything() {
    hammer(Profile::Android618, 11, 800);
}

#[test]
fn huge_pages_stand_anything() {
    hammer(Profile::HugeProtected, 21, 800);
}

#[test]
fn a_call_that_does_not_exist_is_said_not_to() {
    let world = World::new();
    let random = &mut Random(77);
    for _ in 0..2000 {
        let id = match random.below(2) {
            0 => random.odd(),
            _ => 0xc600_0000 + 23 + random.below(1 << 20),
        };
        let known = HostCall::ALL.iter().any(|call| call.id() == id & !(1 << 16));
        let answer = world.el2.host_call(0, [id, 1, 2, 3, 4]);
        assert!(known || answer == [u64::MAX, 1], "{id:#x}: {answer:x?}");
    }
    // Mainline splits nothing.
    let split = [HostCall::SplitGuest.id(), 0, 1, 0, 0];
    assert_eq!(world.el2.host_call(0, split), [u64::MAX, 0]);
}
