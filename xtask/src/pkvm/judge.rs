//! What was seen against what was expected, as a table.

use std::fmt;

use pkvm_oracle::{Expectation, Scenario, TAINTED, Transcript, Verdict};

pub(super) struct Judgement {
    rows: Vec<Row>,
    pub(super) agreed: u64,
    pub(super) disagreed: u64,
}

struct Row {
    name: String,
    nr_steps: usize,
    verdict: Verdict,
    notes: Vec<String>,
}

impl Row {
    fn agrees(&self) -> bool {
        // The kernel may say that a VMM did wrong; it may not warn of itself.
        let warned = self.notes.iter().any(|note| note.starts_with(TAINTED));
        self.verdict.agrees() && !warned
    }
}

impl Judgement {
    /// Judges all scenarios; the agent must have run them in this order, and nothing else.
    pub(super) fn of(scenarios: &[&Scenario], transcript: &Transcript) -> Result<Self, String> {
        if !transcript.complete {
            let last = transcript.told.last().map_or("the first", |told| told.name.as_str());
            return Err(format!("the agent did not come to its end, but to {last}"));
        }
        let names = |names: &mut dyn Iterator<Item = &str>| names.collect::<Vec<_>>().join(" ");
        let wanted = names(&mut scenarios.iter().map(|scenario| scenario.name.as_str()));
        let told = names(&mut transcript.told.iter().map(|told| told.name.as_str()));
        if wanted != told {
            return Err(format!("the agent ran other scenarios: {told}; wanted were: {wanted}"));
        }
        let rows: Vec<_> = scenarios
            .iter()
            .zip(&transcript.told)
            .map(|(scenario, told)| Row {
                name: scenario.name.clone(),
                nr_steps: scenario.lines.len(),
                verdict: Verdict::of(scenario, told),
                notes: told.notes.clone(),
            })
            .collect();
        let agreed = rows.iter().filter(|row| row.agrees()).count() as u64;
        let disagreed = rows.len() as u64 - agreed;
        Ok(Self { rows, agreed, disagreed })
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        writeln!(
            f,
            "{:<width$} {:>6} {:>6} {:>9} {:>7}",
            "scenario", "steps", "agree", "disagree", "unknown"
        )?;
        for row in &self.rows {
            let Verdict { agreed, unjudged, disagreements, broken } = &row.verdict;
            let (steps, differ) = (row.nr_steps, disagreements.len());
            writeln!(f, "{:<width$} {steps:>6} {agreed:>6} {differ:>9} {unjudged:>7}", row.name)?;
            for disagreement in disagreements {
                writeln!(f, "    {disagreement}")?;
            }
            for why in broken.iter().chain(&row.notes) {
                writeln!(f, "    {why}")?;
            }
        }
        write!(f, "{} scenarios agree, {} disagree", self.agreed, self.disagreed)
    }
}

/// Another boot must have shown the same.
pub(super) fn same(first: &Transcript, other: &Transcript, boot: u32) -> Result<(), String> {
    if first.told.len() != other.told.len() {
        return Err(format!("boot {boot} came to another scenario than the first"));
    }
    for (first, other) in first.told.iter().zip(&other.told) {
        if first.name != other.name || first.ending != other.ending {
            return Err(format!("boot {boot} differs from the first in {}", first.name));
        }
        let differs = first.seen.iter().zip(&other.seen).find(|(first, other)| first != other);
        if let Some(((line, first_seen), (_, seen))) = differs {
            let name = &first.name;
            return Err(format!(
                "boot {boot} differs: {name}, line {line}: {first_seen} in the first, now {seen}"
            ));
        }
        if first.seen.len() != other.seen.len() {
            return Err(format!("boot {boot} has another length of {}", first.name));
        }
    }
    Ok(())
}

/// The scenarios, with what was seen in place of what was expected.
pub(super) fn as_seen(scenarios: &[&Scenario], transcript: &Transcript) -> String {
    let mut text = String::new();
    for (scenario, told) in scenarios.iter().zip(&transcript.told) {
        let mut scenario = (*scenario).clone();
        // A variant's name is two names in the language.
        scenario.name = scenario.name.replace('.', "-");
        for (line, (_, seen)) in scenario.lines.iter_mut().zip(&told.seen) {
            line.expected = Expectation::Seen(*seen);
        }
        text += &format!("{scenario}\n");
    }
    text
}

#[cfg(test)]
mod unit {
    use super::*;
    use pkvm_oracle::parse;

    const CONSOLE: &str = "@begin a\n@at 2 0 pages\n@end a well\n@begin b\n@at 4 0 pages\n\
                           @end b well\n@done\n";

    fn scenarios() -> Vec<Scenario> {
        parse("scenario a\nlocked -> 0 pages\nscenario b\npinned -> 1 pages").unwrap()
    }

    fn judged(console: &str) -> Result<Judgement, String> {
        let scenarios = scenarios();
        Judgement::of(&scenarios.iter().collect::<Vec<_>>(), &Transcript::parse(console)?)
    }

    #[test]
    fn agreement_and_disagreement_are_told_apart() {
        let judgement = judged(CONSOLE).unwrap();
        assert_eq!((judgement.agreed, judgement.disagreed), (1, 1));
        let shown = judgement.to_string();
        assert!(shown.contains("line 4: pinned: expected 1 pages, seen 0 pages"), "{shown}");
    }

    #[test]
    fn a_complaint_of_the_kernel_is_a_disagreement() {
        let noted = |note| CONSOLE.replace("@end a", &format!("@note {note}\n@end a"));
        assert_eq!(judged(&noted("no VMA for that")).unwrap().disagreed, 1);
        assert_eq!(judged(&noted("the kernel is tainted: now")).unwrap().disagreed, 2);
    }

    #[test]
    fn a_run_that_is_not_whole_is_no_judgement() {
        let cut = CONSOLE.replace("@done\n", "");
        assert!(judged(&cut).is_err_and(|why| why.contains("did not come to its end")));
        let other = CONSOLE.replace(" a", " c");
        assert!(judged(&other).is_err_and(|why| why.contains("other scenarios")));
        assert!(judged("@done\n").is_err());
    }

    #[test]
    fn boots_are_compared() {
        let transcript = |console: &str| Transcript::parse(console).unwrap();
        let first = transcript(CONSOLE);
        assert_eq!(same(&first, &transcript(CONSOLE), 2), Ok(()));
        for (from, to) in [
            ("@at 4 0", "@at 4 1"),
            ("@at 4 0 pages\n", ""),
            ("@end b well", "@end b hung"),
            ("@begin b\n@at 4 0 pages\n@end b well\n", ""),
        ] {
            let other = CONSOLE.replace(from, to);
            assert_ne!(other, CONSOLE);
            assert!(same(&first, &transcript(&other), 2).is_err(), "{from} -> {to}");
        }
    }

    #[test]
    fn what_was_seen_can_be_read_again() {
        let scenarios = scenarios();
        let all: Vec<_> = scenarios.iter().collect();
        let seen = as_seen(&all, &Transcript::parse(CONSOLE).unwrap());
        let again = parse(&seen).unwrap();
        assert_eq!(again[1].lines[0].expected, Expectation::Seen("0 pages".parse().unwrap()));
    }
}
