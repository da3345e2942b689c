//! The fd-like object: the only door to a guest's memory.
//!
//! | file | holds |
//! |---|---|
//! | `object` | the object: creating it, its size and counters, what it looks like now |
//! | `allocate` | where folios come by the VMM's wish |
//! | `punch` | where memory goes back: hole punching |
//! | `convert` | where a conversion is ordered, step by step |
//! | `migrate` | a folio moves to other frames |
//! | `collapse` | the kernel makes huge pages of folios |
//! | `poison` | memory that failed |
//! | `pin` | where a pin is taken, and by whom |
//! | `access` | checked reads, writes and atomics of the host |
//! | `export` | memory that another process maps |
//! | `file_io` | files straight into guest memory, and back |
//! | `host_view` | the object mapped into the VMM, where private memory faults |
//! | `view_options` | how a view is to be made |
//! | `shown` | which pages and blocks of a view are shown |
//! | `view_map` | what of a view can be touched, and how it is made so |
//! | `view_edge` | the same where it cannot be done for a run at once |
//! | `subscriber` | those who are told which pages they may let others at |
//! | `handout` | what they are given: runs of pages with their frames |
//! | `revoke` | taking pages back from them, and giving them |
//! | `guest_fault` | the door for hypervisors: memslots, and the faults of guests |
//! | `invariants` | what must hold of an object: its part of the audit |
//! | `layout` | what all of these change together: folios, views and bindings, under one lock |

mod access;
mod allocate;
mod collapse;
mod convert;
mod export;
mod file_io;
mod guest_fault;
mod handout;
mod host_view;
mod invariants;
mod layout;
mod migrate;
mod object;
mod pin;
mod poison;
mod punch;
mod revoke;
mod shown;
mod subscriber;
mod view_edge;
mod view_map;
mod view_options;

pub use collapse::Collapse;
pub use convert::{ContentPolicy, Conversion, ConvertOptions};
pub use export::{Export, ExportedRegion};
pub use file_io::{FilePlace, Transfer};
pub(crate) use guest_fault::{BindingId, Unbound};
pub use handout::HandOutRun;
pub(crate) use handout::leaves;
pub use host_view::{HostView, Touch};
pub use migrate::Migration;
pub use object::{
    GuestMemfd, GuestMemfdBuilder, ObjectStat, PageInfo, PageStatus, Residency, Sides,
};
pub use pin::{OwnerTag, PinGuard, PinMode};
pub use punch::Punched;
pub use subscriber::{OnSilence, SubscribeOptions, Subscriber, Subscription};
pub use view_options::{ViewMapping, ViewOptions, ViewPath};
