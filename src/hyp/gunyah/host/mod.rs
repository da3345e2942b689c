//! The host's kernel, as Linux's drivers for this hypervisor have it in their seventeenth version: VMs whose memory
//! is provided folio by folio, when they touch it, and taken back.
//!
//! | file | one idea |
//! |---|---|
//! | `machine` | the machine behind a pool |
//! | `life` | a VM is made, started, stopped and taken apart |
//! | `provide` | memory is lent, shared, turned from one into the other, taken back |
//! | `pieces` | ranges in steps of at most 2 MiB |
//! | `given` | what a guest was given |
//! | `kernel` | what the host itself has of frames: direct map, mappings of user space, pins |
//! | `process` | for tests: a VMM's process, with the kernel's guest_memfd of its time |
//! | `extents_only` | for benches: two VMs' memory changes hands, and who has a frame is looked up |
//! | `calls` | hypercalls with capabilities; messages; errnos |
//!
//! A [`Guest`] is used by one thread at a time. Its operations are all or nothing over all of their ranges, and let go of
//! the hypervisor after every 2 MiB: other VMs run meanwhile. That they can be taken back is sure, since each has frames
//! for tables at hand before it begins.

mod calls;
#[cfg(feature = "oracle")]
pub mod extents_only;
mod given;
pub(super) mod kernel;
mod life;
mod machine;
mod pieces;
#[cfg(test)]
pub(super) mod process;
mod provide;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;

use self::calls::Resources;
use self::given::Book;
use super::Gunyah;
use super::rm::Vmid;

pub(crate) use self::given::Side;
pub(crate) use self::provide::Contents;

/// A VM as the host's kernel has it.
#[derive(Debug)]
pub(crate) struct Guest {
    gunyah: Arc<Gunyah>,
    /// Its number; `None` when it is gone, and the number may be another's.
    vmid: Option<Vmid>,
    resources: Resources,
    book: Book,
}
