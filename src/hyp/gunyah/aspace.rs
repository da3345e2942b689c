//! Address spaces: a stage-2 tree each, of tables from the hypervisor's heap.
//!
//! Mapping takes the largest block that fits and that no table is in the way of; nothing is merged afterwards.
//! What changes part of a block splits it first, without loss. Every change of an entry is noted, so that an
//! operation that fails half way can be taken back, last change first.

use std::collections::BTreeMap;

use super::attrs::MapAttrs;
use super::error::HypError;
use super::vmmio::Vmmio;
use crate::addr::{Gfn, Pfn};
use crate::geometry::index;
use crate::stage2::{Entry, Leaf, Level, PageState, Pte, TableEnv, TableError, TableShape, Tree};

/// An address space's number. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AspaceId(pub(super) u32);

/// How a machine's CPUs stand a block turning into a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum BbmLevel {
    /// The block must be gone first. Who touches it meanwhile faults, and is made to try again.
    #[default]
    Zero,
    /// The block is marked, and may then be replaced.
    One,
    /// It may be replaced.
    Two,
}

/// Frames for tables.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    pub(super) free: Vec<Pfn>,
    /// What operations keep that let go of everything half way.
    purses: BTreeMap<u64, Vec<Pfn>>,
    nr_purses_ever: u64,
    /// So many are for what takes memory back.
    pub(super) reserve: u64,
}

/// What an operation needs tables for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A guest gets memory, or gets it in another way: it does without the reserve.
    Give,
    /// Memory comes back, or an operation is taken back.
    TakeBack,
}

/// Frames of the heap that one operation keeps, with what its own changes give back: so it can always be taken back.
#[derive(Debug)]
pub(crate) struct Purse(u64);

impl Heap {
    pub(super) fn new(free: Vec<Pfn>) -> Self {
        Self { free, ..Self::default() }
    }

    /// Keeps frames for an operation.
    ///
    /// # Errors
    /// `NoMem`.
    pub(super) fn fill(&mut self, nr: u64, purpose: Purpose) -> Result<Purse, HypError> {
        let least = match purpose {
            Purpose::Give => self.reserve,
            Purpose::TakeBack => 0,
        };
        let left = (self.free.len() as u64).checked_sub(nr).filter(|&left| left >= least);
        let left = left.ok_or(HypError::NoMem)?;
        let kept = self.free.split_off(index(left));
        let purse = Purse(self.nr_purses_ever);
        self.nr_purses_ever += 1;
        self.purses.insert(purse.0, kept);
        Ok(purse)
    }

    /// Lets a step of the operation have them. Returns how many are not its own.
    pub(super) fn open(&mut self, purse: &Purse) -> usize {
        let nr_others = self.free.len();
        self.free.extend(self.purses.remove(&purse.0).unwrap_or_default());
        nr_others
    }

    /// Keeps the rest again, and what the step gave back.
    pub(super) fn close(&mut self, purse: &Purse, nr_others: usize) {
        let rest = self.free.split_off(nr_others.min(self.free.len()));
        self.purses.insert(purse.0, rest);
    }

    /// The operation is over.
    pub(super) fn empty(&mut self, purse: Purse) {
        self.free.extend(self.purses.remove(&purse.0).unwrap_or_default());
    }

    /// Every frame that is no table.
    pub(super) fn unused(&self) -> impl Iterator<Item = Pfn> {
        self.free.iter().chain(self.purses.values().flatten()).copied()
    }
}

/// The heap, and who remembers translations.
struct Env<'a> {
    heap: &'a mut Heap,
    nr_invalidations: &'a mut u64,
}

impl TableEnv for Env<'_> {
    fn take(&mut self) -> Option<Pfn> {
        self.heap.free.pop()
    }

    fn give(&mut self, pfn: Pfn) {
        self.heap.free.push(pfn);
    }

    fn nr_free(&self) -> u64 {
        self.heap.free.len() as u64
    }

    /// Whoever translates holds the lock of all of this until the last byte: nobody uses what it found before.
    fn invalidate(&mut self, _: Gfn, _: u64) {
        *self.nr_invalidations += 1;
    }
}

