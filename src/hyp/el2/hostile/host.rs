//! A small machine, and a kernel that knows as much as it takes to send something that could work.

use super::super::host_call::HostCall;
use super::super::host_struct::ListedPages;
use super::super::hyp_page::HypPage;
use super::super::machine::{Machine, Region, RegionKind};
use super::super::vm::{nr_pgd_pages, nr_vcpu_pages, nr_vm_pages};
use super::super::{El2, Pages, Profile, State};
use super::choices::Choices;
use crate::addr::{Gfn, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::range::PfnRange;

/// The kernel's own memory, without bytes; its end is the carve-out.
const KERNEL: u64 = 0x1000;
const NR_KERNEL: u64 = 0x400;
const NR_CARVEOUT: u64 = 0x80;
const CARVEOUT: u64 = KERNEL + NR_KERNEL - NR_CARVEOUT;
/// Pages of the kernel's that it does not hand out.
const NR_SPARE: u64 = 0x20;
const SPARE: u64 = CARVEOUT - NR_SPARE;
/// Memory for guests: a block, and a little.
pub(super) const GUEST: u64 = 0x2000;
const NR_GUEST: u64 = 520;
/// The last of it: a firmware, where guests can have one; and where protected guests want it.
const FIRMWARE: u64 = GUEST + NR_GUEST - 2;
const NR_FIRMWARE: u64 = 2;
const FIRMWARE_AT: u64 = 2;
/// Memory that is kept out of the kernel's map.
const NO_MAP: u64 = GUEST + NR_GUEST;
const DEVICE: u64 = 0x9000;

/// Frames and addresses that much is done with.
pub(super) const NEAR: [u64; 12] = [0, 1, 2, 3, 4, 5, 510, 511, 512, 513, 514, 515];
const FAR: [u64; 4] = [(1 << 28) - 1, (1 << 28) - 512, 1 << 18, 1 << 20];

pub(super) const NR_CPUS: usize = 3;
const NR_VCPUS: u64 = 2;

/// A VM that the kernel knows: its handle, and where the structures are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub(super) handle: u64,
    pub(super) kvm: u64,
    pub(super) vcpus: [u64; 2],
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) el2: El2,
    pub(super) guests: Vec<Guest>,
    /// Where the search for a free page of the kernel's goes on.
    next: u64,
}

