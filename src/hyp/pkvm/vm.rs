//! The life of a virtual machine: created, given memslots and vCPUs, torn down, gone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, RwLockReadGuard, Weak};

use slab::Slab;

use super::cpus::{LastCpu, Resident};
use super::memslot::{MemslotId, Memslots, Slot, SlotPage};
use super::{Host, Hypervisor, Profile, refused};
use crate::addr::{ByteSize, Gfn, Ipa, Offset};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::index;
use crate::gmem::{GuestMemfd, Unbound};
use crate::hyp::Vcpu;
use crate::hyp::el2::{self, El2, GuestLook, HostCall, Look, Mapped, PIECE, State};
use crate::hyp::kernel::{self, Made};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::GuestRun;
use crate::state::Visibility;
use crate::sync::RwLock;

/// How many vCPUs a guest may have: KVM's limit on Arm.
const MAX_VCPUS: usize = 512;
/// The vCPU that is nobody's: what the host does for a guest it does with this one loaded.
const LOADER: u64 = 0;
/// Guest frame numbers that a guest has.
const GFN_LIMIT: Gfn = Gfn::new(1 << (40 - 12));

/// Whether a guest's memory is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmKind {
    /// It is.
    Protected,
    /// It is the host's, who shows it to the guest.
    NonProtected,
}

/// A guest. Clones are handles to the same one, and its vCPUs hold it too; when the last
/// of them is gone, it is torn down.
#[derive(Clone, Debug)]
pub struct Vm(pub(super) Arc<Lease>);

/// What keeps a guest from being torn down. Not the core itself: an object may hold that for a moment
/// while it calls, and until the pages are back it must find somebody who answers for them.
#[derive(Debug)]
pub(in crate::hyp) struct Lease {
    pub(in crate::hyp) core: Arc<VmCore>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Refused if it was torn down by hand. There is no vCPU: each has a lease.
        let _ = self.core.teardown();
    }
}

/// The guest as the host's kernel has it.
#[derive(Debug)]
pub(in crate::hyp) struct VmCore {
    pub(super) host: Arc<Host>,
    pub(super) kind: VmKind,
    pub(super) made: Made,
    /// What EL2 has of it, to look at.
    seen: crate::sync::Arc<el2::Vm>,
    pub(super) state: RwLock<VmState>,
}

/// What changes of a guest, under one lock. Whoever moves a page of the guest's holds it for writing.
#[derive(Debug)]
pub(in crate::hyp) struct VmState {
    pub(super) life: Life,
    slots: Memslots,
    /// The vCPUs, and what each has asked for and waits for. EL2's numbers are one higher.
    vcpus: Slab<Option<Request>>,
    /// The kernel's structures of all vCPUs that EL2 knows, the loader's first. One that is dropped is used again.
    made: Vec<u64>,
    loader: LastCpu,
}

/// How far a virtual machine has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    /// Its pages are being taken back; nothing is given to it any more.
    Dying,
    /// All of them are back.
    Gone,
}

/// A guest's wish for pages, pending until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hyp) struct Request {
    pub(in crate::hyp) gfns: GfnRange,
    pub(in crate::hyp) to: Visibility,
}

/// What a guest has at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmStat {
    /// Memory that it has to itself.
    pub owned: ByteSize,
    /// Memory that it lets the host see.
    pub shared: ByteSize,
    /// Memory of the host that it sees.
    pub borrowed: ByteSize,
    /// Tables that its stage 2 is made of.
    pub nr_tables: usize,
}

impl Vm {
    pub(super) fn of(core: Arc<VmCore>) -> Self {
        Self(Arc::new(Lease { core }))
    }

    /// The hypervisor that runs it.
    pub fn hypervisor(&self) -> Hypervisor {
        Hypervisor(Arc::clone(&self.0.core.host))
    }

