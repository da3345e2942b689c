//! ACCEPT: every error in the order of its checks, and what it does.

use super::super::error::RmError::{self, *};
use super::super::rm::accept::*;
use super::super::rm::message::{Accept, AttrEntry, Create, Request, Transfer};
use super::super::rm::{ParcelState, Vmid};
use super::full::*;
use super::*;

fn refused(full: &Full, from: Vmid, accept: &Accept, error: RmError) {
    full.refused(from, &Request::Accept(accept.clone()), error);
}

#[test]
fn each_error_in_its_order() {
    let full = Full::new();
    let members = [(A, 6), (B, 4)];
    let handle = full.create(HOST, &lend(&members, &[(RAM, 1), (RAM + 4, 2)])).unwrap();
    let io = Create { mem_type: 1, ..lend(&[(A, 6)], &[(DEVICE, 1)]) };
    let io = full.create(HOST, &io).unwrap();
    let all = !DONE;
    let wrong = Accept {
        handle: 9999,
        mem_type: 1,
        transfer: 2,
        flags: all,
        sgl: sgl(&[(1, 1), (2, 2), (3, 3)]),
        map_vmid: Vmid(5),
        ..take(handle, Transfer::Lend)
    };
    refused(&full, HOST, &wrong, HandleInvalid);
    let wrong = Accept { handle, ..wrong };
    refused(&full, HOST, &wrong, ArgumentInvalid);
    refused(&full, HOST, &Accept { mem_type: 0, ..wrong.clone() }, ArgumentInvalid);
    let wrong = Accept { mem_type: 0, transfer: 1, ..wrong };
    refused(&full, HOST, &wrong, ValidateFailed);
    let without = |flags: u8| Accept { flags: all & !flags, ..wrong.clone() };
    let flags = VALIDATE_SANITIZED;
    refused(&full, HOST, &without(flags), ValidateFailed);
    let flags = flags | VALIDATE_LABEL;
    refused(&full, HOST, &without(flags), ValidateFailed);
    for list in [&[(A, 6)][..], &[(A, 7), (B, 4)], &[(B, 4), (A, 6)], &[]] {
        refused(&full, HOST, &Accept { acl: acl(list), ..without(flags) }, ValidateFailed);
    }
    let attrs = vec![AttrEntry { attr: 0, vmid: A }];
    refused(&full, HOST, &Accept { acl: acl(&members), attrs, ..without(flags) }, ValidateFailed);
    let flags = flags | VALIDATE_ACL_ATTR;
    refused(&full, HOST, &without(flags), Denied);
    let flags = flags | MAP_OTHER;
    refused(&full, HOST, &without(flags), ArgumentInvalid);
    let own = |flags| Accept { map_vmid: Vmid(0), ..without(flags) };
    let alone = full.create(HOST, &lend(&[(A, 6)], &[(RAM + 8, 1)])).unwrap();
    refused(&full, B, &Accept { handle: alone, ..own(flags) }, VmidInvalid);
    let shared = full.create(HOST, &share(&[(HOST, 6), (A, 6)], &[(RAM + 9, 1)])).unwrap();
    refused(&full, HOST, &Accept { handle: shared, transfer: 2, ..own(flags) }, Denied);
    // Once it is mapped, again is once too often.
    full.accept(A, &take(alone, Transfer::Lend)).unwrap();
    refused(&full, A, &Accept { handle: alone, ..own(flags) }, Denied);
    // In one piece: not a device's, and not what was begun in pieces.
    refused(&full, A, &Accept { handle: io, mem_type: 1, ..own(flags) }, ArgumentInvalid);
    full.accept(A, &Accept { flags: 0, sgl: sgl(&[(0x180, 1)]), ..take(handle, Transfer::Lend) })
        .unwrap();
    refused(&full, A, &own(flags), ArgumentInvalid);
    let flags = flags | MAP_CONTIGUOUS;
    // To clear it: not a device's, and not who may only read.
    refused(&full, A, &Accept { handle: io, mem_type: 1, ..own(flags) }, ArgumentInvalid);
    refused(&full, B, &own(flags), ArgumentInvalid);
    assert!(!full.gunyah.with(|world| world.rm.parcels[&handle].sanitize_reclaim));
    // More places than are left; and from here on the wish for zeroes is noted, whatever comes.
    refused(&full, A, &own(flags), ArgumentInvalid);
    assert!(full.gunyah.with(|world| world.rm.parcels[&handle].sanitize_reclaim));
    // One at a time: an address that is none, another size, something there, and too early an end.
    let last = |at, nr| Accept { flags: DONE, sgl: sgl(&[(at, nr)]), ..own(flags) };
    refused(&full, A, &last(1 << 32, 2), ArgumentInvalid);
    refused(&full, A, &last(0x200, 1), ArgumentInvalid);
    for at in [0xff, 0x17f, 0x180, IMAGE_AT / PAGE, DEVICE - 1, (1 << 24) - 1] {
        refused(&full, A, &last(at, 2), NoResource);
    }
    let early = full.create(HOST, &lend(&[(A, 6)], &[(RAM + 20, 1), (RAM + 22, 1)])).unwrap();
    refused(&full, A, &Accept { handle: early, ..last(0x300, 1) }, ArgumentInvalid);
    full.accept(A, &last(0x200, 2)).unwrap();
    assert_eq!(full.at(A, 0x180), Some((RAM, Access::RW)));
    assert_eq!(full.at(A, 0x201), Some((RAM + 5, Access::RW)));
    full.sound();
}

