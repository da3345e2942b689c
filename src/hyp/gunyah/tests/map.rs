//! What is mapped where, block by block.

use super::*;
use crate::stage2::Level;

fn owning(bbm: BbmLevel) -> (Bare, u64, u64) {
    let mut bare = Bare::with(NR_HEAP, bbm);
    let extent = bare.extent(RAM, NR_RAM, SPARSE);
    bare.give(bare.partition, extent, 0, 0, NR_RAM).unwrap();
    let aspace = bare.aspace();
    (bare, extent, aspace)
}

fn map(bare: &mut Bare, extent: u64, aspace: u64, gfn: u64, offset: u64, nr: u64, attrs: MapAttrs) {
    let x = [aspace, extent, gfn * PAGE, attrs.encode(), PARTIAL, offset * PAGE, nr * PAGE];
    bare.call(ASPACE_MAP, &x).unwrap();
}

/// Each level of privilege has its own right to execute, in what is recorded, in the descriptor and in the answer.
#[test]
fn user_and_kernel_execute_apart() {
    let (mut bare, extent, aspace) = owning(BbmLevel::Zero);
    let access = |user, kernel| MapAttrs { user, kernel, kind: MapType::CACHED };
    let all =
        [Access::RX, Access::R].map(|user| [Access::RX, Access::R].map(|kernel| (user, kernel)));
    for (nth, (user, kernel)) in (0..).zip(all.concat()) {
        let attrs = access(user, kernel);
        map(&mut bare, extent, aspace, 0x4000 + nth, nth, 1, attrs);
        let space = &bare.hyp.aspaces[&bare.aspace_id(aspace)];
        let (_, leaf) = space.tree.translate(Gfn::new(0x4000 + nth)).unwrap();
        let executes = [user, kernel].map(|level| level == Access::RX);
        assert_eq!(leaf.prot.executes_at(), executes);
        let look = [aspace, extent, (0x4000 + nth) * PAGE, PAGE];
        assert_eq!(bare.call(ASPACE_LOOKUP, &look).unwrap()[2], attrs.encode());
    }
    // What differs in that is not one piece.
    let look = [aspace, extent, 0x4000 * PAGE, 4 * PAGE];
    assert_eq!(bare.call(ASPACE_LOOKUP, &look).unwrap()[1], PAGE);
    // No more than the extent has, at either level; and a change of one level alone.
    let reads = bare.derive(extent, 0x10, 1, 5);
    bare.refused(ASPACE_MAP, &[aspace, reads, 0, 0xf_0076], HypError::ArgumentInvalid);
    bare.refused(ASPACE_MAP, &[aspace, reads, 0, 0xf_0067], HypError::ArgumentInvalid);
    let basic = bare.derive(extent, 0x20, 1, 7);
    bare.call(ASPACE_MAP, &[aspace, basic, 0x5000 * PAGE, 0xf_0077]).unwrap();
    bare.call(ASPACE_UPDATE_ACCESS, &[aspace, basic, 0x5000 * PAGE, 0x67]).unwrap();
    let space = &bare.hyp.aspaces[&bare.aspace_id(aspace)];
    let (_, leaf) = space.tree.translate(Gfn::new(0x5000)).unwrap();
    assert_eq!(leaf.prot.executes_at(), [true, false]);
    bare.sound();
}

fn level(bare: &Bare, aspace: u64, gfn: u64) -> Option<Level> {
    let space = &bare.hyp.aspaces[&bare.aspace_id(aspace)];
    space.tree.leaf(Gfn::new(gfn)).map(|(level, _)| level)
}

#[test]
fn the_largest_block_that_fits() {
    let (mut bare, extent, aspace) = owning(BbmLevel::Zero);
    map(&mut bare, extent, aspace, 0x4000 - 3, 0x200 - 3, 0x206, RW);
    assert_eq!(level(&bare, aspace, 0x4000 - 1), Some(Level::PAGE));
    assert_eq!(level(&bare, aspace, 0x4000), Some(Level::BLOCK_2M));
    assert_eq!(level(&bare, aspace, 0x4202), Some(Level::PAGE));
    assert_eq!(level(&bare, aspace, 0x4203), None);
    // Where the offsets do not agree there are no blocks.
    map(&mut bare, extent, aspace, 0x8001, 0, 0x200, RW);
    assert_eq!(level(&bare, aspace, 0x8100), Some(Level::PAGE));
    bare.sound();
}

