//! pKVM: the host starts with all memory and gives it away; EL2 keeps the account.
//!
//! Behind a [`Hypervisor`](super::Hypervisor) of this model is EL2 of one simulated machine, whose memory is one
//! [`FolioPool`](crate::FolioPool), and as much of a host kernel as it takes to have VMs there. EL2 is a pKVM down to the bits (`hyp/el2`); everything here asks it by the
//! hypercalls that a real kernel has, and gets its answers. It knows for every frame who owns it and who sees it:
//!
//! | the host's state | guest's leaf | who sees the frame | how it gets there |
//! |---|---|---|---|
//! | `OWNED` | none | the host | from the start; reclaim; unshare |
//! | `NOPAGE` (annotation: which guest, where) | `OWNED` | that guest | donate; the guest unshares |
//! | `SHARED_BORROWED` | `SHARED_OWNED` | host and guest | the guest shares |
//! | `SHARED_OWNED` | `SHARED_BORROWED` | host and guest, which is not protected | the host shares |
//! | `OWNED` | poison | the host, zeroed | the host touched what was the guest's alone |
//!
//! design/pkvm.md has the order in which each way looks at things, and what it answers. Which version of pKVM it is,
//! is a [`Profile`].
//!
//! # Where this differs from pKVM
//! - **Sharing asks the VMM.** A real EL2 answers `MEM_SHARE` and `MEM_UNSHARE` on its own. Here the vCPU exits, the
//!   VMM converts the memory in its [`GuestMemfd`](crate::GuestMemfd), and that makes the guest's hypercall: so pins
//!   are honoured, and host views follow. That happens only while the guest's request for that page is pending, and
//!   the guest is told what really became of the page.
//! - **A memslot may go while the guest lives**, as long as the guest has nothing there. pKVM refuses to delete any of a
//!   protected guest that has run.
//! - A page may be donated before a vCPU has run: a payload is loaded, then converted. One vCPU of each VM is nobody's,
//!   for that.

mod cpus;
mod frames;
mod hooks;
#[cfg(feature = "oracle")]
pub(super) mod oracle;
mod plan;
mod vcpu;
mod vm;

use std::sync::Arc;

