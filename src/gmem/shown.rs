//! What of a view can be touched, as far as it is ours to say; and the sums of pages and blocks for that.

use bitvec::vec::BitVec;

use crate::addr::Pgoff;
use crate::error::{Error, Op};
use crate::folio::try_bits;
use crate::geometry::{HUGE_PAGES, index};
use crate::os::mapping::Mapping;
use crate::range::{PfnRange, PgoffRange};

/// What can be touched, as far as it is ours to say.
pub(super) struct Shown {
    /// For each page.
    pub(super) pages: BitVec,
    /// For each block of 2 MiB: whether it is open. All of its pages are shown then.
    pub(super) open: BitVec,
    /// Whether any block ever was: most views have none.
    pub(super) has_opened: bool,
    /// Pages behind which something else is mapped than the object has there. They are not shown.
    pub(super) astray: Vec<PgoffRange>,
    /// Mappings that are given up when the kernel allows no more of them, since without room for any the
    /// pages hidden so far could not even be shown again. Only without userfaultfd.
    pub(super) spare: Option<[Mapping; 2]>,
}

impl Shown {
    pub(super) fn nothing(op: Op, nr_pages: u64) -> Result<Self, Error> {
        let (pages, open) = (try_bits(op, nr_pages)?, try_bits(op, nr_pages / HUGE_PAGES)?);
        Ok(Self { pages, open, has_opened: false, astray: Vec::new(), spare: None })
    }

    /// What the object has there is mapped behind the pages, or nothing.
    pub(super) fn is_right(&mut self, pages: PgoffRange) {
        self.astray.retain(|astray| astray.intersection(&pages).is_none());
    }

    /// Whether a page of the object can be touched.
    #[inline]
    pub(super) fn has(&self, page: Pgoff) -> bool {
        bit(&self.pages, page) == Some(true)
    }

    #[inline]
    pub(super) fn is_open(&self, block: Pgoff) -> bool {
        self.open.get(index(block.get())).is_some_and(|bit| *bit)
    }

    pub(super) fn set_open(&mut self, blocks: PgoffRange, value: bool) {
        self.has_opened |= value;
        let range =
            index(blocks.start().get() / HUGE_PAGES)..index(blocks.end().get() / HUGE_PAGES);
        if let Some(bits) = self.open.get_mut(range) {
            bits.fill(value);
        }
    }

    /// What can be touched of the ranges from now on: all or nothing.
    #[inline]
    pub(super) fn set_each(&mut self, ranges: &[PgoffRange], value: bool) {
        let mut ranges = ranges.iter();
        let words = self.pages.as_raw_mut_slice();
        // One page each most times.
        let many = ranges.find(|pages| {
            let start = index(pages.start().get());
            let word = words.get_mut(start / WORD_BITS).filter(|_| pages.nr_pages() == 1);
            let Some(word) = word else { return true };
            let bit = 1 << (start % WORD_BITS);
            *word = if value { *word | bit } else { *word & !bit };
            false
        });
        for &pages in many.into_iter().chain(ranges) {
            self.set(pages, value);
        }
    }

    pub(super) fn set(&mut self, pages: PgoffRange, value: bool) {
        let (start, end) = (index(pages.start().get()), index(pages.end().get()));
        let words = self.pages.as_raw_mut_slice();
        // Whole blocks most times, and what follows is slow for that.
        if start % WORD_BITS == 0 && end % WORD_BITS == 0 {
            if let Some(words) = words.get_mut(start / WORD_BITS..end / WORD_BITS) {
                words.fill(if value { usize::MAX } else { 0 });
            }
        } else if let Some(bits) = self.pages.get_mut(start..end) {
            bits.fill(value);
        }
    }
}

/// How many bits bitvec has in a word, the first of them the lowest.
const WORD_BITS: usize = usize::BITS as usize;

/// A bit of those that there are: what is behind them in the last word passes for one too.
#[inline]
fn bit(bits: &BitVec, at: Pgoff) -> Option<bool> {
    let at = index(at.get());
    let word = bits.as_raw_slice().get(at / WORD_BITS)?;
    Some(word >> (at % WORD_BITS) & 1 == 1)
}

