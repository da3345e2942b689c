//! What the loom models drive: EL2 itself on a machine of some frames, with a host and guests that a model plays, and bytes
//! that it watches.

use std::fmt;
use std::sync::Arc;

use super::access::{Bytes, KernelOutcome};
use super::guest_call::{GuestAnswer, MEM_SHARE, MEM_UNSHARE};
use super::guest_tlb::GuestTlb;
use super::host_call::HostCall;
use super::machine::{FrameBytes, Machine, Region, RegionKind};
use super::profile::Profile;
use super::vm::{nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};
use super::{El2, Pages};
use crate::addr::{Access, Gfn, Pa, Pfn};
use crate::error::Errno;
use crate::range::PfnRange;
use crate::state::Reader;
use crate::sync::{Mutex, is_over};

/// Frames for guests, which have bytes: as many as fit into the region, from 0 on.
const NR_GUEST: u64 = 8;
/// The kernel's own, which have none; EL2's are the last.
const KERNEL: u64 = 0x200;
const NR_KERNEL: u64 = 0xa0;
const NR_CARVEOUT: u64 = 0x20;
const RWX: u64 = 7;

/// One word for each frame for guests.
pub trait Watched: Send + Sync {
    /// What is there.
    fn load(&self, frame: Pfn) -> u64;
    /// Puts something there.
    fn store(&self, frame: Pfn, word: u64);
}

struct Words(Arc<dyn Watched>);

impl FrameBytes for Words {
    fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno> {
        let word = self.0.load(at.pfn()).to_le_bytes();
        buf.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno> {
        let mut word = [0; 8];
        word.iter_mut().zip(buf).for_each(|(to, &from)| *to = from);
        self.0.store(at.pfn(), u64::from_le_bytes(word));
        Ok(())
    }

    fn zero(&self, frames: PfnRange) -> Result<(), Errno> {
        (frames.start().get()..frames.end().get())
            .for_each(|frame| self.0.store(Pfn::new(frame), 0));
        Ok(())
    }
}

/// A CPU of the machine.
#[derive(Clone, Copy, Debug)]
pub struct OnCpu(pub usize);

/// A word that somebody leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub u64);

/// What a VM is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its pages are its own.
    Protected,
    /// Its pages are the host's.
    NotProtected,
}

/// A vCPU of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "there are two")]
pub enum Idx {
    First,
    Second,
}

/// A VM with two vCPUs.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    handle: u64,
    vcpus: [u64; 2],
}

/// EL2 on three CPUs.
pub struct World {
    el2: Arc<El2>,
    /// Pages of the kernel's that it has not used yet.
    unused: Mutex<u64>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if is_over() {
            // Nothing of it may be dropped: loom would panic once more, and so end the process.
            std::mem::forget(Arc::clone(&self.el2));
        }
    }
}

type Answer = Result<(), Errno>;

