//! Tests that run on the host as it is.

use super::FEATURES;
use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::Cmd;

pub(super) fn unit_and_integration(context: &Context) -> Outcome {
    let nextest = Cmd::cargo(&context.root).args(&["nextest", "--version"]).ask().success;
    let (runner, cmd) = if nextest {
        ("cargo nextest", Cmd::cargo(&context.root).args(&["nextest", "run"]))
    } else {
        ("cargo test, for want of cargo-nextest", Cmd::cargo(&context.root).arg("test"))
    };
    let cmd = cmd
        .args(&["--workspace", "--no-fail-fast"])
        .args(&FEATURES)
        .args(&["--lib", "--bins", "--tests", "--examples"])
        .env("GMEM_SKIP_LOG", context.skips.path());
    let finished = cmd.run();

    let mut counts = Counts::parse(&finished.output());
    match context.skips.skipped_tests() {
        // For the runner a test that returns early has passed. It has not.
        Ok(skipped) => counts.demote(skipped),
        Err(why) => return Outcome::Failed { why, counts },
    }
    Outcome::tested(format!("{runner}, {}", finished.status), counts, finished.success)
}

pub(super) fn doctests(context: &Context) -> Outcome {
    let finished = Cmd::cargo(&context.root)
        .args(&["test", "--package", "gmem", "--doc"])
        .args(&FEATURES)
        .env("GMEM_SKIP_LOG", context.skips.path())
        .run();
    Outcome::tested(&finished.status, Counts::parse(&finished.output()), finished.success)
}
