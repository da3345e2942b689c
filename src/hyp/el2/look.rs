//! A look at whose pages are, for the host's kernel that lives in the same process: what a real one keeps books
//! of, and a simulated one need not keep twice. Nothing is changed.

use super::guest_mmu::GuestMmu;
use super::host_mmu::{HostMmu, Owner};
use super::vm::Vm;
use super::{El2, GuestPage, Pages, State};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Annotation, Entry, Level};
use crate::sync::{Arc, SpinGuard};

/// Host and one guest, standing still.
pub(crate) struct Look<'a> {
    host: SpinGuard<'a, HostMmu>,
    guest: SpinGuard<'a, GuestMmu>,
}

/// What a guest has at a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) pfn: Pfn,
    pub(crate) state: State,
    /// The guest frame at which its leaf begins, and how many pages that has.
    pub(crate) start: Gfn,
    pub(crate) nr_pages: u64,
}

impl El2 {
    /// The VM of a handle, for as long as somebody holds it.
    pub(crate) fn vm(&self, handle: u16) -> Option<Arc<Vm>> {
        Some(Arc::clone(&self.vms.lock().get(handle)?.vm))
    }

    /// Stops the host and a guest, and looks.
    pub(crate) fn look<'a>(&'a self, vm: &'a Vm) -> Look<'a> {
        let host = self.host.lock();
        Look { host, guest: vm.mmu.lock() }
    }

    /// Does something while no vCPU is in the middle of an access to these pages of a guest's, and none finds
    /// them without walking the tables, which it has to wait for.
    pub(crate) fn with_guest_stopped(
        &self,
        vm: &Vm,
        ranges: impl Iterator<Item = (Gfn, u64)>,
        act: impl FnOnce(),
    ) {
        let mut guest = vm.mmu.lock();
        ranges.for_each(|(gfn, nr_pages)| guest.tlbs.invalidate(gfn, nr_pages));
        act();
    }

    /// The frames below `end` that guests have of the host, or are shown by it, or show it.
    pub(crate) fn frames_of_guests(&self, end: Pfn) -> Vec<(Pfn, State)> {
        let host = self.host.lock();
        let touched = host.pages.touched().map(|(pfn, page)| (pfn, page.host()));
        // What is shared with EL2 or the secure world alone is the kernel's own, and lies beyond.
        touched.filter(|&(pfn, state)| pfn < end && state != State::Owned).collect()
    }

    /// Has EL2 believe something else of a frame, for somebody to notice.
    #[cfg(test)]
    pub(crate) fn mistake(&self, pfn: Pfn, state: State) {
        self.host.lock().pages.update(pfn, |page| page.set_host(state));
    }
}

impl Look<'_> {
    /// What the guest has there.
    ///
    /// # Errors
    /// `ERANGE`; `ENOENT` for nothing; `EHWPOISON` for a page that was destroyed.
    pub(crate) fn guest(&self, gfn: Gfn) -> Result<Mapped, Errno> {
        let (level, pte) = self.guest.tree.get(gfn)?;
        match pte.decode(level) {
            Entry::Annotated(Annotation::GuestPoisoned, _) => Err(Errno::EHWPOISON),
            Entry::Leaf(leaf) => {
                let nr_pages = GuestMmu::SHAPE.pages_at(level);
                let nth = gfn.get() & (nr_pages - 1);
                Ok(Mapped {
                    pfn: Pfn::new(leaf.pfn.get() + nth),
                    state: leaf.state.into(),
                    start: Gfn::new(gfn.get() - nth),
                    nr_pages,
                })
            }
            _ => Err(Errno::ENOENT),
        }
    }

    /// Whether all of an aligned block is empty, so that one entry can take its place.
    pub(crate) fn is_vacant_block(&self, gfn: Gfn) -> bool {
        gfn.get() % HUGE_PAGES == 0 && self.guest.vacancy(gfn, Level::BLOCK_2M).is_ok()
    }

    /// The host's state of a frame.
    pub(crate) fn host(&self, pfn: Pfn) -> State {
        self.host.page(pfn).host()
    }

    /// Whether the host has a frame to itself, and no device uses it.
    pub(crate) fn can_be_given(&self, pfn: Pfn) -> bool {
        let page = self.host.page(pfn);
        page.host() == State::Owned && page.nr_pins == 0
    }

    /// Whether the host has a frame down as this guest's, at this place.
    pub(crate) fn is_down_as(&self, pfn: Pfn, gfn: Gfn) -> bool {
        let page = GuestPage { handle: self.guest.handle, gfn };
        self.host.owner(pfn) == Ok(Some(Owner::Guest(page)))
    }

    /// Whether frames are memory that may change hands.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM`.
    pub(crate) fn check_memory(&self, pfn: Pfn, nr_pages: u64) -> Result<(), Errno> {
        let pages = Pages::checked(pfn.get(), nr_pages)?;
        self.host.machine().check_allowed(pages.start(), pages.nr())
    }

    /// How many tables pages of a range need that are not there.
    ///
    /// # Errors
    /// `ERANGE`.
    pub(crate) fn nr_missing(&self, gfn: Gfn, nr_pages: u64) -> Result<u64, Errno> {
        Ok(self.guest.tree.nr_missing(gfn, nr_pages, Level::PAGE)?)
    }

    /// How many tables the guest's stage 2 is made of.
    pub(crate) fn nr_tables(&self) -> usize {
        self.guest.tree.nr_tables()
    }

    /// Every leaf of the guest's, in ascending order.
    pub(crate) fn leaves(&self) -> Vec<Mapped> {
        let mut leaves = Vec::new();
        self.guest.tree.visit(|start, level, pte| {
            if let Entry::Leaf(leaf) = pte.decode(level) {
                let nr_pages = GuestMmu::SHAPE.pages_at(level);
                let state = leaf.state.into();
                leaves.push(Mapped { pfn: leaf.pfn, state, start, nr_pages });
            }
        });
        leaves
    }
}
