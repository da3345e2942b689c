//! Cuts a snapshot into rows of one huge folio each.

use super::{Look, Picture};
use crate::addr::{Offset, Pgoff};
use crate::geometry::HUGE_PAGES;
use crate::gmem::PageInfo;
use crate::range::PgoffRange;

/// Pages in a row that look alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    /// Where in its row it begins, in pages.
    pub(super) column: u64,
    /// How many pages of the row it is.
    pub(super) nr_pages: u64,
    pub(super) look: Look,
    pub(super) info: PageInfo,
}

/// A row, or several uniform ones that are alike.
#[derive(Debug)]
pub(super) struct Row {
    /// The page number of the first row's first page.
    pub(super) start: Pgoff,
    /// How many folios in a row look like this.
    pub(super) repeat: u64,
    pub(super) cells: Vec<Cell>,
}

impl Row {
    pub(super) fn offset(&self) -> Offset {
        self.start.offset()
    }

    /// How many pages of the row the object has.
    pub(super) fn nr_pages(&self) -> u64 {
        self.cells.iter().map(|cell| cell.column + cell.nr_pages).max().unwrap_or(0)
    }

    /// The pages of a cell, in all rows that this one stands for.
    pub(super) fn range_of(&self, cell: &Cell) -> Option<PgoffRange> {
        let start = self.start.checked_add(cell.column)?;
        let nr_pages = HUGE_PAGES.checked_mul(self.repeat - 1)?.checked_add(cell.nr_pages)?;
        PgoffRange::new(start, nr_pages).ok()
    }
}

/// Up to so many rows are drawn one by one.
const MOST_ROWS: u64 = 128;

pub(super) fn of(picture: &Picture<'_>) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let end = picture.pages.last().map_or(0, |(range, _)| range.end().get());
    let most_at_once = if end.div_ceil(HUGE_PAGES) > MOST_ROWS { u64::MAX } else { 1 };
    for (range, info) in picture.pages {
        let look = Look::of(info);
        let (mut at, end) = (range.start().get(), range.end().get());
        while at < end {
            let (column, left) = (at % HUGE_PAGES, end - at);
            let start = Pgoff::new(at - column);
            if column == 0 && left >= HUGE_PAGES {
                let cell = Cell { column, nr_pages: HUGE_PAGES, look, info: *info };
                let repeat = (left / HUGE_PAGES).min(most_at_once);
                rows.push(Row { start, repeat, cells: vec![cell] });
                at += repeat * HUGE_PAGES;
                continue;
            }
            let nr_pages = left.min(HUGE_PAGES - column);
            let cell = Cell { column, nr_pages, look, info: *info };
            match rows.last_mut() {
                Some(row) if row.start == start => row.cells.push(cell),
                _ => rows.push(Row { start, repeat: 1, cells: vec![cell] }),
            }
            at += nr_pages;
        }
    }
    rows
}

/// How many pages look like each of [`Look::ALL`].
pub(super) fn totals(picture: &Picture<'_>) -> [(Look, u64); Look::ALL.len()] {
    Look::ALL.map(|look| {
        let alike = picture.pages.iter().filter(|(_, info)| Look::of(info) == look);
        (look, alike.map(|(range, _)| range.nr_pages()).sum())
    })
}
