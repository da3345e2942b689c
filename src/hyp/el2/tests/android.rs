//! What Android's EL2 does beyond mainline's: runs and lists, a firmware, devices behind an IOMMU, a host whose memory
//! is mapped from the start.

use super::*;
use crate::hyp::el2::guest_call::{MEM_RELINQUISH, NO_POISON};
use crate::hyp::el2::host_mmu::FramePool;
use crate::hyp::el2::host_struct::ListedPages;
use crate::hyp::el2::profile::ENOMEM_HOST_TABLES;
use crate::hyp::el2::vm::{Fault, FaultKind};
use crate::stage2::Level;

const BLOCK: u64 = 512;

fn android() -> World {
    World::with(Profile::Android618)
}

/// A guest's call with a number of pages.
fn run(world: &World, id: u64, gfn: u64, nr: u64) -> GuestAnswer {
    world.el2.guest_call(0, [id, gfn << 12, nr, 0]).unwrap()
}

const fn did(nr: u64) -> GuestAnswer {
    GuestAnswer::Resume([0, nr, 0, 0])
}

fn absent(gfn: u64) -> GuestAnswer {
    GuestAnswer::Fault(Fault { gfn: Gfn::new(gfn), kind: FaultKind::Translation })
}

fn level(world: &World, pfn: u64) -> (Level, bool) {
    let (level, pte) = world.el2.host.lock().tree.get(Gfn::new(pfn)).unwrap();
    (level, pte.is_valid())
}

fn list(world: &World, guest: Guest, entries: &[(u64, u64, u8)]) -> Answer {
    let said = world.el2.host_struct(guest.vcpus[0]);
    let entry = |&(pfn, gfn, order)| ListedPages { pfn, gfn, order };
    said.lock().listed = entries.iter().map(entry).collect();
    world.call(HostCall::DonateSglistGuest, [0; 4])
}

/// The host's pool has not one table left, until it is put back.
fn without_tables<T>(world: &World, act: impl FnOnce() -> T) -> T {
    let none = FramePool::new(Pages::new(Pfn::new(0), 0));
    let pool = std::mem::replace(&mut world.el2.host.lock().pool, none);
    let done = act();
    world.el2.host.lock().pool = pool;
    done
}

#[test]
fn a_run_goes_as_far_as_frames_follow_each_other() {
    let world = android();
    world.running(true);
    for (pfn, gfn) in [(0, 0x10), (1, 0x11), (3, 0x12), (4, 0x13)] {
        world.donate(GUEST + pfn, gfn).unwrap();
    }
    let before = Snapshot::of(&world.el2);
    // Pages that are not there are asked for before anything is done.
    assert_eq!(run(&world, MEM_SHARE, 0x12, 9), absent(0x14));
    assert_eq!(run(&world, MEM_UNSHARE, 0x14, 1), absent(0x14));
    for (gfn, nr) in [(0x10, u64::MAX), (0x10, 1 << 28), ((1 << 28) - 1, 2), (1 << 28, 1)] {
        assert_eq!(run(&world, MEM_SHARE, gfn, nr), INVALID, "{gfn:#x} {nr:#x}");
    }
    assert_eq!(world.el2.guest_call(0, [MEM_SHARE, 0x10_000, 1, 1]), Ok(INVALID));
    assert_eq!(world.el2.guest_call(0, [MEM_SHARE, 0x10_008, 1, 0]), Ok(INVALID));
    before.nothing_changed(&Snapshot::of(&world.el2));

    assert_eq!(run(&world, MEM_SHARE, 0x10, 4), did(2), "then another run of frames");
    world.sound();
    assert_eq!(run(&world, MEM_SHARE, 0x12, 0), did(1), "none is one");
    let before = Snapshot::of(&world.el2);
    assert_eq!(run(&world, MEM_SHARE, 0x12, 2), INVALID, "the first is shown already");
    assert_eq!(run(&world, MEM_UNSHARE, 0x12, 2), INVALID, "the second is not");
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(run(&world, MEM_UNSHARE, 0x10, 2), did(2));
    for (nth, seen) in [(0, false), (1, false), (3, true), (4, false)] {
        assert_eq!(world.user_load(GUEST + nth).is_ok(), seen, "{nth}");
    }
    world.sound();
}

