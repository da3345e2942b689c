//! The life of a virtual machine: created, given memslots and vCPUs, torn down, gone.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use slab::Slab;

use super::hypervisor::{Host, Hypervisor, refused};
use super::incidents::PreventedCounts;
use super::memslot::{MemslotId, Memslots, Slot, SlotPage, shared_part};
use super::monitor::Guest;
use super::order::{Reading, StateLock, may_call_objects};
use super::vcpu::{Cpu, Vcpu};
use crate::addr::{ByteSize, Gfn, Ipa, Offset};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::gmem::{GuestMemfd, Unbound};
use crate::range::{GfnRange, PgoffRange};
use crate::state::Visibility;

/// How many vCPUs a guest may have: KVM's limit on Arm.
pub(super) const MAX_VCPUS: usize = 512;
/// Guest frame numbers that a guest has.
pub(super) const GFN_LIMIT: Gfn = Gfn::new(1 << (40 - 12));

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

/// What keeps a guest from being torn down. Not the guest itself: an object may hold that for a moment
/// while it calls, and until the pages are back it must find somebody who answers for them.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) host: Arc<Host>,
    pub(super) book: Arc<Book>,
    pub(super) guest: Arc<dyn Guest>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Refused if it was torn down by hand. There is no vCPU: each has a lease.
        let _ = self.teardown();
    }
}

/// What front and hypervisor both know of a guest.
#[derive(Debug)]
pub(super) struct Book {
    pub(super) kind: VmKind,
    pub(super) state: StateLock<VmState>,
    pub(super) prevented: Arc<PreventedCounts>,
}

/// What changes of a guest, under one lock. Whoever moves a page of the guest's holds it for writing.
#[derive(Debug)]
pub(super) struct VmState {
    pub(super) life: Life,
    slots: Memslots,
    /// The vCPUs, and what each has asked for and waits for.
    vcpus: Slab<Option<Request>>,
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
pub(super) struct Request {
    pub(super) gfns: GfnRange,
    pub(super) to: Visibility,
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
    pub(super) fn create(host: &Arc<Host>, kind: VmKind) -> Result<Self, Error> {
        let state = VmState { life: Life::Alive, slots: Memslots::default(), vcpus: Slab::new() };
        let prevented = Arc::clone(&host.prevented);
        let book = Arc::new(Book { kind, state: StateLock::new(state), prevented });
        let guest = Arc::clone(&host.monitor).create_guest(&book).map_err(refused)?;
        host.count_one_more();
        Ok(Self(Arc::new(Lease { host: Arc::clone(host), book, guest })))
    }

    /// The hypervisor that runs it.
    pub fn hypervisor(&self) -> Hypervisor {
        Hypervisor(Arc::clone(&self.0.host))
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
        self.0.bind(None, gfn, memfd, pages)
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
        self.0.bind(Some(id), gfn, memfd, pages).map(drop)
    }

    /// Whether its memory is its own.
    pub fn kind(&self) -> VmKind {
        self.0.book.kind
    }

    /// Deletes a memslot. Its vCPUs may run meanwhile: from here on they find no memory there. The pages stay in
    /// the object as they are, and can be bound again, here or elsewhere.
    ///
    /// Where the hypervisor [takes memory back](crate::hyp::Model::takes_back), what a protected guest had to itself there comes
    /// back cleared. Elsewhere it loses nothing against its will: a memslot stays in which the guest has something, unless
    /// it may [give that up](crate::hyp::Hypercall::MemRelinquish). What another guest sees there it loses.
    ///
    /// # Errors
    /// [`ErrorKind::HypervisorRefused`] while the guest has a page there that is not taken back, private or shared: with
    /// `EPERM`, and with `EBUSY` where it may give pages up, since that passes;
    /// [`ErrorKind::NotFound`] (`EINVAL`) if there is no such memslot; [`ErrorKind::Busy`] while it is being
    /// bound or deleted by somebody else. Nothing has changed then.
    pub fn unbind(&self, id: MemslotId) -> Result<(), Error> {
        self.0.unbind(id)
    }

    /// A vCPU. While it exists the guest cannot be torn down.
    ///
    /// # Errors
    /// [`ErrorKind::Saturated`] beyond 512, [`ErrorKind::HypervisorRefused`] with `EINVAL` if the
    /// guest is torn down, [`ErrorKind::Exhausted`] without memory for it.
    pub fn create_vcpu(&self) -> Result<Vcpu, Error> {
        let (index, cpu) = self.0.create_vcpu()?;
        Ok(Vcpu::new(Arc::clone(&self.0), index, cpu))
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
        self.0.teardown()
    }

    /// The object, and the place in it, that a memslot puts at a guest address.
    pub fn memslot(&self, at: Ipa) -> Option<(GuestMemfd, Offset)> {
        let SlotPage { memfd, page } = self.0.book.read().slot(at.gfn())?;
        let offset = page.offset().checked_add(at.in_page())?;
        Some((memfd, offset))
    }

