//! Who sees whose bytes when memory changes hands: each hand-over is one step of a word.

use gmem::modelled::{StateCell, Visibility, Word};
use loom::thread;
use loom_tests::{Memory, World, explore, must_be_caught, page, pages};
use std::sync::Arc;

use crate::RACE;

/// What the holder of a pin leaves.
const DEVICE: u64 = 12;

/// Proves: dropping a pin hands its holder's writes to the freeze that finds no pin.
#[test]
fn unpin_to_freeze() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        world.table.pin(pages(0..2)).unwrap();
        let device = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.memory.write_all(pages(0..2), DEVICE);
                world.table.unpin(pages(0..2));
            })
        };
        let frozen = world.table.freeze_for(pages(0..2), Visibility::Private);
        if let Ok(frozen) = frozen {
            assert_eq!(world.memory.read_all(pages(0..2)), DEVICE);
            frozen.release(Visibility::Private);
        }
        device.join().unwrap();
    });
}

/// Proves: the last of two pins to go hands over the writes of the first, too.
#[test]
fn two_unpins_to_freeze() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let devices = [0, 1].map(|at| {
            // Both hold page 0, whose count orders them; each writes a page of its own.
            world.table.pin(pages(0..1)).unwrap();
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.memory.write(page(at), DEVICE);
                world.table.unpin(pages(0..1));
            })
        });
        if let Ok(frozen) = world.table.freeze_for(pages(0..1), Visibility::Private) {
            assert_eq!(world.memory.read_all(pages(0..2)), DEVICE);
            frozen.release(Visibility::Private);
        }
        devices.into_iter().for_each(|device| device.join().unwrap());
    });
}

/// Proves: an exclusive pin hands its holder's writes to whoever comes next, a freeze or a pin.
#[test]
fn exclusive_to_next() {
    explore(|| {
        let world = World::new(1, Visibility::Shared);
        world.table.pin_exclusive(pages(0..1)).unwrap();
        let owner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.memory.write(page(0), DEVICE);
                world.table.unpin_exclusive(pages(0..1));
            })
        };
        let pinner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                if world.table.pin(pages(0..1)).is_ok() {
                    assert_eq!(world.memory.read(page(0)), DEVICE);
                    world.table.unpin(pages(0..1));
                }
            })
        };
        if let Ok(frozen) = world.table.freeze_for(pages(0..1), Visibility::Private) {
            assert_eq!(world.memory.read(page(0)), DEVICE);
            frozen.release(Visibility::Private);
        }
        owner.join().unwrap();
        pinner.join().unwrap();
    });
}

/// Proves: whoever pins memory that a conversion made shared sees the bytes that it prepared.
#[test]
fn publish_to_pin() {
    explore(|| {
        let world = World::new(2, Visibility::Private);
        let pinner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                if world.table.pin(pages(0..2)).is_ok() {
                    assert_eq!(world.memory.read_all(pages(0..2)), World::PREPARED);
                    world.table.unpin(pages(0..2));
                }
            })
        };
        world.convert_without_readers(pages(0..2), Visibility::Shared).unwrap();
        pinner.join().unwrap();
        world.expect_idle(pages(0..2), Visibility::Shared);
    });
}

/// Proves: an access that finds the memory shared sees the bytes that the conversion prepared.
#[test]
fn publish_to_reader() {
    explore(|| {
        let world = World::new(2, Visibility::Private);
        let reader = world.reader();
        let host = {
            let world = Arc::clone(&world);
            thread::spawn(move || (world.read_in_section(&reader, pages(0..2)), reader))
        };
        world.convert_without_readers(pages(0..2), Visibility::Shared).unwrap();
        let (seen, _reader) = host.join().unwrap();
        assert!(matches!(seen, None | Some(World::PREPARED)), "{seen:?}");
    });
}

/// Proves: a conversion that is undone hands back the memory with all that was done to it; a pin
/// that gets it sees that, and nothing of what was there in between.
#[test]
fn thaw_to_pin() {
    explore(|| {
        let world = World::new(2, Visibility::Shared);
        let pinner = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                if world.table.pin(pages(0..2)).is_ok() {
                    assert_eq!(world.memory.read_all(pages(0..2)), World::HOST);
                    world.table.unpin(pages(0..2));
                }
            })
        };
        if let Ok(frozen) = world.table.freeze_for(pages(0..2), Visibility::Private) {
            world.memory.write_all(pages(0..2), World::SECRET);
            world.memory.write_all(pages(0..2), World::HOST);
            frozen.thaw();
        }
        pinner.join().unwrap();
        world.expect_idle(pages(0..2), Visibility::Shared);
    });
}

/// Seed: the pin is dropped before its holder is done.
#[test]
fn canary_unpin_before_the_write() {
    must_be_caught(RACE, || {
        let world = World::new(1, Visibility::Shared);
        world.table.pin(pages(0..1)).unwrap();
        let device = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.table.unpin(pages(0..1));
                world.memory.write(page(0), DEVICE);
            })
        };
        let _ = world.convert_without_readers(pages(0..1), Visibility::Private);
        device.join().unwrap();
    });
}

/// Seed: the words are published before the bytes are prepared.
#[test]
fn canary_publish_before_the_bytes() {
    must_be_caught(RACE, || {
        let shared = (StateCell::new(Visibility::Private), Memory::new(1, World::SECRET));
        let shared = Arc::new(shared);
        let pinner = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (cell, memory) = &*shared;
                if cell.step(Word::pin).is_ok() {
                    memory.read(page(0));
                    cell.step(Word::unpin).unwrap();
                }
            })
        };
        let (cell, memory) = &*shared;
        cell.step(Word::freeze).unwrap();
        cell.step(|word| word.publish(Visibility::Shared)).unwrap();
        memory.write(page(0), World::PREPARED);
        pinner.join().unwrap();
    });
}
