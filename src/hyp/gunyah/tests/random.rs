//! Calls with any registers on blocks, and with a heap that is short: somebody answers, and the rules hold.

use super::super::hostile::ODD;
use super::*;
use crate::hyp::choices::Choices;

/// One call after the other, mostly with what there is, over a few extents and address spaces. Every one of them
/// is compared with the specification.
fn hammer(seed: u64, nr_heap: u64, bbm: BbmLevel) -> std::collections::BTreeMap<String, u64> {
    let bytes = bytes(seed, 5000);
    let choices = &mut Choices::new(&bytes, &ODD);
    let mut bare = Bare::of(machine_of(SMALL, nr_heap), bbm);
    let root = bare.extent(0, 0x1_0000, SPARSE);
    bare.give(bare.partition, root, 0, RAM, 0x300).unwrap();
    let mut caps = vec![root, bare.partition];
    caps.extend([
        bare.derive(root, RAM, 0x300, SPARSE),
        bare.derive(root, RAM, 0x200, 6 | 1 << 16),
    ]);
    let spaces: Vec<_> = (0..3).map(|_| bare.aspace()).collect();
    let mut answers = std::collections::BTreeMap::new();
    for _ in 0..300 {
        let cap = |choices: &mut Choices<'_>, all: &[u64]| match choices.one_in(20) {
            true => choices.odd(),
            false => choices.of(all),
        };
        let (extent, other, space) =
            (cap(choices, &caps), cap(choices, &caps), cap(choices, &spaces));
        let pages = choices.of(&[0, 1, 3, 0x1ff, 0x200, RAM, RAM + 4, RAM + 0x1fe]);
        let offset = if choices.one_in(24) { choices.odd() } else { pages * PAGE };
        let nr = choices.of(&[1, 1, 2, 4, 0x200, 0x201]);
        let size = if choices.one_in(24) { choices.odd() } else { nr * PAGE };
        let at = match choices.below(12) {
            0 => choices.odd(),
            _ => choices.of(&[0x4000, 0x4001, 0x4200, 0x3fff]) * PAGE,
        };
        let attrs = choices.of(&[0xf_0077, 0xf_0066, 0xf_0044, 0x5_0066, 0x1_0066]);
        let (number, x) = match choices.below(16) {
            0..=3 => (ASPACE_MAP, [space, extent, at, attrs, PARTIAL, offset, size]),
            4 => (ASPACE_MAP, [space, extent, at, attrs, 0, 0, 0]),
            5 | 6 => (ASPACE_UNMAP, [space, extent, at, PARTIAL, offset, size, 0]),
            7..=11 => {
                let how = choices.below(3);
                let (from, to) = match how {
                    _ if choices.one_in(4) => (extent, other),
                    0 => (root, choices.of(&caps[2..])),
                    1 => (choices.of(&caps[2..]), root),
                    _ => (choices.of(&caps[2..]), choices.of(&caps[2..])),
                };
                (EXTENT_DONATE, [how, from, to, offset, size, 0, 0])
            }
            12 => (ASPACE_UPDATE_ACCESS, [space, extent, at, 0x44, 0, 0, 0]),
            13 => {
                let flags = choices.of(&[0, 1 | NO_SYNC, 2 | NO_SYNC, 255]);
                (EXTENT_MODIFY, [extent, flags, offset, size, 0, 0, 0])
            }
            14 => {
                let attrs = choices.of(&[BASIC, SPARSE, 4, 6 | 1 << 16, 7 | 2 << 8]);
                (EXTENT_DERIVE, [extent, offset, size, attrs, 0, 0, 0])
            }
            _ => (ASPACE_LOOKUP, [space, extent, at, size, 0, 0, 0]),
        };
        let before = choices.one_in(8).then(|| bare.picture());
        let answer = bare.call(number, &x);
        if let (Some(before), Err(_)) = (before, &answer) {
            assert!(bare.picture() == before, "{number:#x} {x:x?}");
        }
        match &answer {
            Ok([new, ..]) if number == EXTENT_DERIVE && caps.len() < 8 => caps.push(*new),
            Ok([new, ..]) if number == EXTENT_DERIVE => {
                let id = bare.extent_id(*new);
                if bare.hyp.delete_extent(id).is_ok() {
                    bare.caps.remove(CapId(*new)).unwrap();
                }
            }
            _ => {}
        }
        let how = answer.err().map_or("Ok".into(), |error| error.to_string());
        *answers.entry(format!("{number:#x} {how}")).or_insert(0) += 1;
        bare.sound();
    }
    answers
}

#[test]
fn calls_with_any_registers_are_answered() {
    let mut all = std::collections::BTreeMap::new();
    for (seed, nr_heap, bbm) in [
        (1, 0x80, BbmLevel::Zero),
        (2, 14, BbmLevel::Two),
        (3, 12, BbmLevel::One),
        (4, 0x80, BbmLevel::Zero),
    ] {
        for (how, nr) in hammer(seed, nr_heap, bbm) {
            *all.entry(how).or_insert(0) += nr;
        }
    }
    println!("{all:#?}");
    for call in [ASPACE_MAP, ASPACE_UNMAP, EXTENT_DONATE, EXTENT_DERIVE, EXTENT_MODIFY] {
        assert!(all.contains_key(&format!("{call:#x} Ok")), "{call:#x} never succeeded");
    }
    let no_memory = HypError::NoMem.register().to_string();
    assert!(
        all.keys().any(|how| how.ends_with(&format!(" {no_memory}"))),
        "memory was never short"
    );
}
