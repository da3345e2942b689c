//! No byte that a protected guest keeps to itself reaches anybody else, whatever they do.

use super::*;

const SECRET: [u8; 4] = [0xd5; 4];
const PLAIN: [u8; 4] = [0x11; 4];
const NR_PAGES: u64 = 12;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) % bound
    }
}

/// Everything that the host can read, in every way that it has.
fn host_reads_no_secret(world: &World, random: &mut Random) {
    for pfn in GUEST..GUEST + NR_PAGES {
        let at = Pa::new(pfn << 12);
        let mut buf = [0; 4];
        world.el2.user(1, at, Bytes::Load(&mut buf)).ok();
        assert_ne!(buf, SECRET, "{pfn:#x}: user space");
        world.el2.uaccess(2, at, Bytes::Load(&mut buf)).ok();
        assert_ne!(buf, SECRET, "{pfn:#x}: the kernel's copies");
        if random.below(300) == 0 {
            world.el2.kernel_alias(1, at, Bytes::Load(&mut buf));
            assert_ne!(buf, SECRET, "{pfn:#x}: the kernel's own pointer");
        }
    }
}

fn keeps_its_secrets(profile: Profile, seed: u64) {
    let world = World::with(profile);
    let random = &mut Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let spy = world.vm(false);
    world.load(1, spy, 0);
    world.top_up(spy, 0, 8);
    let mut nr_secrets = 0;
    for _ in 0..6 {
        let guest = world.running(true);
        for _ in 0..60 {
            let (pfn, gfn) = (GUEST + random.below(NR_PAGES), random.below(8));
            match random.below(9) {
                0..=2 => {
                    world.top_up(guest, 0, 2);
                    world.donate(pfn, gfn).ok();
                }
                3..=5 => match world.guest_state(guest, gfn) {
                    State::Owned => {
                        world.store(gfn, &SECRET).unwrap();
                        nr_secrets += 1;
                    }
                    _ => drop(world.store(gfn, &PLAIN)),
                },
                6 => {
                    // What a guest shows it has to clear first.
                    world.store(gfn, &PLAIN).ok();
                    world.hvc(MEM_SHARE, gfn);
                }
                7 => drop(world.hvc(MEM_UNSHARE, gfn)),
                _ => {
                    // Another VM asks for the page, and reads what it got.
                    world.on(1, HostCall::ShareGuest, [pfn, 0x20 + gfn, 1, RWX]).ok();
                    let mut buf = [0; 4];
                    let at = Ipa::new((0x20 + gfn) << 12);
                    world.el2.vcpu(1, at, Bytes::Load(&mut buf)).ok();
                    assert_ne!(buf, SECRET, "another VM");
                    world.on(1, HostCall::UnshareGuest, [spy.handle, 0x20 + gfn, 1, 0]).ok();
                }
            }
            host_reads_no_secret(&world, random);
        }
        world.sound();
        world.put(0);
        world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        for gfn in 0..16 {
            world.call(HostCall::ReclaimDyingGuestPage, [guest.handle, gfn, 0, 0]).ok();
            host_reads_no_secret(&world, random);
        }
        world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
        host_reads_no_secret(&world, random);
        world.sound();
    }
    assert_eq!(world.el2.orphans(), []);
    assert!(nr_secrets > 20, "{nr_secrets}");
}

#[test]
fn secrets_stay_on_mainline() {
    (1..4).for_each(|seed| keeps_its_secrets(Profile::Mainline72, seed));
}

#[test]
fn secrets_stay_on_android() {
    (5..7).for_each(|seed| keeps_its_secrets(Profile::Android618, seed));
}