    /// What it has.
    pub fn stat(&self) -> VmStat {
        self.0.guest.stat()
    }
}

impl VmState {
    /// What a memslot has there.
    pub(super) fn slot(&self, gfn: Gfn) -> Option<SlotPage> {
        self.slots.page(gfn)
    }

    /// How many pages from there on are in the same memslot.
    pub(super) fn nr_in_slot(&self, gfn: Gfn) -> u64 {
        self.slots.nr_from(gfn)
    }

    /// Whether frames were all on this side when their memslot was made, in a model that keeps that.
    pub(super) fn were_all(&self, gfns: GfnRange, side: Visibility) -> bool {
        self.slots.were_all(gfns, side)
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

impl Book {
    /// Looks at the guest's memslots.
    pub(super) fn read(&self) -> Reading<'_, VmState> {
        self.state.read()
    }

    /// What a vCPU asks for from now on, or no longer.
    pub(super) fn set_request(&self, vcpu: usize, request: Option<Request>) {
        if let Some(slot) = self.state.write().vcpus.get_mut(vcpu) {
            *slot = request;
        }
    }
}

impl Lease {
    fn create_vcpu(&self) -> Result<(usize, Cpu), Error> {
        let mut state = self.book.state.write();
        if state.life != Life::Alive {
            return Err(refused(Errno::EINVAL).because("the guest is torn down"));
        }
        if state.vcpus.len() >= MAX_VCPUS {
            return Err(Error::new(Op::Hypervisor, ErrorKind::Saturated).because("vCPUs"));
        }
        let index = state.vcpus.vacant_key();
        let cpu = Arc::clone(&self.guest).create_vcpu(index).map_err(refused)?;
        state.vcpus.insert(None);
        Ok((index, cpu))
    }

    pub(super) fn forget_vcpu(&self, index: usize) {
        // First: its number may be somebody else's at once.
        self.guest.forget_vcpu(index);
        self.book.state.write().vcpus.try_remove(index);
    }

    fn bind(
        &self,
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
        // Before the object's hypervisor hears of it: who converts it meanwhile may find that it was too late.
        let shared = match self.host.model.fixes_sides() {
            true => shared_part(memfd, gfn, pages)?,
            false => Box::default(),
        };
        let id = {
            let mut state = self.book.state.write();
            if state.life != Life::Alive {
                return Err(torn_down());
            }
            if gfns.end() > GFN_LIMIT {
                return Err(too_far());
            }
            let id = id.map_or_else(|| state.slots.free_id(), Ok)?;
            let memfd = memfd.clone();
            let slot = Slot { id, gfns, first: pages.start(), memfd, shared, binding: None };
            state.slots.hold(slot).map_err(|error| error.on(pages))?;
            id
        };
        let weak = Arc::clone(&self.guest).stage2();
        // With no lock held: the object has its own, which come before ours.
        may_call_objects();
        let bound = catch_unwind(AssertUnwindSafe(|| memfd.bind(weak, gfn, pages)));
        let mut state = self.book.state.write();
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
                may_call_objects();
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
        let (memfd, binding) = self.book.state.write().slots.suspend(id)?;
        may_call_objects();
        let outcome = catch_unwind(AssertUnwindSafe(|| memfd.unbind_live(binding)));
        let mut state = self.book.state.write();
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
            may_call_objects();
            memfd.unbind(binding);
        }
        let outcome = outcome.unwrap_or_else(|panic| resume_unwind(panic)).map(Unbound::settle);
        outcome.map_err(|error| match error.errno() {
            // Where a guest can give pages up it may have done so before the next attempt.
            Errno::EBUSY if !self.host.model.lets_guests_give_up() => error.errno_is(Errno::EPERM),
            _ => error,
        })
    }

    fn teardown(&self) -> Result<(), Error> {
        {
            let mut state = self.book.state.write();
            if !state.vcpus.is_empty() || state.life != Life::Alive {
                return Err(refused(Errno::EINVAL));
            }
            self.guest.start_teardown().map_err(refused)?;
            state.life = Life::Dying;
        }
        let reclaimed = self.guest.reclaim_all();
        let finished = {
            let mut state = self.book.state.write();
            state.life = Life::Gone;
            self.guest.finish()
        };
        self.host.count_one_less();
        // With no lock held: the objects have theirs, which come before ours.
        let mut state = self.book.state.write();
        let slots = state.slots.take();
        // Let go, unless a test asks for the mistake.
        let _kept = fails(FailPoint::LetGoOfMachine).then_some(state);
        for Slot { memfd, binding, .. } in slots {
            may_call_objects();
            if let Some(id) = binding {
                memfd.unbind(id);
            }
        }
        reclaimed.and(finished).map_err(refused)
    }
}
