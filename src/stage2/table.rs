//! The tree of tables: map, clear, look up.
//!
//! Plain data behind `&mut`: who may look at it while, the owner decides with a lock. Three rules
//! hold at every return:
//!
//! - A table lives exactly as long as it has an entry that is not zero (the root lives always). An
//!   annotation counts.
//! - **Break before make**: an entry never goes from one valid word to another without being
//!   invalid in between. [`Table::set`] is the only way to change an entry, and sees to it.
//! - A failing call has changed nothing. Memory for tables is taken before the first change.

use slab::Slab;

use super::pte::{Entry, Leaf, Level, Pte};
use super::walk::{TableError, TableShape};
use crate::addr::Gfn;
use crate::geometry::index;

/// One table: entries, and how many of them are not zero.
#[derive(Debug)]
struct Node {
    entries: Box<[Pte]>,
    nr_used: usize,
}

impl Node {
    fn new(nr_entries: usize) -> Result<Self, TableError> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(nr_entries).map_err(|_| TableError::NoMemory)?;
        entries.resize(nr_entries, Pte::EMPTY);
        Ok(Self { entries: entries.into_boxed_slice(), nr_used: 0 })
    }
}

/// An entry: the key of its table, and its index there.
#[derive(Clone, Copy, Debug)]
struct Place {
    node: usize,
    index: usize,
}

/// The entry at which a walk ended.
#[derive(Clone, Copy, Debug)]
struct Found {
    place: Place,
    level: Level,
    entry: Entry,
}

/// A stage-2 table.
#[derive(Debug)]
pub(crate) struct Table {
    shape: TableShape,
    nodes: Slab<Node>,
    root: usize,
    /// How many tables there may be, spare ones included: the guest's memory for tables.
    limit: usize,
    /// Empty tables, taken in advance so that a change that has begun cannot fail.
    spare: Vec<Node>,
    #[cfg(test)]
    pub(super) trace: Vec<(Pte, Pte)>,
}

impl Table {
    /// An empty table that may grow as its address space needs.
    #[cfg(test)]
    pub(crate) fn new(shape: TableShape) -> Result<Self, TableError> {
        Self::with_limit(shape, usize::MAX)
    }

    /// An empty table that may have `limit` tables, its root included: as many as the memory that its
    /// owner has set aside.
    ///
    /// # Errors
    /// [`TableError::NoMemory`].
    pub(crate) fn with_limit(shape: TableShape, limit: usize) -> Result<Self, TableError> {
        if limit == 0 {
            return Err(TableError::NoMemory);
        }
        let mut nodes = Slab::new();
        grow(&mut nodes, 1)?;
        let root = nodes.insert(Node::new(shape.nr_entries(shape.root()))?);
        Ok(Self {
            shape,
            nodes,
            root,
            limit,
            spare: Vec::new(),
            #[cfg(test)]
            trace: Vec::new(),
        })
    }

    pub(crate) fn shape(&self) -> TableShape {
        self.shape
    }

    fn pte(&self, place: Place) -> Pte {
        self.nodes[place.node].entries[place.index]
    }

    /// Goes down from the root to the first entry that does not lead to a table.
    fn walk(&self, gfn: Gfn) -> Result<Found, TableError> {
        if gfn >= self.shape.gfn_limit() {
            return Err(TableError::BeyondIpa);
        }
        let mut level = self.shape.root();
        let mut node = self.root;
        loop {
            let place = Place { node, index: self.shape.index(gfn, level) };
            match self.pte(place).decode(level) {
                Entry::Table(next) => {
                    node = next;
                    level = level.below();
                }
                entry => return Ok(Found { place, level, entry }),
            }
        }
    }

    /// What is there for a guest frame, and at which level the walk ended.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`].
    pub(crate) fn lookup(&self, gfn: Gfn) -> Result<(Level, Entry), TableError> {
        self.walk(gfn).map(|found| (found.level, found.entry))
    }

