//! A guest that is not protected: shares, of pages and blocks, to several.

use super::*;

const R: u64 = 4;

fn unshare(guest: Guest, gfn: u64, nr: u64) -> [u64; 4] {
    [guest.handle, gfn, nr, 0]
}

#[test]
pub(super) fn shares_check_arguments_then_memory_then_the_guest_then_the_host() {
    let world = World::new();
    world.refused(HostCall::ShareGuest, [GUEST, 0, 1, RWX], Errno::EINVAL);
    let pvm = world.running(true);
    world.donate(GUEST + 9, 9).unwrap();
    world.refused(HostCall::ShareGuest, [GUEST, 0, 1, RWX], Errno::EINVAL);
    world.put(0);
    let guest = world.vm(false);
    world.load(0, guest, 0);
    let ok = [GUEST, 0x200, 1, RWX];
    let with = |at: usize, value| {
        let mut x = ok;
        x[at] = value;
        x
    };
    for (x, errno, why) in [
        (with(3, 8), Errno::EINVAL, "no such right"),
        (with(3, u64::MAX), Errno::EINVAL, "no such right"),
        ([1 << 36, 0x200, 3, 8], Errno::EINVAL, "rights first"),
        (with(0, 1 << 36), Errno::EINVAL, "no address reaches it"),
        (with(0, u64::MAX), Errno::EINVAL, "nor this"),
        (with(2, 0), Errno::EINVAL, "no page"),
        (with(2, 2), Errno::EINVAL, "two pages"),
        (with(2, u64::MAX), Errno::EINVAL, "too many"),
        ([GUEST + 1, 0x200, 512, RWX], Errno::EINVAL, "a frame where no block begins"),
        ([GUEST, 0x201, 512, RWX], Errno::EINVAL, "an address where no block begins"),
        (with(0, DEVICE), Errno::EPERM, "a device's"),
        (with(0, NO_MAP), Errno::EPERM, "kept out of the map"),
        ([NO_MAP, 0x200, 512, RWX], Errno::EINVAL, "memory and not"),
        ([DEVICE, 1 << 40, 1, RWX], Errno::EPERM, "memory before the guest"),
        ([CARVEOUT, 1 << 40, 1, RWX], Errno::ERANGE, "the guest before the host"),
        (with(0, CARVEOUT), Errno::EPERM, "EL2's"),
        (with(0, GUEST + 9), Errno::EPERM, "another guest's"),
        (with(0, pvm.kvm >> 12), Errno::EPERM, "shown to EL2"),
        (ok, Errno::ENOMEM, "no frames for tables"),
    ] {
        println!("{why}");
        world.refused(HostCall::ShareGuest, x, errno);
    }
    world.top_up(guest, 0, 4);
    world.call(HostCall::ShareGuest, ok).unwrap();
    world.refused(HostCall::ShareGuest, ok, Errno::EPERM);
    world.sound();
}

#[test]
fn a_page_may_be_shown_often_and_is_the_hosts_all_along() {
    let world = World::new();
    let first = world.running(false);
    world.does(HostCall::ShareGuest, [GUEST, 0x10, 1, RWX], &[GUEST]);
    world.does(HostCall::ShareGuest, [GUEST, 0x11, 1, RWX], &[GUEST]);
    world.put(0);
    let second = world.running(false);
    world.does(HostCall::ShareGuest, [GUEST, 0x10, 1, R], &[GUEST]);
    assert_eq!(world.host_state(GUEST), State::SharedOwned);
    world.user_store(GUEST, b"both").unwrap();
    assert_eq!(world.read(0x10), Ok(*b"both"));
    assert!(matches!(world.store(0x10, b"no"), Err(GuestStop::Fault(_))), "read only");
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Err(Errno::EINVAL));
    world.refused(HostCall::UnshareHyp, [GUEST, 0, 0, 0], Errno::EPERM);
    world.refused(HostCall::ShareHyp, [GUEST, 0, 0, 0], Errno::EPERM);
    for (guest, gfn) in [(first, 0x10), (second, 0x10), (first, 0x11)] {
        world.does(HostCall::UnshareGuest, unshare(guest, gfn, 1), &[GUEST]);
    }
    assert_eq!(world.host_state(GUEST), State::Owned);
    assert_eq!(world.bytes(GUEST)[..4], *b"both", "nothing is cleared");
}

#[test]
fn a_count_that_is_full_is_busy() {
    let world = World::new();
    world.running(false);
    world.share(GUEST, 0x10, 1).unwrap();
    world.el2.host.lock().pages.update(Pfn::new(GUEST), |page| page.nr_guests = u32::MAX);
    world.refused(HostCall::ShareGuest, [GUEST, 0x11, 1, RWX], Errno::EBUSY);
}

