//! A guest's hypercalls: four registers in, four out, or an exit to the host.

use super::El2;
use super::on_cpu::OnCpu;
use super::profile::ENOMEM_HOST_TABLES;
use super::transition::{self, Relinquished, Stop, guest_frame};
use super::vm::{Fault, FaultKind, Loaded};
use crate::addr::{Gfn, Ipa};
use crate::error::Errno;

pub(crate) const FEATURES: u64 = 0x8600_0000;
pub(crate) const HYP_MEMINFO: u64 = 0xc600_0002;
pub(crate) const MEM_SHARE: u64 = 0xc600_0003;
pub(crate) const MEM_UNSHARE: u64 = 0xc600_0004;
pub(crate) const MEM_RELINQUISH: u64 = 0xc600_0009;

const INVALID_PARAMETER: u64 = (-3_i64) as u64;
/// A flag of `MEM_RELINQUISH`, in its third argument.
pub(crate) const NO_POISON: u64 = 1;
const PAGE_BYTES: u64 = 4096;
/// `HYP_MEMINFO` says so if shares may name more than a page.
const HAS_RANGE: u64 = 1;

const fn bit(id: u64) -> u64 {
    1 << (id & 0x3f)
}

/// What is asked for: 32 bits, as the calling convention has it. What else the register holds nobody looks at.
pub(crate) const fn id(x: [u64; 4]) -> u64 {
    x[0] & 0xffff_ffff
}

/// What becomes of a guest's call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestAnswer {
    /// The guest goes on behind the call.
    Resume([u64; 4]),
    /// The host sees the call.
    Exit([u64; 4]),
    /// The host sees a write fault instead. The guest will make the call again.
    Fault(Fault),
    /// The host is asked to split the block that this page is of. The guest will make the call again.
    WantsSplit(Gfn),
    /// The host is asked for memory for its own tables. The guest will make the call again.
    WantsMemory,
}

fn done(result: Result<(), Errno>) -> [u64; 4] {
    match result {
        Ok(()) => [0; 4],
        Err(_) => [INVALID_PARAMETER, 0, 0, 0],
    }
}

impl El2 {
    /// A hypercall of the guest whose vCPU the CPU has loaded.
    ///
    /// # Errors
    /// `EINVAL` if it has none.
    pub(crate) fn guest_call(&self, cpu: usize, x: [u64; 4]) -> Result<GuestAnswer, Errno> {
        self.guest_call_on(&mut OnCpu::Number(cpu), x)
    }

    pub(super) fn guest_call_on(
        &self,
        on: &mut OnCpu<'_>,
        x: [u64; 4],
    ) -> Result<GuestAnswer, Errno> {
        self.with_vcpu_on(on, |loaded| {
            if !loaded.vm.protected {
                // Its calls are KVM's to answer.
                return Ok(GuestAnswer::Exit(x));
            }
            let one_page = x[2] == 0 && x[3] == 0 && x[1] % PAGE_BYTES == 0;
            let refused = Err(Errno::EINVAL);
            Ok(match id(x) {
                FEATURES => {
                    let calls = [FEATURES, HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE];
                    let mut features = calls.iter().fold(0, |all, &id| all | bit(id));
                    if self.profile.is_android() {
                        features |= bit(MEM_RELINQUISH);
                    }
                    GuestAnswer::Resume([features, 0, 0, 0])
                }
                HYP_MEMINFO if x[1..] == [0; 3] => {
                    let ranges = if self.profile.is_android() { HAS_RANGE } else { 0 };
                    GuestAnswer::Resume([PAGE_BYTES, ranges, 0, 0])
                }
                HYP_MEMINFO => GuestAnswer::Resume(done(refused)),
                MEM_SHARE | MEM_UNSHARE if self.profile.is_android() => self.convert_run(loaded, x),
                MEM_SHARE if one_page => self.share(loaded, x[1]),
                MEM_UNSHARE if one_page => {
                    let (mut host, mut guest) = (self.host.lock(), loaded.vm.mmu.lock());
                    let gfn = Ipa::new(x[1]).gfn();
                    let result = transition::guest_unshare_host(&mut host, &mut guest, gfn);
                    GuestAnswer::Resume(done(result))
                }
                MEM_SHARE | MEM_UNSHARE => GuestAnswer::Resume(done(refused)),
                MEM_RELINQUISH if self.profile.is_android() => self.relinquish(loaded, x),
                _ => GuestAnswer::Exit(x),
            })
        })
    }

    fn share(&self, loaded: &mut Loaded, ipa: u64) -> GuestAnswer {
        let gfn = Ipa::new(ipa).gfn();
        let (mut host, mut guest) = (self.host.lock(), loaded.vm.mmu.lock());
        match transition::guest_share_host(&mut host, &mut guest, gfn) {
            Err(Errno::ENOENT) => {
                let fault = Fault { gfn, kind: FaultKind::Translation };
                loaded.vcpu.fault = Some(fault);
                GuestAnswer::Fault(fault)
            }
            Err(Errno::E2BIG) if self.profile.splits() => GuestAnswer::WantsSplit(gfn),
            result => GuestAnswer::Resume(done(result)),
        }
    }

    fn relinquish(&self, loaded: &Loaded, x: [u64; 4]) -> GuestAnswer {
        let bytes = match x[3] {
            0 => Relinquished::Cleared,
            NO_POISON => Relinquished::AsTheyAre,
            _ => return GuestAnswer::Resume(done(Err(Errno::EINVAL))),
        };
        if x[2] != 0 || x[1] % PAGE_BYTES != 0 {
            return GuestAnswer::Resume(done(Err(Errno::EINVAL)));
        }
        let gfn = guest_frame(x[1] / PAGE_BYTES);
        let (mut host, mut guest) = (self.host.lock(), loaded.vm.mmu.lock());
        match transition::relinquish(&mut host, &mut guest, gfn, bytes) {
            Err(Errno::E2BIG) => GuestAnswer::WantsSplit(gfn),
            result => GuestAnswer::Resume(done(result)),
        }
    }

    /// Android's shares name a run, and say how much of it they did; the guest asks again for the rest.
    fn convert_run(&self, loaded: &mut Loaded, x: [u64; 4]) -> GuestAnswer {
        if x[1] % PAGE_BYTES != 0 || x[3] != 0 {
            return GuestAnswer::Resume(done(Err(Errno::EINVAL)));
        }
        let (first, nr_pages) = (Ipa::new(x[1]).gfn(), x[2].max(1));
        let (mut host, mut guest) = (self.host.lock(), loaded.vm.mmu.lock());
        let result = match id(x) {
            MEM_SHARE => transition::guest_share_run(&mut host, &mut guest, first, nr_pages),
            _ => {
                transition::guest_unshare_run(self.profile, &mut host, &mut guest, first, nr_pages)
            }
        };
        match result {
            Ok(nr_done) => GuestAnswer::Resume([0, nr_done, 0, 0]),
            Err(Stop { gfn, errno: Errno::ENOENT }) => {
                let fault = Fault { gfn, kind: FaultKind::Translation };
                loaded.vcpu.fault = Some(fault);
                GuestAnswer::Fault(fault)
            }
            Err(Stop { gfn, errno: Errno::E2BIG }) => GuestAnswer::WantsSplit(gfn),
            Err(Stop { errno: ENOMEM_HOST_TABLES, .. }) => GuestAnswer::WantsMemory,
            Err(Stop { errno, .. }) => GuestAnswer::Resume(done(Err(errno))),
        }
    }
}
