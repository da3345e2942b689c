//! The tree as a hypervisor keeps it: tables are frames that somebody gave, and blocks are split and merged.
//!
//! Where [`Table`](super::Table) refuses, this does what the kernel's page-table code for EL2 does:
//!
//! - **A page inside of a block**: the block goes, an empty table takes its place, and the other pages
//!   of the block are not mapped any more. The host finds its own again when it next touches them.
//! - **A block over a table**: the table goes with all that is in it.
//! - **Unmapping part of a block** unmaps all of it.
//! - **A table lives as long as it has an entry that is not zero**; annotations count.
//! - **Break before make**: an entry goes from one valid word to another by way of the marker `LOCKED`, and
//!   whoever remembers translations has forgotten the old one before the new one is there.
//! - A call that fails has changed nothing: tables are counted before the first change.
//!
//! All tables lie in one vector, 512 entries each, so a walk is four loads and as many comparisons.

use super::pte::{Annotation, Entry, Leaf, Level, Pte};
use super::walk::{TableError, TableShape};
use crate::addr::{Gfn, Pfn};
use crate::geometry::{HUGE_ORDER, index};

/// What a tree needs of its owner.
pub(crate) trait TableEnv {
    /// A zeroed frame for a table.
    fn take(&mut self) -> Option<Pfn>;
    /// A frame that was a table.
    fn give(&mut self, pfn: Pfn);
    /// How many frames can be taken.
    fn nr_free(&self) -> u64;
    /// Forgets every translation of these pages that somebody remembers, and returns when nobody uses
    /// one any more. The entry is not valid then.
    fn invalidate(&mut self, gfn: Gfn, nr_pages: u64);
}

const NODE_BITS: u32 = HUGE_ORDER as u32;
const NODE: usize = 1 << NODE_BITS;
/// Levels of the deepest tree.
const MAX_LEVELS: usize = 5;

/// What is known of a table beside its entries.
#[derive(Clone, Copy, Debug)]
struct Node {
    pfn: Pfn,
    /// Entries that are not zero, and one.
    nr_refs: u16,
}

/// The entry at which a walk ended: for looking at it first, and changing it then. Good until the tree changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    at: usize,
    pub(crate) level: Level,
    pub(crate) pte: Pte,
}

impl Found {
    /// How many tables an entry of `level` needs where this one, which leads to none, is found.
    pub(crate) fn nr_missing(self, level: Level) -> u64 {
        u64::from(self.level.height().saturating_sub(level.height()))
    }
}

/// Tables that ranges need and that are not there: each counted once if the ranges ascend, and the tree stays as it is.
#[derive(Debug, Default)]
pub(crate) struct Missing {
    pub(crate) nr: u64,
    /// The last entry of each level that leads to none of them.
    counted: [Option<u64>; MAX_LEVELS],
}

/// A stage-2 tree.
#[derive(Debug)]
pub(crate) struct Tree {
    shape: TableShape,
    /// Table `k` is at `k * NODE`; the root begins at 0.
    entries: Vec<Pte>,
    nodes: Vec<Node>,
    /// Tables that are none at present.
    idle: Vec<usize>,
    nr_roots: usize,
    /// Every store, if a test asks for them.
    #[cfg(test)]
    trace: Option<Vec<(Pte, Pte)>>,
}

impl Tree {
    /// How many consecutive frames the root of such a tree has.
    pub(crate) fn nr_root_pages(shape: TableShape) -> u64 {
        (shape.nr_entries(shape.root()) as u64).div_ceil(NODE as u64)
    }

