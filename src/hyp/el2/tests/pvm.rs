//! A protected guest: donations, shares back, reclaim.

use super::*;

#[test]
fn donation_wants_a_protected_vcpu_that_is_loaded() {
    let world = World::new();
    world.refused(HostCall::DonateGuest, [GUEST, 0, 0, 0], Errno::EINVAL);
    let np = world.running(false);
    world.refused(HostCall::DonateGuest, [GUEST, 0, 0, 0], Errno::EINVAL);
    assert_eq!(world.on(9, HostCall::DonateGuest, [GUEST, 0, 0, 0]), Err(Errno::EINVAL));
    let _ = np;
}

#[test]
pub(super) fn donation_checks_the_list_then_the_host_then_the_guest_then_the_tables() {
    let world = World::new();
    let guest = world.vm(true);
    world.load(0, guest, 0);
    // The list says more than it has, and the frame is no memory: the list comes first.
    world.el2.host_struct(guest.vcpus[0]).lock().nr_memcache = 1;
    assert_eq!(world.donate(DEVICE, 1 << 40), Err(Errno::ENOMEM));
    world.el2.host_struct(guest.vcpus[0]).lock().nr_memcache = 0;
    // No frames for tables; before that, the host's side and the guest's.
    for pfn in [DEVICE, NO_MAP, CARVEOUT, guest.kvm >> 12, guest.vcpus[1] >> 12] {
        world.refused(HostCall::DonateGuest, [pfn, 1 << 40, 0, 0], Errno::EPERM);
    }
    world.refused(HostCall::DonateGuest, [GUEST, 1 << 28, 0, 0], Errno::ERANGE);
    world.refused(HostCall::DonateGuest, [GUEST, 5, 0, 0], Errno::ENOMEM);
    world.top_up(guest, 0, 1);
    assert_eq!(world.donate(GUEST, 5), Err(Errno::ENOMEM), "one is less than a page may need");
    world.top_up(guest, 0, 2);
    world.donate(GUEST, 5).unwrap();
    world.sound();
    world.refused(HostCall::DonateGuest, [GUEST, 6, 0, 0], Errno::EPERM);
    world.refused(HostCall::DonateGuest, [GUEST + 1, 5, 0, 0], Errno::EPERM);
    // Enough for the page, which needs none, and yet too few.
    world.refused(HostCall::DonateGuest, [GUEST + 1, 6, 0, 0], Errno::ENOMEM);
    // 52 bits of a frame number count.
    world.top_up(guest, 0, 2);
    world.donate(1 << 52 | (GUEST + 2), 1 << 52 | 7).unwrap();
    assert_eq!(world.guest_state(guest, 7), State::Owned);
    world.sound();
}

#[test]
fn donation_takes_the_page_from_the_host_with_what_is_in_it() {
    let world = World::new();
    let guest = world.running(true);
    world.user_store(GUEST, b"boot").unwrap();
    world.donate(GUEST + 9, 9).unwrap();
    world.does(HostCall::DonateGuest, [GUEST, 0x10, 0, 0], &[GUEST]);
    assert_eq!(world.host_state(GUEST), State::NoPage);
    assert_eq!(world.guest_state(guest, 0x10), State::Owned);
    assert_eq!(world.read(0x10), Ok(*b"boot"));
    assert_eq!(world.user_load(GUEST), Err(Signal::SegvAccerr));
    world.store(0x10, b"mine").unwrap();
    assert_eq!(world.bytes(GUEST)[..4], *b"mine");
}

#[test]
pub(super) fn a_guest_shows_a_page_and_hides_it_again() {
    let world = World::new();
    let guest = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    world.store(0x10, b"show").unwrap();
    let private = Snapshot::of(&world.el2);
    assert_eq!(world.hvc(MEM_SHARE, 0x10), DONE);
    private.edges_exist(&Snapshot::of(&world.el2));
    assert_eq!(world.host_state(GUEST), State::SharedBorrowed);
    assert_eq!(world.guest_state(guest, 0x10), State::SharedOwned);
    assert_eq!(world.user_load(GUEST), Ok(*b"show"));
    world.sound();
    assert_eq!(world.hvc(MEM_SHARE, 0x10), INVALID, "twice");
    world.user_store(GUEST, b"host").unwrap();
    assert_eq!(world.hvc(MEM_UNSHARE, 0x10), DONE);
    world.sound();
    assert_eq!(world.read(0x10), Ok(*b"host"), "what the host wrote stays");
    assert_eq!(world.user_load(GUEST), Err(Signal::SegvAccerr));
    world.store(0x10, b"show").unwrap();
    // 16: there and back is nothing, annotation included.
    private.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(world.hvc(MEM_UNSHARE, 0x10), INVALID, "twice");
    assert_eq!(world.hvc(MEM_UNSHARE, 0x11), INVALID, "nothing is there");
    assert_eq!(world.hvc(MEM_UNSHARE, 1 << 40), INVALID);
    private.nothing_changed(&Snapshot::of(&world.el2));
}

#[test]
fn a_page_in_use_of_a_guest_is_nobodys_to_give() {
    let world = World::new();
    world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    world.donate(GUEST + 1, 0x11).unwrap();
    assert_eq!(world.hvc(MEM_SHARE, 0x11), DONE);
    for pfn in [GUEST, GUEST + 1] {
        world.refused(HostCall::ShareHyp, [pfn, 0, 0, 0], Errno::EPERM);
        world.refused(HostCall::DonateGuest, [pfn, 0x20, 0, 0], Errno::EPERM);
        assert_eq!(world.el2.ffa_share(pfn, 1), Err(Errno::EPERM));
    }
    world.put(0);
    world.running(false);
    for pfn in [GUEST, GUEST + 1] {
        world.refused(HostCall::ShareGuest, [pfn, 0x20, 1, RWX], Errno::EPERM);
    }
    world.sound();
}

