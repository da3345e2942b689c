//! The same for pools: who has which frames, what is promised and charged, and which calls must fail.
//!
//! Where a folio comes to lie is the pool's business. The model looks where it lies, and then insists: the
//! frames were free, of a zone that the object may have there, aligned, and nobody's else; and whether there
//! is one at all follows from counting. One step that fails or succeeds is known exactly; of several
//! folios taken by one call that fails, only that they are not needed to fail (nor able not to).
//!
//! | file | holds |
//! |---|---|
//! | `action` | the actions, and what their numbers mean |
//! | `frames` | every frame as an entry of a list, and the promises |
//! | `object` | what the model knows of an object and of an account |
//! | `model` | what a call does and answers |
//! | `moves` | the calls that move folios |
//! | `mistake` | rules that the model can be told to get wrong |
//! | `look` | the comparison |
//! | `run` | what drives it |

mod action;
mod frames;
mod look;
mod mistake;
mod model;
mod moves;
mod object;
mod run;

pub use action::{Amount, FrameClaim, Limit, PoolAction, Zones};
pub use mistake::PoolMistake;
pub use run::{
    PoolCoverage, PoolDisagreement, PoolInspect, compare_frames, run_pool, run_pool_mistaken,
    shrink_pool,
};