/// Pages of an address space, and the frames behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) gfn: Gfn,
    pub(crate) pfn: Pfn,
    pub(crate) nr: u64,
}

impl Piece {
    fn skip(self, nr: u64) -> Self {
        let (gfn, pfn) = (self.gfn.get().saturating_add(nr), self.pfn.get().saturating_add(nr));
        Self { gfn: Gfn::new(gfn), pfn: Pfn::new(pfn), nr: self.nr - nr }
    }
}

/// What an entry was before a change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Undo {
    pub(super) aspace: AspaceId,
    gfn: Gfn,
    level: Level,
    old: Pte,
}

#[derive(Debug)]
pub(crate) struct Aspace {
    pub(super) tree: Tree,
    /// Others keep its tables: nothing may be mapped.
    pub(crate) read_only: bool,
    pub(super) vmmio: Vmmio,
    breaks: bool,
    pub(super) nr_invalidations: u64,
}

const LEVELS: [Level; 3] = [Level::BLOCK_1G, Level::BLOCK_2M, Level::PAGE];

fn leaf_of(level: Level, pte: Pte) -> Option<Leaf> {
    match pte.decode(level) {
        Entry::Leaf(leaf) => Some(leaf),
        _ => None,
    }
}

/// The descriptor for frames with these attributes.
pub(super) fn entry(level: Level, pfn: Pfn, attrs: MapAttrs) -> Result<Pte, TableError> {
    maker(attrs)(level, leaf(pfn, attrs))
}

fn leaf(pfn: Pfn, attrs: MapAttrs) -> Leaf {
    Leaf { pfn, prot: attrs.prot(), state: PageState::Owned }
}

fn maker(attrs: MapAttrs) -> fn(Level, Leaf) -> Result<Pte, TableError> {
    if attrs.kind.is_device() { Pte::device } else { Pte::leaf }
}

impl Aspace {
    pub(super) const SHAPE: TableShape = TableShape::IPA_48;

    /// An empty one.
    ///
    /// # Errors
    /// `NoMem` without a frame for the root.
    pub(super) fn new(bbm: BbmLevel, heap: &mut Heap) -> Result<Self, HypError> {
        let root = heap.free.pop().ok_or(HypError::NoMem)?;
        let tree = Tree::new(Self::SHAPE, root);
        Ok(Self {
            tree,
            read_only: false,
            vmmio: Vmmio::default(),
            breaks: bbm == BbmLevel::Zero,
            nr_invalidations: 0,
        })
    }

    /// Gives all its tables back.
    pub(super) fn destroy(mut self, heap: &mut Heap) {
        let nr_invalidations = &mut self.nr_invalidations;
        self.tree.dismantle(&mut Env { heap, nr_invalidations });
        heap.free.extend(self.tree.table_frames());
    }

    /// Maps, over whatever was there.
    ///
    /// # Errors
    /// `AddrInvalid` beyond the address space, `NoMem`. What was changed until then is in `undo`.
    pub(super) fn map(
        &mut self,
        id: AspaceId,
        heap: &mut Heap,
        mut piece: Piece,
        attrs: MapAttrs,
        undo: &mut Vec<Undo>,
    ) -> Result<(), HypError> {
        while piece.nr > 0 {
            let nr_done = self.map_first(id, heap, piece, attrs, undo)?;
            piece = piece.skip(nr_done);
        }
        Ok(())
    }

