//! RELEASE, RECLAIM and NOTIFY: every error in the order of its checks, and what they do.

use super::super::error::RmError::*;
use super::super::rm::message::{
    ACCEPTED, Accept, Create, RECALL, RELEASED, Request, SHARED, Transfer,
};
use super::super::rm::{ParcelState, Vmid, accept, notify};
use super::full::*;
use super::*;

fn release(handle: u32, flags: u8) -> Request {
    Request::Release { handle, flags }
}

fn reclaim(handle: u32, flags: u8) -> Request {
    Request::Reclaim { handle, flags }
}

fn lock(full: &Full, handle: u32, locked: bool) {
    full.gunyah.with(|world| world.rm.set_lock(handle, locked));
}

#[test]
fn releases_fail_in_this_order() {
    let full = Full::new();
    let handle = full.create(HOST, &share(&[(HOST, 6), (A, 4)], &[(RAM, 2)])).unwrap();
    full.refused(A, &release(handle + 9, 1), HandleInvalid);
    lock(&full, handle, true);
    full.refused(B, &release(handle, 1), Denied);
    lock(&full, handle, false);
    full.refused(B, &release(handle, 1), HandleInvalid);
    full.refused(HOST, &release(handle, 1), Denied);
    full.refused(A, &release(handle, 1), MemReleased);
    full.accept(A, &take(handle, Transfer::Share)).unwrap();
    full.refused(A, &release(handle, 1), ArgumentInvalid);
    full.release(A, handle, 0).unwrap();
    full.refused(A, &release(handle, 1), MemReleased);
    assert_eq!(full.parcel(handle).state, ParcelState::Sharing);
    let io = Create { mem_type: 1, ..lend(&[(A, 6)], &[(DEVICE, 1)]) };
    let io = full.create(HOST, &io).unwrap();
    full.accept(A, &Accept { mem_type: 1, ..take(io, Transfer::Lend) }).unwrap();
    full.refused(A, &release(io, 1), ArgumentInvalid);
    full.release(A, io, 0).unwrap();
    full.sound();
}

#[test]
fn reclaims_fail_in_this_order() {
    let full = Full::new();
    let io = Create { mem_type: 1, ..lend(&[(A, 6)], &[(DEVICE, 1)]) };
    let handle = full.create(HOST, &io).unwrap();
    full.accept(A, &Accept { mem_type: 1, ..take(handle, Transfer::Lend) }).unwrap();
    lock(&full, handle, true);
    full.refused(HOST, &reclaim(handle + 9, 1), HandleInvalid);
    full.refused(A, &reclaim(handle, 1), Denied);
    full.refused(B, &reclaim(handle, 1), Denied);
    full.refused(HOST, &reclaim(handle, 1), MemInUse);
    lock(&full, handle, false);
    full.release(A, handle, 0).unwrap();
    lock(&full, handle, true);
    full.refused(HOST, &reclaim(handle, 1), Denied);
    lock(&full, handle, false);
    full.refused(HOST, &reclaim(handle, 1), ArgumentInvalid);
    full.reclaim(HOST, handle, 0).unwrap();
    full.refused(HOST, &reclaim(handle, 0), HandleInvalid);
    full.sound();
}

#[test]
fn there_and_back_is_nothing() {
    let full = Full::small();
    let before = full.picture();
    for transfer in [Transfer::Lend, Transfer::Share] {
        let mut members = vec![(A, 7), (B, 5)];
        if transfer == Transfer::Share {
            members.push((HOST, 4));
        }
        let create = Create { transfer, ..lend(&members, &[(RAM + 3, 5), (RAM + 0x1f0, 0x20)]) };
        let handle = full.create(HOST, &create).unwrap();
        full.accept(A, &take(handle, transfer)).unwrap();
        full.accept(
            B,
            &Accept { flags: accept::DONE | accept::MAP_CONTIGUOUS, ..take(handle, transfer) },
        )
        .unwrap();
        full.sound();
        full.release(A, handle, 0).unwrap();
        full.refused(HOST, &reclaim(handle, 0), MemInUse);
        assert!(full.at(A, 0).is_none() && full.at(B, 0).is_some());
        full.release(B, handle, 0).unwrap();
        // Taken again, after it was given back.
        full.accept(A, &take(handle, transfer)).unwrap();
        full.release(A, handle, 0).unwrap();
        full.reclaim(HOST, handle, 0).unwrap();
        full.sound();
        let after = full.picture();
        assert_eq!(before.difference(&after), None, "{transfer:?}");
        assert_eq!(before.heads, after.heads);
    }
}

#[test]
fn without_tables_for_the_owner_the_parcel_stays() {
    let full = Full::new();
    // All of a block in pieces: the table of its pages goes, and somebody else uses the frame.
    let handle =
        full.create(HOST, &lend(&[(A, 7)], &[(RAM, 0x100), (RAM + 0x100, 0x100)])).unwrap();
    let spare = full.gunyah.with(|world| std::mem::take(&mut world.hyp.heap.free));
    let before = full.picture();
    assert_eq!(full.send(HOST, &reclaim(handle, 0)), Err(NoMem));
    assert_eq!(before.difference(&full.picture()), None);
    full.sound_but_for_the_heap();
    full.gunyah.with(|world| world.hyp.heap.free = spare);
    full.reclaim(HOST, handle, 0).unwrap();
    full.sound();
}

