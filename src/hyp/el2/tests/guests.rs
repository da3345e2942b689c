//! Guests' hypercalls, with arguments good and bad.

use super::*;
use crate::hyp::el2::guest_call::{FEATURES, HYP_MEMINFO, MEM_RELINQUISH};
use crate::hyp::el2::vm::{Fault, FaultKind};

#[test]
fn calls_answer_exactly() {
    let world = World::new();
    assert_eq!(world.el2.guest_call(0, [0; 4]), Err(Errno::EINVAL));
    assert_eq!(world.el2.guest_call(99, [0; 4]), Err(Errno::EINVAL));
    let guest = world.running(true);
    let call = |x: [u64; 4]| world.el2.guest_call(0, x).unwrap();
    let features = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
    assert_eq!(call([FEATURES, 7, 7, 7]), GuestAnswer::Resume([features, 0, 0, 0]));
    assert_eq!(call([HYP_MEMINFO, 0, 0, 0]), GuestAnswer::Resume([4096, 0, 0, 0]));
    for at in 1..4 {
        let mut x = [HYP_MEMINFO, 0, 0, 0];
        x[at] = 1 << 40;
        assert_eq!(call(x), INVALID);
    }
    world.donate(GUEST, 0x10).unwrap();
    let before = Snapshot::of(&world.el2);
    for id in [MEM_SHARE, MEM_UNSHARE] {
        for x in [[id, 0x10_001, 0, 0], [id, 0x10_000, 1, 0], [id, 0x10_000, 0, 1]] {
            assert_eq!(call(x), INVALID, "{x:x?}");
        }
        assert_eq!(call([id, 1 << 40, 0, 0]), INVALID);
        assert_eq!(call([id, !0xfff, 0, 0]), INVALID);
    }
    for id in [MEM_RELINQUISH, 0xc600_0007, 0x8400_0000, u64::MAX, 0] {
        let x = [id, 0x10_000, 2, 3];
        assert_eq!(call(x), GuestAnswer::Exit(x), "the host's to answer");
    }
    before.nothing_changed(&Snapshot::of(&world.el2));
    let _ = guest;
}

#[test]
fn a_call_is_known_by_32_bits() {
    const UPPER: u64 = 0xdead_beef << 32;
    for profile in [Profile::Mainline72, Profile::Android618] {
        let world = World::with(profile);
        world.running(true);
        world.donate(GUEST, 0x10).unwrap();
        world.store(0x10, b"show").unwrap();
        let call =
            |id: u64, gfn: u64| world.el2.guest_call(0, [UPPER | id, gfn << 12, 0, 0]).unwrap();
        assert!(matches!(call(FEATURES, 0), GuestAnswer::Resume([x0, ..]) if x0 & 0x1d == 0x1d));
        assert!(matches!(call(HYP_MEMINFO, 0), GuestAnswer::Resume([4096, ..])));
        assert!(matches!(call(MEM_SHARE, 0x10), GuestAnswer::Resume([0, ..])));
        assert_eq!(world.user_load(GUEST), Ok(*b"show"));
        assert!(matches!(call(MEM_UNSHARE, 0x10), GuestAnswer::Resume([0, ..])));
        assert_eq!(world.user_load(GUEST), Err(Signal::SegvAccerr));
        // What the host sees is what the guest said.
        let x = [UPPER | 0x8400_0000, 1, 2, 3];
        assert_eq!(world.el2.guest_call(0, x), Ok(GuestAnswer::Exit(x)));
        world.sound();
    }
}

#[test]
pub(super) fn a_share_of_nothing_is_a_fault_first_and_then_made_again() {
    let world = World::new();
    world.running(true);
    world.donate(GUEST + 9, 0x9).unwrap();
    let fault = Fault { gfn: Gfn::new(0x10), kind: FaultKind::Translation };
    let before = Snapshot::of(&world.el2);
    assert_eq!(world.hvc(MEM_SHARE, 0x10), GuestAnswer::Fault(fault));
    before.nothing_changed(&Snapshot::of(&world.el2));
    assert_eq!(world.call(HostCall::VcpuInPoisonFault, [0; 4]), Ok(0));
    // 35: one donation and one more try.
    world.donate(GUEST, 0x10).unwrap();
    assert_eq!(world.hvc(MEM_SHARE, 0x10), DONE);
    world.sound();
}

#[test]
fn a_guest_that_is_not_protected_is_kvms_to_answer() {
    let world = World::new();
    world.running(false);
    for id in [FEATURES, MEM_SHARE, 1] {
        let x = [id, 0x10_000, 0, 0];
        assert_eq!(world.el2.guest_call(0, x), Ok(GuestAnswer::Exit(x)));
    }
}
