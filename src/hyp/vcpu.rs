//! A virtual CPU: what a guest can do to its memory, and ask of its hypervisor.

use std::sync::Arc;

use super::exit::{ConversionRequest, Exit, MmioAccess};
use super::hypercall::{Asked, HvcResult, Registers, decode};
use super::pkvm::{Lease, Request, SlotPage};
use crate::addr::{Access, ByteSize, Gfn, Ipa, Pa};
use crate::backing::Arena;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{PAGE_BYTES, index};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::{PageState, TableError};
use crate::state::Visibility;

/// How often a fault is resolved for one access before it is called hopeless. One is enough unless
/// somebody takes the page away between the fault and the retry.
const MAX_FAULTS: usize = 16;

/// A virtual CPU of a protected guest.
///
/// Every access goes through the guest's stage-2 table, a page at a time. While it looks a page up
/// and copies, no page of the guest can change hands, so it sees all of a conversion or nothing.
/// Private memory that the guest has not touched before is given to it on the way.
///
/// An access over several pages may have done the earlier ones when it exits at a later one, which
/// it has not touched. Doing the whole access again is right.
#[derive(Debug)]
pub struct Vcpu {
    lease: Arc<Lease>,
    index: usize,
    pending: Option<Request>,
}

/// What came of a stage-2 fault.
enum Resolved {
    /// The page was given to the guest: look again.
    Donated,
    /// No memslot is there.
    NoSlot,
    /// The memory is on the host's side.
    Shared,
}

impl Vcpu {
    pub(super) fn new(lease: Arc<Lease>, index: usize) -> Self {
        Self { lease, index, pending: None }
    }

    /// Loads bytes.
    ///
    /// # Errors
    /// The [`Exit`]: [`MemoryFault`](Exit::MemoryFault), [`Mmio`](Exit::Mmio) or
    /// [`Failed`](Exit::Failed).
    pub fn load(&mut self, at: Ipa, buf: &mut [u8]) -> Result<(), Exit> {
        let mut at = at;
        let mut left = buf;
        while !left.is_empty() {
            let (now, later) = left.split_at_mut(left.len().min(to_page_end(at)));
            let size = ByteSize::of(now);
            let mmio = || MmioAccess::Read(size);
            self.access(at, size, Access::Read, mmio, |arena, pa| arena.read(pa, now))?;
            at = behind(at, size)?;
            left = later;
        }
        Ok(())
    }

