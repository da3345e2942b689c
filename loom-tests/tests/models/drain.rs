//! Conversions that have time to wait: for pins to go, for other conversions, or for somebody who ends
//! the wait. Models have no clock: a deadline is a token that is cancelled.
//!
//! A sleeper whom nobody wakes is a deadlock, which loom finds.

use std::time::Duration;

use gmem::modelled::{CancelToken, Flaw, Phase, Reader, Refusal, Stop, Visibility, Wait, Word};
use gmem::range::PgoffRange;
use loom_tests::{World, explore_on, must_notice, page, pages, together};
use std::sync::Arc;

use Visibility::{Private, Shared};

/// What the holder of a pin leaves.
const DEVICE: u64 = 12;

fn forever() -> Wait {
    Wait::at_most(Duration::MAX)
}

fn convert(world: &World, reader: &Reader, range: PgoffRange, to: Visibility) -> Result<(), Stop> {
    world.convert_waiting(reader, range, to, &forever())
}

/// A pin that is there when a conversion begins, and goes.
fn pin_that_goes(world: &Arc<World>, pinned: PgoffRange, converted: PgoffRange) {
    let pin = world.pin(&world.reader(), pinned).unwrap();
    let ((), outcome) = together(
        world,
        |world, reader| {
            world.memory.write(page(0), DEVICE);
            world.unpin(reader, pin);
        },
        move |world, reader| {
            let frozen = world.tree.freeze(reader, &[converted], TO_PRIVATE, &forever())?;
            assert_eq!(world.memory.read(page(0)), DEVICE);
            world.make_private(reader, frozen);
            Ok::<_, Stop>(())
        },
    );
    assert_eq!(outcome, Ok(()));
    world.expect_idle(converted, Private);
}

const TO_PRIVATE: gmem::modelled::Wanted = gmem::modelled::Wanted::Other(Private);

/// Proves: a conversion that waits for a pin of the whole block gets it when the pin goes, and sees what
/// its holder wrote; nobody sleeps for ever.
#[test]
fn pin_of_the_whole() {
    explore_on(&[2, 3], whole);
}

fn whole(levels: u32) {
    let world = World::uniform(levels, Shared);
    pin_that_goes(&world, world.all(), world.all());
}

/// Proves: the same of a conversion of a part, which splits the block that is pinned: the pin is then
/// dropped from parts, some of which drain.
#[test]
fn pin_of_the_whole_and_conversion_of_a_part() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        pin_that_goes(&world, world.all(), pages(0..1));
    });
}

/// Proves: the same of a pin that is counted in the page's own word and dropped there.
#[test]
fn pin_of_a_page() {
    explore_on(&[2, 3], of_a_page);
}

fn of_a_page(levels: u32) {
    let world = World::uniform(levels, Shared);
    world.split(pages(0..1));
    pin_that_goes(&world, pages(0..1), pages(0..2));
}

/// Seed: nobody is woken.
#[test]
fn canary_nobody_is_woken() {
    must_notice(Flaw::WakesNobody, "deadlock", &[2, 3], whole);
    must_notice(Flaw::WakesNobody, "deadlock", &[2, 3], of_a_page);
    must_notice(Flaw::WakesNobody, "deadlock", &[2, 3], sleeping_pin_on);
}

/// Proves: the same of an exclusive pin of the whole block; a pin that comes meanwhile is refused.
#[test]
fn exclusive_pin() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        world.tree.pin_exclusive(&world.reader(), world.all()).unwrap();
        let ((), converted) = together(
            &world,
            |world, reader| {
                world.memory.write_all(world.all(), DEVICE);
                world.tree.unpin_exclusive(reader, world.all());
            },
            |world, reader| convert(world, reader, pages(0..1), Private),
        );
        assert_eq!(converted, Ok(()));
        world.expect_idle(pages(0..1), Private);
        world.expect_idle(pages(1..2), Shared);
        world.expect_whole();
    });
}