#[test]
fn a_run_has_256_entries_at_most() {
    let world = android();
    let guest = world.running(true);
    for nth in 0..300 {
        world.top_up(guest, 0, 2);
        world.donate(GUEST + nth, nth).unwrap();
    }
    assert_eq!(run(&world, MEM_SHARE, 0, 300), did(256));
    assert_eq!(run(&world, MEM_SHARE, 256, 44), did(44));
    assert_eq!(run(&world, MEM_UNSHARE, 0, 300), did(256));
    world.sound();
}

#[test]
fn a_block_is_shown_whole_or_split_first() {
    let world = android();
    let guest = world.running(true);
    world.call(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0]).unwrap();
    world.call(HostCall::DonateGuest, [GUEST + BLOCK, 0x600, BLOCK, 0]).unwrap();
    world.store(0x477, b"show").unwrap();
    let before = Snapshot::of(&world.el2);
    for (gfn, nr, split) in [(0x401, 511, 0x401), (0x400, 511, 0x400), (0x400, 513, 0x600)] {
        let wants = GuestAnswer::WantsSplit(Gfn::new(split));
        assert_eq!(run(&world, MEM_SHARE, gfn, nr), wants, "{gfn:#x} {nr}");
    }
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x477), GuestAnswer::WantsSplit(Gfn::new(0x477)));
    before.nothing_changed(&Snapshot::of(&world.el2));

    assert_eq!(run(&world, MEM_SHARE, 0x400, 2 * BLOCK), did(2 * BLOCK));
    world.sound();
    assert_eq!(world.user_load(GUEST + 0x77), Ok(*b"show"));
    assert_eq!(level(&world, GUEST), (Level::BLOCK_2M, true));
    assert_eq!(run(&world, MEM_UNSHARE, 0x400, BLOCK), did(BLOCK));
    world.sound();
    assert_eq!(world.user_load(GUEST + 0x77), Err(Signal::SegvAccerr));
    before.edges_exist(&Snapshot::of(&world.el2));

    // The other one is still shown, and is split as such.
    let wants = GuestAnswer::WantsSplit(Gfn::new(0x601));
    assert_eq!(run(&world, MEM_UNSHARE, 0x601, 1), wants);
    world.top_up(guest, 0, 8);
    world.call(HostCall::SplitGuest, [0x600, BLOCK, 0, 0]).unwrap();
    world.sound();
    assert_eq!(run(&world, MEM_UNSHARE, 0x601, 1), did(1));
    assert!(world.user_load(GUEST + BLOCK).is_ok() && world.user_load(GUEST + BLOCK + 1).is_err());
    world.sound();

    world.put(0);
    let x = |gfn| [guest.handle, gfn, 0, 0];
    world.call(HostCall::StartTeardownVm, x(0)).unwrap();
    world.call(HostCall::ReclaimDyingGuestPage, x(0x400)).unwrap();
    (0x600..0x800).for_each(|gfn| {
        world.call(HostCall::ReclaimDyingGuestPage, x(gfn)).unwrap();
    });
    world.call(HostCall::FinalizeTeardownVm, x(0)).unwrap();
    world.sound();
    assert_eq!(world.el2.orphans(), []);
}

#[test]
fn a_shown_block_comes_back_as_it_is() {
    let world = android();
    let guest = world.running(true);
    world.call(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0]).unwrap();
    world.store(0x477, b"show").unwrap();
    assert_eq!(run(&world, MEM_SHARE, 0x400, BLOCK), did(BLOCK));
    world.refused(HostCall::ForceReclaimGuestPage, [GUEST << 12, 0, 0, 0], Errno::EAGAIN);
    world.put(0);
    world.call(HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).unwrap();
    let all: Vec<_> = (GUEST..GUEST + BLOCK).collect();
    world.does(HostCall::ReclaimDyingGuestPage, [guest.handle, 0x400, 0, 0], &all);
    assert_eq!(world.user_load(GUEST + 0x77), Ok(*b"show"));
}

