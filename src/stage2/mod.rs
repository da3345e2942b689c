//! Stage 2: the tables behind a guest's physical addresses, and the seam that hypervisors fill.
//!
//! [`Stage2`] is what a [`GuestMemfd`](crate::GuestMemfd) asks of a hypervisor. The trees that a simulated
//! one answers from are made of real Arm descriptors (`pte.rs`), held as plain data behind a lock of
//! their owner's: `tree.rs` is the hypervisor's, `table.rs` the IOMMU's.

mod pte;
mod table;
mod tree;
mod walk;

pub(crate) use pte::{Annotation, Entry, Leaf, Level, PageState, Prot, Pte};
pub(crate) use table::Table;
pub(crate) use tree::{Found, Missing, TableEnv, Tree};
pub(crate) use walk::{TableError, TableShape};

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::range::GfnRange;
use crate::state::Visibility;

/// Pages that are consecutive both in guest frames and in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRun {
    /// The first guest frame.
    pub gfn: Gfn,
    /// The frame of the arena that is behind it.
    pub pfn: Pfn,
    /// How many pages.
    pub nr_pages: u64,
}

/// Guest memory that moves to other frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMove {
    /// Where it is.
    pub from: GuestRun,
    /// The first of as many frames that are to be behind it. They are nobody's, and all zeroes.
    pub to: Pfn,
}

/// What became of a guest's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faulted {
    /// The guest has the page now, or had it already.
    Mapped,
    /// The guest may not have the page as long as it is on the side on which it is.
    OtherSide,
}

/// What an object has refused for the sake of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prevented {
    /// An access of the host's to private memory.
    Access,
    /// A pin on private memory.
    Pin,
    /// A conversion, a hole punch or a move of memory that is pinned.
    Conversion,
}

/// What guest memory asks of the hypervisor that runs the guest.
///
/// The names are those of the hooks that the kernel's guest_memfd has for its architectures. Every
/// call is all or nothing over its whole slice: on an error no page of it has changed. Calls come
/// with the object's layout lock held, so an implementation takes only locks of its own and calls
/// nothing of the object.
pub trait Stage2: Send + Sync + std::fmt::Debug {
    /// Takes the pages away from the host and gives them to the guest, contents preserved.
    ///
    /// Nothing to do for pages that are the guest's already. When this returns, the host has no
    /// translation for them. `prepare` is called for every page once, piece by piece, when nothing can fail
    /// any more and before the guest can reach pages of the piece that it could not reach before; it may write
    /// to their frames.
    ///
    /// # Errors
    /// The hypervisor's own errno: `EPERM` if a page is in no state to be given, or is the guest's
    /// own and the guest has not asked for this; `ENOMEM` without memory for tables; `EINVAL` for
    /// pages the machine does not have or a guest that is being torn down.
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno>;

    /// Lets the host see pages of the guest, contents preserved.
    ///
    /// Nothing to do for pages that the guest has never been given, or that are shared already.
    /// `prepare` is called for every page once, piece by piece, when nothing can fail any more and while
    /// no vCPU is in the middle of an access to the piece.
    ///
    /// # Errors
    /// `EPERM` unless the guest has asked for exactly those pages and waits for the answer.
    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno>;

    /// A guest has touched a page that it has not got, which is on this side in the object. `block` are the
    /// 2 MiB around it if they are one piece in guest frames and in the arena, aligned in both, and all on the
    /// same side.
    ///
    /// # Errors
    /// As [`make_private`](Self::make_private).
    fn fault(
        &self,
        side: Visibility,
        page: GuestRun,
        block: Option<GuestRun>,
    ) -> Result<Faulted, Errno> {
        let _ = block;
        match side {
            Visibility::Shared => Ok(Faulted::OtherSide),
            Visibility::Private => {
                self.make_private(&[page], &mut |_| ()).map(|()| Faulted::Mapped)
            }
        }
    }

    /// Whether a guest that touches memory on this side is given it.
    fn takes(&self, side: Visibility) -> bool {
        side == Visibility::Private
    }

    /// Whether there is memory that may not change sides, guest or not, resident or not: then
    /// [`may_be`](Self::may_be) says which.
    fn fixes_sides(&self) -> bool {
        false
    }

    /// Whether all of these guest frames may be on this side.
    fn may_be(&self, gfns: GfnRange, side: Visibility) -> bool {
        let _ = (gfns, side);
        true
    }

    /// Takes note of something that the object has refused. Called from anywhere, with any lock held: it only
    /// counts.
    fn note_prevented(&self, what: Prevented) {
        let _ = what;
    }

    /// Drops every stage-2 translation of pages that are not the guest's own.
    ///
    /// When this returns, no translation and no TLB entry is left for them. Pages of the guest's own
    /// keep theirs: the host cannot take them away.
    fn invalidate_range(&self, runs: &[GuestRun]);

    /// Takes pages back from the guest for good: scrubbed, and the host's again.
    ///
    /// Nothing to do for pages that the guest has not got.
    ///
    /// # Errors
    /// `EBUSY` where the hypervisor cannot do that while the guest lives.
    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno>;

    /// Puts other frames behind the pages, contents and state preserved.
    ///
    /// `copy` moves the bytes. It is called once, when nothing can fail any more and while no vCPU is in the
    /// middle of an access to the pages; the guest reaches the new frames only afterwards. A hypervisor whose
    /// host cannot read what is the guest's own moves those bytes itself.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unless the hypervisor can do this; `EPERM` if a page is the guest's own and stays where it
    /// is.
    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        let _ = (moves, copy);
        Err(Errno::EOPNOTSUPP)
    }
}
