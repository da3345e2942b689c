//! Two conversions whose ranges overlap: ascending order and the undoing of what was frozen.

use gmem::modelled::{Flaw, Frozen, LoneWord, Reader, Refusal, Stop, Visibility, Wanted, Word};
use gmem::range::PgoffRange;
use loom::thread;
use loom_tests::{
    Memory, World, explore, explore_words, must_be_caught, must_notice, page, pages,
    three_together, together,
};
use std::ops::Range;
use std::sync::Arc;

use crate::{MISTAKEN, RACE};

/// Converts to private and counts, in the bytes, how often each page was changed.
fn to_private(world: &World, reader: &Reader, range: PgoffRange) -> Result<(), Stop> {
    let frozen = world.freeze(reader, range, Wanted::Other(Visibility::Private))?;
    change(world, frozen);
    Ok(())
}

fn change(world: &World, frozen: Frozen<'_>) {
    for page in frozen.runs().iter().flat_map(PgoffRange::iter) {
        world.memory.write(page, world.memory.read(page) + 1);
    }
    frozen.release(Visibility::Private);
}

/// The same, but the last page is frozen first.
fn from_above(world: &World, reader: &Reader, range: PgoffRange) -> Result<(), Stop> {
    let mut frozen = Vec::new();
    for at in (range.start().get()..range.end().get()).rev() {
        match world.freeze(reader, pages(at..at + 1), Wanted::Other(Visibility::Private)) {
            Ok(page) => frozen.push(page),
            Err(stop) => {
                frozen.into_iter().for_each(Frozen::thaw);
                return Err(stop);
            }
        }
    }
    frozen.into_iter().for_each(|page| change(world, page));
    Ok(())
}

/// Checks that each page was changed once if it is private, and never if it is not.
fn expect_changed(world: &World, nr_pages: u64, is_private: impl Fn(u64) -> bool) {
    for at in 0..nr_pages {
        let (visibility, nr_changes) =
            if is_private(at) { (Visibility::Private, 1) } else { (Visibility::Shared, 0) };
        world.expect_idle(pages(at..at + 1), visibility);
        assert_eq!(world.memory.read(page(at)), World::HOST + nr_changes, "page {at}");
    }
}

/// Proves: of two conversions in the same direction whose ranges overlap, in one page or in two, each gets
/// all or nothing, a page that both want is changed once, and they are not both refused: whoever has the
/// first such page meets nobody further up.
#[test]
fn same_direction() {
    explore_words(|| in_same_direction(0..2, to_private));
    explore_words(|| in_same_direction(0..3, to_private));
}

/// A conversion of 1..3 in this way, and one of these pages.
fn in_same_direction(lower_pages: Range<u64>, convert_upper: Convert) {
    // Part of a larger block: what is private already does not come along.
    let world = World::flat(4, Visibility::Shared);
    let end = lower_pages.end;
    let (upper, lower) = together(
        &world,
        move |world, reader| convert_upper(world, reader, pages(1..3)),
        |world, reader| to_private(world, reader, pages(lower_pages)),
    );

    for stop in [lower, upper].into_iter().filter_map(Result::err) {
        let Stop::At(at, Refusal::Converting) = stop else { panic!("{stop:?}") };
        assert!((1..end).contains(&at.get()), "{stop:?}");
    }
    assert!(lower.is_ok() || upper.is_ok(), "both refused");
    let is_private = |at| lower.is_ok() && at < end || upper.is_ok() && (1..3).contains(&at);
    expect_changed(&world, 4, is_private);
}

type Convert = fn(&World, &Reader, PgoffRange) -> Result<(), Stop>;

/// Seed: the words of a tree are written without a look at what they have become.
#[test]
fn canary_tree_written_blindly() {
    must_notice(Flaw::WritesBlindly, MISTAKEN, &[2], |_| in_same_direction(0..2, to_private));
}

/// Seed: who is refused leaves frozen what it has frozen.
#[test]
fn canary_gives_up_without_undoing() {
    let left = "Converting";
    must_notice(Flaw::GivesUpWithoutUndoing, left, &[2], |_| in_same_direction(0..2, to_private));
    must_notice(Flaw::GivesUpWithoutUndoing, left, &[2], |_| in_opposite_directions());
}

/// Seed: one of the two goes down instead of up.
#[test]
fn canary_tree_in_descending_order() {
    must_be_caught("both refused", || in_same_direction(0..3, from_above));
}

/// Proves: two conversions of 0..2 and 1..3 in opposite directions end as if one had come after the
/// other, or as if the one refused had never been; they are not both refused.
#[test]
fn opposite_directions() {
    explore_words(in_opposite_directions);
}

