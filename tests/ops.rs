//! Random lists of actions, against the naive model: every answer and all that can be seen, on every
//! backing that the host has.

use std::collections::BTreeSet;
use std::env;
use std::ops::RangeInclusive;
use std::time::{SystemTime, UNIX_EPOCH};

use gmem::ArenaBacking;
use gmem::audit;
use gmem::oracle::{Action, Coverage, Disagreement, Mistake, run_inspected, run_mistaken, shrink};

mod common;
#[path = "common/seeded.rs"]
mod seeded;
#[path = "common/setting.rs"]
mod setting;

use common::Capability;
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

/// Bytes for one list: some 120 actions.
const NR_BYTES: usize = 1536;

/// Actions that are a function of the seed.
fn actions(seed: u64) -> Vec<Action> {
    Action::list(&seeded::bytes(seed, NR_BYTES))
}

/// The same seeds each time, and one that nobody has tried yet. `GMEM_OPS_SEEDS` asks for more of
/// them: `GMEM_OPS_SEEDS=10000 cargo test --release --test ops`.
fn seeds(usual: RangeInclusive<u64>) -> impl Iterator<Item = u64> {
    let wanted = match env::var("GMEM_OPS_SEEDS") {
        Ok(wanted) => 1..=wanted.parse().expect("GMEM_OPS_SEEDS is a number"),
        Err(_) => usual,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    wanted.chain([now as u64])
}

fn check(backing: ArenaBacking, usual_seeds: RangeInclusive<u64>) -> Coverage {
    let mut coverage = Coverage::default();
    for seed in seeds(usual_seeds) {
        // Shown if the test fails, also by a panic of the library.
        println!("seed {seed:#x} on {backing}");
        let actions = actions(seed);
        match run_audited(&actions, backing) {
            Ok(more) => coverage.add(more),
            Err(disagreement) => fail(&actions, backing, &disagreement),
        }
    }
    println!("{coverage}");
    coverage
}

fn run_audited(actions: &[Action], backing: ArenaBacking) -> Result<Coverage, Disagreement> {
    run_inspected(actions, backing, &mut |pool, objects| {
        let report = audit::check(pool, objects);
        if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
    })
}

/// Says it with as few actions as will do.
fn fail(actions: &[Action], backing: ArenaBacking, disagreement: &Disagreement) {
    let few = shrink(actions, |actions| run_audited(actions, backing));
    let last = run_audited(&few, backing).expect_err("it was seen to fail");
    panic!("{disagreement}\n\nof these it takes {few:#?}\n\n{last}");
}

/// Fails unless all of these have come up: a comparison of nothing is no comparison.
fn assert_has_met(coverage: &Coverage, wanted: &[&str]) {
    let met: BTreeSet<&str> = coverage.answers.keys().map(String::as_str).collect();
    let missed: Vec<_> = wanted.iter().filter(|answer| !met.contains(*answer)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}\n{coverage}");
}

const EVERYWHERE: [&str; 50] = [
    "Allocate EmptyRange",
    "Allocate Ok",
    "Allocate OutOfRange",
    "Allocate Overflow",
    "Allocate Unaligned",
    "Convert Busy",
    "Convert Cancelled",
    "Convert EmptyRange",
    "Convert Ok",
    "Convert OutOfRange",
    "Convert Overflow",
    "Convert TimedOut",
    "Convert Unaligned",
    "Create Exhausted",
    "Create InvalidSize",
    "Create Ok",
    "Drop Ok",
    "Examine Ok",
    "Load NotShared",
    "Load Ok",
    "Load OutOfRange",
    "Load Unaligned",
    "Owners Ok",
    "Pin Busy",
    "Pin EmptyRange",
    "Pin NotFound",
    "Pin NotShared",
    "Pin Ok",
    "Pin OutOfRange",
    "Pin Overflow",
    "Pin Unaligned",
    "Punch Busy",
    "Punch EmptyRange",
    "Punch Ok",
    "Punch Overflow",
    "Punch Unaligned",
    "Read NotShared",
    "Read Ok",
    "Read OutOfRange",
    "Snapshot Ok",
    "Snapshot OutOfRange",
    "Store NotShared",
    "Store Ok",
    "Trim Ok",
    "Unpin Ok",
    "Visibility Ok",
    "Visibility OutOfRange",
    "Write NotShared",
    "Write Ok",
    "Write OutOfRange",
];

/// By every path and mapping that a host with userfaultfd has.
const VIEWS: [&str; 6] = [
    "MapView Best Eager Ok",
    "MapView Best Lazy Ok",
    "MapView UserfaultfdSyscall Eager Ok",
    "MapView UserfaultfdSyscall Lazy Ok",
    "MapView Fixed Eager Ok",
    "MapView Fixed Lazy Ok",
];

#[test]
fn the_heap_does_what_the_model_does() {
    let coverage = check(ArenaBacking::Heap, 1..=40);
    assert_has_met(&coverage, &EVERYWHERE);
    assert_has_met(
        &coverage,
        &["MapView Best Eager Unsupported", "MapView Fixed Lazy Unsupported"],
    );
}

/// With views that are really mapped and touched: without userfaultfd those by `MAP_FIXED` alone, and all else is
/// the same.
#[test]
fn a_memory_file_and_its_views_do_what_the_model_does() {
    let coverage = check(ArenaBacking::Memfd, 1..=40);
    assert_has_met(&coverage, &EVERYWHERE);
    assert_has_met(&coverage, &["DropView Ok", "MapView Best Eager Ok", "MapView Fixed Lazy Ok"]);
    if common::require(Capability::Uffd) {
        assert_has_met(&coverage, &VIEWS);
        assert!(coverage.faults > 1000, "{coverage}");
        assert!(coverage.touches > 2 * coverage.faults, "{coverage}");
    } else {
        assert_has_met(&coverage, &["MapView UserfaultfdSyscall Eager MissingCapability"]);
    }
}

#[test]
fn transparent_huge_pages_do_what_the_model_does() {
    if common::require(Capability::Thp) {
        let _setting = Setting::set(SHMEM_ENABLED, "advise");
        let coverage = check(ArenaBacking::MemfdThp, 1..=24);
        assert_has_met(&coverage, &["Convert Ok", "Convert Busy", "Punch Ok"]);
        assert_has_met(&coverage, &VIEWS);
    }
}

#[test]
fn hugetlb_does_what_the_model_does() {
    if common::require(Capability::Hugetlb) {
        let _setting = Setting::set(NR_HUGEPAGES, "3");
        // Few objects have a size that fits, so little happens in a list; in these enough does.
        let coverage = check(ArenaBacking::MemfdHugetlb2M, 41..=56);
        assert_has_met(&coverage, &["Convert Ok", "Convert Busy", "Punch Ok"]);
    }
}

/// A model that is wrong is found out, whichever rule it is wrong about: the comparison can fail.
#[test]
fn every_mistake_of_a_model_is_noticed() {
    for mistake in Mistake::ALL {
        let backing = match mistake {
            // Only a view can tell.
            Mistake::ViewsMapPrivatePages if !common::require(Capability::Uffd) => continue,
            Mistake::ViewsMapPrivatePages => ArenaBacking::Memfd,
            _ => ArenaBacking::Heap,
        };
        // Few lists have two punches that make up a folio, with nothing in between that fills it again.
        let first = if mistake == Mistake::KeepsFoliosOfHoles { 151 } else { 1 };
        let noticed = (first..first + 60)
            .find(|&seed| run_mistaken(&actions(seed), backing, mistake).is_err());
        match noticed {
            Some(seed) => println!("{mistake:?}: noticed with seed {seed}"),
            None => panic!("{mistake:?} was not noticed"),
        }
    }
}

/// The smallest case there is, by name: pins that do not refuse.
#[test]
fn a_disagreement_says_where_and_what() {
    let run = |few: &[Action]| run_mistaken(few, ArenaBacking::Heap, Mistake::ConvertsPinnedPages);
    let seed = (1..=60).find(|&seed| run(&actions(seed)).is_err()).expect("a seed that shows it");
    let few = shrink(&actions(seed), run);
    let disagreement = run(&few).expect_err("shrinking keeps the failure");
    println!("{few:#?}\n{disagreement}");
    assert!(few.len() <= 4, "{few:#?}");
    assert_eq!(disagreement.action(), few.last());
    let text = disagreement.to_string();
    assert!(text.contains("ConvertToPrivate: ") && text.contains(", subpage "), "{text}");
    assert!(text.contains("pages changed sides"), "{text}");
}
