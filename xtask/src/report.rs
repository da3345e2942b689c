//! What ran, what was skipped and why, and whether that is good enough.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::counts::Counts;
use crate::names;
use crate::skiplog::{Note, skipped_tests};

/// How a step ended.
pub(crate) enum Outcome {
    /// It did what it is for. `lacking` says what it had to leave out.
    Ran { what: String, counts: Counts, lacking: Vec<String> },
    /// It could not run here.
    Skipped(String),
    /// It ran and found something, or could not say that all is well.
    Failed { why: String, counts: Counts },
    /// The command line named other steps.
    NotSelected,
}

impl Outcome {
    /// A check that executes no test.
    pub(crate) fn checked(what: impl Into<String>) -> Self {
        Self::Ran { what: what.into(), counts: Counts::default(), lacking: Vec::new() }
    }

    pub(crate) fn failed(why: impl Into<String>) -> Self {
        Self::Failed { why: why.into(), counts: Counts::default() }
    }

    /// A run of tests: one that passed without having executed any is a failure.
    pub(crate) fn tested(what: impl Into<String>, counts: Counts, success: bool) -> Self {
        let what = what.into();
        if counts.failed > 0 || !success {
            return Self::Failed { why: what, counts };
        }
        if counts.is_empty() {
            return Self::Failed { why: format!("no test was executed: {what}"), counts };
        }
        Self::Ran { what, counts, lacking: Vec::new() }
    }
}

pub(crate) struct Report {
    required: BTreeSet<String>,
    rows: Vec<Row>,
    notes: BTreeSet<Note>,
}

struct Row {
    step: &'static str,
    outcome: Outcome,
    seconds: f64,
}

impl Report {
    pub(crate) fn new(required: &[&str]) -> Self {
        let required = required.iter().map(|&name| name.into()).collect();
        Self { required, rows: Vec::new(), notes: BTreeSet::new() }
    }

    /// Adds a step. The skip of a required one becomes a failure here.
    pub(crate) fn add(&mut self, step: &'static str, outcome: Outcome, seconds: f64) {
        let required = self.required.contains(step);
        let outcome = match outcome {
            Outcome::Skipped(why) if required => {
                Outcome::failed(format!("required, but skipped: {why}"))
            }
            Outcome::Ran { what, counts, lacking } if required && !lacking.is_empty() => {
                let lacking = lacking.join("; ");
                Outcome::Failed { why: format!("required, but {lacking} ({what})"), counts }
            }
            outcome => outcome,
        };
        self.rows.push(Row { step, outcome, seconds });
    }

    /// Adds what the tests said. A required capability must have been seen by them.
    pub(crate) fn note_skips(&mut self, notes: BTreeSet<Note>) {
        self.notes = notes;
        let tests_ran = |row: &Row| {
            row.step == "tests"
                && !matches!(row.outcome, Outcome::NotSelected | Outcome::Skipped(_))
        };
        if !self.rows.iter().any(tests_ran) {
            return;
        }
        let unseen: Vec<_> = names::CAPABILITIES
            .iter()
            .filter(|&&name| self.required.contains(name) && !self.has(name))
            .copied()
            .collect();
        for name in unseen {
            let outcome = Outcome::failed(format!("{name} is required, but no test found it"));
            self.rows.push(Row { step: "host", outcome, seconds: 0.0 });
        }
    }

    fn has(&self, name: &str) -> bool {
        self.notes
            .iter()
            .any(|note| matches!(note, Note::Have { capability } if capability == name))
    }

    /// A failed step without a failed test (a lint, a build) counts as one failure.
    fn totals(&self) -> Counts {
        self.rows
            .iter()
            .map(|row| match &row.outcome {
                Outcome::Ran { counts, .. } => *counts,
                Outcome::Failed { counts, .. } => {
                    Counts { failed: counts.failed.max(1), ..*counts }
                }
                Outcome::Skipped(_) | Outcome::NotSelected => Counts::default(),
            })
            .sum()
    }

    /// Nothing failed, and something ran.
    pub(crate) fn passed(&self) -> bool {
        let ran = |row: &Row| matches!(row.outcome, Outcome::Ran { .. });
        let failed = |row: &Row| matches!(row.outcome, Outcome::Failed { .. });
        self.rows.iter().any(ran) && !self.rows.iter().any(failed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<9} {:<8} {:>34} {:>8}  what", "step", "result", "tests", "seconds")?;
        for row in &self.rows {
            write_row(f, row)?;
        }
        write_notes(f, &self.notes)?;
        write!(f, "gmem: {}", self.totals())
    }
}