#[test]
pub(super) fn a_block_is_shown_and_hidden_as_one() {
    let world = World::new();
    let guest = world.running(false);
    let all: Vec<_> = (GUEST..GUEST + 512).collect();
    world.prime(HostCall::ShareGuest);
    let before = Snapshot::of(&world.el2);
    world.does(HostCall::ShareGuest, [GUEST, 0x400, 512, RWX], &all);
    world.user_store(GUEST + 0x123, b"deep").unwrap();
    assert_eq!(world.read(0x523), Ok(*b"deep"));
    for (x, errno) in [
        (unshare(guest, 0x400, 1), Errno::E2BIG),
        (unshare(guest, 0x523, 1), Errno::E2BIG),
        (unshare(guest, 0x523, 512), Errno::EINVAL),
        (unshare(guest, 0x400, 2), Errno::EINVAL),
        (unshare(guest, 0x600, 512), Errno::ENOENT),
        (unshare(guest, 1 << 28, 512), Errno::ERANGE),
        ([guest.handle + 1, 0x400, 512, 0], Errno::EINVAL),
    ] {
        world.refused(HostCall::UnshareGuest, x, errno);
    }
    world.refused(HostCall::ShareGuest, [GUEST + 512, 0x5ff, 1, RWX], Errno::EPERM);
    world.share(GUEST + 512, 0x600, 1).unwrap();
    world.refused(HostCall::ShareGuest, [GUEST + 512, 0x600, 512, RWX], Errno::EPERM);
    world.refused(HostCall::UnshareGuest, unshare(guest, 0x600, 512), Errno::E2BIG);
    world.call(HostCall::UnshareGuest, unshare(guest, 0x600, 1)).unwrap();
    world.does(HostCall::UnshareGuest, unshare(guest, 0x400, 512), &all);
    world.user_store(GUEST + 0x123, &[0; 4]).unwrap();
    before.nothing_changed(&Snapshot::of(&world.el2));
    world.sound();
}

#[test]
fn a_protected_vm_has_none_of_this() {
    let world = World::new();
    let guest = world.running(true);
    world.donate(GUEST, 0x10).unwrap();
    for (call, x) in [
        (HostCall::UnshareGuest, unshare(guest, 0x10, 1)),
        (HostCall::RelaxPermsGuest, [0x10, RWX, 0, 0]),
        (HostCall::WrprotectGuest, unshare(guest, 0x10, 1)),
        (HostCall::TestClearYoungGuest, [guest.handle, 0x10, 1, 1]),
        (HostCall::MkyoungGuest, [0x10, 0, 0, 0]),
    ] {
        world.refused(call, x, Errno::EINVAL);
    }
}

#[test]
fn rights_are_taken_and_given_and_use_is_seen() {
    let world = World::new();
    let guest = world.running(false);
    world.share(GUEST, 0x10, 1).unwrap();
    world.store(0x10, b"old!").unwrap();
    let young = |mkold| world.call(HostCall::TestClearYoungGuest, [guest.handle, 0x10, 1, mkold]);
    assert_eq!([young(1), young(0), young(1)], [Ok(1), Ok(0), Ok(0)]);
    world.call(HostCall::MkyoungGuest, [0x10, 0, 0, 0]).unwrap();
    world.call(HostCall::MkyoungGuest, [0x1234, 0, 0, 0]).unwrap();
    world.call(HostCall::MkyoungGuest, [u64::MAX, 0, 0, 0]).unwrap();
    assert_eq!(young(0), Ok(1));
    assert_eq!(world.call(HostCall::TestClearYoungGuest, [guest.handle, 1 << 28, 1, 1]), Ok(0));

    world.call(HostCall::WrprotectGuest, [guest.handle, 0x10, 1, 0]).unwrap();
    world.store(0x10, b"seen").expect("the vCPU remembers that it may");
    world.call(HostCall::TlbFlushVmid, [guest.handle, 0, 0, 0]).unwrap();
    assert!(matches!(world.store(0x10, b"lost"), Err(GuestStop::Fault(_))));
    assert_eq!(world.read(0x10), Ok(*b"seen"));
    world.refused(HostCall::RelaxPermsGuest, [0x10, 8, 0, 0], Errno::EINVAL);
    world.refused(HostCall::RelaxPermsGuest, [0x11, RWX, 0, 0], Errno::EAGAIN);
    world.refused(HostCall::RelaxPermsGuest, [1 << 28, RWX, 0, 0], Errno::ERANGE);
    world.call(HostCall::RelaxPermsGuest, [0x10, 2, 0, 0]).unwrap();
    world.store(0x10, b"back").unwrap();
    for call in [HostCall::WrprotectGuest, HostCall::TestClearYoungGuest] {
        world.refused(call, [guest.handle, 0x10, 3, 0], Errno::EINVAL);
        world.refused(call, [guest.handle, 0x10, 512, 0], Errno::EINVAL);
        world.refused(call, [guest.handle + 1, 0x10, 1, 0], Errno::EINVAL);
    }
    world.refused(HostCall::WrprotectGuest, [guest.handle, 1 << 28, 1, 0], Errno::ERANGE);
    world.sound();
}

#[test]
fn a_dying_guest_is_unshared_and_has_nothing_to_reclaim() {
    let world = World::new();
    let guest = world.running(false);
    world.share(GUEST, 0x10, 1).unwrap();
    world.put(0);
    world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    let x = [guest.handle, 0x10, 0, 0];
    world.refused(HostCall::ReclaimDyingGuestPage, x, Errno::EPERM);
    world.does(HostCall::UnshareGuest, unshare(guest, 0x10, 1), &[GUEST]);
    world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    world.sound();
}