    /// Maps a page, or at a level above [`Level::PAGE`] a block.
    ///
    /// An entry that differs in more than permissions is replaced, break before make. What lies
    /// under a block is never lost: smaller pages in the way refuse it.
    ///
    /// # Errors
    /// [`TableError::Invalid`] for a level without leaves or a misaligned block,
    /// [`TableError::BeyondIpa`], [`TableError::Block`] under a block, [`TableError::TableInTheWay`],
    /// [`TableError::Unchanged`] if there is nothing to change but permissions,
    /// [`TableError::NoMemory`].
    pub(crate) fn map(&mut self, gfn: Gfn, level: Level, leaf: Leaf) -> Result<(), TableError> {
        let pte = Pte::leaf(level, leaf)?;
        let misaligned = (gfn.get() | leaf.pfn.get()) & (self.shape.pages_at(level) - 1) != 0;
        if misaligned || level < self.shape.root() {
            return Err(TableError::Invalid);
        }
        self.put(gfn, level, pte)
    }

    fn put(&mut self, gfn: Gfn, level: Level, new: Pte) -> Result<(), TableError> {
        let mut found = self.walk(gfn)?;
        if found.level > level {
            return Err(TableError::TableInTheWay);
        }
        if found.level < level && found.entry != Entry::Empty {
            return Err(TableError::Block);
        }
        let old = self.pte(found.place);
        let changes = match (old.is_valid(), new.is_valid()) {
            (true, true) => old.needs_update(new),
            _ => old != new,
        };
        if !changes || found.entry == Entry::Locked {
            return Err(TableError::Unchanged);
        }
        let missing = level.height().abs_diff(found.level.height()) as usize;
        self.ensure_spare(missing)?;
        while found.level < level {
            let node = self.spare.pop().ok_or(TableError::NoMemory)?;
            let next = self.nodes.insert(node);
            self.set(found.place, Pte::table(next)?);
            found.level = found.level.below();
            found.place = Place { node: next, index: self.shape.index(gfn, found.level) };
        }
        self.set(found.place, new);
        Ok(())
    }

    /// Empties the entry of `gfn` at `level`: a leaf or an annotation, returned. Tables that become
    /// empty go.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`], [`TableError::Absent`], [`TableError::Block`] if a larger leaf covers
    /// the page, [`TableError::TableInTheWay`] if smaller ones are there,
    /// [`TableError::Unchanged`] if the entry is being changed.
    pub(crate) fn clear(&mut self, gfn: Gfn, level: Level) -> Result<Entry, TableError> {
        let found = self.walk(gfn)?;
        match found.entry {
            Entry::Empty => return Err(TableError::Absent),
            Entry::Locked => return Err(TableError::Unchanged),
            _ if found.level < level => return Err(TableError::Block),
            _ if found.level > level => return Err(TableError::TableInTheWay),
            _ => {}
        }
        self.set(found.place, Pte::EMPTY);
        self.prune(gfn);
        Ok(found.entry)
    }

    /// Frees the tables above `gfn` that have no entry left, lowest first.
    fn prune(&mut self, gfn: Gfn) {
        while let Some((parent, child)) = self.lowest_table(gfn) {
            if self.nodes[child].nr_used > 0 {
                return;
            }
            // Unlinked first: nobody can walk into a table that is gone.
            self.set(parent, Pte::EMPTY);
            self.nodes.remove(child);
        }
    }

    /// The table at which the walk for `gfn` ends, and the entry that leads to it; none for the root.
    fn lowest_table(&self, gfn: Gfn) -> Option<(Place, usize)> {
        let mut lowest = None;
        let mut level = self.shape.root();
        let mut node = self.root;
        loop {
            let place = Place { node, index: self.shape.index(gfn, level) };
            let Entry::Table(next) = self.pte(place).decode(level) else {
                return lowest;
            };
            lowest = Some((place, next));
            node = next;
            level = level.below();
        }
    }

