//! What the tree does when one thread drives it. What happens between threads is in loom-tests.

use std::time::Duration;

use super::*;
use crate::state::epoch::Domain;
use crate::state::epoch::tests::lasting_domain;
use crate::state::freeze::Wanted;
use crate::state::frozen::Frozen;
use crate::state::waiting::{CancelToken, Wait};

/// A tree, and what it takes to drive it.
pub(super) struct World {
    pub(super) tree: Tree,
    pub(super) reader: Reader,
    pub(super) waiters: Arc<Waiters>,
}

impl World {
    pub(super) fn new(shape: Shape, visibility: Visibility) -> Self {
        let waiters = Arc::new(Waiters::new());
        let domain = lasting_domain();
        let tree = Tree::new(shape, visibility, &waiters).unwrap();
        Self { tree, reader: Domain::register(&domain), waiters }
    }

    /// Blocks of two on three levels: roots of four pages.
    fn small(nr_pages: u64, visibility: Visibility) -> Self {
        Self::new(Shape::small(nr_pages, 1, 3, 3), visibility)
    }

    fn freeze(&self, pages: PgoffRange, to: Visibility) -> Result<Frozen<'_>, Stop> {
        self.tree.freeze(&self.reader, &[pages], Wanted::Other(to), &Wait::never())
    }

    fn convert(&self, pages: PgoffRange, to: Visibility) -> Result<u64, Stop> {
        let mut frozen = self.freeze(pages, to)?;
        assert!(frozen.wait_for_sections(&self.reader));
        let nr_pages = frozen.runs().iter().map(PgoffRange::nr_pages).sum();
        frozen.release(to);
        Ok(nr_pages)
    }

    fn pin(&self, pages: PgoffRange) -> Result<Counted, Stop> {
        self.tree.pin(&self.reader, pages)
    }

    fn unpin(&self, pages: PgoffRange) {
        self.tree.unpin(&self.reader, pages);
    }

    /// The words, each with how many pages it speaks for.
    fn words(&self) -> Vec<(u64, String)> {
        let all = range(0, self.tree.shape().nr_pages());
        self.tree.spans(all).map(|(pages, word)| (pages.nr_pages(), format!("{word:?}"))).collect()
    }
}

pub(super) fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn at(page: u64, refusal: Refusal) -> Stop {
    Stop::At(Pgoff::new(page), refusal)
}

fn says(words: &[(u64, &str)]) -> Vec<(u64, String)> {
    words.iter().map(|&(nr_pages, word)| (nr_pages, String::from(word))).collect()
}

#[test]
fn a_part_that_differs_splits_and_a_whole_that_is_alike_again_merges() {
    let world = World::small(8, Visibility::Private);
    assert_eq!(world.words(), says(&[(4, "Private{Settled}"), (4, "Private{Settled}")]));
    assert_eq!(world.convert(range(1, 1), Visibility::Shared), Ok(1));
    let split = says(&[
        (1, "Private{Settled}"),
        (1, "Shared{Settled}"),
        (2, "Private{Settled}"),
        (4, "Private{Settled}"),
    ]);
    assert_eq!(world.words(), split);
    assert_eq!(world.convert(range(0, 8), Visibility::Private), Ok(1));
    assert_eq!(world.words(), says(&[(4, "Private{Settled}"), (4, "Private{Settled}")]));
    // The same under the next numbers of the split, of which there are only three.
    for _ in 0..7 {
        assert_eq!(world.convert(range(1, 1), Visibility::Shared), Ok(1));
        assert_eq!(world.words(), split);
        assert_eq!(world.convert(range(0, 4), Visibility::Private), Ok(1));
    }
    assert_eq!(world.convert(range(0, 8), Visibility::Shared), Ok(8));
    assert_eq!(world.words(), says(&[(4, "Shared{Settled}"), (4, "Shared{Settled}")]));
}

