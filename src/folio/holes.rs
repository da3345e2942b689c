//! Which pages inside of folios are holes: a bit for each page, in memory that is there where holes are.
//!
//! Written under the object's layout lock, read by anybody, and only for a folio whose entry in the map
//! says that it has holes. Who reads while other pages of the folio change finds the bit of its own page as
//! it was: a page is not punched before everybody has left it.

use std::sync::atomic::Ordering;

use crate::addr::Pgoff;
use crate::error::{Error, Op};
use crate::geometry::{PAGE_BYTES, index};
use crate::os::words::Words;
use crate::range::PgoffRange;

const BITS: u64 = u64::BITS as u64;
/// As many pages as one page of bits is about: what can go back to the host by itself.
const GROUP: u64 = PAGE_BYTES as u64 * 8;

/// Bits for the pages of an object, all clear at first.
#[derive(Debug)]
pub(super) struct Holes(Words);

impl Holes {
    /// Bits for so many pages. They take addresses, and memory where a bit is set.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted).
    pub(super) fn new(nr_pages: u64) -> Result<Self, Error> {
        let words = nr_pages.next_multiple_of(GROUP) / BITS;
        Words::new(index(words)).map(Self).map_err(|error| error.of(Op::PunchHole))
    }

    fn load(&self, place: u64) -> u64 {
        // Acquire: pairs with the Release in `set`: who finds a page filled finds it committed, and zero.
        self.0.get(index(place)).map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(super) fn has(&self, page: Pgoff) -> bool {
        self.load(page.get() / BITS) >> (page.get() % BITS) & 1 == 1
    }

    /// Whether a page is a hole, and the first page behind it of which the opposite is true, or `end`.
    pub(super) fn run(&self, page: Pgoff, end: Pgoff) -> (bool, Pgoff) {
        let is_hole = self.has(page);
        let mut at = page.get();
        while at < end.get() {
            let left = BITS - at % BITS;
            let word = self.load(at / BITS) >> (at % BITS);
            let alike = if is_hole { word.trailing_ones() } else { word.trailing_zeros() };
            // Zeroes that were shifted in say nothing.
            let alike = u64::from(alike).min(left);
            at += alike;
            if alike < left {
                break;
            }
        }
        (is_hole, Pgoff::new(at.min(end.get())))
    }

    /// Makes pages holes, or makes holes pages again.
    pub(super) fn set(&self, pages: PgoffRange, are_holes: bool) {
        let (start, end) = (pages.start().get(), pages.end().get());
        for place in start / BITS..end.div_ceil(BITS) {
            let Some(word) = self.0.get(index(place)) else { return };
            let first = start.saturating_sub(place * BITS);
            let behind = (end - place * BITS).min(BITS);
            let mask = u64::MAX >> (BITS - (behind - first)) << first;
            // Relaxed: whoever writes holds the lock that the last one held.
            let before = word.load(Ordering::Relaxed);
            let after = if are_holes { before | mask } else { before & !mask };
            // Release: pairs with the Acquire in `load`.
            word.store(after, Ordering::Release);
        }
    }

    /// The pages whose bits share a page of memory with that of `page`.
    pub(super) fn group(page: Pgoff) -> Option<PgoffRange> {
        PgoffRange::new(Pgoff::new(page.get() - page.get() % GROUP), GROUP).ok()
    }

    /// Gives the memory of a group's bits back, which are all clear.
    pub(super) fn give_back(&self, group: PgoffRange) {
        let words = index(group.start().get() / BITS)..index(group.end().get() / BITS);
        // Should the host not take it, the bits are clear all the same.
        let _ = self.0.give_back(words);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn range(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }

    #[test]
    fn runs_go_over_words_and_end_where_they_should() {
        let holes = Holes::new(1024).unwrap();
        let run = |page, end| {
            let (is_hole, end) = holes.run(Pgoff::new(page), Pgoff::new(end));
            (is_hole, end.get())
        };
        assert_eq!(run(5, 512), (false, 512));
        holes.set(range(60, 200), true);
        assert_eq!([run(0, 512), run(60, 512)], [(false, 60), (true, 260)]);
        assert_eq!([run(63, 64), run(64, 128)], [(true, 64), (true, 128)]);
        holes.set(range(127, 2), false);
        assert_eq!([run(60, 512), run(127, 512)], [(true, 127), (false, 129)]);
        assert_eq!(run(129, 512), (true, 260));
        assert!(holes.has(Pgoff::new(126)) && !holes.has(Pgoff::new(127)));
        assert!(holes.has(Pgoff::new(259)) && !holes.has(Pgoff::new(260)));
        assert_eq!(run(260, 1 << 20), (false, 1 << 20), "nothing is behind the end");
    }

    #[test]
    fn a_group_is_what_can_be_given_back() {
        let holes = Holes::new(40_000).unwrap();
        assert_eq!(Holes::group(Pgoff::new(33_000)), Some(range(32_768, 32_768)));
        holes.set(range(39_999, 1), true);
        holes.set(range(0, 1), true);
        holes.set(range(39_999, 1), false);
        holes.give_back(range(32_768, 32_768));
        assert!(holes.has(Pgoff::new(0)) && !holes.has(Pgoff::new(39_999)));
    }
}
