//! Transient accesses against a conversion: an access takes nothing, so the conversion waits for it.
//!
//! Readers are registered before the threads part, except where registering is the question, and
//! go when the model does: the lock around their list would order more than a section does.

use gmem::modelled::{Flaw, Reader, Visibility, Wanted};
use loom::thread;
use loom_tests::{
    World, explore, explore_on, must_be_caught, must_notice, page, pages, three_together, together,
};
use std::sync::Arc;

use crate::RACE;

/// What the host writes in a transient access.
const WRITTEN: u64 = 11;

const TO_PRIVATE: Wanted = Wanted::Other(Visibility::Private);

/// Proves: an access sees the bytes of before, or is refused; it never sees a byte written after the
/// memory turned private. And it never makes a conversion fail.
#[test]
fn read() {
    explore(|| read_of(&World::flat(2, Visibility::Shared)));
}

/// Proves: the same of a block that is one word.
#[test]
fn read_of_a_block() {
    explore_on(&[2, 3], |levels| read_of(&World::uniform(levels, Visibility::Shared)));
}

fn read_of(world: &Arc<World>) {
    let (seen, ()) = together(
        world,
        |world, reader| world.read_in_section(reader, world.all()),
        |world, reader| {
            world.convert(reader, world.all(), Visibility::Private).expect("an access is no pin");
        },
    );

    assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
    world.expect_idle(world.all(), Visibility::Private);
    assert_eq!(world.memory.read_all(world.all()), World::SECRET);
}

/// Proves: an access to one part of a block is not disturbed by the conversion of another part, which
/// splits the block, and an access to that part sees the bytes of before or is refused.
#[test]
fn read_beside_a_split() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let ([kept, taken], ()) = together(
            &world,
            |world, reader| {
                [pages(0..1), pages(1..2)].map(|range| world.read_in_section(reader, range))
            },
            |world, reader| world.convert(reader, pages(1..2), Visibility::Private).unwrap(),
        );

        assert_eq!(kept, Some(World::HOST));
        assert!(matches!(taken, None | Some(World::HOST)), "{taken:?}");
        world.expect_whole();
    });
}

/// Proves: a conversion keeps what an access wrote before, or the access is refused and wrote nothing.
#[test]
fn write() {
    explore(|| write_to(&World::flat(2, Visibility::Shared)));
}

/// Proves: the same of a block that is one word.
#[test]
fn write_to_a_block() {
    explore_on(&[2, 3], |levels| write_to(&World::uniform(levels, Visibility::Shared)));
}

fn write_to(world: &Arc<World>) {
    let (written, kept) = together(
        world,
        |world, reader| world.write_in_section(reader, world.all(), WRITTEN).is_some(),
        |world, reader| {
            let mut frozen = world.freeze(reader, world.all(), TO_PRIVATE).unwrap();
            assert!(frozen.wait_for_sections(reader));
            let kept = world.memory.read_all(world.all());
            frozen.release(Visibility::Private);
            kept
        },
    );
    assert_eq!(kept, if written { WRITTEN } else { World::HOST });
}

/// Proves: the grace period covers each of several sections in a row. The conversion waits for one of
/// them and may learn that it has ended from the next one's mark.
#[test]
fn sections_in_a_row() {
    explore(|| {
        let world = World::flat(1, Visibility::Shared);
        let (seen, ()) = together(
            &world,
            |world, reader| [(); 2].map(|()| world.read_in_section(reader, pages(0..1))),
            |world, reader| world.convert(reader, pages(0..1), Visibility::Private).unwrap(),
        );

        let host = Some(World::HOST);
        assert!([[host, host], [host, None], [None, None]].contains(&seen), "{seen:?}");
    });
}

/// Proves: a section inside another neither ends the outer one nor hides it.
#[test]
fn sections_nest() {
    explore(|| {
        let world = World::flat(1, Visibility::Shared);
        let (seen, ()) = together(
            &world,
            |world, reader| {
                let _outer = reader.enter();
                let open = world.tree.check_open(pages(0..1)).is_ok();
                world.read_in_section(reader, pages(0..1));
                open.then(|| world.memory.read(page(0)))
            },
            |world, reader| world.convert(reader, pages(0..1), Visibility::Private).unwrap(),
        );

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
    });
}

/// Proves: a conversion waits for all readers, not just for the first it finds.
#[test]
fn two_readers() {
    explore(|| {
        let world = World::flat(1, Visibility::Shared);
        let (first, second, ()) = three_together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..1)),
            |world, reader| world.read_in_section(reader, pages(0..1)),
            |world, reader| world.convert(reader, pages(0..1), Visibility::Private).unwrap(),
        );
        for seen in [first, second] {
            assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        }
    });
}