/// The first run of bits from `from` up to `end` that have this value.
#[inline]
pub(super) fn next_run(bits: &BitVec, from: Pgoff, end: Pgoff, value: bool) -> Option<PgoffRange> {
    // One page most times, and what follows is slow for that.
    match end.get().checked_sub(from.get())? {
        0 => None,
        1 => (bit(bits, from)? == value).then(|| PgoffRange::single(from).ok())?,
        _ => next_run_of_many(bits, from, end, value),
    }
}

fn next_run_of_many(bits: &BitVec, from: Pgoff, end: Pgoff, value: bool) -> Option<PgoffRange> {
    let bits = bits.get(index(from.get())..index(end.get()))?;
    let (skip, len) = match value {
        true => bits
            .first_one()
            .map(|skip| (skip, bits.get(skip..).map_or(0, |it| it.leading_ones())))?,
        false => bits
            .first_zero()
            .map(|skip| (skip, bits.get(skip..).map_or(0, |it| it.leading_zeros())))?,
    };
    PgoffRange::new(Pgoff::new(from.get() + skip as u64), len as u64).ok()
}

/// Blocks of 2 MiB are counted by the same type as pages.
#[inline]
pub(super) fn block_of(page: Pgoff) -> Pgoff {
    Pgoff::new(page.get() / HUGE_PAGES)
}

#[inline]
pub(super) fn first_page(block: Pgoff) -> Pgoff {
    Pgoff::new(block.get() * HUGE_PAGES)
}

/// The whole blocks of 2 MiB in the pages.
#[inline]
pub(super) fn whole_blocks(pages: PgoffRange) -> Option<PgoffRange> {
    let start = pages.start().get().next_multiple_of(HUGE_PAGES);
    let end = pages.end().get() / HUGE_PAGES * HUGE_PAGES;
    between(Pgoff::new(start), Pgoff::new(end))
}

/// The pages from `start` up to `end`, if there are any.
#[inline]
pub(super) fn between(start: Pgoff, end: Pgoff) -> Option<PgoffRange> {
    PgoffRange::before(end, start, u64::MAX)
}

/// The frames of some of the pages.
#[inline]
pub(super) fn part(pages: PgoffRange, frames: PfnRange, some: PgoffRange) -> Option<PfnRange> {
    let skip = some.start().get().checked_sub(pages.start().get())?;
    PfnRange::new(frames.start().checked_add(skip)?, some.nr_pages()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_set_by_words_are_those_that_bitvec_has() {
        const NR_PAGES: u64 = 3 * HUGE_PAGES + 7;
        let mut shown = Shown::nothing(Op::MapView, NR_PAGES).unwrap();
        let mut model = vec![false; index(NR_PAGES)];
        let changes = [
            (0, NR_PAGES, true),
            (5, 1, false),
            (63, 1, false),
            (64, 1, false),
            (HUGE_PAGES, HUGE_PAGES, false),
            (HUGE_PAGES + 64, 64, true),
            (HUGE_PAGES + 100, 128, true),
            (HUGE_PAGES + 65, 1, false),
            (2 * HUGE_PAGES + 1, 63, false),
            (NR_PAGES - 1, 1, false),
            (NR_PAGES - 7, 5, false),
        ];
        for (start, nr_pages, value) in changes {
            let pages = PgoffRange::new(Pgoff::new(start), nr_pages).unwrap();
            match start % 2 {
                0 => shown.set(pages, value),
                _ => shown.set_each(&[pages, pages], value),
            }
            model[index(start)..index(start + nr_pages)].fill(value);
            assert!(shown.pages.iter().by_vals().eq(model.iter().copied()), "{pages:?} {value}");
            for (at, &is_shown) in (0..NR_PAGES).zip(&model) {
                let at = Pgoff::new(at);
                let end = Pgoff::new(at.get() + 1);
                assert_eq!(shown.has(at), is_shown, "{at:?}");
                let alone = next_run(&shown.pages, at, end, is_shown);
                assert_eq!(alone, Some(PgoffRange::single(at).unwrap()));
                assert_eq!(next_run(&shown.pages, at, end, !is_shown), None);
            }
        }
    }
}
