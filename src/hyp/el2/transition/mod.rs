//! The ways between states. Each is a function: every check, in the original's order, the first that fails says
//! which errno; then changes that cannot fail. Tables for them are set aside as the last check.
//!
//! | file | who gives to whom |
//! |---|---|
//! | `hyp` | the host to EL2: shares, pins, donations |
//! | `ffa` | the host to the secure world |
//! | `np` | the host to a guest that is not protected |
//! | `pvm` | the host to a protected guest, and what that guest does with it |
//! | `run` | the same with more than a page at once, as Android's guests do |
//! | `list` | the host to a protected guest, a list at once, as Android's host does |
//! | `reclaim` | back to the host: of a dying guest, or by force |
//!
//! Each takes what the locks guard, so a caller that has not locked cannot call.

mod ffa;
mod hyp;
mod list;
mod np;
mod pvm;
mod reclaim;
mod run;

pub(crate) use ffa::Ffa;
pub(crate) use hyp::{
    donate_host, donate_hyp, pin, share_hyp, unpin, unshare_hyp, unuse_dma, use_dma,
};
pub(crate) use list::donate_list;
pub(crate) use np::{
    Age, NpRange, make_young, relax, share_guest, test_young, unshare_guest, wrprotect,
};
pub(crate) use pvm::{
    Relinquished, donate_guest, guest_share_host, guest_unshare_host, relinquish, split_guest,
};
pub(crate) use reclaim::{force_reclaim, force_reclaim_target, is_poison_fault, reclaim_dying};
pub(crate) use run::{Stop, guest_share_run, guest_unshare_run};

use super::host_mmu::HostMmu;
use super::profile::Profile;
use super::{Pages, State};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;

/// Frame numbers are shifted to addresses first, and the upper bits are lost: so they are here.
const FRAME_BITS: u64 = (1 << 52) - 1;

/// The frame that a number in a register means.
pub(crate) const fn frame(raw: u64) -> Pfn {
    Pfn::new(raw & FRAME_BITS)
}

/// The same for a guest's.
pub(crate) const fn guest_frame(raw: u64) -> Gfn {
    Gfn::new(raw & FRAME_BITS)
}

/// Whether no device uses pages of the host's, which only profiles with an IOMMU know.
///
/// # Errors
/// `EINVAL`.
fn no_dma(host: &HostMmu, pages: Pages) -> Result<(), Errno> {
    match host.pages.all(pages, |page| page.nr_pins == 0) {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

/// Whether the host may give pages to a guest.
///
/// # Errors
/// `EINVAL` or `EPERM` for what is no memory (in Android's profile always `EINVAL` for a device's); `EPERM` unless
/// they are the host's alone; `EINVAL` while a device uses them.
fn check_given(profile: Profile, host: &HostMmu, pages: Pages) -> Result<(), Errno> {
    if profile.is_android() && !host.machine().is_memory(pages.start()) {
        return Err(Errno::EINVAL);
    }
    host.check_state(pages, State::Owned)?;
    no_dma(host, pages)
}

/// Compares what a transition touched with the specification, in builds that have one.
#[cfg(debug_assertions)]
fn touched(host: &HostMmu, pages: Pages) {
    for pfn in pages.iter() {
        assert_eq!(super::invariants::frame_refines(host, pfn), None);
    }
}

#[cfg(not(debug_assertions))]
fn touched(_: &HostMmu, _: Pages) {}
