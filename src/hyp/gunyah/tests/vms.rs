//! VMs' states: each call in its state only; and how a VM ends.

use super::super::World;
use super::super::error::RmError::{self, *};
use super::super::rm::message::{Create, RELEASED, Request, Transfer};
use super::super::rm::vm::{Image, VmState};
use super::super::rm::{Fate, Rm, Vmid};
use super::full::*;
use super::*;
use crate::hyp::gunyah::hyp::Hyp;

const C: Vmid = Vmid(0x90);

type Call = fn(&mut Rm, &mut Hyp, Vmid, Image) -> Result<(), RmError>;

/// Calls by name, and the states that they are for.
const CALLS: &[(&str, Call, &[u8])] = &[
    ("config", |rm, hyp, vmid, image| rm.config_image(hyp, HOST, vmid, 1, image), &[5, 11]),
    ("auth", |rm, _, vmid, _| rm.auth_image(HOST, vmid, true), &[6]),
    ("init", |rm, hyp, vmid, _| rm.init_vm(hyp, HOST, vmid), &[1]),
    ("start", |rm, _, vmid, _| rm.start_vm(HOST, vmid), &[2]),
    ("pause", |rm, _, vmid, _| rm.pause_vm(HOST, vmid, true), &[3]),
    ("resume", |rm, _, vmid, _| rm.pause_vm(HOST, vmid, false), &[4]),
    ("stop", |rm, _, vmid, _| rm.stop_vm(HOST, vmid), &[3, 4]),
    ("reset", |rm, _, vmid, _| rm.reset_vm(HOST, vmid), &[2, 8, 9]),
    ("step", |rm, hyp, vmid, _| rm.reset_step(hyp, vmid).map(drop), &[10]),
    ("deallocate", |rm, _, vmid, _| rm.deallocate(HOST, vmid), &[5, 11]),
];

fn image(full: &Full) -> Image {
    let create = Create { label: 0, ..lend(&[(C, 7)], &[(RAM + 0x60, 2)]) };
    Image { handle: full.create(HOST, &create).unwrap(), ipa: IMAGE_AT, unsanitized: false }
}

fn state(full: &Full, vmid: Vmid) -> Option<VmState> {
    full.gunyah.with(|world| world.rm.vms.get(&vmid).map(|vm| vm.state))
}

/// A VM on its way through all states, as far as that one.
fn in_state(full: &Full, wanted: VmState, image: Image) {
    full.gunyah.with(|World { hyp, rm, .. }| {
        rm.allocate(HOST, C).unwrap();
        let way: &[&str] = match wanted {
            VmState::Load => &[],
            VmState::Auth => &["config"],
            VmState::Init => &["config", "auth"],
            VmState::Ready => &["config", "auth", "init"],
            VmState::Running => &["config", "auth", "init", "start"],
            VmState::Paused => &["config", "auth", "init", "start", "pause"],
            VmState::Exited => &["config", "auth", "init", "start", "stop"],
            VmState::Resetting => &["config", "auth", "init", "start", "pause", "stop", "reset"],
            VmState::InitFailed => &["config"],
            VmState::Reset => &["config", "auth", "init", "reset"],
        };
        for name in way {
            let (_, call, _) = CALLS.iter().find(|(known, ..)| known == name).unwrap();
            call(rm, hyp, C, image).unwrap();
        }
        match wanted {
            VmState::InitFailed => {
                assert_eq!(rm.auth_image(HOST, C, false), Err(ValidateFailed));
            }
            VmState::Reset => while rm.reset_step(hyp, C).unwrap() {},
            _ => {}
        }
        assert_eq!(rm.vms[&C].state, wanted);
    });
}

#[test]
fn each_call_in_its_state_and_no_other() {
    use VmState::*;
    for wanted in [Load, Auth, Init, Ready, Running, Paused, InitFailed, Exited, Resetting, Reset] {
        for (name, call, states) in CALLS {
            let full = Full::new();
            let image = image(&full);
            in_state(&full, wanted, image);
            let before = full.picture();
            let answer = full.gunyah.with(|World { hyp, rm, .. }| call(rm, hyp, C, image));
            match states.contains(&(wanted as u8)) {
                true => assert_eq!(answer, Ok(()), "{name} in {wanted:?}"),
                false => {
                    assert_eq!(answer, Err(RmError::VmState), "{name} in {wanted:?}");
                    assert_eq!(state(&full, C), Some(wanted));
                    assert_eq!(before.difference(&full.picture()), None);
                }
            }
            full.sound();
        }
    }
}

#[test]
fn strangers_are_told_nothing_and_nobodys_vm_is_none() {
    let full = Full::new();
    let image = image(&full);
    full.gunyah.with(|World { hyp, rm, .. }| {
        for (name, call, _) in CALLS {
            assert_eq!(call(rm, hyp, C, image), Err(VmidInvalid), "{name}");
        }
        assert_eq!(rm.allocate(A, Vmid(0)), Err(Denied));
        for wrong in [1, 3, 0x7f, 0xc0, 0xff] {
            assert_eq!(rm.allocate(HOST, Vmid(wrong)), Err(VmidInvalid));
        }
        assert_eq!(rm.allocate(HOST, A), Err(NoResource));
        rm.allocate(HOST, C).unwrap();
        assert_eq!(rm.config_image(hyp, A, C, 9, image), Err(Denied));
        assert_eq!(rm.auth_image(A, C, true), Err(Denied));
        assert_eq!(rm.init_vm(hyp, A, C), Err(Denied));
        assert_eq!(rm.start_vm(A, C), Err(Denied));
        assert_eq!(rm.pause_vm(A, C, true), Err(Denied));
        assert_eq!(rm.stop_vm(A, C), Err(VmidInvalid));
        assert_eq!(rm.reset_vm(A, C), Err(VmidInvalid));
        assert_eq!(rm.deallocate(A, C), Err(Denied));
        // The host is nobody's to stop, and neither is the resource manager.
        for vmid in [HOST, Vmid::RM] {
            assert_eq!(rm.stop_vm(HOST, vmid), Err(VmidInvalid));
            assert_eq!(rm.deallocate(HOST, vmid), Err(Denied));
        }
        while rm.allocate(HOST, Vmid(0)).is_ok() {}
        assert_eq!(rm.vms.len(), 64 + 2);
    });
    full.sound();
}

