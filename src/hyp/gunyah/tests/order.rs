//! Where two errors are possible at once, the first of the table wins: pairs that the tests of each request and each call
//! do not have.

use super::super::World;
use super::super::error::HypError;
use super::super::error::RmError::{self, *};
use super::super::rm::accept;
use super::super::rm::message::{Accept, Create, Request, SglEntry, Transfer};
use super::super::rm::vm::Image;
use super::super::rm::{Vmid, notify};
use super::full::*;
use super::*;

const C: Vmid = Vmid(0x90);

fn refused(full: &Full, create: &Create, error: RmError) {
    full.refused(HOST, &Request::Create(create.clone()), error);
}

#[test]
fn of_what_a_parcel_is_made_of() {
    let full = Full::new();
    let page = [(RAM, 1)];
    // A number that is none before too few rights for a gift; and execution of a device before them.
    refused(&full, &Create { acl: acl(&[(Vmid(0), 4)]), ..donate(A, &page) }, ArgumentInvalid);
    let io = Create { mem_type: 1, ..donate(A, &[(DEVICE, 1)]) };
    refused(&full, &Create { acl: acl(&[(A, 5)]), ..io }, ArgumentInvalid);
    // Rights of a gift before who is in the list.
    refused(&full, &Create { acl: acl(&[(HOST, 4)]), ..donate(A, &page) }, Denied);
    // An entry's number before the next one's rights: entry by entry.
    let two = |first, second| Create { acl: acl(&[first, second]), ..lend(&[], &page) };
    refused(&full, &two((A, 7), (A, 8)), ArgumentInvalid);
    // Who is in the list before attributes of nobody.
    let owner = lend(&[(HOST, 7)], &page);
    refused(&full, &with_attrs(&owner, &[(0, B)]), ArgumentInvalid);
    // Attributes entry by entry.
    let good = lend(&[(A, 7)], &page);
    refused(&full, &with_attrs(&good, &[(4, A), (0, B)]), ArgumentInvalid);
    refused(&full, &with_attrs(&good, &[(0, B), (0, B)]), VmidInvalid);
    refused(&full, &with_attrs(&good, &[(4, B)]), ArgumentInvalid);
    // Attributes before addresses that are none; and the more before memory that is not there.
    let entry = |ipa, size| SglEntry { ipa, size };
    let sgl = |entries: &[SglEntry]| Create { sgl: entries.to_vec(), ..good.clone() };
    let odd = entry(RAM * PAGE + 1, PAGE);
    let away = entry(0x7000 * PAGE, PAGE);
    refused(&full, &with_attrs(&sgl(&[odd]), &[(0, B)]), VmidInvalid);
    refused(&full, &with_attrs(&sgl(&[away]), &[(0, B)]), VmidInvalid);
    refused(&full, &sgl(&[entry(0x7000 * PAGE + 1, PAGE)]), ArgumentInvalid);
    // Addresses entry by entry.
    refused(&full, &sgl(&[away, odd]), MemInvalid);
    refused(&full, &sgl(&[odd, away]), ArgumentInvalid);
    // Other pages come home when a later one is none.
    refused(&full, &sgl(&[entry(RAM * PAGE, 2 * PAGE), odd]), ArgumentInvalid);
    assert_eq!(full.at(HOST, RAM + 1), Some((RAM + 1, Access::RWX)));
    full.sound();
}

#[test]
fn of_where_a_parcel_goes() {
    let full = Full::new();
    let pages = [(RAM, 1), (RAM + 4, 1)];
    let handle = full.create(HOST, &lend(&[(A, 7)], &pages)).unwrap();
    let accept =
        |flags, at: &[(u64, u64)]| Accept { flags, sgl: sgl(at), ..take(handle, Transfer::Lend) };
    let refused = |flags, at: &[(u64, u64)], error| {
        full.refused(A, &Request::Accept(accept(flags, at)), error);
    };
    let taken = IMAGE_AT / PAGE;
    // Region by region: an address that is in use, and one of another size.
    refused(accept::DONE, &[(taken, 1), (0x300, 2)], NoResource);
    refused(accept::DONE, &[(0x300, 2), (taken, 1)], ArgumentInvalid);
    // In use before too early an end; too early before no tables.
    refused(accept::DONE, &[(taken, 1)], NoResource);
    let spare = full.gunyah.with(|world| std::mem::take(&mut world.hyp.heap.free));
    refused(accept::DONE, &[(0x80_0000, 1)], ArgumentInvalid);
    refused(accept::DONE, &[(0x80_0000, 1), (taken, 1)], NoResource);
    refused(accept::DONE, &[(0x80_0000, 1), (0x80_0001, 1)], MapFailed);
    full.gunyah.with(|world| world.hyp.heap.free = spare);
    full.accept(A, &accept(accept::DONE, &[(0x300, 1), (0x301, 1)])).unwrap();
    full.sound();
}

