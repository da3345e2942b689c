//! A process of the host's that is a VMM, and as much of the kernel as it sees: mappings, the seventeenth version's
//! guest_memfd, its bindings to VMs, faults of both sides. In the plainest way, and with one thread.
//!
//! | file | one idea |
//! |---|---|
//! | `memory` | files and plain memory, and the folios behind pages |
//! | `paging` | bindings, and what a VM's fault becomes |
//! | `reach` | the ways in which the host reaches for a byte |

mod memory;
mod paging;
mod reach;

use std::sync::Arc;

use self::memory::Memory;
use self::paging::Binding;
use super::{Guest, Vmid};
use crate::addr::Pfn;
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::hyp::gunyah::Gunyah;

pub(crate) use self::memory::{Kind, MemoryId, Place};
pub(crate) use self::paging::{Bind, Ran, Span, VmId};
pub(crate) use self::reach::{Pointer, Touched};

/// Two blocks for huge folios, and pages.
const NR_BLOCKS: u64 = 2;
const NR_PAGES: u64 = 3 * HUGE_PAGES;

/// A VM of the process's.
#[derive(Debug)]
struct Vm {
    guest: Guest,
    bindings: Vec<Binding>,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) gunyah: Arc<Gunyah>,
    blocks: Vec<Pfn>,
    pages: Vec<Pfn>,
    memories: Vec<Memory>,
    vms: Vec<Vm>,
}

impl Process {
    pub(crate) fn boot() -> Self {
        let arena = Arena::heap(NR_PAGES).unwrap();
        let gunyah = Arc::new(Gunyah::on_arena(&arena).unwrap());
        let start = NR_BLOCKS * HUGE_PAGES;
        Self {
            gunyah,
            blocks: (0..NR_BLOCKS).rev().map(|nth| Pfn::new(nth * HUGE_PAGES)).collect(),
            pages: (start..NR_PAGES).rev().map(Pfn::new).collect(),
            memories: Vec::new(),
            vms: Vec::new(),
        }
    }

    /// A VM that runs.
    pub(crate) fn vm(&mut self) -> Result<VmId, Errno> {
        let guest = Guest::create(&self.gunyah)?;
        self.vms.push(Vm { guest, bindings: Vec::new() });
        Ok(VmId(self.vms.len() - 1))
    }

    pub(crate) fn vmid(&self, vm: VmId) -> Option<Vmid> {
        self.vms[vm.0].guest.vmid()
    }

    pub(crate) fn guest(&mut self, vm: VmId) -> &mut Guest {
        &mut self.vms[vm.0].guest
    }

    /// Everything that is wrong.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut wrong = self.gunyah.check();
        wrong.extend(self.vms.iter().flat_map(|vm| vm.guest.check()));
        wrong
    }
}
