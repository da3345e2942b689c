//! A guest's stage 2: where its addresses lead, and whose the pages are, in bits that the hardware ignores.
//!
//! Its tables are frames that the host gave: first what came with the VM and tables that were freed, then the
//! vCPU's memcache. A destroyed page leaves an annotation, for good.

use super::tlb::{Tlbs, Translation};
use super::{GuestPage, State};
use crate::addr::{Gfn, Ipa, Pfn};
use crate::error::Errno;
use crate::stage2::{
    Annotation, Entry, Found, Leaf, Level, PageState, Prot, Pte, TableEnv, TableShape, Tree,
};

/// Where a page table's frames come from.
struct Env<'a> {
    pool: &'a mut Vec<Pfn>,
    memcache: &'a mut Vec<Pfn>,
    tlbs: &'a mut Tlbs,
}

impl TableEnv for Env<'_> {
    fn take(&mut self) -> Option<Pfn> {
        self.pool.pop().or_else(|| self.memcache.pop())
    }

    fn give(&mut self, pfn: Pfn) {
        self.pool.push(pfn);
    }

    fn nr_free(&self) -> u64 {
        (self.pool.len() + self.memcache.len()) as u64
    }

    #[inline]
    fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
        self.tlbs.invalidate(gfn, nr_pages);
    }
}

/// What a guest's lock guards.
#[derive(Debug)]
pub(crate) struct GuestMmu {
    pub(crate) handle: u16,
    pub(crate) tree: Tree,
    /// Frames that were tables and are none now.
    pub(crate) pool: Vec<Pfn>,
    pub(crate) tlbs: Tlbs,
    /// Where its firmware begins, as long as all of that is the guest's.
    pub(crate) firmware_at: Option<Ipa>,
}

/// The state that an entry of a guest's table tells of.
pub(crate) fn state_of(level: Level, pte: Pte) -> State {
    match pte.decode(level) {
        Entry::Leaf(leaf) => leaf.state.into(),
        Entry::Annotated(Annotation::GuestPoisoned, _) => State::Poison,
        _ => State::NoPage,
    }
}

impl GuestMmu {
    pub(crate) const SHAPE: TableShape = TableShape::IPA_40;

    /// Tables that one page may need. Checked whether it needs them or not, as upstream does.
    pub(crate) const MIN_MEMCACHE: usize = 2;

    pub(crate) fn new(handle: u16, root: Pfn) -> Self {
        Self {
            handle,
            tree: Tree::new(Self::SHAPE, root),
            pool: Vec::new(),
            tlbs: Tlbs::default(),
            firmware_at: None,
        }
    }

    /// One of this guest's pages.
    pub(crate) fn at(&self, gfn: Gfn) -> GuestPage {
        GuestPage { handle: self.handle, gfn }
    }

    /// The state at a guest frame.
    ///
    /// # Errors
    /// `ERANGE` beyond the guest's addresses.
    pub(crate) fn state(&self, gfn: Gfn) -> Result<State, Errno> {
        let (level, pte) = self.tree.get(gfn)?;
        Ok(state_of(level, pte))
    }

    /// Where a page or a block is to be, if nothing is there.
    ///
    /// # Errors
    /// `ERANGE`; `EPERM` if something is there, be it a destroyed page.
    #[inline(always)]
    pub(crate) fn vacancy(&self, gfn: Gfn, level: Level) -> Result<Found, Errno> {
        let found = self.tree.find_in(Self::SHAPE, gfn)?;
        // Below an entry of a higher level that is empty, everything is. A table has something in it.
        match found.pte.is_empty() && found.level <= level {
            true => Ok(found),
            false => Err(Errno::EPERM),
        }
    }

    /// Where a single page is mapped, its frame and state.
    ///
    /// # Errors
    /// In this order: `ERANGE`, `EHWPOISON` for a destroyed page, `ENOENT`, `E2BIG` in a block.
    #[inline(always)]
    pub(crate) fn page(&self, gfn: Gfn) -> Result<(Found, Pfn, PageState), Errno> {
        let found = self.tree.find_in(Self::SHAPE, gfn)?;
        match found.pte.decode(found.level) {
            Entry::Leaf(leaf) if found.level == Level::PAGE => Ok((found, leaf.pfn, leaf.state)),
            Entry::Annotated(Annotation::GuestPoisoned, _) => Err(Errno::EHWPOISON),
            Entry::Leaf(_) => Err(Errno::E2BIG),
            _ => Err(Errno::ENOENT),
        }
    }

