//! Stage 2: the tables behind a guest's physical addresses, and the seam that hypervisors fill.
//!
//! [`Stage2`] is what a [`GuestMemfd`](crate::GuestMemfd) asks of a hypervisor. The table in
//! `table.rs` is what a simulated hypervisor answers from: a real tree of real Arm descriptors
//! (`pte.rs`), held as plain data. It has no atomics. Whoever owns one puts a reader-writer lock
//! around it, and a vCPU holds that lock for reading from its translation to the end of its copy.
//! So whoever took the lock for writing and cleared an entry knows that no translation through it
//! is in use any more. That is what a TLB invalidation and its barrier are for, and it stands for
//! them here.

mod pte;
mod table;
mod tree;
mod walk;

pub(crate) use pte::{Annotation, Entry, Leaf, Level, PageState, Prot, Pte};
pub(crate) use table::Table;
pub(crate) use tree::{Found, TableEnv, Tree};
pub(crate) use walk::{TableError, TableShape};

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;

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
    /// translation for them. `prepare` is called once, when nothing can fail any more and before the
    /// guest can reach pages that it could not reach before; it may write to their frames.
    ///
    /// # Errors
    /// The hypervisor's own errno: `EPERM` if a page is in no state to be given, or is the guest's
    /// own and the guest has not asked for this; `ENOMEM` without memory for tables; `EINVAL` for
    /// pages the machine does not have or a guest that is being torn down.
    fn make_private(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno>;

    /// Lets the host see pages of the guest, contents preserved.
    ///
    /// Nothing to do for pages that the guest has never been given, or that are shared already.
    /// `prepare` is called once, when nothing can fail any more and while no vCPU is in the middle of
    /// an access to them.
    ///
    /// # Errors
    /// `EPERM` unless the guest has asked for exactly those pages and waits for the answer.
    fn make_shared(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno>;

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
