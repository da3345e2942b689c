//! A simulated Gunyah: ownership moves between extents, mappings follow ownership, and a resource manager brokers.
//!
//! Behind a [`Hypervisor`](super::Hypervisor) of this model is such a machine, whose memory is one
//! [`FolioPool`](crate::FolioPool), and a host's kernel that provides memory of its guests when they touch it. A protected
//! guest has what is private to itself: it is lent. What is shared it has together with the host: [`SharedMemory`] says
//! how that comes about. The host may take memory back at any time. What a guest had to itself is cleared then,
//! unless the guest has asked for the page to be shared.
//!
//! A host that touches what is lent, by itself, gets `SIGBUS` or `EFAULT`, or its kernel dies. Nothing is destroyed.
//!
//! # How it is made
//! | file | one idea |
//! |---|---|
//! | `machine` | what is memory, and the bytes behind frames |
//! | `memdb` | who owns each frame |
//! | `aspace` | address spaces: stage 2, blocks, and taking changes back |
//! | `extent` | extents: what is mapped where, and how memory changes hands |
//! | `attrs` | rights, and kinds of memory |
//! | `cspace` | capabilities |
//! | `hypercall` | the hypervisor's calls, by number and raw registers |
//! | `hyp` | its objects in one place |
//! | `rm` | the resource manager: parcels and VMs |
//! | `host` | the host's kernel: memory of VMs on demand |
//! | `front` | a VMM's way to all this |
//! | `touch` | who touches bytes, and what becomes of that |
//! | `vmmio` | addresses that a VM leaves to its VMM, and what stops a vCPU |
//! | `spec` | owners and mappings again, in the plainest way |
//! | `invariants` | what must hold, by name |
//! | `scenarios` | for tests: files that say what hosts and guests do, and what that shows |
//! | `hostile` | for tests and fuzzers: VMs that do anything |
//! | `oracle` | that, as the fuzzer sees it |
//! | `error` | both parts' answers |
//!
//! There is one lock. Who translates holds it for reading until the last byte is copied, so nobody uses a
//! translation that is gone; who changes something holds it alone.

mod aspace;
mod attrs;
mod cspace;
mod error;
mod extent;
mod front;
pub(crate) mod host;
#[cfg(any(test, feature = "oracle"))]
mod hostile;
mod hyp;
mod hypercall;
mod invariants;
mod machine;
mod memdb;
#[cfg(feature = "oracle")]
pub(crate) mod oracle;
mod rm;
#[cfg(test)]
mod scenarios;
mod spec;
#[cfg(test)]
mod tests;
mod touch;
mod vmmio;

use std::sync::Arc;

use aspace::{BbmLevel, Purse};
use error::HypError;
use host::kernel::Kernel;
use hyp::Hyp;
use machine::Machine;
use rm::message::Notification;
use rm::{Fate, Reply, Rm, Vmid};

use crate::sync::RwLock;

pub use front::SharedMemory;
pub(super) use front::{Machine as FrontMachine, Vcpu};

/// Both parts, and the host's kernel.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) hyp: Hyp,
    pub(crate) rm: Rm,
    pub(crate) kernel: Kernel,
}

/// The hypervisor, its resource manager, and the host in the VM that was there first.
#[derive(Debug)]
pub(crate) struct Gunyah {
    world: RwLock<World>,
}

impl Gunyah {
    /// Boots on a machine: the host has all of its memory, and its device.
    ///
    /// # Errors
    /// `NoMem` for a heap that is too small for the host's tables.
    pub(crate) fn boot(machine: Machine, bbm: BbmLevel, fate: Fate) -> Result<Self, HypError> {
        Self::boot_with(machine, bbm, fate, Kernel::default())
    }

    /// The same, for a host that has VMs of its own.
    fn boot_with(
        machine: Machine,
        bbm: BbmLevel,
        fate: Fate,
        kernel: Kernel,
    ) -> Result<Self, HypError> {
        let mut hyp = Hyp::boot(Arc::new(machine), bbm)?;
        let rm = Rm::boot(&mut hyp, fate)?;
        Ok(Self { world: RwLock::new(World { hyp, rm, kernel }) })
    }

    /// A message from a VM to the resource manager, and what it answers.
    pub(crate) fn message(&self, from: Vmid, id: u32, body: &[u8]) -> Reply {
        self.with(|world| world.rm.request(&mut world.hyp, from, id, body))
    }

    /// What the resource manager told a VM, the oldest first.
    pub(crate) fn hear(&self, vmid: Vmid) -> Option<Notification> {
        self.with(|world| world.rm.vms.get_mut(&vmid)?.hear())
    }

    /// Changes something, alone.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        change(&mut self.world.write())
    }

    /// Makes one step of an operation that has frames for tables to itself.
    fn step<T>(&self, purse: &Purse, change: impl FnOnce(&mut World) -> T) -> T {
        self.with(|world| {
            let nr_others = world.hyp.heap.open(purse);
            let answer = change(world);
            world.hyp.heap.close(purse, nr_others);
            answer
        })
    }

    /// Everything that is wrong. Everybody waits meanwhile.
    pub(crate) fn check(&self) -> Vec<String> {
        self.world.read().check()
    }
}