    /// An empty tree with its root at `root`.
    pub(crate) fn new(shape: TableShape, root: Pfn) -> Self {
        let nr_roots = index(Self::nr_root_pages(shape));
        let pages = (0..nr_roots as u64).filter_map(|nth| root.checked_add(nth));
        Self {
            shape,
            entries: vec![Pte::EMPTY; nr_roots * NODE],
            nodes: pages.map(|pfn| Node { pfn, nr_refs: 1 }).collect(),
            idle: Vec::new(),
            nr_roots,
            #[cfg(test)]
            trace: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn shape(&self) -> TableShape {
        self.shape
    }

    /// How many tables are in use, the root's frames included.
    pub(crate) fn nr_tables(&self) -> usize {
        self.nodes.len() - self.idle.len()
    }

    /// Down from the root to the first entry that leads to no table, or to `stop`.
    // Inlined, as what leads here from a hypercall: what was found stays in registers then.
    #[inline(always)]
    fn walk(&self, gfn: Gfn, stop: Level) -> Result<Found, TableError> {
        // All but those of tests; so that levels and shifts are constants.
        match self.shape {
            TableShape::IPA_48 => self.walk_in(TableShape::IPA_48, gfn, stop),
            TableShape::IPA_40 => self.walk_in(TableShape::IPA_40, gfn, stop),
            shape => self.walk_small(shape, gfn, stop),
        }
    }

    #[cold]
    fn walk_small(&self, shape: TableShape, gfn: Gfn, stop: Level) -> Result<Found, TableError> {
        self.walk_in(shape, gfn, stop)
    }

    #[inline(always)]
    fn walk_in(&self, shape: TableShape, gfn: Gfn, stop: Level) -> Result<Found, TableError> {
        if gfn >= shape.gfn_limit() {
            return Err(TableError::BeyondIpa);
        }
        let bits = shape.index_bits();
        let mut level = shape.root();
        let mut at = index(gfn.get() >> (bits * level.height()));
        loop {
            let pte = self.entries[at];
            match pte.next_table(level) {
                Some(next) if level != stop => {
                    level = level.below();
                    let nth = gfn.get() >> (bits * level.height()) & ((1 << bits) - 1);
                    at = (next << NODE_BITS) + index(nth);
                }
                _ => return Ok(Found { at, level, pte }),
            }
        }
    }

    /// Where the entry for a guest frame is.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    #[inline(always)]
    pub(crate) fn find(&self, gfn: Gfn) -> Result<Found, TableError> {
        self.walk(gfn, Level::PAGE)
    }

    /// The same for who knows the tree's shape.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    #[inline(always)]
    pub(crate) fn find_in(&self, shape: TableShape, gfn: Gfn) -> Result<Found, TableError> {
        debug_assert_eq!(self.shape, shape);
        self.walk_in(shape, gfn, Level::PAGE)
    }

    /// Puts a leaf or an annotation of `level` where `gfn` was found.
    ///
    /// # Errors
    /// [`TableError::NoMemory`]; [`TableError::Unchanged`] if it would change in nothing but permissions.
    #[inline(always)]
    pub(crate) fn set(
        &mut self,
        gfn: Gfn,
        found: Found,
        level: Level,
        new: Pte,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        debug_assert_eq!(self.entries[found.at], found.pte);
        if found.level == level {
            self.changes(found, level, new)?;
            self.replace(gfn, Found { level, ..found }, new, env);
            return Ok(());
        }
        self.put(gfn, level, new, env)
    }

    /// The entry for a guest frame, and its level: a leaf, an annotation, or nothing.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    #[inline]
    pub(crate) fn get(&self, gfn: Gfn) -> Result<(Level, Pte), TableError> {
        self.walk(gfn, Level::PAGE).map(|found| (found.level, found.pte))
    }

    /// The leaf for a guest frame, and its level.
    #[inline]
    pub(crate) fn leaf(&self, gfn: Gfn) -> Option<(Level, Leaf)> {
        let (level, pte) = self.get(gfn).ok()?;
        match pte.decode(level) {
            Entry::Leaf(leaf) => Some((level, leaf)),
            _ => None,
        }
    }

    /// The frame behind a guest frame.
    #[inline]
    pub(crate) fn translate(&self, gfn: Gfn) -> Option<(Pfn, Leaf)> {
        let (level, leaf) = self.leaf(gfn)?;
        let pfn = leaf.pfn.checked_add(gfn.get() & (self.shape.pages_at(level) - 1))?;
        Some((pfn, leaf))
    }

    /// Maps leaves of one level over a range, with consecutive frames from that of `leaf` on. `make`
    /// makes the entry.
    ///
    /// # Errors
    /// [`TableError::Invalid`], [`TableError::BeyondIpa`], [`TableError::NoMemory`];
    /// [`TableError::Unchanged`] if some entry would change in nothing but permissions.
    pub(crate) fn map(
        &mut self,
        gfn: Gfn,
        nr_pages: u64,
        level: Level,
        leaf: Leaf,
        make: fn(Level, Leaf) -> Result<Pte, TableError>,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        if !level.has_leaves() || level < self.shape.root() {
            return Err(TableError::Invalid);
        }
        let span = self.shape.pages_at(level);
        if (gfn.get() | leaf.pfn.get() | nr_pages) & (span - 1) != 0 {
            return Err(TableError::Invalid);
        }
        if nr_pages == span {
            return self.put(gfn, level, make(level, leaf)?, env);
        }
        let last = leaf.pfn.checked_add(nr_pages).ok_or(TableError::Invalid)?;
        make(level, Leaf { pfn: last, ..leaf })?;
        let entry_of = |done: u64| {
            let pfn = leaf.pfn.checked_add(done).ok_or(TableError::Invalid)?;
            Ok((Gfn::new(gfn.get() + done), make(level, Leaf { pfn, ..leaf })?))
        };
        self.can_put(gfn, nr_pages, level, env)?;
        for done in (0..nr_pages).step_by(index(span)) {
            let (gfn, new) = entry_of(done)?;
            self.changes(self.walk(gfn, level)?, level, new)?;
        }
        for done in (0..nr_pages).step_by(index(span)) {
            let (gfn, new) = entry_of(done)?;
            self.put(gfn, level, new, env)?;
        }
        Ok(())
    }

    /// Whether an entry would change in more than permissions.
    #[inline(always)]
    fn changes(&self, found: Found, level: Level, new: Pte) -> Result<(), TableError> {
        let is_leaf = found.level == level && found.pte.next_table(level).is_none();
        let stays = is_leaf && found.pte.is_valid() && new.is_valid();
        match stays && !found.pte.needs_update(new) {
            true => Err(TableError::Unchanged),
            false => Ok(()),
        }
    }

    /// Makes pages lead nowhere, each with an entry of its own that says why.
    ///
    /// # Errors
    /// [`TableError::Invalid`] for a payload that needs bit 0 or bits 63:60,
    /// [`TableError::BeyondIpa`], [`TableError::NoMemory`].
    pub(crate) fn annotate(
        &mut self,
        gfn: Gfn,
        nr_pages: u64,
        kind: Annotation,
        payload: u64,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        self.annotate_at(gfn, nr_pages, Level::PAGE, Pte::annotation(kind, payload)?, env)
    }

    /// The same with entries of a higher level, and a word for each made by the caller.
    ///
    /// # Errors
    /// As for [`Self::annotate`]; [`TableError::Invalid`] for a range that is no multiple of the
    /// level's.
    pub(crate) fn annotate_at(
        &mut self,
        gfn: Gfn,
        nr_pages: u64,
        level: Level,
        annotation: Pte,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        let span = self.shape.pages_at(level);
        if (gfn.get() | nr_pages) & (span - 1) != 0 || level < self.shape.root() {
            return Err(TableError::Invalid);
        }
        if nr_pages == span {
            return self.put(gfn, level, annotation, env);
        }
        self.can_put(gfn, nr_pages, level, env)?;
        for done in (0..nr_pages).step_by(index(span)) {
            self.put(Gfn::new(gfn.get() + done), level, annotation, env)?;
        }
        Ok(())
    }

    /// How many tables entries of `level` for all of the range would need.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    pub(crate) fn nr_missing(&self, gfn: Gfn, nr: u64, level: Level) -> Result<u64, TableError> {
        let mut missing = Missing::default();
        self.count_missing(gfn, nr, level, &mut missing)?;
        Ok(missing.nr)
    }

    /// The same for one range after the other.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    pub(crate) fn count_missing(
        &self,
        gfn: Gfn,
        nr: u64,
        level: Level,
        missing: &mut Missing,
    ) -> Result<(), TableError> {
        let limit = self.shape.gfn_limit().get();
        let end = gfn.get().checked_add(nr).filter(|&end| end <= limit);
        let end = end.ok_or(TableError::BeyondIpa)?;
        if level == self.shape.root() || nr == 0 {
            return Ok(());
        }
        // What one table of `level` spans.
        let span = self.shape.pages_at(level.above());
        for table in gfn.get() / span..=(end - 1) / span {
            let found = self.walk(Gfn::new(table * span), level)?;
            let mut from = found.level;
            while from < level {
                let entry = table * span / self.shape.pages_at(from);
                let seen = &mut missing.counted[from.height() as usize];
                missing.nr += u64::from(*seen != Some(entry));
                *seen = Some(entry);
                from = from.below();
            }
        }
        Ok(())
    }

