//! What a guard holds pinned of a slot.

use std::collections::BTreeMap;

use crate::addr::Pgoff;
use crate::error::Error;
use crate::gmem::PinGuard;
use crate::range::PgoffRange;

/// The pages that a guard has pinned, each exactly once.
#[derive(Debug, Default)]
pub(super) struct PinSet {
    /// By first page; ranges that do not overlap.
    held: BTreeMap<Pgoff, (PgoffRange, PinGuard)>,
}

impl PinSet {
    /// Pins the parts of `pages` that are not held yet: all of them or none.
    pub(super) fn add(
        &mut self,
        pages: PgoffRange,
        pin: impl Fn(PgoffRange) -> Result<PinGuard, Error>,
    ) -> Result<(), Error> {
        // Those pinned before a refusal are let go with the vector.
        let pinned = self
            .gaps(pages)
            .into_iter()
            .map(|gap| Ok((gap.start(), (gap, pin(gap)?))))
            .collect::<Result<Vec<_>, Error>>()?;
        self.held.extend(pinned);
        Ok(())
    }

    fn gaps(&self, pages: PgoffRange) -> Vec<PgoffRange> {
        let mut gaps = Vec::new();
        let mut next = pages.start();
        let before = self.held.range(..=pages.start()).next_back();
        let inside = self.held.range(pages.start()..pages.end());
        for (_, (range, _)) in before.into_iter().chain(inside) {
            gaps.extend(between(next, range.start()));
            next = next.max(range.end());
        }
        gaps.extend(between(next, pages.end()));
        gaps
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.held.values().map(|(range, _)| range.nr_pages()).sum()
    }
}

/// The pages from `start` up to `end`, if there are any.
fn between(start: Pgoff, end: Pgoff) -> Option<PgoffRange> {
    let nr_pages = end.get().checked_sub(start.get())?;
    PgoffRange::new(start, nr_pages).ok()
}
