//! Structures of the host's kernel that EL2 reads, and believes nothing of.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;

use crate::geometry::PAGE_BYTES;
use crate::sync::{AtomicU64, SpinGuard, SpinMutex};

/// Pages or a block that the host lists for a guest: `struct kvm_hyp_pinned_page`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListedPages {
    pub(crate) pfn: u64,
    pub(crate) gfn: u64,
    pub(crate) order: u8,
}

impl ListedPages {
    /// As many as the one page has room for that host and EL2 share for lists.
    pub(crate) const MOST: usize = PAGE_BYTES / 24;
}

/// A structure of the host's kernel that EL2 reads where the host says it is. EL2 believes none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostStruct {
    /// `kvm.arch.pkvm.handle`.
    pub(crate) handle: u64,
    /// `kvm.created_vcpus`.
    pub(crate) nr_vcpus: u64,
    /// Whether the VM is to be protected.
    pub(crate) protected: bool,
    /// `kvm.arch.pkvm.pvmfw_load_addr`, if it is to have a firmware.
    pub(crate) firmware_at: Option<u64>,
    /// A vCPU's list of pages for its guest.
    pub(crate) listed: Vec<ListedPages>,
    /// `vcpu.vcpu_idx`.
    pub(crate) vcpu_idx: u64,
    /// A vCPU's `memcache.nr_pages`, as claimed.
    pub(crate) nr_memcache: u64,
    /// The chain of pages in it, by physical address, last first.
    pub(crate) memcache: Vec<u64>,
    /// Pages that EL2 gave back when the VM was torn down.
    pub(crate) returned: Vec<u64>,
}

/// One of them, for the host and EL2 to read and change.
#[derive(Debug)]
pub(crate) struct SharedStruct {
    said: SpinMutex<HostStruct>,
    /// `nr_memcache`, which EL2 reads in every call that may need a table.
    nr_memcache: AtomicU64,
}

impl Default for SharedStruct {
    fn default() -> Self {
        let said = SpinMutex::new(HostStruct::default());
        Self { said, nr_memcache: AtomicU64::new(0) }
    }
}

impl SharedStruct {
    pub(crate) fn lock(&self) -> Said<'_> {
        Said { said: self.said.lock(), claim: &self.nr_memcache }
    }

    /// What the host claims its list to have, as it was when somebody last had the lock.
    #[inline]
    pub(crate) fn nr_memcache(&self) -> u64 {
        // Relaxed: a claim, which the host may change at any time. The list itself is read under the lock.
        self.nr_memcache.load(Ordering::Relaxed)
    }
}

/// A structure, locked.
#[derive(Debug)]
pub(crate) struct Said<'a> {
    said: SpinGuard<'a, HostStruct>,
    claim: &'a AtomicU64,
}

impl Deref for Said<'_> {
    type Target = HostStruct;

    fn deref(&self) -> &HostStruct {
        &self.said
    }
}

impl DerefMut for Said<'_> {
    fn deref_mut(&mut self) -> &mut HostStruct {
        &mut self.said
    }
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        // Relaxed: as for the load; the lock is still held, so stores keep their order.
        self.claim.store(self.said.nr_memcache, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_seen_when_the_lock_is_dropped() {
        let shared = SharedStruct::default();
        let mut said = shared.lock();
        said.nr_memcache = 7;
        assert_eq!(shared.nr_memcache(), 0);
        drop(said);
        assert_eq!(shared.nr_memcache(), 7);
    }
}
