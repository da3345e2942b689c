//! An EL2 on a machine of any size, whose frames have no bytes, with a kernel that sends what works. For benches.
//!
//! Every call goes the whole way: registers in, registers out.

use super::by_hand::EnteredCpu;
use super::guest_call::{GuestAnswer, MEM_SHARE, MEM_UNSHARE};
use super::host_call::HostCall;
use super::machine::{Machine, Region, RegionKind};
use super::profile::Profile;
use super::vm::{nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};
use super::{El2, Pages};
use crate::addr::{ByteSize, Gfn, Pfn};
use crate::error::Errno;
use crate::range::PfnRange;

/// Memory begins at 1 GiB, as on QEMU's machine.
const FIRST: u64 = 1 << 18;
const NR_CPUS: usize = 8;
const CPU: usize = 0;
const RWX: u64 = 7;
/// What a VM, its root and its vCPU take, and some more.
const NR_STRUCTS: u64 = 64;
const ENTRIES: u64 = 512;

/// EL2, and the kernel of its host.
#[derive(Debug)]
pub struct El2Only {
    el2: El2,
    /// What guests may be given.
    memory: PfnRange,
    /// The kernel's own pages: its two structures, what EL2 wants for a VM, and pages for tables.
    kernel: u64,
    nr_tables: u64,
    /// Of the VM that there is.
    handle: u64,
}

/// A VM's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host gives it pages.
    Protected,
    /// The host shows it pages.
    NonProtected,
}

impl El2Only {
    /// Boots. EL2 sets aside what the host's tables take if every page is mapped by itself, as upstream does.
    ///
    /// # Errors
    /// As for EL2's own boot; `EINVAL` for sizes that no address reaches.
    pub fn boot(memory: ByteSize) -> Result<Self, Errno> {
        let range = |start, nr| PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno());
        let nr_pages = memory.whole_pages();
        let nr_tables = nr_pages / (ENTRIES - 1) + NR_STRUCTS;
        let kernel = FIRST + nr_pages;
        let carveout = kernel + NR_STRUCTS + nr_tables;
        let nr_carveout = 2 * NR_STRUCTS + (nr_pages + nr_tables) / (ENTRIES - 2);
        let frames = range(FIRST, carveout + nr_carveout - FIRST)?;
        let region = Region { frames, kind: RegionKind::Memory, bytes: None };
        let machine = Machine::new(vec![region], None)?;
        let carveout = Pages::new(Pfn::new(carveout), nr_carveout);
        let el2 = El2::boot(Profile::Mainline72, machine, carveout, NR_CPUS)?;
        let memory = range(FIRST, nr_pages)?;
        let this = Self { el2, memory, kernel, nr_tables, handle: 0 };
        for structure in [this.kvm(), this.vcpu()] {
            this.call(HostCall::ShareHyp, [structure >> 12, 0, 0, 0])?;
        }
        Ok(this)
    }

    /// Frames that guests may be given.
    pub fn memory(&self) -> PfnRange {
        self.memory
    }

    fn kvm(&self) -> u64 {
        self.kernel << 12
    }

    fn vcpu(&self) -> u64 {
        (self.kernel + 1) << 12
    }

    fn call(&self, call: HostCall, x: [u64; 4]) -> Result<u64, Errno> {
        self.el2.call(CPU, call, x)
    }

    /// The calling thread is the machine's first CPU.
    ///
    /// # Errors
    /// None: the machine has one.
    pub fn enter(&self) -> Result<CpuOnly<'_>, Errno> {
        let cpu = self.el2.enter(CPU).ok_or(Errno::EINVAL)?;
        Ok(CpuOnly { cpu: Calls::Entered(cpu), handle: self.handle })
    }

    /// The calling thread makes calls as the machine's first CPU, one by one.
    pub fn by_number(&self) -> CpuOnly<'_> {
        CpuOnly { cpu: Calls::ByNumber(&self.el2), handle: self.handle }
    }

    /// Makes a VM with one vCPU, loads that, and lists pages for its tables, if it is to map so many entries in a row.
    ///
    /// # Errors
    /// The calls'; `EBUSY` while there is another or for more than memory has pages.
    pub fn new_guest(&mut self, kind: Kind, nr_entries: u64) -> Result<(), Errno> {
        // A table for 512, one for 512 of those, and EL2 wants two more to be there.
        let nr_listed = nr_entries.div_ceil(ENTRIES) + nr_entries.div_ceil(ENTRIES * ENTRIES) + 2;
        if self.handle != 0 || nr_listed > self.nr_tables {
            return Err(Errno::EBUSY);
        }
        let handle = self.call(HostCall::ReserveVm, [0; 4])?;
        {
            let said = self.el2.host_struct(self.kvm());
            let mut said = said.lock();
            (said.handle, said.nr_vcpus) = (handle, 1);
            said.protected = kind == Kind::Protected;
            said.returned.clear();
        }
        // A root's frames are aligned to their number.
        let pgd = (self.kernel + 2).next_multiple_of(nr_pgd_pages());
        let (vm, vcpu) = (pgd + nr_pgd_pages(), pgd + nr_pgd_pages() + nr_vm_pages(1));
        self.call(HostCall::InitVm, [self.kvm(), vm << 12, pgd << 12, 0])?;
        self.call(HostCall::InitVcpu, [handle, self.vcpu(), vcpu << 12, 0])?;
        let tables = vcpu + nr_vcpu_pages();
        {
            let said = self.el2.host_struct(self.vcpu());
            let mut said = said.lock();
            said.memcache = (0..nr_listed).map(|nth| (tables + nth) << 12).collect();
            said.nr_memcache = nr_listed;
        }
        self.call(HostCall::VcpuLoad, [handle, 0, 0, 0])?;
        self.handle = handle;
        Ok(())
    }

    /// The vCPU is put back, and the VM begins to die.
    ///
    /// # Errors
    /// The calls'.
    pub fn stop_guest(&mut self) -> Result<(), Errno> {
        self.call(HostCall::VcpuPut, [0; 4])?;
        self.call(HostCall::StartTeardownVm, [self.handle, 0, 0, 0]).map(drop)
    }

    /// What is left of the VM goes.
    ///
    /// # Errors
    /// The call's.
    pub fn end_guest(&mut self) -> Result<(), Errno> {
        self.call(HostCall::FinalizeTeardownVm, [self.handle, 0, 0, 0])?;
        self.handle = 0;
        Ok(())
    }

    /// What of the frames' records, EL2's map and all tables there is now, as each counts itself.
    pub fn metadata(&self) -> ByteSize {
        let vms = self.el2.vms.lock();
        let host = self.el2.host.lock();
        let hyp = self.el2.hyp.lock();
        let guests = vms.live().map(|entry| entry.vm.mmu.lock().tree.nr_bytes());
        let nr_bytes = guests.sum::<usize>() + host.nr_bytes() + hyp.nr_bytes();
        ByteSize::from_bytes(nr_bytes as u64)
    }

    /// What is wrong, by the rules that always hold.
    pub fn check(&self) -> Vec<String> {
        self.el2.check()
    }
}

