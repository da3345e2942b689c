//! The map as SVG.

use std::fmt::{self, Write};

use super::rows::{self, Cell, Row};
use super::{Human, Look, Picture};
use crate::addr::ByteSize;
use crate::geometry::{FolioSize, HUGE_PAGES};

/// The picture's measures in pixels.
const PAGE_WIDTH: u64 = 2;
const MAP_WIDTH: u64 = HUGE_PAGES * PAGE_WIDTH;
const LEFT: u64 = 112;
const RIGHT: u64 = 104;
const TOP: u64 = 116;
const ROW_HEIGHT: u64 = 14;
const ROW_PITCH: u64 = 18;
const BOTTOM: u64 = 28;
const LEGEND_PITCH: u64 = 174;
const WIDTH: u64 = LEFT + MAP_WIDTH + RIGHT;

const STYLE: &str = "\
text{font-family:system-ui,'DejaVu Sans',sans-serif;font-size:12px;fill:#333a45}\
.h{font-size:18px;font-weight:600;fill:#11151c}\
.a{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:11px;fill:#667085}\
.private{fill:#3f4fa3}.shared{fill:#33a474}.pinned{fill:#f0a51e}.exclusive{fill:#d14a5f}\
.absent-private{fill:#d8dcf0}.absent-shared{fill:#d6eee2}.quarantined{fill:#11151c}\
.cell:hover{opacity:.75}\
.folio{fill:none;stroke:#11151c;stroke-width:1}\
.small{fill:none;stroke:#667085;stroke-width:1;stroke-dasharray:2 2}";

pub(super) fn draw(picture: &Picture<'_>) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_document(&mut out, picture);
    out
}

fn write_document(out: &mut String, picture: &Picture<'_>) -> fmt::Result {
    let rows = rows::of(picture);
    let height = TOP + ROW_PITCH * rows.len() as u64 + BOTTOM;
    let title = Escaped(picture.title);
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">"
    )?;
    writeln!(out, "<title>{title}</title>")?;
    writeln!(out, "<style>{STYLE}</style>")?;
    writeln!(out, "<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>")?;
    writeln!(out, "<text class=\"h\" x=\"16\" y=\"32\">{title}</text>")?;
    write_legend(out, picture)?;
    for (i, row) in (0..).zip(&rows) {
        write_row(out, picture, row, TOP + ROW_PITCH * i)?;
    }
    writeln!(out, "</svg>")
}

fn write_legend(out: &mut String, picture: &Picture<'_>) -> fmt::Result {
    let all: u64 = picture.pages.iter().map(|(range, _)| range.nr_pages()).sum();
    writeln!(
        out,
        "<text x=\"16\" y=\"54\">{} in rows of 2 MiB; a column is a page of 4 KiB, a frame is a \
         folio</text>",
        Human(ByteSize::from_pages(all))
    )?;
    for (i, (look, nr_pages)) in (0..).zip(rows::totals(picture)) {
        let (x, class, name) = (16 + LEGEND_PITCH * i, class(look), look.name());
        writeln!(out, "<rect class=\"{class}\" x=\"{x}\" y=\"70\" width=\"14\" height=\"14\"/>")?;
        writeln!(out, "<text x=\"{}\" y=\"82\">{name}</text>", x + 20)?;
        let size = Human(ByteSize::from_pages(nr_pages));
        writeln!(out, "<text class=\"a\" x=\"{}\" y=\"97\">{size}</text>", x + 20)?;
    }
    Ok(())
}

fn write_row(out: &mut String, picture: &Picture<'_>, row: &Row, y: u64) -> fmt::Result {
    let text_y = y + ROW_HEIGHT - 3;
    writeln!(
        out,
        "<text class=\"a\" x=\"{}\" y=\"{text_y}\" text-anchor=\"end\">{:#x}</text>",
        LEFT - 10,
        row.offset().get()
    )?;
    for cell in &row.cells {
        write_cell(out, row, cell, y)?;
    }
    // What is left of an object behind its last whole 2 MiB is made of small folios, too.
    let whole = picture.folio_size == FolioSize::Huge2M && row.nr_pages() == HUGE_PAGES;
    writeln!(
        out,
        "<rect class=\"{}\" x=\"{LEFT}\" y=\"{y}\" width=\"{}\" height=\"{ROW_HEIGHT}\"/>",
        if whole { "folio" } else { "small" },
        row.nr_pages() * PAGE_WIDTH
    )?;
    if row.repeat > 1 {
        let x = LEFT + MAP_WIDTH + 10;
        writeln!(out, "<text class=\"a\" x=\"{x}\" y=\"{text_y}\">x {} rows</text>", row.repeat)?;
    }
    Ok(())
}

fn write_cell(out: &mut String, row: &Row, cell: &Cell, y: u64) -> fmt::Result {
    let Some(range) = row.range_of(cell) else { return Ok(()) };
    let (x, width) = (LEFT + cell.column * PAGE_WIDTH, cell.nr_pages * PAGE_WIDTH);
    write!(
        out,
        "<rect class=\"cell {}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{ROW_HEIGHT}\" \
         data-pages=\"{}\"><title>{range}: {}, {}",
        class(cell.look),
        range.nr_pages(),
        Human(range.len_bytes()),
        cell.look.name(),
    )?;
    if cell.info.pins > 0 {
        write!(out, ", pins: {}", cell.info.pins)?;
    }
    writeln!(out, "</title></rect>")
}

fn class(look: Look) -> &'static str {
    match look {
        Look::Private => "private",
        Look::Shared => "shared",
        Look::Pinned => "pinned",
        Look::Exclusive => "exclusive",
        Look::AbsentPrivate => "absent-private",
        Look::AbsentShared => "absent-shared",
        Look::Quarantined => "quarantined",
    }
}

/// Text that may stand between tags: markup escaped, characters that XML 1.0 does not have replaced.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&apos;")?,
                '\t' | '\n' | '\r' => f.write_char(' ')?,
                c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {
                    f.write_char(char::REPLACEMENT_CHARACTER)?;
                }
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}
