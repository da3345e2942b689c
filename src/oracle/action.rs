//! The Action language: what a caller may ask for, in small integers that are only claims.
//!
//! An action means something for every value, so that any bytes at all are a test: claims are mapped
//! onto the objects and pages that exist, most of them onto a few hot pages where operations meet,
//! and some onto ranges that no object has.

use arbitrary::{Arbitrary, Unstructured};

use crate::geometry::{FolioSize, HUGE_PAGES, MAX_PAGES, PAGE_SIZE};
use crate::gmem::{ContentPolicy, PinMode};
use crate::state::Visibility;

/// One call of the library. `object` picks one of the objects that are alive.
#[derive(Arbitrary, Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Creates one more object on the pool, of a good or a bad size.
    CreateObject {
        /// How large.
        size: SizeClaim,
        /// Made of what.
        folio: FolioSize,
        /// What its pages are at first.
        initial: Visibility,
    },
    /// Drops the handle of an object. Its pins and views keep it alive.
    DropObject {
        /// Which one.
        object: u8,
    },
    /// Gives pages their folios.
    Allocate {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
    },
    /// Forgets the contents of pages.
    Punch {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
    },
    /// Pins pages.
    Pin {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
        /// By whom: one of a few names, or rarely with the tag of another object.
        owner: u8,
        /// How it gets on with other pins.
        mode: PinMode,
        /// How long it would wait.
        patience: Patience,
    },
    /// Drops a pin.
    Unpin {
        /// Which of those that are held.
        which: u8,
    },
    /// Moves pages to one side.
    Convert {
        /// Of which object.
        object: u8,
        /// Which pages.
        ranges: [RangeClaim; 3],
        /// How many of the three ranges: mostly one.
        nr_ranges: u8,
        /// To which side.
        to: Visibility,
        /// What becomes of their bytes.
        content: ContentPolicy,
        /// How many culprits to name.
        most_culprits: u8,
        /// How long it would wait.
        patience: Patience,
    },
    /// Makes the words of state as few as they can be.
    Trim {
        /// Of which object.
        object: u8,
    },
    /// Copies bytes out.
    Read {
        /// Of which object.
        object: u8,
        /// Which bytes.
        bytes: ByteClaim,
        /// By which door.
        door: Door,
    },
    /// Copies bytes in.
    Write {
        /// Of which object.
        object: u8,
        /// Which bytes.
        bytes: ByteClaim,
        /// What to write is made of this; zero makes zeroes.
        seed: u8,
        /// By which door.
        door: Door,
    },
    /// Loads eight bytes at once.
    LoadU64 {
        /// Of which object.
        object: u8,
        /// From where.
        at: ByteClaim,
        /// By which door.
        door: Door,
    },
    /// Stores eight bytes at once.
    StoreU64 {
        /// Of which object.
        object: u8,
        /// To where.
        at: ByteClaim,
        /// What.
        value: u64,
        /// By which door.
        door: Door,
    },
    /// Maps one more view of an object, or unmaps one.
    View {
        /// Of which object.
        object: u8,
        /// What to do.
        change: ViewChange,
    },
    /// Asks about pages.
    Ask {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
        /// What about them.
        question: Question,
    },
    /// Now and then, for it takes long: compares every byte that can be seen, and reads every free
    /// frame.
    Examine(u8),
}

impl Action {
    /// The actions that some bytes stand for, whatever they are.
    ///
    /// Unlike `Vec::<Action>::arbitrary`, which asks before every element whether there is one more,
    /// and so makes a list of two out of random bytes.
    pub fn list(bytes: &[u8]) -> Vec<Self> {
        let mut input = Unstructured::new(bytes);
        let mut actions = Vec::new();
        while !input.is_empty() {
            match Self::arbitrary(&mut input) {
                Ok(action) => actions.push(action),
                Err(_) => break,
            }
        }
        actions
    }
}

/// How long an action would wait. There is one thread, so nothing that it waits for comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Not at all.
    None,
    /// Until now.
    Expired,
    /// Until somebody calls it off, which has happened.
    Cancelled,
}

/// What is done about the views of an object.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewChange {
    /// One more. How it is made is in the claim for its object: lists that are worth keeping go on to mean what
    /// they did.
    Map,
    /// One less: this one.
    Drop(u8),
}

/// What can be asked about pages.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Who may see them.
    Visibility,
    /// All of their state.
    Snapshot,
    /// Who holds pins on them.
    Owners,
}

/// Which of the two handles an access goes by.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The object itself.
    Object,
    /// Its first view, if it has one.
    View,
}

/// A size, wanted or nonsensical.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeClaim(u8);

impl SizeClaim {
    /// The size in bytes.
    pub(super) fn bytes(self) -> u64 {
        const NR_PAGES: [u64; 14] = [
            1,
            4,
            24,
            40,
            HUGE_PAGES - 1,
            HUGE_PAGES,
            HUGE_PAGES,
            HUGE_PAGES + 5,
            HUGE_PAGES + 21,
            2 * HUGE_PAGES,
            2 * HUGE_PAGES + 3,
            3 * HUGE_PAGES,
            3 * HUGE_PAGES + 37,
            3 * HUGE_PAGES + 38,
        ];
        const BAD: [u64; 7] = [0, 1, 4097, (1 << 63) - 4096, 1 << 63, u64::MAX, 1 << 62];
        match self.0 {
            0..224 => pick(&NR_PAGES, self.0) << 12,
            _ => pick(&BAD, self.0),
        }
    }
}

