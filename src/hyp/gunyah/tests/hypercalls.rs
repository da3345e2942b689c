//! Each call's errors, in the order of its checks.

use super::HypError::*;
use super::*;

/// A root extent with all memory, a child with two blocks, and an address space.
struct Scene {
    bare: Bare,
    root: u64,
    child: u64,
    aspace: u64,
}

fn scene() -> Scene {
    let mut bare = Bare::new();
    let root = bare.extent(0, 0x1_0000, SPARSE);
    bare.give(bare.partition, root, 0, RAM, NR_RAM).unwrap();
    let child = bare.derive(root, RAM, NR_RAM, SPARSE);
    bare.give(root, child, 0, 0, 0x400).unwrap();
    let aspace = bare.aspace();
    Scene { bare, root, child, aspace }
}

const HIGH: u64 = 1 << 63;

#[test]
fn numbers_that_are_no_call() {
    let Scene { mut bare, .. } = scene();
    for number in [0, 1, 0x602a, 0x602e, 0x6034, 0x605b, 0x6061, HIGH, u64::MAX] {
        bare.refused(number, &[0; 7], Unimplemented);
    }
    assert_eq!(Unimplemented.register(), u64::MAX);
}

#[test]
fn capabilities_come_first_and_in_order() {
    let Scene { mut bare, child, aspace, root } = scene();
    let no_map = bare.with_rights(child, !1);
    let no_as = bare.with_rights(aspace, !2);
    let (map, unmap) = (ASPACE_MAP, ASPACE_UNMAP);
    bare.refused(map, &[0, 0, 1, 0xf_0077], CapNull);
    bare.refused(map, &[child, 0, 1, 0xf_0077], WrongObjectType);
    bare.refused(map, &[no_as, 0, 1, 0xf_0077], InsufficientRights);
    bare.refused(map, &[aspace, 0, 1, 0xf_0077], CapNull);
    bare.refused(map, &[aspace, aspace, 1, 0xf_0077], WrongObjectType);
    bare.refused(map, &[aspace, no_map, 1, 0xf_0077], InsufficientRights);
    bare.refused(unmap, &[aspace, no_map, 1], InsufficientRights);
    bare.refused(ASPACE_UPDATE_ACCESS, &[aspace, no_map, 1, 0x77], InsufficientRights);
    bare.refused(EXTENT_MODIFY, &[no_map, 0], InsufficientRights);
    let [no_derive, no_lookup, no_donate] =
        [!2, !8, !16].map(|rights| bare.with_rights(child, rights));
    bare.refused(EXTENT_DERIVE, &[no_derive, 0, PAGE, SPARSE], InsufficientRights);
    bare.refused(ASPACE_LOOKUP, &[aspace, no_lookup, 0, PAGE], InsufficientRights);
    let no_as_lookup = bare.with_rights(aspace, !4);
    bare.refused(ASPACE_LOOKUP, &[no_as_lookup, no_lookup, 0, PAGE], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[0, root, no_donate, 0, PAGE], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[1, no_donate, root, 0, PAGE], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[2, no_donate, child, 0, PAGE], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[2, child, no_donate, 0, PAGE], InsufficientRights);
    let poor = bare.with_rights(bare.partition, 0);
    bare.refused(EXTENT_CONFIGURE, &[poor, 0, 0, 0], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[0, poor, root, RAM * PAGE, PAGE], InsufficientRights);
    bare.refused(EXTENT_DONATE, &[0, child, root, RAM * PAGE, PAGE], WrongObjectType);
}

