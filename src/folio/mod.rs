//! Physical memory: an arena, its frames, and who has a claim to them.
//!
//! | file | holds |
//! |---|---|
//! | `pool` | the pool: backing, reservations, counters, scrubbing |
//! | `buddy` | which frames are free |
//! | `map` | which frame holds which folio of an object |

mod buddy;
mod map;
mod pool;

pub(crate) use buddy::try_bits;
pub(crate) use map::{FolioMap, Shape, Slot};
pub(crate) use pool::{Claim, Reservation};
pub use pool::{FolioPool, PoolStat, Unscrubbed};
