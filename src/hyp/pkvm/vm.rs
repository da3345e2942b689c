//! A guest as EL2 and this kernel have it: made, run, torn down.

use std::sync::{Arc, Weak};

use super::Machine;
use super::cpus::{LastCpu, Resident};
use super::vcpu::Vcpu;
use crate::addr::{ByteSize, Gfn};
use crate::error::Errno;
use crate::geometry::index;
use crate::hyp::el2::{self, El2, GuestLook, HostCall, Look, Mapped, PIECE, State};
use crate::hyp::kernel::{self, Made};
use crate::hyp::monitor::{Guest, Has};
use crate::hyp::vcpu::Cpu;
use crate::hyp::vm::{Book, GFN_LIMIT, MAX_VCPUS, VmKind, VmStat};
use crate::range::GfnRange;
use crate::stage2::{GuestRun, Stage2};
use crate::sync::Mutex;

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

    /// The same without the host, which does not wait.
    pub(super) fn look_at_guest(&self) -> GuestLook<'_> {
        self.host.el2.look_at_guest(&self.seen)
    }

    /// Between two pieces of what is about much memory.
    pub(super) fn give_way(&self) {
        self.host.el2.give_way(&self.seen);
    }

    /// Whether frames are memory that may change hands.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM`.
    pub(super) fn check_memory(&self, run: GuestRun) -> Result<(), Errno> {
        self.host.el2.check_memory(run.pfn, run.nr_pages)
    }

    pub(super) fn with_guest_stopped(&self, gfn: Gfn, nr_pages: u64, act: impl FnOnce()) {
        self.host.el2.with_guest_stopped(&self.seen, gfn, nr_pages, act);
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
        let wanted = nr_tables.saturating_add(el2::MIN_MEMCACHE);
        let list = self.host.el2.host_struct(loader);
        let mut nr = 0;
        while nr < wanted {
            nr = wanted.min(list.nr_memcache().max(nr).saturating_add(PIECE));
            self.host.with_kernel(|kernel| kernel.top_up(loader, nr))?;
        }
        Ok(())
    }

    /// Ends it at EL2, and has everything back that it was made of: with the kernel's pages locked for a piece at a time.
    fn end(&self, vcpus: &[u64]) -> Result<(), Errno> {
        let Machine { el2, .. } = &*self.host;
        el2.call(0, HostCall::FinalizeTeardownVm, [self.made.handle, 0, 0, 0])?;
        for &at in [self.made.kvm()].iter().chain(vcpus) {
            let back = kernel::come_back(el2, at);
            for piece in back.chunks(index(PIECE)) {
                self.host.with_kernel(|kernel| kernel.give_all(piece));
            }
            self.host.with_kernel(|kernel| kernel.free_shared_page(at));
        }
        Ok(())
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
        let has = self.look_at_guest().guest(gfn);
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
    #[cfg(test)]
    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }

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
        has(&self.look_at_guest(), gfn)
    }

    fn nr_having(&self, gfns: GfnRange, what: Has) -> u64 {
        let look = self.look_at_guest();
        gfns.iter().take_while(|&gfn| has(&look, gfn) == what).count() as u64
    }

    fn stat(&self) -> VmStat {
        let (mut owned, mut shared, mut borrowed) = (0, 0, 0);
        let count = |leaves: &[Mapped]| {
            for Mapped { state, nr_pages, .. } in leaves {
                match state {
                    State::Owned => owned += nr_pages,
                    State::SharedBorrowed => borrowed += nr_pages,
                    _ => shared += nr_pages,
                }
            }
            Ok(())
        };
        let counted = self.each_leaf(Gfn::new(0), GFN_LIMIT.get(), count);
        debug_assert_eq!(counted, Ok(()));
        let [owned, shared, borrowed] = [owned, shared, borrowed].map(ByteSize::from_pages);
        VmStat { owned, shared, borrowed, nr_tables: self.look_at_guest().nr_tables() }
    }

    fn start_teardown(&self) -> Result<(), Errno> {
        let handle = self.made.handle;
        self.host.cpus.put(&self.host.el2, |who| who.handle == handle);
        self.host.el2.call(0, HostCall::StartTeardownVm, [handle, 0, 0, 0]).map(drop)
    }

    /// A few at a time. A page that cannot be taken back is nobody's.
    fn reclaim_all(&self) -> Result<(), Errno> {
        let mut outcome = Ok(());
        let looked = self.each_leaf(Gfn::new(0), GFN_LIMIT.get(), |leaves| {
            let _state = self.book.state.write();
            for leaf in leaves {
                outcome = outcome.and(self.take_back(leaf));
            }
            Ok(())
        });
        outcome.and(looked)
    }

    /// From here on its handle may name another.
    fn finish(&self) -> Result<(), Errno> {
        let vcpus = std::mem::take(&mut self.vcpus.lock().made);
        self.end(&vcpus)
    }
}

fn has(look: &GuestLook<'_>, gfn: Gfn) -> Has {
    match look.guest(gfn) {
        Ok(has) if has.state == State::Owned => Has::Own,
        Ok(_) => Has::Shared,
        Err(Errno::ENOENT) => Has::Nothing,
        Err(_) => Has::Never,
    }
}
