//! The models, one file for each question. Beside each model stand its canaries: the same model with
//! a seeded race or a seeded mistake of the code, which must be found. They act on bare words where the
//! object's own types leave no way to do it wrong.
//!
//! | file | question |
//! |---|---|
//! | `pin_convert` | a pin against a conversion |
//! | `exclusive` | an exclusive pin against pins and conversions |
//! | `overlap` | two conversions of ranges that overlap |
//! | `border` | the same where blocks have to be split for it |
//! | `split` | a block splits under those who are at it |
//! | `merge` | parts become one block under those on the way down; numbers of splits |
//! | `page_pin` | a pin that goes to the page's own word |
//! | `drain` | conversions and pins that wait, and ends of waits |
//! | `trim` | tables are given back under those on the way to them |
//! | `transient` | transient accesses against a conversion |
//! | `handover` | who sees whose bytes when memory changes hands |
//! | `quarantine` | a change that was given up half way |
//! | `condemned` | memory that failed while it is pinned |
//! | `handout` | a device, and the subscriber that is to let go of its pages |
//! | `holders` | who holds a pin, asked while records are written |
//! | `pool` | a pool's frames under takers, scrubbers and first touches |
//! | `translations` | a vCPU's accesses by what it remembers, while its page is taken |
//! | `el2_locks` | the order of EL2's locks |
//! | `exploration` | is any order left out? |

#![cfg(loom)]

mod border;
mod condemned;
mod drain;
mod el2_locks;
mod exclusive;
mod exploration;
mod handout;
mod handover;
mod holders;
mod merge;
mod overlap;
mod page_pin;
mod pin_convert;
mod pool;
mod quarantine;
mod split;
mod transient;
mod translations;
mod trim;

/// What loom says when the judge is reached by two threads at once.
const RACE: &str = "Causality violation";

/// What becomes of one who has got a page by mistake: the judge sees two at its bytes, or its word does
/// not know him when he leaves.
const MISTAKEN: &str = "Causality violation|is not held|NotHeld";
