//! Whether what was seen is what was expected.

use std::fmt;

use crate::console::{Ending, Told};
use crate::observation::Observation;
use crate::scenario::{Expectation, Scenario};

/// A line on which the two sides differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// Its number in the file.
    pub line: usize,
    /// The step.
    pub step: String,
    /// What the file has.
    pub expected: Observation,
    /// What the machine showed; nothing if it did not get there.
    pub seen: Option<Observation>,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}: expected {}, ", self.line, self.step, self.expected)?;
        match self.seen {
            Some(seen) => write!(f, "seen {seen}"),
            None => f.write_str("never came to it"),
        }
    }
}

/// The judgement on one scenario.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Lines on which both sides agree.
    pub agreed: usize,
    /// Lines of which nothing was expected.
    pub unjudged: usize,
    /// Lines on which they differ.
    pub disagreements: Vec<Disagreement>,
    /// What is wrong with the run as a whole.
    pub broken: Option<String>,
}

impl Verdict {
    /// Nothing differs and the run was whole.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.disagreements.is_empty() && self.broken.is_none()
    }

    /// Judges what was told of a scenario.
    #[must_use]
    pub fn of(scenario: &Scenario, told: &Told) -> Self {
        let mut verdict = Self::default();
        let mut seen = told.seen.iter();
        for line in &scenario.lines {
            let found = match seen.next() {
                Some((number, found)) if *number == line.number => Some(*found),
                Some((number, _)) => {
                    verdict.broken =
                        Some(format!("line {number} told in place of {}", line.number));
                    return verdict;
                }
                None => None,
            };
            match (line.expected, found) {
                (Expectation::Seen(expected), Some(found)) if expected == found => {
                    verdict.agreed += 1;
                }
                (Expectation::Seen(expected), found) => {
                    let step = line.step.to_string();
                    verdict.disagreements.push(Disagreement {
                        line: line.number,
                        step,
                        expected,
                        seen: found,
                    });
                }
                (Expectation::Unknown, Some(_)) => verdict.unjudged += 1,
                (Expectation::Unknown, None) => {
                    verdict.broken = Some(format!("never came to line {}", line.number));
                    return verdict;
                }
            }
        }
        if seen.next().is_some() {
            verdict.broken = Some("more lines were told than there are".into());
        } else if told.ending != Some(Ending::Well) {
            verdict.broken = Some(match told.ending {
                Some(ending) => format!("it ended: {ending}"),
                None => "it did not end".into(),
            });
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::parse;

    fn scenario() -> Scenario {
        parse("scenario a\nlocked -> 0 pages\npinned -> 0 pages\nlocked -> ?").unwrap().remove(0)
    }

    fn told(seen: &[(usize, Observation)], ending: Option<Ending>) -> Told {
        Told { name: "a".into(), seen: seen.into(), ending, notes: Vec::new() }
    }

    const NONE: Observation = Observation::Pages(0);

    #[test]
    fn agreement_is_counted() {
        let told = told(&[(2, NONE), (3, NONE), (4, Observation::Pages(9))], Some(Ending::Well));
        let verdict = Verdict::of(&scenario(), &told);
        assert!(verdict.agrees());
        assert_eq!((verdict.agreed, verdict.unjudged), (2, 1));
    }

    #[test]
    fn every_kind_of_difference_is_seen() {
        let well = Some(Ending::Well);
        let all = [(2, NONE), (3, NONE), (4, NONE)];
        for bad in [
            told(&[(2, NONE), (3, Observation::Pages(1)), (4, NONE)], well),
            told(&all[..2], well),
            told(&all[..1], well),
            told(&[(2, NONE), (4, NONE), (3, NONE)], well),
            told(&[all[0], all[1], all[2], (5, NONE)], well),
            told(&all, None),
            told(&all, Some(Ending::Hung)),
            told(&all, Some(Ending::Killed(11))),
        ] {
            assert!(!Verdict::of(&scenario(), &bad).agrees(), "{bad:?}");
        }
        let verdict = Verdict::of(&scenario(), &told(&all[..1], Some(Ending::Killed(9))));
        let shown = verdict.disagreements[0].to_string();
        assert_eq!(shown, "line 3: pinned: expected 0 pages, never came to it");
    }
}