#[test]
fn a_block_is_split_without_loss_by_what_the_cpu_stands_and_never_merged() {
    for (bbm, breaks) in [(BbmLevel::Zero, 1), (BbmLevel::One, 1), (BbmLevel::Two, 1)] {
        let (mut bare, extent, aspace) = owning(bbm);
        map(&mut bare, extent, aspace, 0x4000, 0, 0x200, RW);
        let x = [aspace, extent, 0x4007 * PAGE, PARTIAL, 7 * PAGE, PAGE];
        let nr = bare.hyp.aspaces[&bare.aspace_id(aspace)].nr_invalidations;
        bare.call(ASPACE_UNMAP, &x).unwrap();
        let now = bare.hyp.aspaces[&bare.aspace_id(aspace)].nr_invalidations;
        assert_eq!(now - nr, breaks + 1, "the block's, and the page's");
        for gfn in 0x4000..0x4200 {
            let expected = (gfn != 0x4007).then_some(RAM + gfn - 0x4000);
            assert_eq!(bare.at(aspace, gfn), expected);
        }
        map(&mut bare, extent, aspace, 0x4007, 7, 1, RW);
        assert_eq!(level(&bare, aspace, 0x4000), Some(Level::PAGE), "never merged");
        // Other rights for a part split as well, and for the same nothing happens.
        map(&mut bare, extent, aspace, 0x4200, 0x200, 0x200, RW);
        map(&mut bare, extent, aspace, 0x4300, 0x300, 2, RW);
        assert_eq!(level(&bare, aspace, 0x4300), Some(Level::BLOCK_2M));
        map(&mut bare, extent, aspace, 0x4300, 0x300, 2, R);
        assert_eq!(bare.rights_at(aspace, 0x4301), Some(Access::R));
        assert_eq!(bare.rights_at(aspace, 0x4302), Some(Access::RW));
        bare.sound();
    }
}

#[test]
fn what_is_mapped_is_overwritten_and_only_what_leads_there_is_unmapped() {
    let (mut bare, extent, aspace) = owning(BbmLevel::Zero);
    map(&mut bare, extent, aspace, 0x4000, 0, 0x200, RW);
    map(&mut bare, extent, aspace, 0x4010, 0x400, 4, R);
    assert_eq!(bare.at(aspace, 0x4011), Some(RAM + 0x401));
    bare.call(ASPACE_UNMAP, &[aspace, extent, 0x4000 * PAGE, PARTIAL, 0, 0x200 * PAGE]).unwrap();
    assert_eq!(bare.at(aspace, 0x400f), None);
    assert_eq!(bare.at(aspace, 0x4010), Some(RAM + 0x400), "it leads elsewhere, so it stays");
    bare.sound();
}

