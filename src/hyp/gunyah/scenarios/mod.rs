//! Files that say, line by line, what hosts and guests do and what that shows. They are read as those that a real pKVM
//! is asked; here there is the simulation alone.
//!
//! | file | one idea |
//! |---|---|
//! | `step` | the steps, as types and as text |
//! | `seen` | what steps show, as a type and as text |
//! | `machine` | steps are done |
//! | `parcel` | messages to the resource manager, by words |

mod machine;
mod parcel;
mod seen;
mod step;

use std::fs;
use std::path::Path;

use machine::Machine;
use pkvm_oracle::{Expectation, parse_as};
use seen::Seen;
use step::Step;

type Scenario = pkvm_oracle::Scenario<Step, Seen>;

fn read(text: &str) -> Vec<Scenario> {
    parse_as(text).unwrap_or_else(|misread| panic!("{misread}"))
}

/// Lines that show something else than they say, and what is wrong at the end.
fn disagreements(scenario: &Scenario) -> Vec<String> {
    let mut machine = Machine::boot();
    let mut wrong = Vec::new();
    for line in &scenario.lines {
        let seen = machine.step(&line.step);
        let name = &scenario.name;
        match &line.expected {
            Expectation::Seen(expected) if *expected == seen => {}
            expected => {
                let step = format!("{name} line {}: {:?}", line.number, line.step);
                wrong.push(format!("{step}\n    expected {expected:?}\n    seen {seen:?}"));
            }
        }
    }
    wrong.extend(machine.check().into_iter().map(|told| format!("{}: {told}", scenario.name)));
    wrong
}

#[test]
fn the_simulation_shows_what_the_files_say() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("pkvm-oracle/gunyah");
    let mut paths: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut names = std::collections::BTreeSet::new();
    let mut wrong = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        let scenarios = parse_as(&text);
        let scenarios: Vec<Scenario> =
            scenarios.unwrap_or_else(|misread| panic!("{}: {misread}", path.display()));
        for scenario in scenarios {
            wrong.extend(disagreements(&scenario));
            assert!(names.insert(scenario.name.clone()), "{} comes twice", scenario.name);
        }
    }
    assert!(wrong.is_empty(), "{} disagreements:\n{}", wrong.len(), wrong.join("\n"));
    assert!(names.len() >= 40, "{} scenarios", names.len());
}

/// Whatever a line says wrongly is noticed, and the line is named.
#[test]
fn a_wrong_expectation_is_noticed() {
    let right = "scenario a
memory m gmem 2
vm v
bind v 0x1000 m[0..2]
guest v store 0x1000 0x5a
guest v load 0x1000          -> 0x5a
host load m[0]               -> SIGBUS 2
who m[0]                     -> lent
rm v release p               -> nothing
rm v raw 0x51000014          -> MSG_INVALID
state v                      -> RUNNING";
    assert_eq!(disagreements(&read(right)[0]), [""; 0]);
    let wrong = [
        (5, "scenario a", "guest v store 0x1000 0x5a", "guest v store 0x1000 0x5a -> run EPERM"),
        (6, "", "-> 0x5a", "-> 0x5b"),
        (7, "", "-> SIGBUS 2", "-> SIGBUS 3"),
        (7, "", "-> SIGBUS 2", ""),
        (8, "", "-> lent", "-> shared"),
        (9, "", "-> nothing", "-> HANDLE_INVALID"),
        (10, "", "-> MSG_INVALID", "-> DENIED"),
        (11, "", "-> RUNNING", "-> PAUSED"),
        (11, "", "-> RUNNING", "-> ?"),
    ];
    for (line, _, from, to) in wrong {
        let told = disagreements(&read(&right.replace(from, to))[0]);
        assert_eq!(told.len(), 1, "{to}: {told:?}");
        assert!(told[0].starts_with(&format!("a line {line}:")), "{told:?}");
    }
}

#[test]
fn what_is_no_step_and_what_nothing_shows_is_misread() {
    for text in [
        "fly",
        "memory m gmem",
        "memory m tape 4",
        "vm",
        "bind v 0x1001 m[0..1]",
        "bind v 0x1000 m[0..1] shiny",
        "guest v jump 0x1000",
        "guest v store 0x1000 0x100",
        "host gaze m[0]",
        "host store m[0]",
        "host load m[0] 1",
        "reclaim v 0x1000",
        "reclaim v 0x1000+0",
        "turn v 0x1000+1 sideways",
        "rm v",
        "rm v lend p",
        "rm v lend p m[0..1] w",
        "rm v lend p m[0..1] w:q",
        "rm v accept p keep",
        "rm v notify p loudly",
        "rm v raw 1 0g",
        "state v -> FLYING",
        "state v -> MEM_LOST",
        "state v -> 7",
    ] {
        assert!(parse_as::<Step, Seen>(&format!("scenario a\n{text}")).is_err(), "{text}");
    }
}
