//! pKVM: the host starts with all memory and gives it away; EL2 keeps the account.
//!
//! A [`Hypervisor`] is EL2 of one simulated machine, whose memory is one [`FolioPool`], and as much of a host
//! kernel as it takes to have VMs there. EL2 is a pKVM down to the bits (`hyp/el2`); everything here asks it by the
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
//! # Protected guests
//! A guest by [`create_vm`](Hypervisor::create_vm) has its memory to itself. It is given a page when it touches it, or
//! by a conversion to private, and keeps it until it is torn down.
//!
//! # Guests that are not
//! A guest by [`create_non_protected_vm`](Hypervisor::create_non_protected_vm) is shown the host's pages, by 2 MiB
//! where a huge folio allows that. They stay the host's: they can be punched, moved and unbound, and the guest loses
//! them and faults again. A page that is private in the object is nobody's to such a guest: its access exits with
//! [`MemoryFault`](crate::hyp::Exit::MemoryFault), and no page that it has bound turns private. An object whose pages
//! are private at first may be bound; they fault until somebody converts them to shared.
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
mod incidents;
mod memslot;
mod plan;
mod raw_host;
mod vm;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use self::cpus::Cpus;
pub(super) use self::cpus::LastCpu;
use self::frames::FreePages;
pub use self::incidents::IncidentStat;
use self::incidents::PreventedCounts;
pub use self::memslot::MemslotId;
pub(super) use self::memslot::SlotPage;
pub use self::raw_host::{RawHost, RawOutcome, RawPath};
pub(super) use self::vm::{Lease, Request, VmCore};
pub use self::vm::{Vm, VmKind, VmStat};
use super::el2::{Books, El2, MAX_VMS, PIECE, State};
use super::kernel::Calls;
use crate::addr::{ByteSize, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::folio::{Claim, FolioPool};
use crate::geometry::index;
use crate::state::Visibility;
use crate::sync::Mutex;

pub use super::el2::Profile;

/// EL2 of a simulated machine, and the kernel of its host. Clones are handles to the same one.
///
/// All guests whose memory comes from one pool run under one hypervisor: another one would not know
/// which frames are given away, and is refused.
#[derive(Clone, Debug)]
pub struct Hypervisor(Arc<Host>);

/// Lock order: the VMs, the state of one, a CPU or the kernel's pages, then EL2's own. None of them is held while an
/// object is called.
#[derive(Debug)]
struct Host {
    profile: Profile,
    arena: Arc<Arena>,
    el2: El2,
    cpus: Cpus,
    kernel: Mutex<FreePages>,
    vms: Mutex<BTreeMap<u64, Weak<VmCore>>>,
    prevented: PreventedCounts,
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
    /// Memory of the host that guests may see.
    pub shown: ByteSize,
    /// Virtual machines that are not torn down.
    pub nr_vms: usize,
}

impl Hypervisor {
    /// EL2 of a machine whose memory is this pool, as mainline has it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] while the pool has a hypervisor already; [`ErrorKind::Exhausted`].
    pub fn new(pool: &FolioPool) -> Result<Self, Error> {
        Self::with_profile(pool, Profile::default())
    }

    /// The same as another version has it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_profile(pool: &FolioPool, profile: Profile) -> Result<Self, Error> {
        let claim = pool.claim().ok_or_else(|| {
            Error::new(Op::Hypervisor, ErrorKind::Exists).because("the pool has one already")
        })?;
        let arena = Arc::clone(pool.arena());
        let cpus = Cpus::new();
        let (el2, kernel) = frames::boot(profile, &arena, cpus.nr()).map_err(refused)?;
        Ok(Self(Arc::new(Host {
            profile,
            arena,
            el2,
            cpus,
            kernel: Mutex::new(kernel),
            vms: Mutex::new(BTreeMap::new()),
            prevented: PreventedCounts::default(),
            _claim: claim,
        })))
    }

    /// Which version it is.
    pub fn profile(&self) -> Profile {
        self.0.profile
    }

    /// A protected guest, with no memory and no vCPU, and 40 bits of address.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] beyond 255 guests, or without memory for it.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        self.create(VmKind::Protected)
    }

    /// A guest that is not protected: its memory stays the host's, which shows it to the guest.
    ///
    /// # Errors
    /// As [`create_vm`](Self::create_vm).
    pub fn create_non_protected_vm(&self) -> Result<Vm, Error> {
        self.create(VmKind::NonProtected)
    }

    fn create(&self, kind: VmKind) -> Result<Vm, Error> {
        let mut vms = self.0.vms.lock();
        if vms.len() >= MAX_VMS {
            return Err(Error::new(Op::Hypervisor, ErrorKind::Exhausted)
                .because("too many virtual machines"));
        }
        let core = VmCore::new(Arc::clone(&self.0), kind).map_err(refused)?;
        vms.insert(core.handle(), Arc::downgrade(&core));
        Ok(Vm::of(core))
    }

    /// The frames that guests see, ascending: private to one, or seen by the host as well. What an audit compares
    /// with the objects.
    pub(crate) fn each_frame_of_guests(&self, mut see: impl FnMut(Pfn, Visibility)) {
        self.0.each_frame_of_guests(|pfn, state| match state {
            State::NoPage => see(pfn, Visibility::Private),
            _ => see(pfn, Visibility::Shared),
        });
    }

    /// Everything that is wrong at EL2, of whose frames the host may reach some at any moment; empty if all is well.
    /// Everybody waits meanwhile.
    pub(crate) fn check_invariants(&self, borrowed: Vec<Pfn>) -> Vec<String> {
        let books = Books { borrowed, ..Books::default() };
        // What guests were given is compared with the objects, and accidents are counted: `incidents`.
        let mut wrong = self.0.el2.check();
        wrong.extend(self.0.el2.check_books(&books, &["31", "40"]));
        wrong
    }

    /// What is given away. Counted a piece at a time: what changes hands meanwhile may count as before or after.
    pub fn stat(&self) -> HostStat {
        let nr_vms = self.0.vms.lock().len();
        let (mut donated, mut borrowed, mut shown) = (0, 0, 0);
        self.0.each_frame_of_guests(|_, state| match state {
            State::SharedBorrowed => borrowed += 1,
            State::SharedOwned => shown += 1,
            _ => donated += 1,
        });
        let [donated, borrowed, shown] = [donated, borrowed, shown].map(ByteSize::from_pages);
        HostStat { donated, borrowed, shown, nr_vms }
    }

    /// How often a real host would have crashed or lost something, and how often it was kept from that.
    pub fn incidents(&self) -> IncidentStat {
        IncidentStat::new(self.0.el2.incidents.counts(), &self.0.prevented)
    }

    /// The host as it is without this library: it touches the bytes of an object by itself.
    pub fn raw_host(&self) -> RawHost {
        RawHost(self.clone())
    }
}

impl Host {
    /// What guests have or see of the pool: some frames are looked at, then told of with no lock held.
    fn each_frame_of_guests(&self, mut see: impl FnMut(Pfn, State)) {
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

    /// A machine is gone. Its handle may be another's already.
    fn forget(&self, core: &VmCore) {
        let mut vms = self.vms.lock();
        let is_it = |weak: &Weak<VmCore>| std::ptr::eq(weak.as_ptr(), core);
        if vms.get(&core.handle()).is_some_and(is_it) {
            vms.remove(&core.handle());
        }
    }
}

/// What EL2 refuses by itself.
fn refused(errno: Errno) -> Error {
    let kind = match errno {
        Errno::ENOMEM => ErrorKind::Exhausted,
        _ => ErrorKind::HypervisorRefused,
    };
    Error::new(Op::Hypervisor, kind).errno_is(errno)
}

#[cfg(test)]
mod tests;
