//! A small machine, and everything that a host, good or bad, does to its EL2.

mod access;
mod android;
mod broken;
mod guest_tlb;
mod guests;
mod life;
mod model;
mod np;
mod numbers;
mod play;
mod profiles;
mod property;
mod pvm;
mod random;
mod rules;
mod shares;
mod structs;
mod taint;
mod threads;

use std::collections::BTreeSet;

use super::access::{Bytes, GuestStop, KernelOutcome, Signal};
use super::guest_call::{GuestAnswer, MEM_SHARE, MEM_UNSHARE};
use super::host_call::HostCall;
use super::invariants::trace::{Snapshot, frame_bytes};
use super::machine::{FrameBytes, Machine, Region, RegionKind};
use super::profile::Profile;
use super::vm::{nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};
use super::{El2, Pages, State};
use crate::addr::{Gfn, Ipa, Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::range::PfnRange;
use crate::sync::{Arc, Mutex};

/// The kernel's own memory, without bytes; its end is the carve-out.
pub(super) const KERNEL: u64 = 0x1000;
pub(super) const NR_KERNEL: u64 = 0x600;
pub(super) const CARVEOUT: u64 = KERNEL + NR_KERNEL - 0x100;
/// Pages of the kernel's that it does not hand out.
pub(super) const NR_SPARE: u64 = 0x40;
pub(super) const SPARE: u64 = CARVEOUT - NR_SPARE;
/// Memory for guests.
pub(super) const GUEST: u64 = 0x2000;
pub(super) const NR_GUEST: u64 = 0x400;
/// Memory that is kept out of the kernel's map.
pub(super) const NO_MAP: u64 = GUEST + NR_GUEST;
/// Nothing, or a device's.
pub(super) const DEVICE: u64 = 0x9000;

pub(super) const RWX: u64 = 7;
pub(super) const NR_CPUS: usize = 3;

type Answer = Result<u64, Errno>;

/// The machine and a kernel that hands out its own pages.
pub(super) struct World {
    pub(super) el2: El2,
    free: Mutex<Vec<u64>>,
    /// Frames whose memory is broken.
    broken: Arc<Mutex<BTreeSet<u64>>>,
}

/// Memory that breaks.
struct Memory {
    arena: std::sync::Arc<Arena>,
    broken: Arc<Mutex<BTreeSet<u64>>>,
}

impl Memory {
    fn check(&self, pfn: Pfn) -> Result<(), Errno> {
        // The kernel's lies behind the guests' in the arena.
        let nth = pfn.get();
        let pfn = if nth < NR_GUEST { GUEST + nth } else { KERNEL + nth - NR_GUEST };
        if self.broken.lock().contains(&pfn) { Err(Errno::EIO) } else { Ok(()) }
    }
}

impl FrameBytes for Memory {
    fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno> {
        self.check(at.pfn())?;
        FrameBytes::read(&self.arena, at, buf)
    }

    fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno> {
        self.check(at.pfn())?;
        FrameBytes::write(&self.arena, at, buf)
    }

    fn zero(&self, frames: PfnRange) -> Result<(), Errno> {
        self.check(frames.start())?;
        FrameBytes::zero(&self.arena, frames)
    }
}

/// A VM that the kernel knows: its handle, and where the structures are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub(super) handle: u64,
    pub(super) kvm: u64,
    pub(super) vcpus: [u64; 2],
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(Profile::Mainline72)
    }

    pub(super) fn with(profile: Profile) -> Self {
        Self::with_carveout(profile, 0x100)
    }

    pub(super) fn with_carveout(profile: Profile, nr: u64) -> Self {
        Self::made(profile, nr, false)
    }

    /// The kernel's own memory has bytes too.
    pub(super) fn with_bytes_everywhere(profile: Profile) -> Self {
        Self::made(profile, 0x100, true)
    }

    fn made(profile: Profile, nr: u64, kernel_has_bytes: bool) -> Self {
        let region = |start, nr, kind, bytes: Option<u64>| Region {
            frames: PfnRange::new(Pfn::new(start), nr).unwrap(),
            kind,
            bytes: bytes.map(Pfn::new),
        };
        let regions = vec![
            region(KERNEL, NR_KERNEL, RegionKind::Memory, kernel_has_bytes.then_some(NR_GUEST)),
            region(GUEST, NR_GUEST, RegionKind::Memory, Some(0)),
            region(NO_MAP, 4, RegionKind::NoMap, None),
        ];
        let nr_arena = if kernel_has_bytes { NR_GUEST + NR_KERNEL } else { NR_GUEST };
        let arena = Arena::heap(nr_arena).unwrap();
        let broken = Arc::new(Mutex::new(BTreeSet::new()));
        let memory = Memory { arena, broken: Arc::clone(&broken) };
        let machine = Machine::new(regions, Some(Box::new(memory))).unwrap();
        let carveout = Pages::new(Pfn::new(KERNEL + NR_KERNEL - nr), nr);
        let el2 = El2::boot(profile, machine, carveout, NR_CPUS).unwrap();
        let free = Mutex::new((KERNEL..SPARE).rev().collect());
        Self { el2, free, broken }
    }

    /// From here on nothing is read from that frame or written to it.
    pub(super) fn break_frame(&self, pfn: u64) {
        self.broken.lock().insert(pfn);
    }

    pub(super) fn call(&self, call: HostCall, x: [u64; 4]) -> Answer {
        self.on(0, call, x)
    }

    pub(super) fn on(&self, cpu: usize, call: HostCall, x: [u64; 4]) -> Answer {
        self.el2.call(cpu, call, x)
    }

    /// Some calls take from the vCPU's list before they look at anything else. So that this is done.
    pub(super) fn prime(&self, call: HostCall) {
        if matches!(call, HostCall::DonateGuest | HostCall::ShareGuest) {
            assert!(self.call(call, [DEVICE, 0, 1, RWX]).is_err());
        }
    }

    /// A call that must fail so, and change nothing.
    pub(super) fn refused(&self, call: HostCall, x: [u64; 4], errno: Errno) {
        self.prime(call);
        let before = Snapshot::of(&self.el2);
        assert_eq!(self.call(call, x), Err(errno), "{call:?} {x:#x?}");
        before.nothing_changed(&Snapshot::of(&self.el2));
    }

    /// A call that must work, and change these frames only.
    pub(super) fn does(&self, call: HostCall, x: [u64; 4], frames: &[u64]) {
        self.prime(call);
        let before = Snapshot::of(&self.el2);
        assert_eq!(self.call(call, x), Ok(0), "{call:?} {x:#x?}");
        let after = Snapshot::of(&self.el2);
        let changed: Vec<_> = before.frames_touched(&after).iter().map(|pfn| pfn.get()).collect();
        assert_eq!(changed, frames, "{call:?} {x:#x?}");
        before.edges_exist(&after);
        before.private_bytes_kept(&after, &self.el2);
        self.sound();
    }

    pub(super) fn sound(&self) {
        assert_eq!(self.el2.check(), Vec::<String>::new());
    }

    /// A page of the kernel's, by address.
    pub(super) fn page(&self) -> u64 {
        self.pages(1)
    }

    /// Consecutive ones.
    pub(super) fn pages(&self, nr: u64) -> u64 {
        let mut free = self.free.lock();
        free.sort_unstable_by(|a, b| b.cmp(a));
        let run =
            |at: &usize| (0..nr).all(|nth| free.get(at - nth as usize) == Some(&(free[*at] + nth)));
        let at = (nr as usize - 1..free.len()).rev().find(run).expect("the kernel has memory");
        let first = free[at];
        free.drain(at + 1 - nr as usize..=at);
        first << 12
    }

    /// A page that EL2 may read.
    pub(super) fn shared_page(&self) -> u64 {
        let page = self.page();
        self.call(HostCall::ShareHyp, [page >> 12, 0, 0, 0]).unwrap();
        page
    }

    /// A VM with two vCPUs, as KVM makes it.
    pub(super) fn vm(&self, protected: bool) -> Guest {
        self.vm_with(protected, None)
    }

    /// The same with a firmware at an address.
    pub(super) fn vm_with(&self, protected: bool, firmware_at: Option<u64>) -> Guest {
        let handle = self.call(HostCall::ReserveVm, [0; 4]).unwrap();
        let kvm = self.shared_page();
        {
            let said = self.el2.host_struct(kvm);
            let mut said = said.lock();
            (said.handle, said.nr_vcpus, said.protected) = (handle, 2, protected);
            said.firmware_at = firmware_at;
        }
        let vm_at = self.pages(nr_vm_pages(2));
        let pgd_at = self.pages(nr_pgd_pages());
        self.call(HostCall::InitVm, [kvm, vm_at, pgd_at, 0]).unwrap();
        let vcpus = [0, 1].map(|idx| {
            let at = self.shared_page();
            self.el2.host_struct(at).lock().vcpu_idx = idx;
            self.call(HostCall::InitVcpu, [handle, at, self.pages(nr_vcpu_pages()), 0]).unwrap();
            at
        });
        Guest { handle, kvm, vcpus }
    }

    /// One that is loaded on the first CPU, with frames for tables.
    pub(super) fn running(&self, protected: bool) -> Guest {
        let guest = self.vm(protected);
        self.load(0, guest, 0);
        self.top_up(guest, 0, 8);
        guest
    }

    pub(super) fn load(&self, cpu: usize, guest: Guest, idx: u64) {
        self.on(cpu, HostCall::VcpuLoad, [guest.handle, idx, 0, 0]).unwrap();
    }

    pub(super) fn put(&self, cpu: usize) {
        self.on(cpu, HostCall::VcpuPut, [0; 4]).unwrap();
    }

    /// So many pages on the vCPU's list.
    pub(super) fn top_up(&self, guest: Guest, idx: usize, nr: u64) {
        let pages: Vec<_> = (0..nr).map(|_| self.page()).collect();
        let said = self.el2.host_struct(guest.vcpus[idx]);
        let mut said = said.lock();
        said.memcache.extend(pages);
        said.nr_memcache = said.memcache.len() as u64;
    }

    pub(super) fn donate(&self, pfn: u64, gfn: u64) -> Answer {
        self.call(HostCall::DonateGuest, [pfn, gfn, 1, 0])
    }

    pub(super) fn share(&self, pfn: u64, gfn: u64, nr: u64) -> Answer {
        self.call(HostCall::ShareGuest, [pfn, gfn, nr, RWX])
    }

    pub(super) fn hvc(&self, id: u64, gfn: u64) -> GuestAnswer {
        self.el2.guest_call(0, [id, gfn << 12, 0, 0]).unwrap()
    }

    pub(super) fn host_state(&self, pfn: u64) -> State {
        self.el2.host.lock().page(Pfn::new(pfn)).host()
    }

    pub(super) fn guest_state(&self, guest: Guest, gfn: u64) -> State {
        let vms = self.el2.vms.lock();
        let entry = vms.get(guest.handle as u16).unwrap();
        let state = entry.vm.mmu.lock().state(Gfn::new(gfn));
        state.unwrap()
    }

    pub(super) fn user_store(&self, pfn: u64, bytes: &[u8]) -> Result<(), Signal> {
        self.el2.user(0, Pa::new(pfn << 12), Bytes::Store(bytes))
    }

    pub(super) fn user_load(&self, pfn: u64) -> Result<[u8; 4], Signal> {
        let mut buf = [0xee; 4];
        self.el2.user(0, Pa::new(pfn << 12), Bytes::Load(&mut buf)).map(|()| buf)
    }

    pub(super) fn store(&self, gfn: u64, bytes: &[u8]) -> Result<(), GuestStop> {
        self.el2.vcpu(0, Ipa::new(gfn << 12), Bytes::Store(bytes))
    }

    pub(super) fn read(&self, gfn: u64) -> Result<[u8; 4], GuestStop> {
        let mut buf = [0xee; 4];
        self.el2.vcpu(0, Ipa::new(gfn << 12), Bytes::Load(&mut buf)).map(|()| buf)
    }

    pub(super) fn bytes(&self, pfn: u64) -> Vec<u8> {
        frame_bytes(&self.el2, Pfn::new(pfn))
    }
}

pub(super) const DONE: GuestAnswer = GuestAnswer::Resume([0; 4]);
pub(super) const INVALID: GuestAnswer = GuestAnswer::Resume([(-3_i64) as u64, 0, 0, 0]);
