//! What is said of a fault, and what is answered.

use libc::c_int;

use crate::addr::{Hva, Offset};
use crate::identity::{ObjectId, ViewId};

/// The `si_code` of a `SIGBUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultCause {
    /// `BUS_ADRERR`: nothing is mapped there; the page is private or absent.
    NotMapped,
    /// `BUS_MCEERR_AR`: the memory itself failed.
    MemoryFailure,
    /// Something else.
    Other,
}

impl FaultCause {
    pub(in crate::os) fn of(si_code: u64) -> Self {
        match c_int::try_from(si_code) {
            Ok(libc::BUS_ADRERR) => Self::NotMapped,
            Ok(libc::BUS_MCEERR_AR) => Self::MemoryFailure,
            _ => Self::Other,
        }
    }
}

/// Why a touch of a view is a `SIGBUS` (or a `SIGSEGV`, while a folio comes), by what the library knows of the page a moment after. Another
/// thread may have changed that meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultReason {
    /// The memory itself failed.
    MemoryFailure,
    /// The page is kept out of use since a failure.
    Quarantined,
    /// The page is private to the guest, or being converted, punched or moved.
    Private,
    /// The page is shared and has no folio.
    Absent,
    /// The page is shared and was punched out of its folio.
    Hole,
    /// The page is shared and there. It has become so since the touch, or the view does not show it: on hugetlb
    /// because a neighbour is not shared, elsewhere because the kernel had no room for the entry.
    NotShown,
}

/// A `SIGBUS` in a view, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostFault {
    /// The object whose memory was touched: [`GuestMemfd::id`](crate::GuestMemfd::id).
    pub object: ObjectId,
    /// The view in which it was: [`HostView::id`](crate::HostView::id).
    pub view: ViewId,
    /// The address that was touched, as the kernel reports it.
    pub hva: Hva,
    /// Where in the object that is.
    pub offset: Offset,
    /// What the kernel gave as the reason.
    pub cause: FaultCause,
    /// What the library knows of the page.
    pub reason: FaultReason,
}

/// What is to become of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// The instruction runs again. If nothing has changed it faults again.
    Retry,
    /// The handler that stood before gets it; without one the process dies.
    PassOn,
}
