//! pKVM: the host starts with all memory and gives it away; EL2 keeps the account.
//!
//! A [`Hypervisor`] is EL2 of one simulated machine, whose memory is one
//! [`FolioPool`]. It knows for every frame who owns it and who may see it:
//!
//! | host's record | guest's leaf | who sees the frame | how it gets there |
//! |---|---|---|---|
//! | `OWNED` (no entry) | none | the host | from the start; reclaim |
//! | `NOPAGE` (annotation: which guest, which gfn) | `OWNED` | that guest | donate; unshare |
//! | `SHARED_BORROWED` (leaf) | `SHARED_OWNED` | host and guest | share |
//!
//! Nothing else is legal. There are five ways from row to row, all of 4 KiB; design/stage2.md has
//! the order in which each looks at things, and what it answers.
//!
//! | transition | whose wish | from | to | bytes |
//! |---|---|---|---|---|
//! | `host_donate_guest` | the host's | host's | guest's | preserved |
//! | `guest_share_host` | the guest's | guest's | shared | preserved |
//! | `guest_unshare_host` | the guest's | shared | guest's | preserved |
//! | `guest_relinquish_page` | the guest's | guest's, shared | host's | zeroed if it was the guest's alone |
//! | `reclaim_dying_guest_page` | teardown | guest's, shared | host's | zeroed if it was the guest's alone |
//!
//! # Where this differs from pKVM
//! - **Sharing asks the VMM.** A real EL2 answers `MEM_SHARE` and `MEM_UNSHARE` on its own. Here the
//!   vCPU exits, the VMM converts the memory in its [`GuestMemfd`](crate::GuestMemfd), and that asks
//!   EL2: so pins are honoured, and host views follow. EL2 goes along only while the guest's request
//!   for that page is pending, and the guest is told what really became of the page.
//! - **A memslot may go while the guest lives**, once the guest has relinquished what it had there. pKVM
//!   refuses to delete one of a protected guest that has run.
//! - A page may be donated before a vCPU has run: a payload is loaded, then converted.
//! - The host's page state is kept in its stage-2 table alone, in the software bits of the leaf, where
//!   current pKVM has an array of page records besides.
//! - No huge mappings, no non-protected guests, no forced reclaim of single pages yet.

mod invariants;
mod memslot;
mod page;
mod spec;
mod transition;
mod vm;

use std::sync::{Arc, Weak};

use slab::Slab;

pub use self::memslot::MemslotId;
pub(super) use self::memslot::SlotPage;
use self::page::{HostPage, HostPages, VmHandle};
use self::vm::VmCore;
pub(super) use self::vm::{Lease, Request};
pub use self::vm::{Vm, VmStat};
use crate::addr::{ByteSize, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::folio::{Claim, FolioPool};
use crate::stage2::TableShape;
use crate::state::Visibility;
use crate::sync::Mutex;

/// How many virtual machines EL2 has room for.
const MAX_VMS: usize = 255;
/// The handle of the first one: small numbers are not handles.
const FIRST_HANDLE: u16 = 0x1000;

/// EL2 of a simulated machine. Clones are handles to the same one.
///
/// All guests whose memory comes from one pool run under one hypervisor: another one would not know
/// which frames are given away, and is refused.
#[derive(Clone, Debug)]
pub struct Hypervisor(Arc<Host>);

/// Lock order: the machines, the host's pages, then the state of one machine. None of them is held
/// while an object is called.
#[derive(Debug)]
struct Host {
    arena: Arc<Arena>,
    vms: Mutex<Slab<Weak<VmCore>>>,
    pages: Mutex<HostPages>,
    _claim: Claim,
}

/// What a hypervisor has given away at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostStat {
    /// Memory that guests have to themselves.
    pub donated: ByteSize,
    /// Memory of guests that the host may see.
    pub borrowed: ByteSize,
    /// Virtual machines that are not torn down.
    pub nr_vms: usize,
}

impl Hypervisor {
    /// EL2 of a machine whose memory is this pool.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] while the pool has a hypervisor already; [`ErrorKind::Exhausted`].
    pub fn new(pool: &FolioPool) -> Result<Self, Error> {
        let claim = pool.claim().ok_or_else(|| {
            Error::new(Op::Hypervisor, ErrorKind::Exists).because("the pool has one already")
        })?;
        let arena = Arc::clone(pool.arena());
        let pages = Mutex::new(HostPages::new(arena.nr_pages()).map_err(refused)?);
        Ok(Self(Arc::new(Host { arena, vms: Mutex::new(Slab::new()), pages, _claim: claim })))
    }

    /// A protected guest, with no memory and no vCPU, and 40 bits of address.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] beyond 255 guests, or without memory for its table.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        self.create_vm_with(TableShape::IPA_40, usize::MAX)
    }

    /// A guest with another address space, or with a limit to the memory for its table.
    fn create_vm_with(&self, shape: TableShape, nr_tables: usize) -> Result<Vm, Error> {
        let mut vms = self.0.vms.lock();
        let exhausted = || Error::new(Op::Hypervisor, ErrorKind::Exhausted);
        if vms.len() >= MAX_VMS {
            return Err(exhausted().because("too many virtual machines"));
        }
        let entry = vms.vacant_entry();
        let index = u16::try_from(entry.key()).map_err(|_| exhausted())?;
        let handle = VmHandle(FIRST_HANDLE.checked_add(index).ok_or_else(exhausted)?);
        let core = VmCore::new(Arc::clone(&self.0), handle, shape, nr_tables)?;
        entry.insert(Arc::downgrade(&core));
        Ok(Vm::of(core))
    }

    /// The frames that are guests', ascending: private to one, or shared by it with the host. What
    /// an audit compares with the objects.
    pub(crate) fn frames_of_guests(&self) -> Vec<(Pfn, Visibility)> {
        let host = self.0.pages.lock();
        let visibility = |page| match page {
            HostPage::SharedBorrowed => Visibility::Shared,
            _ => Visibility::Private,
        };
        host.taken().map(|(pfn, page)| (pfn, visibility(page))).collect()
    }

    /// What is given away.
    pub fn stat(&self) -> HostStat {
        let nr_vms = self.0.vms.lock().len();
        let (mut donated, mut borrowed) = (0, 0);
        for (_, page) in self.0.pages.lock().taken() {
            match page {
                HostPage::SharedBorrowed => borrowed += 1,
                _ => donated += 1,
            }
        }
        let [donated, borrowed] = [donated, borrowed].map(ByteSize::from_pages);
        HostStat { donated, borrowed, nr_vms }
    }
}

impl Host {
    /// The handle is free for another machine.
    fn forget(&self, handle: VmHandle) {
        if let Some(key) = handle.0.checked_sub(FIRST_HANDLE) {
            self.vms.lock().try_remove(usize::from(key));
        }
    }
}

/// What EL2 refuses by itself.
fn refused(errno: impl Into<Errno>) -> Error {
    let errno = errno.into();
    let kind = match errno {
        Errno::ENOMEM => ErrorKind::Exhausted,
        _ => ErrorKind::HypervisorRefused,
    };
    Error::new(Op::Hypervisor, kind).errno_is(errno)
}

#[cfg(test)]
mod tests;