#[test]
fn what_a_vm_begins_with_is_for_it_alone() {
    let full = Full::new();
    let good = Create { label: 0, ..lend(&[(C, 7)], &[(RAM, 1)]) };
    let configure = |create: &Create, auth| {
        let handle = full.create(HOST, create).unwrap();
        let answer = full.gunyah.with(|World { hyp, rm, .. }| {
            rm.allocate(HOST, C).unwrap();
            let image = Image { handle, ipa: IMAGE_AT, unsanitized: false };
            let answer = rm.config_image(hyp, HOST, C, auth, image);
            assert_eq!(rm.vms[&C].state == VmState::InitFailed, answer.is_err());
            if answer.is_ok() {
                assert_eq!(rm.init_vm(hyp, HOST, C), Ok(()));
            }
            rm.reset_vm(HOST, C).unwrap();
            while rm.reset_step(hyp, C).unwrap() {}
            rm.deallocate(HOST, C).unwrap();
            answer
        });
        full.reclaim(HOST, handle, 0).unwrap();
        full.sound();
        answer
    };
    assert_eq!(configure(&good, 0), Ok(()));
    assert_eq!(configure(&good, 2), Ok(()));
    assert_eq!(configure(&good, 3), Err(ArgumentInvalid));
    assert_eq!(configure(&Create { acl: acl(&[(A, 7)]), ..good.clone() }, 0), Err(HandleInvalid));
    for create in [
        Create { label: 1, ..good.clone() },
        Create { acl: acl(&[(C, 6)]), ..good.clone() },
        Create { acl: acl(&[(C, 7), (A, 7)]), ..good.clone() },
        Create { transfer: Transfer::Donate, ..good.clone() },
        share(&[(C, 7), (HOST, 7)], &[(RAM, 1)]),
        with_attrs(&good, &[(2, C)]),
    ] {
        assert_eq!(configure(&create, 0), Err(ArgumentInvalid), "{create:?}");
    }
}

#[test]
fn a_reset_ends_with_nothing_accepted_and_owners_are_told() {
    let full = Full::new();
    let first = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 4)])).unwrap();
    let second = full.create(HOST, &share(&[(A, 4), (B, 4), (HOST, 6)], &[(RAM + 8, 1)])).unwrap();
    full.accept(A, &take(first, Transfer::Lend)).unwrap();
    full.accept(A, &take(second, Transfer::Share)).unwrap();
    full.accept(B, &take(second, Transfer::Share)).unwrap();
    // A lock does not keep it from ending.
    full.gunyah.with(|world| world.rm.set_lock(first, true));
    full.heard(HOST);
    full.gunyah.with(|world| {
        world.rm.stop_vm(HOST, A).unwrap();
        world.rm.reset_vm(HOST, A).unwrap();
        world.rm.reset_step(&mut world.hyp, A).unwrap();
    });
    // One parcel with each step, the last first.
    for handle in [second, first] {
        full.gunyah.with(|world| assert!(world.rm.reset_step(&mut world.hyp, A).unwrap()));
        let [told] = &full.heard(HOST)[..] else { panic!("one notification") };
        assert_eq!((told.id, &told.body[..4]), (RELEASED, &handle.to_le_bytes()[..]));
        full.sound();
    }
    full.gunyah.with(|world| while world.rm.reset_step(&mut world.hyp, A).unwrap() {});
    assert_eq!(full.parcel(second).share_count, 1);
    full.gunyah.with(|world| world.rm.set_lock(first, false));
    full.reclaim(HOST, first, 0).unwrap();
    full.refused(HOST, &Request::Reclaim { handle: second, flags: 0 }, MemInUse);
    full.sound();
}

#[test]
fn what_was_given_to_a_vm_goes_where_it_is_to_go() {
    for fate in [Fate::Lost, Fate::Host] {
        let full = Full::with(NR_HEAP, fate);
        let gift = full.create(HOST, &donate(A, &[(RAM, 2)])).unwrap();
        full.accept(A, &take(gift, Transfer::Donate)).unwrap();
        full.reset(A);
        full.sound();
        full.gunyah.with(|world| {
            let host = world.rm.vms[&HOST].home.unwrap();
            let owner = world.hyp.memdb.owner(Pfn::new(RAM));
            let expected = match fate {
                Fate::Lost => world.rm.root,
                Fate::Host => host.memory,
            };
            assert_eq!(owner, Owner::Extent(expected));
            assert!(world.rm.vms[&A].home.is_none());
        });
        assert_eq!(full.at(HOST, RAM), None, "nobody has it mapped");
    }
}

#[test]
fn a_vm_that_is_not_there_yet_has_no_use_for_what_it_is_shown() {
    let full = Full::new();
    let image = image(&full);
    in_state(&full, VmState::Ready, image);
    let handle = full.create(HOST, &lend(&[(C, 7)], &[(RAM, 1)])).unwrap();
    full.heard(HOST);
    let list = vec![1, 0, 0, 0, 0x90, 0, 0, 0];
    full.send(HOST, &Request::Notify { handle, flags: 1, tag: 0, list }).unwrap();
    assert_eq!(full.heard(HOST)[0].id, RELEASED);
    assert_eq!(full.heard(C), []);
}
