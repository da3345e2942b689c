//! loom models: every interleaving, up to a number of preemptions.

use std::env;

use super::has_rust;
use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::{Cmd, is_set};

/// A run that one of these ends early still says "ok": it would be a statement about nothing.
const SILENT_LIMITS: [&str; 2] = ["LOOM_MAX_DURATION", "LOOM_MAX_PERMUTATIONS"];

pub(super) fn models(context: &Context) -> Outcome {
    let dir = context.root.join("loom-tests");
    if !has_rust(&dir.join("tests")) {
        return Outcome::failed("loom-tests/tests has no model");
    }
    if let Some(name) = SILENT_LIMITS.iter().find(|name| is_set(name)) {
        return Outcome::failed(format!(
            "{name} is set: a model that is cut short by it passes silently"
        ));
    }
    let default = if context.quick { "2" } else { "3" };
    let bound = env::var("LOOM_MAX_PREEMPTIONS").unwrap_or_else(|_| default.into());
    let finished = Cmd::cargo(&dir)
        .env("LOOM_MAX_PREEMPTIONS", &bound)
        .env("RUSTFLAGS", "--cfg loom")
        .args(&["test", "--release", "--no-fail-fast"])
        .run();
    Outcome::tested(
        format!("at most {bound} preemptions, {}", finished.status),
        Counts::parse(&finished.output()),
        finished.success,
    )
}
