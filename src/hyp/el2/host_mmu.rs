//! The host's stage 2: identity, mapped when the host first touches it, and who has what the host has not.
//!
//! A zero entry says nothing: the host's, not mapped yet. A leaf leads where it says. An annotation says who has the
//! page, and is always a page of its own, or a block in profiles that give blocks away. The host's state of each frame is
//! in its record ([`HypPages`]), never in a leaf.

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::stage2::{
    Annotation, Entry, Leaf, Level, PageState, Prot, Pte, TableEnv, TableError, TableShape, Tree,
};
use crate::sync::Arc;

use super::hyp_page::{HypPage, HypPages};
use super::machine::Machine;
use super::spec::Spec;
use super::tlb::{Tlbs, Translation};
use super::{GuestPage, Pages, State};

/// Who has a page that the host has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Hyp,
    Guest(GuestPage),
    /// The secure world.
    Ffa,
}

const HYP_ID: u64 = 1;
const GUEST_ID: u64 = 2;
const FFA_ID: u64 = 3;
const ID_SHIFT: u32 = 1;
const ID: u64 = 0b111;
const HANDLE_SHIFT: u32 = 4;
const HANDLE: u64 = 0xffff;
const GFN_SHIFT: u32 = 20;
const GFN: u64 = (1 << 40) - 1;

impl Owner {
    /// As the payload of an annotation.
    #[inline]
    fn payload(self) -> u64 {
        match self {
            Self::Hyp => HYP_ID << ID_SHIFT,
            Self::Ffa => FFA_ID << ID_SHIFT,
            Self::Guest(GuestPage { handle, gfn }) => {
                let meta = u64::from(handle) << HANDLE_SHIFT | (gfn.get() & GFN) << GFN_SHIFT;
                meta | GUEST_ID << ID_SHIFT
            }
        }
    }

    fn from_payload(payload: u64, skip: u64) -> Option<Self> {
        match payload >> ID_SHIFT & ID {
            HYP_ID => Some(Self::Hyp),
            FFA_ID => Some(Self::Ffa),
            GUEST_ID => {
                let handle = u16::try_from(payload >> HANDLE_SHIFT & HANDLE).ok()?;
                let gfn = Gfn::new((payload >> GFN_SHIFT & GFN) + skip);
                Some(Self::Guest(GuestPage { handle, gfn }))
            }
            _ => None,
        }
    }
}

/// Frames for tables, set aside when EL2 booted.
#[derive(Debug)]
pub(crate) struct FramePool {
    unused: Pages,
    freed: Vec<Pfn>,
}

impl FramePool {
    pub(crate) fn new(frames: Pages) -> Self {
        Self { unused: frames, freed: Vec::new() }
    }

    fn take(&mut self) -> Option<Pfn> {
        self.freed.pop().or_else(|| self.unused.split_first())
    }

    pub(crate) fn nr_free(&self) -> u64 {
        self.unused.nr() + self.freed.len() as u64
    }
}

struct Env<'a> {
    pool: &'a mut FramePool,
    tlbs: &'a mut Tlbs,
}

impl TableEnv for Env<'_> {
    fn take(&mut self) -> Option<Pfn> {
        self.pool.take()
    }

    fn give(&mut self, pfn: Pfn) {
        self.pool.freed.push(pfn);
    }

    fn nr_free(&self) -> u64 {
        self.pool.nr_free()
    }

    #[inline]
    fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
        self.tlbs.invalidate(gfn, nr_pages);
    }
}

/// What the host's lock guards.
#[derive(Debug)]
pub(crate) struct HostMmu {
    machine: Arc<Machine>,
    pub(crate) tree: Tree,
    pub(crate) pages: HypPages,
    pub(crate) pool: FramePool,
    pub(crate) tlbs: Tlbs,
    pub(crate) spec: Spec,
    /// Whether the pages around one that leaves a block are mapped again at once.
    pub(crate) keeps_siblings: bool,
    /// Where guests' firmware is; none at all if there is none.
    pub(crate) firmware: Pages,
}