impl Full {
    fn sound_but_for_the_heap(&self) {
        let told = self.gunyah.with(|world| world.check());
        assert!(told.iter().all(|told| told.starts_with("tables")), "{told:#?}");
    }
}

fn tell(handle: u32, flags: u8, tag: u32, to: &[Vmid]) -> Request {
    let mut list = u16::try_from(to.len()).unwrap().to_le_bytes().to_vec();
    list.extend([0; 2]);
    for vmid in to {
        list.extend(vmid.0.to_le_bytes());
        list.extend([0; 2]);
    }
    Request::Notify { handle, flags, tag, list }
}

#[test]
fn notifications_fail_in_this_order_and_change_nothing() {
    let full = Full::new();
    let handle = full.create(HOST, &lend(&[(A, 7), (Vmid(0x90), 7)], &[(RAM, 1)])).unwrap();
    full.heard(HOST);
    let (shared, recall) = (notify::OF_SHARED, notify::OF_RECALL);
    full.refused(B, &tell(handle + 9, 3, 1, &[]), HandleInvalid);
    for flags in [0, 3, 16, 255] {
        full.refused(B, &tell(handle, flags, 1, &[]), ArgumentInvalid);
    }
    for flags in [shared, recall] {
        full.refused(A, &tell(handle, flags, 1, &[]), Denied);
        let cut = |list: &[u8]| Request::Notify { handle, flags, tag: 1, list: list.to_vec() };
        full.refused(HOST, &cut(&[]), MsgInvalid);
        full.refused(HOST, &cut(&[1, 0, 0]), MsgInvalid);
        full.refused(HOST, &cut(&[0, 0, 0, 0]), ArgumentInvalid);
        full.refused(HOST, &cut(&[1, 0, 0, 0, 0x80, 0, 0]), MsgInvalid);
        full.refused(HOST, &cut(&[0xff, 0xff, 0, 0, 0x80, 0, 0, 0]), MsgInvalid);
        full.refused(HOST, &tell(handle, flags, 1, &[A, A, A]), ArgumentInvalid);
        full.refused(HOST, &tell(handle, flags, 1, &[A, Vmid(0x90)]), VmidInvalid);
        full.refused(HOST, &tell(handle, flags, 1, &[A, B]), ArgumentInvalid);
    }
    let (released, accepted) = (notify::OF_RELEASED, notify::OF_ACCEPTED);
    full.refused(B, &tell(handle, accepted, 1, &[]), HandleInvalid);
    full.refused(HOST, &tell(handle, released, 1, &[]), HandleInvalid);
    full.refused(A, &tell(handle, accepted, 1, &[]), MemReleased);
    assert_eq!([HOST, A, B].map(|vmid| full.heard(vmid).len()), [0; 3], "nobody was told");

    // The first tag is the one.
    full.send(HOST, &tell(handle, shared, 5, &[A])).unwrap();
    full.refused(HOST, &tell(handle, recall, 6, &[A]), ArgumentInvalid);
    full.send(A, &tell(handle, released, 5, &[])).unwrap();
    full.accept(A, &take(handle, Transfer::Lend)).unwrap();
    full.refused(A, &tell(handle, released, 5, &[]), MemInUse);
    full.send(A, &tell(handle, accepted, 5, &[])).unwrap();
    full.send(HOST, &tell(handle, recall, 5, &[A])).unwrap();
    let ids = |vmid| full.heard(vmid).iter().map(|told| told.id).collect::<Vec<_>>();
    assert_eq!(
        (ids(HOST), ids(A), ids(B)),
        (vec![RELEASED, ACCEPTED], vec![SHARED, RECALL], vec![])
    );
    full.sound();
}

#[test]
fn what_is_told_is_told_in_full() {
    let full = Full::new();
    let create = with_attrs(&lend(&[(A, 7), (B, 4)], &[(RAM, 1), (RAM + 4, 2)]), &[(2, B)]);
    let handle = full.create(HOST, &with_flags(&create, SANITIZE)).unwrap();
    full.send(HOST, &tell(handle, notify::OF_SHARED, 0x55, &[B])).unwrap();
    let [told] = &full.heard(B)[..] else { panic!("one notification") };
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0, 1, 1, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0x55, 0, 0, 0]);
    body.extend([2, 0, 0, 0, 0x80, 0, 7, 0, 0x81, 0, 4, 0]);
    body.extend([2, 0, 0, 0]);
    body.extend(PAGE.to_le_bytes());
    body.extend((2 * PAGE).to_le_bytes());
    body.extend([1, 0, 0, 0, 2, 0, 0x81, 0]);
    assert_eq!((told.id, &told.body), (SHARED, &body));
    full.accept(B, &Accept { flags: 0, ..take(handle, Transfer::Lend) }).unwrap();
    full.heard(HOST);
    full.send(B, &tell(handle, notify::OF_ACCEPTED, 0x55, &[])).unwrap();
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0x81, 0, 0, 0, 0x55, 0, 0, 0]);
    assert_eq!(full.heard(HOST)[0].body, body);
}

#[test]
fn who_does_not_listen_loses_the_newest() {
    let full = Full::new();
    let handle = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 1)])).unwrap();
    for _ in 0..300 {
        full.send(HOST, &tell(handle, notify::OF_RECALL, 0, &[A])).unwrap();
    }
    assert_eq!(full.heard(A).len(), 256);
    assert_eq!(full.gunyah.with(|world| world.rm.vms[&A].nr_lost), 44);
}
