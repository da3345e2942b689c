//! The map as text.

use std::fmt::Write;

use super::rows::{self, Row};
use super::{Human, Look, Picture};
use crate::addr::ByteSize;
use crate::geometry::HUGE_PAGES;

/// Pages that one character stands for.
const PER_CHAR: u64 = 8;
/// Private and shared pages side by side under one character.
const MIXED: char = '%';

pub(super) fn draw(picture: &Picture<'_>) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", picture.title);
    for row in rows::of(picture) {
        let _ = write!(out, "{:>#14x} |{}|", row.offset().get(), characters(&row));
        let _ = match row.repeat {
            1 => writeln!(out),
            n => writeln!(out, " x {n}"),
        };
    }
    let _ = writeln!(out, "each row 2 MiB, each character 8 pages of 4 KiB");
    for (look, nr_pages) in rows::totals(picture) {
        if nr_pages > 0 {
            let size = Human(ByteSize::from_pages(nr_pages));
            let _ = writeln!(out, "  {}  {}: {size}", character(look), look.name());
        }
    }
    let _ = writeln!(out, "  {MIXED}  private and shared under one character");
    out
}

fn characters(row: &Row) -> String {
    let mut line: Vec<Option<char>> = Vec::new();
    for column in (0..HUGE_PAGES / PER_CHAR).map(|i| i * PER_CHAR) {
        let here = row
            .cells
            .iter()
            .filter(|cell| cell.column < column + PER_CHAR && column < cell.column + cell.nr_pages);
        line.push(here.map(|cell| cell.look).fold(None, |found, look| match found {
            None => Some(character(look)),
            Some(found) => Some(combine(found, look)),
        }));
    }
    line.into_iter().map(|found| found.unwrap_or(' ')).collect()
}

/// What is rarer wins; two sides of visibility show as such.
fn combine(found: char, look: Look) -> char {
    let next = character(look);
    let rarity = |c| match c {
        '!' => 1,
        'X' => 2,
        '?' => 3,
        _ => 0,
    };
    match (rarity(found), rarity(next)) {
        _ if found == next => found,
        (0, 0) => MIXED,
        (before, now) if before >= now => found,
        _ => next,
    }
}

fn character(look: Look) -> char {
    match look {
        Look::Private => '#',
        Look::Shared => '=',
        Look::Pinned => '!',
        Look::Exclusive => 'X',
        Look::AbsentPrivate => '.',
        Look::AbsentShared => '-',
        Look::Quarantined => '?',
    }
}