#[test]
fn a_page_is_given_up_cleared_unless_the_guest_says_otherwise() {
    let world = android();
    world.running(true);
    for nth in 0..3 {
        world.donate(GUEST + nth, 0x10 + nth).unwrap();
        world.store(0x10 + nth, b"mine").unwrap();
    }
    let give_up =
        |gfn: u64, flags| world.el2.guest_call(0, [MEM_RELINQUISH, gfn << 12, 0, flags]).unwrap();
    let before = Snapshot::of(&world.el2);
    assert_eq!(give_up(0x10, 2), INVALID);
    assert_eq!(give_up(0x10, u64::MAX), INVALID);
    let uses = |nr| {
        let mut host = world.el2.host.lock();
        host.pages.update(Pfn::new(GUEST + 2), |page| page.nr_pins = nr);
    };
    // As if the guest drove a device itself.
    uses(1);
    assert_eq!(give_up(0x12, 0), INVALID);
    uses(0);
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(give_up(0x10, NO_POISON), DONE);
    assert_eq!(give_up(0x11, 0), DONE);
    assert_eq!(world.user_load(GUEST), Ok(*b"mine"));
    assert_eq!(world.user_load(GUEST + 1), Ok([0; 4]));
    world.sound();
}

#[test]
fn a_list_is_given_as_a_whole() {
    let world = android();
    let guest = world.running(true);
    world.user_store(GUEST + 1, b"boot").unwrap();
    list(&world, guest, &[(GUEST + 1, 0x10, 0), (GUEST + BLOCK, 0x400, 9), (GUEST, 0x3ffff, 0)])
        .unwrap();
    world.sound();
    assert_eq!(world.read(0x10), Ok(*b"boot"));
    assert_eq!(world.user_load(GUEST + 1), Err(Signal::SegvAccerr));
    assert_eq!(world.guest_state(guest, 0x5ff), State::Owned);
    assert_eq!(world.guest_state(guest, 0x3ffff), State::Owned);
    assert_eq!(run(&world, MEM_SHARE, 0x10, 1), did(1));
    world.sound();
}

#[test]
pub(super) fn a_list_with_one_bad_entry_gives_nothing() {
    let world = android();
    let guest = world.running(true);
    world.donate(GUEST + 9, 0x99).unwrap();
    world.call(HostCall::ShareHyp, [GUEST + 8, 0, 0, 0]).unwrap();
    world.el2.map_dma(Pages::new(Pfn::new(GUEST + 7), 1)).unwrap();
    let good = (GUEST, 0x10, 0);
    let block = (GUEST + BLOCK, 0x400, 9);
    let before = Snapshot::of(&world.el2);
    for (bad, errno) in [
        ((1 << 40, 0x11, 0), Errno::EINVAL),
        ((u64::MAX, 0x11, 0), Errno::EINVAL),
        ((GUEST + 1, 0x11, 1), Errno::EINVAL),
        ((GUEST + 1, 0x11, 64), Errno::EINVAL),
        ((GUEST + 1, 0x11, 255), Errno::EINVAL),
        ((GUEST + 1, 0x200, 9), Errno::EINVAL),
        ((GUEST, 0x201, 9), Errno::EINVAL),
        ((DEVICE, 0x11, 0), Errno::EINVAL),
        ((NO_MAP & !0x1ff, 0x200, 9), Errno::EINVAL),
        ((NO_MAP, 0x11, 0), Errno::EPERM),
        ((CARVEOUT, 0x11, 0), Errno::EPERM),
        ((GUEST + 8, 0x11, 0), Errno::EPERM),
        ((GUEST + 7, 0x11, 0), Errno::EINVAL),
        // Given already: by an entry before, in whole or in part.
        ((GUEST, 0x11, 0), Errno::EPERM),
        ((GUEST + BLOCK + 5, 0x11, 0), Errno::EPERM),
        ((GUEST + 1, 0x10, 0), Errno::EPERM),
        ((GUEST + 1, 0x477, 0), Errno::EPERM),
        ((GUEST + 1, 0x99, 0), Errno::EPERM),
        ((GUEST + 1, 1 << 28, 0), Errno::ERANGE),
    ] {
        assert_eq!(list(&world, guest, &[good, block, bad]), Err(errno), "{bad:x?}");
        before.nothing_changed(&Snapshot::of(&world.el2));
        world.sound();
    }
    assert_eq!(list(&world, guest, &[]), Err(Errno::EINVAL));
    // More tables than the memcache has, and several in one table.
    let far: Vec<_> = (1..6).map(|nth| (GUEST + nth, nth << 18, 0)).collect();
    assert_eq!(list(&world, guest, &far), Err(Errno::ENOMEM));
    before.nothing_changed(&Snapshot::of(&world.el2));
    let near: Vec<_> = (1..7).map(|nth| (GUEST + nth, 0x20_0000 + nth, 0)).collect();
    list(&world, guest, &near).unwrap();
    world.sound();
    // And who may not.
    world.put(0);
    assert_eq!(list(&world, guest, &[good]), Err(Errno::EINVAL));
    let np = world.running(false);
    assert_eq!(list(&world, np, &[good]), Err(Errno::EINVAL));
    for profile in [Profile::Mainline72, Profile::HugeProtected] {
        let world = World::with(profile);
        let guest = world.running(true);
        assert_eq!(list(&world, guest, &[good]), Err(Errno::ENOSYS));
    }
}

