//! Memory changes hands, and mappings follow.

use super::*;

/// A root, two children with mappings of the same frames in spaces of their own, and one that both are in.
struct Family {
    bare: Bare,
    root: u64,
    a: u64,
    b: u64,
    spaces: [u64; 3],
}

const ALL: u64 = NR_RAM * PAGE;

fn family(nr_heap: u64) -> Family {
    let mut bare = Bare::with(nr_heap, BbmLevel::Zero);
    let root = bare.extent(0, 0x1_0000, SPARSE);
    bare.give(bare.partition, root, 0, RAM, NR_RAM).unwrap();
    let [a, b] = [(); 2].map(|()| bare.derive(root, RAM, NR_RAM, SPARSE));
    let spaces = [(); 3].map(|()| bare.aspace());
    bare.call(ASPACE_MAP, &[spaces[0], a, 0x4000 * PAGE, RW.encode()]).unwrap();
    bare.call(ASPACE_MAP, &[spaces[1], b, 0x5000 * PAGE, R.encode()]).unwrap();
    // Both in one: at the same addresses with other rights.
    bare.call(ASPACE_MAP, &[spaces[2], a, 0x6000 * PAGE, RW.encode()]).unwrap();
    bare.call(ASPACE_MAP, &[spaces[2], b, 0x6000 * PAGE, R.encode()]).unwrap();
    Family { bare, root, a, b, spaces }
}

#[test]
fn records_take_effect_when_memory_comes() {
    let Family { mut bare, root, a, b, spaces: [in_a, in_b, both] } = family(NR_HEAP);
    assert_eq!([in_a, in_b, both].map(|space| bare.at(space, 0x4000)), [None; 3]);
    bare.give(root, a, 0, 0, 0x400).unwrap();
    let look = |bare: &Bare, nth: u64| {
        (
            bare.at(in_a, 0x4000 + nth),
            bare.at(in_b, 0x5000 + nth),
            bare.rights_at(both, 0x6000 + nth),
        )
    };
    assert_eq!(look(&bare, 0x3ff), (Some(RAM + 0x3ff), None, Some(Access::RW)));
    assert_eq!(look(&bare, 0x400), (None, None, None));
    // Two pages and a part of the next block go to the sibling.
    bare.give(a, b, 2, 0x1fe, 0x10).unwrap();
    assert_eq!(look(&bare, 0x1fd), (Some(RAM + 0x1fd), None, Some(Access::RW)));
    assert_eq!(look(&bare, 0x1fe), (None, Some(RAM + 0x1fe), Some(Access::R)));
    assert_eq!(look(&bare, 0x20e), (Some(RAM + 0x20e), None, Some(Access::RW)));
    // And back by way of their parent, which maps nothing.
    bare.give(b, root, 1, 0x1fe, 0x10).unwrap();
    assert_eq!(look(&bare, 0x1fe), (None, None, None));
    bare.give(root, a, 0, 0x1fe, 0x10).unwrap();
    assert_eq!(look(&bare, 0x1fe), (Some(RAM + 0x1fe), None, Some(Access::RW)));
    bare.give(a, root, 1, 0, 0x400).unwrap();
    assert_eq!(look(&bare, 0), (None, None, None));
    bare.give(root, bare.partition, 1, RAM, NR_RAM).unwrap();
    assert_eq!(bare.owner(RAM), Owner::Partition);
    bare.sound();
}

#[test]
fn a_donation_that_lacks_tables_has_not_happened() {
    let mut answers = [0; 2];
    for nr_heap in 10..40 {
        let Family { mut bare, root, a, b, spaces } = family(nr_heap);
        if bare.give(root, a, 0, 0, 0x600).is_err() {
            continue;
        }
        for part in [(1, 0x203), (0x1ff, 2), (0x3f0, 0x100)] {
            let before = bare.picture();
            let free = bare.hyp.heap.free.len();
            let answer = bare.give(a, b, 2, part.0, part.1);
            answers[usize::from(answer.is_ok())] += 1;
            if let Err(error) = answer {
                assert_eq!(error, HypError::NoMem.register());
                assert!(bare.picture() == before, "{nr_heap} {part:x?}");
                assert!(bare.hyp.heap.free.len() <= free, "a block that was split stays so");
            } else {
                bare.give(b, a, 2, part.0, part.1).unwrap();
            }
            bare.sound();
        }
        assert!(spaces.iter().all(|&space| bare.rights_at(space, 0).is_none()));
    }
    assert!(answers.iter().all(|&nr| nr > 5), "{answers:?}");
}

