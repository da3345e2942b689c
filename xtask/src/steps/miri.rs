//! Miri: the unit tests of the floors that need no operating system, with every access checked.

use std::{env, thread};

use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::Cmd;
use crate::toolchains;

/// Modules whose unit tests run on the heap: F0, the two seams, and F2 to F4. An interpreter runs on one CPU, so there
/// are two of them, with half of the work each.
const PURE: [&[&str]; 2] = [
    &["addr::", "range::", "geometry::", "error::", "sync::", "state::", "stage2::"],
    &["backing::", "folio::"],
];
/// Filters match anywhere in a name, so modules of the same name higher up are taken out again.
const NOT: [&str; 4] = ["os::", "gmem::", "hyp::", "oracle::"];

/// bitvec keeps a bit index in its pointers, and makes them from slices without a length. Strict
/// provenance and stacked borrows do not know such pointers.
const FLAGS: &str = "-Zmiri-permissive-provenance -Zmiri-tree-borrows";

const SLOW: &str = "takes minutes when interpreted";
const BYTES: &str = "whole folios are zeroed and read, which takes minutes when interpreted";

/// Tests of these modules that an interpreter cannot run, or modules of them, and why. Each counts as one
/// that is skipped.
const LEFT_OUT: [(&str, &str); 7] = [
    ("folio::buddy::tests::any_order_of_frees_makes_it_whole_again", SLOW),
    ("folio::reservation::tests::", BYTES),
    ("folio::scrub::tests::", BYTES),
    ("stage2::table::tests::behaves_like_a_map_of_pages", SLOW),
    ("stage2::table::tests::what_was_reserved_is_what_is_needed", SLOW),
    ("state::tree::tests::a_whole_block_that_is_full_refuses_a_pin_of_its_part", SLOW),
    ("state::tree::tests::pins_saturate_and_unwind", SLOW),
];

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
    let flags = env::var("MIRIFLAGS").unwrap_or_else(|_| FLAGS.into());
    for (test, why) in LEFT_OUT {
        println!("SKIP miri: {test}: {why}");
    }
    let tests = || {
        Cmd::cargo_of(&context.root, &nightly).env("MIRIFLAGS", flags.clone()).args(&[
            "miri",
            "test",
            "--package",
            "gmem",
            "--lib",
        ])
    };
    // Two at once would build the same, one after the other, and say so twice.
    let built = tests().arg("--no-run").run();
    if !built.success {
        return Outcome::failed(format!("the tests do not build: {}", built.status));
    }
    let left_out = LEFT_OUT.map(|(test, _)| test);
    let finished = thread::scope(|scope| {
        let commands = PURE.map(|modules| {
            let skipped = left_out.iter().chain(&NOT);
            let cmd = tests().arg("--").args(modules);
            skipped.fold(cmd, |cmd, name| cmd.args(&["--skip", name]))
        });
        let running = commands.map(|cmd| scope.spawn(|| cmd.run()));
        running.map(|thread| thread.join().expect("a command is only waited for"))
    });
    let mut counts = Counts::default();
    for part in &finished {
        let of_part = Counts::parse(&part.output());
        if of_part.passed == 0 {
            return Outcome::failed(format!("a half without a test: {}", part.status));
        }
        counts += of_part;
    }
    counts.skipped += LEFT_OUT.len() as u64;
    let status = finished.each_ref().map(|part| part.status.as_str()).join(" and ");
    let success = finished.iter().all(|part| part.success);
    Outcome::tested(format!("{} left out by name, {status}", LEFT_OUT.len()), counts, success)
}

#[cfg(test)]
mod unit {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Where a test of the library is written: beside the code, or in a file of its own.
    fn source_of(path: &[&str]) -> String {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("../src");
        let module = path[..path.len() - 2].join("/");
        let files =
            [format!("{module}.rs"), format!("{module}/mod.rs"), format!("{module}/tests.rs")];
        files.iter().filter_map(|file| fs::read_to_string(src.join(file)).ok()).collect()
    }

    #[test]
    fn only_tests_that_exist_are_left_out() {
        for (test, _) in LEFT_OUT {
            let path: Vec<_> = test.split("::").collect();
            let name = path.last().expect("a path has a last part");
            let what = if name.is_empty() { "#[test]".into() } else { format!("fn {name}(") };
            assert!(source_of(&path).contains(&what), "there is no test {test}");
        }
    }
}