fn in_opposite_directions() {
    let world = World::flat(3, Visibility::Shared);
    let reader = world.reader();
    world.convert_without_readers(&reader, pages(1..3), Visibility::Private).unwrap();
    let (opened, closed) = together(
        &world,
        |world, reader| world.convert_without_readers(reader, pages(1..3), Visibility::Shared),
        |world, reader| world.convert_without_readers(reader, pages(0..2), Visibility::Private),
    );

    use Visibility::{Private, Shared};
    let words = [0, 1, 2].map(|at| world.tree.load(page(at)).unwrap());
    let expected: &[[Visibility; 3]] = match (closed, opened) {
        (Ok(()), Ok(())) => &[[Private, Private, Shared], [Private, Shared, Shared]],
        (Ok(()), Err(_)) => &[[Private, Private, Private]],
        (Err(_), Ok(())) => &[[Shared, Shared, Shared]],
        (Err(_), Err(_)) => panic!("both refused: {closed:?}, {opened:?}"),
    };
    assert!(expected.iter().any(|row| words == row.map(Word::new)), "{words:?}");
}

/// Proves: of two conversions of the same mixed range in opposite directions at most one succeeds
/// beside the other, so that the range is never left mixed by both. Each leaves alone the page that
/// is on its side already, so they meet on no page that either freezes.
#[test]
fn opposite_directions_of_a_mixed_range() {
    explore_words(of_a_mixed_range);
}

fn of_a_mixed_range() {
    // Part of a larger block, so that neither may take along what it leaves alone.
    let world = World::flat(3, Visibility::Shared);
    let all = pages(0..2);
    let reader = world.reader();
    world.convert_without_readers(&reader, pages(1..2), Visibility::Private).unwrap();
    let (opened, closed) = together(
        &world,
        move |world, reader| world.convert_without_readers(reader, all, Visibility::Shared),
        move |world, reader| world.convert_without_readers(reader, all, Visibility::Private),
    );
    let [first, second] = [0, 1].map(|at| world.tree.load(page(at)).unwrap());
    let in_order = first == second || closed.is_err() || opened.is_err();
    assert!(in_order, "no order of the two: {first:?}, {second:?}");
}

/// Seed: a conversion does not look again at what it left alone.
#[test]
fn canary_looks_once() {
    must_notice(Flaw::LooksOnce, "no order of the two", &[2], |_| of_a_mixed_range());
}

/// Proves: a pin of the page between two conversions leaves each of the three all or nothing.
#[test]
fn with_a_pin_between() {
    explore_words(|| {
        let world = World::flat(3, Visibility::Shared);
        let (upper, pinned, lower) = three_together(
            &world,
            |world, reader| to_private(world, reader, pages(1..3)),
            |world, reader| {
                let seen = world.read_pinned(reader, pages(1..2))?;
                assert_eq!(seen, World::HOST);
                Ok::<_, Stop>(())
            },
            |world, reader| to_private(world, reader, pages(0..2)),
        );

        assert!(lower.is_ok() || upper.is_ok() || pinned.is_ok());
        expect_changed(&world, 3, |at| (lower.is_ok() && at < 2) || (upper.is_ok() && at > 0));
    });
}

type Step = fn(&LoneWord, fn(Word) -> Result<Word, Refusal>) -> Result<Word, Refusal>;

/// Bare words and the bytes behind them.
struct Bare {
    cells: [LoneWord; 2],
    memory: Memory,
}

/// Freezes the cells in this order with these steps; changes the bytes and publishes, or thaws.
fn convert_bare(bare: &Bare, order: &[usize], freeze: Step) -> Result<(), Refusal> {
    for (nr_frozen, &at) in order.iter().enumerate() {
        if let Err(refusal) = freeze(&bare.cells[at], Word::freeze) {
            for &at in &order[..nr_frozen] {
                // Not checked: with a seeded race the freeze may be gone.
                let _ = bare.cells[at].step(Word::thaw);
            }
            return Err(refusal);
        }
    }
    for &at in order {
        bare.memory.write(page(at as u64), World::SECRET);
        // Not checked: with a seeded race the freeze may be gone.
        let _ = bare.cells[at].step(|word| word.publish(Visibility::Private));
    }
    Ok(())
}

/// Two conversions of two bare words, the second in this order.
fn two_words(freeze: Step, order: &'static [usize]) {
    let bare = Arc::new(Bare {
        cells: [(); 2].map(|()| LoneWord::new(Visibility::Shared)),
        memory: Memory::new(2, World::HOST),
    });
    let other = {
        let bare = Arc::clone(&bare);
        thread::spawn(move || convert_bare(&bare, order, freeze))
    };
    let one = convert_bare(&bare, &[0, 1], freeze);
    let other = other.join().unwrap();
    assert!(one.is_ok() || other.is_ok(), "both refused");
}

/// Shows that the canaries below die of their seeds: the same model without one passes.
#[test]
fn bare_words_without_a_seed() {
    explore(|| two_words(LoneWord::step, &[0, 1]));
}

/// Seed: the freeze looks and then stores, so that two conversions hold the same page.
#[test]
fn canary_freeze_by_check_then_store() {
    must_be_caught(RACE, || two_words(LoneWord::step_by_check_then_store, &[0, 1]));
}

/// Seed: one of the two goes down instead of up; each then takes what the other needs.
#[test]
fn canary_descending_order() {
    must_be_caught("both refused", || two_words(LoneWord::step, &[1, 0]));
}
