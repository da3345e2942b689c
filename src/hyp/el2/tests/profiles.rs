//! What other versions do otherwise.

use super::*;
use crate::hyp::el2::guest_call::MEM_RELINQUISH;
use crate::stage2::Level;

const BLOCK: u64 = 512;

fn donate_block(world: &World) -> Answer {
    world.call(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0])
}

fn host_level(world: &World, pfn: u64) -> Level {
    world.el2.host.lock().tree.get(Gfn::new(pfn)).unwrap().0
}

fn destroys(world: &World, guest: Guest, gfn: u64) {
    world.call(HostCall::ForceReclaimGuestPage, [(GUEST + gfn - 0x400) << 12, 0, 0, 0]).unwrap();
    assert_eq!(world.guest_state(guest, gfn), State::Poison);
    assert!(matches!(world.read(gfn), Err(GuestStop::Fault(_))));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Ok(1));
}

#[test]
fn mainline_gives_a_page_and_does_not_look_at_the_number() {
    let world = World::new();
    let guest = world.running(true);
    donate_block(&world).unwrap();
    assert_eq!(world.guest_state(guest, 0x400), State::Owned);
    assert_eq!(world.guest_state(guest, 0x401), State::NoPage);
    world.sound();
}

#[test]
pub(super) fn blocks_are_given_where_blocks_begin_and_all_or_nothing() {
    for profile in [Profile::HugeProtected, Profile::Android618] {
        let world = World::with(profile);
        world.running(true);
        for (x, errno) in [
            ([GUEST, 0x400, 0, 0], Errno::EINVAL),
            ([GUEST, 0x400, 2, 0], Errno::EINVAL),
            ([GUEST, 0x400, u64::MAX, 0], Errno::EINVAL),
            ([GUEST + 1, 0x400, BLOCK, 0], Errno::EINVAL),
            ([GUEST, 0x401, BLOCK, 0], Errno::EINVAL),
            ([NO_MAP & !0x1ff, 0x400, BLOCK, 0], Errno::EINVAL),
        ] {
            world.refused(HostCall::DonateGuest, x, errno);
        }
        world.call(HostCall::ShareHyp, [GUEST + 511, 0, 0, 0]).unwrap();
        world.refused(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0], Errno::EPERM);
        world.call(HostCall::UnshareHyp, [GUEST + 511, 0, 0, 0]).unwrap();
        world.donate(GUEST + 512, 0x5ff).unwrap();
        world.refused(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0], Errno::EPERM);
        world.refused(HostCall::DonateGuest, [GUEST, (1 << 28) - 1, BLOCK, 0], Errno::EINVAL);
        world.refused(HostCall::DonateGuest, [GUEST, 1 << 28, BLOCK, 0], Errno::ERANGE);
    }
}

#[test]
pub(super) fn a_block_is_one_entry_on_both_sides_until_it_is_split() {
    let world = World::with(Profile::HugeProtected);
    let guest = world.running(true);
    world.user_store(GUEST + 0x77, b"boot").unwrap();
    donate_block(&world).unwrap();
    assert_eq!(host_level(&world, GUEST + 0x77), Level::BLOCK_2M);
    assert_eq!(world.user_load(GUEST + 0x77), Err(Signal::SegvAccerr));
    assert_eq!(world.read(0x477), Ok(*b"boot"));
    world.sound();
    let before = Snapshot::of(&world.el2);
    assert_eq!(world.hvc(MEM_SHARE, 0x477), GuestAnswer::WantsSplit(Gfn::new(0x477)));
    assert_eq!(world.hvc(MEM_UNSHARE, 0x477), INVALID);
    before.nothing_changed(&Snapshot::of(&world.el2));
    for (x, errno) in [
        ([0x400, 2, 0, 0], Errno::EINVAL),
        ([0x600, BLOCK, 0, 0], Errno::ENOENT),
        ([1 << 28, BLOCK, 0, 0], Errno::ERANGE),
        ([0x477, 1, 0, 0], Errno::EINVAL),
    ] {
        world.refused(HostCall::SplitGuest, x, errno);
    }
    world.top_up(guest, 0, 8);
    world.call(HostCall::SplitGuest, [0x400, BLOCK, 0, 0]).unwrap();
    world.sound();
    assert_eq!(host_level(&world, GUEST + 0x77), Level::PAGE);
    assert_eq!(world.read(0x477), Ok(*b"boot"));
    assert_eq!(world.hvc(MEM_SHARE, 0x477), DONE);
    assert_eq!(world.user_load(GUEST + 0x77), Ok(*b"boot"));
    assert_eq!(world.user_load(GUEST + 0x78), Err(Signal::SegvAccerr));
    assert_eq!(world.call(HostCall::SplitGuest, [0x400, BLOCK, 0, 0]), Err(Errno::EINVAL));
    destroys(&world, guest, 0x401);
    assert_eq!(world.guest_state(guest, 0x402), State::Owned, "a page alone");
    world.sound();
}

