//! Scenarios that a real pKVM agrees with, asked of the simulation.
//!
//! `cargo xtask pkvm` asks the real one. Both read the same files.

mod simulated;

use std::fs;
use std::path::Path;

use pkvm_oracle::{Expectation, Scenario, Seed, generate, parse, run};
use simulated::Simulated;

fn scenarios() -> Vec<Scenario> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("pkvm-oracle/scenarios");
    let mut paths: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        parse(&text).unwrap_or_else(|misread| panic!("{}: {misread}", path.display()))
    };
    paths.iter().flat_map(read).collect()
}

/// Where the simulation shows something else than the scenarios say, and what is wrong with it afterwards.
fn disagreements(scenarios: &[Scenario]) -> Vec<String> {
    let mut wrong = Vec::new();
    for scenario in scenarios {
        let mut machine = Simulated::boot();
        run(scenario, &mut machine, |line, seen| {
            if let Expectation::Seen(expected) = line.expected {
                if expected != *seen {
                    let at = format!("{} line {}: {}", scenario.name, line.number, line.step);
                    wrong.push(format!("{at}\n    real {expected}\n    here {seen}"));
                }
            }
        });
        wrong.extend(machine.check().into_iter().map(|what| format!("{}: {what}", scenario.name)));
    }
    wrong
}

fn agree(scenarios: &[Scenario]) {
    let wrong = disagreements(scenarios);
    assert!(wrong.is_empty(), "{} disagreements:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_simulation_shows_what_a_real_one_does() {
    let scenarios = scenarios();
    assert!(scenarios.len() >= 60, "{} scenarios", scenarios.len());
    agree(&scenarios);
}

/// `cargo xtask pkvm` leaves what it saw in such a file, random scenarios and all, and names it.
#[test]
#[ignore = "needs a run of a real pKVM; cargo xtask pkvm has one"]
fn the_simulation_shows_what_a_real_one_has_just_shown() {
    let path = std::env::var_os("GMEM_PKVM_OBSERVED").expect("GMEM_PKVM_OBSERVED names a file");
    let text = fs::read_to_string(&path).unwrap();
    let scenarios = parse(&text).unwrap();
    assert!(!scenarios.is_empty());
    agree(&scenarios);
}

#[test]
fn random_scenarios_leave_it_sound() {
    for seed in 0..20 {
        for scenario in generate(Seed(seed), 10) {
            let mut machine = Simulated::boot();
            run(&scenario, &mut machine, |_, _| {});
            assert_eq!(machine.check(), Vec::<String>::new(), "{}", scenario.name);
        }
    }
}