#[test]
fn a_pin_of_a_whole_block_is_dropped_from_its_parts() {
    let world = World::small(4, Visibility::Shared);
    world.pin(range(0, 4)).unwrap();
    assert_eq!(world.words(), says(&[(4, "Shared{Settled, pins:1}")]));
    world.pin(range(1, 1)).unwrap();
    let words = says(&[
        (1, "Shared{Settled, pins:1}"),
        (1, "Shared{Settled, pins:2}"),
        (2, "Shared{Settled, pins:1}"),
    ]);
    assert_eq!(world.words(), words);
    world.unpin(range(0, 4));
    assert_eq!(world.freeze(range(0, 4), Visibility::Private).unwrap_err(), {
        at(1, Refusal::Pinned(1))
    });
    world.unpin(range(1, 1));
    assert!(world.tree.spans(range(0, 4)).all(|(_, word)| word == Word::new(Visibility::Shared)));
}

#[test]
fn a_page_is_pinned_by_its_own_word_once_it_has_one() {
    let world = World::new(Shape::of_pages(1024), Visibility::Shared);
    assert_eq!(world.pin(range(3, 1)), Ok(Counted::InRange));
    assert_eq!(world.pin(range(3, 1)), Ok(Counted::InPage));
    // Not written yet, so it goes the long way.
    assert_eq!(world.pin(range(4, 1)), Ok(Counted::InRange));
    world.tree.unpin_page(Pgoff::new(3));
    world.unpin(range(3, 2));
    assert_eq!(world.tree.load(Pgoff::new(3)), Some(Word::new(Visibility::Shared)));
    // A word that was silenced is not taken for one that speaks.
    assert_eq!(world.convert(range(0, 512), Visibility::Private), Ok(512));
    assert_eq!(world.pin(range(3, 1)), Err(at(3, Refusal::Private)));
    assert_eq!(world.convert(range(0, 512), Visibility::Shared), Ok(512));
    assert_eq!(world.pin(range(1023, 1)), Ok(Counted::InRange));
    assert_eq!(world.pin(range(3, 1)), Ok(Counted::InRange));
    world.unpin(range(1023, 1));
    world.unpin(range(3, 1));
}

#[test]
fn a_refused_pin_leaves_no_trace() {
    let world = World::small(8, Visibility::Shared);
    world.tree.pin_exclusive(&world.reader, range(6, 1)).unwrap();
    let before = world.words();
    assert_eq!(world.pin(range(1, 7)), Err(at(6, Refusal::Exclusive)));
    let after: Vec<_> = world
        .tree
        .spans(range(0, 8))
        .flat_map(|(pages, word)| pages.iter().map(move |_| word))
        .collect();
    assert_eq!(after.iter().filter(|word| word.is_held()).count(), 1);
    assert!(after[6].is_exclusive());
    assert_eq!(before.iter().map(|(nr, _)| nr).sum::<u64>(), 8);
    world.tree.unpin_exclusive(&world.reader, range(6, 1));
    assert_eq!(world.convert(range(0, 8), Visibility::Private), Ok(8));
}

#[test]
fn a_refused_freeze_leaves_no_trace() {
    let world = World::small(8, Visibility::Shared);
    world.pin(range(7, 1)).unwrap();
    world.pin(range(7, 1)).unwrap();
    let before = world.words();
    let stop = world.freeze(range(0, 8), Visibility::Private).unwrap_err();
    assert_eq!(stop, at(7, Refusal::Pinned(2)));
    assert_eq!((stop.page(), Stop::OutOfMemory.page()), (Some(Pgoff::new(7)), None));
    assert_eq!(world.words(), before);
}

#[test]
fn pages_that_have_the_visibility_already_are_left_alone_even_if_pinned() {
    let world = World::small(4, Visibility::Private);
    world.convert(range(1, 1), Visibility::Shared).unwrap();
    world.pin(range(1, 1)).unwrap();
    let frozen = world.freeze(range(0, 4), Visibility::Shared).unwrap();
    assert_eq!(frozen.runs(), [range(0, 1), range(2, 2)]);
    frozen.release(Visibility::Shared);
    assert_eq!(world.tree.check_open(range(0, 4)), Ok(()));
    assert_eq!(world.tree.load(Pgoff::new(1)).unwrap().pins(), 1);
}

