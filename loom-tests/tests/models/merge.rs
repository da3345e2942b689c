//! Parts become one block again while somebody is on the way down to one of them.
//!
//! A late one is whoever has read that the block is split, and comes to the part after the merge. An
//! exclusive pin is what comes late where that must come down from the root: a pin of a page goes to its
//! word directly.

use gmem::modelled::{Flaw, Reader, Stop, Visibility};
use loom::thread;
use loom_tests::{World, explore, explore_on, must_be_caught, must_notice, page, pages, together};
use std::sync::Arc;

use crate::{MISTAKEN, RACE};

use Visibility::{Private, Shared};

/// What the holder of an exclusive pin leaves.
const OWNED: u64 = 10;

/// A block whose parts have words of their own.
fn split_world(levels: u32) -> Arc<World> {
    let world = World::uniform(levels, Shared);
    world.split(pages(1..2));
    world
}

/// Proves: of a pin of a part and a conversion that merges the block one gets what it wants, and a pin
/// that comes late holds nothing.
#[test]
fn pin() {
    explore_on(&[2, 3], against_pin);
}

fn against_pin(levels: u32) {
    let world = split_world(levels);
    let (owned, converted) = together(
        &world,
        |world, reader| world.write_owned(reader, pages(1..2), OWNED),
        |world, reader| world.convert(reader, world.all(), Private),
    );
    assert!(owned.is_ok() || converted.is_ok());
    if converted.is_ok() {
        assert_eq!(world.tree.spans(world.all()).count(), 1, "not merged");
    }
    world.expect_whole();
}

/// Seed: parts that a merge has silenced speak to whoever comes late.
#[test]
fn canary_parts_speak_after_a_merge() {
    let late_pin = "is not held|not what its word says";
    must_notice(Flaw::MergeFreesItsParts, late_pin, &[2, 3], against_pin);
    must_notice(Flaw::MergeFreesItsParts, "Causality violation|Some(2)", &[2, 3], read_late);
}

/// Proves: the same of two pins, one after the other, of a part that has no word yet and of a block that
/// both parts are in: what the second finds is not what the first has left.
#[test]
fn two_pins() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let (pinned, converted) = together(
            &world,
            |world, reader| {
                let part = world.pin(reader, pages(0..1))?;
                let whole = world.read_pinned(reader, pages(0..2));
                world.unpin(reader, part);
                whole
            },
            |world, reader| world.convert(reader, world.all(), Private),
        );
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_whole();
    });
}

/// Proves: an access on its way down sees the bytes of before the conversion or is refused, whichever
/// words it meets; and one that comes after a second merge sees what that prepared.
#[test]
fn late_reader() {
    explore_on(&[2, 3], read_late);
}

fn read_late(levels: u32) {
    let world = split_world(levels);
    let (seen, ()) = together(
        &world,
        |world, reader| world.read_in_section(reader, pages(1..2)),
        |world, reader| {
            world.convert(reader, world.all(), Private).unwrap();
            world.convert(reader, world.all(), Shared).unwrap();
        },
    );
    assert!(matches!(seen, None | Some(World::HOST | World::PREPARED)), "{seen:?}");
    world.expect_whole();
}

/// Proves: an access that is late by a merge and another split sees no byte of the guest's, and sees of
/// the other part what was prepared.
#[test]
fn late_reader_after_a_split() {
    explore_on(&[2, 3], read_late_after_a_split);
}

fn read_late_after_a_split(levels: u32) {
    let world = split_world(levels);
    let ([private, shared], ()) = together(
        &world,
        |world, reader| {
            [pages(1..2), pages(0..1)].map(|range| world.read_in_section(reader, range))
        },
        |world, reader| {
            world.convert(reader, world.all(), Private).unwrap();
            world.convert(reader, pages(0..1), Shared).unwrap();
        },
    );
    assert!(matches!(private, None | Some(World::HOST)), "{private:?}");
    assert!(matches!(shared, None | Some(World::HOST | World::PREPARED)), "{shared:?}");
    world.expect_whole();
}

/// Seed: what the next split has written passes for what was never written.
#[test]
fn canary_later_parts_pass_for_older() {
    must_notice(Flaw::TakesLaterPartsForOlder, RACE, &[2, 3], read_late_after_a_split);
}

/// Merges and splits a block so many times; the page that the late one wants is private then.
fn rounds(world: &World, reader: &Reader, nr_rounds: u32, convert: Convert) -> Result<(), Stop> {
    convert(world, reader, world.all(), Private)?;
    for _ in 0..nr_rounds {
        convert(world, reader, pages(0..1), Shared)?;
        convert(world, reader, world.all(), Private)?;
    }
    convert(world, reader, pages(0..1), Shared)
}

type Convert = fn(&World, &Reader, gmem::range::PgoffRange, Visibility) -> Result<(), Stop>;