#[test]
fn whoever_lacks_tables_has_not_accepted() {
    for transfer in [Transfer::Lend, Transfer::Donate] {
        let full = Full::new();
        let create = Create { transfer, ..lend(&[(A, 7)], &[(RAM, 1), (RAM + 8, 1)]) };
        let handle = full.create(HOST, &create).unwrap();
        let far = Accept { sgl: sgl(&[(0x101, 1), (0x80_0000, 1)]), ..take(handle, transfer) };
        let spare = full.gunyah.with(|world| std::mem::take(&mut world.hyp.heap.free));
        let (few, rest) = spare.split_at(1);
        full.gunyah.with(|world| world.hyp.heap.free = few.to_vec());
        let before = full.picture();
        assert_eq!(full.accept(A, &far), Err(MapFailed));
        assert_eq!(before.difference(&full.picture()), None);
        full.gunyah.with(|world| world.hyp.heap.free.extend(rest));
        full.accept(A, &far).unwrap();
        assert_eq!(full.at(A, 0x80_0000), Some((RAM + 8, Access::RWX)));
        full.sound();
    }
}

#[test]
fn addresses_first_memory_when_it_is_done() {
    let full = Full::new();
    let handle = full
        .create(HOST, &lend(&[(A, 5), (B, 7)], &[(RAM, 1), (RAM + 4, 2), (RAM + 9, 1)]))
        .unwrap();
    let part = |flags, pages: &[(u64, u64)]| Accept {
        flags,
        sgl: sgl(pages),
        ..take(handle, Transfer::Lend)
    };
    assert_eq!(
        full.accept(A, &part(0, &[(0x40, 1)])),
        Ok(vec![]),
        "who says where is told nothing"
    );
    let parcel = full.parcel(handle);
    assert_eq!((parcel.state, parcel.share_count), (ParcelState::Shared, 1), "it counts already");
    assert_eq!(full.at(A, 0x40), None);
    full.sound();
    let answer = full.accept(A, &part(DONE, &[])).unwrap();
    assert_eq!((answer[2], placed(&answer)), (0, vec![(0, 2), (2, 1)]));
    assert_eq!(full.at(A, 0x40), Some((RAM, Access::RX)));
    assert_eq!([0, 1, 2].map(|gfn| full.at(A, gfn).unwrap().0), [RAM + 4, RAM + 5, RAM + 9]);
    // The other takes all in one piece.
    let answer = full.accept(B, &part(DONE | MAP_CONTIGUOUS, &[])).unwrap();
    assert_eq!(placed(&answer), [(0, 4)]);
    assert_eq!(
        [0, 1, 2, 3].map(|gfn| full.at(B, gfn).unwrap().0),
        [RAM, RAM + 4, RAM + 5, RAM + 9]
    );
    assert_eq!(full.parcel(handle).share_count, 2);
    full.sound();
}

