//! Files of scenarios.

use std::fmt;
use std::str::FromStr;

use crate::observation::Observation;
use crate::step::Step;

/// What a line says that its step shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expectation<O = Observation> {
    /// `-> this`; without an arrow, `ok`.
    Seen(O),
    /// `-> ?`: it is not known. For scenarios that a generator made.
    Unknown,
}

/// One step of a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<S = Step, O = Observation> {
    /// Its line in the file, counted from 1.
    pub number: usize,
    /// What is done.
    pub step: S,
    /// What is seen.
    pub expected: Expectation<O>,
}

/// Steps from nothing to the end of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario<S = Step, O = Observation> {
    /// Unlike all others.
    pub name: String,
    /// Its steps, in order.
    pub lines: Vec<Line<S, O>>,
}

/// A line that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misread {
    /// Counted from 1.
    pub line: usize,
    /// Why.
    pub why: String,
}

impl fmt::Display for Misread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for Misread {}

/// As a file has it; reading it again gives the same steps and expectations.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scenario {}", self.name)?;
        for line in &self.lines {
            match line.expected {
                Expectation::Seen(Observation::Ok) => writeln!(f, "{}", line.step)?,
                Expectation::Seen(seen) => {
                    writeln!(f, "{:<40} -> {seen}", line.step.to_string())?;
                }
                Expectation::Unknown => writeln!(f, "{:<40} -> ?", line.step.to_string())?,
            }
        }
        Ok(())
    }
}

/// A scenario as written: `$` is not yet any of `variants`.
struct Draft<'a> {
    line: usize,
    name: &'a str,
    variants: Vec<&'a str>,
    steps: Vec<(usize, &'a str)>,
}

/// Reads all scenarios of a file.
///
/// # Errors
/// The first line that is no step, no expectation and no heading; a name that comes twice; a
/// scenario without a step.
pub fn parse(text: &str) -> Result<Vec<Scenario>, Misread> {
    parse_as(text)
}

/// Reads all scenarios of a file whose steps, or what they show, are in another language.
///
/// # Errors
/// As for [`parse`].
pub fn parse_as<S, O>(text: &str) -> Result<Vec<Scenario<S, O>>, Misread>
where
    S: FromStr<Err = String>,
    O: FromStr<Err = String>,
{
    let mut drafts: Vec<Draft<'_>> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let misread = |why: String| Misread { line: number, why };
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        match line.strip_prefix("scenario ") {
            Some(heading) => drafts.push(draft(number, heading).map_err(misread)?),
            None => match drafts.last_mut() {
                Some(draft) => draft.steps.push((number, line)),
                None => return Err(misread("a step before the first scenario".into())),
            },
        }
    }
    let mut scenarios: Vec<Scenario<S, O>> = Vec::new();
    for draft in &drafts {
        for scenario in expand(draft)? {
            if scenarios.iter().any(|other| other.name == scenario.name) {
                let why = format!("a second scenario `{}`", scenario.name);
                return Err(Misread { line: draft.line, why });
            }
            scenarios.push(scenario);
        }
    }
    Ok(scenarios)
}

fn draft(line: usize, heading: &str) -> Result<Draft<'_>, String> {
    let mut words = heading.split_ascii_whitespace();
    let name = words.next().ok_or("a scenario without a name")?;
    if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-') {
        return Err(format!("`{name}` is no name for a scenario"));
    }
    let variants = match words.next() {
        None => Vec::new(),
        Some("for") => words.collect(),
        Some(other) => return Err(format!("`{other}` after the name, not `for`")),
    };
    if heading.contains(" for") && variants.is_empty() {
        return Err("`for` nothing".into());
    }
    Ok(Draft { line, name, variants, steps: Vec::new() })
}

fn expand<S, O>(draft: &Draft<'_>) -> Result<Vec<Scenario<S, O>>, Misread>
where
    S: FromStr<Err = String>,
    O: FromStr<Err = String>,
{
    if draft.steps.is_empty() {
        return Err(Misread { line: draft.line, why: "a scenario without a step".into() });
    }
    if draft.variants.is_empty() {
        let lines = draft.steps.iter().map(|&(number, text)| read_line(number, text));
        let lines = lines.collect::<Result<_, _>>()?;
        return Ok(vec![Scenario { name: draft.name.into(), lines }]);
    }
    let variant = |variant: &&str| {
        let lines = draft
            .steps
            .iter()
            .map(|&(number, text)| read_line(number, &text.replace('$', variant)))
            .collect::<Result<_, _>>()?;
        Ok(Scenario { name: format!("{}.{variant}", draft.name), lines })
    };
    draft.variants.iter().map(variant).collect()
}

fn read_line<S, O>(number: usize, text: &str) -> Result<Line<S, O>, Misread>
where
    S: FromStr<Err = String>,
    O: FromStr<Err = String>,
{
    let misread = |why: String| Misread { line: number, why };
    let (step, expected) = match text.split_once("->") {
        None => (text, Expectation::Seen("ok".parse().map_err(misread)?)),
        Some((step, expected)) => match expected.trim() {
            "?" => (step, Expectation::Unknown),
            seen => (step, Expectation::Seen(seen.parse().map_err(misread)?)),
        },
    };
    Ok(Line { number, step: step.parse().map_err(misread)?, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "\
# A comment.
scenario first-one
memory m anon 4
host load m[0]   -> 0x0   # and another

scenario kinds for anon memfd
memory m $ 4
locked -> ?
";

    #[test]
    fn scenarios_are_read_with_their_lines() {
        let scenarios = parse(TWO).unwrap();
        let names: Vec<_> = scenarios.iter().map(|scenario| scenario.name.as_str()).collect();
        assert_eq!(names, ["first-one", "kinds.anon", "kinds.memfd"]);
        let numbers: Vec<_> = scenarios[0].lines.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [3, 4]);
        assert_eq!(scenarios[0].lines[0].expected, Expectation::Seen(Observation::Ok));
        assert_eq!(scenarios[0].lines[1].expected, Expectation::Seen(Observation::Byte(0)));
        assert_eq!(scenarios[2].lines[0].step.to_string(), "memory m memfd 4");
        assert_eq!(scenarios[2].lines[1].expected, Expectation::Unknown);
    }

    #[test]
    fn a_scenario_prints_as_it_reads() {
        for scenario in parse(TWO).unwrap() {
            let again = parse(&scenario.to_string().replace('.', "-")).unwrap().remove(0);
            let steps = |scenario: &Scenario| -> Vec<_> {
                scenario.lines.iter().map(|line| (line.step.clone(), line.expected)).collect()
            };
            assert_eq!(steps(&again), steps(&scenario));
        }
    }

    #[test]
    fn a_misread_line_is_named() {
        for (text, line) in [
            ("locked", 1),
            ("scenario A\nlocked", 1),
            ("scenario a b\nlocked", 1),
            ("scenario a for\nlocked", 1),
            ("scenario a\n\n# only this\n", 1),
            ("scenario a\nlocked\nscenario a\nlocked", 3),
            ("scenario a\nlocked\nlokked", 3),
            ("scenario a\nlocked -> many", 2),
            ("scenario a\nlocked -> ", 2),
            ("scenario a for x\nmemory m $ 4", 2),
        ] {
            assert_eq!(parse(text).map_err(|misread| misread.line), Err(line), "{text}");
        }
    }
}
