//! What the host's kernel remembers of what it has given a guest: by the guest's addresses, as it was given.

use std::collections::BTreeMap;

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::stage2::GuestRun;

/// How a guest has memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// For itself.
    Lent,
    /// With the host.
    Shared,
}

/// What a guest has there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) run: GuestRun,
    pub(crate) side: Side,
    /// Whether it may write.
    pub(crate) writes: bool,
}

impl Given {
    /// Pages of it, from one on.
    fn slice(self, skip: u64, nr_pages: u64) -> Self {
        let GuestRun { gfn, pfn, .. } = self.run;
        let (gfn, pfn) = (Gfn::new(gfn.get() + skip), Pfn::new(pfn.get() + skip));
        Self { run: GuestRun { gfn, pfn, nr_pages }, ..self }
    }
}

#[derive(Debug, Default)]
pub(super) struct Book(BTreeMap<u64, Given>);

impl Book {
    /// What the guest has at an address, or that it has nothing; and for how many pages, at most so many.
    pub(super) fn at(&self, gfn: Gfn, most: u64) -> (Option<Given>, u64) {
        let raw = gfn.get();
        if let Some((&start, &given)) = self.0.range(..=raw).next_back() {
            let skip = raw - start;
            if skip < given.run.nr_pages {
                let nr = most.min(given.run.nr_pages - skip);
                return (Some(given.slice(skip, nr)), nr);
            }
        }
        let next = self.0.range(raw..).next().map_or(u64::MAX, |(&start, _)| start);
        (None, most.min(next - raw))
    }

    /// What the guest has of runs.
    ///
    /// # Errors
    /// `EAGAIN` if something else than the run says is there; `ENOMEM`.
    pub(super) fn within(&self, runs: &[GuestRun]) -> Result<Vec<Given>, Errno> {
        let mut found = Vec::new();
        for run in runs {
            let mut nr_done = 0;
            while nr_done < run.nr_pages {
                let at = Gfn::new(run.gfn.get() + nr_done);
                let (given, nr) = self.at(at, run.nr_pages - nr_done);
                if let Some(given) = given {
                    if given.run.pfn.get() != run.pfn.get() + nr_done {
                        return Err(Errno::EAGAIN);
                    }
                    found.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
                    found.push(given);
                }
                nr_done += nr;
            }
        }
        Ok(found)
    }

    /// Whether the guest has anything there.
    pub(super) fn has_any(&self, run: GuestRun) -> bool {
        let (given, nr) = self.at(run.gfn, run.nr_pages);
        given.is_some() || nr < run.nr_pages
    }

    /// Takes note of what is given where nothing was.
    pub(super) fn insert(&mut self, given: Given) {
        self.0.insert(given.run.gfn.get(), given);
    }

    /// Forgets what is there.
    pub(super) fn remove(&mut self, run: GuestRun) {
        let (start, end) = (run.gfn.get(), run.gfn.get() + run.nr_pages);
        for cut in [start, end] {
            let across = self.0.range_mut(..cut).next_back();
            let across = across.filter(|(at, given)| **at + given.run.nr_pages > cut);
            let Some((&at, given)) = across else { continue };
            let rest = given.slice(cut - at, given.run.nr_pages - (cut - at));
            given.run.nr_pages = cut - at;
            self.0.insert(cut, rest);
        }
        while let Some((&at, _)) = self.0.range(start..end).next() {
            self.0.remove(&at);
        }
    }

    /// All of it, by address.
    pub(super) fn iter(&self) -> impl Iterator<Item = Given> {
        self.0.values().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(gfn: u64, nr_pages: u64) -> GuestRun {
        GuestRun { gfn: Gfn::new(gfn), pfn: Pfn::new(gfn + 1000), nr_pages }
    }

    proptest! {
        /// Against a list of pages.
        #[test]
        fn it_is_a_list_of_pages(
            steps in prop::collection::vec((0_u64..30, 1_u64..12, any::<[bool; 2]>()), 1..60)
        ) {
            let mut book = Book::default();
            let mut list = [None; 50];
            for (gfn, nr, [give, lend]) in steps {
                let run = run(gfn, nr);
                let side = if lend { Side::Lent } else { Side::Shared };
                let inside = gfn as usize..(gfn + nr) as usize;
                prop_assert_eq!(book.has_any(run), list[inside.clone()].iter().any(Option::is_some));
                if give && !book.has_any(run) {
                    book.insert(Given { run, side, writes: lend });
                    list[inside].fill(Some(side));
                } else if !give {
                    let nr_there = list[inside.clone()].iter().flatten().count() as u64;
                    let found = book.within(&[run]).unwrap();
                    prop_assert_eq!(found.iter().map(|given| given.run.nr_pages).sum::<u64>(), nr_there);
                    book.remove(run);
                    list[inside].fill(None);
                }
                for (gfn, &side) in list.iter().enumerate() {
                    let (found, nr) = book.at(Gfn::new(gfn as u64), 1);
                    prop_assert_eq!((found.map(|given| given.side), nr), (side, 1));
                    prop_assert!(found.is_none_or(|found| found.run.pfn.get() == gfn as u64 + 1000));
                }
            }
        }
    }

    #[test]
    fn other_frames_are_told_from_none() {
        let mut book = Book::default();
        book.insert(Given { run: run(8, 4), side: Side::Lent, writes: true });
        let other = GuestRun { pfn: Pfn::new(7), ..run(10, 1) };
        assert_eq!(book.within(&[run(0, 8), other]), Err(Errno::EAGAIN));
        assert_eq!(book.within(&[run(0, 8)]), Ok(Vec::new()));
        assert_eq!(book.at(Gfn::new(0), 99), (None, 8));
    }
}
