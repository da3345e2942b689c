//! The state of every subpage: a tree of words, pure rules for a word, and grace periods for accesses
//! too short to be written down in one.
//!
//! | file | holds |
//! |---|---|
//! | `word` | the bits of a word, and nothing that changes them |
//! | `rules` | every change there is, as a pure function |
//! | `cell` | the word as an atomic |
//! | `shape` | how an object is cut into blocks, and where their words lie |
//! | `tree` | which word speaks for a page; the compare-and-swap loop; pins |
//! | `freeze` | how a conversion gets hold of ranges: all or nothing, at once or with time to wait |
//! | `frozen` | what it holds then, how that is merged and given back |
//! | `frozen_block` | the same for one block that stays one |
//! | `trim` | parts that are alike become one again; tables go back to the host |
//! | `barrier` | a fence that is cheap for whoever needs it often |
//! | `epoch` | grace periods: who is inside an access right now |
//! | `holders` | who holds which pins, for whoever asks |
//! | `waiting` | sleeping until something becomes possible; deadlines and cancellation |
//! | `line` | asking a subscriber to let go, and its answer |
//! | `process` | the process's one epoch domain, a reader for each thread |
//! | `flaw` | mistakes that models seed |

#![cfg_attr(
    not(any(feature = "oracle", all(loom, feature = "loom"))),
    expect(unreachable_pub, reason = "public for models and benches, and only in their builds")
)]

mod barrier;
mod cell;
mod epoch;
mod flaw;
mod freeze;
mod frozen;
mod frozen_block;
mod holders;
mod line;
mod process;
mod rules;
mod shape;
mod tree;
mod trim;
mod waiting;
mod word;

pub(crate) use epoch::{Domain, Reader};
pub(crate) use flaw::{Flaw, seeded};
pub(crate) use freeze::Wanted;
pub(crate) use frozen::Frozen;
pub(crate) use frozen_block::FrozenBlock;
pub(crate) use holders::{ObjectId, OwnerId, Record};
pub use line::{Ack, Heard, Standing};
pub(crate) use line::{Line, Outcome, Question};
pub(crate) use process::{Local, each_holder, enter_section, waiters, with_local, with_reader};
pub(crate) use rules::Refusal;
pub(crate) use shape::Shape;
pub(crate) use tree::{Stop, Tree};
pub use waiting::{CancelToken, Wait};
pub use word::Visibility;
pub(crate) use word::{Phase, Word};

/// What the loom models drive, and the benches that measure state alone: exactly the types that the
/// object uses.
#[cfg(any(feature = "oracle", all(loom, feature = "loom")))]
pub mod modelled {
    #[cfg(all(loom, feature = "loom"))]
    pub use super::cell::LoneWord;
    pub use super::epoch::{Domain, Reader, Section};
    #[cfg(all(loom, feature = "loom"))]
    pub use super::flaw::{Flaw, seed};
    pub use super::freeze::Wanted;
    pub use super::frozen::Frozen;
    pub use super::frozen_block::FrozenBlock;
    pub use super::holders::{Holders, ObjectId, OwnerId, Record, Records};
    pub use super::line::{Ack, Heard, Line, Outcome, Question, Standing};
    pub use super::rules::Refusal;
    pub use super::shape::Shape;
    pub use super::tree::{Counted, Stop, Tree};
    pub use super::waiting::{CancelToken, Wait, Waiters};
    pub use super::word::{AnyWord, Phase, Visibility, Word};
}