    /// Maps a page or a block; whatever was there is replaced.
    ///
    /// # Errors
    /// `ENOMEM` without frames for tables.
    pub(crate) fn map(
        &mut self,
        gfn: Gfn,
        level: Level,
        leaf: Leaf,
        memcache: &mut Vec<Pfn>,
    ) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        let nr_pages = Self::SHAPE.pages_at(level);
        let mut env = Env { pool, memcache, tlbs };
        Ok(tree.map(gfn, nr_pages, level, leaf, Pte::leaf, &mut env)?)
    }

    /// The same where nothing was found.
    ///
    /// # Errors
    /// `ENOMEM` without frames for tables.
    #[inline(always)]
    pub(crate) fn fill(
        &mut self,
        gfn: Gfn,
        vacancy: Found,
        level: Level,
        leaf: Leaf,
        memcache: &mut Vec<Pfn>,
    ) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        let mut env = Env { pool, memcache, tlbs };
        Ok(tree.set(gfn, vacancy, level, Pte::leaf(level, leaf)?, &mut env)?)
    }

    /// Whether there are so many tables, and those that a page may need besides.
    ///
    /// # Errors
    /// `ENOMEM`.
    #[inline]
    pub(crate) fn reserve(&self, nr_tables: u64, memcache: &[Pfn]) -> Result<(), Errno> {
        let enough = nr_tables <= (memcache.len() + self.pool.len()) as u64;
        match enough && memcache.len() >= Self::MIN_MEMCACHE {
            true => Ok(()),
            false => Err(Errno::ENOMEM),
        }
    }

    /// Replaces the state of a page that was found.
    ///
    /// # Errors
    /// None that its caller could cause.
    #[inline(always)]
    pub(crate) fn set_state(
        &mut self,
        gfn: Gfn,
        (found, pfn): (Found, Pfn),
        state: PageState,
    ) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        let mut env = Env { pool, memcache: &mut Vec::new(), tlbs };
        let new = Pte::leaf(Level::PAGE, Leaf { pfn, prot: Prot::RWX, state })?;
        Ok(tree.set(gfn, found, Level::PAGE, new, &mut env)?)
    }

    /// Unmaps a range; of blocks all.
    ///
    /// # Errors
    /// `ERANGE`.
    pub(crate) fn unmap(&mut self, gfn: Gfn, nr_pages: u64) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        Ok(tree.unmap(gfn, nr_pages, &mut Env { pool, memcache: &mut Vec::new(), tlbs })?)
    }

    /// Unmaps what was found.
    #[inline(always)]
    pub(crate) fn clear(&mut self, gfn: Gfn, found: Found) {
        let Self { tree, pool, tlbs, .. } = self;
        tree.clear(gfn, found, &mut Env { pool, memcache: &mut Vec::new(), tlbs });
    }

    /// Marks a page as destroyed, in place of its leaf.
    ///
    /// # Errors
    /// `ENOMEM` in a block.
    pub(crate) fn poison(&mut self, gfn: Gfn) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        let mut env = Env { pool, memcache: &mut Vec::new(), tlbs };
        Ok(tree.annotate(gfn, 1, Annotation::GuestPoisoned, 0, &mut env)?)
    }

    /// The same for a block, which stays one entry.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub(crate) fn poison_block(&mut self, gfn: Gfn) -> Result<(), Errno> {
        let Self { tree, pool, tlbs, .. } = self;
        let mut env = Env { pool, memcache: &mut Vec::new(), tlbs };
        let pte = Pte::annotation(Annotation::GuestPoisoned, 0)?;
        Ok(tree.annotate_at(gfn, 512, Level::BLOCK_2M, pte, &mut env)?)
    }

    /// Takes the tables apart; all but the root's frames are in the pool afterwards.
    pub(crate) fn dismantle(&mut self) {
        let Self { tree, pool, tlbs, .. } = self;
        tree.dismantle(&mut Env { pool, memcache: &mut Vec::new(), tlbs });
    }

    /// The one way in which a vCPU finds out where an address leads. `None` is a translation fault.
    #[inline]
    pub(crate) fn translate(&mut self, vcpu: usize, gfn: Gfn) -> Option<Translation> {
        if let Some(found) = self.tlbs.look_up(vcpu, gfn) {
            return Some(found);
        }
        // It is used now: the hardware marks that, too.
        let (pfn, leaf) = self.tree.touch(gfn)?;
        let found = Translation { pfn, prot: leaf.prot };
        self.tlbs.fill(vcpu, gfn, found);
        Some(found)
    }
}