#[test]
fn a_list_is_read_as_far_as_it_can_be() {
    let world = android();
    let guest = world.running(true);
    let many: Vec<_> = (0..200).map(|nth| (GUEST + nth, nth, 0)).collect();
    list(&world, guest, &many).unwrap();
    let nr = (0..200).filter(|&gfn| world.guest_state(guest, gfn) == State::Owned).count();
    assert_eq!(nr, ListedPages::MOST);
    world.sound();
}

/// A VM whose firmware is to be at an address.
fn with_firmware(at: u64) -> (World, Guest) {
    let mut world = android();
    for (nth, bytes) in [b"fw-0", b"fw-1", b"fw-2"].into_iter().enumerate() {
        world.user_store(GUEST + 0x300 + nth as u64, bytes).unwrap();
    }
    world.el2.keep_firmware(Pages::new(Pfn::new(GUEST + 0x300), 3)).unwrap();
    let guest = world.vm_with(true, Some(at));
    world.load(0, guest, 0);
    world.top_up(guest, 0, 8);
    (world, guest)
}

#[test]
fn a_firmware_is_nobodys_and_is_found_where_it_was_said_to_be() {
    let (world, guest) = with_firmware(0x20_000);
    world.sound();
    assert_eq!(world.user_load(GUEST + 0x300), Err(Signal::SegvAccerr));
    world.refused(HostCall::DonateGuest, [GUEST + 0x300, 0x50, 1, 0], Errno::EPERM);
    world.refused(HostCall::ForceReclaimGuestPage, [(GUEST + 0x300) << 12, 0, 0, 0], Errno::EPERM);
    for nth in 0..8 {
        world.user_store(GUEST + nth, b"evil").unwrap();
    }
    for (pfn, gfn, found) in
        [(0, 0x1f, b"evil"), (1, 0x22, b"fw-2"), (2, 0x20, b"fw-0"), (3, 0x23, b"evil")]
    {
        world.donate(GUEST + pfn, gfn).unwrap();
        assert_eq!(&world.read(gfn).unwrap(), found, "{gfn:#x}");
    }
    list(&world, guest, &[(GUEST + 4, 0x21, 0), (GUEST + 5, 0x24, 0)]).unwrap();
    assert_eq!((world.read(0x21), world.read(0x24)), (Ok(*b"fw-1"), Ok(*b"evil")));
    // What was the firmware's place is a page like others, once it was given up.
    assert_eq!(world.hvc(MEM_RELINQUISH, 0x21), DONE);
    assert_eq!(world.user_load(GUEST + 4), Ok([0; 4]));
    world.user_store(GUEST + 4, b"evil").unwrap();
    world.donate(GUEST + 4, 0x21).unwrap();
    assert_eq!(world.read(0x21), Ok(*b"evil"));
    world.sound();
}

#[test]
fn a_firmware_comes_with_a_block_and_is_wiped_before_a_reset() {
    let (world, _) = with_firmware(0x3ff_000);
    world.user_store(GUEST + 1, b"evil").unwrap();
    world.user_store(GUEST + 2, b"host").unwrap();
    world.call(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0]).unwrap();
    assert_eq!(world.read(0x400), Ok(*b"fw-1"), "it began before the block");
    assert_eq!((world.read(0x401), world.read(0x402)), (Ok(*b"fw-2"), Ok(*b"host")));
    world.el2.wipe_firmware().unwrap();
    world.user_store(GUEST + BLOCK, b"evil").unwrap();
    world.donate(GUEST + BLOCK, 0x3ff).unwrap();
    assert_eq!(world.read(0x3ff), Ok([0; 4]));
    world.sound();
}

