//! A pin that goes to the page's own word and not down from the root: a word that is settled speaks.
//!
//! Of the pins in the other files those of a page that has a word take this way, too.

use gmem::modelled::{Counted, Flaw, Stop, Visibility};
use loom_tests::{World, explore_on, explore_words_on, must_notice, page, pages, together};

use Visibility::{Private, Shared};

/// What the holder of a pin leaves.
const DEVICE: u64 = 12;

/// Pins by the page's own word or not at all, and writes the bytes.
fn write_directly(world: &World, reader: &gmem::modelled::Reader, at: u64) -> Result<bool, Stop> {
    let pin = world.tree.pin(reader, pages(at..at + 1))?;
    world.memory.write(page(at), DEVICE);
    match pin {
        Counted::InPage => world.tree.unpin_page(page(at)),
        Counted::InRange => world.tree.unpin(reader, pages(at..at + 1)),
    }
    Ok(pin == Counted::InPage)
}

/// Proves: of such a pin and a conversion of its page one gets what it wants.
#[test]
fn conversion() {
    explore_words_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        world.split(pages(0..2));
        let (pinned, converted) = together(
            &world,
            |world, reader| write_directly(world, reader, 1),
            |world, reader| world.convert_without_readers(reader, pages(0..2), Private),
        );
        assert!(pinned != Ok(false), "it has a word");
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_whole();
    });
}

/// Proves: the same of a conversion that merges the block; a word that was silenced takes no pin.
#[test]
fn merge() {
    explore_on(&[2, 3], |levels| {
        let world = World::uniform(levels, Shared);
        world.split(pages(0..2));
        let (pinned, converted) = together(
            &world,
            |world, reader| write_directly(world, reader, 1),
            |world, reader| world.convert(reader, world.all(), Private),
        );
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_whole();
    });
}

/// Proves: the same when the block is shared again and split again meanwhile, so that its word has come
/// back: the pin holds what the page is now.
#[test]
fn merge_and_split() {
    explore_on(&[2, 3], |levels| {
        let world = World::numbered(levels, Shared, 3);
        world.split(pages(0..2));
        let (pinned, converted) = together(
            &world,
            |world, reader| write_directly(world, reader, 1),
            |world, reader| {
                world.convert(reader, world.all(), Private)?;
                world.convert(reader, pages(1..2), Shared)
            },
        );
        assert!(pinned.is_ok() || converted.is_ok());
        world.expect_whole();
    });
}

/// A pin of a page whose word was never written, under a block that is private and is split meanwhile.
fn never_written_on(levels: u32) {
    let world = World::uniform(levels, Private);
    let (pinned, converted) = together(
        &world,
        |world, reader| write_directly(world, reader, 1),
        |world, reader| world.convert_without_readers(reader, pages(0..1), Shared),
    );
    assert!(pinned.is_err(), "a pin of what is private");
    assert_eq!(converted, Ok(()));
    world.expect_whole();
}

/// Proves: a word that was never written, which looks like one that is shared and idle, takes no pin.
#[test]
fn never_written() {
    explore_words_on(&[2, 3], never_written_on);
}

/// Seed: it does.
#[test]
fn canary_words_that_were_never_written() {
    let symptom = "a pin of what is private|is not held";
    must_notice(Flaw::PinsUnwrittenPages, symptom, &[2, 3], never_written_on);
}
