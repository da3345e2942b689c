//! What the model knows of an object and of an account.

use std::collections::BTreeMap;

use super::frames::Count;
use super::model::Outcome;
use crate::error::ErrorKind;
use crate::folio::{PrivatePlacement, Zone};
use crate::geometry::{FolioSize, HUGE_PAGES, index};
use crate::state::Visibility;

/// Consecutive pages: the first, and how many.
pub(super) type Run = (u64, u64);

#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) visibility: Visibility,
    /// The byte that all of the page has.
    pub(super) byte: u8,
    pub(super) is_hole: bool,
    pub(super) is_pinned: bool,
    /// Its frame failed, and nobody gets at it any more.
    pub(super) has_failed: bool,
}

impl Page {
    /// Why nobody accesses or pins the page.
    pub(super) fn refuses_access(&self) -> Option<ErrorKind> {
        match self.visibility {
            _ if self.has_failed => Some(ErrorKind::Quarantined),
            Visibility::Private => Some(ErrorKind::NotShared),
            Visibility::Shared => None,
        }
    }

    /// Why the page is not punched, does not move and does not change sides.
    pub(super) fn refuses_change(&self) -> Option<ErrorKind> {
        match self.has_failed {
            true => Some(ErrorKind::Quarantined),
            false => self.is_pinned.then_some(ErrorKind::Busy),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Object {
    /// Never used twice.
    pub(super) nr: u64,
    pub(super) folio: FolioSize,
    pub(super) zones: Vec<Zone>,
    pub(super) placement: PrivatePlacement,
    pub(super) is_promised: bool,
    pub(super) account: Option<usize>,
    pub(super) charged: u64,
    pub(super) pages: Vec<Page>,
    /// First page of a folio, and its first frame.
    pub(super) folios: BTreeMap<u64, u64>,
    /// The parts that it draws from, and what each still owes it.
    pub(super) left: Vec<(usize, Count)>,
    /// Parts that take what is shared as long as they have room.
    pub(super) beside: Vec<usize>,
}

impl Object {
    pub(super) fn nr_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The folio that a page is in, whether it is there or not.
    pub(super) fn slot_at(&self, page: u64) -> Run {
        slot_at(self.folio, self.nr_pages(), page)
    }

    pub(super) fn slots(&self, range: Run) -> Vec<Run> {
        let mut slots: Vec<Run> =
            (range.0..range.0 + range.1).map(|page| self.slot_at(page)).collect();
        slots.dedup();
        slots
    }

    pub(super) fn has_folio(&self, page: u64) -> bool {
        self.folios.contains_key(&self.slot_at(page).0)
    }

    /// The frame behind a page.
    pub(super) fn frame(&self, page: u64) -> Option<u64> {
        let (start, _) = self.slot_at(page);
        self.folios.get(&start).map(|first| first + (page - start))
    }

    pub(super) fn page(&self, page: u64) -> Option<&Page> {
        self.pages.get(index(page))
    }

    pub(super) fn pages_mut(&mut self, (start, nr): Run) -> impl Iterator<Item = &mut Page> {
        self.pages.iter_mut().skip(index(start)).take(index(nr))
    }

    pub(super) fn any(&self, (start, nr): Run, wanted: impl Fn(&Page) -> bool) -> bool {
        self.pages.iter().skip(index(start)).take(index(nr)).any(wanted)
    }

    /// What the first page has against it that has something.
    pub(super) fn ask(
        &self,
        (start, nr): Run,
        refusal: impl Fn(&Page) -> Option<ErrorKind>,
    ) -> Outcome {
        let mut pages = self.pages.iter().skip(index(start)).take(index(nr));
        pages.find_map(refusal).map_or(Ok(()), Err)
    }

    pub(super) fn is_shared(&self, run: Run) -> bool {
        !self.any(run, |page| page.visibility == Visibility::Private)
    }

    /// Whether it matters where private pages are.
    pub(super) fn is_particular(&self) -> bool {
        self.zones.iter().any(|&zone| zone != Zone::Normal)
    }

    /// What a promise of all of it would be.
    pub(super) fn shape(nr_pages: u64, folio: FolioSize) -> Count {
        let huge = if folio == FolioSize::Base { 0 } else { nr_pages / HUGE_PAGES };
        Count { huge, base: nr_pages - huge * HUGE_PAGES }
    }
}

fn slot_at(folio: FolioSize, nr_pages: u64, page: u64) -> Run {
    let start = page / HUGE_PAGES * HUGE_PAGES;
    match folio != FolioSize::Base && start + HUGE_PAGES <= nr_pages {
        true => (start, HUGE_PAGES),
        false => (page, 1),
    }
}

/// Counters, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Charges {
    pub(super) limit: Option<u64>,
    pub(super) charged: u64,
    pub(super) peak: u64,
    pub(super) used: u64,
}

impl Charges {
    pub(super) fn allows(&self, more: u64) -> bool {
        more == 0 || self.limit.is_none_or(|limit| self.charged + more <= limit)
    }

    pub(super) fn charge(&mut self, more: u64) {
        self.charged += more;
        self.peak = self.peak.max(self.charged);
    }
}
