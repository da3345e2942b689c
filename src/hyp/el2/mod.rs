//! EL2 of a simulated pKVM: raw hypercalls in, an errno out. It knows frames, not objects, and trusts nobody.
//!
//! | file | one idea |
//! |---|---|
//! | `machine` | what is memory, and the bytes behind frames |
//! | `host_struct` | what the host's kernel says in structures that EL2 reads |
//! | `hyp_page` | eight bytes for each frame |
//! | `host_mmu` | the host's stage 2, and who has what the host has not |
//! | `hyp_space` | what EL2 maps for itself |
//! | `guest_mmu` | a guest's stage 2 |
//! | `vm` | VMs and their life, vCPUs, who is loaded where |
//! | `teardown` | the end of a VM |
//! | `memcache` | pages that the host gives for a guest's tables |
//! | `transition` | the ways between states: all checks, in order, then changes that cannot fail |
//! | `host_call` | the host's hypercalls, by number and raw arguments |
//! | `guest_call` | the guest's |
//! | `on_cpu` | which CPU calls |
//! | `access` | who touches bytes, and what becomes of that |
//! | `look` | what the host's kernel sees of all that without changing it |
//! | `stretch` | for tests: over how many pages a lock was held |
//! | `tlb` | translations that are remembered |
//! | `guest_tlb` | a vCPU's accesses by what it remembers, without its CPU |
//! | `firmware` | what a guest may find in its memory when it starts |
//! | `profile` | which version this is |
//! | `spec` | the states again, in the plainest way |
//! | `invariants` | what must hold, by name |
//! | `by_hand` | what hosts that are written for tests and benches have |
//! | `el2_only` | for benches: a machine of any size without bytes |
//! | `hostile` | for tests and fuzzers: a host and guests that do anything |
//! | `modelled` | a small machine, for the loom models |
//! | `guest_only` | a guest that loads, for benches |
//! | `incident` | times when a real host would have crashed |
//!
//! Locks are taken in this order: a CPU's own, the VMs' table, the host's, then EL2's or one guest's.

mod access;
#[cfg(any(test, feature = "oracle"))]
mod by_hand;
#[cfg(feature = "oracle")]
pub mod el2_only;
mod firmware;
mod guest_call;
mod guest_mmu;
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub mod guest_only;
mod guest_tlb;
mod host_call;
mod host_mmu;
mod host_struct;
#[cfg(any(test, feature = "oracle"))]
pub(crate) mod hostile;
mod hyp_page;
mod hyp_space;
mod incident;
mod invariants;
mod look;
mod machine;
mod memcache;
#[cfg(all(loom, feature = "loom"))]
#[doc(hidden)]
pub mod modelled;
mod on_cpu;
mod profile;
mod spec;
pub(crate) mod stretch;
mod teardown;
#[cfg(test)]
mod tests;
mod tlb;
mod transition;
mod vm;

pub(crate) use access::{Bytes, GuestStop, KernelOutcome, Signal};
pub(crate) use guest_call::GuestAnswer;
pub(crate) use guest_tlb::GuestTlb;
pub(crate) use host_call::HostCall;
pub(crate) use incident::IncidentCounts;
pub(crate) use invariants::Books;
pub(crate) use look::{GuestLook, Look, Mapped, PIECE};
#[cfg(feature = "oracle")]
pub(crate) use machine::FrameBytes;
pub(crate) use machine::{Machine, Region, RegionKind};
pub use profile::Profile;

/// Pages for tables that a vCPU must have at hand, whether it needs them or not.
pub(crate) const MIN_MEMCACHE: u64 = guest_mmu::GuestMmu::MIN_MEMCACHE as u64;

#[cfg(test)]
pub(crate) use vm::MAX_VMS;
#[cfg(feature = "oracle")]
pub(crate) use vm::{Fault, FaultKind};
pub(crate) use vm::{Vm, nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::stage2::{Level, PageState};
use crate::sync::{Arc, SpinGuard, SpinMutex as Mutex};

use host_mmu::{FramePool, HostMmu, Owner};
use hyp_space::HypSpace;
use incident::Incidents;
use transition::Ffa;
use vm::{Cpu, VmTable};

/// Whose a page is, as one party sees it. The values are pKVM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum State {
    /// Its own.
    Owned = 0,
    /// Its own, and somebody else sees it.
    SharedOwned = 1,
    /// Somebody else's, who shows it.
    SharedBorrowed = 2,
    /// Not its own, and not shown.
    NoPage = 3,
    /// Was a guest's own, and was destroyed. Told from its table; never in a record.
    Poison = 4,
}

