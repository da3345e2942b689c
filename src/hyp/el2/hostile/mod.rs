//! A host and guests that do anything, with any argument, as bytes say. EL2 answers, and the rules hold after every step.
//!
//! | file | holds |
//! |---|---|
//! | `choices` | bytes as choices |
//! | `host` | the machine and its kernel, which sends what could work, or anything |
//! | `flaw` | mistakes that EL2 can be made to seem to make |

mod choices;
mod flaw;
mod host;

pub use flaw::Flaw;

use std::collections::BTreeMap;

use super::access::{Bytes, GuestStop, KernelOutcome};
use super::guest_call::{
    FEATURES, GuestAnswer, HYP_MEMINFO, MEM_RELINQUISH, MEM_SHARE, MEM_UNSHARE, NO_POISON, id,
};
use super::host_call::HostCall;
use super::invariants::trace::{self, Kind, Snapshot};
use super::{Pages, Profile};
use crate::addr::{Ipa, Pa};
use crate::error::Errno;

use choices::Choices;
use host::{Host, NR_CPUS};

/// Each is a look at everything.
const MOST_STEPS: u64 = 400;

/// How often each call was answered how.
pub(crate) type Answers = BTreeMap<String, u64>;

#[derive(Debug)]
struct Step {
    what: String,
    kind: Kind,
}

/// Does what the bytes say.
///
/// # Errors
/// The first step after which something was wrong, and what.
pub(crate) fn run(profile: Profile, bytes: &[u8], flaw: Option<Flaw>) -> Result<Answers, String> {
    let mut host = Host::boot(profile).map_err(|errno| format!("boot: {errno}"))?;
    let choices = &mut Choices::new(bytes);
    let mut answers = Answers::new();
    let mut before = Snapshot::of_heads(&host.el2);
    for nth in 0..MOST_STEPS {
        if choices.is_empty() {
            break;
        }
        let remembered = flaw.map(|flaw| flaw.remember(&host.el2));
        let step = host.step(choices, nth);
        if let (Some(flaw), Some(remembered)) = (flaw, remembered) {
            flaw.spoil(&host.el2, &before, remembered, step.kind);
        }
        let after = Snapshot::of_heads(&host.el2);
        let seen = trace::Step { before: &before, after: &after, el2: &host.el2, kind: step.kind };
        if let Some(wrong) = seen.wrong() {
            return Err(format!("step {nth}, {}, {:?}: {wrong}", step.what, step.kind));
        }
        *answers.entry(step.what).or_default() += 1;
        before = after;
    }
    Ok(answers)
}

/// Calls that take from a vCPU's list before they fail.
fn may_take_first(call: HostCall) -> bool {
    use HostCall::{DonateGuest, DonateSglistGuest, ShareGuest, SplitGuest};
    matches!(call, DonateGuest | DonateSglistGuest | ShareGuest | SplitGuest)
}

fn said<T, E>(what: &str, answer: &Result<T, E>, done: Kind) -> Step {
    match answer {
        Ok(_) => Step { what: format!("{what} Ok"), kind: done },
        Err(_) => Step { what: format!("{what} refused"), kind: Kind::Refused },
    }
}

impl Host {
    fn step(&mut self, choices: &mut Choices<'_>, nth: u64) -> Step {
        let cpu = choices.index(NR_CPUS);
        match choices.below(16) {
            0..=7 => self.host_calls(choices, cpu),
            8 | 9 => self.guest_calls(choices, cpu),
            10 | 11 => self.vcpu_touches(choices, cpu, nth),
            12 | 13 => self.host_touches(choices, cpu, nth),
            14 => self.others(choices),
            _ => self.life(choices, cpu),
        }
    }

    fn host_calls(&mut self, choices: &mut Choices<'_>, cpu: usize) -> Step {
        if choices.one_in(16) {
            let x = [0; 5].map(|_: u64| choices.odd());
            // Nearly never a call at all.
            let [status, _] = self.el2.host_call(cpu, x);
            return Step { what: format!("any number: {status:#x}"), kind: Kind::Done };
        }
        let call = self.call_for(choices, cpu);
        if may_take_first(call) && choices.one_in(4) {
            let at = self.el2.with_vcpu(cpu, |loaded| Ok(loaded.vcpu.host_at));
            at.and_then(|at| self.top_up(at, 6)).ok();
        }
        if call == HostCall::DonateSglistGuest {
            self.list(choices, cpu);
        }
        let x = self.arguments(choices, call);
        match self.el2.call(cpu, call, x) {
            Ok(_) => {
                let is_list = call == HostCall::DonateSglistGuest;
                let kind = if is_list { Kind::Listed } else { Kind::Done };
                Step { what: format!("{call:?} Ok"), kind }
            }
            Err(errno) => {
                let kind = match call {
                    HostCall::InitVm | HostCall::InitVcpu => Kind::RefusedAfterClearing,
                    call if may_take_first(call) => Kind::RefusedAfterRefill,
                    _ => Kind::Refused,
                };
                Step { what: format!("{call:?} {errno}"), kind }
            }
        }
    }

