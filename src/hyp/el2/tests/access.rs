//! Who touches bytes.

use super::*;

const AT: Pa = Pa::new(GUEST << 12 | 0x10);

fn private_page() -> (World, Guest) {
    let world = World::new();
    let guest = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    world.store(0x10, b"mine").unwrap();
    (world, guest)
}

#[test]
fn user_space_gets_a_signal_and_the_page_stays() {
    let (world, _) = private_page();
    let before = Snapshot::of(&world.el2);
    let mut buf = [0xee; 4];
    assert_eq!(world.el2.user(0, AT, Bytes::Load(&mut buf)), Err(Signal::SegvAccerr));
    assert_eq!(world.el2.user(1, AT, Bytes::Store(b"evil")), Err(Signal::SegvAccerr));
    assert_eq!(buf, [0xee; 4]);
    before.nothing_changed(&Snapshot::of(&world.el2));
    let beyond = Pa::new(!0xfff);
    assert_eq!(world.el2.user(0, beyond, Bytes::Load(&mut buf)), Err(Signal::Bus));
    let crossing = Pa::new(GUEST << 12 | 0xffe);
    assert_eq!(
        world.el2.user(0, Pa::new(crossing.get() + 0x1000), Bytes::Load(&mut buf)),
        Err(Signal::Bus)
    );
    world.sound();
}

#[test]
fn the_kernels_copies_fail_and_the_page_stays() {
    let (world, _) = private_page();
    let before = Snapshot::of(&world.el2);
    let mut buf = [0xee; 4];
    assert_eq!(world.el2.uaccess(0, AT, Bytes::Load(&mut buf)), Err(Errno::EFAULT));
    assert_eq!(world.el2.uaccess(0, AT, Bytes::Store(b"evil")), Err(Errno::EFAULT));
    before.nothing_changed(&Snapshot::of(&world.el2));
    let own = Pa::new((GUEST + 1) << 12);
    world.el2.uaccess(0, own, Bytes::Store(b"fine")).unwrap();
    world.el2.uaccess(1, own, Bytes::Load(&mut buf)).unwrap();
    assert_eq!(&buf, b"fine");
}

#[test]
pub(super) fn the_kernels_own_pointer_destroys_the_page() {
    let (world, guest) = private_page();
    let mut buf = [0xee; 4];
    let outcome = world.el2.kernel_alias(1, AT, Bytes::Load(&mut buf));
    assert_eq!((outcome, buf), (KernelOutcome::DoneAfterReclaim, [0; 4]));
    assert_eq!(world.guest_state(guest, 0x10), State::Poison);
    assert!(matches!(world.read(0x10), Err(GuestStop::Fault(_))));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Ok(1));
    let counts = world.el2.incidents.counts();
    assert_eq!((counts.nr_destroyed, counts.nr_oopses), (1, 0));
    assert_eq!(world.el2.kernel_alias(1, AT, Bytes::Store(b"own!")), KernelOutcome::Done);
    world.sound();
}

#[test]
fn the_kernels_own_pointer_into_el2_is_the_end() {
    let (world, _) = private_page();
    let at = Pa::new(CARVEOUT << 12);
    let before = Snapshot::of(&world.el2);
    assert_eq!(world.el2.kernel_alias(0, at, Bytes::Store(b"evil")), KernelOutcome::Oops);
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(world.el2.incidents.counts().nr_oopses, 1);
    let beyond = Pa::new(!0xfff);
    assert_eq!(world.el2.kernel_alias(0, beyond, Bytes::Store(b"evil")), KernelOutcome::Oops);
}

#[test]
fn a_device_reaches_everything_and_is_counted() {
    let (world, _) = private_page();
    world.el2.dma(AT, Bytes::Store(b"evil")).unwrap();
    assert_eq!(&world.bytes(GUEST)[0x10..0x14], b"evil");
    assert_eq!(world.el2.incidents.counts().nr_dma_into_private, 1);
    let mut buf = [0; 4];
    world.el2.dma(Pa::new((GUEST + 1) << 12), Bytes::Load(&mut buf)).unwrap();
    assert_eq!(world.el2.incidents.counts().nr_dma_into_private, 1);
}

#[test]
fn what_a_cpu_remembers_is_forgotten_when_the_page_goes() {
    let world = World::new();
    let guest = world.running(true);
    // Every CPU has seen the page, by a block around it.
    for cpu in 0..NR_CPUS {
        let mut buf = [0; 4];
        world.el2.user(cpu, AT, Bytes::Load(&mut buf)).unwrap();
    }
    world.donate(GUEST, 0x10).unwrap();
    for cpu in 0..NR_CPUS {
        let mut buf = [0; 4];
        assert_eq!(world.el2.user(cpu, AT, Bytes::Load(&mut buf)), Err(Signal::SegvAccerr));
    }
    // Both vCPUs have used it, and the host takes it by force.
    world.load(1, guest, 1);
    world.store(0x10, b"mine").unwrap();
    world.el2.vcpu(1, Ipa::new(0x10_000), Bytes::Store(b"mine")).unwrap();
    world.call(HostCall::ForceReclaimGuestPage, [GUEST << 12, 0, 0, 0]).unwrap();
    for cpu in 0..2 {
        let got = world.el2.vcpu(cpu, Ipa::new(0x10_000), Bytes::Store(b"evil"));
        assert!(matches!(got, Err(GuestStop::Fault(_))), "CPU {cpu}: {got:?}");
    }
    assert_eq!(world.user_load(GUEST), Ok([0; 4]));
    world.sound();
}

#[test]
fn a_vcpu_that_is_not_there_reaches_nothing() {
    let world = World::new();
    let guest = world.vm(true);
    assert_eq!(world.read(0x10), Err(GuestStop::Invalid));
    assert_eq!(world.el2.vcpu(99, Ipa::new(0), Bytes::Store(b"x")), Err(GuestStop::Invalid));
    world.load(0, guest, 0);
    world.top_up(guest, 0, 2);
    assert!(matches!(
        world.el2.vcpu(0, Ipa::new(u64::MAX), Bytes::Store(b"x")),
        Err(GuestStop::Fault(_))
    ));
    world.donate(GUEST, 0).unwrap();
    assert_eq!(world.el2.vcpu(0, Ipa::new(0xfff), Bytes::Store(b"xy")), Err(GuestStop::Invalid));
}