    /// Puts pages of an object at a guest frame, in the first memslot that is free. They are given to the
    /// guest one by one, when it touches them, or together by a conversion to private. Its vCPUs may run
    /// meanwhile.
    ///
    /// # Errors
    /// As [`bind_slot`](Self::bind_slot); [`ErrorKind::Saturated`] if no memslot is free.
    pub fn bind(
        &self,
        gfn: Gfn,
        memfd: &GuestMemfd,
        pages: PgoffRange,
    ) -> Result<MemslotId, Error> {
        self.0.core.bind(None, gfn, memfd, pages)
    }

    /// [`bind`](Self::bind), in the memslot of that number.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if another memslot is at one of the guest frames or has one of the object's pages
    /// (`EEXIST`), if the number is in use, or if the object has memslots of another machine (`EINVAL`);
    /// [`ErrorKind::OutOfRange`] beyond the guest's address space or the object;
    /// [`ErrorKind::Unsupported`] for an object of another pool than the hypervisor's;
    /// [`ErrorKind::HypervisorRefused`] with `EINVAL` if the guest is torn down.
    pub fn bind_slot(
        &self,
        id: MemslotId,
        gfn: Gfn,
        memfd: &GuestMemfd,
        pages: PgoffRange,
    ) -> Result<(), Error> {
        self.0.core.bind(Some(id), gfn, memfd, pages).map(drop)
    }

    /// Whether its memory is its own.
    pub fn kind(&self) -> VmKind {
        self.0.core.kind
    }

    /// Deletes a memslot. Its vCPUs may run meanwhile: from here on they find no memory there. The pages stay in
    /// the object as they are, and can be bound again, here or elsewhere.
    ///
    /// A protected guest loses nothing against its will. In Android's profile it may
    /// [give up](crate::hyp::Hypercall::MemRelinquish) whatever it had been given there; in others a memslot stays in
    /// which the guest has something. What another guest sees there it loses.
    ///
    /// # Errors
    /// [`ErrorKind::HypervisorRefused`] while the guest has a page there, private or shared: with `EPERM`, and in
    /// Android's profile with `EBUSY`, since that passes;
    /// [`ErrorKind::NotFound`] (`EINVAL`) if there is no such memslot; [`ErrorKind::Busy`] while it is being
    /// bound or deleted by somebody else. Nothing has changed then.
    pub fn unbind(&self, id: MemslotId) -> Result<(), Error> {
        self.0.core.unbind(id)
    }

    /// A vCPU. While it exists the guest cannot be torn down.
    ///
    /// # Errors
    /// [`ErrorKind::Saturated`] beyond 512, [`ErrorKind::HypervisorRefused`] with `EINVAL` if the
    /// guest is torn down, [`ErrorKind::Exhausted`] without memory for it.
    pub fn create_vcpu(&self) -> Result<Vcpu, Error> {
        let (index, mut last) = self.0.core.create_vcpu()?;
        let tlb = self.0.core.on_cpu(index, &mut last, El2::guest_tlb);
        let Some(tlb) = tlb else {
            self.0.core.forget_vcpu(index);
            return Err(refused(Errno::EINVAL).because("EL2 has not got the vCPU"));
        };
        Ok(Vcpu::new(Arc::clone(&self.0), index, last, tlb))
    }

    /// Ends the guest: takes its pages back, zeroed where the host could not see them, and gives up
    /// its memslots. The objects still call private what was private.
    ///
    /// A [subscriber](crate::Subscriber) of an object that does not let go of the places that its pages had here is cut
    /// off, and [lost](crate::Standing::Lost) if it cannot be.
    ///
    /// # Errors
    /// [`ErrorKind::HypervisorRefused`] with `EINVAL` while it has a vCPU, or if it is torn down
    /// already.
    pub fn teardown(&self) -> Result<(), Error> {
        self.0.core.teardown()
    }

    /// The object, and the place in it, that a memslot puts at a guest address.
    pub fn memslot(&self, at: Ipa) -> Option<(GuestMemfd, Offset)> {
        let SlotPage { memfd, page } = self.0.core.read().slot(at.gfn())?;
        let offset = page.offset().checked_add(at.in_page())?;
        Some((memfd, offset))
    }