/// One who wants page 1 and is late by so many merges and splits, numbered from 1 to `nr_splits`.
fn late_by(levels: u32, nr_splits: u64, nr_rounds: u32, convert: Convert) {
    let world = World::numbered(levels, Shared, nr_splits);
    world.split(pages(1..2));
    let (owned, converted) = together(
        &world,
        |world, reader| world.write_owned(reader, pages(1..2), OWNED),
        move |world, reader| rounds(world, reader, nr_rounds, convert),
    );
    assert!(owned.is_ok() || converted.is_ok(), "neither: {owned:?}, {converted:?}");
    // What somebody wrote who should not have got it is not the guest's.
    world.expect_whole();
}

/// Proves: a pin that is late by a merge and another split is refused, or had the page before.
#[test]
fn late_pin_after_a_split() {
    explore_on(&[2, 3], |levels| late_by(levels, 1000, 0, World::convert));
}

/// Proves: the same of pins that go to the page's own word, one of each part.
#[test]
fn late_pins_of_both_parts() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let ([private, shared], _) = together(
            &world,
            |world, reader| {
                [pages(1..2), pages(0..1)].map(|range| world.read_pinned(reader, range))
            },
            |world, reader| rounds(world, reader, 0, World::convert),
        );
        assert!(matches!(private, Err(_) | Ok(World::HOST)), "{private:?}");
        assert!(matches!(shared, Err(_) | Ok(World::HOST | World::PREPARED)), "{shared:?}");
        world.expect_whole();
    });
}

/// Seed: the split that a merge ends is not numbered.
#[test]
fn canary_merge_forgets_its_split() {
    let late_pin = |levels| late_by(levels, 1000, 0, World::convert);
    must_notice(Flaw::MergeForgetsItsSplit, "is not idle|neither", &[2, 3], late_pin);
}

/// Proves: three numbers of splits are enough, however late somebody is: nobody merges before all have
/// left who came before, so whoever is on the way down finds parts of the split before the one that
/// he has read, of that one, or of the next.
#[test]
fn three_numbers() {
    explore_on(&[2, 3], |levels| late_by(levels, 3, 2, World::convert));
}

/// Shows that two are not: parts of the split before and of the next look alike.
#[test]
fn canary_two_numbers() {
    must_be_caught(MISTAKEN, || late_by(2, 2, 1, World::convert));
    must_be_caught(MISTAKEN, || late_by(3, 2, 1, World::convert));
}

/// Control: with more numbers than splits the same comings and goings are told apart.
#[test]
fn many_numbers() {
    explore_on(&[2, 3], |levels| late_by(levels, 1000, 1, World::convert));
}

/// Seed: merges do not wait, and there are three numbers.
#[test]
fn canary_merges_without_waiting() {
    // Without a wait there is no merge, but for the mistake.
    let late = |levels| late_by(levels, 3, 2, World::convert_without_readers);
    must_notice(Flaw::MergesWithoutWaiting, MISTAKEN, &[2, 3], late);
}

/// Proves: nobody else is at the parts that stay as they are: a merge takes all of its parts, or there is
/// none.
#[test]
fn part_beside_a_pin() {
    explore_on(&[2, 3], beside_a_pin);
}

fn beside_a_pin(levels: u32) {
    let world = split_world(levels);
    let (seen, converted) = together(
        &world,
        |world, reader| world.read_pinned(reader, pages(1..2)),
        |world, reader| world.convert(reader, pages(0..1), Private),
    );
    assert_eq!((seen, converted), (Ok(World::HOST), Ok(())));
    world.expect_whole();
}

/// Seed: a merge does not ask for all of its parts.
#[test]
fn canary_merges_too_much() {
    must_notice(Flaw::MergesTooMuch, "not what its word says", &[2, 3], beside_a_pin);
}

/// Proves: what is private already comes along into a merge, or if somebody has it in hand, the
/// conversion of the rest is refused; nobody who wants that page is in anybody's way.
#[test]
fn along() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Private);
        world.convert(&world.reader(), pages(0..1), Shared).unwrap();
        let (opened, closed) = together(
            &world,
            |world, reader| world.convert(reader, pages(1..2), Shared),
            |world, reader| world.convert(reader, world.all(), Private),
        );
        assert!(opened.is_ok() || closed.is_ok(), "{opened:?}, {closed:?}");
        world.expect_whole();
    });
}

/// Proves: one who registers while a lone conversion, which skips the barrier, merges and splits the block
/// is not late either.
#[test]
fn newcomer() {
    explore_on(&[2, 3], |levels| {
        let world = World::numbered(levels, Shared, 3);
        world.split(pages(1..2));
        let own = world.reader();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.write_owned(&world.reader(), pages(1..2), OWNED))
        };
        let converted = rounds(&world, &own, 2, World::convert);
        let owned = other.join().unwrap();
        assert!(owned.is_ok() || converted.is_ok());
        world.expect_whole();
    });
}

/// Proves: two conversions that merge the same block, each of which holds a part first, end as one after
/// the other.
#[test]
fn two_merges() {
    explore(|| {
        let world = split_world(3);
        let (lower, all) = together(
            &world,
            |world, reader| world.convert(reader, pages(0..2), Private),
            |world, reader| world.convert(reader, world.all(), Private),
        );
        assert!(lower.is_ok() || all.is_ok());
        assert_eq!(world.memory.read(page(3)) == World::SECRET, all.is_ok());
        world.expect_whole();
    });
}