    fn can_put(
        &self,
        gfn: Gfn,
        nr_pages: u64,
        level: Level,
        env: &impl TableEnv,
    ) -> Result<(), TableError> {
        match self.nr_missing(gfn, nr_pages, level)? <= env.nr_free() {
            true => Ok(()),
            false => Err(TableError::NoMemory),
        }
    }

    #[cold]
    fn put(
        &mut self,
        gfn: Gfn,
        level: Level,
        new: Pte,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        let mut found = self.walk(gfn, level)?;
        self.changes(found, level, new)?;
        if u64::from(level.height().abs_diff(found.level.height())) > env.nr_free() {
            return Err(TableError::NoMemory);
        }
        while found.level < level {
            let pfn = env.take().ok_or(TableError::NoMemory)?;
            let node = self.new_node(pfn);
            self.replace(gfn, found, Pte::table(node)?, env);
            let level = found.level.below();
            let at = (node << NODE_BITS) + self.shape.index(gfn, level);
            found = Found { at, level, pte: Pte::EMPTY };
        }
        let below = found.pte.next_table(level);
        self.replace(gfn, found, new, env);
        if let Some(table) = below {
            self.free_below(table, level.below(), env);
        }
        Ok(())
    }

    fn new_node(&mut self, pfn: Pfn) -> usize {
        let node = Node { pfn, nr_refs: 1 };
        if let Some(key) = self.idle.pop() {
            self.nodes[key] = node;
            return key;
        }
        self.nodes.push(node);
        self.entries.resize(self.nodes.len() << NODE_BITS, Pte::EMPTY);
        self.nodes.len() - 1
    }