fn pick(from: &[u64], claim: u8) -> u64 {
    from.get(usize::from(claim) % from.len()).copied().unwrap_or_default()
}

/// Some pages of an object, or of none.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeClaim {
    kind: u8,
    at: u16,
    nr: u16,
}

/// A range as it is handed to the library: not born yet, and perhaps not fit to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// `PgoffRange::new`.
    Pages { start: u64, nr_pages: u64 },
    /// `PgoffRange::from_bytes`.
    Bytes { start: u64, len: u64 },
}

impl RangeClaim {
    /// What it means for an object of so many pages, of which there is at least one.
    pub(super) fn of(self, nr_pages: u64) -> Asked {
        let (at, nr) = (u64::from(self.at), u64::from(self.nr));
        let inside = |start: u64, nr: u64| {
            let start = start % nr_pages;
            Asked::Pages { start, nr_pages: nr.clamp(1, nr_pages - start) }
        };
        match self.kind {
            0..120 => inside(hot(at, nr_pages), 1 + nr % 8),
            // Over the border of two folios.
            120..150 => inside((HUGE_PAGES - 4) + at % 8, 1 + nr % 16),
            // Whole folios of 2 MiB, and two of those with what lies between.
            150..165 => inside(at % 3 * HUGE_PAGES, HUGE_PAGES << (nr % 2)),
            // What is left of one in front of a page, and behind it.
            165..175 => inside(0, 1 + hot(at, nr_pages) % HUGE_PAGES),
            175..185 => {
                let page = hot(at, nr_pages);
                inside(page, HUGE_PAGES - page % HUGE_PAGES)
            }
            185..205 => inside(at, 1 + nr % nr_pages),
            205..212 => inside(0, nr_pages),
            // Over the end, far and near.
            212..224 => {
                Asked::Pages { start: nr_pages - 1 - at % nr_pages.min(8), nr_pages: 9 + nr }
            }
            // Behind it.
            224..232 => Asked::Pages { start: nr_pages + at % 4, nr_pages: 1 + nr },
            232..236 => Asked::Pages { start: hot(at, nr_pages), nr_pages: 0 },
            236..240 => Asked::Bytes { start: hot(at, nr_pages) << 12, len: (1 + nr % 8) << 12 },
            240..244 => Asked::Bytes { start: 1 + at, len: (1 + nr % 8) << 12 },
            244..248 => Asked::Bytes { start: hot(at, nr_pages) << 12, len: u64::from(self.nr) },
            248..250 => Asked::Bytes { start: u64::MAX - 0xfff, len: PAGE_SIZE.get() << (nr % 8) },
            // The last page that may exist, and the first that may not.
            250..253 => Asked::Pages { start: MAX_PAGES - 1 - at % 2, nr_pages: 1 + nr % 4 },
            _ => Asked::Pages { start: u64::MAX - at, nr_pages: u64::MAX - nr },
        }
    }
}

/// A page where others are likely to be as well: at the start, at the border of the first folio, at
/// the end, or now and then anywhere.
pub(super) fn hot(at: u64, nr_pages: u64) -> u64 {
    let page = match (at >> 8) % 8 {
        0..=3 => at % 10,
        4 | 5 => HUGE_PAGES - 5 + at % 10,
        6 => nr_pages.saturating_sub(1 + at % 10),
        _ => at,
    };
    page % nr_pages
}

/// Some bytes of an object, or of none.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteClaim {
    kind: u8,
    at: u16,
    len: u16,
}

impl ByteClaim {
    /// First byte and length, for an object of so many pages.
    pub(super) fn of(self, nr_pages: u64) -> (u64, u64) {
        let size = nr_pages << 12;
        let (at, len) = (u64::from(self.at), u64::from(self.len));
        let start = (hot(at, nr_pages) << 12) + (at ^ len) % 4096;
        match self.kind {
            0..180 => (start, len % 300),
            // Over the end of a page; over the end of a folio.
            180..205 => ((start & !0xfff) + 0xff8, len % 0x3000),
            205..215 => ((HUGE_PAGES << 12) - 1 - at % 64, len % 128),
            // More than is copied at once.
            215..220 => (start, 0x1_0000 + len),
            220..230 => (size - len.min(size), len),
            230..240 => (size.saturating_sub(at % 16), len % 32),
            240..246 => (size + at, len % 32),
            246..250 => (u64::MAX - at % 16, len % 32),
            _ => (start, 0),
        }
    }

    /// Where eight bytes begin: mostly aligned.
    pub(super) fn word(self, nr_pages: u64) -> u64 {
        let (at, len) = self.of(nr_pages);
        if len % 8 == 7 { at } else { at & !7 }
    }
}

macro_rules! arbitrary_choice {
    ($($type:ty: $($value:expr),+;)+) => {
        $(impl<'a> Arbitrary<'a> for $type {
            fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
                u.choose(&[$($value),+]).copied()
            }

            fn size_hint(_depth: usize) -> (usize, Option<usize>) {
                (1, Some(1))
            }
        })+
    };
}

pub(super) use arbitrary_choice;

arbitrary_choice! {
    Visibility: Self::Shared, Self::Shared, Self::Private;
    FolioSize: Self::Base, Self::Huge2M;
    PinMode: Self::Counted, Self::Counted, Self::Counted, Self::Exclusive;
    ContentPolicy: Self::Preserve, Self::Zero;
    Patience: Self::None, Self::None, Self::None, Self::Expired, Self::Cancelled;
}