/// A pin that comes while a conversion waits for another, which goes after that.
fn newcomer(levels: u32) {
    let world = World::uniform(levels, Shared);
    let pin = world.pin(&world.reader(), world.all()).unwrap();
    let ((drained, late), converted) = together(
        &world,
        |world, reader| {
            let drains = world.tree.load(page(0)).map(Word::phase) == Some(Phase::Draining);
            let late = world.read_pinned(reader, pages(0..1));
            world.unpin(reader, pin);
            (drains, late)
        },
        |world, reader| convert(world, reader, world.all(), Private),
    );
    assert_eq!(converted, Ok(()));
    assert!(!drained || late.is_err(), "let in");
    world.expect_idle(world.all(), Private);
    world.expect_whole();
}

/// Proves: while a conversion waits no new pin gets in, not even by splitting the block that drains, and
/// the conversion comes to its end.
#[test]
fn no_new_pin() {
    explore_on(&[2, 3], newcomer);
}

/// Seed: a block that drains lets pins in.
#[test]
fn canary_draining_lets_pins_in() {
    must_notice(Flaw::DrainingLetsPinsIn, "let in|Draining|deadlock", &[2, 3], newcomer);
}

/// Seed: a block that drains is split by who wants a part of it, so that the conversion looks at a word
/// that does not speak any more.
#[test]
fn canary_splits_frozen_blocks() {
    must_notice(Flaw::SplitsFrozenBlocks, "deadlock|is not held|Converting", &[2, 3], newcomer);
}

/// A wait that is ended while the pin stays.
fn cancelled(levels: u32) {
    let world = World::uniform(levels, Shared);
    let token = CancelToken::of(&world.waiters);
    let reader = world.reader();
    let pin = world.pin(&reader, world.all()).unwrap();
    let canceller = token.clone();
    let ((), outcome) = together(
        &world,
        move |_, _| canceller.cancel(),
        |world, reader| {
            world.convert_waiting(reader, pages(0..1), Private, &Wait::until_cancelled(&token))
        },
    );
    assert_eq!(outcome, Err(Stop::Cancelled(page(0), Refusal::Pinned(1))));
    for page in world.all().iter() {
        assert_eq!(
            world.tree.load(page),
            Word::new(Shared).pin().ok(),
            "{page:?} is not as before"
        );
    }
    world.unpin(&reader, pin);
    world.expect_whole();
}

/// Proves: a wait that is ended leaves everything as it was, and never sleeps through its end.
#[test]
fn cancel() {
    explore_on(&[2, 3], cancelled);
}

/// Seed: who gives up leaves the words as they are.
#[test]
fn canary_gives_up_without_undoing() {
    must_notice(Flaw::GivesUpWithoutUndoing, "is not as before", &[2, 3], cancelled);
}

/// Proves: a wait that is ended in the moment in which the pin goes is over or was ended, and nothing in
/// between.
#[test]
fn cancel_or_drained() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        let token = CancelToken::of(&world.waiters);
        let pin = world.pin(&world.reader(), world.all()).unwrap();
        let canceller = token.clone();
        let ((), outcome) = together(
            &world,
            move |world, reader| {
                canceller.cancel();
                world.unpin(reader, pin);
            },
            |world, reader| {
                world.convert_waiting(reader, world.all(), Private, &Wait::until_cancelled(&token))
            },
        );
        match outcome {
            Ok(()) => world.expect_idle(world.all(), Private),
            Err(Stop::Cancelled(_, Refusal::Pinned(1))) => world.expect_idle(world.all(), Shared),
            Err(stop) => panic!("{stop:?}"),
        }
        world.expect_whole();
    });
}

