//! Builds that nobody runs: feature sets, other targets, the oldest compiler.

use std::fs;

use super::{FEATURES, all_good};
use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::{Cmd, Finished};
use crate::toolchains;

const FEATURE_SETS: [&str; 5] = ["", "vm-memory", "oracle", "loom", "vm-memory,oracle"];
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-musl"];
/// `cargo check` of the library alone, so that features of dev-dependencies do not leak in.
fn check(cmd: Cmd, more: &[&str]) -> Finished {
    cmd.args(&["check", "--package", "gmem", "--lib"]).args(more).run()
}

pub(super) fn features(context: &Context) -> Outcome {
    let mut runs = Vec::new();
    for set in FEATURE_SETS {
        let name = if set.is_empty() { "no feature" } else { set };
        let args = ["--no-default-features", "--features", set];
        runs.push((name.to_string(), check(Cmd::cargo(&context.root), &args)));
    }
    // Somebody else's models may set the cfg for the whole graph, without our feature.
    let cmd = Cmd::cargo(&context.root).env("RUSTFLAGS", "--cfg loom");
    runs.push(("--cfg loom without the feature".into(), check(cmd, &[])));
    all_good("none, vm-memory, oracle, loom, vm-memory and oracle; --cfg loom without loom", runs)
}

pub(super) fn targets(context: &Context) -> Outcome {
    let (here, missing): (Vec<&str>, Vec<&str>) =
        TARGETS.into_iter().partition(|target| toolchains::has_target(&context.root, target));
    let lacking: Vec<_> = missing.iter().map(|target| format!("no std for {target}")).collect();
    if here.is_empty() {
        return Outcome::Skipped(lacking.join("; "));
    }
    let runs = here.iter().map(|target| {
        let args = [&FEATURES[..], &["--target", target]].concat();
        (target.to_string(), check(Cmd::cargo(&context.root), &args))
    });
    match all_good(&here.join(", "), runs.collect::<Vec<_>>()) {
        Outcome::Ran { what, .. } => Outcome::Ran { what, counts: Counts::default(), lacking },
        outcome => outcome,
    }
}

pub(super) fn msrv(context: &Context) -> Outcome {
    let manifest = match fs::read_to_string(context.root.join("Cargo.toml")) {
        Ok(manifest) => manifest,
        Err(error) => return Outcome::failed(format!("Cargo.toml: {error}")),
    };
    let Some(release) = rust_version(&manifest) else {
        return Outcome::failed("Cargo.toml has no rust-version");
    };
    match toolchains::installed(&context.root, release) {
        Ok(name) => {
            let finished = check(Cmd::cargo_of(&context.root, &name), &FEATURES);
            all_good(&name.clone(), [(name, finished)])
        }
        Err(why) => {
            Outcome::Skipped(format!("{why}; clippy::incompatible_msrv, in clippy, stands in"))
        }
    }
}

fn rust_version(manifest: &str) -> Option<&str> {
    manifest.lines().find_map(|line| {
        let value = line.strip_prefix("rust-version")?.trim_start().strip_prefix('=')?;
        Some(value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_manifest_says_which_compiler() {
        let manifest = "[package]\nname = \"gmem\"\nrust-version = \"1.85\"\n";
        assert_eq!(rust_version(manifest), Some("1.85"));
        assert_eq!(rust_version("[package]\n"), None);
    }
}
