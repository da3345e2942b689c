//! Format, clippy and rustdoc.

use super::{FEATURES, all_good, has_rust};
use crate::Context;
use crate::report::Outcome;
use crate::shell::{Cmd, Finished};

/// Workspaces of their own, with the directory that has something to check.
const OTHERS: [(&str, &str); 2] = [("loom-tests", "tests"), ("fuzz", "fuzz_targets")];

pub(super) fn fmt(context: &Context) -> Outcome {
    let mut what = vec!["."];
    let mut runs = vec![(String::from("."), check_format(context, "."))];
    for (workspace, sources) in OTHERS {
        // Without a single target the manifest itself is an error; the steps loom and fuzz say so.
        if has_rust(&context.root.join(workspace).join(sources)) {
            what.push(workspace);
            runs.push((workspace.into(), check_format(context, workspace)));
        }
    }
    all_good(&what.join(", "), runs)
}

fn check_format(context: &Context, workspace: &str) -> Finished {
    Cmd::cargo(&context.root.join(workspace)).args(&["fmt", "--all", "--check"]).run()
}

pub(super) fn clippy(context: &Context) -> Outcome {
    let clippy = |args: &[&str]| {
        Cmd::cargo(&context.root).arg("clippy").args(args).args(&["--", "-D", "warnings"]).run()
    };
    let mut what = vec!["every target", "the library alone"];
    let mut runs = vec![
        (what[0].to_string(), clippy(&[&["--workspace", "--all-targets"], &FEATURES[..]].concat())),
        (what[1].to_string(), clippy(&["--package", "gmem", "--lib", "--no-default-features"])),
    ];
    if !context.quick && has_rust(&context.root.join("loom-tests/tests")) {
        // Also the library as loom sees it: it is a path dependency of the models.
        let models = Cmd::cargo(&context.root.join("loom-tests"))
            .env("RUSTFLAGS", "--cfg loom")
            .args(&["clippy", "--all-targets", "--", "-D", "warnings"])
            .run();
        what.push("models");
        runs.push(("models".into(), models));
    }
    all_good(&what.join(", "), runs)
}

pub(super) fn doc(context: &Context) -> Outcome {
    let doc = |more: &[&str]| {
        Cmd::cargo(&context.root)
            .env("RUSTDOCFLAGS", "-D warnings")
            .args(&["doc", "--package", "gmem", "--no-deps"])
            .args(&FEATURES)
            .args(more)
            .run()
    };
    // The private run last: its links to private items would hide broken ones in public pages.
    let runs =
        [("public".into(), doc(&[])), ("private".into(), doc(&["--document-private-items"]))];
    all_good("public and private items", runs)
}
