//! VMs that do anything, with any argument, as bytes say. The hypervisor and the resource manager answer, and the
//! rules hold after every step.
//!
//! | file | holds |
//! |---|---|
//! | `vms` | the machine and its VMs |
//! | `messages` | what they send, which could work, or is anything |
//! | `wire` | messages as bytes |
//! | `calls` | hypercalls with any registers |
//! | `paging` | memory that the host provides on demand |
//! | `touches` | loads and stores |
//! | `life` | VMs that come and go |
//! | `rules` | what one step may lead to, by name |
//! | `judge` | what a step may have changed, bytes included |
//! | `taint` | who was given what is in a frame |
//! | `flaw` | mistakes that the code can be made to seem to make |

mod calls;
mod flaw;
pub(super) mod judge;
mod life;
mod messages;
mod paging;
mod rules;
pub(super) mod taint;
mod touches;
mod vms;
pub(super) mod wire;

pub use flaw::Flaw;

use std::collections::BTreeMap;

use super::rm::Vmid;
use crate::addr::Pfn;
use crate::hyp::choices::Choices;
use crate::range::PfnRange;
use judge::{Snapshot, Zeroed};
use taint::Taint;
use vms::Vms;

/// Numbers that nobody should send, but for the smallest.
pub(super) const ODD: [u64; 16] = [
    0,
    1,
    0x1000,
    0x1001,
    0x20_0000,
    1 << 36,
    1 << 44,
    (1 << 44) - 0x1000,
    (1 << 48) - 0x1000,
    1 << 48,
    1 << 63,
    i64::MAX as u64,
    u64::MAX >> 12,
    u64::MAX - 0xfff,
    u64::MAX - 1,
    u64::MAX,
];

/// Each is a look at everything.
const MOST_STEPS: u64 = 400;

/// How often each kind of step was answered how, and how often a secret came to light in the one way it can.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    pub(crate) answers: BTreeMap<String, u64>,
    pub(crate) nr_leaks: u64,
}

/// What a step was, as far as it matters to what may have changed.
#[derive(Debug)]
struct Step {
    what: String,
    /// Nothing may have changed but bytes.
    refused: bool,
    zeroed: Zeroed,
    /// The only frames of which anything may have changed.
    within: Option<PfnRange>,
    /// The parcel whose tag stays although the message was refused, and the tag.
    tagged: Option<(u32, u32)>,
    touched: Option<Touched>,
}

/// A load or a store of the first bytes of a frame.
#[derive(Clone, Copy, Debug)]
struct Touched {
    pfn: Pfn,
    by: Vmid,
    value: u64,
    is_load: bool,
}

impl Step {
    /// One that changes nothing.
    fn named(what: String) -> Self {
        Self {
            what,
            refused: true,
            zeroed: Zeroed::None,
            within: None,
            tagged: None,
            touched: None,
        }
    }
}

impl Vms {
    fn step(&mut self, choices: &mut Choices<'_>, nth: u64) -> Step {
        match choices.below(20) {
            0..=8 => self.message(choices),
            9..=13 => self.touch(choices, nth),
            14 | 15 => self.life(choices),
            16 => self.page(choices),
            _ => self.hypercall(choices),
        }
    }
}

/// Does what the bytes say.
///
/// # Errors
/// The first step after which something was wrong, and what.
pub(crate) fn run(bytes: &[u8], flaw: Option<Flaw>) -> Result<Coverage, String> {
    let choices = &mut Choices::new(bytes, &ODD);
    let mut vms = Vms::boot()?;
    let mut taint = Taint::default();
    let mut coverage = Coverage::default();
    let mut before = vms.snapshot();
    for nth in 0..MOST_STEPS {
        if choices.is_empty() {
            break;
        }
        let step = vms.step(choices, nth);
        if let Some(flaw) = flaw {
            vms.gunyah.with(|world| flaw.spoil(world, &before, &step));
        }
        let after = vms.snapshot();
        if let Some((handle, tag)) = step.tagged {
            before.parcels.entry(handle).and_modify(|parcel| parcel.tag = Some(tag));
        }
        let change = rules::Change { before: &before, after: &after, step: &step };
        let wrong = rules::check(&change)
            .or_else(|| vms.gunyah.with(|world| world.check().into_iter().next()));
        if let Some(wrong) = wrong {
            if flaw.is_some() {
                vms.abandon();
            }
            return Err(format!("step {nth}, {}: {wrong}", step.what));
        }
        if let Err(wrong) = follow(&mut taint, &vms, &step, &before, &after) {
            if flaw.is_some() {
                vms.abandon();
            }
            return Err(format!("step {nth}, {}: {wrong}", step.what));
        }
        *coverage.answers.entry(step.what).or_default() += 1;
        before = after;
    }
    coverage.nr_leaks = taint.nr_returned;
    Ok(coverage)
}

fn follow(
    taint: &mut Taint,
    vms: &Vms,
    step: &Step,
    before: &Snapshot,
    after: &Snapshot,
) -> Result<(), String> {
    if let Zeroed::Exactly(frames) = &step.zeroed {
        taint.clear(frames);
    }
    if step.zeroed == Zeroed::Some {
        taint.forget_zeroes(before, after);
    }
    match step.touched {
        Some(Touched { pfn, by, value, is_load: true }) => taint.load(pfn, value, by)?,
        Some(Touched { pfn, by, value, is_load: false }) => taint.store(pfn, value, by, before),
        None => {}
    }
    if let Some(vmid) = vms.paged.vmid() {
        let runs = vms.paged.all_given().map(|given| given.run);
        let frames = runs.flat_map(|run| (0..run.nr_pages).map(move |nth| run.pfn.get() + nth));
        taint.provide(frames.map(Pfn::new), vmid);
    }
    taint.moved(before, after)
}