#[derive(Debug)]
enum Calls<'a> {
    Entered(EnteredCpu<'a>),
    ByNumber(&'a El2),
}

/// The machine's first CPU.
#[derive(Debug)]
pub struct CpuOnly<'a> {
    cpu: Calls<'a>,
    handle: u64,
}

impl CpuOnly<'_> {
    #[inline]
    fn call(&mut self, call: HostCall, x: [u64; 4]) -> Result<u64, Errno> {
        let x = [call.id(), x[0], x[1], x[2], x[3]];
        El2::answer(match &mut self.cpu {
            Calls::Entered(cpu) => cpu.host_call(x),
            Calls::ByNumber(el2) => el2.host_call(CPU, x),
        })
    }

    /// The host gives a page to the guest.
    ///
    /// # Errors
    /// The call's.
    #[inline]
    pub fn donate(&mut self, pfn: Pfn, gfn: Gfn) -> Result<(), Errno> {
        self.call(HostCall::DonateGuest, [pfn.get(), gfn.get(), 1, 0]).map(drop)
    }

    /// The host takes a page back from the dying guest.
    ///
    /// # Errors
    /// The call's.
    #[inline]
    pub fn reclaim(&mut self, gfn: Gfn) -> Result<(), Errno> {
        self.call(HostCall::ReclaimDyingGuestPage, [self.handle, gfn.get(), 0, 0]).map(drop)
    }

    /// The host shows a page or a block to a guest that is not protected.
    ///
    /// # Errors
    /// The call's.
    #[inline]
    pub fn lend(&mut self, pfn: Pfn, gfn: Gfn, nr_pages: u64) -> Result<(), Errno> {
        self.call(HostCall::ShareGuest, [pfn.get(), gfn.get(), nr_pages, RWX]).map(drop)
    }

    /// And hides it again.
    ///
    /// # Errors
    /// The call's.
    #[inline]
    pub fn hide(&mut self, gfn: Gfn, nr_pages: u64) -> Result<(), Errno> {
        self.call(HostCall::UnshareGuest, [self.handle, gfn.get(), nr_pages, 0]).map(drop)
    }

    #[inline]
    fn guest_call(&mut self, id: u64, gfn: Gfn) -> Result<(), Errno> {
        let x = [id, gfn.get() << 12, 0, 0];
        let answer = match &mut self.cpu {
            Calls::Entered(cpu) => cpu.guest_call(x),
            Calls::ByNumber(el2) => el2.guest_call(CPU, x),
        };
        // Looked at where it lies: a copy would wait for what was just written.
        match &answer {
            Ok(GuestAnswer::Resume([0, ..])) => Ok(()),
            Ok(_) => Err(Errno::EPERM),
            Err(errno) => Err(*errno),
        }
    }

    /// The guest shows a page of its own to the host.
    ///
    /// # Errors
    /// `EPERM` if it was refused.
    #[inline]
    pub fn share(&mut self, gfn: Gfn) -> Result<(), Errno> {
        self.guest_call(MEM_SHARE, gfn)
    }

    /// And hides it again.
    ///
    /// # Errors
    /// `EPERM` if it was refused.
    #[inline]
    pub fn unshare(&mut self, gfn: Gfn) -> Result<(), Errno> {
        self.guest_call(MEM_UNSHARE, gfn)
    }
}