impl Host {
    /// Boots, with two VMs of each kind, a vCPU of one on each CPU, and pages for tables.
    pub(super) fn boot(profile: Profile) -> Result<Self, Errno> {
        let region = |start, nr, kind, bytes: Option<u64>| -> Result<Region, Errno> {
            let frames = PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno())?;
            Ok(Region { frames, kind, bytes: bytes.map(Pfn::new) })
        };
        let regions = vec![
            region(KERNEL, NR_KERNEL, RegionKind::Memory, None)?,
            region(GUEST, NR_GUEST, RegionKind::Memory, Some(0))?,
            region(NO_MAP, 4, RegionKind::NoMap, None)?,
        ];
        let arena = Arena::heap(NR_GUEST).map_err(|error| error.errno())?;
        let machine = Machine::new(regions, Some(Box::new(arena)))?;
        let carveout = Pages::new(Pfn::new(CARVEOUT), NR_CARVEOUT);
        let mut el2 = El2::boot(profile, machine, carveout, NR_CPUS)?;
        if profile.is_android() {
            el2.keep_firmware(Pages::new(Pfn::new(FIRMWARE), NR_FIRMWARE))?;
            for pfn in FIRMWARE..FIRMWARE + NR_FIRMWARE {
                el2.machine().write(Pfn::new(pfn).pa(), b"firmware")?;
            }
        }
        let mut host = Self { el2, guests: Vec::new(), next: KERNEL };
        for protected in [true, false, true, false] {
            let guest = host.vm(protected)?;
            host.guests.push(guest);
        }
        for cpu in 0..NR_CPUS {
            let guest = host.guests[cpu];
            host.el2.call(cpu, HostCall::VcpuLoad, [guest.handle, 0, 0, 0])?;
            host.top_up(guest.vcpus[0], 8)?;
        }
        Ok(host)
    }

    /// A run of the kernel's pages with which nobody has done anything, by address.
    pub(super) fn pages(&mut self, nr: u64) -> Result<u64, Errno> {
        let host = self.el2.host.lock();
        let is_free = |pfn| host.page(Pfn::new(pfn)) == HypPage::default();
        let starts = (self.next..SPARE - nr).chain(KERNEL..self.next.min(SPARE - nr));
        let start = { starts }.find(|&start| (start..start + nr).all(is_free));
        let start = start.ok_or(Errno::ENOMEM)?;
        drop(host);
        self.next = start + nr;
        Ok(start << 12)
    }

    fn shared_page(&mut self) -> Result<u64, Errno> {
        let page = self.pages(1)?;
        self.el2.call(0, HostCall::ShareHyp, [page >> 12, 0, 0, 0])?;
        Ok(page)
    }

    /// A VM with two vCPUs, as KVM makes it.
    pub(super) fn vm(&mut self, protected: bool) -> Result<Guest, Errno> {
        let handle = self.el2.call(0, HostCall::ReserveVm, [0; 4])?;
        let kvm = self.shared_page()?;
        {
            let said = self.el2.host_struct(kvm);
            let mut said = said.lock();
            (said.handle, said.nr_vcpus, said.protected) = (handle, NR_VCPUS, protected);
            said.firmware_at = Some(FIRMWARE_AT << 12);
        }
        // Found together: what is only found is still free.
        let (nr_vm, nr_pgd) = (nr_vm_pages(NR_VCPUS), nr_pgd_pages());
        let at = self.pages(nr_vm + nr_pgd)?;
        self.el2.call(0, HostCall::InitVm, [kvm, at, at + (nr_vm << 12), 0])?;
        let mut vcpus = [0; 2];
        for (idx, vcpu) in (0..).zip(&mut vcpus) {
            let said_at = self.shared_page()?;
            let said = self.el2.host_struct(said_at);
            said.lock().vcpu_idx = idx;
            said.lock().memcache.clear();
            let at = self.pages(nr_vcpu_pages())?;
            self.el2.call(0, HostCall::InitVcpu, [handle, said_at, at, 0])?;
            *vcpu = said_at;
        }
        Ok(Guest { handle, kvm, vcpus })
    }

    /// So many more pages on a vCPU's list.
    pub(super) fn top_up(&mut self, vcpu: u64, nr: u64) -> Result<(), Errno> {
        let first = self.pages(nr)?;
        let said = self.el2.host_struct(vcpu);
        let mut said = said.lock();
        // Those of an earlier list may have gone elsewhere.
        said.memcache = (0..nr).map(|nth| first + (nth << 12)).collect();
        // EL2 takes until it has as many as this says.
        said.nr_memcache = nr;
        Ok(())
    }

    /// Ends a VM, with or without asking its pages back, and makes another. Not if a vCPU is loaded.
    pub(super) fn replace(&mut self, at: usize, is_tidy: bool, protected: bool) {
        let guest = self.guests[at];
        let x = [guest.handle, 0, 0, 0];
        self.el2.call(0, HostCall::StartTeardownVm, x).ok();
        if is_tidy {
            for gfn in NEAR.into_iter().chain(FAR) {
                let page = [guest.handle, gfn, 0, 0];
                self.el2.call(0, HostCall::ReclaimDyingGuestPage, page).ok();
                for nr in [1, 512] {
                    self.el2.call(0, HostCall::UnshareGuest, [guest.handle, gfn, nr, 0]).ok();
                }
            }
        }
        if self.el2.call(0, HostCall::FinalizeTeardownVm, x).is_ok() {
            if let Ok(next) = self.vm(protected) {
                self.guests[at] = next;
            }
        }
    }

    /// Mostly an address where the guest of the vCPU that a CPU has has something.
    pub(super) fn gfn_of_guest(&self, choices: &mut Choices<'_>, cpu: usize) -> u64 {
        let there = self.el2.with_vcpu(cpu, |loaded| {
            let guest = loaded.vm.mmu.lock();
            let has = |gfn: &u64| guest.tree.leaf(Gfn::new(*gfn)).is_some();
            Ok(NEAR.into_iter().filter(has).collect::<Vec<_>>())
        });
        match there {
            Ok(there) if !there.is_empty() && !choices.one_in(4) => choices.of(&there),
            _ => gfn(choices),
        }
    }

    /// At times one that is not the host's.
    pub(super) fn frame_to_touch(&self, choices: &mut Choices<'_>) -> u64 {
        let host = self.el2.host.lock();
        let is_away = |pfn: &u64| host.page(Pfn::new(*pfn)).host() == State::NoPage;
        let away: Vec<_> = NEAR.into_iter().map(|nth| GUEST + nth).filter(is_away).collect();
        match !away.is_empty() && choices.one_in(3) {
            true => choices.of(&away),
            false => frame(choices),
        }
    }

    /// What guests that are not protected have, and where.
    fn lent(&self) -> Vec<(u64, u64)> {
        let vms = self.el2.vms.lock();
        let plain = vms.live().filter(|entry| !entry.vm.protected);
        let of = |entry: &super::super::vm::VmEntry| {
            let guest = entry.vm.mmu.lock();
            let handle = u64::from(entry.vm.handle);
            let has = |gfn: &u64| guest.tree.leaf(Gfn::new(*gfn)).is_some();
            NEAR.into_iter().filter(has).map(|gfn| (handle, gfn)).collect::<Vec<_>>()
        };
        plain.flat_map(of).collect()
    }

    /// Lists pages and blocks for the guest of the vCPU that a CPU has.
    pub(super) fn list(&self, choices: &mut Choices<'_>, cpu: usize) {
        let at = self.el2.with_vcpu(cpu, |loaded| Ok(loaded.vcpu.host_at));
        let Ok(at) = at else { return };
        let said = self.el2.host_struct(at);
        let mut said = said.lock();
        said.listed.clear();
        for _ in 0..choices.below(5) {
            let (pfn, gfn) = pair(choices);
            let order = choices.of(&[0, 0, 0, 0, 0, 9, 1, 200]);
            said.listed.push(ListedPages { pfn, gfn, order });
        }
    }

    /// Says something else in a structure that EL2 reads.
    pub(super) fn lie(&self, choices: &mut Choices<'_>) {
        let guest = choices.of(&self.guests);
        let at = choices.of(&[guest.kvm, guest.vcpus[0], guest.vcpus[1]]);
        let said = self.el2.host_struct(at);
        let mut said = said.lock();
        match choices.below(6) {
            5 => said.firmware_at = choices.of(&[None, Some(0), Some(3 << 12 | 8), Some(!0xfff)]),
            0 => said.handle = self.handle(choices),
            1 => said.nr_vcpus = choices.odd(),
            2 => said.vcpu_idx = choices.odd(),
            3 => said.memcache.push(frame(choices).wrapping_shl(12)),
            _ => {
                // EL2 takes so many, and there may be as many.
                said.nr_memcache = choices.odd();
            }
        }
    }

    fn handle(&self, choices: &mut Choices<'_>) -> u64 {
        match choices.below(16) {
            14 => choices.odd(),
            15 => 0x1000 + choices.below(8),
            _ => choices.of(&self.guests).handle,
        }
    }

    /// A call that suits the VM that the CPU has, or any.
    pub(super) fn call_for(&self, choices: &mut Choices<'_>, cpu: usize) -> HostCall {
        let of = |cpu: &super::super::vm::Cpu| Some(cpu.loaded.as_ref()?.vm.protected);
        let fill = match self.el2.cpu(cpu).and_then(|cpu| of(&cpu)) {
            Some(true) => HostCall::DonateGuest,
            Some(false) => HostCall::ShareGuest,
            None => HostCall::VcpuLoad,
        };
        if choices.one_in(4) {
            return choices.of(HostCall::ALL);
        }
        let has = |call| if self.el2.has(call) { call } else { fill };
        choices.of(&[
            fill,
            fill,
            fill,
            fill,
            HostCall::UnshareGuest,
            HostCall::ForceReclaimGuestPage,
            HostCall::ReclaimDyingGuestPage,
            HostCall::ShareHyp,
            HostCall::UnshareHyp,
            has(HostCall::SplitGuest),
            has(HostCall::DonateSglistGuest),
        ])
    }

    /// Its arguments: such that it could work, and half of the time one of them anything.
    pub(super) fn arguments(&self, choices: &mut Choices<'_>, call: HostCall) -> [u64; 4] {
        let mut x = self.likely(choices, call);
        if choices.one_in(2) {
            let nth = choices.index(4);
            x[nth] = choices.odd();
        }
        x
    }

    fn likely(&self, choices: &mut Choices<'_>, call: HostCall) -> [u64; 4] {
        let guest = choices.of(&self.guests);
        match call {
            HostCall::ShareHyp | HostCall::UnshareHyp => [frame(choices), 0, 0, 0],
            HostCall::DonateGuest | HostCall::ShareGuest => {
                let (pfn, gfn) = pair(choices);
                [pfn, gfn, nr(choices), choices.of(&[7, 7, 7, 1, 2, 3, 5, 8])]
            }
            HostCall::UnshareGuest | HostCall::WrprotectGuest | HostCall::TestClearYoungGuest => {
                let lent = self.lent();
                match lent.is_empty() || choices.one_in(4) {
                    true => [self.handle(choices), gfn(choices), nr(choices), choices.below(2)],
                    false => {
                        let (handle, gfn) = choices.of(&lent);
                        [handle, gfn, nr(choices), choices.below(2)]
                    }
                }
            }
            HostCall::RelaxPermsGuest => [gfn(choices), choices.below(9), 0, 0],
            HostCall::MkyoungGuest => [gfn(choices), 0, 0, 0],
            HostCall::SplitGuest => [gfn(choices), nr(choices), 0, 0],
            HostCall::ForceReclaimGuestPage => [frame(choices).wrapping_shl(12) | 8, 0, 0, 0],
            HostCall::ReclaimDyingGuestPage => [self.handle(choices), gfn(choices), 0, 0],
            HostCall::InitVm => [guest.kvm, page(choices), page(choices), 0],
            HostCall::InitVcpu => [self.handle(choices), guest.vcpus[0], page(choices), 0],
            HostCall::VcpuLoad => [self.handle(choices), choices.below(3), 0, 0],
            HostCall::VcpuRun => [choices.of(&guest.vcpus), 0, 0, 0],
            _ => [self.handle(choices), 0, 0, 0],
        }
    }
}

