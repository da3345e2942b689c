//! The host's hypercalls: a number and raw arguments in, a number out. Nothing about them is believed.
//!
//! Registers are cut to the width that the original declares for them, as its compiler does. A handle has 16 bits, so
//! what lies above them is not looked at.

use super::El2;
#[cfg(test)]
use super::Pages;
use super::host_struct::ListedPages;
use super::on_cpu::OnCpu;
use super::transition::{self, Age, NpRange, frame, guest_frame};
use super::vm::{FaultKind, Loaded};
use crate::addr::Pa;
use crate::error::Errno;
use crate::state::{Flaw, seeded};

/// `KVM_HOST_SMCCC_ID(0)`.
pub(crate) const CALL_BASE: u64 = 0xc600_0000;
/// A hint about the caller's registers that may be set in any call's number.
const HINT_SVE: u64 = 1 << 16;
const NOT_SUPPORTED: u64 = u64::MAX;
const SUCCESS: u64 = 0;

macro_rules! calls {
    ($($name:ident,)*) => {
        /// What the host may ask for, in the original's order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum HostCall { $(#[doc = stringify!($name)] $name,)* }

        impl HostCall {
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

calls! {
    ShareHyp, UnshareHyp, DonateGuest, ShareGuest, UnshareGuest, RelaxPermsGuest, WrprotectGuest,
    TestClearYoungGuest, MkyoungGuest, ReserveVm, UnreserveVm, InitVm, InitVcpu, VcpuInPoisonFault,
    ForceReclaimGuestPage, ReclaimDyingGuestPage, StartTeardownVm, FinalizeTeardownVm, VcpuLoad,
    VcpuPut, TlbFlushVmid, VcpuRun, SplitGuest, DonateSglistGuest,
}

impl HostCall {
    /// The number that asks for it.
    pub(crate) const fn id(self) -> u64 {
        CALL_BASE + self as u64
    }

    fn from_id(id: u64) -> Option<Self> {
        let nth = (id & !HINT_SVE).checked_sub(CALL_BASE)?;
        Self::ALL.get(usize::try_from(nth).ok()?).copied()
    }
}

/// What a call that can fail puts into a register: a number, or an errno below zero.
fn register(answer: Result<u64, Errno>) -> u64 {
    match answer {
        Ok(value) => value,
        Err(errno) => i64::from(errno.get()).wrapping_neg() as u64,
    }
}

/// An argument that the original declares with 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "that is what the original does to it")]
const fn handle(raw: u64) -> u16 {
    raw as u16
}

/// And one with 32.
const fn word(raw: u64) -> u64 {
    raw & 0xffff_ffff
}

impl El2 {
    /// A hypercall of the host on a CPU: `x0` to `x4` in, `x0` and `x1` out.
    pub(crate) fn host_call(&self, cpu: usize, x: [u64; 5]) -> [u64; 2] {
        self.host_call_on(&mut OnCpu::Number(cpu), x)
    }

    pub(super) fn host_call_on(&self, on: &mut OnCpu<'_>, x: [u64; 5]) -> [u64; 2] {
        let call = HostCall::from_id(x[0]).filter(|&call| self.has(call));
        match call {
            Some(call) => [SUCCESS, register(self.dispatch(on, call, &x))],
            None => [NOT_SUPPORTED, x[1]],
        }
    }

    /// Whether the profile knows a call.
    pub(crate) fn has(&self, call: HostCall) -> bool {
        match call {
            HostCall::SplitGuest => self.profile.splits(),
            HostCall::DonateSglistGuest => self.profile.is_android(),
            _ => true,
        }
    }

    /// The same for a caller who knows what it asks for.
    ///
    /// # Errors
    /// The call's.
    pub(crate) fn call(&self, cpu: usize, call: HostCall, x: [u64; 4]) -> Result<u64, Errno> {
        let answer = self.host_call(cpu, [call.id(), x[0], x[1], x[2], x[3]]);
        Self::answer(answer)
    }

    /// What a call's registers say.
    ///
    /// # Errors
    /// The call's.
    pub(super) fn answer([status, answer]: [u64; 2]) -> Result<u64, Errno> {
        let errno = i32::try_from((answer as i64).wrapping_neg());
        match (status, errno) {
            (SUCCESS, Ok(errno @ 1..)) => Err(Errno::new(errno)),
            (SUCCESS, _) => Ok(answer),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn dispatch(
        &self,
        on: &mut OnCpu<'_>,
        call: HostCall,
        &[_, x1, x2, x3, x4]: &[u64; 5],
    ) -> Result<u64, Errno> {
        let x = [x1, x2, x3, x4];
        match call {
            HostCall::ShareHyp => transition::share_hyp(&mut self.host.lock(), frame(x[0]))?,
            HostCall::UnshareHyp => transition::unshare_hyp(&mut self.host.lock(), frame(x[0]))?,
            HostCall::DonateGuest => self.donate_guest(on, x[0], x[1], x[2])?,
            HostCall::ShareGuest => self.share_guest(on, x)?,
            HostCall::UnshareGuest => self.with_np_vm(handle(x[0]), |vm| {
                let range = NpRange::new(guest_frame(x[1]), x[2])?;
                let mut host = self.host.lock();
                transition::unshare_guest(&mut host, &mut vm.mmu.lock(), range)
            })?,
            HostCall::RelaxPermsGuest => self.with_np_vcpu(on, |loaded| {
                transition::relax(&mut loaded.vm.mmu.lock(), guest_frame(x[0]), x[1])
            })?,
            HostCall::WrprotectGuest => self.with_np_vm(handle(x[0]), |vm| {
                let range = NpRange::new(guest_frame(x[1]), x[2])?;
                transition::wrprotect(&mut vm.mmu.lock(), range)
            })?,
            HostCall::TestClearYoungGuest => {
                return self.with_np_vm(handle(x[0]), |vm| {
                    let range = NpRange::new(guest_frame(x[1]), x[2])?;
                    let age = if x[3] & 0xff == 0 { Age::Test } else { Age::Clear };
                    Ok(transition::test_young(&mut vm.mmu.lock(), range, age).into())
                });
            }
            HostCall::MkyoungGuest => self.with_np_vcpu(on, |loaded| {
                transition::make_young(&mut loaded.vm.mmu.lock(), guest_frame(x[0]));
                Ok(())
            })?,
            HostCall::ReserveVm => return self.reserve_vm().map(u64::from),
            HostCall::UnreserveVm => self.unreserve_vm(handle(x[0])),
            HostCall::InitVm => self.init_vm(x[0], x[1], x[2])?,
            HostCall::InitVcpu => self.init_vcpu(handle(x[0]), x[1], x[2])?,
            HostCall::VcpuInPoisonFault => return self.in_poison_fault(on),
            HostCall::ForceReclaimGuestPage => self.force_reclaim(x[0])?,
            HostCall::ReclaimDyingGuestPage => self.reclaim_dying(handle(x[0]), x[1])?,
            HostCall::StartTeardownVm => self.start_teardown(handle(x[0]))?,
            HostCall::FinalizeTeardownVm => self.finalize_teardown(handle(x[0]))?,
            HostCall::VcpuLoad => self.vcpu_load(on, handle(x[0]), word(x[1])),
            HostCall::VcpuPut => self.vcpu_put(on),
            // Nothing is said of a VM that is none.
            HostCall::TlbFlushVmid => drop(self.with_np_vm(handle(x[0]), |vm| {
                vm.mmu.lock().tlbs.invalidate(crate::addr::Gfn::new(0), u64::MAX);
                Ok(())
            })),
            HostCall::VcpuRun => {
                self.with_vcpu_on(on, |loaded| match loaded.vcpu.host_at == x[0] {
                    true => Ok(()),
                    false => Err(Errno::EINVAL),
                })?;
            }
            HostCall::SplitGuest => self.with_vcpu_on(on, |loaded| {
                if !loaded.vm.protected {
                    return Err(Errno::EINVAL);
                }
                self.refill(&mut loaded.vcpu)?;
                let range = NpRange::new(guest_frame(x[0]), x[1])?;
                let Loaded { vm, vcpu } = loaded;
                let (mut host, mut guest) = (self.host.lock(), vm.mmu.lock());
                transition::split_guest(&mut host, &mut guest, &mut vcpu.memcache, range)
            })?,
            HostCall::DonateSglistGuest => self.donate_list(on)?,
        }
        Ok(0)
    }

    fn with_np_vcpu(
        &self,
        on: &mut OnCpu<'_>,
        act: impl FnOnce(&mut Loaded) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.with_vcpu_on(on, |loaded| match loaded.vm.protected {
            true => Err(Errno::EINVAL),
            false => act(loaded),
        })
    }

    fn donate_guest(&self, on: &mut OnCpu<'_>, pfn: u64, gfn: u64, nr: u64) -> Result<(), Errno> {
        // Mainline has no third argument, so does not look at it.
        let nr_pages = if self.profile.donates(512) { nr } else { 1 };
        self.with_vcpu_on(on, |loaded| {
            if !loaded.vm.protected {
                return Err(Errno::EINVAL);
            }
            self.refill(&mut loaded.vcpu)?;
            let Loaded { vm, vcpu } = loaded;
            let to = (frame(pfn), guest_frame(gfn));
            let (mut host, mut guest) = (self.host.lock(), vm.mmu.lock());
            let memcache = &mut vcpu.memcache;
            let profile = self.profile;
            transition::donate_guest(profile, &mut host, &mut guest, memcache, to, nr_pages)
        })
    }

    fn donate_list(&self, on: &mut OnCpu<'_>) -> Result<(), Errno> {
        self.with_vcpu_on(on, |loaded| {
            if !loaded.vm.protected {
                return Err(Errno::EINVAL);
            }
            self.refill(&mut loaded.vcpu)?;
            let Loaded { vm, vcpu } = loaded;
            let (mut host, mut guest) = (self.host.lock(), vm.mmu.lock());
            // Read once: the host may change it meanwhile.
            let list: Vec<_> =
                vcpu.host.lock().listed.iter().take(ListedPages::MOST).copied().collect();
            let memcache = &mut vcpu.memcache;
            transition::donate_list(self.profile, &mut host, &mut guest, memcache, &list)
        })
    }

    fn share_guest(&self, on: &mut OnCpu<'_>, x: [u64; 4]) -> Result<(), Errno> {
        let [pfn, gfn, nr_pages, prot] = x;
        self.with_np_vcpu(on, |loaded| {
            self.refill(&mut loaded.vcpu)?;
            let Loaded { vm, vcpu } = loaded;
            // What is checked here is the number itself: no bit of it is lost.
            let to = (crate::addr::Pfn::new(pfn), guest_frame(gfn));
            let (mut host, mut guest) = (self.host.lock(), vm.mmu.lock());
            let memcache = &mut vcpu.memcache;
            transition::share_guest(&mut host, &mut guest, memcache, to, nr_pages, prot)
        })
    }

    fn in_poison_fault(&self, on: &mut OnCpu<'_>) -> Result<u64, Errno> {
        self.with_vcpu_on(on, |loaded| {
            let fault = loaded.vcpu.fault.filter(|fault| fault.kind == FaultKind::Translation);
            let gfn = fault.ok_or(Errno::EINVAL)?.gfn;
            let guest = loaded.vm.mmu.lock();
            transition::is_poison_fault(self.profile, &guest, gfn).map(u64::from)
        })
    }

    fn force_reclaim(&self, phys: u64) -> Result<(), Errno> {
        let pfn = Pa::new(phys).pfn();
        let early = seeded(Flaw::LocksInReverse).then(|| self.host.lock());
        let vms = self.vms.lock();
        let mut host = early.unwrap_or_else(|| self.host.lock());
        let page = transition::force_reclaim_target(&host, pfn)?;
        let entry = vms.get(page.handle).ok_or(Errno::EAGAIN)?;
        let mut guest = entry.vm.mmu.lock();
        transition::force_reclaim(&mut host, &mut guest, page.gfn, pfn)?;
        self.incidents.note(super::incident::Incident::Destroyed);
        Ok(())
    }

    fn reclaim_dying(&self, handle: u16, gfn: u64) -> Result<(), Errno> {
        let vms = self.vms.lock();
        let entry = vms.get(handle).filter(|entry| entry.dying).ok_or(Errno::EINVAL)?;
        let mut host = self.host.lock();
        let mut guest = entry.vm.mmu.lock();
        transition::reclaim_dying(self.profile, &mut host, &mut guest, guest_frame(gfn))
    }

    /// Pages that the host shows to EL2, pinned, as EL2's own callers do.
    ///
    /// # Errors
    /// As for the transition.
    #[cfg(test)]
    pub(crate) fn pin_shared(&self, pages: Pages) -> Result<(), Errno> {
        transition::pin(&mut self.host.lock(), &mut self.hyp.lock(), pages)
    }

    /// And let go.
    #[cfg(test)]
    pub(crate) fn unpin_shared(&self, pages: Pages) {
        transition::unpin(&mut self.host.lock(), &mut self.hyp.lock(), pages);
    }
}