#[test]
fn what_is_private_already_comes_along_into_a_merge_but_does_not_change() {
    let world = World::small(8, Visibility::Private);
    world.convert(range(2, 1), Visibility::Shared).unwrap();
    let mut frozen = world.freeze(range(0, 8), Visibility::Private).unwrap();
    assert_eq!(frozen.runs(), [range(2, 1)]);
    assert!(frozen.could_merge());
    assert_eq!(world.tree.load(Pgoff::new(0)).unwrap().phase(), Phase::Converting);
    // Not part of anything that is merged.
    assert_eq!(world.tree.load(Pgoff::new(4)).unwrap().phase(), Phase::Settled);
    assert!(frozen.wait_for_sections(&world.reader));
    frozen.release(Visibility::Private);
    assert_eq!(world.words(), says(&[(4, "Private{Settled}"), (4, "Private{Settled}")]));
}

#[test]
fn without_a_wait_nothing_is_merged() {
    let world = World::small(4, Visibility::Private);
    world.convert(range(0, 1), Visibility::Shared).unwrap();
    let frozen = world.freeze(range(0, 4), Visibility::Private).unwrap();
    assert!(frozen.could_merge());
    frozen.release(Visibility::Private);
    assert_eq!(world.words().len(), 3);
    assert_eq!(world.tree.trim(&world.reader).unwrap(), ByteSize::from_bytes(2 * 2 * 8));
    assert_eq!(world.words().len(), 1);
}

#[test]
fn a_block_that_is_frozen_by_itself_ends_as_it_says() {
    let world = World::small(8, Visibility::Shared);
    let freeze =
        |page, to| world.tree.freeze_block(&world.reader, range(page, 1), Wanted::Other(to));
    // A weak exchange may fail for no reason: then it is the caller who goes another way.
    let surely = |page, to| (0..100).find_map(|_| freeze(page, to)).unwrap();
    let word = |page| world.tree.load(Pgoff::new(page)).unwrap();
    assert!(freeze(2, Visibility::Private).is_none(), "a part of a block");
    for page in [3, 6] {
        world.convert(range(page, 1), Visibility::Private).unwrap();
    }
    let block = surely(2, Visibility::Private);
    assert_eq!((block.pages(), block.could_merge()), (range(2, 1), false));
    assert_eq!((word(2).phase(), word(2).visibility()), (Phase::Converting, Visibility::Shared));
    assert!(freeze(2, Visibility::Private).is_none(), "it is held");
    block.thaw();
    assert_eq!(word(2), Word::new(Visibility::Shared));
    surely(2, Visibility::Private).release(Visibility::Private);
    assert_eq!(word(2), Word::new(Visibility::Private));
    assert!(freeze(2, Visibility::Private).is_none(), "it is on that side");
    drop(surely(3, Visibility::Shared));
    assert_eq!(word(3).phase(), Phase::Quarantined);
    // The last one may be all that a larger block has.
    let last = surely(7, Visibility::Private);
    assert!(last.could_merge());
    let last = last.into_frozen();
    assert_eq!((last.runs(), last.could_merge()), (&[range(7, 1)][..], false));
    last.release(Visibility::Private);
    assert_eq!(word(7), Word::new(Visibility::Private));
    assert_eq!(word(2), Word::new(Visibility::Private), "nobody else was touched");
}

#[test]
fn a_freeze_that_is_thawed_or_dropped_ends_as_it_says() {
    let world = World::small(8, Visibility::Shared);
    world.freeze(range(1, 5), Visibility::Private).unwrap().thaw();
    assert_eq!(world.tree.check_open(range(0, 8)), Ok(()));
    let frozen = world.freeze(range(1, 5), Visibility::Private).unwrap();
    assert_eq!(world.tree.check_open(range(0, 8)), Err(at(1, Refusal::Converting)));
    assert_eq!(world.pin(range(0, 2)), Err(at(1, Refusal::Converting)));
    drop(frozen);
    for page in 0..8 {
        let phase = world.tree.load(Pgoff::new(page)).unwrap().phase();
        let wanted = if (1..6).contains(&page) { Phase::Quarantined } else { Phase::Settled };
        assert_eq!(phase, wanted, "page {page}");
    }
    assert_eq!(world.convert(range(5, 1), Visibility::Shared), Err(at(5, Refusal::Quarantined)));
    assert_eq!(world.tree.load(Pgoff::new(8)), None);
}

