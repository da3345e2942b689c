//! A change that was given up half way: nobody knows the memory's state, so nobody gets it.

use gmem::modelled::{Refusal, Stop, Visibility};
use gmem::range::PgoffRange;
use loom::thread;
use loom_tests::{World, explore, must_be_caught, page, pages};
use std::sync::Arc;

use crate::RACE;

/// Freezes, waits, changes the bytes of the first page, and gives up, as a panic would.
fn give_up_half_way(world: &World, range: PgoffRange) -> Result<(), Stop> {
    let frozen = world.table.freeze_for(range, Visibility::Private)?;
    world.wait();
    world.memory.write(range.start(), World::SECRET);
    drop(frozen);
    Ok(())
}

/// Checks that each way into the range is refused, and for the right reason.
fn expect_closed(world: &World, range: PgoffRange) {
    world.expect_quarantined(range);
    let stop = Stop::At(range.start(), Refusal::Quarantined);
    assert_eq!(world.table.pin(range), Err(stop));
    assert_eq!(world.table.pin_exclusive(range), Err(stop));
    assert_eq!(world.table.check_open(range), Err(stop));
    for to in [Visibility::Shared, Visibility::Private] {
        assert_eq!(world.table.freeze_for(range, to).err(), Some(stop));
    }
    assert_eq!(world.table.freeze(range).err(), Some(stop));
    world.expect_quarantined(range);
}

/// Proves: a pin has the memory before the freeze, or never again.
#[test]
fn pin() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let pinner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.table.pin(pages(0..2))?;
                assert_eq!(world.memory.read_all(pages(0..2)), World::HOST);
                world.table.unpin(pages(0..2));
                Ok::<_, Stop>(())
            })
        };
        let frozen = give_up_half_way(&world, pages(0..2));
        let pinned = pinner.join().unwrap();

        if let Err(Stop::At(at, refusal)) = pinned {
            assert!(matches!(refusal, Refusal::Converting | Refusal::Quarantined), "{refusal:?}");
            assert_eq!(at, page(0));
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
        let world = World::new(2, Visibility::Shared);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..2)), reader))
        };
        give_up_half_way(&world, pages(0..2)).unwrap();
        let (seen, _reader) = host.join().unwrap();

        assert!(matches!(seen, None | Some(World::HOST)), "{seen:?}");
        expect_closed(&world, pages(0..2));
    });
}

/// Proves: a conversion whose range reaches into memory that is being given up gets all of its range
/// before, or nothing.
#[test]
fn conversion() {
    explore(|| {
        let world = World::new(3, Visibility::Shared);
        let converter = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.convert(pages(0..2), Visibility::Private))
        };
        let frozen = give_up_half_way(&world, pages(1..3));
        let converted = converter.join().unwrap();

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
        let world = World::new(2, Visibility::Shared);
        let host = {
            let (reader, world) = (world.reader(), Arc::clone(&world));
            thread::spawn(move || (world.read_in_section(&reader, pages(0..2)), reader))
        };
        let frozen = world.table.freeze_for(pages(0..2), Visibility::Private).unwrap();
        world.wait();
        world.memory.write(page(0), World::SECRET);
        frozen.thaw();
        drop(host.join().unwrap());
    });
}

/// Seed: the bytes are changed after the memory was given up to somebody else.
#[test]
fn canary_change_after_release() {
    must_be_caught(RACE, || {
        let world = World::new(1, Visibility::Private);
        let pinner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                if world.table.pin(pages(0..1)).is_ok() {
                    world.memory.read(page(0));
                    world.table.unpin(pages(0..1));
                }
            })
        };
        let frozen = world.table.freeze(pages(0..1)).unwrap();
        frozen.release(Visibility::Shared);
        world.memory.write(page(0), World::SECRET);
        pinner.join().unwrap();
    });
}
