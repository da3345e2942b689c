//! `cargo xtask pkvm`: boots a real pKVM under emulation, has the agent run all scenarios there,
//! and holds what it saw against what the scenarios say.

mod cpio;
mod judge;
mod machine;

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pkvm_oracle::{Expectation, Scenario, Seed, Transcript, generate};

use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::Cmd;
use judge::Judgement;
use machine::Machine;

pub(crate) use machine::Missing;

/// Scenarios that a generator makes, each run, unless another number is asked for.
const NR_RANDOM: usize = 30;

#[derive(Clone, Copy)]
struct Random {
    seed: Seed,
    number: usize,
}

/// What `cargo xtask pkvm` was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// Of the random scenarios; else the clock's.
    pub(crate) seed: Option<u64>,
    /// How many of those.
    pub(crate) random: Option<usize>,
    /// All of them have to show the same; none means one.
    pub(crate) boots: Option<u32>,
}

/// Why there is no judgement.
enum Cannot {
    /// This machine lacks something.
    Run(String),
    /// It ran, and the run is worth nothing.
    Trust(String),
}

pub(crate) fn run(context: &Context, wish: Wish, missing: Missing) -> Outcome {
    match compare(context, wish, missing) {
        Ok((what, judgement)) => {
            let counts =
                Counts { passed: judgement.agreed, failed: judgement.disagreed, skipped: 0 };
            Outcome::tested(what, counts, judgement.disagreed == 0)
        }
        Err(Cannot::Run(why)) => Outcome::Skipped(why),
        Err(Cannot::Trust(why)) => Outcome::failed(why),
    }
}

fn compare(context: &Context, wish: Wish, missing: Missing) -> Result<(String, Judgement), Cannot> {
    let written = read_all(&context.root).map_err(Cannot::Trust)?;
    let machine = Machine::find(context, missing)?;
    let random = Random {
        seed: Seed(wish.seed.unwrap_or_else(seed_of_clock)),
        number: wish.random.unwrap_or(NR_RANDOM),
    };
    println!("seed of the random scenarios: {}", random.seed.0);
    let initrd = machine.pack(context, random)?;

    let mut first: Option<Transcript> = None;
    for boot in 1..=wish.boots.unwrap_or(1).max(1) {
        let console = machine.boot(context, &initrd, boot)?;
        let transcript = Transcript::parse(&console).map_err(Cannot::Trust)?;
        if let Some(why) = transcript.lacking {
            return Err(Cannot::Trust(format!("the machine lacks something: {why}")));
        }
        match &first {
            None => first = Some(transcript),
            Some(first) => judge::same(first, &transcript, boot).map_err(Cannot::Trust)?,
        }
    }
    let transcript = first.unwrap_or_default();

    let generated = generate(random.seed, random.number);
    let all: Vec<&Scenario> = written.iter().chain(&generated).collect();
    let judgement = Judgement::of(&all, &transcript).map_err(Cannot::Trust)?;
    let observed = machine.dir().join("observed.txt");
    fs::write(&observed, judge::as_seen(&all, &transcript))
        .map_err(|e| Cannot::Trust(format!("{}: {e}", observed.display())))?;
    println!("{judgement}");
    println!("as seen, in the language itself: {}", observed.display());
    if let Some((name, line)) = without_expectation(&written) {
        return Err(Cannot::Trust(format!("{name}, line {line}, expects nothing: no check")));
    }
    simulation_shows(context, &observed)?;
    let what = format!(
        "{} scenarios, and {} random ones of seed {}, as the simulation shows them; {} boots",
        written.len(),
        generated.len(),
        random.seed.0,
        wish.boots.unwrap_or(1).max(1)
    );
    Ok((what, judgement))
}

/// Holds the simulation against what was seen, every line of it.
fn simulation_shows(context: &Context, observed: &Path) -> Result<(), Cannot> {
    const TEST: &str = "the_simulation_shows_what_a_real_one_has_just_shown";
    let finished = Cmd::cargo(&context.root)
        .env("GMEM_PKVM_OBSERVED", observed)
        .args(&["test", "--package", "gmem", "--test", "pkvm"])
        .args(&["--", "--ignored", "--exact", TEST])
        .run();
    match (finished.success, Counts::parse(&finished.output())) {
        (true, Counts { passed: 1, failed: 0, .. }) => Ok(()),
        _ => Err(Cannot::Trust("the simulation shows something else, see above".into())),
    }
}

fn seed_of_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A step of which it does not matter what it shows.
fn without_expectation(scenarios: &[Scenario]) -> Option<(&str, usize)> {
    scenarios.iter().find_map(|scenario| {
        let line = scenario.lines.iter().find(|line| line.expected == Expectation::Unknown)?;
        Some((scenario.name.as_str(), line.number))
    })
}

/// All scenarios of the repository.
fn read_all(root: &Path) -> Result<Vec<Scenario>, String> {
    let mut all: Vec<Scenario> = Vec::new();
    for path in machine::scenario_files(root)? {
        let shown = path.display();
        let text = fs::read_to_string(&path).map_err(|e| format!("{shown}: {e}"))?;
        for scenario in pkvm_oracle::parse(&text).map_err(|why| format!("{shown}: {why}"))? {
            if all.iter().any(|other| other.name == scenario.name) {
                return Err(format!("{shown}: there is another scenario {}", scenario.name));
            }
            all.push(scenario);
        }
    }
    if all.is_empty() {
        return Err("there is no scenario".into());
    }
    Ok(all)
}

#[cfg(test)]
mod unit {
    use super::*;
    use pkvm_oracle::parse;

    #[test]
    fn a_step_that_expects_nothing_is_found() {
        let read = |text: &str| parse(text).unwrap();
        let lax = read("scenario a\nlocked -> 0 pages\nscenario b\npinned -> ?");
        assert_eq!(without_expectation(&lax), Some(("b", 4)));
        assert_eq!(without_expectation(&read("scenario a\nlocked -> 0 pages")), None);
    }

    /// What is in the repository can be read here, where no pKVM can be booted.
    #[test]
    fn the_scenarios_of_the_repository_are_whole() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let all = read_all(root).unwrap();
        assert!(all.len() >= 60, "only {} scenarios", all.len());
        assert_eq!(without_expectation(&all), None);
    }
}
