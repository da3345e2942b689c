//! Who sees whose bytes when memory changes hands: each hand-over is one step of a word.

use gmem::modelled::{LoneWord, Visibility, Wanted, Word};
use loom::thread;
use loom_tests::{
    Memory, World, explore_words, must_be_caught, page, pages, three_together, together,
};
use std::sync::Arc;

use crate::RACE;

/// What the holder of a pin leaves.
const DEVICE: u64 = 12;

const TO_PRIVATE: Wanted = Wanted::Other(Visibility::Private);

/// Proves: dropping a pin hands its holder's writes to the freeze that finds no pin.
#[test]
fn unpin_to_freeze() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        let pin = world.pin(&world.reader(), pages(0..2)).unwrap();
        together(
            &world,
            |world, reader| {
                world.memory.write_all(pages(0..2), DEVICE);
                world.unpin(reader, pin);
            },
            |world, reader| {
                if let Ok(frozen) = world.freeze(reader, pages(0..2), TO_PRIVATE) {
                    assert_eq!(world.memory.read_all(pages(0..2)), DEVICE);
                    frozen.release(Visibility::Private);
                }
            },
        );
    });
}

/// Proves: the same of a pin that is counted in the page's own word and dropped there.
#[test]
fn unpin_page_to_freeze() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        let pin = world.pin(&world.reader(), pages(0..1)).unwrap();
        together(
            &world,
            |world, reader| {
                world.memory.write(page(0), DEVICE);
                world.unpin(reader, pin);
            },
            |world, reader| {
                if let Ok(frozen) = world.freeze(reader, pages(0..1), TO_PRIVATE) {
                    assert_eq!(world.memory.read(page(0)), DEVICE);
                    frozen.release(Visibility::Private);
                }
            },
        );
    });
}

/// Proves: the last of two pins to go hands over the writes of the first, too.
#[test]
fn two_unpins_to_freeze() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        // Both hold page 0, whose count orders them; each writes a page of its own.
        let [first, second] = [(); 2].map(|()| world.pin(&world.reader(), pages(0..1)).unwrap());
        three_together(
            &world,
            |world, reader| {
                world.memory.write(page(0), DEVICE);
                world.unpin(reader, first);
            },
            |world, reader| {
                world.memory.write(page(1), DEVICE);
                world.unpin(reader, second);
            },
            |world, reader| {
                if let Ok(frozen) = world.freeze(reader, pages(0..1), TO_PRIVATE) {
                    assert_eq!(world.memory.read_all(pages(0..2)), DEVICE);
                    frozen.release(Visibility::Private);
                }
            },
        );
    });
}

/// Proves: an exclusive pin hands its holder's writes to whoever comes next, a freeze or a pin.
#[test]
fn exclusive_to_next() {
    explore_words(|| {
        let world = World::flat(1, Visibility::Shared);
        world.tree.pin_exclusive(&world.reader(), pages(0..1)).unwrap();
        three_together(
            &world,
            |world, reader| {
                world.memory.write(page(0), DEVICE);
                world.tree.unpin_exclusive(reader, pages(0..1));
            },
            |world, reader| {
                if let Ok(seen) = world.read_pinned(reader, pages(0..1)) {
                    assert_eq!(seen, DEVICE);
                }
            },
            |world, reader| {
                if let Ok(frozen) = world.freeze(reader, pages(0..1), TO_PRIVATE) {
                    assert_eq!(world.memory.read(page(0)), DEVICE);
                    frozen.release(Visibility::Private);
                }
            },
        );
    });
}

/// Proves: whoever pins memory that a conversion made shared sees the bytes that it prepared.
#[test]
fn publish_to_pin() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Private);
        together(
            &world,
            |world, reader| {
                if let Ok(seen) = world.read_pinned(reader, pages(0..2)) {
                    assert_eq!(seen, World::PREPARED);
                }
            },
            |world, reader| {
                let all = pages(0..2);
                world.convert_without_readers(reader, all, Visibility::Shared).unwrap();
            },
        );
        world.expect_idle(pages(0..2), Visibility::Shared);
    });
}

/// Proves: an access that finds the memory shared sees the bytes that the conversion prepared.
#[test]
fn publish_to_reader() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Private);
        let (seen, ()) = together(
            &world,
            |world, reader| world.read_in_section(reader, pages(0..2)),
            |world, reader| {
                let all = pages(0..2);
                world.convert_without_readers(reader, all, Visibility::Shared).unwrap();
            },
        );
        assert!(matches!(seen, None | Some(World::PREPARED)), "{seen:?}");
    });
}

/// Proves: a conversion that is undone hands back the memory with all that was done to it; a pin
/// that gets it sees that, and nothing of what was there in between.
#[test]
fn thaw_to_pin() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        together(
            &world,
            |world, reader| {
                if let Ok(seen) = world.read_pinned(reader, pages(0..2)) {
                    assert_eq!(seen, World::HOST);
                }
            },
            |world, reader| {
                if let Ok(frozen) = world.freeze(reader, pages(0..2), TO_PRIVATE) {
                    world.memory.write_all(pages(0..2), World::SECRET);
                    world.memory.write_all(pages(0..2), World::HOST);
                    frozen.thaw();
                }
            },
        );
        world.expect_idle(pages(0..2), Visibility::Shared);
    });
}

/// Seed: the pin is dropped before its holder is done.
#[test]
fn canary_unpin_before_the_write() {
    must_be_caught(RACE, || {
        let world = World::flat(2, Visibility::Shared);
        let pin = world.pin(&world.reader(), pages(0..1)).unwrap();
        together(
            &world,
            |world, reader| {
                world.unpin(reader, pin);
                world.memory.write(page(0), DEVICE);
            },
            |world, reader| {
                let first = pages(0..1);
                let _ = world.convert_without_readers(reader, first, Visibility::Private);
            },
        );
    });
}

/// Seed: the words are published before the bytes are prepared.
#[test]
fn canary_publish_before_the_bytes() {
    must_be_caught(RACE, || {
        let shared = (LoneWord::new(Visibility::Private), Memory::new(1, World::SECRET));
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