#[test]
fn a_block_is_destroyed_as_one() {
    let world = World::with(Profile::HugeProtected);
    let guest = world.running(true);
    donate_block(&world).unwrap();
    world.store(0x5ff, b"mine").unwrap();
    destroys(&world, guest, 0x477);
    assert_eq!(world.guest_state(guest, 0x5ff), State::Poison);
    assert_eq!(world.user_load(GUEST + 511), Ok([0; 4]));
    assert_eq!(world.hvc(MEM_SHARE, 0x5ff), INVALID);
    world.refused(HostCall::DonateGuest, [GUEST, 0x5ff, 1, 0], Errno::EPERM);
    world.sound();
    world.put(0);
    let x = [guest.handle, 0x400, 0, 0];
    world.call(HostCall::StartTeardownVm, x).unwrap();
    world.does(HostCall::ReclaimDyingGuestPage, x, &[]);
    world.call(HostCall::FinalizeTeardownVm, x).unwrap();
    world.sound();
}

#[test]
fn a_dying_guests_block_comes_back_as_one() {
    for profile in [Profile::HugeProtected, Profile::Android618] {
        let world = World::with(profile);
        let guest = world.running(true);
        donate_block(&world).unwrap();
        world.store(0x477, b"mine").unwrap();
        world.sound();
        world.put(0);
        let x = |gfn| [guest.handle, gfn, 0, 0];
        world.call(HostCall::StartTeardownVm, x(0)).unwrap();
        world.refused(HostCall::ReclaimDyingGuestPage, x(0x477), Errno::E2BIG);
        let all: Vec<_> = (GUEST..GUEST + BLOCK).collect();
        world.does(HostCall::ReclaimDyingGuestPage, x(0x400), &all);
        assert_eq!(world.user_load(GUEST + 0x77), Ok([0; 4]));
        world.call(HostCall::FinalizeTeardownVm, x(0)).unwrap();
        world.sound();
        assert_eq!(world.el2.orphans(), []);
    }
}

#[test]
fn a_guest_of_androids_gives_pages_back() {
    let world = World::with(Profile::Android618);
    let guest = world.running(true);
    for nth in 0..3 {
        world.donate(GUEST + nth, 0x10 + nth).unwrap();
        world.store(0x10 + nth, b"mine").unwrap();
    }
    assert_eq!(world.hvc(MEM_SHARE, 0x11), GuestAnswer::Resume([0, 1, 0, 0]));
    world.call(HostCall::ForceReclaimGuestPage, [(GUEST + 2) << 12, 0, 0, 0]).unwrap();
    let before = Snapshot::of(&world.el2);
    let call = |x| world.el2.guest_call(0, x).unwrap();
    assert_eq!(call([MEM_RELINQUISH, 0x10_008, 0, 0]), INVALID);
    assert_eq!(call([MEM_RELINQUISH, 0x10_000, 1, 0]), INVALID);
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x11), INVALID, "shared");
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x12), INVALID, "destroyed");
    assert_eq!(world.hvc(MEM_RELINQUISH, 1 << 28), INVALID, "beyond");
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x13), DONE, "nothing is there");
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x10), DONE);
    assert_eq!(world.user_load(GUEST), Ok([0; 4]));
    assert!(matches!(world.read(0x10), Err(GuestStop::Fault(_))));
    world.sound();
    world.donate(GUEST, 0x10).unwrap();
    donate_block(&World::with(Profile::Android618)).unwrap_err();
    world.donate(GUEST + 512, 0x600).unwrap();
    world.sound();
    let _ = guest;
}

