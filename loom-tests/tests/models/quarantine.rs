//! A change that was given up half way: nobody knows the memory's state, so nobody gets it.

use gmem::modelled::{Reader, Refusal, Stop, Visibility, Wanted};
use gmem::range::PgoffRange;
use loom_tests::{World, explore, explore_on, must_be_caught, page, pages, together};

use crate::RACE;

const TO_PRIVATE: Wanted = Wanted::Other(Visibility::Private);

/// Freezes, waits, changes the bytes of the first page, and gives up, as a panic would.
fn give_up_half_way(world: &World, reader: &Reader, range: PgoffRange) -> Result<(), Stop> {
    let mut frozen = world.freeze(reader, range, TO_PRIVATE)?;
    assert!(frozen.wait_for_sections(reader));
    world.memory.write(range.start(), World::SECRET);
    drop(frozen);
    Ok(())
}

/// Checks that each way into the range is refused, and for the right reason.
fn expect_closed(world: &World, range: PgoffRange) {
    world.expect_quarantined(range);
    let reader = world.reader();
    let stop = Stop::At(range.start(), Refusal::Quarantined);
    assert_eq!(world.tree.pin(&reader, range), Err(stop));
    assert_eq!(world.tree.pin_exclusive(&reader, range), Err(stop));
    assert_eq!(world.tree.check_open(range), Err(stop));
    for wanted in [Wanted::Other(Visibility::Shared), TO_PRIVATE, Wanted::All] {
        assert_eq!(world.freeze(&reader, range, wanted).err(), Some(stop));
    }
    world.expect_quarantined(range);
}

/// Proves: a pin has the memory before the freeze, or never again.
#[test]
fn pin() {
    explore(|| {
        let world = World::flat(2, Visibility::Shared);
        let (pinned, frozen) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(0..2)),
            |world, reader| give_up_half_way(world, reader, pages(0..2)),
        );

        match pinned {
            Ok(seen) => assert_eq!(seen, World::HOST),
            Err(Stop::At(at, refusal)) => {
                assert!(matches!(refusal, Refusal::Converting | Refusal::Quarantined));
                assert_eq!(at, page(0));
            }
            Err(stop) => panic!("{stop:?}"),
        }
        match frozen {
            Ok(()) => expect_closed(&world, pages(0..2)),
            Err(_) => world.expect_idle(pages(0..2), Visibility::Shared),
        }
    });
}

/// Proves: an access sees the memory as it was before the freeze, or is refused.
#[test]
fn access() {
    explore(|| {
        let world = World::flat(2, Visibility::Shared);
        let (seen, ()) = together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..2)),
            |world, reader| give_up_half_way(world, reader, pages(0..2)).unwrap(),
        );

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        expect_closed(&world, pages(0..2));
    });
}

/// Proves: what a split block has that is given up is never merged with the rest: a conversion of the
/// whole block is refused, and its other page stays as it was.
#[test]
fn part_of_a_block() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let (converted, frozen) = together(
            &world,
            |world, reader| world.convert(reader, world.all(), Visibility::Private),
            |world, reader| give_up_half_way(world, reader, pages(1..2)),
        );

        match (converted, frozen) {
            (Ok(()), Ok(())) => world.expect_idle(world.all(), Visibility::Private),
            (Ok(()), Err(stop)) => {
                assert_eq!(stop, Stop::At(page(1), Refusal::Converting));
                world.expect_idle(world.all(), Visibility::Private);
            }
            (Err(_), Ok(())) => {
                world.expect_idle(pages(0..1), Visibility::Shared);
                expect_closed(&world, pages(1..2));
            }
            (Err(_), Err(_)) => panic!("both refused: {converted:?}, {frozen:?}"),
        }
    });
}

/// Proves: a conversion whose range reaches into memory that is being given up gets all of its range
/// before, or nothing.
#[test]
fn conversion() {
    explore(|| {
        let world = World::flat(3, Visibility::Shared);
        let (converted, frozen) = together(
            &world,
            |world, reader| world.convert(reader, pages(0..2), Visibility::Private),
            |world, reader| give_up_half_way(world, reader, pages(1..3)),
        );

        match (converted, frozen) {
            (Ok(()), frozen) => {
                world.expect_idle(pages(0..2), Visibility::Private);
                // Page 1 was private already, or was not when its conversion came in between.
                match frozen {
                    Ok(()) => expect_closed(&world, pages(2..3)),
                    Err(stop) => assert_eq!(stop, Stop::At(page(1), Refusal::Converting)),
                }
            }
            (Err(Stop::At(at, refusal)), Ok(())) => {
                assert_eq!(at, page(1));
                assert!(matches!(refusal, Refusal::Converting | Refusal::Quarantined));
                world.expect_idle(pages(0..1), Visibility::Shared);
                expect_closed(&world, pages(1..3));
            }
            (Err(_), _) => panic!("both refused: {converted:?}, {frozen:?}"),
        }
    });
}

/// Seed: what was given up half way is thawed instead, before it is whole again.
#[test]
fn canary_thaw_of_unknown_bytes() {
    must_be_caught("is not like the pages before it", || {
        let world = World::flat(2, Visibility::Shared);
        together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..2)),
            |world, reader| {
                let mut frozen = world.freeze(reader, pages(0..2), TO_PRIVATE).unwrap();
                assert!(frozen.wait_for_sections(reader));
                world.memory.write(page(0), World::SECRET);
                frozen.thaw();
            },
        );
    });
}

/// Seed: the bytes are changed after the memory was given up to somebody else.
#[test]
fn canary_change_after_release() {
    must_be_caught(RACE, || {
        let world = World::flat(1, Visibility::Private);
        together(
            &world,
            |world, reader| {
                let _ = world.read_pinned(reader, pages(0..1));
            },
            |world, reader| {
                let frozen = world.freeze(reader, pages(0..1), Wanted::All).unwrap();
                frozen.release(Visibility::Shared);
                world.memory.write(page(0), World::SECRET);
            },
        );
    });
}
