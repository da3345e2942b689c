//! A guest as EL2 and this kernel have it: made, run, torn down.

use std::sync::{Arc, Weak};

use super::Machine;
use super::cpus::{LastCpu, Resident};
use super::vcpu::Vcpu;
use crate::addr::{ByteSize, Gfn};
use crate::error::Errno;
use crate::hyp::el2::{self, El2, HostCall, Look, Mapped, State};
use crate::hyp::kernel::Made;
use crate::hyp::monitor::{Guest, Has};
use crate::hyp::vcpu::Cpu;
use crate::hyp::vm::{Book, MAX_VCPUS, VmKind, VmStat};
use crate::range::GfnRange;
use crate::stage2::Stage2;
use crate::sync::Mutex;

/// How many pages teardown takes back without letting go of the locks.
const RECLAIM_BATCH: usize = 64;
/// The vCPU that is nobody's: what the host does for a guest it does with this one loaded.
const LOADER: u64 = 0;

/// The guest as the host's kernel has it.
#[derive(Debug)]
pub(super) struct VmCore {
    pub(super) host: Arc<Machine>,
    pub(super) book: Arc<Book>,
    made: Made,
    /// What EL2 has of it, to look at.
    seen: crate::sync::Arc<el2::Vm>,
    /// Locked behind the state in the book.
    vcpus: Mutex<Vcpus>,
}

/// The vCPUs that EL2 knows, those of the book with numbers one higher.
#[derive(Debug)]
struct Vcpus {
    /// The kernel's structures of all of them, the loader's first. One that is dropped is used again.
    made: Vec<u64>,
    loader: LastCpu,
}

impl VmCore {
    pub(super) fn new(host: Arc<Machine>, book: &Arc<Book>) -> Result<Arc<Self>, Errno> {
        let protected = book.kind == VmKind::Protected;
        // Room for all, and for the one that is nobody's.
        let nr_vcpus = MAX_VCPUS as u64 + 1;
        let made = host.with_kernel(|kernel| kernel.make_vm(nr_vcpus, protected))?;
        let loader = host.with_kernel(|kernel| kernel.make_vcpu(made, LOADER));
        let seen = u16::try_from(made.handle).ok().and_then(|handle| host.el2.vm(handle));
        let (Ok(loader), Some(seen)) = (loader, seen) else {
            let _ = host.el2.call(0, HostCall::StartTeardownVm, [made.handle, 0, 0, 0]);
            host.with_kernel(|kernel| kernel.finish(made, loader.into_iter()))?;
            return Err(loader.err().unwrap_or(Errno::EINVAL));
        };
        let vcpus = Vcpus { made: vec![loader], loader: host.cpus.first_for(made.handle) };
        let book = Arc::clone(book);
        Ok(Arc::new(Self { host, book, made, seen, vcpus: Mutex::new(vcpus) }))
    }

    pub(super) fn kind(&self) -> VmKind {
        self.book.kind
    }