    /// Frees a table that nothing leads to any more, and all below it.
    fn free_below(&mut self, table: usize, level: Level, env: &mut impl TableEnv) {
        for at in table << NODE_BITS..(table + 1) << NODE_BITS {
            let pte = std::mem::replace(&mut self.entries[at], Pte::EMPTY);
            if let Some(next) = pte.next_table(level) {
                self.free_below(next, level.below(), env);
            }
        }
        self.nodes[table].nr_refs = 1;
        self.free_node(table, env);
    }

    fn free_node(&mut self, table: usize, env: &mut impl TableEnv) {
        env.give(self.nodes[table].pfn);
        self.idle.push(table);
    }

    /// Break, invalidate, make.
    #[inline(always)]
    fn replace(&mut self, gfn: Gfn, found: Found, new: Pte, env: &mut impl TableEnv) {
        let mut old = found.pte;
        if old.is_valid() {
            let marker = if new.is_empty() { Pte::EMPTY } else { Pte::LOCKED };
            self.store(found.at, old, marker);
            let span = self.shape.pages_at(found.level);
            env.invalidate(Gfn::new(gfn.get() & !(span - 1)), span);
            old = marker;
        }
        self.store(found.at, old, new);
    }

    #[inline(always)]
    fn store(&mut self, at: usize, old: Pte, new: Pte) {
        self.entries[at] = new;
        if old.is_empty() != new.is_empty() {
            let refs = &mut self.nodes[at >> NODE_BITS].nr_refs;
            *refs = if old.is_empty() { *refs + 1 } else { *refs - 1 };
        }
        #[cfg(test)]
        if let Some(trace) = &mut self.trace {
            trace.push((old, new));
        }
    }

