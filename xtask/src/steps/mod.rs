//! The steps of `cargo xtask test`, in the order in which they run: cheap ones first.

mod builds;
mod example;
mod fuzz;
mod lint;
mod loom;
mod miri;
mod pkvm;
mod tests;
mod tsan;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::Context;
use crate::names;
use crate::report::Outcome;
use crate::shell::Finished;

/// The features of the library; `loom` swaps things and has its own step. Tests and the example get
/// them from a dev-dependency anyway: saying so makes every step build the same thing once.
const FEATURES: [&str; 2] = ["--features", "gmem/vm-memory,gmem/oracle"];

pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) in_quick: bool,
    pub(crate) run: fn(&Context) -> Outcome,
}

pub(crate) const ALL: &[Step] = &[
    Step { name: "fmt", about: "rustfmt, every workspace", in_quick: true, run: lint::fmt },
    Step {
        name: "clippy",
        about: "clippy with warnings denied, with and without features, plain and for loom",
        in_quick: true,
        run: lint::clippy,
    },
    Step { name: "doc", about: "rustdoc with warnings denied", in_quick: true, run: lint::doc },
    Step {
        name: "tests",
        about: "unit and integration tests",
        in_quick: true,
        run: tests::unit_and_integration,
    },
    Step {
        name: "doctests",
        about: "the examples in the documentation and in README.md",
        in_quick: true,
        run: tests::doctests,
    },
    Step { name: "loom", about: "models of every interleaving", in_quick: true, run: loom::models },
    Step {
        name: "example",
        about: "the vmm example, judged by its JSON line",
        in_quick: false,
        run: example::vmm,
    },
    Step {
        name: "features",
        about: "the library builds with each set of features",
        in_quick: false,
        run: builds::features,
    },
    Step {
        name: "targets",
        about: "the library builds for other targets",
        in_quick: false,
        run: builds::targets,
    },
    Step {
        name: "msrv",
        about: "the library builds with the oldest compiler it promises",
        in_quick: false,
        run: builds::msrv,
    },
    Step {
        name: "miri",
        about: "unit tests of the pure floors, interpreted",
        in_quick: false,
        run: miri::pure_floors,
    },
    Step {
        name: "tsan",
        about: "the stress test and the heart's unit tests under ThreadSanitizer",
        in_quick: false,
        run: tsan::threads,
    },
    Step {
        name: "fuzz",
        about: "a short run of every fuzz target",
        in_quick: false,
        run: fuzz::every_target,
    },
    Step {
        name: "pkvm",
        about: "a real pKVM under emulation agrees with the scenarios",
        in_quick: false,
        run: pkvm::agrees,
    },
];

pub(crate) fn list() -> String {
    let mut text = String::from("steps (those with * also with --quick):\n");
    for step in ALL {
        let star = if step.in_quick { '*' } else { ' ' };
        // Writing to a String cannot fail.
        let _: std::fmt::Result = writeln!(text, "  {star} {:<9} {}", step.name, step.about);
    }
    text + &format!("host capabilities:\n    {}\n", names::CAPABILITIES.join(", "))
}

/// All of these must have ended well; the first that did not says why.
fn all_good(what: &str, runs: impl IntoIterator<Item = (String, Finished)>) -> Outcome {
    match runs.into_iter().find(|(_, finished)| !finished.success) {
        None => Outcome::checked(what),
        Some((name, finished)) => Outcome::failed(format!("{name}: {}", finished.status)),
    }
}

/// The Rust files directly in a directory, by name; none where there is no such directory.
fn rust_files(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_rust(Path::new(name)))
        .collect();
    names.sort();
    names
}

/// Whether there is a Rust file anywhere below a directory.
fn has_rust(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    let below = |path: &Path| if path.is_dir() { has_rust(path) } else { is_rust(path) };
    entries.flatten().any(|entry| below(&entry.path()))
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn every_name_has_its_step() {
        let steps: Vec<_> = ALL.iter().map(|step| step.name).collect();
        assert_eq!(steps, names::STEPS);
        assert!(names::STEPS.iter().all(|name| list().contains(name)));
    }
}