#[test]
fn large_pieces_lie_on_their_own_boundaries_and_stay_blocks() {
    let full = Full::new();
    full.accept(
        A,
        &take(full.create(HOST, &lend(&[(A, 7)], &[(RAM, 1)])).unwrap(), Transfer::Lend),
    )
    .unwrap();
    let handle = full.create(HOST, &lend(&[(A, 7)], &[(RAM + 0x200, 0x200)])).unwrap();
    let answer = full.accept(A, &take(handle, Transfer::Lend)).unwrap();
    assert_eq!(placed(&answer), [(0x200, 0x200)]);
    let is_block = full.gunyah.with(|world| {
        let home = world.rm.vms[&A].home.unwrap();
        let leaf = world.hyp.aspaces[&home.aspace].tree.leaf(Gfn::new(0x280));
        leaf.unwrap().0 == crate::stage2::Level::BLOCK_2M
    });
    assert!(is_block);
    full.sound();
}

#[test]
fn the_host_and_devices_have_no_choice_of_address() {
    let full = Full::new();
    let gift = full.create(HOST, &donate(A, &[(RAM, 2)])).unwrap();
    let answer = full.accept(A, &take(gift, Transfer::Donate)).unwrap();
    assert_eq!(placed(&answer), [(0, 2)]);
    // What is the guest's own it can lend, to the host as well.
    let back = full.create(A, &lend(&[(HOST, 6)], &[(1, 1)])).unwrap();
    let host = |pages: &[(u64, u64)], flags| Accept {
        flags,
        sgl: sgl(pages),
        ..take(back, Transfer::Lend)
    };
    refused(&full, HOST, &host(&[(5, 1)], DONE), NoResource);
    refused(&full, HOST, &host(&[], DONE | MAP_CONTIGUOUS), NoResource);
    let answer = full.accept(HOST, &host(&[], DONE)).unwrap();
    assert_eq!(placed(&answer), [(RAM + 1, 1)]);
    assert_eq!((full.at(HOST, RAM + 1), full.at(A, 1)), (Some((RAM + 1, Access::RW)), None));
    full.sound();
    let io = Create { mem_type: 1, ..lend(&[(B, 6)], &[(DEVICE + 2, 1)]) };
    let io = full.create(HOST, &io).unwrap();
    let accept = Accept { mem_type: 1, ..take(io, Transfer::Lend) };
    refused(&full, B, &Accept { sgl: sgl(&[(5, 1)]), ..accept.clone() }, NoResource);
    full.accept(B, &accept).unwrap();
    assert_eq!(full.at(B, DEVICE + 2), Some((DEVICE + 2, Access::RW)));
    full.sound();
}

#[test]
fn a_gift_is_the_takers_own_and_its_parcel_is_gone() {
    let full = Full::new();
    let handle = full.create(HOST, &donate(A, &[(RAM, 2), (RAM + 8, 1)])).unwrap();
    // First the addresses.
    full.accept(A, &Accept { flags: 0, ..take(handle, Transfer::Donate) }).unwrap();
    full.refused(HOST, &Request::Reclaim { handle, flags: 0 }, MemInUse);
    full.accept(A, &take(handle, Transfer::Donate)).unwrap();
    for request in [Request::Release { handle, flags: 0 }, Request::Reclaim { handle, flags: 0 }] {
        full.refused(A, &request, HandleInvalid);
        full.refused(HOST, &request, HandleInvalid);
    }
    assert_eq!(
        [0, 1, 2].map(|gfn| full.at(A, gfn).unwrap()),
        [RAM, RAM + 1, RAM + 8].map(|pfn| (pfn, Access::RWX))
    );
    assert_eq!([RAM, RAM + 8].map(|gfn| full.at(HOST, gfn)), [None; 2]);
    full.sound();
    // It goes on to another, and the address that it had is free.
    let on = full.create(A, &donate(B, &[(1, 1)])).unwrap();
    full.accept(B, &take(on, Transfer::Donate)).unwrap();
    assert_eq!((full.at(A, 1), full.at(B, 0)), (None, Some((RAM + 1, Access::RWX))));
    let new = full.create(HOST, &lend(&[(A, 7)], &[(RAM + 16, 1)])).unwrap();
    assert_eq!(placed(&full.accept(A, &take(new, Transfer::Lend)).unwrap()), [(1, 1)]);
    full.sound();
    // The host can give it back its old place in no way but this.
    let home = full.create(B, &donate(HOST, &[(0, 1)])).unwrap();
    full.accept(HOST, &take(home, Transfer::Donate)).unwrap();
    assert_eq!(full.at(HOST, RAM + 1), Some((RAM + 1, Access::RWX)));
    full.sound();
}
