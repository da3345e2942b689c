//! One part of a pool's memory: a run of frames of one zone, and whose they are.

use std::fmt;

use super::frames::{Frames, Promise, Taken, Wish};
use super::home::Homes;
use super::record::{Record, Records, Use};
use crate::addr::{PageNumber, Pfn, Pgoff};
use crate::error::Error;
use crate::geometry::FolioSize;
use crate::range::PfnRange;

/// What kind of frames a part has, after the kernel's zones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Zone {
    /// For anything.
    #[default]
    Normal,
    /// For what can be moved at any time, so that the part can be emptied (`ZONE_MOVABLE`).
    Movable,
    /// For what can be moved when a device wants one large run (`MIGRATE_CMA`).
    Cma,
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Movable => "movable",
            Self::Cma => "cma",
        })
    }
}

/// A run of frames of one zone.
#[derive(Debug)]
pub(super) struct PartState {
    pub(super) start: u64,
    pub(super) zone: Zone,
    pub(super) frames: Frames,
    pub(super) records: Records,
    pub(super) homes: Homes,
}

impl PartState {
    pub(super) fn new(frames: PfnRange, zone: Zone) -> Result<Self, Error> {
        let nr_pages = frames.nr_pages();
        Ok(Self {
            start: frames.start().get(),
            zone,
            frames: Frames::new(nr_pages)?,
            records: Records::new(nr_pages)?,
            homes: Homes::new(nr_pages)?,
        })
    }

    /// A frame of the part as the pool numbers it.
    pub(super) fn pfn(&self, frame: u64) -> Pfn {
        Pfn::from_raw(self.start + frame)
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let maps = self.frames.metadata_bytes() + self.homes.metadata_bytes();
        maps + self.records.metadata_bytes()
    }
}

/// A folio that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// All zeroes.
    Clean(Pfn),
    /// To be scrubbed by the caller.
    Dirty(Pfn),
    /// The caller scrubs this block of 2 MiB, gives it to [`State::scrubbed`](super::state::State::scrubbed), and tries again.
    ScrubFirst(Pfn),
    /// The caller waits until a scrub has ended, and tries again.
    Wait,
}

/// What is known of the bytes of a folio that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    /// All zero.
    Zero,
    /// Not all zero, perhaps. For folios of 2 MiB or more without poisoned frames.
    Dirty,
}

impl PartState {
    /// Writes down whose a folio is that was just taken, or puts it back.
    #[inline]
    pub(super) fn note(
        &mut self,
        owner: usize,
        page: Pgoff,
        size: FolioSize,
        start: u64,
        (bytes, promise): (Bytes, Promise),
    ) -> Result<(), Error> {
        let state = Use::Owned { owner, page: page.get() };
        let outcome = self.records.insert(Record { start, size, state });
        if outcome.is_err() {
            match bytes {
                Bytes::Zero => {
                    self.frames.give_back_clean(start, size, promise);
                }
                Bytes::Dirty => self.frames.give_back_dirty(start, size, promise),
            }
        }
        outcome
    }

    /// Takes a folio, where it is wished if that is free.
    #[inline]
    pub(super) fn take(&mut self, size: FolioSize, wish: Wish, promise: Promise) -> Taken {
        let Self { frames, homes, .. } = self;
        frames.take(size, wish, promise, |buddy| homes.outside(buddy, size))
    }

    /// Takes a folio that nobody was promised; `None` if there is none.
    pub(super) fn take_unpromised(
        &mut self,
        owner: usize,
        size: FolioSize,
        page: Pgoff,
        wish: Wish,
    ) -> Option<Got> {
        let (start, bytes) = match self.take(size, wish, Promise::None) {
            Taken::Clean(start) => (start, Bytes::Zero),
            Taken::Dirty(start) => (start, Bytes::Dirty),
            Taken::ScrubFirst(start) => return Some(Got::ScrubFirst(self.pfn(start))),
            Taken::Wait => return Some(Got::Wait),
            Taken::Nothing => return None,
        };
        self.note(owner, page, size, start, (bytes, Promise::None)).ok()?;
        let pfn = self.pfn(start);
        Some(if bytes == Bytes::Zero { Got::Clean(pfn) } else { Got::Dirty(pfn) })
    }

    /// A step towards a free block of 1 GiB that nobody was promised; `None` if there is none to be had.
    pub(super) fn gather(&mut self) -> Option<Got> {
        match self.frames.gather() {
            Taken::ScrubFirst(start) => Some(Got::ScrubFirst(self.pfn(start))),
            Taken::Wait => Some(Got::Wait),
            Taken::Clean(_) | Taken::Dirty(_) | Taken::Nothing => None,
        }
    }

    /// Takes a block back that is as dirty as it was, out of the hands of somebody who is gone.
    pub(super) fn not_scrubbed(&mut self, start: u64, size: FolioSize) {
        let Self { frames, records, .. } = self;
        frames.not_scrubbed(start, size, |start| records.lose(start));
    }

    /// Takes a block back of which some frame cannot be scrubbed.
    pub(super) fn cannot_be_scrubbed(&mut self, start: u64, size: FolioSize) {
        let Self { frames, records, .. } = self;
        frames.cannot_be_scrubbed(start, size, |start| records.lose(start));
    }

    /// A block that waits for a scrub cannot be scrubbed.
    pub(super) fn lose_dirty(&mut self, start: u64, size: FolioSize) {
        if self.frames.take_in_hands_at(start, size) {
            self.cannot_be_scrubbed(start, size);
        }
    }

    pub(super) fn covers(&self, pfn: Pfn) -> bool {
        pfn.get().checked_sub(self.start).is_some_and(|frame| frame < self.frames.nr_pages())
    }
}

#[inline]
pub(super) fn part_of(parts: &mut [PartState], pfn: Pfn) -> Option<(usize, &mut PartState)> {
    parts.iter_mut().enumerate().find(|(_, part)| part.covers(pfn))
}