impl World {
    /// A machine that has booted.
    ///
    /// # Errors
    /// None that a model can meet; so it is with everything that prepares a model.
    pub fn new(bytes: Arc<dyn Watched>) -> Result<Self, Errno> {
        let region = |start, nr, bytes: Option<u64>| -> Result<Region, Errno> {
            let frames = PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno())?;
            Ok(Region { frames, kind: RegionKind::Memory, bytes: bytes.map(Pfn::new) })
        };
        let regions = vec![region(0, NR_GUEST, Some(0))?, region(KERNEL, NR_KERNEL, None)?];
        let machine = Machine::new(regions, Some(Box::new(Words(bytes))))?;
        let carveout = Pages::new(Pfn::new(KERNEL + NR_KERNEL - NR_CARVEOUT), NR_CARVEOUT);
        let el2 = El2::boot(Profile::Mainline72, machine, carveout, 3)?;
        Ok(Self { el2: Arc::new(el2), unused: Mutex::new(KERNEL) })
    }

    fn call(&self, OnCpu(cpu): OnCpu, call: HostCall, x: [u64; 4]) -> Result<u64, Errno> {
        self.el2.call(cpu, call, x)
    }

    fn pages(&self, nr: u64) -> u64 {
        let mut unused = self.unused.lock();
        // A root table is aligned to its size.
        let start = unused.next_multiple_of(nr.next_power_of_two());
        *unused = start + nr;
        Pfn::new(start).pa().get()
    }

    fn shared_page(&self) -> Result<u64, Errno> {
        let page = self.pages(1);
        self.call(OnCpu(0), HostCall::ShareHyp, [Pa::new(page).pfn().get(), 0, 0, 0])?;
        Ok(page)
    }

    /// A VM, with frames for its tables.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn vm(&self, kind: Kind) -> Result<Guest, Errno> {
        let handle = self.call(OnCpu(0), HostCall::ReserveVm, [0; 4])?;
        let kvm = self.shared_page()?;
        {
            let said = self.el2.host_struct(kvm);
            let mut said = said.lock();
            (said.handle, said.nr_vcpus) = (handle, 2);
            said.protected = kind == Kind::Protected;
        }
        let (vm_at, pgd_at) = (self.pages(nr_vm_pages(2)), self.pages(nr_pgd_pages()));
        self.call(OnCpu(0), HostCall::InitVm, [kvm, vm_at, pgd_at, 0])?;
        let mut vcpus = [0; 2];
        for (idx, vcpu) in (0..).zip(&mut vcpus) {
            let at = self.shared_page()?;
            let list: Vec<_> = (0..4).map(|_| self.pages(1)).collect();
            {
                let said = self.el2.host_struct(at);
                let mut said = said.lock();
                (said.vcpu_idx, said.nr_memcache, said.memcache) = (idx, 4, list);
            }
            let vcpu_at = self.pages(nr_vcpu_pages());
            self.call(OnCpu(0), HostCall::InitVcpu, [handle, at, vcpu_at, 0])?;
            *vcpu = at;
        }
        Ok(Guest { handle, vcpus })
    }

    /// Loads a vCPU.
    ///
    /// # Errors
    /// None.
    pub fn load(&self, cpu: OnCpu, guest: Guest, idx: Idx) -> Answer {
        self.call(cpu, HostCall::VcpuLoad, [guest.handle, idx as u64, 0, 0]).map(drop)
    }

    /// Puts the CPU's vCPU back.
    ///
    /// # Errors
    /// None.
    pub fn put(&self, cpu: OnCpu) -> Answer {
        self.call(cpu, HostCall::VcpuPut, [0; 4]).map(drop)
    }

    /// Gives a frame to the guest on the CPU, with pages for tables that it asks for.
    ///
    /// # Errors
    /// The call's.
    pub fn donate(&self, cpu: OnCpu, frame: Pfn, at: Gfn) -> Answer {
        self.call(cpu, HostCall::DonateGuest, [frame.get(), at.get(), 1, 0]).map(drop)
    }

    /// Shows a frame to the guest on the CPU.
    ///
    /// # Errors
    /// The call's.
    pub fn share(&self, cpu: OnCpu, frame: Pfn, at: Gfn) -> Answer {
        self.call(cpu, HostCall::ShareGuest, [frame.get(), at.get(), 1, RWX]).map(drop)
    }

    /// Hides it again.
    ///
    /// # Errors
    /// The call's.
    pub fn unshare(&self, cpu: OnCpu, guest: Guest, at: Gfn) -> Answer {
        self.call(cpu, HostCall::UnshareGuest, [guest.handle, at.get(), 1, 0]).map(drop)
    }

    /// From here on the VM dies.
    ///
    /// # Errors
    /// The call's.
    pub fn start_teardown(&self, cpu: OnCpu, guest: Guest) -> Answer {
        self.call(cpu, HostCall::StartTeardownVm, [guest.handle, 0, 0, 0]).map(drop)
    }

    /// Asks a page of a dying VM back.
    ///
    /// # Errors
    /// The call's.
    pub fn reclaim(&self, cpu: OnCpu, guest: Guest, at: Gfn) -> Answer {
        self.call(cpu, HostCall::ReclaimDyingGuestPage, [guest.handle, at.get(), 0, 0]).map(drop)
    }

    /// Ends a VM.
    ///
    /// # Errors
    /// The call's.
    pub fn finalize_teardown(&self, cpu: OnCpu, guest: Guest) -> Answer {
        self.call(cpu, HostCall::FinalizeTeardownVm, [guest.handle, 0, 0, 0]).map(drop)
    }

    /// Lists more pages for the tables of a vCPU.
    pub fn top_up(&self, guest: Guest, idx: Idx) {
        let page = self.pages(1);
        let said = self.el2.host_struct(guest.vcpus[idx as usize]);
        let mut said = said.lock();
        said.memcache.push(page);
        said.nr_memcache += 1;
    }

    /// The secure world is shown a frame, and gives it back.
    ///
    /// # Errors
    /// The calls'.
    pub fn ffa_share_and_reclaim(&self, frame: Pfn) -> Answer {
        let handle = self.el2.ffa_share(frame.get(), 1)?;
        self.el2.ffa_reclaim(handle)
    }

    /// The guest on the CPU shows a page of its own to the host; `false` if EL2 refuses.
    pub fn show(&self, cpu: OnCpu, at: Gfn) -> bool {
        self.guest_call(cpu, MEM_SHARE, at)
    }

    /// Or hides it.
    pub fn hide(&self, cpu: OnCpu, at: Gfn) -> bool {
        self.guest_call(cpu, MEM_UNSHARE, at)
    }

    fn guest_call(&self, OnCpu(cpu): OnCpu, call: u64, at: Gfn) -> bool {
        let answer = self.el2.guest_call(cpu, [call, at.ipa().get(), 0, 0]);
        answer == Ok(GuestAnswer::Resume([0; 4]))
    }

    /// The guest on the CPU stores a word, by way of its CPU.
    pub fn store(&self, OnCpu(cpu): OnCpu, at: Gfn, Word(word): Word) -> bool {
        self.el2.vcpu(cpu, at.ipa(), Bytes::Store(&word.to_le_bytes())).is_ok()
    }

    /// The host's user space loads a word.
    pub fn user_load(&self, OnCpu(cpu): OnCpu, frame: Pfn) -> Option<Word> {
        let mut word = [0; 8];
        self.el2.user(cpu, frame.pa(), Bytes::Load(&mut word)).ok()?;
        Some(Word(u64::from_le_bytes(word)))
    }

    /// Or stores one.
    pub fn user_store(&self, OnCpu(cpu): OnCpu, frame: Pfn, Word(word): Word) -> bool {
        self.el2.user(cpu, frame.pa(), Bytes::Store(&word.to_le_bytes())).is_ok()
    }

    /// The host's kernel loads a word by a pointer of its own; a guest's page is destroyed for it.
    pub fn kernel_load(&self, OnCpu(cpu): OnCpu, frame: Pfn) -> Option<Word> {
        let mut word = [0; 8];
        match self.el2.kernel_alias(cpu, frame.pa(), Bytes::Load(&mut word)) {
            KernelOutcome::Done | KernelOutcome::DoneAfterReclaim => {
                Some(Word(u64::from_le_bytes(word)))
            }
            KernelOutcome::Oops | KernelOutcome::Stuck => None,
        }
    }

    /// The vCPU that the CPU has loaded, for a thread that runs it.
    pub fn vcpu(&self, OnCpu(cpu): OnCpu) -> Option<Vcpu> {
        let tlb = self.el2.guest_tlb(cpu)?;
        Some(Vcpu { reader: tlb.reader(), tlb })
    }

    /// Everything that is wrong, by EL2's own rules.
    pub fn check(&self) -> Vec<String> {
        self.el2.check()
    }
}

/// Accesses of a vCPU without its CPU.
#[derive(Debug)]
pub struct Vcpu {
    tlb: GuestTlb,
    reader: Reader,
}

impl Vcpu {
    /// Another thread's.
    #[must_use]
    pub fn another(&self) -> Self {
        Self { tlb: self.tlb.clone(), reader: self.tlb.reader() }
    }

    /// Acts on the frame behind a page, if that is remembered.
    pub fn hit<T>(&self, at: Gfn, act: impl FnOnce(Pfn) -> T) -> Option<T> {
        self.tlb.hit(&self.reader, at.ipa(), Access::Write, |at| act(at.pfn()))
    }

    /// Acts on the frame behind a page, if the tables have one.
    pub fn walk<T>(&self, at: Gfn, act: impl FnOnce(Pfn) -> T) -> Option<T> {
        self.tlb.walk(at.ipa(), Access::Write, |at| act(at.pfn()))
    }
}
