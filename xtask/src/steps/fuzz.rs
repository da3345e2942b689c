//! Fuzzing: every target for a short time. A regression test, not a search.

use std::env;
use std::path::Path;

use super::rust_files;
use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::{Cmd, Finished};
use crate::toolchains;

pub(super) fn every_target(context: &Context) -> Outcome {
    let nightly = match toolchains::installed(&context.root, "nightly") {
        Ok(nightly) => nightly,
        Err(why) => return Outcome::Skipped(why),
    };
    if !toolchains::has_subcommand(&context.root, &nightly, "fuzz") {
        return Outcome::Skipped("cargo-fuzz is not installed".into());
    }
    let targets = rust_files(&context.root.join("fuzz/fuzz_targets"));
    if targets.is_empty() {
        return Outcome::failed("fuzz/fuzz_targets has no target");
    }
    let seconds = env::var("GMEM_FUZZ_SECONDS").unwrap_or_else(|_| "20".into());

    let mut counts = Counts::default();
    let mut said = Vec::new();
    for file in &targets {
        let target = file.trim_end_matches(".rs");
        let finished = fuzz(context, &nightly, target, &seconds);
        match runs(&finished.output()) {
            Some(runs) if finished.success && runs > 0 => {
                counts += Counts::ONE_PASSED;
                said.push(format!("{target}: {runs} inputs"));
            }
            _ => {
                counts += Counts::ONE_FAILED;
                said.push(format!("{target}: {}", finished.status));
            }
        }
    }
    Outcome::tested(said.join(", "), counts, counts.failed == 0)
}

fn fuzz(context: &Context, nightly: &str, target: &str, seconds: &str) -> Finished {
    let seeds = Path::new("fuzz/seeds").join(target);
    // The first directory is the one that libFuzzer writes to: never the seeds.
    let mut cmd = Cmd::cargo_of(&context.root, nightly)
        // An allocation that fails is an error of the library's, and nothing to abort for.
        .env("ASAN_OPTIONS", "allocator_may_return_null=1")
        // Comparisons are not what guides it, and tracing them takes two thirds of the time.
        .args(&["fuzz", "run", "--no-trace-compares", target])
        .path(&context.scratch.join("corpus").join(target));
    if let Err(error) = std::fs::create_dir_all(context.scratch.join("corpus").join(target)) {
        println!("xtask: no directory for the corpus: {error}");
    }
    if context.root.join(&seeds).is_dir() {
        cmd = cmd.path(&seeds);
    }
    cmd.args(&["--", &format!("-max_total_time={seconds}"), "-max_len=4096", "-timeout=20"]).run()
}

/// `Done 335122 runs in 21 second(s)`: what libFuzzer says at an orderly end.
fn runs(output: &str) -> Option<u64> {
    let line = output.lines().find_map(|line| line.strip_prefix("Done "))?;
    let (number, rest) = line.split_once(' ')?;
    rest.starts_with("runs in ").then_some(())?;
    number.parse().ok()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn only_an_orderly_end_counts() {
        let output = "#335122\tDONE   cov: 9 ft: 9\nDone 335122 runs in 21 second(s)\n";
        assert_eq!(runs(output), Some(335_122));
        assert_eq!(runs("Done 0 runs in 0 second(s)"), Some(0));
        assert_eq!(runs("SUMMARY: libFuzzer: deadly signal\n#12 pulse"), None);
    }
}
