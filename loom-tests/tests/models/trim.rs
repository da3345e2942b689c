//! Parts become one and their tables are zeroed, while somebody is on the way to them.

use gmem::modelled::{Flaw, Reader, Refusal, Stop, Visibility, Word};
use loom_tests::{World, explore_on, must_be_caught, must_notice, page, pages, together};
use std::sync::Arc;

use Visibility::{Private, Shared};

/// What the holder of an exclusive pin leaves.
const OWNED: u64 = 10;

/// A block whose parts have words of their own, and all say the same.
fn split_world(levels: u32) -> Arc<World> {
    let world = World::uniform(levels, Shared);
    world.split(pages(1..2));
    world
}

/// Proves: a trim never makes a pin fail, and a part that is pinned is not folded away.
#[test]
fn pin() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let (seen, _) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(1..2)),
            |world, reader| world.tree.trim(reader).unwrap(),
        );
        assert_eq!(seen, Ok(World::HOST));
        world.expect_whole();
    });
}

/// Proves: the same of an exclusive pin of a part, which comes down from the root.
#[test]
fn exclusive_pin() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let (owned, _) = together(
            &world,
            |world, reader| world.write_owned(reader, pages(1..2), OWNED),
            |world, reader| world.tree.trim(reader).unwrap(),
        );
        assert_eq!(owned, Ok(()));
        world.expect_whole();
    });
}

/// Proves: accesses go on during a trim, whatever they find on the way down.
#[test]
fn reader() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let (seen, _) = together(
            &world,
            |world, reader| {
                [pages(1..2), pages(0..2)].map(|range| world.read_in_section(reader, range))
            },
            |world, reader| world.tree.trim(reader).unwrap(),
        );
        assert_eq!(seen, [Some(World::HOST); 2]);
        world.expect_whole();
    });
}

/// Proves: a trim never makes a conversion fail, of a part or of the whole.
#[test]
fn conversion() {
    for part in [true, false] {
        explore_on(&[2, 3], move |levels| {
            let world = split_world(levels);
            let range = if part { pages(0..1) } else { world.all() };
            let (converted, _) = together(
                &world,
                move |world, reader| world.convert(reader, range, Private),
                |world, reader| world.tree.trim(reader).unwrap(),
            );
            assert_eq!(converted, Ok(()));
            world.expect_idle(range, Private);
            world.expect_whole();
        });
    }
}

/// Proves: two trims at once end as one. On two levels: on three there are too many orders.
#[test]
fn two_trims() {
    explore_on(&[2], |levels| {
        let world = split_world(levels);
        together(
            &world,
            |world, reader| {
                world.tree.trim(reader).unwrap();
            },
            |world, reader| {
                world.tree.trim(reader).unwrap();
            },
        );
        world.expect_whole();
        assert_eq!(world.tree.trim(&world.reader()).map(|freed| freed.get()).ok(), Some(0));
        assert_eq!(world.tree.metadata().get(), 8, "a table is left, or counted twice");
    });
}

/// One who wants page 1 while the block is trimmed, taken as a whole, and split again. The conversions
/// take no grace period: that of the trim has to do.
fn late(levels: u32) {
    let world = split_world(levels);
    let (owned, converted) = together(
        &world,
        |world, reader| world.write_owned(reader, pages(1..2), OWNED),
        |world, reader| {
            world.tree.trim(reader).unwrap();
            world.convert_without_readers(reader, world.all(), Private)?;
            world.convert_without_readers(reader, pages(0..1), Shared)
        },
    );
    assert!(owned.is_ok() || converted.is_ok());
    world.expect_whole();
}

/// Proves: a pin that is late by a trim and another split, which has the number of the first, finds what
/// there is now, and not what there was under that number.
#[test]
fn late_pin_after_a_split() {
    explore_on(&[2, 3], late);
}

/// Seed: a trim does not wait for those who are on their way down.
#[test]
fn canary_trims_without_waiting() {
    let mistaken = "Causality violation|is not held|not what its word says";
    must_notice(Flaw::TrimsWithoutWaiting, mistaken, &[2, 3], late);
}