    /// Empties what is there for the range: leaves, all of a block that lies in it in part, annotations.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    pub(crate) fn unmap(
        &mut self,
        gfn: Gfn,
        nr_pages: u64,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        let limit = self.shape.gfn_limit().get();
        let end = gfn.get().checked_add(nr_pages).filter(|&end| end <= limit);
        let end = end.ok_or(TableError::BeyondIpa)?;
        let mut next = gfn.get();
        while next < end {
            let gfn = Gfn::new(next);
            let found = self.walk(gfn, Level::PAGE)?;
            if !found.pte.is_empty() {
                self.clear(gfn, found, env);
            }
            let span = self.shape.pages_at(found.level);
            next = (next & !(span - 1)) + span;
        }
        Ok(())
    }

    /// Empties a leaf or an annotation, of a block all of it.
    #[inline(always)]
    pub(crate) fn clear(&mut self, gfn: Gfn, found: Found, env: &mut impl TableEnv) {
        debug_assert_eq!(self.entries[found.at], found.pte);
        self.replace(gfn, found, Pte::EMPTY, env);
        if self.nodes[found.at >> NODE_BITS].nr_refs == 1 {
            self.prune(gfn, env);
        }
    }

    /// Frees the tables on the way to `gfn` that have no entry left, lowest first.
    #[cold]
    fn prune(&mut self, gfn: Gfn, env: &mut impl TableEnv) {
        let mut way = [(0, self.shape.root()); MAX_LEVELS];
        let mut nr = 0;
        let (mut level, mut base) = (self.shape.root(), 0);
        loop {
            let at = base + self.shape.index(gfn, level);
            way[nr] = (at, level);
            nr += 1;
            let Some(next) = self.entries[at].next_table(level) else { break };
            base = next << NODE_BITS;
            level = level.below();
        }
        for lower in (1..nr).rev() {
            let table = way[lower].0 >> NODE_BITS;
            if self.nodes[table].nr_refs > 1 {
                return;
            }
            let (at, level) = way[lower - 1];
            let found = Found { at, level, pte: self.entries[at] };
            self.replace(gfn, found, Pte::EMPTY, env);
            self.free_node(table, env);
        }
    }

    /// Changes the attributes of a leaf, not where it leads: no break is needed. Returns the word that was there.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`], [`TableError::Absent`].
    pub(crate) fn adjust(
        &mut self,
        gfn: Gfn,
        change: impl FnOnce(Pte) -> Pte,
    ) -> Result<Pte, TableError> {
        let found = self.walk(gfn, Level::PAGE)?;
        if !found.pte.is_valid() {
            return Err(TableError::Absent);
        }
        self.entries[found.at] = change(found.pte);
        Ok(found.pte)
    }

    /// As [`Self::translate`], and marks the leaf as used.
    #[inline]
    pub(crate) fn touch(&mut self, gfn: Gfn) -> Option<(Pfn, Leaf)> {
        let found = self.walk(gfn, Level::PAGE).ok()?;
        let Entry::Leaf(leaf) = found.pte.decode(found.level) else { return None };
        if !found.pte.is_young() {
            self.entries[found.at] = found.pte.aged(true);
        }
        let pfn = leaf.pfn.checked_add(gfn.get() & (self.shape.pages_at(found.level) - 1))?;
        Some((pfn, leaf))
    }

    /// Takes the tree apart, root excepted: every frame that was a table is given back.
    pub(crate) fn dismantle(&mut self, env: &mut impl TableEnv) {
        let root = self.shape.root();
        for at in 0..self.nr_roots << NODE_BITS {
            let pte = std::mem::replace(&mut self.entries[at], Pte::EMPTY);
            if let Some(table) = pte.next_table(root) {
                self.free_below(table, root.below(), env);
            }
        }
        for node in &mut self.nodes[..self.nr_roots] {
            node.nr_refs = 1;
        }
        env.invalidate(Gfn::new(0), self.shape.gfn_limit().get());
    }
}

mod inspect;
mod split;
#[cfg(test)]
mod tests;
