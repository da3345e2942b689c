//! Physical memory: arenas, their frames, and who has a claim to them.
//!
//! | file | holds |
//! |---|---|
//! | `bits` | bits, of which the first set one is found quickly |
//! | `buddy` | which frames are free |
//! | `ledger` | what is promised, and whether more can be |
//! | `home` | where objects would like to be |
//! | `frames` | one arena's frames, as arithmetic |
//! | `record` | the folios that are in use, and whose they are |
//! | `account` | what a guest may take |
//! | `state` | all arenas, owners and accounts of a pool |
//! | `reservation` | an object's promise |
//! | `scrub` | cleaning what comes back |
//! | `compact` | making room for a large folio |
//! | `pool` | the pool: backing and counters |
//! | `map` | which frame holds which folio of an object |
//! | `holes` | which pages of those folios are holes |

mod account;
mod bits;
mod buddy;
mod compact;
mod frames;
mod holes;
mod home;
mod ledger;
mod map;
mod pool;
mod record;
mod reservation;
mod scrub;
mod state;

pub use account::{Account, AccountStat};
pub(crate) use bits::try_bits;
pub use compact::{Compaction, Obstacle};
pub(crate) use map::{Behind, FolioMap, Shape, Slot};
pub(crate) use pool::Claim;
pub use pool::{FolioPool, PoolBuilder, PoolStat, Unscrubbed};
pub use reservation::Commitment;
pub(crate) use reservation::{Reservation, Wanted};
pub use scrub::Scrubber;
pub(crate) use state::{Mover, Side};
pub use state::{PrivatePlacement, Zone};
