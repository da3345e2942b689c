//! Zeroes where somebody asked for them, at each of four places, and nowhere else.

use super::super::World;
use super::super::error::RmError;
use super::super::rm::message::{Accept, Create, Transfer};
use super::super::rm::vm::Image;
use super::super::rm::{Fate, Vmid, accept};
use super::full::*;
use super::*;

const SECRET: [u8; 4] = *b"mine";

/// What each asks for: create, accept, release, reclaim.
fn round(wishes: [bool; 4], transfer: Transfer) -> ([u8; 4], [u8; 4]) {
    let full = Full::new();
    let flag = |nth: usize, flag: u8| if wishes[nth] { flag } else { 0 };
    assert!(full.store(HOST, RAM + 5, b"host"));
    let mut members = vec![(A, 7)];
    if transfer == Transfer::Share {
        members.push((HOST, 4));
    }
    let create = Create { transfer, flags: flag(0, SANITIZE), ..lend(&members, &[(RAM + 5, 1)]) };
    let handle = full.create(HOST, &create).unwrap();
    let flags = accept::DONE | flag(1, accept::SANITIZE);
    full.accept(A, &Accept { flags, ..take(handle, transfer) }).unwrap();
    let seen = full.load(A, 0).unwrap();
    assert!(full.store(A, 0, &SECRET));
    full.release(A, handle, flag(2, 1)).unwrap();
    full.reclaim(HOST, handle, flag(3, 1)).unwrap();
    full.sound();
    (seen, full.load(HOST, RAM + 5).unwrap())
}

#[test]
fn each_wish_means_what_it_means_and_none_means_nothing() {
    for transfer in [Transfer::Lend, Transfer::Share] {
        for wishes in 0..16 {
            let wishes = [0, 1, 2, 3].map(|bit| wishes >> bit & 1 != 0);
            let (seen, returned) = round(wishes, transfer);
            assert_eq!(seen, if wishes[0] { [0; 4] } else { *b"host" }, "{wishes:?}: at once");
            let cleared = wishes[1] || wishes[2] || wishes[3];
            assert_eq!(
                returned,
                if cleared { [0; 4] } else { SECRET },
                "{wishes:?}: on the way back"
            );
        }
    }
}

/// The known weak point: nobody asks, and the owner reads what the borrower had for itself.
#[test]
fn a_borrower_that_asks_for_nothing_is_read() {
    let (_, returned) = round([false; 4], Transfer::Lend);
    assert_eq!(returned, SECRET);
    let (_, returned) = round([true, false, false, false], Transfer::Lend);
    assert_eq!(returned, SECRET, "what was clean when it came is not when it goes");
}

#[test]
fn a_release_with_a_wish_clears_nothing_yet() {
    let full = Full::new();
    let handle = full.create(HOST, &lend(&[(A, 7), (B, 7)], &[(RAM, 1)])).unwrap();
    for vmid in [A, B] {
        full.accept(vmid, &take(handle, Transfer::Lend)).unwrap();
    }
    assert!(full.store(A, 0, &SECRET));
    full.release(A, handle, 1).unwrap();
    assert_eq!(full.load(B, 0), Some(SECRET), "the other has it still, as it is");
    full.release(B, handle, 0).unwrap();
    full.reclaim(HOST, handle, 0).unwrap();
    assert_eq!(full.load(HOST, RAM), Some([0; 4]));
}

#[test]
fn a_wish_outlives_the_accept_that_failed() {
    let full = Full::new();
    assert!(full.store(HOST, RAM, b"host"));
    let handle = full.create(HOST, &lend(&[(A, 7)], &[(RAM, 1)])).unwrap();
    let flags = accept::DONE | accept::SANITIZE;
    let bad = Accept { flags, sgl: sgl(&[(IMAGE_AT / PAGE, 1)]), ..take(handle, Transfer::Lend) };
    assert_eq!(full.accept(A, &bad), Err(RmError::NoResource));
    full.reclaim(HOST, handle, 0).unwrap();
    assert_eq!(full.load(HOST, RAM), Some([0; 4]));
}

#[test]
fn what_was_cleared_before_a_refusal_stays_so() {
    let full = Full::new();
    for gfn in [RAM, RAM + 8] {
        assert!(full.store(HOST, gfn, b"host"));
    }
    let create = with_flags(&lend(&[(A, 7)], &[(RAM, 1), (0x7000, 1), (RAM + 8, 1)]), SANITIZE);
    let before = full.picture();
    assert_eq!(full.create(HOST, &create), Err(RmError::MemInvalid));
    assert_eq!(before.difference(&full.picture()), None);
    assert_eq!(full.load(HOST, RAM), Some([0; 4]));
    assert_eq!(full.load(HOST, RAM + 8), Some(*b"host"), "which was not reached");
}

#[test]
fn a_reset_has_no_wish_of_its_own_but_images_are_cleared() {
    for (auth_wants, kept) in [(true, [0; 4]), (false, SECRET)] {
        let full = Full::new();
        let page = RAM + 0x40;
        let create = Create { label: 0, ..lend(&[(Vmid(0x85), 7)], &[(page, 1)]) };
        let handle = full.create(HOST, &create).unwrap();
        let image = Image { handle, ipa: IMAGE_AT, unsanitized: !auth_wants };
        full.gunyah.with(|World { hyp, rm, .. }| {
            rm.allocate(HOST, Vmid(0x85)).unwrap();
            rm.config_image(hyp, HOST, Vmid(0x85), 1, image).unwrap();
            rm.auth_image(HOST, Vmid(0x85), true).unwrap();
            rm.init_vm(hyp, HOST, Vmid(0x85)).unwrap();
            rm.start_vm(HOST, Vmid(0x85)).unwrap();
        });
        assert!(full.store(Vmid(0x85), IMAGE_AT / PAGE, &SECRET));
        full.reset(Vmid(0x85));
        full.reclaim(HOST, handle, 0).unwrap();
        assert_eq!(full.load(HOST, page), Some(kept));
    }
}

/// Also if the taker wants zeroes: the wish is for the way back, and there is none.
#[test]
fn a_gift_keeps_its_bytes() {
    for wish in [0, accept::SANITIZE] {
        let full = Full::with(NR_HEAP, Fate::Host);
        assert!(full.store(HOST, RAM, b"gift"));
        let handle = full.create(HOST, &donate(A, &[(RAM, 1)])).unwrap();
        let flags = accept::DONE | wish;
        full.accept(A, &Accept { flags, ..take(handle, Transfer::Donate) }).unwrap();
        assert_eq!(full.load(A, 0), Some(*b"gift"));
    }
}