    fn guest_calls(&self, choices: &mut Choices<'_>, cpu: usize) -> Step {
        let asked = choices.of(&[MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH, FEATURES, HYP_MEMINFO]);
        let within = if choices.one_in(8) { 8 } else { 0 };
        // Nobody looks at the upper half.
        let above = if choices.one_in(8) { choices.odd() << 32 } else { 0 };
        let mut x =
            [asked | above, self.gfn_of_guest(choices, cpu).wrapping_shl(12) | within, 0, 0];
        match asked {
            MEM_SHARE | MEM_UNSHARE if self.el2.profile.is_android() => {
                x[2] = choices.of(&[0, 0, 0, 0, 1, 2, 3, 512]);
            }
            MEM_RELINQUISH if self.el2.profile.is_android() => {
                x[3] = choices.of(&[0, 0, 0, NO_POISON])
            }
            _ => {}
        }
        if choices.one_in(4) {
            let nth = choices.index(4);
            x[nth] = choices.odd();
        }
        let (how, kind) = match self.el2.guest_call(cpu, x) {
            Ok(GuestAnswer::Resume([answer, ..])) if answer > u64::MAX >> 1 => {
                ("refused", Kind::Refused)
            }
            Ok(GuestAnswer::Resume(_)) if (id(x), x[3]) == (MEM_RELINQUISH, NO_POISON) => {
                ("Ok, as it was", Kind::GivenUpAsItWas)
            }
            Ok(GuestAnswer::Resume(_)) => ("Ok", Kind::Done),
            Ok(GuestAnswer::Exit(_)) => ("exit", Kind::Refused),
            Ok(GuestAnswer::Fault(_)) => ("fault", Kind::Refused),
            Ok(GuestAnswer::WantsSplit(_)) => ("wants split", Kind::Refused),
            Ok(GuestAnswer::WantsMemory) => ("wants memory", Kind::Refused),
            Err(_) => ("no vCPU", Kind::Refused),
        };
        Step { what: format!("guest's {:#x} {how}", id(x)), kind }
    }

    fn vcpu_touches(&self, choices: &mut Choices<'_>, cpu: usize, nth: u64) -> Step {
        let within = choices.of(&[0, 0, 0, 1, 4095]);
        let ipa = Ipa::new(self.gfn_of_guest(choices, cpu).wrapping_shl(12) | within);
        let mut buf = nth.to_le_bytes();
        let answer = match choices.one_in(3) {
            true => self.el2.vcpu(cpu, ipa, Bytes::Load(&mut buf)),
            false => self.el2.vcpu(cpu, ipa, Bytes::Store(&buf)),
        };
        if answer == Err(GuestStop::Broken) {
            return Step { what: "vCPU broken memory".into(), kind: Kind::Done };
        }
        said("vCPU", &answer, Kind::GuestStored)
    }

    fn host_touches(&self, choices: &mut Choices<'_>, cpu: usize, nth: u64) -> Step {
        let within = choices.of(&[0, 0, 0, 1, 4095]);
        let at = Pa::new(self.frame_to_touch(choices).wrapping_shl(12) | within);
        let is_load = choices.one_in(3);
        let mut buf = nth.to_le_bytes();
        let kind = Kind::HostReached(at.pfn());
        let mut load = [0; 8];
        let bytes = if is_load { Bytes::Load(&mut load) } else { Bytes::Store(&buf) };
        match choices.below(8) {
            0..=2 => said("user space", &self.el2.user(cpu, at, bytes), kind),
            3 | 4 => said("uaccess", &self.el2.uaccess(cpu, at, bytes), kind),
            5 | 6 => {
                buf[7] = 0xd;
                let bytes = if is_load { Bytes::Load(&mut load) } else { Bytes::Store(&buf) };
                said("device", &self.el2.dma(at, bytes), Kind::DeviceStored)
            }
            _ => {
                let outcome = self.el2.kernel_alias(cpu, at, bytes);
                let kind = match outcome {
                    KernelOutcome::Done => kind,
                    KernelOutcome::DoneAfterReclaim => Kind::HostDestroyed(at.pfn()),
                    // It may have destroyed something, and then found that the bytes are of two pages.
                    KernelOutcome::Oops | KernelOutcome::Stuck => Kind::Done,
                };
                Step { what: format!("kernel {outcome:?}"), kind }
            }
        }
    }

    /// The secure world, and devices behind the IOMMU.
    fn others(&self, choices: &mut Choices<'_>) -> Step {
        if choices.one_in(16) {
            return said("wipe", &self.el2.wipe_firmware(), Kind::Done);
        }
        let mut at = [host::frame(choices), host::nr(choices)];
        if choices.one_in(2) {
            at[choices.index(2)] = choices.odd();
        }
        let pages = Pages::checked(at[0], at[1]);
        match choices.below(5) {
            0 => said("FF-A share", &self.el2.ffa_share(at[0], at[1]), Kind::Done),
            4 => said("FF-A donate", &self.el2.ffa_donate(at[0], at[1]), Kind::Done),
            1 => said("FF-A reclaim", &self.el2.ffa_reclaim(at[1]), Kind::Done),
            2 => said("DMA map", &pages.and_then(|pages| self.el2.map_dma(pages)), Kind::Done),
            _ => said("DMA unmap", &pages.and_then(|pages| self.el2.unmap_dma(pages)), Kind::Done),
        }
    }

    fn life(&mut self, choices: &mut Choices<'_>, cpu: usize) -> Step {
        let answer: Result<(), Errno> = match choices.below(6) {
            0 => {
                self.lie(choices);
                return Step { what: "lie".into(), kind: Kind::Refused };
            }
            1 => {
                let at = choices.index(self.guests.len());
                self.replace(at, !choices.one_in(4), choices.one_in(2));
                return Step { what: "another VM".into(), kind: Kind::Many };
            }
            2 | 3 => self.el2.call(cpu, HostCall::VcpuPut, [0; 4]).map(drop),
            _ => {
                let (guest, idx) = (choices.of(&self.guests), choices.below(2));
                self.el2.call(cpu, HostCall::VcpuLoad, [guest.handle, idx, 0, 0]).map(drop)
            }
        };
        said("load or put", &answer, Kind::Refused)
    }
}
