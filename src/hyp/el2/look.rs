//! A look at whose pages are, for the host's kernel that lives in the same process: what a real one keeps books
//! of, and a simulated one need not keep twice. Nothing is changed.

use std::ops::Deref;

use super::guest_mmu::GuestMmu;
use super::host_mmu::{HostMmu, Owner};
use super::vm::Vm;
use super::{El2, GuestPage, Pages, State, stretch};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Annotation, Entry, Level, Missing};
use crate::sync::{Arc, SpinGuard};

/// So many pages are looked at, or made to stand still, before others have their turn.
pub(crate) const PIECE: u64 = HUGE_PAGES;
/// So many records of 2 MiB that was never touched are passed by before others have theirs.
const MOST_UNTOUCHED: u64 = 4096;

/// Host and one guest, standing still.
pub(crate) struct Look<'a> {
    host: SpinGuard<'a, HostMmu>,
    guest: GuestLook<'a>,
}

/// One guest, standing still. The host does not, nor does any other guest.
pub(crate) struct GuestLook<'a> {
    guest: SpinGuard<'a, GuestMmu>,
    #[cfg(test)]
    seen: std::cell::Cell<u64>,
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

/// As many as are found at once: room for leaves.
#[derive(Debug)]
pub(crate) struct Leaves {
    found: [Mapped; Self::MOST],
    nr: usize,
}

impl Leaves {
    const MOST: usize = 64;

    pub(crate) const fn new() -> Self {
        let none =
            Mapped { pfn: Pfn::new(0), state: State::NoPage, start: Gfn::new(0), nr_pages: 0 };
        Self { found: [none; Self::MOST], nr: 0 }
    }

    fn push(&mut self, leaf: Mapped) -> bool {
        let Some(place) = self.found.get_mut(self.nr) else { return false };
        *place = leaf;
        self.nr += 1;
        true
    }
}

impl Deref for Leaves {
    type Target = [Mapped];

    fn deref(&self) -> &[Mapped] {
        &self.found[..self.nr]
    }
}

impl El2 {
    /// The VM of a handle, for as long as somebody holds it.
    pub(crate) fn vm(&self, handle: u16) -> Option<Arc<Vm>> {
        Some(Arc::clone(&self.vms.lock().get(handle)?.vm))
    }

    /// Stops the host and a guest, and looks.
    pub(crate) fn look<'a>(&'a self, vm: &'a Vm) -> Look<'a> {
        let host = self.host.lock();
        Look { host, guest: GuestLook::new(vm) }
    }

    /// Stops a guest, and looks.
    pub(crate) fn look_at_guest<'a>(&'a self, vm: &'a Vm) -> GuestLook<'a> {
        GuestLook::new(vm)
    }

    /// Between two pieces: lets others have the locks that they wait for.
    pub(crate) fn give_way(&self, vm: &Vm) {
        self.vms.give_way();
        self.host.give_way();
        vm.mmu.give_way();
    }

    /// Whether frames are memory that may change hands.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM`.
    pub(crate) fn check_memory(&self, pfn: Pfn, nr_pages: u64) -> Result<(), Errno> {
        let pages = Pages::checked(pfn.get(), nr_pages)?;
        self.machine.check_allowed(pages.start(), pages.nr())
    }

    /// Does something while no vCPU is in the middle of an access to these pages of a guest's, and none finds
    /// them without walking the tables, which it has to wait for. Let them be few.
    pub(crate) fn with_guest_stopped(&self, vm: &Vm, gfn: Gfn, nr_pages: u64, act: impl FnOnce()) {
        let mut guest = vm.mmu.lock();
        stretch::held_over(nr_pages);
        guest.tlbs.invalidate(gfn, nr_pages);
        act();
    }

