//! DONATE, LEND, SHARE and APPEND: every error in the order of its checks, and what they do.

use super::super::error::RmError::{self, *};
use super::super::rm::message::{Create, Request, SglEntry, Transfer};
use super::super::rm::{ParcelState, Vmid};
use super::full::*;
use super::*;

fn refused(full: &Full, create: &Create, error: RmError) {
    full.refused(HOST, &Request::Create(create.clone()), error);
}

#[test]
fn each_error_in_its_order() {
    let full = Full::new();
    let good = lend(&[(A, 7)], &[(RAM, 1)]);
    // Each step mends the first thing that is wrong; all that comes later is wrong as well.
    let io = Create { mem_type: 1, flags: SANITIZE, ..good.clone() };
    refused(&full, &Create { acl: acl(&[]), ..io.clone() }, ArgumentInvalid);
    refused(&full, &Create { sgl: sgl(&[]), ..io.clone() }, ArgumentInvalid);
    let two = Create { transfer: Transfer::Donate, acl: acl(&[(A, 3), (A, 3)]), ..io.clone() };
    refused(&full, &two, ArgumentInvalid);
    let parcels: Vec<_> = (0..62)
        .map(|nth| full.create(HOST, &lend(&[(A, 7)], &[(RAM + nth, 1)])).unwrap())
        .collect();
    refused(&full, &Create { acl: acl(&[(A, 3), (A, 3)]), ..io.clone() }, Denied);
    full.reclaim(HOST, parcels[0], 0).unwrap();
    refused(&full, &Create { acl: acl(&[(A, 3), (A, 3)]), ..io.clone() }, ArgumentInvalid);
    let io = Create { flags: 0, ..io };
    for members in [
        &[(A, 6), (A, 6)][..],
        &[(Vmid(0), 6)],
        &[(Vmid(4), 6)],
        &[(Vmid(0x7f), 6)],
        &[(Vmid(0xc0), 6)],
        &[(Vmid(0x100), 6)],
        &[(A, 0)],
        &[(A, 1)],
        &[(A, 2)],
        &[(A, 3)],
        &[(A, 8)],
        &[(A, 0xff)],
        &[(A, 7)],
        &[(A, 5)],
    ] {
        refused(&full, &Create { acl: acl(members), ..io.clone() }, ArgumentInvalid);
    }
    let gift = donate(A, &[(1, 0)]);
    for rights in [4, 5, 6] {
        refused(&full, &Create { acl: acl(&[(A, rights)]), ..gift.clone() }, Denied);
    }
    let gift_io = Create { mem_type: 1, ..gift.clone() };
    refused(&full, &Create { acl: acl(&[(A, 4)]), ..gift_io }, Denied);
    let owner_in = |transfer| Create { transfer, acl: acl(&[(HOST, 7), (B, 6)]), ..good.clone() };
    refused(&full, &with_attrs(&owner_in(Transfer::Lend), &[(9, A)]), ArgumentInvalid);
    refused(&full, &with_attrs(&donate(HOST, &[(1, 0)]), &[(9, A)]), ArgumentInvalid);
    refused(&full, &with_attrs(&share(&[(A, 7)], &[(1, 0)]), &[(9, A)]), ArgumentInvalid);
    let bad = lend(&[(A, 7)], &[(1, 0)]);
    for attrs in [&[(0, A), (0, A)][..], &[(4, A)], &[(0xffff, A)], &[(1, A)]] {
        refused(&full, &with_attrs(&bad, attrs), ArgumentInvalid);
    }
    for attr in [0, 2, 3] {
        let io = Create { mem_type: 1, acl: acl(&[(A, 6)]), ..bad.clone() };
        refused(&full, &with_attrs(&io, &[(attr, A)]), ArgumentInvalid);
    }
    for attr in [2, 3] {
        refused(&full, &with_attrs(&gift, &[(attr, A)]), ArgumentInvalid);
    }
    refused(&full, &with_attrs(&bad, &[(2, A), (0, B)]), VmidInvalid);
    refused(&full, &with_attrs(&bad, &[(0, B), (4, A)]), VmidInvalid);
    full.sound();
}

#[test]
fn memory_that_cannot_be_had() {
    let full = Full::new();
    let entry = |ipa, size| Create { sgl: vec![SglEntry { ipa, size }], ..lend(&[(A, 7)], &[]) };
    for (ipa, size) in
        [(1, PAGE), (RAM * PAGE, 1), (1 << 44, PAGE), (RAM * PAGE, 1 << 44), (u64::MAX, u64::MAX)]
    {
        refused(&full, &entry(ipa, size), ArgumentInvalid);
    }
    // Nothing at all, nothing there, and more than there is.
    refused(&full, &entry(RAM * PAGE, 0), MemInvalid);
    refused(&full, &entry(0x7000 * PAGE, PAGE), MemInvalid);
    refused(&full, &entry(IMAGES * PAGE, PAGE), MemInvalid);
    refused(&full, &entry((IMAGES - 1) * PAGE, 2 * PAGE), MemInvalid);
    refused(&full, &entry(DEVICE * PAGE, PAGE), MemInvalid);
    // Twice the same page; and what comes first is home again.
    refused(&full, &lend(&[(A, 7)], &[(RAM, 2), (RAM + 1, 1)]), MemInvalid);
    refused(&full, &share(&[(A, 7), (HOST, 7)], &[(RAM, 2), (RAM + 0x200, 9), (1, 1)]), MemInvalid);
    // What a guest was lent is not its own.
    full.refused(A, &Request::Create(lend(&[(B, 7)], &[(IMAGE_AT / PAGE, 1)])), MemInvalid);
    full.sound();
}

