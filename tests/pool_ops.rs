//! Random lists of what a VMM may ask of a pool, against the naive model: every answer, every counter
//! after every action, and where everything is.

use std::collections::BTreeSet;
use std::env;

use gmem::oracle::{
    PoolAction, PoolCoverage, PoolMistake, run_pool, run_pool_mistaken, shrink_pool,
};
use gmem::{FolioPool, GuestMemfd, audit};

#[path = "common/seeded.rs"]
mod seeded;

/// Bytes for one list: some 100 actions.
const NR_BYTES: usize = 800;

/// The audit, for the comparison.
fn audited(pool: &FolioPool, objects: &[&GuestMemfd]) -> Result<(), String> {
    let report = audit::check(pool, objects);
    if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
}

/// Actions that are a function of the seed.
fn actions(seed: u64) -> Vec<PoolAction> {
    PoolAction::list(&seeded::bytes(seed, NR_BYTES))
}

/// Asked for by `GMEM_POOL_SEEDS=10000 cargo test --release --test pool_ops`.
fn nr_seeds() -> u64 {
    env::var("GMEM_POOL_SEEDS").map_or(30, |wanted| wanted.parse().expect("a number"))
}

const EVERYWHERE: [&str; 20] = [
    "Allocate Exhausted",
    "Allocate Ok",
    "Allocate Unsupported",
    "Compact Ok",
    "CompactMade Ok",
    "Convert Ok",
    "Create Exhausted",
    "Create InvalidSize",
    "Create LimitReached",
    "Create Ok",
    "Drop Ok",
    "ForgetPin Ok",
    "Migrate Ok",
    "Migrate Unsupported",
    "Poison Ok",
    "Poison OutOfRange",
    "PoisonInUse Ok",
    "Punch Ok",
    "Write LimitReached",
    "Write Ok",
];

#[test]
fn a_pool_does_what_the_model_does() {
    let mut coverage = PoolCoverage::default();
    for seed in 1..=nr_seeds() {
        // Shown if the test fails, also by a panic of the library.
        println!("seed {seed}");
        let actions = actions(seed);
        match run_pool(&actions, audited) {
            Ok(more) => coverage.add(more),
            Err(disagreement) => {
                let few = shrink_pool(&actions, audited);
                let last = run_pool(&few, audited).expect_err("it was seen to fail");
                panic!("{disagreement}\n\nof these it takes {few:#?}\n\n{last}");
            }
        }
    }
    println!("{:#?}", coverage.answers);
    let met: BTreeSet<&str> = coverage.answers.keys().map(String::as_str).collect();
    let missed: Vec<_> = EVERYWHERE.iter().filter(|answer| !met.contains(*answer)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}");
}

/// A model that is wrong is found out, whichever rule it is wrong about: the comparison can fail.
#[test]
fn every_mistake_of_a_pools_model_is_noticed() {
    for mistake in PoolMistake::ALL {
        let noticed = (1..=120).find(|&seed| run_pool_mistaken(&actions(seed), mistake).is_err());
        match noticed {
            Some(seed) => println!("{mistake:?}: noticed with seed {seed}"),
            None => panic!("{mistake:?} was not noticed"),
        }
    }
}