#[test]
fn a_child_has_no_more_than_its_parent() {
    let mut bare = Bare::new();
    let root = bare.extent(RAM, NR_RAM, BASIC);
    let space = bare.aspace();
    bare.call(ASPACE_MAP, &[space, root, 0x4000 * PAGE, 0xf_0067]).unwrap();
    // What is basic passes its memory on at once, mappings and all, with the child's rights.
    let reads = bare.derive(root, 0x10, 4, 5);
    assert_eq!(bare.owner(RAM + 0x10), Owner::Extent(bare.extent_id(reads)));
    assert_eq!(bare.rights_at(space, 0x4010), Some(Access::RX));
    assert_eq!(bare.rights_at(space, 0x400f), Some(Access::RWX));
    let found = bare.call(ASPACE_LOOKUP, &[space, reads, 0x4010 * PAGE, 4 * PAGE]);
    assert_eq!(found, Ok([0, 4 * PAGE, 0xf_0045]));
    // Changing the parent's rights does not touch what is the child's by now.
    bare.call(ASPACE_UPDATE_ACCESS, &[space, root, 0x4000 * PAGE, 0x44]).unwrap();
    assert_eq!(bare.rights_at(space, 0x4010), Some(Access::RX));
    assert_eq!(bare.rights_at(space, 0x4014), Some(Access::R));
    let sparse = bare.derive(root, 0x20, 4, SPARSE);
    assert_eq!(bare.owner(RAM + 0x20), Owner::Extent(bare.extent_id(sparse)));
    // Gone, and its memory is the parent's, as the parent maps it.
    let (reads, sparse) = (bare.extent_id(reads), bare.extent_id(sparse));
    bare.hyp.delete_extent(reads).unwrap();
    assert_eq!(bare.rights_at(space, 0x4010), Some(Access::R));
    bare.hyp.delete_extent(sparse).unwrap();
    let root = bare.extent_id(root);
    bare.hyp.delete_extent(root).unwrap();
    assert_eq!((bare.owner(RAM), bare.at(space, 0x4000)), (Owner::Partition, None));
    bare.sound();
}

#[test]
fn a_basic_child_wants_all_of_it_mapped_or_nothing() {
    let Family { mut bare, root, a, .. } = family(NR_HEAP);
    bare.give(root, a, 0, 0, 0x400).unwrap();
    let space = bare.aspace();
    let x = [space, a, 0x9000 * PAGE, RW.encode(), PARTIAL, 0x10 * PAGE, PAGE];
    bare.call(ASPACE_MAP, &x).unwrap();
    bare.refused(EXTENT_DERIVE, &[a, 0xf * PAGE, 2 * PAGE, BASIC], HypError::Denied);
    bare.derive(a, 0x10, 1, BASIC);
    bare.derive(a, 0x20, 4, BASIC);
    assert_eq!(bare.at(space, 0x9000), Some(RAM + 0x10));
    bare.sound();
}

#[test]
fn who_is_given_up_waits_for_its_children() {
    let Family { mut bare, root, a, b, .. } = family(NR_HEAP);
    bare.give(root, a, 0, 0, 8).unwrap();
    let child = bare.derive(a, 0, 8, SPARSE);
    bare.give(a, child, 0, 0, 4).unwrap();
    let [root, a, b, child] = [root, a, b, child].map(|cap| bare.extent_id(cap));
    bare.hyp.delete_extent(a).unwrap();
    assert_eq!(bare.owner(RAM), Owner::Extent(child));
    assert_eq!(bare.owner(RAM + 4), Owner::Extent(a), "it is there until its child is not");
    bare.hyp.delete_extent(child).unwrap();
    assert_eq!([RAM, RAM + 4].map(|pfn| bare.owner(pfn)), [Owner::Extent(root); 2]);
    assert!(!bare.hyp.extents.contains_key(&a));
    assert_eq!(bare.hyp.delete_extent(a), Err(HypError::Failure));
    bare.hyp.delete_extent(b).unwrap();
    bare.hyp.delete_extent(root).unwrap();
    assert_eq!(bare.owner(RAM + 4), Owner::Partition);
    bare.sound();
}

#[test]
fn a_devices_extent_begins_with_all_of_it() {
    let mut bare = Bare::new();
    let id = bare.hyp.create_extent(DEVICE * PAGE, NR_DEVICE * PAGE, 6 | 1 << 8 | 1 << 16, true);
    let id = id.unwrap();
    assert_eq!(bare.owner(DEVICE), Owner::Extent(id));
    let again = bare.hyp.create_extent(DEVICE * PAGE, PAGE, 6 | 1 << 8 | 1 << 16, true);
    assert_eq!(again, Err(HypError::NotOwner));
    let space = bare.hyp.create_aspace().unwrap();
    let cached = bare.hyp.map(id, space, 0, RW);
    assert_eq!(cached, Err(HypError::ArgumentInvalid), "a device's registers are not cached");
    bare.hyp.map(id, space, 0, MapAttrs::new(Access::RW, MapType::DEVICE)).unwrap();
    let uncached = MapAttrs::new(Access::RW, MapType::UNCACHED);
    assert_eq!(bare.hyp.map(id, space, 0, uncached), Err(HypError::ArgumentInvalid));
    assert_eq!(
        bare.hyp.records(space, Gfn::new(0), Pfn::new(DEVICE)).unwrap().kind,
        MapType::DEVICE
    );
    let _ = (ALL, RWX);
    bare.sound();
}
