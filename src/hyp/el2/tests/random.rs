//! A host and guests that do anything, with any argument. EL2 answers, and the rules hold.

use super::*;
use crate::hyp::el2::hostile;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn hammer(profile: Profile, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let bytes: Vec<u8> = (0..4000).map(|_| random.next().to_le_bytes()[4]).collect();
    let answers = hostile::run(profile, &bytes, None).expect("all is well");
    let nr = |of: fn(&str) -> bool| -> u64 {
        answers.iter().filter(|(what, _)| of(what)).map(|(_, nr)| nr).sum()
    };
    let (nr_done, nr_all) = (nr(|what| what.ends_with(" Ok")), nr(|_| true));
    println!("{nr_done} of {nr_all} done: {answers:#?}");
    assert!(nr_all > 200 && nr_done > nr_all / 20 && nr_done < nr_all);
}

#[test]
pub(super) fn mainline_stands_anything() {
    (1..3).for_each(|seed| hammer(Profile::Mainline72, seed));
}

#[test]
pub(super) fn android_stands_anything() {
    hammer(Profile::Android618, 11);
}

#[test]
pub(super) fn huge_pages_stand_anything() {
    hammer(Profile::HugeProtected, 21);
}

#[test]
pub(super) fn a_call_that_does_not_exist_is_said_not_to() {
    let world = World::new();
    let mut random = Random(77);
    for nth in 0..2000 {
        let id = match nth % 2 {
            0 => random.next() >> (nth % 64),
            _ => 0xc600_0000 + 23 + random.next() % (1 << 20),
        };
        let known = HostCall::ALL.iter().any(|call| call.id() == id & !(1 << 16));
        let answer = world.el2.host_call(0, [id, 1, 2, 3, 4]);
        assert!(known || answer == [u64::MAX, 1], "{id:#x}: {answer:x?}");
    }
    // Mainline splits nothing.
    let split = [HostCall::SplitGuest.id(), 0, 1, 0, 0];
    assert_eq!(world.el2.host_call(0, split), [u64::MAX, 0]);
}