/// Proves: the same of a pin that goes to the page's own word.
#[test]
fn late_page_pin_after_a_split() {
    explore_on(&[2, 3], |levels| {
        let world = split_world(levels);
        let (seen, _) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(1..2)),
            |world, reader| {
                world.tree.trim(reader).unwrap();
                world.convert_without_readers(reader, world.all(), Private)?;
                world.convert_without_readers(reader, pages(0..1), Shared)
            },
        );
        assert!(matches!(seen, Err(_) | Ok(World::HOST)), "{seen:?}");
        world.expect_whole();
    });
}

/// A page that is private all the time, in a block that was split while it was shared, is looked at
/// while the block is trimmed.
fn look_at_a_private_page(world: &Arc<World>, look: fn(&World, &Reader) -> Option<Word>) {
    let reader = world.reader();
    for at in 0..2 {
        world.convert_without_readers(&reader, pages(at..at + 1), Private).unwrap();
    }
    let (seen, _) = together(world, look, |world, reader| world.tree.trim(reader).unwrap());
    assert_eq!(seen, Some(Word::new(Private)), "a private page looks like another");
}

/// Proves: who looks inside of a section never takes a part whose table is being zeroed for one that
/// inherits what its block was before.
#[test]
fn look() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        look_at_a_private_page(&world, |world, reader| {
            let _section = reader.enter();
            world.tree.load(page(0)).map(unfolded)
        });
    });
}

/// A fold is no change.
fn unfolded(word: Word) -> Word {
    word.unfold().unwrap_or(word)
}

/// Seed: who looks is in no section.
#[test]
fn canary_look_outside_of_a_section() {
    must_be_caught("a private page looks like another", || {
        let world = World::uniform(2, Shared);
        look_at_a_private_page(&world, |world, _| world.tree.load(page(0)).map(unfolded));
    });
}

/// Proves: a trim never makes a conversion fail that only looks at the block which is folded.
#[test]
fn conversion_of_another_block() {
    explore_on(&[2], |levels| {
        let world = World::of_pages(4, levels, Shared);
        world.split(pages(0..1));
        world.convert_without_readers(&world.reader(), pages(2..4), Private).unwrap();
        let (converted, _) = together(
            &world,
            |world, reader| world.convert_without_readers(reader, pages(0..4), Shared),
            |world, reader| world.tree.trim(reader).unwrap(),
        );
        assert_eq!(converted, Ok(()));
        world.expect_idle(pages(0..4), Shared);
    });
}

/// A conversion that leaves page 2 alone, and looks at it again while its block is trimmed, taken as a
/// whole and split again.
fn look_again(levels: u32) {
    let world = World::of_pages(4, levels, Shared);
    let reader = world.reader();
    world.convert_without_readers(&reader, pages(0..2), Private).unwrap();
    world.split(pages(3..4));
    let (opened, ()) = together(
        &world,
        |world, reader| world.convert_without_readers(reader, pages(0..3), Shared),
        |world, reader| {
            world.tree.trim(reader).unwrap();
            world.convert_without_readers(reader, pages(2..4), Private).unwrap();
            world.convert_without_readers(reader, pages(3..4), Shared).unwrap();
        },
    );
    let refused = Err(Stop::At(page(2), Refusal::Converting));
    assert!(opened == Ok(()) || opened == refused, "{opened:?}");
    world.expect_idle(pages(0..2), if opened.is_ok() { Shared } else { Private });
    world.expect_idle(pages(3..4), Shared);
    world.expect_whole();
}

/// Proves: who looks again at what he has left alone never writes back what a block was before a trim and
/// another split, which has the number of the first.
#[test]
fn late_look_after_a_split() {
    explore_on(&[2], look_again);
}

/// Seed: that look is outside of a section, so the trim does not wait for it.
#[test]
fn canary_looks_again_outside_of_a_section() {
    must_notice(Flaw::TouchesWithoutSection, "not what its word says", &[2], look_again);
}