/// A gift that goes back to who had it mapped needs tables to arrive at all.
#[test]
fn a_gift_that_cannot_arrive_is_not_mapped() {
    let full = Full::new();
    let there = full.create(HOST, &donate(A, &[(RAM, 0x200)])).unwrap();
    full.accept(A, &take(there, Transfer::Donate)).unwrap();
    let back = full.create(A, &donate(HOST, &[(0x200, 1)])).unwrap();
    let home = full.gunyah.with(|world| world.rm.vms[&HOST].home.unwrap());
    // As the host would have it if it had not given its mapping up.
    full.gunyah.with(|world| {
        let (at, attrs) = (RAM * PAGE, RWX);
        world.hyp.map_partial(home.memory, home.aspace, at, (at, PAGE), attrs).unwrap();
    });
    let spare = full.gunyah.with(|world| std::mem::take(&mut world.hyp.heap.free));
    let request = Request::Accept(take(back, Transfer::Donate));
    full.refused(HOST, &request, MemInvalid);
    full.gunyah.with(|world| {
        world.hyp.heap.free = spare;
        let (at, bytes) = (RAM * PAGE, (RAM * PAGE, PAGE));
        world.hyp.unmap_partial(home.memory, home.aspace, at, bytes).unwrap();
    });
    full.send(HOST, &request).unwrap();
    assert_eq!(full.at(HOST, RAM), Some((RAM, Access::RWX)));
    full.sound();
}

#[test]
fn of_what_comes_back() {
    let full = Full::new();
    let create = share(&[(HOST, 6), (A, 4)], &[(RAM, 1)]);
    let handle = full.create(HOST, &create).unwrap();
    full.accept(A, &Accept { sgl: sgl(&[(0x80_0000, 1)]), ..take(handle, Transfer::Share) })
        .unwrap();
    // What cannot be cleared is refused as such, and locked memory as locked, whatever else.
    full.gunyah.with(|world| world.rm.set_lock(handle, true));
    full.refused(A, &Request::Release { handle, flags: 1 }, Denied);
    full.gunyah.with(|world| world.rm.set_lock(handle, false));
    full.refused(A, &Request::Release { handle, flags: 1 }, ArgumentInvalid);
    // To append: nobody's handle before who may, and both before pages that are none.
    let append = |handle, flags| Request::Append { handle, flags, sgl: sgl(&[(1, 0)]) };
    full.refused(A, &append(handle + 7, 0), HandleInvalid);
    full.refused(A, &append(handle, 0), Denied);
    full.refused(HOST, &append(handle, 0), Denied);
    // Whom a notification is for, one by one.
    let list = |vmids: &[u16]| {
        let mut list = u16::try_from(vmids.len()).unwrap().to_le_bytes().to_vec();
        list.extend([0; 2]);
        vmids.iter().for_each(|vmid| list.extend([vmid.to_le_bytes(), [0; 2]].concat()));
        list
    };
    let recall = |vmids: &[u16]| Request::Notify {
        handle,
        flags: notify::OF_RECALL,
        tag: 0,
        list: list(vmids),
    };
    full.refused(HOST, &recall(&[0x81, 0x90]), ArgumentInvalid);
    full.refused(HOST, &recall(&[0x90, 0x81]), VmidInvalid);
    full.refused(A, &recall(&[0x90]), Denied);
    full.sound();
}

#[test]
fn of_a_vms_life() {
    let full = Full::new();
    let good = Create { label: 0, ..lend(&[(C, 7)], &[(RAM, 1)]) };
    let handle = full.create(HOST, &good).unwrap();
    let image = Image { handle, ipa: IMAGE_AT, unsanitized: false };
    let none = Image { handle: 999, ..image };
    full.gunyah.with(|World { hyp, rm, .. }| {
        // Who asks before whom it is about.
        assert_eq!(rm.allocate(A, Vmid(1)), Err(Denied));
        assert_eq!(rm.config_image(hyp, A, C, 0, image), Err(Denied));
        assert_eq!(rm.auth_image(A, C, true), Err(Denied));
        assert_eq!(rm.init_vm(hyp, A, C), Err(Denied));
        assert_eq!(rm.deallocate(A, C), Err(Denied));
        assert_eq!(rm.start_vm(A, C), Err(VmidInvalid));
        // Whose it is before its state, and that before what is said about it.
        rm.allocate(HOST, C).unwrap();
        assert_eq!(rm.start_vm(A, C), Err(Denied));
        assert_eq!(rm.stop_vm(A, C), Err(VmidInvalid));
        assert_eq!(rm.config_image(hyp, HOST, A, 9, none), Err(VmState));
        // Who vouches before the parcel.
        assert_eq!(rm.config_image(hyp, HOST, C, 9, none), Err(ArgumentInvalid));
    });
    full.sound();
}

/// A root, a child with memory, one of its own that is basic, an address space, and a capability that is none.
fn scene() -> (Bare, [u64; 4]) {
    let mut bare = Bare::new();
    let root = bare.extent(0, 0x1_0000, SPARSE);
    bare.give(bare.partition, root, 0, RAM, NR_RAM).unwrap();
    let child = bare.derive(root, RAM, NR_RAM, SPARSE);
    bare.give(root, child, 0, 0, 0x400).unwrap();
    let basic = bare.derive(child, 0, 4, BASIC);
    let aspace = bare.aspace();
    (bare, [root, child, basic, aspace])
}