    /// Takes memory for every table that pages of these runs may need, so that mapping or annotating
    /// them cannot fail for want of it. Exact for ascending runs, else a little too much.
    ///
    /// # Errors
    /// [`TableError::BeyondIpa`] or [`TableError::NoMemory`].
    pub(crate) fn reserve(
        &mut self,
        runs: impl Iterator<Item = (Gfn, u64)>,
    ) -> Result<(), TableError> {
        let limit = self.shape.gfn_limit().get();
        let mut nr_missing: usize = 0;
        // For each level, the table that was counted last.
        let mut counted: [Option<u64>; 6] = [None; 6];
        for (gfn, nr_pages) in runs {
            let end = gfn.get().checked_add(nr_pages).filter(|&end| end <= limit);
            let end = end.ok_or(TableError::BeyondIpa)?;
            let mut level = self.shape.root();
            while level < Level::PAGE && nr_pages > 0 {
                // An entry of `level` is a table of the level below.
                let span = self.shape.pages_at(level);
                for table in gfn.get() / span..=(end - 1) / span {
                    let seen = &mut counted[level.height() as usize];
                    if *seen != Some(table) && self.walk(Gfn::new(table * span))?.level <= level {
                        nr_missing = nr_missing.saturating_add(1);
                    }
                    *seen = Some(table);
                }
                level = level.below();
            }
        }
        self.ensure_spare(nr_missing)
    }

    fn ensure_spare(&mut self, nr: usize) -> Result<(), TableError> {
        let nr_new = nr.saturating_sub(self.spare.len());
        let nr_after = self.nodes.len().saturating_add(self.spare.len()).saturating_add(nr_new);
        if nr_new > 0 && nr_after > self.limit {
            return Err(TableError::NoMemory);
        }
        grow(&mut self.nodes, nr)?;
        self.spare.try_reserve(nr_new).map_err(|_| TableError::NoMemory)?;
        for _ in 0..nr_new {
            // All but the root have the same number of entries.
            self.spare.push(Node::new(self.shape.nr_entries(Level::PAGE))?);
        }
        Ok(())
    }

    /// The one place where an entry changes.
    fn set(&mut self, place: Place, new: Pte) {
        let old = self.pte(place);
        if old.is_valid() && new.is_valid() && old != new {
            self.store(place, Pte::LOCKED);
        }
        self.store(place, new);
    }

    fn store(&mut self, place: Place, new: Pte) {
        let node = &mut self.nodes[place.node];
        let old = std::mem::replace(&mut node.entries[place.index], new);
        match (old.is_empty(), new.is_empty()) {
            (true, false) => node.nr_used += 1,
            (false, true) => node.nr_used -= 1,
            _ => {}
        }
        #[cfg(test)]
        self.trace.push((old, new));
    }

    /// The first leaf or annotation at or behind `from`, or a block that covers it.
    pub(crate) fn next_entry(&self, from: Gfn) -> Option<(Gfn, Level, Entry)> {
        self.next_in(self.root, self.shape.root(), 0, from.get())
    }

    fn next_in(
        &self,
        node: usize,
        level: Level,
        base: u64,
        from: u64,
    ) -> Option<(Gfn, Level, Entry)> {
        let span = self.shape.pages_at(level);
        let entries = &self.nodes[node].entries;
        let first = from.saturating_sub(base) / span;
        (first..entries.len() as u64).find_map(|nth| {
            let start = base + nth * span;
            match entries[index(nth)].decode(level) {
                Entry::Empty => None,
                Entry::Table(next) => self.next_in(next, level.below(), start, from),
                entry => Some((Gfn::new(start), level, entry)),
            }
        })
    }

    /// All leaves and annotations in ascending order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Gfn, Level, Entry)> {
        let after = |&(gfn, level, _): &(Gfn, Level, Entry)| {
            self.next_entry(gfn.checked_add(self.shape.pages_at(level))?)
        };
        std::iter::successors(self.next_entry(Gfn::new(0)), after)
    }
}

/// Room for `nr` more nodes. The slab can only grow or abort, so a vector of the size that it will
/// ask for is tried first: refusals by limits or by the allocator are then ours to report.
fn grow(nodes: &mut Slab<Node>, nr: usize) -> Result<(), TableError> {
    if nodes.capacity() - nodes.len() >= nr {
        return Ok(());
    }
    let doubled = nodes.capacity().saturating_mul(2).max(nodes.len().saturating_add(nr));
    let probe = Vec::<Option<Node>>::new().try_reserve(doubled);
    probe.map_err(|_| TableError::NoMemory)?;
    nodes.reserve(nr);
    Ok(())
}

#[cfg(test)]
mod tests;
