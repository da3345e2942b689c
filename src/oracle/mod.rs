//! The oracle: a naive model of the library, and a language of actions to drive both.
//!
//! Property tests and fuzzers share it: any bytes become a list of [`Action`]s, [`run()`] does them on
//! real memory and on the model, and compares every answer (errors by kind, errno, range and
//! culprit) and, after every action, everything that can be seen from outside.
//!
//! What it does not cover: more than one thread, guests and hypervisors (`host` has them), hosts that run out of
//! memory.
//!
//! | file | holds |
//! |---|---|
//! | `action` | the actions, and what their numbers mean |
//! | `step` | an action with its claims settled |
//! | `model`, `object`, `ledger` | the model: rules, pages, frames |
//! | `mistake` | rules that the model can be told to get wrong |
//! | `facts` | what the model says of itself |
//! | `answer` | what a call answers, whoever answers it |
//! | `real` | the same steps on the library |
//! | `compare`, `run` | the comparison, and what drives it |
//! | `pool` | the same for pools that several objects draw from |
//! | `host` | the same for the host's side of one object: views, exports, memslots, subscribers |

mod action;
mod answer;
mod compare;
mod facts;
mod host;
mod ledger;
mod mistake;
mod model;
mod object;
mod pool;
mod real;
mod run;
mod shrink;
mod step;

pub use action::{Action, ByteClaim, Door, Patience, Question, RangeClaim, SizeClaim, ViewChange};
pub use host::{
    GuestAct, HostAction, HostCoverage, HostDisagreement, HostInspect, HostMistake, Mood, Silence,
    Spot, Terms, Time, run_host, run_host_mistaken, shrink_host,
};
pub use mistake::Mistake;
pub use pool::{
    Amount, FrameClaim, Limit, PoolAction, PoolCoverage, PoolDisagreement, PoolInspect,
    PoolMistake, Zones, compare_frames, run_pool, run_pool_mistaken, shrink_pool,
};
pub use run::{Coverage, Disagreement, Inspect, run, run_inspected, run_mistaken, shrink};
