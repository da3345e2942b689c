//! Pictures of a guest's memory: as text for a terminal, as SVG for a browser.
//!
//! Both are pure functions over a [snapshot](crate::GuestMemfd::snapshot), so they can be drawn from
//! a copy that was taken at an interesting moment. A row is 2 MiB, one huge folio. In an object of more
//! than 256 MiB, neighbouring rows that are uniform and alike are drawn once, with a factor.

mod rows;
mod svg;
#[cfg(test)]
mod tests;
mod text;

use std::fmt;

use crate::addr::ByteSize;
use crate::geometry::FolioSize;
use crate::gmem::{PageInfo, PageStatus, Residency};
use crate::range::PgoffRange;
use crate::state::Visibility;

/// What is drawn: the pages of an object, and the words around them.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// The headline. May hold any text.
    pub title: &'a str,
    /// How large the object's folios are: where their borders lie.
    pub folio_size: FolioSize,
    /// The pages, ascending, as [`GuestMemfd::snapshot`](crate::GuestMemfd::snapshot) gives them.
    pub pages: &'a [(PgoffRange, PageInfo)],
}

impl Picture<'_> {
    /// A line for each row of 512 pages, 64 characters of 8 pages each, and a legend.
    pub fn to_text(&self) -> String {
        text::draw(self)
    }

    /// An SVG document of its own: a row of 512 pages for each folio, with a title, a legend, and
    /// for each run of pages a text that says where it lies and what it is.
    pub fn to_svg(&self) -> String {
        svg::draw(self)
    }
}

/// What a page looks like: the one thing that matters most about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Look {
    AbsentPrivate,
    AbsentShared,
    Private,
    Shared,
    Pinned,
    Exclusive,
    Quarantined,
}

impl Look {
    const ALL: [Self; 7] = [
        Self::Private,
        Self::Shared,
        Self::Pinned,
        Self::Exclusive,
        Self::AbsentPrivate,
        Self::AbsentShared,
        Self::Quarantined,
    ];

    /// A page that is being converted looks like what it was before.
    fn of(info: &PageInfo) -> Self {
        match (info.status, info.visibility, info.residency) {
            (PageStatus::Quarantined, _, _) => Self::Quarantined,
            (PageStatus::ExclusivelyPinned, _, _) => Self::Exclusive,
            _ if info.pins > 0 => Self::Pinned,
            (_, Visibility::Private, Residency::Resident) => Self::Private,
            (_, Visibility::Shared, Residency::Resident) => Self::Shared,
            (_, Visibility::Private, Residency::Absent) => Self::AbsentPrivate,
            (_, Visibility::Shared, Residency::Absent) => Self::AbsentShared,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Pinned => "shared, pinned",
            Self::Exclusive => "pinned exclusively",
            Self::AbsentPrivate => "private, absent",
            Self::AbsentShared => "shared, absent",
            Self::Quarantined => "quarantined",
        }
    }
}

/// A size as people write it: `64 MiB`, `12 KiB`, in the largest unit that divides it.
struct Human(ByteSize);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.get();
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in units {
            if bytes >> shift > 0 && bytes % (1 << shift) == 0 {
                return write!(f, "{} {unit}", bytes >> shift);
            }
        }
        write!(f, "{bytes} bytes")
    }
}
