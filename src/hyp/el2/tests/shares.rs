//! The host and EL2, and the host and the secure world.

use super::*;

#[test]
fn an_idle_machine_is_sound() {
    let world = World::new();
    world.sound();
    assert_eq!(world.host_state(CARVEOUT), State::NoPage);
    assert_eq!(world.host_state(KERNEL), State::Owned);
}

#[test]
pub(super) fn share_hyp_wants_the_hosts_own_memory() {
    let world = World::new();
    let guest = world.running(true);
    let np = world.vm(false);
    world.donate(GUEST, 0x10).unwrap();
    world.ffa(GUEST + 1);
    for (pfn, why) in [
        (DEVICE, "a device's"),
        (NO_MAP, "kept out of the map"),
        (CARVEOUT, "EL2's"),
        (GUEST, "a guest's"),
        (GUEST + 1, "the secure world sees it"),
        (guest.kvm >> 12, "EL2 sees it already"),
        (u64::MAX >> 12, "nothing is there"),
        (u64::MAX, "nothing is there either"),
    ] {
        println!("{why}");
        world.refused(HostCall::ShareHyp, [pfn, 0, 0, 0], Errno::EPERM);
    }
    let _ = np;
    world.does(HostCall::ShareHyp, [GUEST + 2, 0, 0, 0], &[GUEST + 2]);
    assert_eq!(world.host_state(GUEST + 2), State::SharedOwned);
    // The upper bits of a frame number are shifted out.
    world.does(HostCall::ShareHyp, [1 << 52 | (GUEST + 3), 0, 0, 0], &[GUEST + 3]);
}

impl World {
    fn ffa(&self, pfn: u64) -> u64 {
        self.el2.ffa_share(pfn, 1).unwrap()
    }
}

#[test]
pub(super) fn unshare_hyp_wants_a_page_that_is_shown_and_not_pinned() {
    let world = World::new();
    let guest = world.vm(true);
    world.ffa(GUEST + 1);
    for pfn in [DEVICE, NO_MAP, CARVEOUT, GUEST, GUEST + 1] {
        world.refused(HostCall::UnshareHyp, [pfn, 0, 0, 0], Errno::EPERM);
    }
    world.refused(HostCall::UnshareHyp, [guest.kvm >> 12, 0, 0, 0], Errno::EBUSY);
    let page = world.shared_page() >> 12;
    let pages = Pages::new(Pfn::new(page), 1);
    world.el2.pin_shared(pages).unwrap();
    world.el2.pin_shared(pages).unwrap();
    world.el2.unpin_shared(pages);
    world.refused(HostCall::UnshareHyp, [page, 0, 0, 0], Errno::EBUSY);
    world.el2.unpin_shared(pages);
    world.does(HostCall::UnshareHyp, [page, 0, 0, 0], &[page]);
    assert_eq!(world.host_state(page), State::Owned);
}

#[test]
fn pins_are_all_or_nothing_and_counted_to_their_limit() {
    let world = World::new();
    let page = world.shared_page() >> 12;
    let before = Snapshot::of(&world.el2);
    let two = Pages::new(Pfn::new(page), 2);
    assert_eq!(world.el2.pin_shared(two), Err(Errno::EPERM), "the second is not shown");
    assert_eq!(world.el2.pin_shared(Pages::new(Pfn::new(KERNEL - 1), 2)), Err(Errno::EINVAL));
    before.nothing_changed(&Snapshot::of(&world.el2));
    let one = Pages::new(Pfn::new(page), 1);
    for _ in 0..u16::MAX {
        world.el2.pin_shared(one).unwrap();
    }
    assert_eq!(world.el2.pin_shared(one), Err(Errno::EBUSY), "where upstream would stop");
    world.sound();
    (0..u16::MAX).for_each(|_| world.el2.unpin_shared(one));
    world.call(HostCall::UnshareHyp, [page, 0, 0, 0]).unwrap();
    world.sound();
}

#[test]
pub(super) fn the_secure_world_gives_back_what_it_has() {
    let world = World::new();
    assert_eq!(world.el2.ffa_share(u64::MAX, 1), Err(Errno::EINVAL));
    assert_eq!(world.el2.ffa_share(1 << 35, u64::MAX), Err(Errno::EINVAL));
    assert_eq!(world.el2.ffa_share(GUEST, 0), Err(Errno::EINVAL));
    assert_eq!(world.el2.ffa_share(DEVICE, 1), Err(Errno::EPERM));
    assert_eq!(world.el2.ffa_share(KERNEL - 1, 2), Err(Errno::EINVAL));
    let handle = world.el2.ffa_share(GUEST, 4).unwrap();
    world.sound();
    assert_eq!(world.el2.ffa_share(GUEST + 3, 2), Err(Errno::EPERM));
    world.refused(HostCall::UnshareHyp, [GUEST, 0, 0, 0], Errno::EPERM);
    assert_eq!(world.el2.ffa_reclaim(handle + 1), Err(Errno::EINVAL));
    let before = Snapshot::of(&world.el2);
    world.el2.ffa_reclaim(handle).unwrap();
    before.edges_exist(&Snapshot::of(&world.el2));
    assert_eq!(world.el2.ffa_reclaim(handle), Err(Errno::EINVAL));
    assert_eq!(world.host_state(GUEST), State::Owned);
    world.sound();
}
