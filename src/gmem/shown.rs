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
    /// Mappings that are given up when the kernel allows no more of them, since without room for any the
    /// pages hidden so far could not even be shown again. Only without userfaultfd.
    pub(super) spare: Option<[Mapping; 2]>,
}

impl Shown {
    pub(super) fn nothing(op: Op, nr_pages: u64) -> Result<Self, Error> {
        let (pages, open) = (try_bits(op, nr_pages)?, try_bits(op, nr_pages / HUGE_PAGES)?);
        Ok(Self { pages, open, has_opened: false, spare: None })
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

    #[inline]
    pub(super) fn set(&mut self, pages: PgoffRange, value: bool) {
        let (start, end) = (index(pages.start().get()), index(pages.end().get()));
        if end - start == 1 {
            // One page most times, and what follows is slow for that.
            if let Some(mut bit) = self.pages.get_mut(start) {
                bit.set(value);
            }
        } else if let Some(bits) = self.pages.get_mut(start..end) {
            bits.fill(value);
        }
    }
}

/// The first run of bits from `from` up to `end` that have this value.
#[inline]
pub(super) fn next_run(bits: &BitVec, from: Pgoff, end: Pgoff, value: bool) -> Option<PgoffRange> {
    // One page most times, and what follows is slow for that.
    match end.get().checked_sub(from.get())? {
        0 => None,
        1 => (*bits.get(index(from.get()))? == value).then(|| PgoffRange::single(from).ok())?,
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
