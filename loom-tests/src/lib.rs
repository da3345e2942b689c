//! What the models in `tests/models` share: how a model is explored, how a seeded race is proved to
//! be found, and the small world that both act on.
//!
//! | file | holds |
//! |---|---|
//! | `explore` | bounds, execution counts, and what a canary must die of |
//! | `memory` | the judge: bytes that loom watches |
//! | `world` | words, readers and bytes of an object, and the steps of a conversion |

#[cfg(not(loom))]
compile_error!("the models need RUSTFLAGS=\"--cfg loom\"; without it they would test nothing");

#[cfg(loom)]
mod explore;
#[cfg(loom)]
mod memory;
#[cfg(loom)]
mod world;

#[cfg(loom)]
pub use explore::{
    explore, explore_on, explore_words, explore_words_on, must_be_caught, must_notice,
};
#[cfg(loom)]
pub use memory::Memory;
#[cfg(loom)]
pub use world::{Pin, World, page, pages, three_together, together};