const fn here(pfn: Pfn) -> Gfn {
    Gfn::new(pfn.get())
}

impl HostMmu {
    pub(crate) const SHAPE: TableShape = TableShape::IPA_48;

    /// The first frame that no address reaches.
    pub(crate) const LIMIT: Pfn = Pfn::new(Self::SHAPE.gfn_limit().get());

    /// # Errors
    /// `ENOMEM` if the pool has no root.
    pub(crate) fn new(
        machine: Arc<Machine>,
        mut pool: FramePool,
        nr_cpus: usize,
    ) -> Result<Self, Errno> {
        let root = pool.take().ok_or(Errno::ENOMEM)?;
        Ok(Self {
            tree: Tree::new(Self::SHAPE, root),
            pages: HypPages::new(machine.end()),
            machine,
            pool,
            tlbs: Tlbs::new(nr_cpus),
            spec: Spec::default(),
            keeps_siblings: false,
            firmware: Pages::new(Pfn::new(0), 0),
        })
    }

    /// Maps all memory before the host touches it.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn prefault(&mut self) -> Result<(), Errno> {
        let regions: Vec<_> = self.machine.regions().iter().map(|region| region.frames).collect();
        regions.into_iter().try_for_each(|frames| self.fill(frames.start(), frames.end()))
    }

    /// Maps what is not mapped, by blocks as large as can be.
    fn fill(&mut self, start: Pfn, end: Pfn) -> Result<(), Errno> {
        let mut at = start;
        while at < end {
            if self.tree.get(here(at))?.1.is_empty() {
                self.abort(at)?;
            }
            let span = Self::SHAPE.pages_at(self.tree.get(here(at))?.0);
            at = Pfn::new((at.get() & !(span - 1)) + span);
        }
        Ok(())
    }

    /// The blocks that the ends of a run lie in, together with the run.
    fn blocks_around(&self, pages: Pages) -> Option<(Pfn, Pfn)> {
        let span_at = |pfn: Pfn| match self.tree.leaf(here(pfn)) {
            Some((level, _)) => Self::SHAPE.pages_at(level),
            None => 1,
        };
        let (start, end) = (pages.start().get(), pages.end()?.get());
        let start = start & !(span_at(pages.start()) - 1);
        let span = span_at(Pfn::new(end.checked_sub(1)?));
        Some((Pfn::new(start), Pfn::new(end.next_multiple_of(span))))
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    #[inline]
    pub(crate) fn page(&self, pfn: Pfn) -> HypPage {
        self.pages.get(pfn)
    }

    /// Whether all pages are memory in this state.
    ///
    /// # Errors
    /// `EINVAL` or `EPERM` for what is no memory, `EPERM` for another state.
    #[inline(always)]
    pub(crate) fn check_state(&self, pages: Pages, state: State) -> Result<(), Errno> {
        self.machine.check_allowed(pages.start(), pages.nr())?;
        match self.pages.all(pages, |page| page.host() == state) {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }

    /// The same as EL2 sees them.
    pub(crate) fn check_hyp_state(&self, pages: Pages, state: State) -> Result<(), Errno> {
        match self.pages.all(pages, |page| page.hyp() == state) {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }

    /// Takes pages from the host: not mapped, nowhere remembered, and an annotation says who has them. If tables are
    /// short, those of devices go first.
    ///
    /// # Errors
    /// `ENOMEM`, and nothing has changed.
    pub(crate) fn give(&mut self, pages: Pages, owner: Owner, level: Level) -> Result<(), Errno> {
        let around = if self.keeps_siblings { self.blocks_around(pages) } else { None };
        match self.annotate(pages, owner, level) {
            Err(TableError::NoMemory) => {
                self.drop_devices()?;
                self.annotate(pages, owner, level)?;
            }
            other => other?,
        }
        self.pages.set_host(pages, State::NoPage);
        if let Some((start, end)) = around {
            // There are tables, from the annotation. What is not mapped now will be when it is touched.
            self.fill(start, end).ok();
        }
        Ok(())
    }

    fn annotate(&mut self, pages: Pages, owner: Owner, level: Level) -> Result<(), TableError> {
        let Self { tree, pool, tlbs, .. } = self;
        let mut env = Env { pool, tlbs };
        match owner {
            Owner::Guest(guest) if level == Level::PAGE && pages.nr() > 1 => {
                // All of one table, so only the first can fail.
                for (pfn, nth) in pages.iter().zip(0..) {
                    let payload = Owner::Guest(guest.after(nth)).payload();
                    tree.annotate(here(pfn), 1, Annotation::HostDonation, payload, &mut env)?;
                }
                Ok(())
            }
            _ => {
                let pte = Pte::annotation(Annotation::HostDonation, owner.payload())?;
                tree.annotate_at(here(pages.start()), pages.nr(), level, pte, &mut env)
            }
        }
    }

    /// Whether tables are there, or can be, for entries of a level that say who has pages. If tables are short, those of
    /// devices go first.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn provide(&mut self, pages: Pages, level: Level) -> Result<(), Errno> {
        let missing = |tree: &Tree| tree.nr_missing(here(pages.start()), pages.nr(), level);
        if missing(&self.tree)? > self.pool.nr_free() {
            self.drop_devices()?;
        }
        match missing(&self.tree)? <= self.pool.nr_free() {
            true => Ok(()),
            false => Err(Errno::ENOMEM),
        }
    }

    /// The same for a page of a guest's.
    ///
    /// # Errors
    /// `ENOMEM`, and nothing has changed.
    #[inline(always)]
    pub(crate) fn give_page(&mut self, pfn: Pfn, to: GuestPage) -> Result<(), Errno> {
        if self.keeps_siblings {
            return self.give(Pages::one(pfn), Owner::Guest(to), Level::PAGE);
        }
        let new = Pte::annotation(Annotation::HostDonation, Owner::Guest(to).payload())?;
        if let Err(error) = self.set_page(pfn, new) {
            self.set_page_of_devices(pfn, new, error)?;
        }
        self.pages.update(pfn, |page| page.set_host(State::NoPage));
        Ok(())
    }

    #[cold]
    fn set_page_of_devices(
        &mut self,
        pfn: Pfn,
        new: Pte,
        error: TableError,
    ) -> Result<(), TableError> {
        match error {
            TableError::NoMemory => {
                self.drop_devices()?;
                self.set_page(pfn, new)
            }
            error => Err(error),
        }
    }

    /// The same as [`Self::take_back`] for a page.
    ///
    /// # Errors
    /// `ENOMEM`.
    #[inline(always)]
    pub(crate) fn take_page_back(&mut self, pfn: Pfn, state: State) -> Result<(), Errno> {
        // Only memory changes hands.
        let leaf = Leaf { pfn, prot: Prot::RWX, state: PageState::Owned };
        self.set_page(pfn, Pte::leaf(Level::PAGE, leaf)?)?;
        self.pages.update(pfn, |page| page.set_host(state));
        Ok(())
    }

    /// One entry of one page.
    #[inline(always)]
    fn set_page(&mut self, pfn: Pfn, new: Pte) -> Result<(), TableError> {
        let Self { tree, pool, tlbs, .. } = self;
        let found = tree.find(here(pfn))?;
        tree.set(here(pfn), found, Level::PAGE, new, &mut Env { pool, tlbs })
    }

    /// Gives pages to the host, mapped, in a state.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn take_back(&mut self, pages: Pages, state: State) -> Result<(), Errno> {
        // A leaf of a page each, so that neighbours keep their annotations; but a block whole.
        let is_block = pages.nr() == 512 && pages.start().get() % 512 == 0;
        self.identity(pages, if is_block { Level::BLOCK_2M } else { Level::PAGE })?;
        self.pages.set_host(pages, state);
        Ok(())
    }

    fn identity(&mut self, pages: Pages, level: Level) -> Result<(), TableError> {
        let memory = self.machine.is_memory(pages.start());
        let (prot, make): (_, fn(_, _) -> _) =
            if memory { (Prot::RWX, Pte::leaf) } else { (Prot::RW, Pte::device) };
        let leaf = Leaf { pfn: pages.start(), prot, state: PageState::Owned };
        let Self { tree, pool, tlbs, .. } = self;
        tree.map(here(pages.start()), pages.nr(), level, leaf, make, &mut Env { pool, tlbs })
    }

    /// Drops every mapping of a device.
    fn drop_devices(&mut self) -> Result<(), TableError> {
        let Self { machine, tree, pool, tlbs, .. } = self;
        let mut at = Pfn::new(0);
        while at < Self::LIMIT {
            let (start, end) = machine.neighbourhood(at, Self::LIMIT);
            if !machine.is_memory(at) {
                let mut env = Env { pool, tlbs };
                tree.unmap(here(start), end.get() - start.get(), &mut env)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Who has a page, if its entry says.
    ///
    /// # Errors
    /// `ERANGE` for a frame that no address reaches.
    pub(crate) fn owner(&self, pfn: Pfn) -> Result<Option<Owner>, Errno> {
        let (level, pte) = self.tree.get(here(pfn))?;
        let skip = pfn.get() & (Self::SHAPE.pages_at(level) - 1);
        Ok(match pte.decode(level) {
            Entry::Annotated(Annotation::HostDonation, payload) => {
                Owner::from_payload(payload, skip)
            }
            _ => None,
        })
    }

    /// The host touched what it has no mapping for: maps the largest block around it that lies in one region and
    /// under no table.
    ///
    /// # Errors
    /// `EPERM` if somebody else has the page; `ERANGE` beyond all addresses; `ENOMEM`.
    pub(crate) fn abort(&mut self, pfn: Pfn) -> Result<(), Errno> {
        let (mut level, pte) = self.tree.get(here(pfn))?;
        if pte.is_valid() {
            // Another CPU was faster.
            return Ok(());
        }
        if !pte.is_empty() {
            return Err(Errno::EPERM);
        }
        let (start, end) = self.machine.neighbourhood(pfn, Self::LIMIT);
        loop {
            let span = Self::SHAPE.pages_at(level);
            let first = Pfn::new(pfn.get() & !(span - 1));
            let last = first.checked_add(span).ok_or(Errno::ERANGE)?;
            if level >= Level::BLOCK_1G && first >= start && last <= end {
                let pages = Pages::new(first, span);
                return match self.identity(pages, level) {
                    Err(TableError::NoMemory) => {
                        self.drop_devices()?;
                        Ok(self.identity(pages, level)?)
                    }
                    other => Ok(other?),
                };
            }
            if level == Level::PAGE {
                return Err(Errno::EINVAL);
            }
            level = level.below();
        }
    }

    /// The one way in which a CPU finds out where an address of the host's leads.
    ///
    /// # Errors
    /// As for [`Self::abort`].
    pub(crate) fn translate(&mut self, cpu: usize, pfn: Pfn) -> Result<Translation, Errno> {
        if let Some(found) = self.tlbs.look_up(cpu, here(pfn)) {
            return Ok(found);
        }
        loop {
            if let Some((to, leaf)) = self.tree.translate(here(pfn)) {
                let found = Translation { pfn: to, prot: leaf.prot };
                self.tlbs.fill(cpu, here(pfn), found);
                return Ok(found);
            }
            self.abort(pfn)?;
        }
    }

    /// Clears pages that nobody reaches any more. If their memory is broken, nobody ever will.
    ///
    /// # Errors
    /// `EIO`.
    pub(crate) fn clear(&mut self, pages: Pages) -> Result<(), Errno> {
        let cleared = pages.iter().try_for_each(|pfn| self.machine.zero(pfn));
        if cleared.is_err() {
            self.pages.orphan(pages);
        }
        cleared
    }

    /// How many bytes records and tables take.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn nr_bytes(&self) -> usize {
        self.pages.nr_bytes() + self.tree.nr_bytes()
    }
}

#[cfg(test)]
mod tests;