/// Proves: an access during a round trip sees the bytes of before or those of after, and never what
/// was there in between.
#[test]
fn round_trip() {
    explore(|| {
        let world = World::flat(1, Visibility::Shared);
        let (seen, ()) = together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..1)),
            |world, reader| {
                world.convert(reader, pages(0..1), Visibility::Private).unwrap();
                world.convert(reader, pages(0..1), Visibility::Shared).unwrap();
            },
        );

        assert!(matches!(seen, None | Some(World::HOST | World::PREPARED)), "{seen:?}");
    });
}

/// Proves: two conversions may wait at the same time, each for a reader of either's pages.
#[test]
fn two_conversions_wait() {
    explore(|| {
        let world = World::flat(2, Visibility::Shared);
        let (seen, upper, lower) = three_together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..2)),
            |world, reader| world.convert(reader, pages(1..2), Visibility::Private),
            |world, reader| world.convert(reader, pages(0..1), Visibility::Private),
        );
        assert_eq!((lower, upper), (Ok(()), Ok(())));

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        world.expect_idle(pages(0..2), Visibility::Private);
    });
}

/// Proves: a reader that registers while a conversion is under way, which skips the barrier if it finds
/// nobody else, is either waited for or sees the frozen words; and one that goes away meanwhile is
/// not waited for any more.
#[test]
fn registration() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Visibility::Shared);
        let own = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.read_in_section(&world.reader(), world.all()))
        };
        world.convert(&own, world.all(), Visibility::Private).unwrap();
        let seen = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        world.expect_idle(world.all(), Visibility::Private);
    });
}

/// Proves: as above with one reader there from the start and one that comes and goes.
#[test]
fn registration_beside_a_reader() {
    explore(|| {
        let world = World::flat(1, Visibility::Shared);
        let [own, reader] = [world.reader(), world.reader()];
        let settled = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..1)), reader))
        };
        let newcomer = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.read_in_section(&world.reader(), pages(0..1)))
        };
        world.convert(&own, pages(0..1), Visibility::Private).unwrap();
        let (first, _reader) = settled.join().unwrap();
        for seen in [first, newcomer.join().unwrap()] {
            assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        }
    });
}

type Read = fn(&World, &Reader);
type Convert = fn(&World, &Reader);

/// A read and a conversion of one page in these ways.
fn one_page(read: Read, convert: Convert) {
    let world = World::flat(1, Visibility::Shared);
    together(&world, read, convert);
}

fn properly(world: &World, reader: &Reader) {
    world.read_in_section(reader, pages(0..1));
}

fn convert(world: &World, reader: &Reader) {
    world.convert(reader, pages(0..1), Visibility::Private).unwrap();
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn one_page_without_a_seed() {
    explore(|| one_page(properly, convert));
}

/// Seed: the conversion has no grace period at all.
#[test]
fn canary_no_grace_period() {
    must_be_caught(RACE, || {
        one_page(properly, |world, reader| {
            world.convert_without_readers(reader, pages(0..1), Visibility::Private).unwrap();
        });
    });
}

/// Seed: sections without a fence on either side.
#[test]
fn canary_sections_without_fences() {
    must_notice(Flaw::SectionsWithoutFences, RACE, &[2, 3], |levels| {
        read_of(&World::uniform(levels, Visibility::Shared));
    });
}

/// Seed: the conversion has the fence of a grace period, and does not look who is inside.
#[test]
fn canary_fence_without_wait() {
    must_be_caught(RACE, || {
        one_page(properly, |world, reader| {
            let frozen = world.freeze(reader, pages(0..1), TO_PRIVATE).unwrap();
            fence_as_wait_does();
            world.memory.write_all(pages(0..1), World::SECRET);
            frozen.release(Visibility::Private);
        });
    });
}

/// Seed: the conversion waits first and freezes after that; nothing else is missing.
#[test]
fn canary_wait_before_freeze() {
    must_be_caught(RACE, || {
        one_page(properly, |world, reader| {
            assert!(reader.wait_for_others());
            let frozen = world.freeze(reader, pages(0..1), TO_PRIVATE).unwrap();
            fence_as_wait_does();
            world.memory.write_all(pages(0..1), World::SECRET);
            frozen.release(Visibility::Private);
        });
    });
}

fn fence_as_wait_does() {
    // SeqCst: pairs with the fence in `Reader::enter`.
    loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Seed: the access looks at the words and enters its section after that.
#[test]
fn canary_check_before_enter() {
    let faulty: Read = |world, reader| {
        if world.tree.check_open(pages(0..1)).is_ok() {
            let _section = reader.enter();
            world.memory.read_all(pages(0..1));
        }
    };
    must_be_caught(RACE, move || one_page(faulty, convert));
}

/// Seed: the access leaves its section before it copies.
#[test]
fn canary_copy_after_leave() {
    let faulty: Read = |world, reader| {
        let section = reader.enter();
        let open = world.tree.check_open(pages(0..1)).is_ok();
        drop(section);
        if open {
            world.memory.read_all(pages(0..1));
        }
    };
    must_be_caught(RACE, move || one_page(faulty, convert));
}
