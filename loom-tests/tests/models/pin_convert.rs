//! A pin against a conversion to private: one of the two has the memory, whole.

use gmem::modelled::{Flaw, LoneWord, Refusal, Stop, Visibility, Word};
use loom::thread;
use loom_tests::{
    Memory, World, explore, explore_words, must_be_caught, must_notice, page, pages,
    three_together, together,
};
use std::sync::Arc;

use crate::{MISTAKEN, RACE};

/// Proves: of a pin and a conversion of the same two pages at least one gets both pages; they are
/// never in them together; and the one that is refused says why and leaves nothing behind.
#[test]
fn same_range() {
    explore_words(of_same_range);
}

fn of_same_range() {
    let world = World::flat(2, Visibility::Shared);
    let (pinned, converted) = together(
        &world,
        |world, reader| world.read_pinned(reader, pages(0..2)),
        |world, reader| world.convert_without_readers(reader, pages(0..2), Visibility::Private),
    );

    match (pinned, converted) {
        (Err(pin), Err(convert)) => panic!("both refused: {pin:?}, {convert:?}"),
        (Ok(_), Err(stop)) => {
            // Page 1, if the pin was being dropped and had given back page 0 already.
            assert!(matches!(stop, Stop::At(_, Refusal::Pinned(1))), "{stop:?}");
            world.expect_idle(pages(0..2), Visibility::Shared);
            assert_eq!(world.memory.read_all(pages(0..2)), World::HOST);
        }
        (pinned, Ok(())) => {
            if let Err(stop) = pinned {
                let Stop::At(at, Refusal::Converting | Refusal::Private) = stop else {
                    panic!("{stop:?}");
                };
                assert_eq!(at, page(0));
            }
            world.expect_idle(pages(0..2), Visibility::Private);
            assert_eq!(world.memory.read_all(pages(0..2)), World::SECRET);
        }
    }
}

/// Proves: a pin that gets its first page and is refused the second gives the first one back.
#[test]
fn pin_refused_half_way() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        let (pinned, converted) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(0..2)),
            |world, reader| world.convert_without_readers(reader, pages(1..2), Visibility::Private),
        );

        assert!(pinned.is_ok() || converted.is_ok());
        if let Err(stop) = pinned {
            assert!(matches!(stop, Stop::At(at, _) if at == page(1)), "{stop:?}");
        }
        world.expect_idle(pages(0..1), Visibility::Shared);
        world.expect_idle(pages(1..2), visibility_after(converted));
    });
}

/// Proves: a conversion that freezes its first page and is refused the second thaws the first one.
#[test]
fn conversion_refused_half_way() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        let (pinned, converted) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(1..2)),
            |world, reader| world.convert_without_readers(reader, pages(0..2), Visibility::Private),
        );

        assert!(pinned.is_ok() || converted.is_ok());
        if let Err(stop) = converted {
            assert_eq!(stop, Stop::At(page(1), Refusal::Pinned(1)));
        }
        world.expect_idle(pages(0..2), visibility_after(converted));
    });
}

/// Proves: two pins hold the memory together, and a conversion between them still gets all or none.
#[test]
fn two_pins() {
    explore_words(|| {
        let world = World::flat(2, Visibility::Shared);
        let (whole, upper, converted) = three_together(
            &world,
            |world, reader| world.read_pinned(reader, pages(0..2)),
            |world, reader| world.read_pinned(reader, pages(1..2)),
            |world, reader| world.convert_without_readers(reader, pages(0..2), Visibility::Private),
        );

        assert!(whole.is_ok() || upper.is_ok() || converted.is_ok());
        world.expect_idle(pages(0..2), visibility_after(converted));
    });
}

/// Proves: a pin that looked before the memory went private and came back, and that succeeds after,
/// sees the bytes of after: a word that looks the same is not taken for the same moment.
#[test]
fn pin_across_a_round_trip() {
    explore_words(|| {
        let world = World::flat(1, Visibility::Shared);
        let (pinned, [went, came]) = together(
            &world,
            |world, reader| world.read_pinned(reader, pages(0..1)),
            |world, reader| {
                [Visibility::Private, Visibility::Shared]
                    .map(|to| world.convert_without_readers(reader, pages(0..1), to))
            },
        );

        assert!(pinned.is_ok() || went.is_ok());
        assert_eq!(came, Ok(()), "nothing stands in the way of memory that is private or idle");
        world.expect_idle(pages(0..1), Visibility::Shared);
    });
}

fn visibility_after(to_private: Result<(), Stop>) -> Visibility {
    to_private.map_or(Visibility::Shared, |()| Visibility::Private)
}

/// Seed: the words of a tree are written without a look at what they have become.
#[test]
fn canary_written_blindly() {
    must_notice(Flaw::WritesBlindly, MISTAKEN, &[2], |_| of_same_range());
}

type Step = fn(&LoneWord, fn(Word) -> Result<Word, Refusal>) -> Result<Word, Refusal>;

/// One bare word and the bytes behind it; a pin and a conversion that take these steps.
fn one_word(pin: Step, freeze: Step) {
    let world = Arc::new((LoneWord::new(Visibility::Shared), Memory::new(1, World::HOST)));
    let pinner = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let (cell, memory) = &*world;
            if pin(cell, Word::pin).is_ok() {
                memory.read(page(0));
                // Not checked: with a seeded race the pin may be gone.
                let _ = cell.step(Word::unpin);
            }
        })
    };
    let (cell, memory) = &*world;
    if freeze(cell, Word::freeze).is_ok() {
        memory.write(page(0), World::SECRET);
        // Not checked: with a seeded race the freeze may be gone.
        let _ = cell.step(|word| word.publish(Visibility::Private));
    }
    pinner.join().unwrap();
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn bare_words_without_a_seed() {
    explore(|| one_word(LoneWord::step, LoneWord::step));
}

/// Seed: the pin looks and then stores, and overwrites the freeze that came between.
#[test]
fn canary_pin_by_check_then_store() {
    must_be_caught(RACE, || one_word(LoneWord::step_by_check_then_store, LoneWord::step));
}

/// Seed: the freeze looks and then stores, and overwrites the pin that came between.
#[test]
fn canary_freeze_by_check_then_store() {
    must_be_caught(RACE, || one_word(LoneWord::step, LoneWord::step_by_check_then_store));
}
