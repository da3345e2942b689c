//! Guest memory for confidential VMs: shared and private pages side by side, inside huge folios that
//! stay whole.
//!
//! A VMM links this library to own its guests' memory. [`FolioPool`] is physical memory that several
//! guests draw from. [`GuestMemfd`] is one guest's memory: for every 4 KiB page it knows who may see
//! it and who has it pinned, and it [converts](GuestMemfd::convert) pages between the two sides in
//! place. A host that touches private memory gets an error from a checked access
//! ([`GuestMemfd::read`]), a `SIGBUS` through a [`HostView`], and never the data. [`hyp`] has a
//! simulated hypervisor that runs anywhere.
//!
//! | to do this | start here |
//! |---|---|
//! | allocate guest memory | [`FolioPool::new`], [`GuestMemfd::builder`] |
//! | change who may see pages | [`GuestMemfd::convert`] |
//! | let a device work on guest memory | [`GuestMemfd::pin`], or the `vm_memory` module |
//! | hand it out to an IOMMU for as long as a device exists | [`GuestMemfd::subscribe`], [`Subscriber`] |
//! | read and write it | [`GuestMemfd::read`], [`GuestMemfd::write`], [`GuestMemfd::map_view`] |
//! | move files into it and out of it | [`GuestMemfd::read_from_file`], [`GuestMemfd::write_to_file`] |
//! | lend it to another process | [`GuestMemfd::export`] |
//! | decide what becomes of a `SIGBUS` in a view | [`SigbusHandler::decide_by`] |
//! | run a protected guest without hardware for it | [`hyp`] |
//! | see what it looks like | [`GuestMemfd::stat`], [`GuestMemfd::snapshot`], [`render`] |
//! | make sure that all is well | [`audit::check`] |
//!
//! No function of this crate panics, whatever its arguments; errors are [`error::Error`], and each
//! maps to the errno that the kernel's guest_memfd gives in the same case. How it works inside, and
//! why, is in the `design` folder of the repository.

// Tests may do these; nothing that a caller, a guest or a file can reach may.
#![cfg_attr(
    not(test),
    deny(
        clippy::cast_possible_truncation,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

pub mod addr;
pub mod audit;
#[cfg_attr(not(test), expect(dead_code, reason = "until the pool uses all of it"))]
mod backing;
pub mod error;
#[cfg(not(feature = "oracle"))]
mod failpoint;
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub mod failpoint;
mod folio;
pub mod geometry;
mod gmem;
pub mod hyp;
mod identity;
#[cfg(feature = "oracle")]
pub mod oracle;
mod os;
pub mod range;
pub mod render;
pub mod stage2;
mod state;
mod sync;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;

#[cfg(all(loom, feature = "loom"))]
#[doc(hidden)]
pub use crate::folio::modelled as modelled_pool;
#[cfg(all(loom, feature = "loom"))]
#[doc(hidden)]
pub use crate::hyp::el2::modelled as modelled_el2;
#[cfg(any(feature = "oracle", all(loom, feature = "loom")))]
#[doc(hidden)]
pub use crate::state::modelled;

#[cfg(feature = "oracle")]
#[doc(hidden)]
pub use crate::folio::frames_only;
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub use crate::hyp::el2::el2_only;
#[cfg(feature = "oracle")]
#[doc(hidden)]
pub use crate::hyp::el2::guest_only;

pub use crate::backing::{ArenaBacking, HostOffer, Offer, PartReport, PartSpec, WhyKept};
pub use crate::folio::{
    Account, AccountStat, Commitment, Compaction, FolioPool, Obstacle, Placement, PoolBuilder,
    PoolStat, PrivatePlacement, Scrubber, Unscrubbed, Zone,
};
pub use crate::gmem::{
    Collapse, ContentPolicy, Conversion, ConvertOptions, Export, ExportedRegion, FilePlace,
    GuestMemfd, GuestMemfdBuilder, HandOutRun, HostView, Migration, ObjectStat, OnSilence,
    OwnerTag, PageInfo, PageStatus, PinGuard, PinMode, Punched, Residency, Sides, SubscribeOptions,
    Subscriber, Subscription, Touch, Transfer, ViewMapping, ViewOptions, ViewPath,
};
pub use crate::identity::{ObjectId, ViewId};
pub use crate::os::requirements;
pub use crate::os::sigbus::{FaultAnswer, FaultCause, FaultReason, HostFault, SigbusHandler};
pub use crate::state::{Ack, CancelToken, Heard, Standing, Visibility, Wait};
#[doc(hidden)]
pub use crate::sync::MODELLED;

/// The README's example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