fn write_row(f: &mut fmt::Formatter<'_>, row: &Row) -> fmt::Result {
    let none = Vec::new();
    let (result, counts, what, lacking) = match &row.outcome {
        Outcome::Ran { what, counts, lacking } => ("ok", *counts, what.as_str(), lacking),
        Outcome::Failed { why, counts } => ("FAILED", *counts, why.as_str(), &none),
        Outcome::Skipped(why) => ("skipped", Counts::default(), why.as_str(), &none),
        Outcome::NotSelected => ("-", Counts::default(), "not asked for", &none),
    };
    let counts = if counts == Counts::default() { String::new() } else { counts.to_string() };
    writeln!(f, "{:<9} {result:<8} {counts:>34} {:>8.1}  {what}", row.step, row.seconds)?;
    for lack in lacking {
        writeln!(f, "{:<9} {:<8} {:>34} {:>8}  {lack}", "", "skipped", "", "")?;
    }
    Ok(())
}

fn write_notes(f: &mut fmt::Formatter<'_>, notes: &BTreeSet<Note>) -> fmt::Result {
    let mut host = Vec::new();
    let mut skips: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for note in notes {
        match note {
            Note::Have { capability } => host.push(format!("{capability} yes")),
            Note::Lack { capability, why } => host.push(format!("{capability} NO ({why})")),
            Note::Skip { capability, why, test } => {
                skips.entry((capability, why)).or_default().push(test);
            }
        }
    }
    if !host.is_empty() {
        writeln!(f, "\nhost: {}", host.join(", "))?;
    }
    if !skips.is_empty() {
        writeln!(f, "{} tests skipped themselves:", skipped_tests(notes).len())?;
    }
    for ((capability, why), tests) in skips {
        writeln!(f, "  SKIP {capability}: {why}")?;
        for test in tests {
            writeln!(f, "    {test}")?;
        }
    }
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(passed: u64) -> Outcome {
        Outcome::tested("some tests", Counts { passed, failed: 0, skipped: 0 }, true)
    }

    fn last_line(report: &Report) -> String {
        report.to_string().lines().last().unwrap_or_default().into()
    }

    #[test]
    fn the_closing_line_counts_tests() {
        let mut report = Report::new(&[]);
        report.add("fmt", Outcome::checked("one workspace"), 0.5);
        report.add("tests", ran(7), 1.0);
        report.add("miri", Outcome::Skipped("no nightly toolchain is installed".into()), 0.0);
        assert!(report.passed());
        assert_eq!(last_line(&report), "gmem: 7 passed, 0 failed, 0 skipped");
        assert!(report.to_string().contains("no nightly toolchain"));
    }

    #[test]
    fn a_failed_lint_is_in_the_closing_line() {
        let mut report = Report::new(&[]);
        report.add("clippy", Outcome::failed("exit status: 101"), 0.5);
        report.add("tests", ran(7), 1.0);
        assert!(!report.passed());
        assert_eq!(last_line(&report), "gmem: 7 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn tests_that_did_not_run_did_not_pass() {
        assert!(matches!(ran(0), Outcome::Failed { why, .. } if why.contains("no test was")));
        let broken = Outcome::tested("x", Counts::ONE_PASSED, false);
        assert!(matches!(broken, Outcome::Failed { .. }));
        let mut nothing = Report::new(&[]);
        nothing.add("miri", Outcome::Skipped("not here".into()), 0.0);
        assert!(!nothing.passed());
    }

    #[test]
    fn a_required_step_may_not_be_skipped() {
        let mut report = Report::new(&["miri"]);
        report.add("tests", ran(1), 0.0);
        report.add("miri", Outcome::Skipped("no nightly".into()), 0.0);
        assert!(!report.passed());

        let mut partly = Report::new(&["targets"]);
        let lacking = vec!["no std for aarch64-unknown-linux-musl".into()];
        let outcome = Outcome::Ran { what: "x".into(), counts: Counts::default(), lacking };
        partly.add("targets", outcome, 0.0);
        assert!(!partly.passed());
    }

    #[test]
    fn a_required_capability_must_have_been_seen() {
        let mut report = Report::new(&["uffd"]);
        report.add("tests", ran(1), 0.0);
        report.note_skips(BTreeSet::new());
        assert!(!report.passed());

        let mut seen = Report::new(&["uffd"]);
        seen.add("tests", ran(1), 0.0);
        seen.note_skips(BTreeSet::from([Note::Have { capability: "uffd".into() }]));
        assert!(seen.passed());
    }

    #[test]
    fn skips_are_shown_with_their_tests() {
        let mut report = Report::new(&[]);
        report.add("tests", ran(1), 0.0);
        report.note_skips(BTreeSet::from([Note::Skip {
            capability: "kvm".into(),
            why: "no such file".into(),
            test: "require::opens".into(),
        }]));
        let text = report.to_string();
        assert!(text.contains("SKIP kvm: no such file") && text.contains("require::opens"));
    }
}
