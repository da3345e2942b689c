//! The ways between states. Each is a function: every check, in the original's order, the first that fails says
//! which errno; then changes that cannot fail. Tables for them are set aside as the last check.
//!
//! | file | who gives to whom |
//! |---|---|
//! | `hyp` | the host to EL2: shares, pins, donations |
//! | `ffa` | the host to the secure world |
//! | `np` | the host to a guest that is not protected |
//! | `pvm` | the host to a protected guest, and what that guest does with it |
//! | `reclaim` | back to the host: of a dying guest, or by force |
//!
//! Each takes what the locks guard, so a caller that has not locked cannot call.

mod ffa;
mod hyp;
mod np;
mod pvm;
mod reclaim;

pub(crate) use ffa::Ffa;
pub(crate) use hyp::{donate_host, donate_hyp, pin, share_hyp, unpin, unshare_hyp};
#[cfg(any(test, feature = "oracle"))]
pub(crate) use hyp::{unuse_dma, use_dma};
pub(crate) use np::{
    Age, NpRange, make_young, relax, share_guest, test_young, unshare_guest, wrprotect,
};
pub(crate) use pvm::{donate_guest, guest_share_host, guest_unshare_host, relinquish, split_guest};
pub(crate) use reclaim::{force_reclaim, force_reclaim_target, is_poison_fault, reclaim_dying};

use super::Pages;
use super::host_mmu::HostMmu;
use crate::addr::{Gfn, Pfn};

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

/// Compares what a transition touched with the specification, in builds that have one.
#[cfg(debug_assertions)]
fn touched(host: &HostMmu, pages: Pages) {
    for pfn in pages.iter() {
        assert_eq!(super::invariants::frame_refines(host, pfn), None);
    }
}

#[cfg(not(debug_assertions))]
fn touched(_: &HostMmu, _: Pages) {}