#[test]
fn four_spaces_and_no_more() {
    let (mut bare, extent, first) = owning(BbmLevel::Zero);
    let basic = bare.derive(extent, 0x400, 2, BASIC);
    let spaces: Vec<_> = std::iter::once(first).chain((0..4).map(|_| bare.aspace())).collect();
    for &aspace in &spaces[..4] {
        map(&mut bare, extent, aspace, 0x4000, 0, 4, RW);
        map(&mut bare, extent, aspace, 0x5000, 0x10, 4, RW);
        bare.call(ASPACE_MAP, &[aspace, basic, 0, RW.encode()]).unwrap();
    }
    let full = HypError::MappingsFull;
    let x = [spaces[4], extent, 0x4000 * PAGE, RW.encode(), PARTIAL, 0, PAGE];
    bare.refused(ASPACE_MAP, &x, full);
    bare.refused(ASPACE_MAP, &[spaces[4], basic, 0, RW.encode()], full);
    // The same frame twice in one space takes another place, too.
    let x = [first, extent, 0x6000 * PAGE, RW.encode(), PARTIAL, 0, PAGE];
    bare.refused(ASPACE_MAP, &x, full);
    // A place is free when nothing of it is left.
    for gfn in [0x4000_u64, 0x5000] {
        let offset = if gfn == 0x4000 { 0 } else { 0x10 };
        let x = [spaces[3], extent, gfn * PAGE, PARTIAL, offset * PAGE, 4 * PAGE];
        bare.call(ASPACE_UNMAP, &x).unwrap();
    }
    map(&mut bare, extent, first, 0x6000, 0, 1, RW);
    assert_eq!([0x4000, 0x6000].map(|gfn| bare.at(first, gfn)), [Some(RAM); 2]);
    bare.call(EXTENT_MODIFY, &[extent, 0]).unwrap();
    assert!(spaces.iter().all(|&aspace| bare.at(aspace, 0x4000).is_none()));
    bare.sound();
}

#[test]
fn a_space_that_goes_gives_its_tables_back() {
    let (mut bare, extent, aspace) = owning(BbmLevel::Zero);
    let free = bare.hyp.heap.free.len();
    let other = bare.aspace();
    map(&mut bare, extent, other, 0x4001, 0, 0x300, RW);
    map(&mut bare, extent, aspace, 0x4000, 0, 0x200, RW);
    let id = bare.aspace_id(other);
    bare.hyp.delete_aspace(id);
    let of_first = bare.hyp.aspaces[&bare.aspace_id(aspace)].tree.nr_tables();
    assert_eq!(bare.hyp.heap.free.len(), free + 1 - of_first);
    bare.sound();
}

#[test]
fn without_memory_for_tables_nothing_is_half_done() {
    for nr_heap in 1..9 {
        let mut bare = Bare::with(nr_heap, BbmLevel::Zero);
        let extent = bare.extent(RAM, NR_RAM, SPARSE);
        bare.give(bare.partition, extent, 0, 0, NR_RAM).unwrap();
        let aspace = bare.aspace();
        let before = bare.picture();
        let x = [aspace, extent, (0x40_0000 - 0x180) * PAGE, RW.encode(), PARTIAL, 0, 0x500 * PAGE];
        let answer = bare.call(ASPACE_MAP, &x);
        // The root, one table below it, two below that, and three of pages.
        assert_eq!(answer.is_ok(), nr_heap >= 7, "{nr_heap}");
        if answer.is_err() {
            assert_eq!(answer, Err(HypError::NoMem.register()));
            assert!(bare.picture() == before);
            assert_eq!(bare.hyp.heap.free.len() as u64, nr_heap - 1);
        }
        bare.sound();
    }
}

#[test]
fn zeroes_reach_what_the_extent_has_and_no_more() {
    let (mut bare, extent, _) = owning(BbmLevel::Zero);
    let child = bare.derive(extent, 0, NR_RAM, SPARSE);
    bare.give(extent, child, 0, 1, 1).unwrap();
    let at = |nth: u64| Pa::new((RAM + nth) * PAGE);
    for nth in 0..3 {
        bare.hyp.machine.write(at(nth), b"kept").unwrap();
    }
    bare.call(EXTENT_MODIFY, &[extent, 1 | NO_SYNC, 0, 2 * PAGE]).unwrap();
    let read = |bare: &Bare, nth| {
        let mut buf = [0; 4];
        bare.hyp.machine.read(at(nth), &mut buf).unwrap();
        buf
    };
    assert_eq!([0, 1, 2].map(|nth| read(&bare, nth)), [[0; 4], *b"kept", *b"kept"]);
    for op in [2, 3] {
        bare.call(EXTENT_MODIFY, &[extent, op | NO_SYNC, 0, NR_RAM * PAGE]).unwrap();
    }
    assert_eq!(read(&bare, 2), *b"kept");
    assert_eq!(bare.hyp.nr_zeroed, 1);
}