#[test]
#[cfg_attr(miri, ignore = "65,535 pins take minutes when they are interpreted")]
fn pins_saturate_and_unwind() {
    let world = World::small(4, Visibility::Shared);
    for _ in 0..Word::MAX_PINS {
        world.pin(range(1, 1)).unwrap();
    }
    assert_eq!(world.pin(range(0, 2)), Err(at(1, Refusal::Saturated)));
    assert_eq!(world.tree.load(Pgoff::new(0)).unwrap().pins(), 0);
    assert_eq!(world.pin(range(1, 1)), Err(at(1, Refusal::Saturated)));
}

#[test]
#[cfg_attr(miri, ignore = "65,535 pins take minutes when they are interpreted")]
fn a_whole_block_that_is_full_refuses_a_pin_of_its_part() {
    let world = World::small(4, Visibility::Shared);
    for _ in 0..Word::MAX_PINS {
        world.pin(range(0, 4)).unwrap();
    }
    let before = world.words();
    assert_eq!(world.pin(range(2, 1)), Err(at(2, Refusal::Saturated)));
    assert_eq!(world.words(), before, "not even split");
}

#[test]
fn objects_of_any_size_work_to_their_last_page() {
    for nr_pages in 1..=20 {
        let world = World::small(nr_pages, Visibility::Private);
        let all = range(0, nr_pages);
        let last = range(nr_pages - 1, 1);
        assert_eq!(world.convert(all, Visibility::Shared), Ok(nr_pages));
        world.pin(last).unwrap();
        assert!(world.convert(all, Visibility::Private).is_err());
        world.unpin(last);
        assert_eq!(world.convert(last, Visibility::Private), Ok(1));
        assert_eq!(world.convert(all, Visibility::Private), Ok(nr_pages - 1));
        assert_eq!(world.words().len() as u64, nr_pages.div_ceil(4), "{nr_pages} pages");
        world.tree.trim(&world.reader).unwrap();
        let words = nr_pages.div_ceil(4) + world.tree.shape().nr_words_taken(0);
        assert_eq!(world.tree.metadata().get(), words * 8);
    }
}

#[test]
fn scattered_ranges_are_frozen_as_one() {
    let world = World::small(16, Visibility::Shared);
    world.pin(range(9, 1)).unwrap();
    let ranges = [range(1, 2), range(5, 1), range(9, 3)];
    let freeze = |wanted| world.tree.freeze(&world.reader, &ranges, wanted, &Wait::never());
    assert_eq!(freeze(Wanted::Other(Visibility::Private)).unwrap_err(), at(9, Refusal::Pinned(1)));
    assert_eq!(world.tree.check_open(range(0, 16)), Ok(()));
    world.unpin(range(9, 1));
    let frozen = freeze(Wanted::Other(Visibility::Private)).unwrap();
    assert_eq!(frozen.runs(), ranges);
    frozen.release(Visibility::Private);
    let shared = world.tree.spans(range(0, 16)).filter(|(_, word)| word.is_open());
    assert_eq!(shared.map(|(pages, _)| pages.nr_pages()).sum::<u64>(), 10);
}

/// A block that is left alone may end where the next range begins, and that one is held.
#[test]
fn a_second_look_ends_with_its_range() {
    let world = World::small(8, Visibility::Private);
    world.convert(range(4, 1), Visibility::Shared).unwrap();
    let ranges = [range(0, 3), range(4, 1)];
    for wait in [Wait::never(), Wait::at_most(Duration::from_millis(3))] {
        let wanted = Wanted::Other(Visibility::Private);
        let frozen = world.tree.freeze(&world.reader, &ranges, wanted, &wait).unwrap();
        assert_eq!(frozen.runs(), [range(4, 1)]);
        frozen.thaw();
    }
}

