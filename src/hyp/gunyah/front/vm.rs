//! A guest: its life, and what it has.

use std::sync::{Arc, Weak};

use super::Machine;
use super::vcpu::Vcpu;
use crate::addr::{ByteSize, Gfn};
use crate::error::Errno;
use crate::hyp::gunyah::aspace::AspaceId;
use crate::hyp::gunyah::host;
use crate::hyp::gunyah::memdb::{ExtentId, Owner};
use crate::hyp::gunyah::rm::Vmid;
use crate::hyp::monitor::{Guest, Has};
use crate::hyp::vcpu::Cpu;
use crate::hyp::vm::{Book, VmKind, VmStat};
use crate::range::GfnRange;
use crate::stage2::Stage2;
use crate::state::Visibility;
use crate::sync::Mutex;

/// How many pieces of what was given a teardown takes back without letting go of the guest.
const RECLAIM_BATCH: usize = 8;

/// The guest as the host's kernel has it.
#[derive(Debug)]
pub(super) struct VmCore {
    pub(super) host: Arc<Machine>,
    pub(super) book: Arc<Book>,
    pub(super) vmid: Vmid,
    aspace: AspaceId,
    private: ExtentId,
    shared: ExtentId,
    /// Locked behind the state in the book.
    pub(super) guest: Mutex<host::Guest>,
}

impl VmCore {
    pub(super) fn new(host: &Arc<Machine>, book: &Arc<Book>) -> Result<Arc<Self>, Errno> {
        let guest = host::Guest::create(&host.gunyah)?;
        let vmid = guest.vmid().ok_or(Errno::EIO)?;
        let (home, paging) = {
            let world = host.gunyah.world.read();
            let vm = world.rm.vms.get(&vmid);
            vm.and_then(|vm| vm.home.zip(vm.paging)).ok_or(Errno::EIO)?
        };
        Ok(Arc::new(Self {
            host: Arc::clone(host),
            book: Arc::clone(book),
            vmid,
            aspace: home.aspace,
            private: paging.private,
            shared: paging.shared,
            guest: Mutex::new(guest),
        }))
    }

    pub(super) fn kind(&self) -> VmKind {
        self.book.kind
    }

    /// Where what it has is: lent, and shared.
    pub(super) fn extents(&self) -> [(ExtentId, Visibility); 2] {
        [(self.private, Visibility::Private), (self.shared, Visibility::Shared)]
    }

    /// How many pages are lent to it, and shared with it.
    pub(super) fn nr_pages(&self) -> (u64, u64) {
        let [lent, shared] =
            [self.private, self.shared].map(|extent| self.host.nr_pages_of(Owner::Extent(extent)));
        (lent, shared)
    }

    /// What is wrong with what the kernel remembers of it.
    pub(super) fn check(&self) -> Vec<String> {
        self.guest.lock().check()
    }
}

impl Guest for VmCore {
    #[cfg(test)]
    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

    fn stage2(self: Arc<Self>) -> Weak<dyn Stage2> {
        let weak: Weak<Self> = Arc::downgrade(&self);
        weak
    }

    fn create_vcpu(self: Arc<Self>, _: usize) -> Result<Cpu, Errno> {
        Ok(Cpu::Gunyah(Vcpu::new(self)))
    }

    /// Only the front keeps numbers.
    fn forget_vcpu(&self, _: usize) {}

    fn has(&self, gfn: Gfn) -> Has {
        let world = self.host.gunyah.world.read();
        let space = world.hyp.aspaces.get(&self.aspace);
        let owner = space
            .and_then(|space| space.tree.translate(gfn))
            .map(|(pfn, _)| world.hyp.memdb.owner(pfn));
        match owner {
            None if gfn >= crate::hyp::vm::GFN_LIMIT => Has::Never,
            None => Has::Nothing,
            Some(owner) if owner == Owner::Extent(self.private) => Has::Own,
            Some(_) => Has::Shared,
        }
    }

    fn nr_having(&self, gfns: GfnRange, what: Has) -> u64 {
        gfns.iter().take_while(|&gfn| self.has(gfn) == what).count() as u64
    }

    fn stat(&self) -> VmStat {
        let (lent, both) = self.nr_pages();
        let (shared, borrowed) = match self.kind() {
            VmKind::Protected => (both, 0),
            VmKind::NonProtected => (0, both),
        };
        let world = self.host.gunyah.world.read();
        let space = world.hyp.aspaces.get(&self.aspace);
        let nr_tables = space.map_or(0, |space| space.tree.nr_tables());
        let [owned, shared, borrowed] = [lent, shared, borrowed].map(ByteSize::from_pages);
        VmStat { owned, shared, borrowed, nr_tables }
    }

    fn start_teardown(&self) -> Result<(), Errno> {
        self.guest.lock().stop()
    }

    /// Nobody who is gone has asked for anything: what it had to itself comes back cleared.
    fn reclaim_all(&self) -> Result<(), Errno> {
        let mut outcome = Ok(());
        loop {
            let _state = self.book.state.write();
            let mut guest = self.guest.lock();
            let batch: Vec<_> =
                guest.all_given().take(RECLAIM_BATCH).map(|given| given.run).collect();
            if batch.is_empty() {
                return outcome;
            }
            outcome = outcome.and(guest.reclaim_or_forsake(&batch));
        }
    }

    fn finish(&self) -> Result<(), Errno> {
        self.guest.lock().teardown()
    }
}