    /// What it has. Counted a piece at a time: what changes hands meanwhile may count as before or after.
    pub fn stat(&self) -> VmStat {
        let core = &self.0.core;
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
        let counted = core.each_leaf(Gfn::new(0), GFN_LIMIT.get(), count);
        debug_assert_eq!(counted, Ok(()));
        let [owned, shared, borrowed] = [owned, shared, borrowed].map(ByteSize::from_pages);
        VmStat { owned, shared, borrowed, nr_tables: core.look_at_guest().nr_tables() }
    }
}

impl VmState {
    /// What a memslot has there.
    pub(in crate::hyp) fn slot(&self, gfn: Gfn) -> Option<SlotPage> {
        self.slots.page(gfn)
    }

    /// How many pages from there on are in the same memslot.
    pub(in crate::hyp) fn nr_in_slot(&self, gfn: Gfn) -> u64 {
        self.slots.nr_from(gfn)
    }

    /// Whether the memory there is of huge folios.
    pub(super) fn is_huge(&self, gfn: Gfn) -> bool {
        self.slots.page(gfn).is_some_and(|slot| slot.memfd.has_huge_folios())
    }

    /// Whether a vCPU waits for an answer about this very page, and wants it to go this way. The way back is the
    /// host's to ask for no more than any other: until it has its answer the guest takes the page to be as it was.
    pub(super) fn consents(&self, gfn: Gfn, to: Visibility) -> bool {
        let is_for = |request: &Request| request.to == to && request.gfns.contains(gfn);
        self.vcpus.iter().any(|(_, request)| request.as_ref().is_some_and(is_for))
    }
}

impl VmCore {
    pub(super) fn new(host: Arc<Host>, kind: VmKind) -> Result<Arc<Self>, Errno> {
        let protected = kind == VmKind::Protected;
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
        let state = VmState {
            life: Life::Alive,
            slots: Memslots::default(),
            vcpus: Slab::new(),
            made: vec![loader],
            loader: host.cpus.first_for(made.handle),
        };
        Ok(Arc::new(Self { host, kind, made, seen, state: RwLock::new(state) }))
    }

    pub(super) fn handle(&self) -> u64 {
        self.made.handle
    }