#[test]
fn a_wait_that_ends_early_puts_everything_back() {
    let world = World::small(8, Visibility::Shared);
    world.pin(range(0, 4)).unwrap();
    world.tree.pin_exclusive(&world.reader, range(6, 1)).unwrap();
    let before: Vec<_> = (0..8).map(|page| world.tree.load(Pgoff::new(page))).collect();
    let token = CancelToken::of(&world.waiters);
    token.cancel();
    let waits = [
        (
            Wait::at_most(Duration::from_millis(3)),
            Stop::TimedOut(Pgoff::new(1), Refusal::Pinned(1)),
        ),
        (Wait::until_cancelled(&token), Stop::Cancelled(Pgoff::new(1), Refusal::Pinned(1))),
    ];
    for (wait, stop) in waits {
        let wanted = Wanted::Other(Visibility::Private);
        let outcome = world.tree.freeze(&world.reader, &[range(1, 7)], wanted, &wait);
        assert_eq!(outcome.unwrap_err(), stop);
        let after: Vec<_> = (0..8).map(|page| world.tree.load(Pgoff::new(page))).collect();
        assert_eq!(after, before);
    }
    world.unpin(range(0, 4));
    world.tree.unpin_exclusive(&world.reader, range(6, 1));
    assert_eq!(world.convert(range(0, 8), Visibility::Private), Ok(8));
}

#[test]
fn a_wait_ends_when_the_last_pin_goes_and_lets_no_new_one_in() {
    let world = World::small(8, Visibility::Shared);
    world.pin(range(0, 4)).unwrap();
    world.pin(range(2, 1)).unwrap();
    // One that nobody has pinned any more, and that has a word of its own.
    world.pin(range(4, 1)).unwrap();
    world.unpin(range(4, 1));
    let (tree, domain) = (&world.tree, lasting_domain());
    std::thread::scope(|scope| {
        let domain = &domain;
        let converter = scope.spawn(move || {
            let reader = Domain::register(domain);
            let wanted = Wanted::Other(Visibility::Private);
            let wait = Wait::at_most(Duration::MAX);
            let frozen = tree.freeze(&reader, &[range(1, 4)], wanted, &wait).unwrap();
            assert_eq!(frozen.runs(), [range(1, 4)]);
            frozen.release(Visibility::Private);
        });
        let drains = |page| tree.load(Pgoff::new(page)).unwrap().phase() == Phase::Draining;
        while !drains(3) || tree.load(Pgoff::new(4)).unwrap().phase() == Phase::Settled {
            std::thread::yield_now();
        }
        assert_eq!(world.pin(range(2, 1)), Err(at(2, Refusal::Converting)));
        assert_eq!(tree.check_open(range(0, 8)), Ok(()), "accesses go on, also where nobody pins");
        world.unpin(range(2, 1));
        world.unpin(range(0, 4));
        converter.join().unwrap();
    });
    assert_eq!(world.tree.check_open(range(0, 8)), Err(at(1, Refusal::Private)));
}

#[test]
#[cfg_attr(miri, ignore = "the words of 1 GiB, one by one, take minutes when interpreted")]
fn trimming_gives_back_what_is_alike_and_nothing_else() {
    let world = World::new(Shape::of_pages((2 << 18) + 600), Visibility::Private);
    let uniform = ByteSize::from_bytes(3 * 8);
    assert_eq!(world.tree.metadata(), uniform);
    // One table for the parts of the root and one for those of the 2 MiB block, three times.
    for page in [5, 700, (2 << 18) + 599] {
        world.convert(range(page, 1), Visibility::Shared).unwrap();
    }
    world.pin(range(700, 1)).unwrap();
    assert_eq!(world.tree.metadata().get(), 24 + 5 * 4096);
    let trim = || world.tree.trim(&world.reader).unwrap().get();
    assert_eq!(trim(), 0, "all of them differ");
    world.convert(range(5, 1), Visibility::Private).unwrap();
    world.convert(range((2 << 18) + 599, 1), Visibility::Private).unwrap();
    assert_eq!(trim(), 3 * 4096);
    assert_eq!(world.tree.load(Pgoff::new(700)).unwrap().pins(), 1);
    assert_eq!(trim(), 0);
    world.unpin(range(700, 1));
    world.convert(range(0, 1 << 18), Visibility::Shared).unwrap();
    assert_eq!(trim(), 2 * 4096);
    assert_eq!(world.tree.metadata(), uniform);
    assert_eq!(world.words().len(), 3);
    // What was given back is taken anew.
    world.convert(range(701, 1), Visibility::Private).unwrap();
    assert_eq!(world.tree.metadata().get(), 24 + 2 * 4096);
    assert_eq!(world.tree.check_open(range(0, 701)), Ok(()));
    assert_eq!(world.tree.check_open(range(0, 702)), Err(at(701, Refusal::Private)));
}
