//! Physical memory: an arena, its frames, and who has a claim to them.
//!
//! | file | holds |
//! |---|---|
//! | `pool` | the pool: backing, reservations, counters, scrubbing |
//! | `buddy` | which frames are free |
//! | `map` | which frame holds which folio of an object |
//! | `holes` | which pages of those folios are holes |

mod buddy;
mod holes;
mod map;
mod pool;

pub(crate) use buddy::try_bits;
pub(crate) use map::{Behind, FolioMap, Shape, Slot};
pub use pool::{ArenaBacking, FolioPool, PoolStat, Unscrubbed};
pub(crate) use pool::{Claim, Reservation};
