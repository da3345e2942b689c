//! A page that failed while others have it pinned: they keep it until they let go, and nobody else comes.

use gmem::modelled::{Phase, Reader, Refusal, Stop, Visibility, Wait, Wanted, Word};
use loom_tests::{Pin, World, explore_on, must_be_caught, page, pages, three_together, together};
use std::sync::Arc;
use std::time::Duration;

use crate::RACE;
use Visibility::{Private, Shared};

/// What stands in for the failure: an access that is at the page then is one too many.
const FAILED: u64 = 13;

/// Condemns the first page, waits for those who are inside of it, and has it fail.
fn condemn(world: &World, reader: &Reader) -> Result<(), Stop> {
    world.tree.condemn(reader, pages(0..1))?;
    assert!(reader.wait_for_others());
    world.memory.write(page(0), FAILED);
    Ok(())
}

/// Checks that the first page is closed to everybody, and held by nobody; the other is neither.
fn expect_fenced(world: &World) {
    let word = world.tree.load(page(0)).unwrap();
    assert_eq!((word.phase(), word.is_held()), (Phase::Quarantined, false));
    let reader = world.reader();
    let stop = Stop::At(page(0), Refusal::Quarantined);
    assert_eq!(world.tree.pin(&reader, pages(0..1)), Err(stop));
    assert_eq!(world.tree.check_open(pages(0..1)), Err(stop));
    assert_eq!(world.freeze(&reader, world.all(), Wanted::All).err(), Some(stop));
}

/// One who holds a pin lets go while the page is condemned and others read it.
fn under_a_pin(world: &Arc<World>, pin: Pin) {
    let ((), seen, condemned) = three_together(
        world,
        |world, reader| world.unpin(reader, pin),
        |world, reader| world.read_in_section(reader, pages(0..1)),
        condemn,
    );
    assert_eq!(condemned, Ok(()));
    assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
    expect_fenced(world);
    world.expect_idle(pages(1..2), Shared);
}

/// Proves: whether the pin goes before or after, it is not lost count of. Of a pin of the whole block, which is
/// split for it.
#[test]
fn under_a_pin_of_the_whole() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        let pin = world.pin(&world.reader(), world.all()).unwrap();
        let unpin = |world: &World, reader: &Reader| world.unpin(reader, pin);
        let ((), condemned) = together(&world, unpin, condemn);
        assert_eq!(condemned, Ok(()));
        expect_fenced(&world);
        world.expect_idle(pages(1..2), Shared);
    });
}

/// Proves: the same of a pin that is counted in the page's own word and dropped there, by no exchange; and no
/// access is at the page when sections were waited for.
#[test]
fn under_a_pin_of_the_page() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        world.split(pages(0..1));
        let pin = world.pin(&world.reader(), pages(0..1)).unwrap();
        under_a_pin(&world, pin);
    });
}

/// Proves: a pin is there before, and is kept, or never comes.
#[test]
fn and_a_pin_that_comes() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        let (pin, condemned) =
            together(&world, |world, reader| world.pin(reader, world.all()), condemn);
        assert_eq!(condemned, Ok(()));
        let held = world.tree.load(page(0)).map(Word::pins);
        assert_eq!(held, Some(u32::from(pin.is_ok())));
        if let Ok(pin) = pin {
            world.unpin(&world.reader(), pin);
        }
        expect_fenced(&world);
        world.expect_idle(pages(1..2), Shared);
    });
}

/// Proves: a conversion that waits for the pin has the page, and whoever condemns it is told so, or it ends at
/// once and has nothing. Nobody sleeps for ever.
#[test]
fn and_a_conversion_that_waits() {
    explore_on(&[2], |levels| {
        let world = World::uniform(levels, Shared);
        world.split(pages(0..1));
        let pin = world.pin(&world.reader(), pages(0..1)).unwrap();
        let ((), converted, condemned) = three_together(
            &world,
            |world, reader| world.unpin(reader, pin),
            |world, reader| {
                let wait = Wait::at_most(Duration::MAX);
                world.convert_waiting(reader, pages(0..1), Private, &wait)
            },
            |world, reader| world.tree.condemn(reader, pages(0..1)),
        );
        match (converted, condemned) {
            (Ok(()), Err(stop)) => {
                assert_eq!(stop, Stop::At(page(0), Refusal::Converting));
                world.expect_idle(pages(0..1), Private);
            }
            // It came when all was over.
            (Ok(()), Ok(())) => world.expect_quarantined(pages(0..1)),
            (Err(stop), Ok(())) => {
                assert_eq!(stop, Stop::At(page(0), Refusal::Quarantined));
                expect_fenced(&world);
            }
            (Err(_), Err(_)) => panic!("both refused: {converted:?}, {condemned:?}"),
        }
        world.expect_idle(pages(1..2), Shared);
    });
}

/// Seed: those who are inside of a section are not waited for.
#[test]
fn canary_no_grace_period() {
    must_be_caught(RACE, || {
        let world = World::uniform(2, Shared);
        let pin = world.pin(&world.reader(), world.all()).unwrap();
        together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..1)),
            |world, reader| {
                world.tree.condemn(reader, pages(0..1)).unwrap();
                world.memory.write(page(0), FAILED);
            },
        );
        world.unpin(&world.reader(), pin);
    });
}