#[test]
fn a_firmware_is_androids_and_begins_with_a_page() {
    let (world, _) = with_firmware(0x20_008);
    world.refused(HostCall::DonateGuest, [GUEST, 0x20, 1, 0], Errno::EINVAL);
    world.donate(GUEST, 0x40).unwrap();
    let frames = |pfn, nr| Pages::new(Pfn::new(pfn), nr);
    for profile in [Profile::Mainline72, Profile::HugeProtected] {
        let mut world = World::with(profile);
        assert_eq!(world.el2.keep_firmware(frames(GUEST, 1)), Err(Errno::ENOSYS));
    }
    let mut world = android();
    assert_eq!(world.el2.keep_firmware(frames(CARVEOUT, 1)), Err(Errno::EPERM));
    world.el2.keep_firmware(frames(GUEST, 1)).unwrap();
    assert_eq!(world.el2.keep_firmware(frames(GUEST + 1, 1)), Err(Errno::EBUSY));
    // A guest that is not protected gets what the host gives.
    let np = world.vm_with(false, Some(0x20_000));
    world.load(0, np, 0);
    world.top_up(np, 0, 8);
    world.user_store(GUEST + 1, b"host").unwrap();
    world.share(GUEST + 1, 0x20, 1).unwrap();
    assert_eq!(world.read(0x20), Ok(*b"host"));
    world.sound();
}

#[test]
fn want_of_the_hosts_tables_has_a_name_of_its_own() {
    for (profile, errno) in
        [(Profile::Android618, ENOMEM_HOST_TABLES), (Profile::HugeProtected, Errno::ENOMEM)]
    {
        let world = World::with(profile);
        let guest = world.running(true);
        world.user_store(GUEST, b"host").unwrap();
        without_tables(&world, || {
            world.refused(HostCall::DonateGuest, [GUEST, 0x10, 1, 0], errno);
            if profile.is_android() {
                let before = Snapshot::of(&world.el2);
                assert_eq!(list(&world, guest, &[(GUEST, 0x10, 0)]), Err(errno));
                before.nothing_changed(&Snapshot::of(&world.el2));
            }
        });
        world.donate(GUEST, 0x10).unwrap();
        world.sound();
    }
    // A block that is shown is one entry, and 512 when it is hidden.
    let world = android();
    world.running(true);
    world.call(HostCall::DonateGuest, [GUEST, 0x400, BLOCK, 0]).unwrap();
    assert_eq!(run(&world, MEM_SHARE, 0x400, BLOCK), did(BLOCK));
    without_tables(&world, || {
        let before = Snapshot::of(&world.el2);
        assert_eq!(run(&world, MEM_UNSHARE, 0x400, BLOCK), GuestAnswer::WantsMemory);
        before.nothing_changed(&Snapshot::of(&world.el2));
    });
    assert_eq!(run(&world, MEM_UNSHARE, 0x400, BLOCK), did(BLOCK));
    world.sound();
}

#[test]
fn memory_is_mapped_from_the_start_and_neighbours_stay() {
    let world = android();
    assert_eq!(level(&world, GUEST), (Level::BLOCK_2M, true));
    assert_eq!(level(&world, NO_MAP), (Level::PAGE, true));
    assert!(!level(&world, DEVICE).1);
    assert_eq!(level(&world, CARVEOUT - 1), (Level::PAGE, true));
    for profile in [Profile::Android618, Profile::HugeProtected] {
        let world = World::with(profile);
        world.running(true);
        world.user_store(GUEST, b"host").unwrap();
        world.donate(GUEST + 7, 0x10).unwrap();
        for (pfn, valid) in [(6, true), (7, false), (8, true), (511, true)] {
            assert_eq!(level(&world, GUEST + pfn), (Level::PAGE, valid), "{profile:?} {pfn}");
        }
        world.sound();
    }
}