/// Mostly one of few, so that what one step did the next one meets.
fn near(choices: &mut Choices<'_>) -> u64 {
    match choices.below(4) {
        3 => choices.of(&NEAR),
        _ => choices.of(&NEAR[..4]),
    }
}

pub(super) fn frame(choices: &mut Choices<'_>) -> u64 {
    match choices.below(20) {
        17 => choices.odd(),
        18 => choices.of(&[DEVICE, NO_MAP, CARVEOUT, KERNEL, KERNEL + 1, 1 << 52 | GUEST]),
        19 => SPARE + choices.below(NR_SPARE),
        _ => GUEST + near(choices),
    }
}

pub(super) fn gfn(choices: &mut Choices<'_>) -> u64 {
    match choices.below(16) {
        14 => choices.odd(),
        15 => choices.of(&FAR),
        _ => near(choices),
    }
}

/// A frame, and mostly the one address of the guest's that goes with it.
fn pair(choices: &mut Choices<'_>) -> (u64, u64) {
    let pfn = frame(choices);
    match choices.below(4) {
        3 => (pfn, gfn(choices)),
        _ => (pfn, pfn.wrapping_sub(GUEST)),
    }
}

pub(super) fn nr(choices: &mut Choices<'_>) -> u64 {
    choices.of(&[1, 1, 1, 1, 1, 512, 512, 0])
}

fn page(choices: &mut Choices<'_>) -> u64 {
    frame(choices).wrapping_shl(12)
}
