//! The `SIGBUS` handler: what the library's own instructions run into is recovered from, what views are
//! touched with is decoded for whoever asked, and all else goes to whatever handler stood before.
//!
//! It stands for `SIGSEGV` as well, which is how a fault is reported in the moment in which a folio comes to its place
//! in a view.
//!
//! | file | holds |
//! |---|---|
//! | `fault` | what is said of a fault, and what is answered |
//! | `stand` | getting the handler in front of others, and handing on to them |
//! | `views` | the views of the process, as a handler finds them |
//! | `mask` | whether a thread lets the signal through |

// UNSAFETY: touches a byte of a mapping that may fault.
#![expect(unsafe_code, reason = "the touch goes through a raw pointer")]

mod fault;
pub(super) mod mask;
mod stand;
pub(crate) mod views;

use libc::c_int;

use crate::addr::Access;
use crate::os::mapping::Mapping;
use crate::os::recoverable::{self, Fault};

pub use fault::{FaultAnswer, FaultCause, FaultReason, HostFault};
pub use stand::SigbusHandler;
pub(crate) use stand::stand_once;

/// The signals by which a view says that a page is not to be touched.
const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// Why a touch has no byte to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotTouched {
    OutOfRange,
    SignalPending,
    Fault(Fault),
}

impl SigbusHandler {
    /// Loads the byte at `at` of the mapping, or stores it back unchanged.
    pub(crate) fn touch(self, map: &Mapping, at: usize, access: Access) -> Result<u8, NotTouched> {
        if at >= map.len() {
            return Err(NotTouched::OutOfRange);
        }
        let target = map.base().as_ptr().wrapping_add(at);
        // A fault while the signal is blocked kills the process, whatever the handler.
        if mask::is_pending(&SIGNALS) {
            return Err(NotTouched::SignalPending);
        }
        let blocked = mask::unblock(&SIGNALS);
        // SAFETY: 1. `self` says that a handler stands. 2. `at` is inside of the mapping, and nobody has
        // references into one.
        let touched = unsafe { recoverable::touch(target, access) };
        mask::restore(&blocked);
        touched.map_err(NotTouched::Fault)
    }
}
