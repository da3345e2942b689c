//! A block splits because somebody wants a part of it, while others are at the block or at another part.

use gmem::modelled::{Flaw, Refusal, Stop, Visibility};
use loom_tests::{
    World, explore_on, explore_words_on, must_notice, pages, three_together, together,
};
use std::ops::Range;

/// What the holder of a pin leaves.
const DEVICE: u64 = 12;

/// Proves: two pins of different parts split the block once, and both get their part: neither loses
/// what the other has written into the tables that neither had before.
#[test]
fn pins_of_two_parts() {
    explore_words_on(&[2, 3], pins_of_two);
}

fn pins_of_two(levels: u32) {
    let world = World::uniform(levels, Visibility::Shared);
    let (one, other) = together(
        &world,
        |world, reader| world.write_pinned(reader, pages(0..1), DEVICE),
        |world, reader| world.write_pinned(reader, pages(1..2), DEVICE),
    );
    assert_eq!((one, other), (Ok(()), Ok(())));
    world.expect_whole();
}

/// Seed: who splits the block fills the new table with what the parts inherit.
#[test]
fn canary_tables_filled_late() {
    must_notice(Flaw::FillsTables, "is not held", &[2, 3], pins_of_two);
}

/// Proves: two pins of one part are both counted, whichever of them writes its word first.
#[test]
fn pins_of_one_part() {
    explore_words_on(&[2, 3], pins_of_one);
}

fn pins_of_one(levels: u32) {
    let world = World::uniform(levels, Visibility::Shared);
    let (one, other) = together(
        &world,
        |world, reader| world.read_pinned(reader, pages(0..1)),
        |world, reader| world.read_pinned(reader, pages(0..1)),
    );
    assert_eq!((one, other), (Ok(World::HOST), Ok(World::HOST)));
    world.expect_whole();
}

/// Seed: who writes a part first does not look what it has become.
#[test]
fn canary_parts_written_blindly() {
    must_notice(Flaw::WritesPartsBlindly, "is not held", &[2, 3], pins_of_one);
}

/// Proves: a pin of a page and one of a block of two pages, both from one uniform root of three levels,
/// get what they want, if the page is in that block and if it is not.
#[test]
fn pins_on_two_levels() {
    explore_words_on(&[3], |levels| page_and_block(levels, 0..2));
    explore_words_on(&[3], |levels| page_and_block(levels, 2..4));
}

fn page_and_block(levels: u32, block: Range<u64>) {
    let world = World::uniform(levels, Visibility::Shared);
    let (page, two) = together(
        &world,
        |world, reader| world.read_pinned(reader, pages(0..1)),
        |world, reader| world.read_pinned(reader, pages(block)),
    );
    assert_eq!((page, two), (Ok(World::HOST), Ok(World::HOST)));
    world.expect_whole();
}

/// Seeds: the page is not in the block, and the root's new table is filled late; it is, and who writes the
/// word between root and page does not look what it has become.
#[test]
fn canary_splits_on_two_levels() {
    must_notice(Flaw::FillsTables, "is not held", &[3], |levels| page_and_block(levels, 2..4));
    must_notice(Flaw::WritesPartsBlindly, "is not held", &[3], |levels| {
        page_and_block(levels, 0..2)
    });
}

/// Proves: a pin of a whole block is dropped from whatever words there are for it, while somebody
/// else's pin of a part splits the block.
#[test]
fn unpin_of_the_whole() {
    explore_words_on(&[2, 3], unpin_of_all);
}

fn unpin_of_all(levels: u32) {
    let world = World::uniform(levels, Visibility::Shared);
    let pin = world.pin(&world.reader(), world.all()).unwrap();
    let ((), seen) = together(
        &world,
        |world, reader| world.unpin(reader, pin),
        |world, reader| world.read_pinned(reader, pages(0..1)),
    );
    assert_eq!(seen, Ok(World::HOST));
    world.expect_whole();
}