    /// Looks at what EL2 has of the guest. No page of it changes hands meanwhile.
    pub(super) fn look(&self) -> Look<'_> {
        self.host.el2.look(&self.seen)
    }

    pub(super) fn with_guest_stopped(
        &self,
        ranges: impl Iterator<Item = (Gfn, u64)>,
        act: impl FnOnce(),
    ) {
        self.host.el2.with_guest_stopped(&self.seen, ranges, act);
    }

    /// Does something on a CPU that has a vCPU loaded. No object may be called.
    pub(super) fn on_cpu<T>(
        &self,
        index: usize,
        last: &mut LastCpu,
        act: impl FnOnce(&El2, usize) -> T,
    ) -> T {
        let who = self.resident(index as u64 + 1);
        self.host.cpus.with(&self.host.el2, last, who, |cpu| act(&self.host.el2, cpu))
    }

    /// The same with the vCPU that is nobody's.
    pub(super) fn on_loader<T>(&self, act: impl FnOnce(&El2, usize) -> T) -> T {
        let who = self.resident(LOADER);
        let Machine { cpus, el2, .. } = &*self.host;
        cpus.with(el2, &mut self.vcpus.lock().loader, who, |cpu| act(el2, cpu))
    }

    fn resident(&self, idx: u64) -> Resident {
        Resident { handle: self.made.handle, idx }
    }

    /// Has pages at hand for so many tables, with those that EL2 wants to see however few it needs.
    pub(super) fn top_up(&self, nr_tables: u64) -> Result<(), Errno> {
        let loader = self.vcpus.lock().made.first().copied().ok_or(Errno::EINVAL)?;
        self.host.with_kernel(|kernel| kernel.top_up(loader, nr_tables + el2::MIN_MEMCACHE))
    }

    /// A guest gives up a page for good.
    ///
    /// # Errors
    /// None that the guest sees: it finds the answer in `x`.
    pub(super) fn relinquish(
        &self,
        index: usize,
        last: &mut LastCpu,
        gfn: Gfn,
        x: [u64; 4],
    ) -> Result<el2::GuestAnswer, Errno> {
        let _state = self.book.state.write();
        let has = self.look().guest(gfn);
        if has.is_ok_and(|has| has.nr_pages > 1) && self.host.profile.splits() {
            self.split(gfn)?;
        }
        self.on_cpu(index, last, |el2, cpu| el2.guest_call(cpu, x))
    }

    /// Takes a leaf of a dying guest back, or hides it from one that is shown it. It may have gone meanwhile.
    pub(super) fn take_back(&self, leaf: &Mapped) -> Result<(), Errno> {
        let (start, handle) = (leaf.start.get(), self.made.handle);
        let done = match self.kind() {
            VmKind::Protected => {
                self.host.el2.call(0, HostCall::ReclaimDyingGuestPage, [handle, start, 0, 0])
            }
            VmKind::NonProtected => {
                let x = [handle, start, leaf.nr_pages, 0];
                self.host.el2.call(0, HostCall::UnshareGuest, x)
            }
        };
        match done {
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl Guest for VmCore {
    fn stage2(self: Arc<Self>) -> Weak<dyn Stage2> {
        let weak: Weak<Self> = Arc::downgrade(&self);
        weak
    }

    fn create_vcpu(self: Arc<Self>, index: usize) -> Result<Cpu, Errno> {
        let idx = index as u64 + 1;
        {
            let mut vcpus = self.vcpus.lock();
            if vcpus.made.len() as u64 <= idx {
                let made = self.host.with_kernel(|kernel| kernel.make_vcpu(self.made, idx))?;
                vcpus.made.push(made);
            }
        }
        let mut last = self.host.cpus.first_for(self.made.handle + idx);
        // Has EL2 not got it?
        let tlb = self.on_cpu(index, &mut last, El2::guest_tlb).ok_or(Errno::EINVAL)?;
        Ok(Cpu::Pkvm(Vcpu::new(self, index, last, tlb)))
    }

    fn forget_vcpu(&self, index: usize) {
        let who = self.resident(index as u64 + 1);
        self.host.cpus.put(&self.host.el2, |other| other == who);
    }

    fn has(&self, gfn: Gfn) -> Has {
        has(&self.look(), gfn)
    }

    fn nr_having(&self, gfns: GfnRange, what: Has) -> u64 {
        let look = self.look();
        gfns.iter().take_while(|&gfn| has(&look, gfn) == what).count() as u64
    }

    fn stat(&self) -> VmStat {
        let look = self.look();
        let (mut owned, mut shared, mut borrowed) = (0, 0, 0);
        for Mapped { state, nr_pages, .. } in look.leaves() {
            match state {
                State::Owned => owned += nr_pages,
                State::SharedBorrowed => borrowed += nr_pages,
                _ => shared += nr_pages,
            }
        }
        let [owned, shared, borrowed] = [owned, shared, borrowed].map(ByteSize::from_pages);
        VmStat { owned, shared, borrowed, nr_tables: look.nr_tables() }
    }

    fn start_teardown(&self) -> Result<(), Errno> {
        let handle = self.made.handle;
        self.host.cpus.put(&self.host.el2, |who| who.handle == handle);
        self.host.el2.call(0, HostCall::StartTeardownVm, [handle, 0, 0, 0]).map(drop)
    }

    /// A few at a time. A page that cannot be taken back is nobody's.
    fn reclaim_all(&self) -> Result<(), Errno> {
        let leaves = self.look().leaves();
        let mut outcome = Ok(());
        for batch in leaves.chunks(RECLAIM_BATCH) {
            let _state = self.book.state.write();
            for leaf in batch {
                outcome = outcome.and(self.take_back(leaf));
            }
        }
        outcome
    }

    /// From here on its handle may name another.
    fn finish(&self) -> Result<(), Errno> {
        let vcpus = std::mem::take(&mut self.vcpus.lock().made);
        self.host.with_kernel(|kernel| kernel.finish(self.made, vcpus.into_iter()))
    }
}

fn has(look: &Look<'_>, gfn: Gfn) -> Has {
    match look.guest(gfn) {
        Ok(has) if has.state == State::Owned => Has::Own,
        Ok(_) => Has::Shared,
        Err(Errno::ENOENT) => Has::Nothing,
        Err(_) => Has::Never,
    }
}
