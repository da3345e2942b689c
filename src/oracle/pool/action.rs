//! What a VMM may ask of a pool, in small integers that are only claims.

use arbitrary::{Arbitrary, Unstructured};

use crate::addr::ByteSize;
use crate::folio::{Commitment, PrivatePlacement, Zone};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::oracle::action::{RangeClaim, arbitrary_choice, hot};
use crate::state::Visibility;

/// One call. `object` and `account` pick one of those that there are.
#[derive(Arbitrary, Clone, Debug, PartialEq, Eq)]
pub enum PoolAction {
    /// Opens an account.
    OpenAccount {
        /// How much it may be charged.
        limit: Limit,
    },
    /// Gives an account another limit.
    SetLimit {
        /// Which one.
        account: u8,
        /// What it may be charged from now on.
        limit: Limit,
    },
    /// Creates an object.
    Create {
        /// How large, or nonsense.
        size: Amount,
        /// Made of what.
        folio: FolioSize,
        /// Where its folios may be.
        zones: Zones,
        /// What becomes of private memory elsewhere.
        placement: PrivatePlacement,
        /// Whether it is promised its memory.
        commitment: Commitment,
        /// What its pages are at first.
        initial: Visibility,
        /// On which account; often on none.
        account: u8,
    },
    /// Drops an object.
    Drop {
        /// Which one.
        object: u8,
    },
    /// Gives pages their folios.
    Allocate {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
        /// After how many folios it is made to fail; rarely at all.
        fails_after: u8,
    },
    /// Fills pages with bytes of the object's own.
    Write {
        /// Of which object.
        object: u8,
        /// Which pages, a few.
        range: RangeClaim,
    },
    /// Reads a page.
    Read {
        /// Of which object.
        object: u8,
        /// Which page.
        range: RangeClaim,
    },
    /// Forgets the contents of pages.
    Punch {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
    },
    /// Moves pages to one side.
    Convert {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
        /// To which side.
        to: Visibility,
    },
    /// Moves folios to a zone.
    Migrate {
        /// Of which object.
        object: u8,
        /// Which pages.
        range: RangeClaim,
        /// Where to.
        to: Zone,
    },
    /// Makes room for a large folio.
    Compact {
        /// How large.
        size: FolioSize,
        /// Where.
        zone: Zone,
    },
    /// Pins a page and forgets the pin, so that its folio is quarantined in the end. Once in a list.
    ForgetPin {
        /// Of which object.
        object: u8,
        /// Which page.
        range: RangeClaim,
    },
    /// Reports that a frame failed, unless the page in it is pinned.
    Poison {
        /// Which one.
        frame: FrameClaim,
    },
    /// Scrubs all that waits for it.
    Scrub,
    /// Starts a scrubber that does not clean of its own accord, so that folios come back dirty.
    StartScrubber,
    /// Ends it.
    EndScrubber,
}

impl PoolAction {
    /// The actions that some bytes stand for, whatever they are.
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

/// How much, wanted or nonsensical.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount(u8);

impl Amount {
    pub(super) fn bytes(self) -> ByteSize {
        const NR_PAGES: [u64; 12] = [
            1,
            3,
            40,
            HUGE_PAGES - 1,
            HUGE_PAGES,
            HUGE_PAGES,
            HUGE_PAGES + 7,
            HUGE_PAGES + 100,
            2 * HUGE_PAGES,
            2 * HUGE_PAGES + 19,
            3 * HUGE_PAGES,
            5 * HUGE_PAGES + 30,
        ];
        const BAD: [u64; 5] = [0, 1, 4097, u64::MAX, 1 << 62];
        let at = usize::from(self.0);
        ByteSize::from_bytes(match self.0 {
            0..240 => NR_PAGES.get(at % NR_PAGES.len()).map_or(0, |pages| pages << 12),
            _ => BAD.get(at % BAD.len()).copied().unwrap_or_default(),
        })
    }
}

/// What an account may be charged.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(u8);

impl Limit {
    pub(super) fn bytes(self) -> Option<ByteSize> {
        let pages = [HUGE_PAGES, 2 * HUGE_PAGES + 50, 30, 3 * HUGE_PAGES, 0];
        let at = usize::from(self.0);
        pages.get(at % (pages.len() + 2)).map(|&pages| ByteSize::from_pages(pages))
    }
}

/// Some zones, in some order, or twice, or none.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zones(u8);

impl Zones {
    pub(super) fn list(self) -> &'static [Zone] {
        use Zone::{Cma, Movable, Normal};
        const LISTS: [&[Zone]; 10] = [
            &[Normal],
            &[Normal],
            &[Normal],
            &[Normal, Movable],
            &[Movable, Normal],
            &[Movable],
            &[Movable, Cma],
            &[Normal, Normal],
            &[Movable, Normal, Movable],
            &[],
        ];
        LISTS.get(usize::from(self.0) % LISTS.len()).copied().unwrap_or_default()
    }
}

/// A frame, of the pool or of none, or the one that is behind a page.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameClaim(u16);

impl FrameClaim {
    /// One number in eight is past the end.
    pub(super) fn of(self, nr_frames: u64) -> u64 {
        u64::from(self.0) % (nr_frames + nr_frames / 8)
    }

    /// Every other claim is to the frame behind a page: of which object, and which one if that has so many.
    pub(super) fn behind(self) -> Option<(u8, impl Fn(u64) -> u64)> {
        let [object, _] = (self.0 << 1).to_be_bytes();
        let page = move |nr_pages| hot(u64::from(self.0 & 0x7ff), nr_pages);
        (self.0 >> 15 == 1).then_some((object >> 4, page))
    }
}

arbitrary_choice! {
    Zone: Self::Normal, Self::Movable, Self::Normal, Self::Movable, Self::Cma;
    PrivatePlacement: Self::MoveToNormal, Self::Refuse;
    Commitment: Self::Reserved, Self::Reserved, Self::Overcommitted;
}
