//! Miri: the unit tests of the floors that need no operating system, with every access checked.

use std::env;

use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::Cmd;
use crate::toolchains;

/// Modules whose unit tests run on the heap: F0, the two seams, and F2 to F4.
const PURE: [&str; 9] = [
    "addr::",
    "range::",
    "geometry::",
    "error::",
    "sync::",
    "backing::",
    "state::",
    "folio::",
    "stage2::",
];
/// Filters match anywhere in a name, so modules of the same name higher up are taken out again.
const NOT: [&str; 4] = ["os::", "gmem::", "hyp::", "oracle::"];

pub(super) fn pure_floors(context: &Context) -> Outcome {
    let nightly = match toolchains::installed(&context.root, "nightly") {
        Ok(nightly) => nightly,
        Err(why) => return Outcome::Skipped(why),
    };
    if !toolchains::has_subcommand(&context.root, &nightly, "miri") {
        return Outcome::Skipped(format!("{nightly} has no component miri"));
    }
    if !toolchains::has_std_source(&context.root, &nightly) {
        return Outcome::Skipped(format!("{nightly} has no component rust-src"));
    }
    // bitvec keeps a bit index in its pointers, which only permissive provenance can follow.
    let flags = env::var("MIRIFLAGS").unwrap_or_else(|_| "-Zmiri-permissive-provenance".into());
    let cmd = Cmd::cargo_of(&context.root, &nightly)
        .env("MIRIFLAGS", flags)
        .args(&["miri", "test", "--package", "gmem", "--lib", "--", "--quiet"])
        .args(&PURE);
    let finished = NOT.iter().fold(cmd, |cmd, name| cmd.args(&["--skip", name])).run();
    Outcome::tested(&finished.status, Counts::parse(&finished.output()), finished.success)
}
