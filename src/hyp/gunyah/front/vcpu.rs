//! A vCPU: accesses through its VM's address space, and the calls that the host's kernel answers.
//!
//! Gunyah has no call by which a guest shares a page. What a VMM offers instead is up to it; this kernel answers those of
//! [`Hypercall`](crate::hyp::Hypercall), so that a guest needs to know one way to ask.

use std::sync::Arc;

use super::vm::VmCore;
use crate::addr::{Access, Ipa, Pa};
use crate::backing::Arena;
use crate::error::Error;
use crate::geometry::PAGE_SIZE;
use crate::hyp::gunyah::touch::Abort;
use crate::hyp::hypercall::{
    FEATURES, HYP_MEMINFO, HvcResult, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, PLAIN_FEATURES,
    Registers, feature, seen,
};
use crate::hyp::vcpu::Stop;
use crate::hyp::vm::VmKind;

/// A vCPU.
#[derive(Debug)]
pub(in crate::hyp) struct Vcpu {
    core: Arc<VmCore>,
}

impl Vcpu {
    pub(super) fn new(core: Arc<VmCore>) -> Self {
        Self { core }
    }

    /// Translates and acts at once, under the hypervisor's lock.
    pub(in crate::hyp) fn attempt<T>(
        &mut self,
        at: Ipa,
        access: Access,
        act: &mut impl FnMut(&Arena, Pa) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, Stop> {
        let VmCore { host, vmid, .. } = &*self.core;
        let done = host.gunyah.vcpu_act(*vmid, at, access, |pa| act(&host.arena, pa));
        done.map_err(|abort| match abort {
            Abort::External => Stop::Fault,
            Abort::NotRunning | Abort::Impossible => Stop::Invalid,
        })
    }

    /// A call that is not about sharing a page, or is not well formed. `None`: the VMM may know it.
    pub(in crate::hyp) fn call(&self, regs: Registers) -> Option<HvcResult> {
        let is_protected = self.core.kind() == VmKind::Protected;
        match seen(regs) {
            [FEATURES, ..] if is_protected => {
                let calls = [FEATURES, HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE];
                Some(HvcResult::value(calls.into_iter().fold(0, |all, id| all | feature(id))))
            }
            [FEATURES, ..] => Some(HvcResult::value(PLAIN_FEATURES)),
            [HYP_MEMINFO, 0, 0, 0] if is_protected => Some(HvcResult::value(PAGE_SIZE.get())),
            [HYP_MEMINFO | MEM_SHARE | MEM_UNSHARE, ..] if is_protected => {
                Some(HvcResult::INVALID_PARAMETER)
            }
            [HYP_MEMINFO | MEM_SHARE | MEM_UNSHARE | MEM_RELINQUISH, ..] => {
                Some(HvcResult::NOT_SUPPORTED)
            }
            _ => None,
        }
    }
}
