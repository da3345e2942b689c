//! A virtual CPU: what a guest can do to its memory, and ask of its hypervisor.

use std::sync::Arc;

use super::exit::{ConversionRequest, Exit, MmioAccess};
use super::hypercall::{Asked, HvcResult, Registers, decode};
use super::memslot::SlotPage;
use super::monitor::Has;
use super::order::may_call_objects;
use super::vm::{Lease, Request, VmKind};
use super::{gunyah, pkvm};
use crate::addr::{Access, ByteSize, Gfn, Ipa, Pa};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::{PAGE_BYTES, index};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::Faulted;
use crate::state::Visibility;

/// How often a fault is resolved for one access before it is called hopeless. One is enough unless
/// somebody takes the page away between the fault and the retry.
const MAX_FAULTS: usize = 16;

/// A virtual CPU of a guest.
///
/// Every access goes through the guest's stage-2 table, a page at a time. While it looks a page up
/// and copies, no page of the guest can change hands, so it sees all of a conversion or nothing.
/// Memory that the guest has not touched before is given to it on the way, or shown to it.
///
/// An access over several pages may have done the earlier ones when it exits at a later one, which
/// it has not touched. Doing the whole access again is right.
#[derive(Debug)]
pub struct Vcpu {
    lease: Arc<Lease>,
    index: usize,
    pending: Option<Request>,
    cpu: Cpu,
}

/// The vCPU as its hypervisor has it. Not behind a pointer: what a guest does to its bytes is compiled into it.
#[derive(Debug)]
pub(super) enum Cpu {
    Pkvm(pkvm::Vcpu),
    Gunyah(gunyah::Vcpu),
}

/// What came of a stage-2 fault.
enum Resolved {
    /// The guest has the page: look again.
    Mapped,
    /// No memslot is there.
    NoSlot,
    /// The memory is on the side where this guest cannot have it.
    OtherSide,
}

/// Why an attempt has not touched anything.
pub(super) enum Stop {
    /// Nothing is mapped.
    Fault,
    /// Nothing is, and nothing will be: the host has destroyed the page.
    Poisoned,
    /// The hypervisor has not got the vCPU.
    Invalid,
}