use self::cpus::Cpus;
use self::frames::FreePages;
pub(super) use self::vcpu::Vcpu;
use self::vm::VmCore;
use super::el2::{Books, Bytes, El2, IncidentCounts, KernelOutcome, PIECE, Pages, Signal, State};
use super::incidents::IncidentStat;
use super::kernel::Calls;
use super::monitor::{Given, Guest, Monitor};
use super::raw_host::{RawOutcome, RawPath};
use super::vm::Book;
use crate::addr::{ByteSize, Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::index;
use crate::state::Visibility;
use crate::sync::Mutex;

pub use super::el2::Profile;

/// EL2 of a simulated machine, and the kernel of its host.
///
/// Lock order: the state of a VM, its vCPUs, a CPU or the kernel's pages, then EL2's own.
#[derive(Debug)]
pub(super) struct Machine {
    profile: Profile,
    arena: Arc<Arena>,
    el2: El2,
    cpus: Cpus,
    kernel: Mutex<FreePages>,
}

impl Machine {
    /// # Errors
    /// `ENOMEM`.
    pub(super) fn boot(profile: Profile, arena: &Arc<Arena>) -> Result<Arc<Self>, Errno> {
        let arena = Arc::clone(arena);
        let cpus = Cpus::new();
        let (el2, kernel) = frames::boot(profile, &arena, cpus.nr())?;
        Ok(Arc::new(Self { profile, arena, el2, cpus, kernel: Mutex::new(kernel) }))
    }

    /// What guests have or see of the pool: some frames are looked at, then told of with no lock held.
    fn each_state_of_guests(&self, mut see: impl FnMut(Pfn, State)) {
        let end = Pfn::new(self.arena.nr_pages());
        let mut found = Vec::with_capacity(index(PIECE));
        let mut next = Some(Pfn::new(0));
        while let Some(from) = next {
            next = self.el2.frames_of_guests(from, end, &mut found);
            found.drain(..).for_each(|(pfn, state)| see(pfn, state));
        }
    }

    /// Does what a kernel does, with its own pages.
    fn with_kernel<T>(&self, act: impl FnOnce(&mut Calls<'_, FreePages>) -> T) -> T {
        let mut pages = self.kernel.lock();
        // Calls of which EL2 does not ask on which CPU they come.
        act(&mut Calls { el2: &self.el2, cpu: 0, pages: &mut pages })
    }
}

impl Monitor for Machine {
    fn create_guest(self: Arc<Self>, book: &Arc<Book>) -> Result<Arc<dyn Guest>, Errno> {
        let core: Arc<dyn Guest> = VmCore::new(self, book)?;
        Ok(core)
    }

    fn given(&self) -> Given {
        let (mut donated, mut borrowed, mut shown) = (0, 0, 0);
        self.each_state_of_guests(|_, state| match state {
            State::SharedBorrowed => borrowed += 1,
            State::SharedOwned => shown += 1,
            _ => donated += 1,
        });
        let [donated, borrowed, shown] = [donated, borrowed, shown].map(ByteSize::from_pages);
        Given { donated, borrowed, shown }
    }

    fn each_frame_of_guests(&self, see: &mut dyn FnMut(Pfn, Visibility)) {
        self.each_state_of_guests(|pfn, state| match state {
            State::NoPage => see(pfn, Visibility::Private),
            _ => see(pfn, Visibility::Shared),
        });
    }

    fn check(&self, borrowed: Vec<Pfn>) -> Vec<String> {
        let books = Books { borrowed, ..Books::default() };
        // What guests were given is compared with the objects, and accidents are counted: `incidents`.
        let mut wrong = self.el2.check();
        wrong.extend(self.el2.check_books(&books, &["31", "40"]));
        wrong
    }

    fn incidents(&self) -> IncidentStat {
        let IncidentCounts { nr_oopses, nr_stuck, nr_destroyed, nr_orphaned, nr_dma_into_private } =
            self.el2.incidents.counts();
        IncidentStat {
            nr_oopses,
            nr_destroyed,
            nr_stuck,
            nr_orphaned,
            nr_dma_into_private,
            ..IncidentStat::default()
        }
    }

    fn touch(&self, by: RawPath, at: Pa, bytes: Bytes<'_>) -> RawOutcome {
        /// None of these asks on which CPU it happens but for what that one remembers.
        const CPU: usize = 0;
        match by {
            RawPath::User => match self.el2.user(CPU, at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(Signal::SegvAccerr) => RawOutcome::Sigsegv,
                Err(Signal::Bus) => RawOutcome::Sigbus,
            },
            RawPath::Uaccess => match self.el2.uaccess(CPU, at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(_) => RawOutcome::Efault,
            },
            RawPath::KernelAlias => match self.el2.kernel_alias(CPU, at, bytes) {
                KernelOutcome::Done => RawOutcome::Done,
                KernelOutcome::DoneAfterReclaim => RawOutcome::Destroyed,
                KernelOutcome::Oops => RawOutcome::Oops,
                KernelOutcome::Stuck => RawOutcome::Stuck,
            },
            RawPath::Dma => match self.dma(at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(_) => RawOutcome::DmaFault,
            },
        }
    }
}

impl Machine {
    /// A driver maps what its device is to reach, where the IOMMU wants to be told.
    fn dma(&self, at: Pa, bytes: Bytes<'_>) -> Result<(), Errno> {
        if !self.profile.is_android() {
            return self.el2.dma(at, bytes);
        }
        let page = Pages::one(at.pfn());
        self.el2.map_dma(page)?;
        let done = self.el2.dma(at, bytes);
        self.el2.unmap_dma(page)?;
        done
    }
}

#[cfg(test)]
mod tests;
