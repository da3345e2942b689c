//! Structures of the host's kernel that EL2 reads, and believes nothing of.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;

use super::vm::pages_of;
use super::{El2, Pages, State};
use crate::geometry::PAGE_BYTES;
use crate::sync::{Arc, AtomicU64, SpinGuard, SpinMutex};

/// Pages or a block that the host lists for a guest: `struct kvm_hyp_pinned_page`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListedPages {
    pub(crate) pfn: u64,
    pub(crate) gfn: u64,
    pub(crate) order: u8,
}

impl HostStruct {
    /// How many bytes it takes, about as upstream's.
    pub(crate) const BYTES: u64 = 3 << 10;
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

/// Where the host's structures lie: in pages that it shows to EL2, no two of them in the same bytes. So there are two at
/// most for each page that is shown, and none in a page that is hidden again.
#[derive(Debug)]
pub(crate) struct HostStructs(SpinMutex<ByAddress>);

type ByAddress = BTreeMap<u64, Arc<SharedStruct>>;

/// A page touches no more than so many.
const MOST_TOUCHED: usize = 3;

/// Takes out what lies in these bytes, if only in part.
fn take_touching(structs: &mut ByAddress, at: u64, bytes: u64, gone: &mut Vec<Arc<SharedStruct>>) {
    let bytes = at.saturating_sub(HostStruct::BYTES - 1)..at.saturating_add(bytes);
    while let Some((&at, _)) = structs.range(bytes.clone()).next() {
        gone.extend(structs.remove(&at));
    }
}

impl Default for HostStructs {
    fn default() -> Self {
        Self(SpinMutex::new(BTreeMap::new()))
    }
}

impl HostStructs {
    /// What lies there, if somebody has written there.
    pub(crate) fn get(&self, at: u64) -> Option<Arc<SharedStruct>> {
        self.0.lock().get(&at).map(Arc::clone)
    }

    /// The same; and all zeroes where nobody has. What lay there in part is overwritten.
    pub(crate) fn write(&self, at: u64) -> Arc<SharedStruct> {
        // Made before the lock is taken, and let go of after.
        let new = Arc::default();
        let mut gone = Vec::with_capacity(MOST_TOUCHED);
        let mut structs = self.0.lock();
        if let Some(old) = structs.get(&at) {
            return Arc::clone(old);
        }
        take_touching(&mut structs, at, HostStruct::BYTES, &mut gone);
        structs.insert(at, Arc::clone(&new));
        new
    }

    /// EL2 does not see the page any more.
    pub(super) fn forget(&self, page: Pages) {
        let at = page.start().pa().get();
        let mut gone = Vec::with_capacity(MOST_TOUCHED);
        take_touching(&mut self.0.lock(), at, PAGE_BYTES as u64, &mut gone);
    }

    #[cfg(test)]
    pub(crate) fn nr(&self) -> usize {
        self.0.lock().len()
    }
}

impl El2 {
    /// What the host's kernel has at an address, for it to read and change. What EL2 is not shown it cannot read: there it is
    /// the caller's alone, and kept nowhere.
    pub(crate) fn host_struct(&self, at: u64) -> Arc<SharedStruct> {
        if let Some(said) = self.machine.structs.get(at) {
            return said;
        }
        let pages = pages_of(at, HostStruct::BYTES);
        // Held, so that the page is not hidden in between.
        let host = self.host.lock();
        let shown = host.check_state(pages, State::SharedOwned);
        match shown.and_then(|()| host.check_hyp_state(pages, State::SharedBorrowed)) {
            Ok(()) => self.machine.structs.write(at),
            Err(_) => Arc::default(),
        }
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
