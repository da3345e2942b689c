//! Compaction: folios are asked to move until a large block is free.

use std::fmt;
use std::sync::Arc;

use super::owner::Mover;
use super::part::Zone;
use super::pool::FolioPool;
use super::record::Record;
use super::state::State;
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::range::PfnRange;

/// What a compaction came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Compaction {
    /// The block that is free now; `None` if none could be made.
    pub made: Option<PfnRange>,
    /// How much was moved, in vain or not.
    pub moved: ByteSize,
    /// What stood in the way in the blocks that were tried.
    pub obstacles: Vec<Obstacle>,
}

/// A folio that could not be moved.
#[derive(Debug)]
#[non_exhaustive]
pub struct Obstacle {
    /// Where it is.
    pub frames: PfnRange,
    /// Why.
    pub error: Error,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, nr_pages) = (self.frames.start(), self.frames.nr_pages());
        write!(f, "{nr_pages} frames from {start} on: {}", self.error)
    }
}

/// How many blocks are tried: each that fails has moved memory for nothing.
const MOST_TRIES: usize = 4;

/// A block to be made free.
struct Candidate {
    part: usize,
    start: u64,
    nr_used: u64,
}

/// The free frames of a block, out of everybody's reach until this is dropped.
struct Isolated<'a> {
    pool: &'a FolioPool,
    part: usize,
    runs: Vec<(u64, u64)>,
}

impl Drop for Isolated<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        if let Some(part) = state.parts.get_mut(self.part) {
            self.runs.iter().for_each(|&(start, nr)| part.frames.free_run(start, nr));
        }
    }
}

impl Isolated<'_> {
    /// Adds the frames of a folio that has moved away, if nobody was faster and promises are kept.
    fn add(&mut self, frames: PfnRange) {
        let mut state = self.pool.state();
        let Some(part) = state.parts.get_mut(self.part) else { return };
        let start = frames.start().get() - part.start;
        let size = match frames.nr_pages() {
            1 => FolioSize::Base,
            HUGE_PAGES => FolioSize::Huge2M,
            _ => FolioSize::Huge1G,
        };
        if self.runs.try_reserve(1).is_ok() && part.frames.isolate_folio(start, size) {
            self.runs.push((start, size.nr_pages()));
        }
    }
}

impl FolioPool {
    /// Makes room for a folio of a size in a zone, by asking objects to move theirs: first where the
    /// fewest frames are in use.
    ///
    /// Nothing has to be moved if there is such a block already. What moves keeps its bytes, and stays in
    /// its zone.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for folios of 4 KiB: there is nothing to be made. That a block cannot be made is
    /// no error: see [`Compaction`].
    pub fn compact(&self, size: FolioSize, zone: Zone) -> Result<Compaction, Error> {
        if size == FolioSize::Base {
            return Err(Error::new(Op::Compact, ErrorKind::Unsupported));
        }
        self.scrub_all();
        let mut compaction = Compaction::default();
        if let Some(made) = self.state().free_block(size, zone) {
            compaction.made = PfnRange::new(made, size.nr_pages()).ok();
            return Ok(compaction);
        }
        let mut candidates = self.state().candidates(size, zone);
        candidates.sort_by_key(|candidate| candidate.nr_used);
        for candidate in candidates.iter().take(MOST_TRIES) {
            self.vacate(candidate, size, &mut compaction);
            if compaction.made.is_some() {
                break;
            }
        }
        Ok(compaction)
    }

    /// Moves away all that is in a block, or finds out what cannot be.
    fn vacate(&self, block: &Candidate, size: FolioSize, into: &mut Compaction) {
        let mut isolated = {
            let mut state = self.state();
            let Some(part) = state.parts.get_mut(block.part) else { return };
            let Some(runs) = part.frames.isolate(block.start, size) else { return };
            Isolated { pool: self, part: block.part, runs }
        };
        let folios = self.state().folios_in(block, size);
        let mut is_vacant = true;
        for (frames, mover) in folios {
            let outcome = match mover {
                Some((mover, page)) => mover.move_away(page, frames.start()),
                None => Err(Error::new(Op::Compact, ErrorKind::Quarantined)),
            };
            match outcome {
                Ok(()) => {
                    // Or the next folio moves to where this one was.
                    isolated.add(frames);
                    let moved = into.moved.get() + frames.len_bytes().get();
                    into.moved = ByteSize::from_bytes(moved);
                }
                Err(error) => {
                    is_vacant = false;
                    into.obstacles.push(Obstacle { frames, error });
                    break;
                }
            }
        }
        drop(isolated);
        // What moved out of large folios may be dirty still.
        self.scrub_all();
        if is_vacant {
            let state = self.state();
            let Some(part) = state.parts.get(block.part) else { return };
            let order = part.frames.buddy().order_at(block.start);
            if order.is_some_and(|order| order >= size.order()) {
                into.made = PfnRange::new(part.pfn(block.start), size.nr_pages()).ok();
            }
        }
    }
}

/// A folio to be moved, and who can.
type Moveable = (PfnRange, Option<(Arc<dyn Mover>, Pgoff)>);

impl State {
    fn free_block(&self, size: FolioSize, zone: Zone) -> Option<Pfn> {
        let mut parts = self.parts.iter().filter(|part| part.zone == zone);
        parts.find_map(|part| {
            let blocks = part.frames.buddy().free_blocks();
            let mut large = blocks.filter(|&(_, nr_pages)| nr_pages >= size.nr_pages());
            large.next().map(|(start, _)| part.pfn(start))
        })
    }

    /// Blocks in which something is free and something is in use, without failed frames.
    fn candidates(&self, size: FolioSize, zone: Zone) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (nr, part) in self.parts.iter().enumerate().filter(|(_, part)| part.zone == zone) {
            let nr_pages = size.nr_pages();
            let mut start = 0;
            while start + nr_pages <= part.frames.nr_pages() {
                let used = part.records.within(start, nr_pages).map(|r| r.size.nr_pages()).sum();
                let is_whole = part.frames.poisoned_in(start, nr_pages).is_empty();
                if used > 0 && used < nr_pages && is_whole && candidates.try_reserve(1).is_ok() {
                    candidates.push(Candidate { part: nr, start, nr_used: used });
                }
                start += nr_pages;
            }
        }
        candidates
    }

    fn folios_in(&self, block: &Candidate, size: FolioSize) -> Vec<Moveable> {
        let Some(part) = self.parts.get(block.part) else { return Vec::new() };
        let folio = |record: &Record| {
            let frames = PfnRange::new(part.pfn(record.start), record.size.nr_pages()).ok()?;
            Some((frames, self.mover_of(record)))
        };
        part.records.within(block.start, size.nr_pages()).filter_map(folio).collect()
    }
}