#[test]
fn without_tables_for_what_is_shared_nothing_has_changed() {
    let full = Full::new();
    full.gunyah.with(|world| {
        let aspaces = &world.hyp.aspaces;
        let home = world.rm.vms[&HOST].home.unwrap();
        let tables = aspaces[&home.aspace].tree.nr_tables();
        assert!(tables < 8, "memory is mapped in blocks: {tables}");
    });
    let spare = full.gunyah.with(|world| std::mem::take(&mut world.hyp.heap.free));
    let before = full.picture();
    // A page of a block: the block has to be split, and that is what fails.
    let answer = full.create(HOST, &lend(&[(A, 7)], &[(RAM + 7, 1)]));
    assert_eq!(answer, Err(MemInvalid));
    assert_eq!(before.difference(&full.picture()), None);
    full.gunyah.with(|world| world.hyp.heap.free = spare);
    full.create(HOST, &lend(&[(A, 7)], &[(RAM + 7, 1)])).unwrap();
    full.sound();
}

#[test]
fn what_each_does() {
    let full = Full::new();
    // Lent or given away, it is gone at once; shared, it stays with the rights of the list.
    let lent = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 2), (RAM + 0x1ff, 2)])).unwrap();
    assert_eq!([RAM, RAM + 1, RAM + 0x200].map(|gfn| full.at(HOST, gfn)), [None; 3]);
    assert_eq!(full.at(HOST, RAM + 2), Some((RAM + 2, Access::RWX)));
    let shared = full.create(HOST, &share(&[(HOST, 4), (A, 7), (B, 6)], &[(RAM + 8, 4)])).unwrap();
    assert_eq!(full.at(HOST, RAM + 8), Some((RAM + 8, Access::R)));
    let gift = full.create(HOST, &donate(B, &[(RAM + 16, 1)])).unwrap();
    assert_eq!(full.at(HOST, RAM + 16), None);
    assert_eq!(
        [lent, shared, gift].map(|handle| full.parcel(handle).state),
        [ParcelState::Sharing; 3]
    );
    let regions = full.parcel(lent).regions;
    assert_eq!(
        regions.iter().map(|region| (region.pfn.get(), region.nr)).collect::<Vec<_>>(),
        [(RAM, 2), (RAM + 0x1ff, 2)]
    );
    // A device's registers, as they are.
    let io = Create { mem_type: 1, ..lend(&[(A, 6)], &[(DEVICE + 1, 2)]) };
    let io = full.create(HOST, &io).unwrap();
    assert_eq!(full.at(HOST, DEVICE + 1), None);
    full.sound();
    for handle in [lent, shared, gift, io] {
        full.reclaim(HOST, handle, 0).unwrap();
        full.refused(HOST, &Request::Reclaim { handle, flags: 0 }, HandleInvalid);
    }
    for gfn in (RAM..RAM + 0x300).chain([DEVICE + 1]) {
        assert_eq!(full.at(HOST, gfn).unwrap().0, gfn);
    }
    full.sound();
}

#[test]
fn appending_ends_when_it_is_done() {
    let full = Full::new();
    let append =
        |handle, flags, pages: &[(u64, u64)]| Request::Append { handle, flags, sgl: sgl(pages) };
    let handle = full.create(HOST, &with_flags(&lend(&[(A, 7)], &[(RAM, 1)]), 2)).unwrap();
    assert_eq!(full.parcel(handle).state, ParcelState::Init);
    full.refused(HOST, &append(handle + 9, 0, &[]), ArgumentInvalid);
    full.refused(HOST, &append(handle + 9, 0, &[(1, 0)]), HandleInvalid);
    full.refused(A, &append(handle, 0, &[(1, 0)]), Denied);
    full.refused(HOST, &append(handle, 1, &[(RAM + 1, 1), (RAM, 1)]), MemInvalid);
    assert_eq!(full.parcel(handle).nr_pages(), 1, "what was moved before is back");
    full.send(HOST, &append(handle, 0, &[(RAM + 4, 2), (RAM + 9, 1)])).unwrap();
    assert_eq!(full.parcel(handle).state, ParcelState::Init);
    full.send(HOST, &append(handle, 1, &[(RAM + 20, 1)])).unwrap();
    assert_eq!(
        (full.parcel(handle).state, full.parcel(handle).nr_pages()),
        (ParcelState::Sharing, 5)
    );
    full.refused(HOST, &append(handle, 1, &[(RAM + 30, 1)]), Denied);
    // Whoever accepts too early ends it as well.
    let early = full.create(HOST, &with_flags(&lend(&[(A, 7)], &[(RAM + 40, 1)]), 2)).unwrap();
    full.accept(A, &take(early, Transfer::Lend)).unwrap();
    full.refused(HOST, &append(early, 1, &[(RAM + 41, 1)]), Denied);
    full.sound();
}

#[test]
fn a_share_that_cannot_be_appended_to_leaves_nothing_behind() {
    let full = Full::new();
    let shared = share(&[(HOST, 6), (A, 6)], &[(RAM, 1)]);
    let handle = full.create(HOST, &with_flags(&shared, 2)).unwrap();
    let sgl = sgl(&[(RAM + 4, 2), (RAM, 1)]);
    full.refused(HOST, &Request::Append { handle, flags: 1, sgl }, MemInvalid);
    assert_eq!(full.at(HOST, RAM + 4), Some((RAM + 4, Access::RWX)), "as it was");
    // Not even a record: if the page comes to the parcel in another way, the host does not have it.
    let records = full.gunyah.with(|world| {
        let extent = &world.hyp.extents[&world.rm.parcels[&handle].extent];
        extent.slots().map(|slot| slot.records.iter().count()).sum::<usize>()
    });
    assert_eq!(records, 1);
    full.sound();
}
