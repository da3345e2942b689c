//! A guest that loads, and the EL2 between it and its memory: for benches of what stands in the way.

use super::guest_tlb::GuestTlb;
use super::host_call::HostCall;
use super::machine::{Machine, Region, RegionKind};
use super::profile::Profile;
use super::vm::{nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};
use super::{El2, Pages};
use crate::addr::{Access, ByteSize, Ipa, Pa, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::range::PfnRange;
use crate::state::Reader;
use crate::sync::Arc;

const GIB_PAGES: u64 = 1 << 18;
const NR_CARVEOUT: u64 = 1 << 12;
const CPU: usize = 0;

/// A protected guest whose vCPU is loaded, with its memory at the end of the machine's.
#[derive(Debug)]
pub struct GuestOnly {
    el2: El2,
    tlb: GuestTlb,
    reader: Reader,
    /// The guest's bytes: frame 0 is the first of its frames.
    arena: Arc<Arena>,
    first: Pfn,
}

/// Pages of the kernel's, by address.
struct Kernel(u64);

impl Kernel {
    fn pages(&mut self, nr: u64) -> u64 {
        let start = self.0;
        self.0 += nr;
        Pfn::new(start).pa().get()
    }

    fn shared_page(&mut self, el2: &El2) -> Result<u64, Errno> {
        let page = self.pages(1);
        el2.call(CPU, HostCall::ShareHyp, [Pa::new(page).pfn().get(), 0, 0, 0])?;
        Ok(page)
    }
}

impl GuestOnly {
    /// So many pages for the guest, from guest address 0 on, in a machine of so much memory beside the kernel's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`] if the guest has more than the machine.
    pub fn new(memory: ByteSize, guest: ByteSize) -> Result<Self, Error> {
        let invalid = || Error::new(Op::CreatePool, ErrorKind::InvalidSize);
        let nr_pages = guest.whole_pages();
        let first = memory.whole_pages().checked_sub(nr_pages).ok_or_else(invalid)?;
        let arena = Arena::heap(nr_pages)?;
        for page in 0..nr_pages {
            // So that each has memory of its own.
            arena.write(Pfn::new(page).pa(), &[1])?;
        }
        let first = Pfn::new(first);
        Self::on(first, nr_pages, arena).map_err(|errno| {
            Error::new(Op::Hypervisor, ErrorKind::HypervisorRefused).errno_is(errno)
        })
    }

    fn on(first: Pfn, nr_pages: u64, arena: Arc<Arena>) -> Result<Self, Errno> {
        let region = |start, nr, bytes| -> Result<Region, Errno> {
            let frames = PfnRange::new(start, nr).map_err(|error| error.errno())?;
            Ok(Region { frames, kind: RegionKind::Memory, bytes })
        };
        // The kernel's own memory is behind all that guests can have.
        let kernel = (first.get() + nr_pages).next_multiple_of(GIB_PAGES);
        let nr_kernel = 2 * NR_CARVEOUT;
        let mut regions = vec![
            region(first, nr_pages, Some(Pfn::new(0)))?,
            region(Pfn::new(kernel), nr_kernel, None)?,
        ];
        if first > Pfn::new(0) {
            regions.push(region(Pfn::new(0), first.get(), None)?);
        }
        let machine = Machine::new(regions, Some(Box::new(Arc::clone(&arena))))?;
        let carveout = Pages::new(Pfn::new(kernel + nr_kernel - NR_CARVEOUT), NR_CARVEOUT);
        let el2 = El2::boot(Profile::Mainline72, machine, carveout, 1)?;
        Self::start(&el2, Kernel(kernel), (first, nr_pages))?;
        let tlb = el2.guest_tlb(CPU).ok_or(Errno::EINVAL)?;
        Ok(Self { el2, reader: tlb.reader(), tlb, arena, first })
    }

    fn start(el2: &El2, mut kernel: Kernel, guest: (Pfn, u64)) -> Result<(), Errno> {
        let (first, nr_pages) = guest;
        let call = |call, x| el2.call(CPU, call, x);
        let handle = call(HostCall::ReserveVm, [0; 4])?;
        let kvm = kernel.shared_page(el2)?;
        {
            let said = el2.host_struct(kvm);
            let mut said = said.lock();
            (said.handle, said.nr_vcpus, said.protected) = (handle, 1, true);
        }
        let pgd = {
            // As large as it is, and aligned so.
            kernel.0 = kernel.0.next_multiple_of(nr_pgd_pages());
            kernel.pages(nr_pgd_pages())
        };
        call(HostCall::InitVm, [kvm, kernel.pages(nr_vm_pages(1)), pgd, 0])?;
        let vcpu = kernel.shared_page(el2)?;
        call(HostCall::InitVcpu, [handle, vcpu, kernel.pages(nr_vcpu_pages()), 0])?;
        call(HostCall::VcpuLoad, [handle, 0, 0, 0])?;
        let said = el2.host_struct(vcpu);
        for nth in 0..nr_pages {
            if nth % 512 == 0 {
                let mut said = said.lock();
                said.memcache.extend((0..4).map(|_| kernel.pages(1)));
                said.nr_memcache = said.memcache.len() as u64;
            }
            call(HostCall::DonateGuest, [first.get() + nth, nth, 1, 0])?;
        }
        Ok(())
    }

    /// Eight bytes at once, by a translation that is remembered.
    #[inline]
    pub fn hit_u64(&self, at: Ipa) -> Option<u64> {
        self.tlb.hit(&self.reader, at, Access::Read, |at| self.bytes_at(at)).flatten()
    }

    /// Eight bytes, as a guest loads them: if the translation is not remembered, by a walk.
    #[inline]
    pub fn load_u64(&self, at: Ipa) -> Option<u64> {
        self.hit_u64(at)
            .or_else(|| self.tlb.walk(at, Access::Read, |at| self.bytes_at(at)).flatten())
    }

    /// Eight bytes, by way of the CPU, which finds out why if the guest faults.
    #[inline]
    pub fn load_by_cpu_u64(&self, at: Ipa) -> Option<u64> {
        self.el2.vcpu_act(CPU, at, Access::Read, |at| self.bytes_at(at)).ok().flatten()
    }

    #[inline]
    fn bytes_at(&self, at: Pa) -> Option<u64> {
        self.arena.load_u64(Pa::new(at.get() - self.first.pa().get())).ok()
    }
}
