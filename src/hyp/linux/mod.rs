//! A host kernel and one process of it, in small: as much as a VMM on pKVM can see.
//!
//! EL2 answers hypercalls; what a VMM sees are errnos of system calls, signals, the result of `KVM_RUN`, bytes, and
//! how much memory is locked. In between is the host's kernel: page tables and page caches, pins, KVM. This is that kernel, in
//! the plainest way. It is single-threaded, trusted by nobody, and there to be compared with a real one.
//!
//! | file | one idea |
//! |---|---|
//! | `frames` | which frames the kernel has given to whom |
//! | `memory` | what a process has mapped, and the frame behind a page of it |
//! | `reach` | the ways in which the host reaches for a byte of it |
//! | `kvm` | VMs, memslots, vCPUs, and their end |
//! | `fault` | how a guest's fault is resolved, and how a guest loses what the host drops |
//! | `run` | what the guest does, and how `KVM_RUN` ends |
//! | `smccc` | calls that KVM answers itself |

mod fault;
mod frames;
mod kvm;
mod memory;
mod reach;
mod run;
mod smccc;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use slab::Slab;

use self::frames::Frames;
use self::kvm::{Vcpu, Vm};
use self::memory::Memory;
use super::el2::{Books, El2, GuestPage, Profile};
use crate::addr::Gfn;
use crate::error::Errno;

pub use self::kvm::{Slot, SlotAccess, SlotLog, VcpuId, VcpuNumber, VmId, VmKind};
pub use self::memory::{Backing, MemoryId, PageKind, Place};
pub use self::reach::{Alias, Raised, UserSignal};
pub use self::run::{GuestAct, Ran};

/// Where each VM's own program is, and its memslot. It is what the guest runs all the time.
pub const PROGRAM: crate::addr::Ipa = crate::addr::Ipa::new(0x1000_0000);

/// The machine: EL2, the kernel, and the VMM's process.
#[derive(Debug)]
pub struct Linux {
    el2: El2,
    frames: Frames,
    memories: Slab<Memory>,
    vms: Slab<Vm>,
    vcpus: Slab<Vcpu>,
    locked: Locked,
}

/// `RLIMIT_MEMLOCK`, and what counts against it.
#[derive(Debug)]
struct Locked {
    nr_pages: u64,
    limit_pages: u64,
}

impl Locked {
    fn charge(&mut self) -> Result<(), Errno> {
        if self.nr_pages >= self.limit_pages {
            return Err(Errno::ENOMEM);
        }
        self.nr_pages += 1;
        Ok(())
    }

    fn uncharge(&mut self) {
        self.nr_pages -= 1;
    }
}

/// The CPU on which all of this happens.
const CPU: usize = 0;

impl Linux {
    /// A machine with some memory, booted.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn boot() -> Result<Self, Errno> {
        let (el2, frames) = frames::boot(Profile::Mainline72)?;
        Ok(Self {
            el2,
            frames,
            memories: Slab::new(),
            vms: Slab::new(),
            vcpus: Slab::new(),
            locked: Locked { nr_pages: 0, limit_pages: u64::MAX },
        })
    }

    /// `setrlimit(RLIMIT_MEMLOCK)`, of so many pages, by a process without `CAP_IPC_LOCK`.
    pub fn limit_locked(&mut self, nr_pages: u64) {
        self.locked.limit_pages = nr_pages;
    }

    /// `VmLck` of the process, in pages.
    pub fn locked_pages(&self) -> u64 {
        self.locked.nr_pages
    }

    /// Everything that is wrong between host, EL2 and guests; empty if all is well.
    pub fn check(&self) -> Vec<String> {
        let mut wrong = self.el2.check();
        wrong.extend(self.el2.check_books(&self.books(), &["28", "31"]));
        wrong
    }

    fn books(&self) -> Books {
        let mut given = BTreeMap::new();
        let protected = self.vms.iter().filter(|(_, vm)| vm.kind == VmKind::Protected);
        for (_, vm) in protected {
            let handle = vm.handle().and_then(|handle| u16::try_from(handle).ok());
            let Some(handle) = handle else { continue };
            for (&gfn, mapped) in &vm.mapped {
                given.insert(GuestPage { handle, gfn: Gfn::new(gfn) }, mapped.pfn);
            }
        }
        // What the process locks itself counts as well.
        let vmas = self.memories.iter().flat_map(|(_, memory)| memory.vmas.iter().flatten());
        let nr_mlocked = vmas.filter(|vma| vma.is_locked).count() as u64;
        Books {
            given,
            pins: Some(self.frames.pins()),
            nr_locked: Some(self.locked.nr_pages - nr_mlocked),
            borrowed: Vec::new(),
        }
    }
}