/// Proves: the same with a conversion of the whole block between the two, which gets all of it or
/// nothing. Both may be refused: the pin by a freeze that then meets what is left of the first pin.
#[test]
fn unpin_of_the_whole_and_conversion() {
    explore_words_on(&[2, 3], unpin_of_all_and_conversion);
}

fn unpin_of_all_and_conversion(levels: u32) {
    let world = World::uniform(levels, Visibility::Shared);
    let pin = world.pin(&world.reader(), world.all()).unwrap();
    let ((), _, converted) = three_together(
        &world,
        |world, reader| world.unpin(reader, pin),
        |world, reader| world.read_pinned(reader, pages(1..2)),
        |world, reader| world.convert_without_readers(reader, world.all(), Visibility::Private),
    );
    world.expect_idle(world.all(), visibility_after(converted));
    world.expect_whole();
}

/// Seed: what either leaves in a part is written without a look at what it has become.
#[test]
fn canary_unpin_written_blindly() {
    let symptom = "is not held|is not idle";
    must_notice(Flaw::WritesPartsBlindly, symptom, &[2, 3], unpin_of_all);
    must_notice(Flaw::WritesPartsBlindly, symptom, &[2, 3], unpin_of_all_and_conversion);
}

/// Seed: who splits the block brings back the pins that were dropped from its parts meanwhile.
#[test]
fn canary_unpin_overwritten() {
    must_notice(Flaw::FillsTables, "is not idle", &[2, 3], unpin_of_all);
}

/// Proves: of a pin of a part and a conversion of the block one gets what it wants, and they are never
/// in the part together.
#[test]
fn pin_of_a_part_and_conversion() {
    explore_words_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let (pinned, converted) = together(
            &world,
            |world, reader| world.write_pinned(reader, pages(1..2), DEVICE),
            |world, reader| world.convert_without_readers(reader, world.all(), Visibility::Private),
        );
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_idle(world.all(), visibility_after(converted));
        world.expect_whole();
    });
}

/// Proves: of a pin of a block and a conversion of a part one gets what it wants, and the other leaves
/// nothing behind.
#[test]
fn pin_and_conversion_of_a_part() {
    explore_words_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let (pinned, converted) = together(
            &world,
            |world, reader| world.write_pinned(reader, world.all(), DEVICE),
            |world, reader| world.convert_without_readers(reader, pages(1..2), Visibility::Private),
        );
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_idle(pages(0..1), Visibility::Shared);
        world.expect_idle(pages(1..2), visibility_after(converted));
        world.expect_whole();
    });
}

/// Proves: conversions of two parts of one block are nothing to each other.
#[test]
fn conversions_of_two_parts() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let (one, other) = together(
            &world,
            |world, reader| world.convert(reader, pages(0..1), Visibility::Private),
            |world, reader| world.convert(reader, pages(1..2), Visibility::Private),
        );
        assert_eq!((one, other), (Ok(()), Ok(())));
        world.expect_idle(pages(0..2), Visibility::Private);
        world.expect_whole();
    });
}

/// Proves: the block at the end of the object, which is shorter than others, takes part as they do: a
/// pin of its page against a conversion of everything.
#[test]
fn tail() {
    explore_words_on(&[2, 3], |levels| {
        let world = World::of_pages(3, levels, Visibility::Shared);
        let (pinned, converted) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(2..3)),
            |world, reader| world.convert_without_readers(reader, world.all(), Visibility::Private),
        );
        if let Err(stop) = converted {
            assert!(matches!(stop, Stop::At(_, Refusal::Pinned(1))), "{stop:?}");
            assert!(pinned.is_ok());
        }
        world.expect_idle(world.all(), visibility_after(converted));
        world.expect_whole();
    });
}

fn visibility_after(to_private: Result<(), Stop>) -> Visibility {
    to_private.map_or(Visibility::Shared, |()| Visibility::Private)
}
