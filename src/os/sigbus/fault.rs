//! What is said of a fault, and what is answered.

use libc::c_int;

use crate::addr::{Hva, Offset};
use crate::identity::{ObjectId, ViewId};

/// What the kernel says of a fault: the signal and its `si_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultCause {
    /// `BUS_ADRERR`: nothing is mapped there; the page is private or absent.
    NotMapped,
    /// `BUS_MCEERR_AR`: the memory itself failed.
    MemoryFailure,
    /// `SIGSEGV`, `SEGV_ACCERR`: something is mapped there that is not to be touched. A folio was coming, and is there a moment
    /// later; or somebody else has called `mprotect`, and it stays so.
    Inaccessible,
    /// Something else.
    Other,
}

impl FaultCause {
    /// Signal and `si_code` in one register: never 0, which stands for no fault.
    pub(in crate::os) fn code(signal: c_int, si_code: c_int) -> u64 {
        u64::from(signal.unsigned_abs()) << 32 | u64::from(si_code.unsigned_abs())
    }

    /// By its [`code`](Self::code).
    pub(in crate::os) fn of(code: u64) -> Self {
        [
            (libc::SIGBUS, libc::BUS_ADRERR, Self::NotMapped),
            (libc::SIGBUS, libc::BUS_MCEERR_AR, Self::MemoryFailure),
            (libc::SIGSEGV, SEGV_ACCERR, Self::Inaccessible),
        ]
        .into_iter()
        .find(|&(signal, si_code, _)| Self::code(signal, si_code) == code)
        .map_or(Self::Other, |(.., cause)| cause)
    }
}

/// Of asm-generic/siginfo.h; libc has no name for it.
pub(super) const SEGV_ACCERR: c_int = 2;

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