#[test]
fn map_checks_in_this_order() {
    let Scene { mut bare, child, aspace, .. } = scene();
    let call = ASPACE_MAP;
    // All of it: bits that mean nothing, alignment, rights.
    for attrs in [1 << 3, 1 << 7, 1 << 8, 1 << 24, HIGH] {
        bare.refused(call, &[0, 0, 1, attrs], ArgumentInvalid);
    }
    for flags in [2, 1 << 30, 1 << 32] {
        bare.refused(call, &[0, 0, 1, 0xf_0077, flags], ArgumentInvalid);
    }
    let wrong_kind = 0x4_0077;
    bare.refused(call, &[aspace, child, 1, wrong_kind], ArgumentAlignment);
    bare.refused(call, &[aspace, child, 0, wrong_kind], ArgumentInvalid);
    bare.refused(call, &[aspace, child, 1 << 48, 0xf_0077], AddrInvalid);
    bare.refused(call, &[aspace, child, !0xfff, 0xf_0077], AddrInvalid);
    // Part of it.
    let part = |va: u64, attrs: u64, offset: u64, size: u64| {
        [aspace, child, va, attrs, PARTIAL, offset, size]
    };
    for (va, offset, size) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
        bare.refused(call, &part(va, wrong_kind, offset, size), ArgumentAlignment);
    }
    let all = NR_RAM * PAGE;
    for (va, offset, size) in [
        (0, 0, 0),
        (0, !0xfff, 2 * PAGE),
        (!0xfff, 0, 2 * PAGE),
        (0, 0, all + PAGE),
        (0, all, PAGE),
        (0, HIGH, PAGE),
    ] {
        bare.refused(call, &part(va, wrong_kind, offset, size), ArgumentSize);
    }
    bare.refused(call, &part(0, wrong_kind, 0, PAGE), ArgumentInvalid);
    bare.refused(call, &part((1 << 48) - PAGE, 0xf_0077, 0, 2 * PAGE), AddrInvalid);
    let basic = bare.derive(child, 0, 4, BASIC);
    bare.refused(call, &[aspace, basic, 0, 0xf_0077, PARTIAL, 0, PAGE], ExtentType);
    bare.refused(call, &[aspace, basic, !0xfff, 0xf_0077], AddrOverflow);
    bare.refused(call, &[aspace, basic, 1 << 48, 0xf_0077], AddrInvalid);
    // Less than the extent may not be more.
    let reads = bare.derive(child, 8, 4, 4 | 1 << 16);
    bare.refused(call, &[aspace, reads, 0, 0xf_0064], ArgumentInvalid);
    bare.refused(call, &[aspace, reads, 0, 0xf_0046], ArgumentInvalid);
    bare.call(call, &[aspace, reads, 0, 0xf_0044]).unwrap();
    // A space whose tables others keep.
    let id = bare.aspace_id(aspace);
    bare.hyp.aspaces.get_mut(&id).unwrap().read_only = true;
    bare.refused(call, &part(0, wrong_kind, 0, PAGE), ArgumentInvalid);
    bare.refused(call, &part(1 << 48, 0xf_0077, 0, PAGE), Denied);
    bare.refused(call, &[aspace, child, 1 << 48, 0xf_0077], Denied);
    bare.refused(ASPACE_UNMAP, &[aspace, child, 0], Denied);
    bare.refused(ASPACE_UNMAP, &[aspace, child, 0, PARTIAL, 0, PAGE], Denied);
    bare.refused(ASPACE_UPDATE_ACCESS, &[aspace, child, 0, 0x44], Denied);
    bare.sound();
}

#[test]
fn unmap_and_update_check_in_this_order() {
    let Scene { mut bare, child, aspace, .. } = scene();
    let basic = bare.derive(child, 0, 4, BASIC);
    bare.call(ASPACE_MAP, &[aspace, child, 0x80_0000, 0xf_0077]).unwrap();
    bare.call(ASPACE_MAP, &[aspace, basic, 0x10_0000, 0xf_0077]).unwrap();
    let (unmap, update) = (ASPACE_UNMAP, ASPACE_UPDATE_ACCESS);
    bare.refused(unmap, &[0, 0, 0, 2], ArgumentInvalid);
    bare.refused(unmap, &[aspace, child, 1], ArgumentAlignment);
    bare.refused(unmap, &[aspace, child, 0x10_0000], AddrInvalid);
    bare.refused(unmap, &[aspace, basic, 0x80_0000], AddrInvalid);
    bare.refused(unmap, &[aspace, child, !0xfff], AddrInvalid);
    bare.refused(unmap, &[aspace, child, 1, PARTIAL, 0, 0], ArgumentAlignment);
    bare.refused(unmap, &[aspace, child, 0, PARTIAL, 0, 0], ArgumentSize);
    bare.refused(unmap, &[aspace, basic, 0, PARTIAL, 0, PAGE], ExtentType);
    bare.refused(unmap, &[aspace, child, 0x80_1000, PARTIAL, 0, PAGE], AddrInvalid);
    bare.refused(unmap, &[aspace, child, 0x80_0000, PARTIAL, 0, (NR_RAM + 1) * PAGE], ArgumentSize);
    bare.call(unmap, &[aspace, child, 0x80_1000, PARTIAL, PAGE, PAGE]).unwrap();
    bare.refused(unmap, &[aspace, child, 0x80_0000], AddrInvalid);

    let reads = bare.derive(child, 8, 4, 4);
    bare.refused(update, &[aspace, reads, 1, 0x1_0044], ArgumentInvalid);
    bare.refused(update, &[aspace, reads, 1, 0x46], ArgumentInvalid);
    bare.refused(update, &[aspace, reads, 1, 0x44], ArgumentAlignment);
    bare.refused(update, &[aspace, reads, 0, 0x44], AddrInvalid);
    // The original never finds a sparse mapping here.
    bare.refused(update, &[aspace, child, 0x80_0000, 0x44], AddrInvalid);
    bare.refused(update, &[aspace, child, 0x80_0000, 0x44, PARTIAL, 0, 1], ArgumentAlignment);
    bare.refused(update, &[aspace, child, 0x80_0000, 0x44, PARTIAL, 0, 0], ArgumentSize);
    bare.refused(update, &[aspace, child, 0x80_0000, 0x44, PARTIAL, 0, PAGE], AddrInvalid);
    bare.refused(update, &[aspace, basic, 0x10_0000, 0x44, PARTIAL, 0, PAGE], ExtentType);
    bare.call(update, &[aspace, basic, 0x10_0000, 0x44]).unwrap();
    assert_eq!(bare.rights_at(aspace, 0x103), Some(Access::R));
    bare.call(unmap, &[aspace, basic, 0x10_0000]).unwrap();
    assert_eq!(bare.at(aspace, 0x103), None);
    bare.sound();
}