#[test]
fn devices_reach_what_the_iommu_was_told_of_and_it_stays() {
    let world = World::with(Profile::Android618);
    world.running(true);
    let pages = |pfn, nr| Pages::new(Pfn::new(pfn), nr);
    let dma = |pfn: u64| world.el2.dma(Pa::new(pfn << 12), Bytes::Store(b"data"));
    assert_eq!(dma(GUEST), Err(Errno::EPERM));
    assert_eq!(world.el2.map_dma(pages(DEVICE, 1)), Err(Errno::EPERM));
    assert_eq!(world.el2.unmap_dma(pages(GUEST, 1)), Err(Errno::EINVAL));
    world.el2.map_dma(pages(GUEST, 2)).unwrap();
    world.el2.map_dma(pages(GUEST, 1)).unwrap();
    dma(GUEST).unwrap();
    world.sound();
    world.refused(HostCall::DonateGuest, [GUEST, 0x10, 1, 0], Errno::EINVAL);
    world.refused(HostCall::ShareHyp, [GUEST, 0, 0, 0], Errno::EINVAL);
    assert_eq!(world.el2.ffa_share(GUEST, 1), Err(Errno::EINVAL));
    let frames = world.pages(nr_vcpu_pages());
    world.el2.map_dma(pages(frames >> 12, 1)).unwrap();
    let guest = world.vm(true);
    let at = world.shared_page();
    world.refused(HostCall::InitVcpu, [guest.handle, at, frames, 0], Errno::ENOMEM);
    world.put(0);
    // A guest that is not protected sees what the device sees.
    let np = world.running(false);
    world.share(GUEST, 0x10, 1).unwrap();
    dma(GUEST).unwrap();
    assert_eq!(world.read(0x10), Ok(*b"data"));
    assert_eq!(world.el2.map_dma(pages(GUEST, 1)), Err(Errno::EPERM));
    world.sound();
    world.el2.unmap_dma(pages(GUEST, 1)).unwrap();
    world.call(HostCall::UnshareGuest, [np.handle, 0x10, 1, 0]).unwrap();
    world.put(0);
    world.load(0, guest, 0);
    world.top_up(guest, 0, 8);
    world.el2.unmap_dma(pages(GUEST + 1, 1)).unwrap();
    world.refused(HostCall::DonateGuest, [GUEST, 0x10, 1, 0], Errno::EINVAL);
    world.el2.unmap_dma(pages(GUEST, 1)).unwrap();
    world.donate(GUEST, 0x10).unwrap();
    assert_eq!(dma(GUEST), Err(Errno::EPERM));
    assert_eq!(world.el2.map_dma(pages(GUEST, 1)), Err(Errno::EPERM));
    world.sound();
    assert_eq!(World::new().el2.map_dma(pages(GUEST, 1)), Err(Errno::ENOSYS));
}

#[test]
fn the_secure_world_may_own_pages_of_androids_host() {
    let world = World::with(Profile::Android618);
    world.running(true);
    world.user_store(GUEST + 1, b"host").unwrap();
    let pages = |pfn, nr| Pages::new(Pfn::new(pfn), nr);
    world.el2.map_dma(pages(GUEST + 8, 1)).unwrap();
    world.prime(HostCall::DonateGuest);
    let before = Snapshot::of(&world.el2);
    for (pfn, nr, errno) in [
        (GUEST, 0, Errno::EINVAL),
        (u64::MAX, 1, Errno::EINVAL),
        (DEVICE, 1, Errno::EINVAL),
        (NO_MAP - 1, 2, Errno::EINVAL),
        (NO_MAP, 1, Errno::EPERM),
        (CARVEOUT, 1, Errno::EPERM),
        (GUEST + 7, 2, Errno::EINVAL),
    ] {
        assert_eq!(world.el2.ffa_donate(pfn, nr), Err(errno), "{pfn:#x} {nr}");
    }
    before.nothing_changed(&Snapshot::of(&world.el2));
    let shown = world.el2.ffa_share(GUEST, 1).unwrap();
    let owned = world.el2.ffa_donate(GUEST + 1, 2).unwrap();
    world.sound();
    before.edges_exist(&Snapshot::of(&world.el2));
    assert_eq!(world.el2.ffa_donate(GUEST + 2, 1), Err(Errno::EPERM));
    assert_eq!(world.user_load(GUEST + 1), Err(Signal::SegvAccerr));
    world.refused(HostCall::DonateGuest, [GUEST + 1, 0x10, 1, 0], Errno::EPERM);
    world.refused(HostCall::ForceReclaimGuestPage, [(GUEST + 1) << 12, 0, 0, 0], Errno::EPERM);
    let outcome = world.el2.kernel_alias(0, Pa::new((GUEST + 1) << 12), Bytes::Store(b"x"));
    assert_eq!(outcome, KernelOutcome::Oops);
    world.el2.ffa_reclaim(owned).unwrap();
    world.sound();
    assert_eq!(world.user_load(GUEST + 1), Ok(*b"host"), "nobody cleared it");
    assert_eq!(world.el2.ffa_reclaim(owned), Err(Errno::EINVAL));
    world.el2.ffa_reclaim(shown).unwrap();
    before.nothing_changed(&Snapshot::of(&world.el2));
    for profile in [Profile::Mainline72, Profile::HugeProtected] {
        assert_eq!(World::with(profile).el2.ffa_donate(GUEST, 1), Err(Errno::ENOSYS));
    }
}
