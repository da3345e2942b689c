//! Guest memory for confidential VMs.

pub mod addr;
pub mod audit;
mod backing;
pub mod error;
mod folio;
pub mod geometry;
mod gmem;
mod os;
pub mod range;
pub mod stage2;
mod state;
mod sync;

#[cfg(all(loom, feature = "loom"))]
#[doc(hidden)]
pub use crate::state::modelled;

pub use crate::folio::{ArenaBacking, FolioPool, PoolStat, Unscrubbed};
pub use crate::gmem::{
    ContentPolicy, Conversion, FaultCause, GuestMemfd, GuestMemfdBuilder, HostFault, HostView,
    ObjectStat, OwnerTag, PageInfo, PageStatus, PinGuard, PinMode, Residency, Touch,
};
pub use crate::os::sigbus::SigbusHandler;
pub use crate::state::Visibility;
#[doc(hidden)]
pub use crate::sync::MODELLED;