impl Vcpu {
    pub(super) fn new(lease: Arc<Lease>, index: usize, cpu: Cpu) -> Self {
        Self { lease, index, pending: None, cpu }
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
            match self.attempt(at, access, &mut act) {
                Ok(done) => return Ok(done?),
                Err(Stop::Poisoned) => return Err(Exit::Poisoned { ipa: at }),
                Err(Stop::Invalid) => return Err(not_loaded().into()),
                Err(Stop::Fault) => {}
            }
            match self.resolve(at.gfn())? {
                Resolved::Mapped => {}
                Resolved::NoSlot => return Err(Exit::Mmio { ipa: at, access: mmio() }),
                // Another vCPU may have brought the page in meanwhile, and given it away.
                Resolved::OtherSide => match self.attempt(at, access, &mut act) {
                    Ok(done) => return Ok(done?),
                    Err(_) => return Err(self.other_side_expected(at, size, access)),
                },
            }
        }
        Err(hopeless())
    }

    /// Translates and acts at once, so that the page cannot change hands in between. No object is called here.
    #[inline]
    fn attempt<T>(
        &mut self,
        at: Ipa,
        access: Access,
        act: &mut impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, Stop> {
        match &mut self.cpu {
            Cpu::Pkvm(cpu) => cpu.attempt(at, access, act),
            Cpu::Gunyah(cpu) => cpu.attempt(at, access, act),
        }
    }

    /// Resolves a stage-2 fault. The object is asked with no lock of ours held.
    fn resolve(&self, gfn: Gfn) -> Result<Resolved, Error> {
        let slot = self.lease.book.read().slot(gfn);
        let Some(SlotPage { memfd, page }) = slot else { return Ok(Resolved::NoSlot) };
        may_call_objects();
        Ok(match memfd.guest_fault(page)? {
            Faulted::Mapped => Resolved::Mapped,
            Faulted::OtherSide => Resolved::OtherSide,
        })
    }

    /// Makes a hypercall: a [`Hypercall`](super::Hypercall), or registers as they are.
    ///
    /// A request to share memory or to unshare it exits with [`Exit::Conversion`] if it can be met,
    /// and [`Self::answer`] has its result. If the guest does anything else first, it has withdrawn
    /// the request. Calls of the hypervisor's that its profile lacks are answered as KVM answers them; so are all of
    /// them if the guest is not protected.
    ///
    /// # Errors
    /// The [`Exit`]: [`Conversion`](Exit::Conversion); [`Hypercall`](Exit::Hypercall) for a call that
    /// the hypervisor does not know; [`MemoryFault`](Exit::MemoryFault) for a page to be shared that
    /// is not there or on the host's side already; [`Failed`](Exit::Failed).
    pub fn hvc(&mut self, regs: impl Into<Registers>) -> Result<HvcResult, Exit> {
        self.withdraw();
        let regs = regs.into();
        let is_protected = self.lease.book.kind == VmKind::Protected;
        match decode(regs, self.lease.host.model.takes_runs()) {
            Asked::Share(ipa, most) if is_protected => self.share(ipa, most),
            Asked::Unshare(ipa, most) if is_protected => {
                self.ask(ipa.gfn(), most, Visibility::Private)
            }
            asked => {
                let answer = match &mut self.cpu {
                    Cpu::Pkvm(cpu) => cpu.call(regs, asked)?,
                    Cpu::Gunyah(cpu) => cpu.call(regs),
                };
                answer.ok_or(Exit::Hypercall { regs })
            }
        }
    }

    /// A page that is not mapped yet is faulted in first, as if the guest had written to it.
    fn share(&mut self, ipa: Ipa, most: u64) -> Result<HvcResult, Exit> {
        let gfn = ipa.gfn();
        for _ in 0..MAX_FAULTS {
            match self.lease.guest.has(gfn) {
                Has::Nothing => {}
                // Where nothing is ever converted, a guest may ask for what is so in any case.
                Has::Shared if self.lease.host.model.fixes_sides() => {
                    return Ok(HvcResult::SUCCESS);
                }
                _ => return self.ask(gfn, most, Visibility::Shared),
            }
            match self.resolve(gfn)? {
                Resolved::Mapped => {}
                Resolved::NoSlot | Resolved::OtherSide => {
                    let size = ByteSize::from_pages(1);
                    return Err(self.other_side_expected(ipa, size, Access::Write));
                }
            }
        }
        Err(hopeless())
    }

    /// Leaves with the guest's request for as many pages from `gfn` on as can change sides. While it is pending, the
    /// hypervisor goes along with it.
    fn ask(&mut self, gfn: Gfn, most: u64, to: Visibility) -> Result<HvcResult, Exit> {
        let Lease { book, guest, host } = &*self.lease;
        if host.model.fixes_sides() && to == Visibility::Private && guest.has(gfn) == Has::Own {
            return Ok(HvcResult::SUCCESS);
        }
        let (slot, nr_in_slot) = {
            let state = book.read();
            (state.slot(gfn), state.nr_in_slot(gfn))
        };
        let from = match to {
            Visibility::Shared => Has::Own,
            Visibility::Private => Has::Shared,
        };
        let nr_pages = match most.min(nr_in_slot) {
            0 => 0,
            most => guest.nr_having(GfnRange::new(gfn, most)?, from),
        };
        // Another vCPU may have given the page up meanwhile, and the VMM taken the memslot away.
        let Some(SlotPage { memfd, page }) = slot.filter(|_| nr_pages > 0) else {
            return Ok(HvcResult::INVALID_PARAMETER);
        };
        let gfns = GfnRange::new(gfn, nr_pages)?;
        let pages = PgoffRange::new(page, nr_pages)?;
        let request = Request { gfns, to };
        book.set_request(self.index, Some(request));
        self.pending = Some(request);
        Err(Exit::Conversion(ConversionRequest { gfns, memfd, pages, to }))
    }

    /// Ends the request that an [`Exit::Conversion`] carried, and says what the guest gets: success
    /// if the memory is by now what it asked for, else [`HvcResult::INVALID_PARAMETER`].
    ///
    /// The hypervisor goes by what it finds, not by what the VMM says: a guest that is refused must
    /// be able to rely on the page being as it was. So a VMM refuses by not converting. If it has converted some of several
    /// pages, the guest is told of those at the beginning.
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
            Visibility::Private => Has::Own,
            Visibility::Shared => Has::Shared,
        };
        Ok(match self.lease.guest.nr_having(request.gfns, wanted) {
            0 => HvcResult::INVALID_PARAMETER,
            nr if self.lease.host.model.takes_runs() => HvcResult::of([0, nr, 0, 0]),
            _ => HvcResult::SUCCESS,
        })
    }

    /// Ends the request, if one is pending.
    fn withdraw(&mut self) {
        if self.pending.take().is_some() {
            self.lease.book.set_request(self.index, None);
        }
    }

    /// The exit for memory that is on the side where this guest cannot have it.
    fn other_side_expected(&self, ipa: Ipa, size: ByteSize, access: Access) -> Exit {
        let expected = match self.lease.book.kind {
            VmKind::Protected => Visibility::Private,
            VmKind::NonProtected => Visibility::Shared,
        };
        Exit::MemoryFault { ipa, size, access, expected }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.lease.forget_vcpu(self.index);
    }
}

pub(super) fn not_loaded() -> Error {
    Error::new(Op::Hypervisor, ErrorKind::HypervisorRefused).errno_is(Errno::EINVAL)
}

pub(super) fn hopeless() -> Exit {
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
