//! Compaction: folios are asked to move until a large block is free.

use std::fmt;
use std::sync::Arc;

use super::owner::{Moved, Mover};
use super::part::Zone;
use super::pool::FolioPool;
use super::record::{Record, Use};
use super::state::State;
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::range::PfnRange;

/// What a compaction came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Compaction {
    /// The block that is free now; `None` if none could be made.
    pub made: Option<PfnRange>,
    /// How much was moved, in vain or not.
    pub moved: ByteSize,
    /// What stood in the way in the blocks that were tried. There is nothing to be tried where no block
    /// consists of smaller folios.
    pub obstacles: Vec<Obstacle>,
}

/// A folio that could not be moved, or a block that could not be emptied for another reason.
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

/// How many blocks are left half empty: in each, memory was moved for nothing.
const MOST_IN_VAIN: usize = 4;
/// So many free blocks without memory are passed over.
const MOST_MISSING: usize = 16;
/// How many obstacles are reported.
const MOST_OBSTACLES: usize = 64;
/// How often a block is looked through for what others put there meanwhile.
const MOST_ROUNDS: usize = 4;

/// A block to be made free.
struct Candidate {
    part: usize,
    start: u64,
    frames: PfnRange,
    nr_used: u64,
}

/// The free frames of a block, out of everybody's reach until this is dropped.
struct Isolated<'a> {
    pool: &'a FolioPool,
    part: usize,
    runs: Vec<(u64, u64)>,
}

impl Isolated<'_> {
    /// Adds the frames of a folio that has just moved away: it would be the first to be taken for the next
    /// one. If somebody was faster, that one is found in the next round.
    fn add(&mut self, frames: PfnRange) {
        let mut state = self.pool.state();
        let Some(part) = state.parts.get_mut(self.part) else { return };
        let Some(start) = frames.start().get().checked_sub(part.start) else { return };
        let room = self.runs.try_reserve(1).is_ok();
        if room && part.frames.isolate_block(start, frames.nr_pages()) {
            self.runs.push((start, frames.nr_pages()));
        }
    }
}

impl Drop for Isolated<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        if let Some(part) = state.parts.get_mut(self.part) {
            self.runs.iter().for_each(|&(start, nr)| part.frames.free_run(start, nr));
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
        for _ in 0..MOST_MISSING {
            let Some(made) = self.state().free_block(size, zone) else { break };
            let made = PfnRange::new(made, size.nr_pages())?;
            if self.arena().require(Op::Compact, made).is_ok() {
                compaction.made = Some(made);
                return Ok(compaction);
            }
            self.state().doubt(made.start(), size);
            self.scrub_all();
        }
        let mut candidates = self.state().candidates(size, zone);
        candidates.sort_by_key(|candidate| candidate.nr_used);
        let mut nr_in_vain = 0;
        for candidate in &candidates {
            let before = compaction.moved;
            match self.vacate(candidate, size, &mut compaction) {
                Ok(made) => {
                    compaction.made = Some(made);
                    break;
                }
                Err(obstacle) if compaction.obstacles.len() < MOST_OBSTACLES => {
                    compaction.obstacles.push(obstacle);
                }
                Err(_) => {}
            }
            nr_in_vain += usize::from(compaction.moved != before);
            if nr_in_vain == MOST_IN_VAIN {
                break;
            }
        }
        Ok(compaction)
    }

    /// Moves away all that is in a block, or finds out what cannot be.
    fn vacate(
        &self,
        block: &Candidate,
        size: FolioSize,
        into: &mut Compaction,
    ) -> Result<PfnRange, Obstacle> {
        let stuck = |why| Obstacle {
            frames: block.frames,
            error: Error::new(Op::Compact, ErrorKind::Exhausted).because(why),
        };
        let mut isolated = {
            let mut state = self.state();
            let part = state.parts.get_mut(block.part);
            let runs = part.and_then(|part| part.frames.isolate(block.start, size));
            let runs =
                runs.ok_or_else(|| stuck("what is free in this block is promised to objects"))?;
            Isolated { pool: self, part: block.part, runs }
        };
        for _ in 0..MOST_ROUNDS {
            let folios = self.state().folios_in(block, size);
            if folios.is_empty() {
                break;
            }
            for Moveable { frames, by } in folios {
                let moved = by
                    .and_then(|(mover, page)| mover.move_away(page, frames.start()))
                    .map_err(|error| Obstacle { frames, error: error.of(Op::Compact) })?;
                if moved == Moved::Yes {
                    into.moved = ByteSize::from_bytes(into.moved.get() + frames.len_bytes().get());
                }
                isolated.add(frames);
            }
        }
        drop(isolated);
        // What moved out of large folios may be dirty still.
        self.scrub_all();
        let is_there = self.arena().require(Op::Compact, block.frames);
        let state = self.state();
        let part = state.parts.get(block.part);
        match part.and_then(|part| part.frames.buddy().order_from(block.start, size.order())) {
            Some(_) => match is_there {
                Ok(()) => Ok(block.frames),
                Err(error) => Err(Obstacle { frames: block.frames, error }),
            },
            None => Err(stuck("somebody has taken memory of this block meanwhile")),
        }
    }
}

/// A folio to be moved, and who can, and its first page; or why nobody can.
struct Moveable {
    frames: PfnRange,
    by: Result<(Arc<dyn Mover>, Pgoff), Error>,
}

impl State {
    /// A free block of which nobody was promised a part.
    fn free_block(&self, size: FolioSize, zone: Zone) -> Option<Pfn> {
        let mut parts = self.parts.iter().filter(|part| part.zone == zone);
        parts.find_map(|part| {
            if part.frames.free().promisable(&part.frames.promised(), size) == 0 {
                return None;
            }
            let blocks = part.frames.buddy().free_blocks();
            let mut large = blocks.filter(|&(_, nr_pages)| nr_pages >= size.nr_pages());
            large.next().map(|(start, _)| part.pfn(start))
        })
    }

    /// Blocks that hold smaller folios, without failed frames.
    fn candidates(&self, size: FolioSize, zone: Zone) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (nr, part) in self.parts.iter().enumerate().filter(|(_, part)| part.zone == zone) {
            let nr_pages = size.nr_pages();
            let mut start = 0;
            while start + nr_pages <= part.frames.nr_pages() {
                let folios = || part.records.within(start, nr_pages);
                let nr_used = folios().map(|folio| folio.size.nr_pages()).sum();
                let is_cut = nr_used > 0 && folios().all(|folio| folio.size < size);
                let is_whole = part.frames.poisoned_in(start, nr_pages).is_empty();
                let frames = PfnRange::new(part.pfn(start), nr_pages);
                if let (true, Ok(frames)) = (is_cut && is_whole, frames) {
                    if candidates.try_reserve(1).is_ok() {
                        candidates.push(Candidate { part: nr, start, frames, nr_used });
                    }
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
            let by = match record.state {
                Use::Owned { .. } => self.mover_of(record).ok_or_else(|| {
                    Error::new(Op::Compact, ErrorKind::Busy).because("its object is just going")
                }),
                Use::Quarantined => Err(Error::new(Op::Compact, ErrorKind::Quarantined)),
            };
            Some(Moveable { frames, by })
        };
        part.records.within(block.start, size.nr_pages()).filter_map(folio).collect()
    }
}

#[cfg(test)]
mod tests;