#[test]
pub(super) fn pages_of_a_dying_guest_come_back_cleared_but_for_what_the_host_saw() {
    let world = World::new();
    let guest = world.running(true);
    for nth in 0..3 {
        world.donate(GUEST + nth, 0x10 + nth).unwrap();
        world.store(0x10 + nth, b"mine").unwrap();
    }
    assert_eq!(world.hvc(MEM_SHARE, 0x11), DONE);
    let reclaim = |gfn| [guest.handle, gfn, 0, 0];
    world.refused(HostCall::ReclaimDyingGuestPage, reclaim(0x10), Errno::EINVAL);
    world.call(HostCall::ForceReclaimGuestPage, [(GUEST + 2) << 12, 0, 0, 0]).unwrap();
    world.refused(HostCall::StartTeardownVm, reclaim(0), Errno::EINVAL);
    world.put(0);
    world.refused(HostCall::ReclaimDyingGuestPage, reclaim(0x10), Errno::EINVAL);
    world.call(HostCall::StartTeardownVm, reclaim(0)).unwrap();
    world.refused(HostCall::ReclaimDyingGuestPage, reclaim(0x13), Errno::ENOENT);
    world.refused(HostCall::ReclaimDyingGuestPage, reclaim(1 << 28), Errno::ERANGE);
    world.refused(HostCall::ReclaimDyingGuestPage, [0x1fff, 0x10, 0, 0], Errno::EINVAL);
    world.does(HostCall::ReclaimDyingGuestPage, reclaim(0x10), &[GUEST]);
    assert_eq!(world.user_load(GUEST), Ok([0; 4]));
    world.does(HostCall::ReclaimDyingGuestPage, reclaim(0x11), &[GUEST + 1]);
    assert_eq!(world.user_load(GUEST + 1), Ok(*b"mine"));
    world.does(HostCall::ReclaimDyingGuestPage, reclaim(0x12), &[]);
    world.refused(HostCall::ReclaimDyingGuestPage, reclaim(0x10), Errno::ENOENT);
    world.call(HostCall::FinalizeTeardownVm, reclaim(0)).unwrap();
    world.sound();
}

#[test]
pub(super) fn force_destroys_a_page_that_is_a_guests_alone() {
    let world = World::new();
    let guest = world.running(true);
    let force = |pfn: u64| [pfn << 12 | 0xabc, 0, 0, 0];
    world.donate(GUEST, 0x10).unwrap();
    world.donate(GUEST + 1, 0x11).unwrap();
    world.store(0x10, b"mine").unwrap();
    assert_eq!(world.hvc(MEM_SHARE, 0x11), DONE);
    for (pfn, errno) in [
        (DEVICE, Errno::EFAULT),
        (u64::MAX >> 12, Errno::EFAULT),
        (NO_MAP, Errno::EAGAIN),
        (GUEST + 5, Errno::EAGAIN),
        (GUEST + 1, Errno::EAGAIN),
        (guest.kvm >> 12, Errno::EAGAIN),
        (CARVEOUT, Errno::EPERM),
    ] {
        world.refused(HostCall::ForceReclaimGuestPage, force(pfn), errno);
    }
    world.does(HostCall::ForceReclaimGuestPage, force(GUEST), &[GUEST]);
    assert_eq!(world.user_load(GUEST), Ok([0; 4]));
    assert_eq!(world.guest_state(guest, 0x10), State::Poison);
    world.refused(HostCall::ForceReclaimGuestPage, force(GUEST), Errno::EAGAIN);
    // 26: nothing but the guest's end changes that.
    world.refused(HostCall::DonateGuest, [GUEST, 0x10, 0, 0], Errno::EPERM);
    world.refused(HostCall::DonateGuest, [GUEST + 6, 0x10, 0, 0], Errno::EPERM);
    let before = Snapshot::of(&world.el2);
    assert_eq!(world.hvc(MEM_SHARE, 0x10), INVALID);
    assert_eq!(world.hvc(MEM_UNSHARE, 0x10), INVALID);
    before.nothing_changed(&Snapshot::of(&world.el2));
    // 27: the guest learns of it when it goes there, and not before.
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Err(Errno::EINVAL));
    assert_eq!(world.read(0x11), Ok([0; 4]));
    assert!(matches!(world.read(0x10), Err(GuestStop::Fault(_))));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Ok(1));
    assert!(matches!(world.read(0x12), Err(GuestStop::Fault(_))));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Ok(0));
    assert!(matches!(world.read(0x40_000), Err(GuestStop::Fault(_))));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Err(Errno::EINVAL), "no table");
    world.put(0);
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Err(Errno::EINVAL));
    world.sound();
}

#[test]
fn two_guests_never_have_one_page() {
    let world = World::new();
    let first = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    world.put(0);
    let second = world.running(true);
    world.refused(HostCall::DonateGuest, [GUEST, 0x10, 0, 0], Errno::EPERM);
    world.donate(GUEST + 1, 0x10).unwrap();
    assert_eq!(world.guest_state(first, 0x10), State::Owned);
    assert_eq!(world.guest_state(second, 0x10), State::Owned);
    world.sound();
}
