//! A vCPU as EL2 has it: on which CPU it was last, and what it remembers.

use std::sync::Arc;

use super::cpus::LastCpu;
use super::vm::VmCore;
use crate::addr::{Access, Ipa, Pa};
use crate::backing::Arena;
use crate::error::{Errno, Error};
use crate::hyp::Exit;
use crate::hyp::el2::{GuestAnswer, GuestStop, GuestTlb, HostCall};
use crate::hyp::hypercall::{
    Asked, FEATURES, HYP_MEMINFO, HvcResult, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE,
    PLAIN_FEATURES, Registers, seen,
};
use crate::hyp::vcpu::{Stop, hopeless, not_loaded};
use crate::hyp::vm::VmKind;
use crate::state::Reader;

/// A vCPU.
#[derive(Debug)]
pub(in crate::hyp) struct Vcpu {
    core: Arc<VmCore>,
    index: usize,
    last: LastCpu,
    /// What EL2 remembers for it, and this thread's place among those who use that.
    tlb: GuestTlb,
    reader: Reader,
}

impl Vcpu {
    pub(super) fn new(core: Arc<VmCore>, index: usize, last: LastCpu, tlb: GuestTlb) -> Self {
        let reader = tlb.reader();
        Self { core, index, last, tlb, reader }
    }

    /// Translates and acts at once, so that the page cannot change hands in between. No object is called here.
    #[inline]
    pub(in crate::hyp) fn attempt<T>(
        &mut self,
        at: Ipa,
        access: Access,
        act: &mut impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, Stop> {
        let arena = &*self.core.host.arena;
        let hit = self.tlb.hit(&self.reader, at, access, |pa| act(arena, pa));
        let done = hit.or_else(|| self.tlb.walk(at, access, |pa| act(arena, pa)));
        // A fault is a CPU's, which EL2 is asked about.
        done.map_or_else(|| self.attempt_on_cpu(at, access, act), Ok)
    }

    fn attempt_on_cpu<T>(
        &mut self,
        at: Ipa,
        access: Access,
        act: &mut impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, Stop> {
        let core = &*self.core;
        core.on_cpu(self.index, &mut self.last, |el2, cpu| {
            let acted = el2.vcpu_act(cpu, at, access, |pa| act(&core.host.arena, pa));
            acted.map_err(|stop| match stop {
                // While the vCPU is still there, for its fault is what EL2 is asked about.
                GuestStop::Fault(_) => match el2.call(cpu, HostCall::VcpuInPoisonFault, [0; 4]) {
                    Ok(1) => Stop::Poisoned,
                    // Android's has no answer about a block that was destroyed.
                    Err(_) if core.look_at_guest().guest(at.gfn()) == Err(Errno::EHWPOISON) => {
                        Stop::Poisoned
                    }
                    _ => Stop::Fault,
                },
                _ => Stop::Invalid,
            })
        })
    }

    /// A hypercall of the guest's. `None`: the VMM may know it.
    ///
    /// # Errors
    /// EL2 has not got the vCPU.
    pub(in crate::hyp) fn call(
        &mut self,
        regs: Registers,
        asked: Asked,
    ) -> Result<Option<HvcResult>, Exit> {
        let Self { core, index, last, .. } = self;
        let answer = match asked {
            Asked::Relinquish(ipa) if core.kind() == VmKind::Protected => {
                core.relinquish(*index, last, ipa.gfn(), seen(regs))
            }
            _ => core.on_cpu(*index, last, |el2, cpu| el2.guest_call(cpu, seen(regs))),
        };
        // What EL2 has said, or leaves to the host.
        let x = match answer.map_err(|_| not_loaded())? {
            GuestAnswer::Resume(x) => return Ok(Some(HvcResult::of(x))),
            GuestAnswer::Exit(x) => x,
            GuestAnswer::Fault(_) | GuestAnswer::WantsSplit(_) | GuestAnswer::WantsMemory => {
                return Err(hopeless());
            }
        };
        Ok(match x[0] {
            FEATURES => Some(HvcResult::value(PLAIN_FEATURES)),
            HYP_MEMINFO | MEM_SHARE | MEM_UNSHARE | MEM_RELINQUISH => {
                Some(HvcResult::NOT_SUPPORTED)
            }
            _ => None,
        })
    }
}