impl State {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Owned,
            1 => Self::SharedOwned,
            2 => Self::SharedBorrowed,
            _ => Self::NoPage,
        }
    }
}

impl From<PageState> for State {
    fn from(state: PageState) -> Self {
        match state {
            PageState::Owned => Self::Owned,
            PageState::SharedOwned => Self::SharedOwned,
            PageState::SharedBorrowed => Self::SharedBorrowed,
        }
    }
}

/// A page of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct GuestPage {
    pub(crate) handle: u16,
    pub(crate) gfn: Gfn,
}

impl GuestPage {
    /// The page that lies so many further on.
    const fn after(self, nr: u64) -> Self {
        Self { handle: self.handle, gfn: Gfn::new(self.gfn.get() + nr) }
    }
}

/// Consecutive frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    start: Pfn,
    nr: u64,
}

impl Pages {
    /// Frame numbers have 52 bits, and counts are checked against what addresses reach.
    pub(crate) const fn new(start: Pfn, nr: u64) -> Self {
        Self { start, nr }
    }

    pub(crate) const fn one(pfn: Pfn) -> Self {
        Self::new(pfn, 1)
    }

    /// Frames that addresses reach.
    ///
    /// # Errors
    /// `EINVAL` for others.
    fn checked(pfn: u64, nr: u64) -> Result<Self, Errno> {
        let limit = HostMmu::LIMIT.get();
        match pfn < limit && limit - pfn >= nr {
            true => Ok(Self::new(Pfn::new(pfn), nr)),
            false => Err(Errno::EINVAL),
        }
    }

    const fn start(self) -> Pfn {
        self.start
    }

    const fn nr(self) -> u64 {
        self.nr
    }

    /// One past the last; `None` if that is no frame.
    fn end(self) -> Option<Pfn> {
        self.start.checked_add(self.nr)
    }

    fn iter(self) -> impl Iterator<Item = Pfn> + use<> {
        (self.start.get()..self.start.get().saturating_add(self.nr)).map(Pfn::new)
    }

    fn contains(self, pfn: Pfn) -> bool {
        pfn.get().wrapping_sub(self.start.get()) < self.nr
    }

    fn split_first(&mut self) -> Option<Pfn> {
        let first = self.start;
        self.nr = self.nr.checked_sub(1)?;
        self.start = first.checked_add(1)?;
        Some(first)
    }
}

/// The hypervisor.
#[derive(Debug)]
pub(crate) struct El2 {
    profile: Profile,
    machine: Arc<Machine>,
    cpus: Box<[Mutex<Cpu>]>,
    vms: Mutex<VmTable>,
    host: Mutex<HostMmu>,
    hyp: Mutex<HypSpace>,
    /// What the secure world holds; guarded by its own lock, taken before the host's.
    ffa: Mutex<Ffa>,
    /// Frames that EL2 set aside for itself.
    carveout: Pages,
    pub(crate) incidents: Incidents,
}

impl El2 {
    /// Boots on a machine: the carve-out is EL2's, everything else the host's.
    ///
    /// # Errors
    /// `EINVAL` or `EPERM` for a carve-out that is not memory, `ENOMEM` for one too small for the tables that it
    /// takes to say so.
    pub(crate) fn boot(
        profile: Profile,
        machine: Machine,
        carveout: Pages,
        nr_cpus: usize,
    ) -> Result<Self, Errno> {
        machine.check_allowed(carveout.start(), carveout.nr())?;
        let machine = Arc::new(machine);
        let pool = FramePool::new(carveout);
        let mut host = HostMmu::new(Arc::clone(&machine), pool, nr_cpus)?;
        host.keeps_siblings = profile.keeps_siblings();
        if profile.prefaults() {
            host.prefault()?;
        }
        host.give(carveout, Owner::Hyp, Level::PAGE)?;
        host.pages.set_hyp(carveout, State::Owned);
        let mut hyp = HypSpace::new(machine.end());
        hyp.map(carveout);
        for pfn in carveout.iter() {
            host.spec.step(pfn, spec::SpecPage::Hyp);
        }
        Ok(Self {
            profile,
            machine,
            cpus: (0..nr_cpus).map(|_| Mutex::new(Cpu::default())).collect(),
            vms: Mutex::new(VmTable::default()),
            host: Mutex::new(host),
            hyp: Mutex::new(hyp),
            ffa: Mutex::new(Ffa::default()),
            carveout,
            incidents: Incidents::default(),
        })
    }

    /// A CPU's own state; `None` for a CPU that the machine has not.
    fn cpu(&self, cpu: usize) -> Option<SpinGuard<'_, Cpu>> {
        Some(self.cpus.get(cpu)?.lock())
    }
}
