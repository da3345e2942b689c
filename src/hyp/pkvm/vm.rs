//! The life of a virtual machine: created, given memslots and vCPUs, torn down, gone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, RwLockReadGuard, Weak};

use slab::Slab;

use super::memslot::{MemslotId, Memslots, Slot, SlotPage};
use super::page::{GuestPages, Life, VmHandle};
use super::transition::Parties;
use super::{Host, Hypervisor, refused};
use crate::addr::{ByteSize, Gfn, Ipa, Offset, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::gmem::{GuestMemfd, Unbound};
use crate::hyp::Vcpu;
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::{Entry, GuestMove, GuestRun, PageState, Stage2, Table, TableError, TableShape};
use crate::state::Visibility;
use crate::sync::RwLock;

/// How many vCPUs a guest may have: KVM's limit on Arm.
const MAX_VCPUS: usize = 512;
/// How many pages teardown takes back without letting go of the locks.
const RECLAIM_BATCH: usize = 64;

/// A protected guest. Clones are handles to the same one, and its vCPUs hold it too; when the last
/// of them is gone, it is torn down.
#[derive(Clone, Debug)]
pub struct Vm(Arc<Lease>);

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

/// The guest as EL2 has it.
#[derive(Debug)]
pub(in crate::hyp) struct VmCore {
    host: Arc<Host>,
    handle: VmHandle,
    state: RwLock<VmState>,
}

/// What changes of a guest, under one lock. A vCPU holds it for reading from its translation to the
/// end of its copy.
#[derive(Debug)]
pub(in crate::hyp) struct VmState {
    pub(super) pages: GuestPages,
    slots: Memslots,
    /// The vCPUs, and what each has asked for and waits for.
    vcpus: Slab<Option<Request>>,
}

/// A guest's wish for a page, pending until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::hyp) struct Request {
    pub(in crate::hyp) gfn: Gfn,
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

    /// Deletes a memslot. Its vCPUs may run meanwhile: from here on they find no memory there. The pages stay in
    /// the object as they are, and can be bound again, here or elsewhere.
    ///
    /// A protected guest loses nothing against its will: it must have [given up](crate::hyp::Hypercall::MemRelinquish)
    /// whatever it had been given there.
    ///
    /// # Errors
    /// [`ErrorKind::HypervisorRefused`] with `EBUSY` while the guest has a page there, private or shared;
    /// [`ErrorKind::NotFound`] (`EINVAL`) if there is no such memslot; [`ErrorKind::Busy`] while it is being
    /// bound or deleted by somebody else. Nothing has changed then.
    pub fn unbind(&self, id: MemslotId) -> Result<(), Error> {
        self.0.core.unbind(id)
    }

    /// A vCPU. While it exists the guest cannot be torn down.
    ///
    /// # Errors
    /// [`ErrorKind::Saturated`] beyond 512, [`ErrorKind::HypervisorRefused`] with `EINVAL` if the
    /// guest is torn down.
    pub fn create_vcpu(&self) -> Result<Vcpu, Error> {
        let mut state = self.0.core.state.write();
        if state.pages.life != Life::Alive {
            return Err(refused(Errno::EINVAL).because("the guest is torn down"));
        }
        if state.vcpus.len() >= MAX_VCPUS {
            return Err(Error::new(Op::Hypervisor, ErrorKind::Saturated).because("vCPUs"));
        }
        let index = state.vcpus.insert(None);
        Ok(Vcpu::new(Arc::clone(&self.0), index))
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

    /// What it has.
    pub fn stat(&self) -> VmStat {
        let state = self.0.core.read();
        let (mut owned, mut shared) = (0, 0);
        for (_, _, entry) in state.pages.table.entries() {
            match entry {
                Entry::Leaf(leaf) if leaf.state == PageState::Owned => owned += 1,
                Entry::Leaf(_) => shared += 1,
                _ => {}
            }
        }
        let [owned, shared] = [owned, shared].map(ByteSize::from_pages);
        VmStat { owned, shared, nr_tables: state.pages.table.nr_tables() }
    }
}

impl VmState {
    /// The frame behind a guest frame: the walk of the guest's own stage-2 table.
    pub(in crate::hyp) fn translate(&self, gfn: Gfn) -> Option<Pfn> {
        self.pages.table.translate(gfn)
    }

    /// The state of the guest's page there, as its table has it.
    pub(in crate::hyp) fn page_state(&self, gfn: Gfn) -> Result<PageState, TableError> {
        Ok(self.pages.table.page(gfn)?.state)
    }

    /// What a memslot has there.
    pub(in crate::hyp) fn slot(&self, gfn: Gfn) -> Option<SlotPage> {
        self.slots.page(gfn)
    }
}

impl VmCore {
    pub(super) fn new(
        host: Arc<Host>,
        handle: VmHandle,
        shape: TableShape,
        nr_tables: usize,
    ) -> Result<Arc<Self>, Error> {
        let table = Table::with_limit(shape, nr_tables).map_err(refused)?;
        let pages = GuestPages { handle, table, life: Life::Alive };
        let state = VmState { pages, slots: Memslots::default(), vcpus: Slab::new() };
        Ok(Arc::new(Self { host, handle, state: RwLock::new(state) }))
    }

    /// Looks at the guest. As long as the guard lives, no translation changes.
    pub(in crate::hyp) fn read(&self) -> RwLockReadGuard<'_, VmState> {
        self.state.read()
    }

    pub(in crate::hyp) fn arena(&self) -> &Arena {
        &self.host.arena
    }

    /// What a vCPU asks for from now on, or no longer.
    pub(in crate::hyp) fn set_request(&self, vcpu: usize, request: Option<Request>) {
        if let Some(slot) = self.state.write().vcpus.get_mut(vcpu) {
            *slot = request;
        }
    }

    pub(in crate::hyp) fn forget_vcpu(&self, vcpu: usize) {
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
            if state.pages.life != Life::Alive {
                return Err(torn_down());
            }
            if gfns.end() > state.pages.table.shape().gfn_limit() {
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
        outcome.unwrap_or_else(|panic| resume_unwind(panic)).map(Unbound::settle)
    }

    /// A guest gives up a page for good.
    pub(in crate::hyp) fn relinquish(&self, gfn: Gfn) -> Result<(), Errno> {
        self.with_parties(|parties, _| parties.guest_relinquish_page(gfn, &self.host.arena))
    }

    fn teardown(&self) -> Result<(), Error> {
        self.start_teardown().map_err(refused)?;
        let reclaimed = self.reclaim_all();
        for Slot { memfd, binding, .. } in self.finalize_teardown() {
            if let Some(id) = binding {
                memfd.unbind(id);
            }
        }
        reclaimed.map_err(refused)
    }

    /// From here on nothing is given to the guest any more.
    fn start_teardown(&self) -> Result<(), Errno> {
        let mut state = self.state.write();
        if !state.vcpus.is_empty() || state.pages.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        state.pages.life = Life::Dying;
        Ok(())
    }

    /// Takes every page back, a few at a time. A page that cannot be taken back stays annotated and
    /// is nobody's; the first such failure is reported.
    fn reclaim_all(&self) -> Result<(), Errno> {
        let mut outcome = Ok(());
        let mut next = Some(Gfn::new(0));
        while let Some(from) = next {
            let batch = self.with_parties(|parties, _| {
                let mut at = from;
                for _ in 0..RECLAIM_BATCH {
                    let (gfn, ..) = parties.guest.table.next_entry(at)?;
                    let done = parties.reclaim_dying_guest_page(gfn, &self.host.arena);
                    outcome = outcome.and(done);
                    at = gfn.checked_add(1)?;
                }
                Some(at)
            });
            next = batch;
        }
        outcome
    }

    /// The guest is gone, and its handle may name another.
    fn finalize_teardown(&self) -> Vec<Slot> {
        self.host.forget(self.handle);
        let mut state = self.state.write();
        state.pages.life = Life::Gone;
        state.slots.take()
    }

    /// Does something with both parties locked, the host first.
    fn with_parties<T>(
        &self,
        act: impl FnOnce(&mut Parties<'_>, &Slab<Option<Request>>) -> T,
    ) -> T {
        let mut host = self.host.pages.lock();
        let mut state = self.state.write();
        let VmState { pages, vcpus, .. } = &mut *state;
        act(&mut Parties { host: &mut host, guest: pages }, vcpus)
    }
}

/// Whether a vCPU waits for an answer about this very page, and wants it to go this way. The way back
/// is the host's to ask for no more than any other: until it has its answer the guest takes the page
/// to be as it was.
fn consents(vcpus: &Slab<Option<Request>>, gfn: Gfn, to: Visibility) -> bool {
    vcpus.iter().any(|(_, request)| *request == Some(Request { gfn, to }))
}

impl Stage2 for VmCore {
    fn make_private(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno> {
        self.with_parties(|parties, vcpus| {
            let consents = |gfn| consents(vcpus, gfn, Visibility::Private);
            // Before the locks are let go: no vCPU can get to the pages in between.
            parties.make_private(runs, consents).inspect(|()| prepare())
        })
    }

    fn make_shared(&self, runs: &[GuestRun], prepare: &mut dyn FnMut()) -> Result<(), Errno> {
        self.with_parties(|parties, vcpus| {
            let consents = |gfn| consents(vcpus, gfn, Visibility::Shared);
            parties.make_shared(runs, consents).inspect(|()| prepare())
        })
    }

    /// Nothing to do: a protected guest maps no page that is not its own, and what it owns nobody
    /// takes out of its table while it lives.
    fn invalidate_range(&self, _runs: &[GuestRun]) {}

    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno> {
        self.with_parties(|parties, _| parties.reclaim(runs, &self.host.arena))
    }

    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        self.with_parties(|parties, _| {
            parties.check_movable(moves.iter().map(|one| one.from)).inspect(|()| copy())
        })
    }
}