#[test]
fn making_extents_checks_in_this_order() {
    let Scene { mut bare, root, .. } = scene();
    let partition = bare.partition;
    let make = EXTENT_CONFIGURE;
    bare.refused(make, &[partition, 1, 0, HIGH], ArgumentInvalid);
    bare.refused(make, &[partition, !0, 2, HIGH], ArgumentInvalid);
    bare.refused(make, &[partition, 1, PAGE, HIGH], ArgumentAlignment);
    // A bit of nothing, a list, no rights, write and execute, cached by force, no such kind.
    for attrs in [7 | 1 << 3, 7 | HIGH, 7 | 1 << 31, 0, 3, 7 | 3 << 8, 7 | 2 << 16, 7 | 3 << 16] {
        bare.refused(make, &[partition, 0, PAGE, attrs], ArgumentInvalid);
    }
    bare.refused(make, &[partition, RAM * PAGE, PAGE, BASIC], NotOwner);
    bare.refused(make, &[partition, DEVICE * PAGE, PAGE, BASIC], NotOwner);
    bare.refused(make, &[partition, !0xfff, PAGE, BASIC], NotOwner);
    let derive = EXTENT_DERIVE;
    let all = 0x1_0000 * PAGE;
    bare.refused(derive, &[root, 1, 0, HIGH], ArgumentInvalid);
    bare.refused(derive, &[root, !0, 2, HIGH], ArgumentInvalid);
    bare.refused(derive, &[root, all + 1, PAGE, HIGH], AddrInvalid);
    bare.refused(derive, &[root, all - PAGE, 2 * PAGE + 1, HIGH], AddrInvalid);
    bare.refused(derive, &[root, 1, PAGE, HIGH], ArgumentAlignment);
    bare.refused(derive, &[root, 0, PAGE, 7 | 1 << 31], ArgumentInvalid);
    let reads = bare.derive(root, 0, 0x3000, 4 | 2 << 8 | 1 << 16);
    bare.refused(derive, &[reads, 0, PAGE, 6 | 2 << 8], ArgumentInvalid);
    bare.refused(derive, &[reads, 0, PAGE, 4 | 1 << 8], ArgumentInvalid);
    bare.refused(derive, &[reads, RAM * PAGE, PAGE, 4 | 2 << 8], NotOwner);
    bare.sound();
}