#[test]
fn of_calls_about_mappings() {
    use HypError::{
        AddrInvalid, ArgumentInvalid, ArgumentSize, CapNull, Denied, ExtentType, MappingsFull,
    };
    let (mut bare, [_, child, basic, aspace]) = scene();
    let (map, unmap, update) = (ASPACE_MAP, ASPACE_UNMAP, ASPACE_UPDATE_ACCESS);
    // What an extent is before where it is to go.
    bare.refused(map, &[aspace, basic, 1 << 48, 0xf_0077, PARTIAL, 0, PAGE], ExtentType);
    // Four places are taken: an address that is none before that, and that before no tables.
    for nth in 0..4 {
        let space = if nth == 0 { aspace } else { bare.aspace() };
        let x = [space, child, 0x40_0000_0000, 0xf_0077, PARTIAL, 0, PAGE];
        bare.call(map, &x).unwrap();
    }
    let fifth = bare.aspace();
    let part = |at| [fifth, child, at, 0xf_0077, PARTIAL, 8 * PAGE, PAGE];
    bare.refused(map, &part(1 << 48), AddrInvalid);
    let spare = std::mem::take(&mut bare.hyp.heap.free);
    bare.refused(map, &part(0x80_0000_0000), MappingsFull);
    bare.hyp.heap.free = spare;
    // Flags and rights that are none before capabilities.
    bare.refused(update, &[0, 0, 1, 0x1_0044], ArgumentInvalid);
    bare.refused(update, &[0, 0, 1, 0x44], CapNull);
    // Tables that others keep: after sizes, before everything about the extent.
    let id = bare.aspace_id(aspace);
    bare.hyp.aspaces.get_mut(&id).unwrap().read_only = true;
    bare.refused(map, &[aspace, basic, 0, 0xf_0077, PARTIAL, 0, PAGE], Denied);
    bare.refused(map, &[aspace, child, 0, 0xf_0077, PARTIAL, 0, 0], ArgumentSize);
    bare.refused(unmap, &[aspace, child, 0, PARTIAL, 0, 0], ArgumentSize);
    bare.refused(unmap, &[aspace, basic, 0, PARTIAL, 0, PAGE], Denied);
    bare.refused(update, &[aspace, child, 0, 0x44, PARTIAL, 0, 0], ArgumentSize);
    bare.refused(update, &[aspace, basic, 0, 0x44, PARTIAL, 0, PAGE], Denied);
    bare.refused(ASPACE_LOOKUP, &[0, 0, 1, 0], CapNull);
    bare.sound();
}

#[test]
fn of_calls_about_extents() {
    use HypError::{
        ArgumentInvalid, CapNull, Denied, InsufficientRights, NotOwner, WrongObjectType,
    };
    let (mut bare, [root, child, basic, aspace]) = scene();
    let (derive, donate, modify) = (EXTENT_DERIVE, EXTENT_DONATE, EXTENT_MODIFY);
    // A capability before what is wrong with the operation, but not before bits that mean nothing.
    bare.refused(modify, &[0, 4], CapNull);
    bare.refused(modify, &[aspace, 254], WrongObjectType);
    bare.refused(donate, &[3, 0, 0, 1, 0], ArgumentInvalid);
    bare.refused(donate, &[2, 0, 0, 1, 0], CapNull);
    let poor = bare.with_rights(child, !2);
    bare.refused(derive, &[poor, 0, 0, 0], InsufficientRights);
    bare.refused(EXTENT_CONFIGURE, &[0, 0, 0, 0], CapNull);
    // The parent before how much.
    let other = bare.derive(root, RAM, 8, SPARSE);
    bare.refused(donate, &[0, other, child, 1, !0], ArgumentInvalid);
    bare.refused(donate, &[1, child, other, 1, !0], ArgumentInvalid);
    // Whose it is before no tables.
    let spare = std::mem::take(&mut bare.hyp.heap.free);
    bare.refused(donate, &[2, other, child, 0, PAGE], NotOwner);
    bare.hyp.heap.free = spare;
    // A basic child wants memory that is the parent's, and then all of it mapped or nothing.
    let x = [aspace, child, 0x10_0000, 0xf_0077, PARTIAL, 0x3ff * PAGE, 2 * PAGE];
    bare.call(ASPACE_MAP, &x).unwrap();
    bare.refused(derive, &[child, 0x3fe * PAGE, 2 * PAGE, BASIC], Denied);
    bare.refused(derive, &[child, 0x3fe * PAGE, 3 * PAGE, BASIC], NotOwner);
    bare.refused(derive, &[child, 0, PAGE, BASIC], NotOwner);
    assert_eq!(bare.owner(RAM), Owner::Extent(bare.extent_id(basic)));
    bare.sound();
}
