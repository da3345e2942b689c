//! Parts become one and their tables are zeroed, while somebody is on the way to them.

use gmem::modelled::{Flaw, Visibility};
use loom_tests::{World, explore_on, must_notice, pages, together};
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
