//! Memory that breaks in the middle of something. What is broken is nobody's any more; what comes behind it is not lost.

use super::*;
use crate::hyp::el2::host_struct::ListedPages;

fn broken_of(world: &World) -> Vec<u64> {
    world.el2.orphans().iter().map(|pfn| pfn.get()).collect()
}

#[test]
fn an_end_goes_on_behind_a_broken_page() {
    let world = World::with_bytes_everywhere(Profile::Mainline72);
    let guest = world.running(true);
    for nth in 0..20 {
        world.top_up(guest, 0, 2);
        world.donate(GUEST + nth, nth << 18).unwrap();
        world.sound();
    }
    world.put(0);
    world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    for nth in 0..20 {
        world.call(HostCall::ReclaimDyingGuestPage, [guest.handle, nth << 18, 0, 0]).unwrap();
    }
    let owned = || {
        let host = world.el2.host.lock();
        let of_el2 = |pfn: &u64| host.page(Pfn::new(*pfn)).hyp() == State::Owned;
        (KERNEL..CARVEOUT).filter(of_el2).collect::<Vec<_>>()
    };
    let all = owned();
    // One of each half.
    let broken = [all[3], all[all.len() - 4]];
    broken.iter().for_each(|&pfn| world.break_frame(pfn));
    world.call(HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    assert_eq!(owned(), broken, "nothing else stays behind");
    assert_eq!(broken_of(&world), broken);
    world.sound();
    let mut returned = std::mem::take(&mut world.el2.host_struct(guest.kvm).lock().returned);
    returned.sort_unstable();
    let rest = all.iter().filter(|pfn| !broken.contains(pfn)).map(|pfn| pfn << 12);
    assert_eq!(returned, rest.collect::<Vec<_>>());
    for page in [guest.kvm, guest.vcpus[0], guest.vcpus[1]] {
        world.call(HostCall::UnshareHyp, [page >> 12, 0, 0, 0]).unwrap();
    }
    assert_eq!(world.vm(true).handle, guest.handle);
    world.sound();
}

#[test]
fn what_was_given_for_nothing_comes_back_behind_a_broken_page() {
    let world = World::with_bytes_everywhere(Profile::Mainline72);
    let kvm = world.shared_page();
    let said = world.el2.host_struct(kvm);
    // A handle that nobody has reserved is the last thing that is noticed.
    said.lock().handle = 0x1007;
    said.lock().nr_vcpus = 600;
    let (vm, pgd) = (world.pages(nr_vm_pages(600)), world.pages(nr_pgd_pages()));
    world.break_frame(vm >> 12);
    assert_eq!(world.call(HostCall::InitVm, [kvm, vm, pgd, 0]), Err(Errno::EINVAL));
    assert_eq!(broken_of(&world), [vm >> 12]);
    for at in [vm + 4096, pgd, pgd + 4096] {
        assert_eq!(world.host_state(at >> 12), State::Owned, "{at:#x}");
    }
    world.sound();
    assert_eq!(world.call(HostCall::UnshareHyp, [kvm >> 12, 0, 0, 0]), Ok(0), "it is not pinned");

    let frames = world.pages(nr_vcpu_pages());
    world.break_frame(frames >> 12);
    let answer = world.call(HostCall::InitVcpu, [0x1007, kvm, frames, 0]);
    assert_eq!(answer, Err(Errno::ENOENT));
    assert_eq!(broken_of(&world).len(), 2);
    assert_eq!(world.host_state((frames >> 12) + 1), State::Owned);
    world.sound();
}

/// A world with a firmware of three pages, that is to be at a guest's page 4.
fn with_firmware() -> (World, Guest) {
    let mut world = World::with(Profile::Android618);
    let kept = GUEST + NR_GUEST - 3;
    world.el2.keep_firmware(Pages::new(Pfn::new(kept), 3)).unwrap();
    for pfn in kept..kept + 3 {
        world.el2.machine().write(Pfn::new(pfn).pa(), b"firm").unwrap();
    }
    let guest = world.vm_with(true, Some(4 << 12));
    world.load(0, guest, 0);
    world.top_up(guest, 0, 8);
    (world, guest)
}

#[test]
fn a_list_that_meets_a_broken_page_goes_back_as_a_whole() {
    let (world, guest) = with_firmware();
    for nth in 0..4 {
        world.user_store(GUEST + nth, b"host").unwrap();
    }
    // Before the firmware, its first page, its second, which breaks, its third.
    let list: Vec<_> =
        (0..4).map(|nth| ListedPages { pfn: GUEST + nth, gfn: 3 + nth, order: 0 }).collect();
    world.el2.host_struct(guest.vcpus[0]).lock().listed = list;
    world.break_frame(GUEST + 2);
    assert_eq!(world.call(HostCall::DonateSglistGuest, [0; 4]), Err(Errno::EIO));
    assert_eq!(broken_of(&world), [GUEST + 2]);
    for gfn in 3..7 {
        assert_eq!(world.guest_state(guest, gfn), State::NoPage, "{gfn}");
    }
    for (nth, bytes) in [(0, *b"host"), (1, [0; 4]), (3, *b"host")] {
        assert_eq!(world.user_load(GUEST + nth), Ok(bytes), "the host reads no firmware: {nth}");
    }
    world.sound();
}

#[test]
fn a_block_that_meets_a_broken_page_goes_back_but_for_that() {
    let (world, guest) = with_firmware();
    world.user_store(GUEST + 3, b"host").unwrap();
    world.break_frame(GUEST + 5);
    let given = world.call(HostCall::DonateGuest, [GUEST, 0, 512, 0]);
    assert_eq!(given, Err(Errno::EIO));
    assert_eq!(broken_of(&world), [GUEST + 5]);
    assert_eq!(world.guest_state(guest, 0), State::NoPage);
    assert_eq!(world.user_load(GUEST + 3), Ok(*b"host"));
    assert_eq!(world.user_load(GUEST + 4), Ok([0; 4]), "the firmware was there already");
    assert_eq!(world.user_load(GUEST + 511), Ok([0; 4]));
    world.sound();
}

#[test]
fn the_firmware_is_wiped_behind_a_broken_page() {
    let (world, _) = with_firmware();
    let kept = GUEST + NR_GUEST - 3;
    world.break_frame(kept);
    assert_eq!(world.el2.wipe_firmware(), Err(Errno::EIO));
    assert_eq!(world.bytes(kept + 1), [0; 4096]);
    assert_eq!(world.bytes(kept + 2), [0; 4096]);
}
