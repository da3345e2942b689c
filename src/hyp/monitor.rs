//! What a hypervisor does for the front: as a machine, and for each guest.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use super::el2::Bytes;
use super::incidents::IncidentStat;
use super::raw_host::{RawOutcome, RawPath};
use super::vcpu::Cpu;
use super::vm::{Book, VmStat};
use crate::addr::{ByteSize, Gfn, Pa, Pfn};
use crate::error::Errno;
use crate::range::GfnRange;
use crate::stage2::Stage2;
use crate::state::Visibility;

/// Memory that guests have or see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Given {
    /// What they have to themselves.
    pub(super) donated: ByteSize,
    /// What is theirs, and the host may see.
    pub(super) borrowed: ByteSize,
    /// What is the host's, and they may see.
    pub(super) shown: ByteSize,
}

/// A hypervisor with its machine, whose first frames are the pool's.
pub(super) trait Monitor: Debug + Send + Sync {
    /// Makes a guest. What changes of it under the lock of its state is in the book.
    ///
    /// # Errors
    /// The hypervisor's; `ENOMEM`.
    fn create_guest(self: Arc<Self>, book: &Arc<Book>) -> Result<Arc<dyn Guest>, Errno>;

    /// What is given away. Counted a piece at a time: what changes hands meanwhile may count as before or after.
    fn given(&self) -> Given;

    /// Tells of the frames that guests see, each once: private to one, or seen by the host as well.
    fn each_frame_of_guests(&self, see: &mut dyn FnMut(Pfn, Visibility));

    /// Everything that is wrong, while the host may reach some frames of guests at any moment.
    fn check(&self, borrowed: Vec<Pfn>) -> Vec<String>;

    /// What hosts that ask nobody have brought about.
    fn incidents(&self) -> IncidentStat;

    /// A host that asks nobody touches bytes of one page.
    fn touch(&self, by: RawPath, at: Pa, bytes: Bytes<'_>) -> RawOutcome;
}

/// What a guest has at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Has {
    /// Nothing yet.
    Nothing,
    /// The page, to itself.
    Own,
    /// The page, together with the host.
    Shared,
    /// Nothing, and there will be nothing.
    Never,
}

/// A guest, as its hypervisor has it; objects ask it as [`Stage2`].
///
/// The calls about its life come with the state of its book locked for writing, but for `reclaim_all`, which may be about
/// much memory and locks it now and then.
pub(super) trait Guest: Stage2 {
    /// For tests, which know what it is.
    #[cfg(test)]
    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync>;

    /// What an object holds of it.
    fn stage2(self: Arc<Self>) -> Weak<dyn Stage2>;

    /// The vCPU of that number, which nobody else has.
    ///
    /// # Errors
    /// The hypervisor's; `ENOMEM`.
    fn create_vcpu(self: Arc<Self>, index: usize) -> Result<Cpu, Errno>;

    /// A vCPU is gone, and its number will be another's. Comes with no lock held.
    fn forget_vcpu(&self, index: usize);

    /// What it has at a page.
    fn has(&self, gfn: Gfn) -> Has;

    /// Of how many pages at the beginning of a range it has this.
    fn nr_having(&self, gfns: GfnRange, what: Has) -> u64;

    /// What it has in all. Counted a piece at a time.
    fn stat(&self) -> VmStat;

    /// Nothing is given to it from here on.
    ///
    /// # Errors
    /// The hypervisor's. Then it lives on.
    fn start_teardown(&self) -> Result<(), Errno>;

    /// Takes every page back.
    ///
    /// # Errors
    /// The first one's. The others are back.
    fn reclaim_all(&self) -> Result<(), Errno>;

    /// It is gone.
    ///
    /// # Errors
    /// The hypervisor's: then it keeps what it has.
    fn finish(&self) -> Result<(), Errno>;
}
