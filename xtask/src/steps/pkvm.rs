//! A real pKVM under emulation agrees with the scenarios.

use crate::Context;
use crate::pkvm::{self, Missing, Wish};
use crate::report::Outcome;

/// Installs nothing: that is for `cargo xtask pkvm`, which somebody typed.
pub(super) fn agrees(context: &Context) -> Outcome {
    pkvm::run(context, Wish::default(), Missing::Say)
}