    /// Looks at the guest's memslots.
    pub(in crate::hyp) fn read(&self) -> RwLockReadGuard<'_, VmState> {
        self.state.read()
    }

    pub(in crate::hyp) fn arena(&self) -> &Arena {
        &self.host.arena
    }

    pub(in crate::hyp) fn kind(&self) -> VmKind {
        self.kind
    }

    pub(in crate::hyp) fn profile(&self) -> Profile {
        self.host.profile
    }

    /// Looks at what EL2 has of the guest. No page of it changes hands meanwhile.
    pub(in crate::hyp) fn look(&self) -> Look<'_> {
        self.host.el2.look(&self.seen)
    }

    /// The same without the host, which does not wait.
    pub(in crate::hyp) fn look_at_guest(&self) -> GuestLook<'_> {
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
    pub(in crate::hyp) fn on_cpu<T>(
        &self,
        index: usize,
        last: &mut LastCpu,
        act: impl FnOnce(&El2, usize) -> T,
    ) -> T {
        let who = self.resident(index as u64 + 1);
        self.host.cpus.with(&self.host.el2, last, who, |cpu| act(&self.host.el2, cpu))
    }

    /// The same with the vCPU that is nobody's.
    pub(super) fn on_loader<T>(
        &self,
        state: &mut VmState,
        act: impl FnOnce(&El2, usize) -> T,
    ) -> T {
        let who = self.resident(LOADER);
        let Host { cpus, el2, .. } = &*self.host;
        cpus.with(el2, &mut state.loader, who, |cpu| act(el2, cpu))
    }

    fn resident(&self, idx: u64) -> Resident {
        Resident { handle: self.made.handle, idx }
    }

    /// Has pages at hand for so many tables, with those that EL2 wants to see however few it needs.
    pub(super) fn top_up(&self, state: &VmState, nr_tables: u64) -> Result<(), Errno> {
        let loader = state.made.first().copied().ok_or(Errno::EINVAL)?;
        let wanted = nr_tables.saturating_add(el2::MIN_MEMCACHE);
        let list = self.host.el2.host_struct(loader);
        let mut nr = 0;
        while nr < wanted {
            nr = wanted.min(list.nr_memcache().max(nr).saturating_add(PIECE));
            self.host.with_kernel(|kernel| kernel.top_up(loader, nr))?;
        }
        Ok(())
    }

    fn create_vcpu(&self) -> Result<(usize, LastCpu), Error> {
        let mut state = self.state.write();
        if state.life != Life::Alive {
            return Err(refused(Errno::EINVAL).because("the guest is torn down"));
        }
        if state.vcpus.len() >= MAX_VCPUS {
            return Err(Error::new(Op::Hypervisor, ErrorKind::Saturated).because("vCPUs"));
        }
        let idx = state.vcpus.vacant_key() as u64 + 1;
        if state.made.len() as u64 <= idx {
            let made = self.host.with_kernel(|kernel| kernel.make_vcpu(self.made, idx));
            state.made.push(made.map_err(refused)?);
        }
        let index = state.vcpus.insert(None);
        Ok((index, self.host.cpus.first_for(self.made.handle + idx)))
    }

    /// What a vCPU asks for from now on, or no longer.
    pub(in crate::hyp) fn set_request(&self, vcpu: usize, request: Option<Request>) {
        if let Some(slot) = self.state.write().vcpus.get_mut(vcpu) {
            *slot = request;
        }
    }

    pub(in crate::hyp) fn forget_vcpu(&self, vcpu: usize) {
        let who = self.resident(vcpu as u64 + 1);
        // First: its number may be somebody else's at once.
        self.host.cpus.put(&self.host.el2, |other| other == who);
        self.state.write().vcpus.try_remove(vcpu);
    }

    fn bind(
        self: &Arc<Self>,
        id: Option<MemslotId>,
        gfn: Gfn,
        memfd: &GuestMemfd,
        pages: PgoffRange,
    ) -> Result<MemslotId, Error> {
        let error = |kind| Error::new(Op::BindSlot, kind).on(pages);
        let torn_down = || error(ErrorKind::HypervisorRefused).errno_is(Errno::EINVAL);
        let too_far = || error(ErrorKind::OutOfRange).because("guest address space");
        if !Arc::ptr_eq(memfd.pool().arena(), &self.host.arena) {
            return Err(error(ErrorKind::Unsupported).because("the object is of another pool"));
        }
        let gfns = GfnRange::new(gfn, pages.nr_pages()).map_err(|_| too_far())?;
        let id = {
            let mut state = self.state.write();
            if state.life != Life::Alive {
                return Err(torn_down());
            }
            if gfns.end() > GFN_LIMIT {
                return Err(too_far());
            }
            let id = id.map_or_else(|| state.slots.free_id(), Ok)?;
            let memfd = memfd.clone();
            let slot = Slot { id, gfns, first: pages.start(), memfd, binding: None };
            state.slots.hold(slot).map_err(|error| error.on(pages))?;
            id
        };
        let weak: Weak<Self> = Arc::downgrade(self);
        // With no lock held: the object has its own, which come before ours.
        let bound = catch_unwind(AssertUnwindSafe(|| memfd.bind(weak, gfn, pages)));
        let mut state = self.state.write();
        let bound = bound.unwrap_or_else(|panic| {
            state.slots.remove(id);
            resume_unwind(panic)
        });
        match (bound, state.slots.get_mut(id)) {
            (Ok(binding), Some(slot)) => {
                slot.binding = Some(binding);
                Ok(id)
            }
            (Ok(binding), None) => {
                // Torn down meanwhile, which could not know this binding.
                drop(state);
                memfd.unbind(binding);
                Err(torn_down())
            }
            (Err(refusal), _) => {
                state.slots.remove(id);
                Err(refusal)
            }
        }
    }

    fn unbind(&self, id: MemslotId) -> Result<(), Error> {
        let (memfd, binding) = self.state.write().slots.suspend(id)?;
        let outcome = catch_unwind(AssertUnwindSafe(|| memfd.unbind_live(binding)));
        let mut state = self.state.write();
        let is_left_behind = match (&outcome, state.slots.get_mut(id)) {
            (Ok(Ok(_)), _) => {
                state.slots.remove(id);
                false
            }
            (_, Some(slot)) => {
                slot.binding = Some(binding);
                false
            }
            // Torn down meanwhile, which could not know this binding.
            (_, None) => true,
        };
        drop(state);
        if is_left_behind {
            memfd.unbind(binding);
        }
        let outcome = outcome.unwrap_or_else(|panic| resume_unwind(panic)).map(Unbound::settle);
        outcome.map_err(|error| match error.errno() {
            // Where a guest can give pages up it may have done so before the next attempt.
            Errno::EBUSY if !self.host.profile.is_android() => error.errno_is(Errno::EPERM),
            _ => error,
        })
    }

    /// A guest gives up a page for good.
    ///
    /// # Errors
    /// None that the guest sees: it finds the answer in `x`.
    pub(in crate::hyp) fn relinquish(
        &self,
        index: usize,
        last: &mut LastCpu,
        gfn: Gfn,
        x: [u64; 4],
    ) -> Result<el2::GuestAnswer, Errno> {
        let mut state = self.state.write();
        let has = self.look_at_guest().guest(gfn);
        if has.is_ok_and(|has| has.nr_pages > 1) && self.host.profile.splits() {
            self.split(&mut state, gfn)?;
        }
        self.on_cpu(index, last, |el2, cpu| el2.guest_call(cpu, x))
    }

    fn teardown(&self) -> Result<(), Error> {
        self.start_teardown().map_err(refused)?;
        let reclaimed = self.reclaim_all();
        let finished = self.finalize_teardown();
        let slots = self.state.write().slots.take();
        for Slot { memfd, binding, .. } in slots {
            if let Some(id) = binding {
                memfd.unbind(id);
            }
        }
        reclaimed.and(finished).map_err(refused)
    }

    /// From here on nothing is given to the guest any more.
    fn start_teardown(&self) -> Result<(), Errno> {
        let mut state = self.state.write();
        if !state.vcpus.is_empty() || state.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        let handle = self.made.handle;
        self.host.cpus.put(&self.host.el2, |who| who.handle == handle);
        self.host.el2.call(0, HostCall::StartTeardownVm, [handle, 0, 0, 0])?;
        state.life = Life::Dying;
        Ok(())
    }

    /// Takes every page back, a few at a time. A page that cannot be taken back is nobody's; the first such failure is
    /// reported.
    fn reclaim_all(&self) -> Result<(), Errno> {
        let mut outcome = Ok(());
        let looked = self.each_leaf(Gfn::new(0), GFN_LIMIT.get(), |leaves| {
            let _state = self.state.write();
            for leaf in leaves {
                outcome = outcome.and(self.take_back(leaf));
            }
            Ok(())
        });
        outcome.and(looked)
    }

    /// Takes a leaf of a dying guest back, or hides it from one that is shown it. It may have gone meanwhile.
    pub(super) fn take_back(&self, leaf: &Mapped) -> Result<(), Errno> {
        let (start, handle) = (leaf.start.get(), self.made.handle);
        let done = match self.kind {
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

    /// The guest is gone, and its handle may name another.
    fn finalize_teardown(&self) -> Result<(), Errno> {
        let mut state = self.state.write();
        let vcpus = std::mem::take(&mut state.made);
        let finished = self.finish(&vcpus);
        state.life = Life::Gone;
        drop(state);
        self.host.forget(self);
        finished
    }

    /// Ends it at EL2, and has everything back that it was made of: with the kernel's pages locked for a piece at a time.
    fn finish(&self, vcpus: &[u64]) -> Result<(), Errno> {
        let Host { el2, .. } = &*self.host;
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
}