    /// Stores bytes.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn store(&mut self, at: Ipa, data: &[u8]) -> Result<(), Exit> {
        let mut at = at;
        let mut left = data;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(to_page_end(at)));
            let size = ByteSize::of(now);
            let mmio = || MmioAccess::Write(now.to_vec());
            self.access(at, size, Access::Write, mmio, |arena, pa| arena.write(pa, now))?;
            at = behind(at, size)?;
            left = later;
        }
        Ok(())
    }

    /// Loads eight bytes at once, sequentially consistent.
    ///
    /// # Errors
    /// As [`Self::load`]; [`Failed`](Exit::Failed) with [`ErrorKind::Unaligned`] unless the address
    /// is a multiple of 8.
    pub fn load_u64(&mut self, at: Ipa) -> Result<u64, Exit> {
        self.atomic(at, Access::Read, |arena, pa| arena.load_u64(pa))
    }

    /// Stores eight bytes at once, sequentially consistent.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn store_u64(&mut self, at: Ipa, value: u64) -> Result<(), Exit> {
        self.atomic(at, Access::Write, |arena, pa| arena.store_u64(pa, value))
    }

    /// Puts `new` there if `current` is there, at once, sequentially consistent. Returns what was
    /// there: as `Ok` if that was `current`, else as `Err`.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn compare_exchange_u64(
        &mut self,
        at: Ipa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, Exit> {
        self.atomic(at, Access::Write, |arena, pa| arena.compare_exchange_u64(pa, current, new))
    }

    fn atomic<T>(
        &mut self,
        at: Ipa,
        access: Access,
        act: impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<T, Exit> {
        let size = ByteSize::from_bytes(size_of::<u64>() as u64);
        if at.get() % size.get() != 0 {
            return Err(Error::new(Op::Atomic, ErrorKind::Unaligned).into());
        }
        self.access(at, size, access, || MmioAccess::Atomic(size), act)
    }

    /// Makes an access that stays in one page.
    fn access<T>(
        &mut self,
        at: Ipa,
        size: ByteSize,
        access: Access,
        mmio: impl FnOnce() -> MmioAccess,
        mut act: impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<T, Exit> {
        self.withdraw();
        for _ in 0..MAX_FAULTS {
            if let Some(done) = self.attempt(at, &mut act) {
                return Ok(done?);
            }
            match self.resolve(at.gfn())? {
                Resolved::Donated => {}
                Resolved::NoSlot => return Err(Exit::Mmio { ipa: at, access: mmio() }),
                // Another vCPU may have brought the page in meanwhile, and shared it.
                Resolved::Shared => match self.attempt(at, &mut act) {
                    Some(done) => return Ok(done?),
                    None => return Err(private_expected(at, size, access)),
                },
            }
        }
        Err(hopeless())
    }

    /// Translates and acts under one lock, so that the page cannot change hands in between.
    fn attempt<T>(
        &self,
        at: Ipa,
        act: impl FnOnce(&Arena, Pa) -> Result<T, Error>,
    ) -> Option<Result<T, Error>> {
        let core = &self.lease.core;
        let state = core.read();
        let pa = state.translate(at.gfn())?.pa().checked_add(at.in_page())?;
        Some(act(core.arena(), pa))
    }

    /// Resolves a stage-2 fault. The object is asked with no lock of ours held.
    fn resolve(&self, gfn: Gfn) -> Result<Resolved, Error> {
        let slot = self.lease.core.read().slot(gfn);
        let Some(SlotPage { memfd, page }) = slot else { return Ok(Resolved::NoSlot) };
        match memfd.guest_fault(page)? {
            Visibility::Private => Ok(Resolved::Donated),
            Visibility::Shared => Ok(Resolved::Shared),
        }
    }

    /// Makes a hypercall: a [`Hypercall`](super::Hypercall), or registers as they are.
    ///
    /// A request to share a page or to unshare it exits with [`Exit::Conversion`] if it can be met,
    /// and [`Self::answer`] has its result. If the guest does anything else first, it has withdrawn
    /// the request.
    ///
    /// # Errors
    /// The [`Exit`]: [`Conversion`](Exit::Conversion); [`Hypercall`](Exit::Hypercall) for a call that
    /// the hypervisor does not know; [`MemoryFault`](Exit::MemoryFault) for a page to be shared that
    /// is not there or on the host's side already; [`Failed`](Exit::Failed).
    pub fn hvc(&mut self, regs: impl Into<Registers>) -> Result<HvcResult, Exit> {
        self.withdraw();
        let regs = regs.into();
        match decode(regs) {
            Asked::Answered(result) => Ok(result),
            Asked::Share(ipa) => self.share(ipa),
            Asked::Unshare(ipa) => match self.page_state(ipa.gfn()) {
                Ok(PageState::SharedOwned) => self.ask(ipa.gfn(), Visibility::Private),
                _ => Ok(HvcResult::INVALID_PARAMETER),
            },
            Asked::Relinquish(ipa) => match self.lease.core.relinquish(ipa.gfn()) {
                Ok(()) => Ok(HvcResult::SUCCESS),
                Err(_) => Ok(HvcResult::INVALID_PARAMETER),
            },
            Asked::Unknown => Err(Exit::Hypercall { regs }),
        }
    }

    fn page_state(&self, gfn: Gfn) -> Result<PageState, TableError> {
        self.lease.core.read().page_state(gfn)
    }

    /// A page that is not mapped yet is faulted in first, as if the guest had written to it.
    fn share(&mut self, ipa: Ipa) -> Result<HvcResult, Exit> {
        let gfn = ipa.gfn();
        for _ in 0..MAX_FAULTS {
            match self.page_state(gfn) {
                Ok(PageState::Owned) => return self.ask(gfn, Visibility::Shared),
                Err(TableError::Absent) => {}
                _ => return Ok(HvcResult::INVALID_PARAMETER),
            }
            match self.resolve(gfn)? {
                Resolved::Donated => {}
                Resolved::NoSlot | Resolved::Shared => {
                    return Err(private_expected(ipa, ByteSize::from_pages(1), Access::Write));
                }
            }
        }
        Err(hopeless())
    }

    /// Leaves with the guest's request. While it is pending, the hypervisor goes along with it.
    fn ask(&mut self, gfn: Gfn, to: Visibility) -> Result<HvcResult, Exit> {
        let core = &self.lease.core;
        let slot = core.read().slot(gfn);
        // Another vCPU may have given the page up meanwhile, and the VMM taken the memslot away.
        let Some(SlotPage { memfd, page }) = slot else {
            return Ok(HvcResult::INVALID_PARAMETER);
        };
        let gfns = GfnRange::single(gfn)?;
        let pages = PgoffRange::single(page)?;
        let request = Request { gfn, to };
        core.set_request(self.index, Some(request));
        self.pending = Some(request);
        Err(Exit::Conversion(ConversionRequest { gfns, memfd, pages, to }))
    }

    /// Ends the request that an [`Exit::Conversion`] carried, and says what the guest gets: success
    /// if the page is by now what it asked for, else [`HvcResult::INVALID_PARAMETER`].
    ///
    /// The hypervisor goes by what it finds, not by what the VMM says: a guest that is refused must
    /// be able to rely on the page being as it was. So a VMM refuses by not converting.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if no request is pending.
    pub fn answer(&mut self) -> Result<HvcResult, Error> {
        let Some(request) = self.pending else {
            return Err(Error::new(Op::Hypervisor, ErrorKind::NotFound)
                .because("the vCPU waits for no answer"));
        };
        // First: what is found after this, no conversion can change any more.
        self.withdraw();
        let wanted = match request.to {
            Visibility::Private => PageState::Owned,
            Visibility::Shared => PageState::SharedOwned,
        };
        match self.page_state(request.gfn) {
            Ok(state) if state == wanted => Ok(HvcResult::SUCCESS),
            _ => Ok(HvcResult::INVALID_PARAMETER),
        }
    }

    /// Ends the request, if one is pending.
    fn withdraw(&mut self) {
        if self.pending.take().is_some() {
            self.lease.core.set_request(self.index, None);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.lease.core.forget_vcpu(self.index);
    }
}

fn private_expected(ipa: Ipa, size: ByteSize, access: Access) -> Exit {
    Exit::MemoryFault { ipa, size, access, expected: Visibility::Private }
}

fn hopeless() -> Exit {
    Error::new(Op::GuestFault, ErrorKind::Busy)
        .because("the page was taken away as often as it was given")
        .into()
}

/// How many bytes from `at` to the end of its page.
fn to_page_end(at: Ipa) -> usize {
    PAGE_BYTES - index(at.in_page().get())
}

/// The address behind a piece that was done: it was mapped, so far from the end of all addresses.
fn behind(at: Ipa, size: ByteSize) -> Result<Ipa, Exit> {
    at.checked_add(size).ok_or_else(|| Error::new(Op::GuestFault, ErrorKind::Overflow).into())
}
