//! The state of every subpage: one word each, pure rules for it, one loop that applies them, and
//! grace periods for accesses too short to be written down in it.
//!
//! | file | holds |
//! |---|---|
//! | `word` | the bits of a word, and nothing that changes them |
//! | `rules` | every change there is, as a pure function |
//! | `cell` | the word as an atomic, and the only compare-and-swap loop |
//! | `table` | the words of an object; ranges, all or nothing |
//! | `epoch` | grace periods: who is inside an access right now |
//! | `section` | the process's one epoch domain, a reader for each thread |

#![cfg_attr(
    not(all(loom, feature = "loom")),
    expect(unreachable_pub, reason = "public for the loom models, and only in their build")
)]

mod cell;
mod epoch;
mod rules;
mod section;
mod table;
mod word;

pub(crate) use rules::Refusal;
pub(crate) use section::{in_section, wait_for_sections};
pub(crate) use table::{Frozen, Stop, Table};
pub use word::Visibility;
pub(crate) use word::{Phase, Word};

/// What the loom models drive: exactly the types that the object uses.
#[cfg(all(loom, feature = "loom"))]
pub mod modelled {
    pub use super::cell::StateCell;
    pub use super::epoch::{Domain, Reader};
    pub use super::rules::Refusal;
    pub use super::table::{Frozen, Stop, Table};
    pub use super::word::{Phase, Visibility, Word};
}