    /// Maps the first pages, or only splits what is there.
    fn map_first(
        &mut self,
        id: AspaceId,
        heap: &mut Heap,
        piece: Piece,
        attrs: MapAttrs,
        undo: &mut Vec<Undo>,
    ) -> Result<u64, HypError> {
        let (found, old) = self.tree.get(piece.gfn)?;
        let span = Self::SHAPE.pages_at(found);
        let within = piece.gfn.get() & (span - 1);
        let old_leaf = leaf_of(found, old);
        if let Some(leaf) = old_leaf {
            let leads_there = leaf.pfn.checked_add(within) == Some(piece.pfn);
            if leads_there && entry(found, leaf.pfn, attrs)? == old {
                return Ok(piece.nr.min(span - within));
            }
        }
        let fits = |level: Level| {
            let span = Self::SHAPE.pages_at(level);
            level >= found
                && span <= piece.nr
                && (piece.gfn.get() | piece.pfn.get()) & (span - 1) == 0
        };
        let level = LEVELS.into_iter().find(|&level| fits(level)).unwrap_or(Level::PAGE);
        let env = &mut Env { heap, nr_invalidations: &mut self.nr_invalidations };
        if old_leaf.is_some() && found < level {
            self.tree.split(piece.gfn, self.breaks, env)?;
            return Ok(0);
        }
        let nr = Self::SHAPE.pages_at(level);
        match self.tree.map(piece.gfn, nr, level, leaf(piece.pfn, attrs), maker(attrs), env) {
            Err(TableError::Unchanged) => {
                // Only rights change: no break is needed.
                self.tree.adjust(piece.gfn, |pte| pte.with_prot(attrs.prot()))?;
                env.invalidate(piece.gfn, nr);
            }
            answer => answer?,
        }
        let old = if found == level { old } else { Pte::EMPTY };
        undo.push(Undo { aspace: id, gfn: piece.gfn, level, old });
        Ok(nr)
    }

    /// Unmaps those of the pages that have these frames behind them.
    ///
    /// # Errors
    /// As for [`Self::map`].
    pub(super) fn unmap(
        &mut self,
        id: AspaceId,
        heap: &mut Heap,
        mut piece: Piece,
        undo: &mut Vec<Undo>,
    ) -> Result<(), HypError> {
        while piece.nr > 0 {
            let (level, old) = self.tree.get(piece.gfn)?;
            let span = Self::SHAPE.pages_at(level);
            let within = piece.gfn.get() & (span - 1);
            let nr = piece.nr.min(span - within);
            let leaf = leaf_of(level, old);
            if leaf.is_some_and(|leaf| leaf.pfn.checked_add(within) == Some(piece.pfn)) {
                let env = &mut Env { heap, nr_invalidations: &mut self.nr_invalidations };
                if nr < span {
                    self.tree.split(piece.gfn, self.breaks, env)?;
                    continue;
                }
                self.tree.unmap(piece.gfn, span, env)?;
                undo.push(Undo { aspace: id, gfn: piece.gfn, level, old });
            }
            piece = piece.skip(nr);
        }
        Ok(())
    }

    /// Takes one change back. All tables that it needs were given back by the change itself.
    ///
    /// # Errors
    /// None, unless the tables were wrong before.
    pub(super) fn restore(&mut self, heap: &mut Heap, undo: Undo) -> Result<(), HypError> {
        let env = &mut Env { heap, nr_invalidations: &mut self.nr_invalidations };
        let nr = Self::SHAPE.pages_at(undo.level);
        if undo.old.is_empty() {
            return Ok(self.tree.unmap(undo.gfn, nr, env)?);
        }
        match self.tree.annotate_at(undo.gfn, nr, undo.level, undo.old, env) {
            Err(TableError::Unchanged) => {
                self.tree.adjust(undo.gfn, |_| undo.old)?;
                env.invalidate(undo.gfn, nr);
                Ok(())
            }
            answer => Ok(answer?),
        }
    }

    /// The frames behind the first of the pages, as far as they go on in one piece with the same rights and kind.
    pub(super) fn lookup(&self, gfn: Gfn, nr: u64) -> Option<Piece> {
        let mut found: Option<(Piece, Pte)> = None;
        let mut nr_done = 0;
        while nr_done < nr {
            let Some(at) = gfn.checked_add(nr_done) else { break };
            let Ok((level, pte)) = self.tree.get(at) else { break };
            let Some(leaf) = leaf_of(level, pte) else { break };
            let span = Self::SHAPE.pages_at(level);
            let within = at.get() & (span - 1);
            let Some(pfn) = leaf.pfn.checked_add(within) else { break };
            let nr_here = (span - within).min(nr - nr_done);
            match &mut found {
                None => found = Some((Piece { gfn, pfn, nr: nr_here }, pte)),
                Some((piece, first))
                    if piece.pfn.checked_add(piece.nr) == Some(pfn) && first.is_like(pte) =>
                {
                    piece.nr += nr_here;
                }
                Some(_) => break,
            }
            nr_done += nr_here;
        }
        found.map(|(piece, _)| piece)
    }
}
