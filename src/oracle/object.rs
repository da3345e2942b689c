//! The naive object: a list of pages, and which folios are there.

use std::collections::BTreeMap;

use super::answer::{Refused, Run, pages_of, refused};
use crate::error::{ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES, PAGE_BYTES};
use crate::state::Visibility;

/// One page of an object.
#[derive(Clone, Debug)]
pub(super) struct Page {
    pub(super) visibility: Visibility,
    /// All zeroes if there are none.
    pub(super) bytes: Option<Vec<u8>>,
    /// Punched, in a folio that has stayed, and not touched since.
    pub(super) is_hole: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) home: Option<u64>,
    pub(super) has_handle: bool,
    pub(super) is_gone: bool,
    pub(super) nr_views: usize,
    pub(super) folio: FolioSize,
    pub(super) pages: Vec<Page>,
    /// First page and length of a folio, and its first frame.
    pub(super) folios: BTreeMap<Run, u64>,
    /// In the order in which they were registered.
    pub(super) names: Vec<&'static str>,
}

impl Object {
    pub(super) fn nr_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    pub(super) fn page(&self, page: u64) -> Option<&Page> {
        self.pages.get(usize::try_from(page).ok()?)
    }

    pub(super) fn page_mut(&mut self, page: u64) -> Option<&mut Page> {
        self.pages.get_mut(usize::try_from(page).ok()?)
    }

    pub(super) fn set_hole(&mut self, page: u64, is_hole: bool) {
        if let Some(page) = self.page_mut(page) {
            page.is_hole = is_hole;
        }
    }

    pub(super) fn is(&self, page: u64, visibility: Visibility) -> bool {
        self.page(page).is_some_and(|page| page.visibility == visibility)
    }

    /// The folio that a page lies in, whether it is there or not.
    pub(super) fn folio_at(&self, page: u64) -> Run {
        let start = page / HUGE_PAGES * HUGE_PAGES;
        if self.folio == FolioSize::Huge2M && start + HUGE_PAGES <= self.nr_pages() {
            (start, HUGE_PAGES)
        } else {
            (page, 1)
        }
    }

    pub(super) fn folios_of(&self, range: Run) -> Vec<Run> {
        let mut folios: Vec<Run> = pages_of(range).map(|page| self.folio_at(page)).collect();
        folios.dedup();
        folios
    }

    pub(super) fn is_resident(&self, page: u64) -> bool {
        self.has_folio(page) && self.page(page).is_some_and(|page| !page.is_hole)
    }

    pub(super) fn has_folio(&self, page: u64) -> bool {
        self.folios.contains_key(&self.folio_at(page))
    }

    pub(super) fn is_hole(&self, page: u64) -> bool {
        self.has_folio(page) && self.page(page).is_some_and(|page| page.is_hole)
    }

    pub(super) fn inside(&self, op: Op, range: Run) -> Result<(), Refused> {
        if range.0 + range.1 <= self.nr_pages() {
            Ok(())
        } else {
            Err(refused(op, ErrorKind::OutOfRange).on(range))
        }
    }

    /// The pages that some bytes lie in; `None` for no bytes.
    pub(super) fn pages_of_bytes(&self, op: Op, at: u64, len: u64) -> Result<Option<Run>, Refused> {
        if u128::from(at) + u128::from(len) > u128::from(self.nr_pages() * 4096) {
            return Err(refused(op, ErrorKind::OutOfRange));
        }
        Ok((len > 0).then(|| (at / 4096, (at + len - 1) / 4096 - at / 4096 + 1)))
    }

    pub(super) fn byte(&self, at: u64) -> u8 {
        let bytes = self.page(at / 4096).and_then(|page| page.bytes.as_ref());
        let in_page = usize::try_from(at % 4096).unwrap_or_default();
        bytes.and_then(|bytes| bytes.get(in_page)).copied().unwrap_or_default()
    }

    pub(super) fn set_byte(&mut self, at: u64, value: u8) {
        let in_page = usize::try_from(at % 4096).unwrap_or_default();
        let Some(page) = self.page_mut(at / 4096) else { return };
        let bytes = page.bytes.get_or_insert_with(|| vec![0; PAGE_BYTES]);
        if let Some(byte) = bytes.get_mut(in_page) {
            *byte = value;
        }
    }
}