#[test]
fn donations_check_in_this_order() {
    let Scene { mut bare, root, child, .. } = scene();
    let (partition, call) = (bare.partition, EXTENT_DONATE);
    let sibling = bare.derive(root, RAM, 0x100, SPARSE);
    let (grandchild, basic) =
        (bare.derive(child, 0, 0x100, SPARSE), bare.derive(child, 0x200, 4, BASIC));
    for options in [3, 255, 1 << 8, 1 << 30, 1 << 32] {
        bare.refused(call, &[options, root, child, 0, PAGE], ArgumentInvalid);
    }
    bare.refused(call, &[0, child, child, 0, PAGE], ArgumentInvalid);
    bare.refused(call, &[0, partition, child, 0, PAGE], WrongObjectType);
    for (from, to, how) in [(root, child, 0), (child, root, 1), (child, sibling, 2)] {
        bare.refused(call, &[how, from, to, 1, !0], ArgumentAlignment);
        bare.refused(call, &[how, from, to, !0xfff, 0], ArgumentInvalid);
        bare.refused(call, &[how, from, to, 0, 0], ArgumentSize);
        bare.refused(call, &[how, from, to, PAGE, !0xfff], ArgumentSize);
        bare.refused(call, &[how, from, to, 0x900 * PAGE, PAGE], ArgumentInvalid);
    }
    bare.refused(call, &[2, child, sibling, 0x100 * PAGE, PAGE], ArgumentInvalid);
    bare.refused(call, &[2, child, child, 0, PAGE], ArgumentInvalid);
    bare.refused(call, &[2, child, grandchild, 0, PAGE], ArgumentInvalid);
    bare.refused(call, &[2, root, root, 0, PAGE], ArgumentInvalid);
    bare.refused(call, &[0, child, basic, 0, PAGE], ExtentType);
    bare.refused(call, &[1, basic, child, 0, PAGE], ExtentType);
    bare.refused(call, &[2, basic, grandchild, 0, PAGE], ArgumentInvalid);
    bare.refused(call, &[2, sibling, child, 0, PAGE], NotOwner);
    bare.refused(call, &[2, child, sibling, 0x3ff * PAGE, PAGE], ArgumentInvalid);
    bare.refused(call, &[0, root, child, 0x3ff * PAGE, 2 * PAGE], NotOwner);
    bare.refused(call, &[1, child, root, 0x3ff * PAGE, 2 * PAGE], NotOwner);
    bare.refused(call, &[0, partition, root, 0, PAGE], NotOwner);
    bare.sound();
}

#[test]
fn lookups_and_modifications_check_in_this_order() {
    let Scene { mut bare, root, child, aspace } = scene();
    bare.call(ASPACE_MAP, &[aspace, child, 0x80_0000, 0xf_0067]).unwrap();
    let look = ASPACE_LOOKUP;
    bare.refused(look, &[aspace, child, 1, 0], ArgumentSize);
    bare.refused(look, &[aspace, child, !0, 2], AddrOverflow);
    bare.refused(look, &[aspace, child, 1, PAGE], ArgumentAlignment);
    bare.refused(look, &[aspace, child, 0, PAGE], AddrInvalid);
    bare.refused(look, &[aspace, child, 1 << 60, PAGE], AddrInvalid);
    bare.refused(look, &[aspace, root, 0x80_0000, PAGE], NotOwner);
    let all = 0x400 * PAGE;
    assert_eq!(bare.call(look, &[aspace, child, 0x80_0000, HIGH]), Ok([0, all, 0xf_0067]));
    let middle = [aspace, child, 0x80_0000 + 5 * PAGE, 7 * PAGE];
    assert_eq!(bare.call(look, &middle), Ok([5 * PAGE, 7 * PAGE, 0xf_0067]));

    let modify = EXTENT_MODIFY;
    for flags in [1 << 8, 1 << 30, 1 << 32] {
        bare.refused(modify, &[0, flags], ArgumentInvalid);
    }
    for flags in [1, 2, 3, 4, 254, 255 | NO_SYNC, 4 | NO_SYNC] {
        bare.refused(modify, &[child, flags, 0, PAGE], ArgumentInvalid);
    }
    let reads = bare.derive(child, 0, 4, 4 | 1 << 16);
    let device = bare.derive(child, 0, 4, 7 | 1 << 8 | 1 << 16);
    for op in [1, 2, 3].map(|op| op | NO_SYNC) {
        bare.refused(modify, &[reads, op, 1, 1], Denied);
        bare.refused(modify, &[device, op, 1, 1], Denied);
        bare.refused(modify, &[child, op, 1, 0], ArgumentAlignment);
        bare.refused(modify, &[child, op, !0xfff, 0], ArgumentInvalid);
        bare.refused(modify, &[child, op, 0, 0], ArgumentSize);
        bare.refused(modify, &[child, op, 0, !0xfff], ArgumentSize);
        bare.refused(modify, &[child, op, 0, (NR_RAM + 1) * PAGE], ArgumentInvalid);
        bare.call(modify, &[child, op, 0, PAGE]).unwrap();
    }
    bare.call(modify, &[child, 255]).unwrap();
    bare.sound();
}

#[test]
fn a_capability_space_has_an_end() {
    let mut caps = Cspace::default();
    for _ in 0..1 << 16 {
        caps.insert(Object::Partition, Rights::ALL).unwrap();
    }
    assert_eq!(caps.insert(Object::Partition, Rights::ALL), Err(CspaceFull));
    assert_eq!(caps.remove(CapId(0)), Err(CapNull));
}
