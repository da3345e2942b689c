//! Physical memory: arenas, their frames, and who has a claim to them.
//!
//! | file | holds |
//! |---|---|
//! | `bits` | bits, of which the first set one is found quickly |
//! | `buddy` | which frames are free |
//! | `ledger` | what is promised, and whether more can be |
//! | `dirty` | what waits for a scrub, and what is being scrubbed |
//! | `home` | where objects would like to be |
//! | `frames` | one part's frames, as arithmetic |
//! | `record` | the folios that are in use, and whose they are |
//! | `room` | growing what records are in |
//! | `account` | what a guest may take |
//! | `part` | a run of frames of one zone, and whose they are |
//! | `owner` | what an object is promised, and at whose expense |
//! | `state` | all parts, owners and accounts of a pool |
//! | `dedication` | whether a pool is one object's own |
//! | `reservation` | an object's promise |
//! | `scrub` | cleaning what comes back |
//! | `compact` | making room for a large folio |
//! | `pool` | the pool: backing and counters |
//! | `map` | which frame holds which folio of an object |
//! | `holes` | which pages of those folios are holes |
//! | `frames_only` | a pool without bytes, for benches |

mod account;
mod bits;
mod buddy;
mod compact;
mod dedication;
mod dirty;
mod frames;
#[cfg(feature = "oracle")]
pub mod frames_only;
mod holes;
mod home;
mod ledger;
mod map;
#[cfg(all(loom, feature = "loom"))]
pub mod modelled;
mod owner;
mod part;
mod pool;
mod record;
mod reservation;
mod room;
mod scrub;
mod state;

pub use account::{Account, AccountStat};
pub(crate) use bits::try_bits;
pub use compact::{Compaction, Obstacle};
#[cfg(feature = "oracle")]
pub(crate) use frames::naive::compare_frames;
pub(crate) use map::{Behind, FolioMap, Shape, Slot};
pub(crate) use owner::{Moved, Mover, Side};
pub use owner::{Placement, PrivatePlacement};
pub use part::Zone;
pub(crate) use pool::Claim;
pub use pool::{FolioPool, PoolBuilder, PoolStat, Unscrubbed};
pub use reservation::Commitment;
pub(crate) use reservation::{Reservation, Wanted};
pub use scrub::Scrubber;
