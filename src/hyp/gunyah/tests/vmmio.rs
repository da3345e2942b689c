//! What a VM leaves to its VMM: the call's errors in the order of its checks, and what stops a vCPU.

use super::super::World;
use super::super::error::HypError::*;
use super::super::touch::Bytes;
use super::super::vmmio::RunState;
use super::full::*;
use super::*;
use crate::addr::Ipa;

const CALL: u64 = ASPACE_CONFIGURE_VMMIO;
const ADD: u64 = 0;
const REMOVE: u64 = 1;
const TOP: u64 = 1 << 52;

#[test]
fn each_error_in_its_order() {
    let mut bare = Bare::new();
    let aspace = bare.aspace();
    let extent = bare.extent(0, 8, SPARSE);
    let poor = bare.with_rights(aspace, !8);
    bare.refused(CALL, &[0, 0, 0, 9], CapNull);
    bare.refused(CALL, &[extent, 0, 0, 9], WrongObjectType);
    bare.refused(CALL, &[poor, 0, 0, 9], InsufficientRights);
    for op in [2, 9, 1 << 32, u64::MAX] {
        bare.refused(CALL, &[aspace, u64::MAX, 0, op], Unimplemented);
    }
    for op in [ADD, REMOVE] {
        bare.refused(CALL, &[aspace, u64::MAX, 0, op], ArgumentSize);
        bare.refused(CALL, &[aspace, u64::MAX, 1, op], AddrOverflow);
        bare.refused(CALL, &[aspace, TOP, 1, op], ArgumentSize);
        bare.refused(CALL, &[aspace, TOP - 1, 2, op], ArgumentSize);
    }
    bare.refused(CALL, &[aspace, 0x1000, 1, REMOVE], Busy);
    // No page, no alignment: any bytes, but each once.
    bare.call(CALL, &[aspace, 0x1003, 5, ADD]).unwrap();
    for (base, size) in [(0x1003, 5), (0x1007, 1), (0x1000, 4), (0, TOP)] {
        bare.refused(CALL, &[aspace, base, size, ADD], Busy);
    }
    for (base, size) in [(0x1004, 4), (0x1003, 6), (0x1000, 8), (0x1002, 2)] {
        bare.refused(CALL, &[aspace, base, size, REMOVE], Busy);
    }
    bare.call(CALL, &[aspace, 0x1008, 1, ADD]).unwrap();
    // A range that goes on in the next is not one with it.
    bare.refused(CALL, &[aspace, 0x1003, 6, REMOVE], Busy);
    // As many as there may be: that comes before where they are, and after whether they are at all.
    for nth in 2..128 {
        bare.call(CALL, &[aspace, nth << 16, 8, ADD]).unwrap();
    }
    bare.refused(CALL, &[aspace, 0x1003, 5, ADD], NoResources);
    bare.refused(CALL, &[aspace, TOP, 1, ADD], NoResources);
    bare.refused(CALL, &[aspace, u64::MAX, 1, ADD], AddrOverflow);
    bare.call(CALL, &[aspace, 2 << 16, 8, REMOVE]).unwrap();
    bare.call(CALL, &[aspace, TOP - 1, 1, ADD]).unwrap();
    // Other spaces have their own.
    let other = bare.aspace();
    bare.call(CALL, &[other, 0x1003, 5, ADD]).unwrap();
    bare.sound();
}

/// Less than was added can go, from the front, and counts as gone: the rest stays and cannot be named again.
#[test]
fn less_than_a_range_can_be_taken_back_once() {
    let mut bare = Bare::new();
    let aspace = bare.aspace();
    bare.call(CALL, &[aspace, 0x1000, 0x100, ADD]).unwrap();
    bare.call(CALL, &[aspace, 0x1000, 0x10, REMOVE]).unwrap();
    bare.refused(CALL, &[aspace, 0x1010, 0xf0, REMOVE], Busy);
    bare.refused(CALL, &[aspace, 0x1000, 0x10, REMOVE], Busy);
    bare.refused(CALL, &[aspace, 0x1080, 1, ADD], Busy);
    bare.call(CALL, &[aspace, 0x1000, 0x10, ADD]).unwrap();
    bare.sound();
}

#[test]
fn what_stops_a_vcpu() {
    let full = Full::new();
    let home = full.gunyah.with(|world| world.rm.vms[&A].home.unwrap());
    full.gunyah.with(|World { hyp, .. }| {
        let vmmio = &mut hyp.aspaces.get_mut(&home.aspace).unwrap().vmmio;
        vmmio.add(0x5000, 0x10).unwrap();
        vmmio.add(IMAGE_AT, PAGE).unwrap();
    });
    let run = |at, bytes: Bytes<'_>| full.gunyah.run(A, Ipa::new(at), bytes);
    let load = |at, nr: usize| run(at, Bytes::Load(&mut [0; 16][..nr]));
    let store = |at, bytes: &[u8]| run(at, Bytes::Store(bytes));
    assert_eq!(load(0x5004, 4), RunState::VmmioRead(Ipa::new(0x5004), 4));
    assert_eq!(load(0x5004, 4).registers(), [4, 0x5004, 4, 0]);
    assert_eq!(store(0x5008, &[1, 2]).registers(), [5, 0x5008, 2, 0x201]);
    assert_eq!(store(0x5008, &[0xff; 8]).registers(), [5, 0x5008, 8, u64::MAX]);
    // Not all of it there, more than a register, elsewhere: the guest's abort, and it goes on.
    for (at, nr) in [(0x500c, 8), (0x4fff, 1), (0x5010, 1), (0x5000, 9), (0x6000, 4)] {
        assert_eq!(load(at, nr), RunState::Ready, "{at:#x} {nr}");
    }
    // What is mapped is memory, also where that was left to the VMM; and no right to it is the guest's abort.
    assert_eq!(store(IMAGE_AT, b"mine"), RunState::Ready);
    assert_eq!(full.load(A, IMAGE_AT / PAGE), Some(*b"mine"));
    full.gunyah.with(|World { hyp, .. }| {
        let space = hyp.aspaces.get_mut(&home.aspace).unwrap();
        let gfn = Gfn::new(IMAGE_AT / PAGE);
        space.tree.adjust(gfn, |pte| pte.with_prot(Access::R.prot())).unwrap();
    });
    assert_eq!(store(IMAGE_AT, b"evil"), RunState::Ready);
    assert_eq!(full.load(A, IMAGE_AT / PAGE), Some(*b"mine"));
    assert_eq!(load(0x5ffd, 4).registers(), [6, 0, 0, 0], "bytes of two pages");
    // Other VMs have left nothing to anybody.
    assert_eq!(full.gunyah.run(B, Ipa::new(0x5004), Bytes::Load(&mut [0; 4])), RunState::Ready);
    full.gunyah.with(|world| world.rm.pause_vm(HOST, A, true)).unwrap();
    assert_eq!(load(0x5004, 4).registers(), [3, 0, 0, 0]);
    full.gunyah.with(|world| world.rm.stop_vm(HOST, A)).unwrap();
    assert_eq!(load(0x5004, 4).registers(), [2, 0, 0, 0]);
}
