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
    let mut cmd = Cmd::cargo_of(&context.root, &nightly)
        .env("MIRIFLAGS", flags)
        .args(&["miri", "test", "--package", "gmem", "--lib", "--"])
        .args(&PURE);
    let mut what = String::new();
    for (test, why) in LEFT_OUT {
        println!("SKIP miri: {test}: {why}");
        cmd = cmd.args(&["--skip", test]);
        what = format!("{} left out by name, ", LEFT_OUT.len());
    }
    let finished = NOT.iter().fold(cmd, |cmd, name| cmd.args(&["--skip", name])).run();
    let mut counts = Counts::parse(&finished.output());
    counts.skipped += LEFT_OUT.len() as u64;
    Outcome::tested(what + &finished.status, counts, finished.success)
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