/// A pin that sleeps while a conversion has its page.
fn sleeping_pin_on(levels: u32) {
    let world = World::uniform(levels, Private);
    let (seen, opened) = together(
        &world,
        |world, reader| {
            loop {
                match world.read_pinned(reader, pages(0..1)) {
                    Err(Stop::At(at, Refusal::Converting)) => {
                        world.tree.await_settled(&forever(), at).unwrap();
                    }
                    outcome => break outcome,
                }
            }
        },
        |world, reader| world.convert(reader, world.all(), Shared),
    );
    // Before the conversion, or while it was under way, or after.
    assert!(matches!(opened, Ok(()) | Err(Stop::At(_, Refusal::Pinned(1)))), "{opened:?}");
    let private = Err(Stop::At(page(0), Refusal::Private));
    assert!(seen == private || seen == Ok(World::PREPARED), "{seen:?}");
    world.expect_whole();
}

/// Proves: a pin that sleeps until a conversion has settled is woken, and sees what that prepared.
#[test]
fn sleeping_pin() {
    explore_on(&[2, 3], sleeping_pin_on);
}

/// Proves: two conversions of one direction, of ranges that overlap, wait for each other and both come to
/// their ends, also where both have to split a block that is pinned.
#[test]
fn same_direction() {
    explore_on(&[2, 3], |levels| {
        let world = World::of_pages(3, levels, Shared);
        let (upper, lower) = together(
            &world,
            |world, reader| convert(world, reader, pages(1..3), Private),
            |world, reader| convert(world, reader, pages(0..2), Private),
        );
        assert_eq!((lower, upper), (Ok(()), Ok(())));
        world.expect_idle(world.all(), Private);
        world.expect_whole();
    });
}

/// Proves: two conversions of a mixed range in opposite directions, each of which finds a page on its side
/// already, both come to their ends, and leave the range to one of them; whichever page comes first.
#[test]
fn opposite_directions_of_a_mixed_range() {
    for private in [pages(0..1), pages(1..2)] {
        explore_on(&[2, 3], move |levels| {
            let world = World::of_pages(2, levels, Shared);
            world.convert(&world.reader(), private, Private).unwrap();
            let (opened, closed) = together(
                &world,
                |world, reader| convert(world, reader, pages(0..2), Shared),
                |world, reader| convert(world, reader, pages(0..2), Private),
            );
            assert_eq!((opened, closed), (Ok(()), Ok(())));
            let [first, second] = [0, 1].map(|at| world.tree.load(page(at)));
            assert_eq!(first, second, "no order of the two");
            world.expect_whole();
        });
    }
}

/// Proves: the same of ranges that overlap across a block border, so that splits race with freezes.
#[test]
fn opposite_directions_across_a_border() {
    explore_on(&[2], |levels| {
        let world = World::of_pages(4, levels, Shared);
        world.convert(&world.reader(), pages(2..4), Private).unwrap();
        let (opened, closed) = together(
            &world,
            |world, reader| convert(world, reader, pages(1..4), Shared),
            |world, reader| convert(world, reader, pages(0..3), Private),
        );
        assert_eq!((opened, closed), (Ok(()), Ok(())));
        let [one, two] = [1, 2].map(|at| world.tree.load(page(at)));
        assert_eq!(one, two, "no order of the two");
        world.expect_idle(pages(0..1), Private);
        world.expect_idle(pages(3..4), Shared);
        world.expect_whole();
    });
}

/// Proves: a conversion with time to wait and one without, of ranges that overlap: the first comes to its
/// end, whatever becomes of the second.
#[test]
fn with_and_without_time() {
    explore_on(&[2, 3], |levels| {
        let world = World::of_pages(3, levels, Shared);
        let (hasty, patient) = together(
            &world,
            |world, reader| world.convert(reader, pages(1..3), Private),
            |world, reader| convert(world, reader, pages(0..2), Private),
        );
        assert_eq!(patient, Ok(()));
        if let Err(stop) = hasty {
            assert!(matches!(stop, Stop::At(_, Refusal::Converting)), "{stop:?}");
        }
        world.expect_whole();
    });
}
