//! An exclusive pin against everybody else.

use gmem::modelled::{Flaw, LoneWord, Refusal, Stop, Visibility, Word};
use loom::thread;
use loom_tests::{
    Memory, World, explore, explore_words, must_be_caught, must_notice, page, pages,
    three_together, together,
};
use std::sync::Arc;

use crate::{MISTAKEN, RACE};

/// What the holder of an exclusive pin leaves.
const OWNED: u64 = 10;

/// Proves: of an exclusive pin and a pin of the same two pages at least one gets both pages, they
/// never hold a page together, and the one refused leaves nothing behind.
#[test]
fn against_pin() {
    explore_words(with_pin);
}

fn with_pin() {
    let world = World::flat(2, Visibility::Shared);
    let (pinned, owned) = together(
        &world,
        |world, reader| world.read_pinned(reader, pages(0..2)),
        |world, reader| world.write_owned(reader, pages(0..2), OWNED),
    );

    match (owned, pinned) {
        (Err(own), Err(pin)) => panic!("both refused: {own:?}, {pin:?}"),
        (Err(own), Ok(_)) => {
            assert!(matches!(own, Stop::At(_, Refusal::Pinned(1))), "{own:?}");
            assert_eq!(world.memory.read_all(pages(0..2)), World::HOST);
        }
        (Ok(()), pinned) => {
            if let Err(pin) = pinned {
                assert!(matches!(pin, Stop::At(_, Refusal::Exclusive)), "{pin:?}");
            }
            assert_eq!(world.memory.read_all(pages(0..2)), OWNED);
        }
    }
    world.expect_idle(pages(0..2), Visibility::Shared);
}

/// Proves: two exclusive pins whose ranges overlap never hold a page together; one of them wins.
#[test]
fn against_exclusive() {
    explore_words(with_exclusive);
}

fn with_exclusive() {
    let world = World::flat(3, Visibility::Shared);
    let (second, first) = together(
        &world,
        |world, reader| world.write_owned(reader, pages(1..3), OWNED),
        |world, reader| world.write_owned(reader, pages(0..2), OWNED),
    );

    assert!(first.is_ok() || second.is_ok(), "both refused: {first:?}, {second:?}");
    for stop in [first, second].into_iter().filter_map(Result::err) {
        assert!(matches!(stop, Stop::At(_, Refusal::Exclusive)), "{stop:?}");
    }
    world.expect_idle(pages(0..3), Visibility::Shared);
}

/// Proves: an exclusive pin keeps a conversion out and the other way round; one of them wins.
#[test]
fn against_conversion() {
    explore_words(with_conversion);
}

fn with_conversion() {
    let world = World::flat(2, Visibility::Shared);
    let (owned, converted) = together(
        &world,
        |world, reader| world.write_owned(reader, pages(0..2), OWNED),
        |world, reader| world.convert_without_readers(reader, pages(0..2), Visibility::Private),
    );

    match (owned, converted) {
        (Err(own), Err(convert)) => panic!("both refused: {own:?}, {convert:?}"),
        (Ok(()), Err(stop)) => {
            assert!(matches!(stop, Stop::At(_, Refusal::Exclusive)), "{stop:?}");
            world.expect_idle(pages(0..2), Visibility::Shared);
            assert_eq!(world.memory.read_all(pages(0..2)), OWNED);
        }
        (_, Ok(())) => {
            world.expect_idle(pages(0..2), Visibility::Private);
            assert_eq!(world.memory.read_all(pages(0..2)), World::SECRET);
        }
    }
}

/// Proves: with a pin, an exclusive pin and a conversion at the same page, each is alone or refused,
/// and at least one is not.
#[test]
fn all_three() {
    explore_words(|| {
        let world = World::flat(1, Visibility::Shared);
        let all = pages(0..1);
        let (pinned, owned, converted) = three_together(
            &world,
            move |world, reader| world.read_pinned(reader, all),
            move |world, reader| world.write_owned(reader, all, OWNED),
            |world, reader| world.convert_without_readers(reader, all, Visibility::Private),
        );

        assert!(pinned.is_ok() || owned.is_ok() || converted.is_ok());
        let after = converted.map_or(Visibility::Shared, |()| Visibility::Private);
        world.expect_idle(all, after);
    });
}

/// Seed: the words of a tree are written without a look at what they have become.
#[test]
fn canary_written_blindly() {
    for model in [with_pin, with_exclusive, with_conversion] {
        must_notice(Flaw::WritesBlindly, MISTAKEN, &[2], move |_| model());
    }
}

type Step = fn(&LoneWord, fn(Word) -> Result<Word, Refusal>) -> Result<Word, Refusal>;

/// One bare word and the bytes behind it; a pin and an exclusive pin that take these steps.
fn one_word(pin: Step, own: Step) {
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
    if own(cell, Word::pin_exclusive).is_ok() {
        memory.write(page(0), OWNED);
        // Not checked: with a seeded race the pin may be gone.
        let _ = cell.step(Word::unpin_exclusive);
    }
    pinner.join().unwrap();
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn bare_words_without_a_seed() {
    explore(|| one_word(LoneWord::step, LoneWord::step));
}

/// Seed: the exclusive pin looks and then stores, and overwrites the pin that came between.
#[test]
fn canary_exclusive_by_check_then_store() {
    must_be_caught(RACE, || one_word(LoneWord::step, LoneWord::step_by_check_then_store));
}

/// Seed: the pin looks and then stores, and overwrites the exclusive pin that came between.
#[test]
fn canary_pin_by_check_then_store() {
    must_be_caught(RACE, || one_word(LoneWord::step_by_check_then_store, LoneWord::step));
}