    /// The frames in `[from, end)` that guests have of the host, or are shown by it, or show it: those of one piece, and
    /// where the next begins. `found` is empty, and has room for as many.
    pub(crate) fn frames_of_guests(
        &self,
        from: Pfn,
        end: Pfn,
        found: &mut Vec<(Pfn, State)>,
    ) -> Option<Pfn> {
        self.host.give_way();
        let host = self.host.lock();
        let first = host.pages.skip_untouched(from, MOST_UNTOUCHED);
        let piece = first.get()..first.get().saturating_add(PIECE).min(end.get());
        stretch::held_over(piece.end.saturating_sub(piece.start));
        let next = Pfn::new(piece.end.max(first.get()));
        // What is shared with EL2 or the secure world alone is the kernel's own, and lies beyond.
        let states = piece.map(Pfn::new).map(|pfn| (pfn, host.page(pfn).host()));
        found.extend(states.filter(|&(_, state)| state != State::Owned));
        Some(next).filter(|&next| next < end)
    }

    /// The same in one go.
    #[cfg(test)]
    pub(crate) fn all_frames_of_guests(&self, end: Pfn) -> Vec<(Pfn, State)> {
        let host = self.host.lock();
        let touched = host.pages.touched().map(|(pfn, page)| (pfn, page.host()));
        touched.filter(|&(pfn, state)| pfn < end && state != State::Owned).collect()
    }

    /// Has EL2 believe something else of a frame, for somebody to notice.
    #[cfg(test)]
    pub(crate) fn mistake(&self, pfn: Pfn, state: State) {
        self.host.lock().pages.update(pfn, |page| page.set_host(state));
    }
}

impl<'a> GuestLook<'a> {
    fn new(vm: &'a Vm) -> Self {
        Self {
            guest: vm.mmu.lock(),
            #[cfg(test)]
            seen: std::cell::Cell::new(0),
        }
    }

    #[inline(always)]
    fn note_seen(&self) {
        #[cfg(test)]
        self.seen.set(self.seen.get() + 1);
    }

    /// What the guest has there.
    ///
    /// # Errors
    /// `ERANGE`; `ENOENT` for nothing; `EHWPOISON` for a page that was destroyed.
    pub(crate) fn guest(&self, gfn: Gfn) -> Result<Mapped, Errno> {
        self.note_seen();
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

    /// Counts the tables that a page needs and that are not there.
    ///
    /// # Errors
    /// `ERANGE`.
    pub(crate) fn count_missing(&self, gfn: Gfn, missing: &mut Missing) -> Result<(), Errno> {
        Ok(self.guest.tree.count_missing(gfn, 1, Level::PAGE, missing)?)
    }

    /// How many tables the guest's stage 2 is made of.
    pub(crate) fn nr_tables(&self) -> usize {
        self.guest.tree.nr_tables()
    }

    /// Leaves in `[from, end)`, ascending, each whole: those of one piece, and where the next begins.
    pub(crate) fn leaves(&self, from: Gfn, end: Gfn) -> (Leaves, Option<Gfn>) {
        let mut leaves = Leaves::new();
        let mut at = from;
        for _ in 0..PIECE {
            let Ok((level, pte)) = self.guest.tree.get(at) else { return (leaves, None) };
            self.note_seen();
            let nr_pages = GuestMmu::SHAPE.pages_at(level);
            let start = Gfn::new(at.get() & !(nr_pages - 1));
            if let Entry::Leaf(leaf) = pte.decode(level) {
                let (pfn, state) = (leaf.pfn, leaf.state.into());
                if !leaves.push(Mapped { pfn, state, start, nr_pages }) {
                    break;
                }
            }
            match start.checked_add(nr_pages).filter(|&next| next < end) {
                Some(next) => at = next,
                None => return (leaves, None),
            }
        }
        (leaves, Some(at))
    }
}

#[cfg(test)]
impl Drop for GuestLook<'_> {
    fn drop(&mut self) {
        stretch::held_over(self.seen.get());
    }
}

impl<'a> Deref for Look<'a> {
    type Target = GuestLook<'a>;

    fn deref(&self) -> &GuestLook<'a> {
        &self.guest
    }
}

impl Look<'_> {
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
        let page = GuestPage { handle: self.guest.guest.handle, gfn };
        self.host.owner(pfn) == Ok(Some(Owner::Guest(page)))
    }
}
