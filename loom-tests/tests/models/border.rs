//! Two conversions whose ranges overlap, where blocks have to be split for it, on either side of the
//! border between two blocks.

use gmem::modelled::{Flaw, Refusal, Stop, Visibility};
use loom_tests::{World, explore_on, explore_words_on, must_notice, page, pages, together};

use crate::MISTAKEN;

use Visibility::{Private, Shared};

/// Proves: of two conversions in one direction each gets all or nothing, one at least gets all, and the
/// other leaves no word behind but splits.
#[test]
fn same_direction() {
    explore_words_on(&[2, 3], same);
}

fn same(levels: u32) {
    let world = World::of_pages(4, levels, Shared);
    let (upper, lower) = together(
        &world,
        |world, reader| world.convert_without_readers(reader, pages(1..4), Private),
        |world, reader| world.convert_without_readers(reader, pages(0..3), Private),
    );
    assert!(lower.is_ok() || upper.is_ok(), "both refused");
    for stop in [lower, upper].into_iter().filter_map(Result::err) {
        assert!(matches!(stop, Stop::At(_, Refusal::Converting)), "{stop:?}");
    }
    let is_private = |at| lower.is_ok() && at < 3 || upper.is_ok() && at > 0;
    for at in 0..4 {
        world.expect_idle(pages(at..at + 1), if is_private(at) { Private } else { Shared });
    }
    world.expect_whole();
}

/// Seed: who has split a block writes its part without a look at what the other has made of it.
#[test]
fn canary_parts_written_blindly() {
    must_notice(Flaw::WritesPartsBlindly, MISTAKEN, &[2, 3], same);
}

/// Two conversions in opposite directions of blocks of which one is shared and one is private.
fn opposite(levels: u32) {
    let world = World::of_pages(4, levels, Shared);
    world.convert(&world.reader(), pages(2..4), Private).unwrap();
    let (opened, closed) = together(
        &world,
        |world, reader| world.convert(reader, pages(1..4), Shared),
        |world, reader| world.convert(reader, pages(0..3), Private),
    );
    let words = [0, 1, 2, 3].map(|at| world.tree.load(page(at)).unwrap().visibility());
    let expected: &[[Visibility; 4]] = match (closed, opened) {
        (Ok(()), Ok(())) => {
            &[[Private, Private, Private, Shared], [Private, Shared, Shared, Shared]]
        }
        (Ok(()), Err(_)) => &[[Private, Private, Private, Private]],
        (Err(_), Ok(())) => &[[Shared, Shared, Shared, Shared]],
        (Err(_), Err(_)) => &[[Shared, Shared, Private, Private]],
    };
    assert!(expected.contains(&words), "no order of the two: {words:?}, {closed:?}, {opened:?}");
    world.expect_whole();
}

/// Proves: two conversions in opposite directions end as if one had come after the other, or as if the one
/// refused had never been.
#[test]
fn opposite_directions() {
    explore_on(&[2, 3], opposite);
}

/// Seed: a conversion does not look again at what it left alone.
#[test]
fn canary_looks_once() {
    must_notice(Flaw::LooksOnce, "no order of the two", &[2, 3], opposite);
    must_notice(Flaw::LooksOnce, "no order of the two", &[2, 3], mixed);
}

/// Two conversions of one mixed block.
fn mixed(levels: u32) {
    let world = World::of_pages(2, levels, Shared);
    world.convert(&world.reader(), pages(1..2), Private).unwrap();
    let (opened, closed) = together(
        &world,
        |world, reader| world.convert(reader, pages(0..2), Shared),
        |world, reader| world.convert(reader, pages(0..2), Private),
    );
    let [first, second] = [0, 1].map(|at| world.tree.load(page(at)));
    let in_order = first == second || closed.is_err() || opened.is_err();
    assert!(in_order, "no order of the two: {first:?}, {second:?}");
    world.expect_whole();
}

/// Proves: two conversions of one mixed block in opposite directions never both succeed and leave it
/// mixed, though they meet on no page that either changes.
#[test]
fn mixed_block() {
    explore_on(&[2, 3], mixed);
}
