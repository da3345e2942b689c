//! ThreadSanitizer: the tests with real threads, with every pair of accesses checked for its order.
//!
//! It knows nothing of membarrier(2) and little of fences, but orders everything by the words and slots
//! themselves, which the library does as well: nothing had to be left out for a false alarm.

use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::Cmd;
use crate::toolchains;

/// The standard library has to be instrumented too, or its locks are unknown.
const BUILD: [&str; 7] = [
    "test",
    "-Zbuild-std",
    "--target",
    "x86_64-unknown-linux-gnu",
    "--package",
    "gmem",
    "--features=gmem/vm-memory,gmem/oracle",
];

/// What is run, and of the library's own tests those of the state; sequences on one thread have nothing
/// to find here, and take long.
const RUNS: [&[&str]; 2] =
    [&["--test", "stress"], &["--lib", "--", "state::", "--skip", "state::tree::property"]];

pub(super) fn threads(context: &Context) -> Outcome {
    let nightly = match toolchains::installed(&context.root, "nightly") {
        Ok(nightly) => nightly,
        Err(why) => return Outcome::Skipped(why),
    };
    if !toolchains::has_std_source(&context.root, &nightly) {
        return Outcome::Skipped(format!("{nightly} has no component rust-src"));
    }
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Outcome::Skipped(String::from("only tried on x86_64 Linux"));
    }
    let mut output = String::new();
    for run in RUNS {
        let finished = Cmd::cargo_of(&context.root, &nightly)
            .env("RUSTFLAGS", "-Zsanitizer=thread")
            .args(&BUILD)
            .args(run)
            .run();
        output.push_str(&finished.output());
        if !finished.success {
            return Outcome::tested(finished.status, Counts::parse(&output), false);
        }
    }
    Outcome::tested(String::from("nothing found"), Counts::parse(&output), true)
}
