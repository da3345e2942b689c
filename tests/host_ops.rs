//! Random lists of what happens on the host's side of an object, against the naive model: every answer, and
//! after each step what views, domains, memslots and peers have.

use std::collections::BTreeSet;
use std::env;

use gmem::hyp::Hypervisor;
use gmem::oracle::{
    HostAction, HostCoverage, HostDisagreement, HostMistake, run_host, run_host_mistaken,
    shrink_host,
};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, audit};

mod common;
#[path = "common/seeded.rs"]
mod seeded;
#[path = "common/setting.rs"]
mod setting;

use common::Capability;
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

/// Bytes for one list: some 60 actions.
const NR_BYTES: usize = 800;

/// The audit, for the comparison.
fn audited(pool: &FolioPool, memfd: &GuestMemfd, host: &Hypervisor) -> Result<(), String> {
    let report = audit::check_under(pool, &[memfd], host);
    if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
}

/// Actions that are a function of the seed.
fn actions(seed: u64) -> Vec<HostAction> {
    HostAction::list(&seeded::bytes(seed, NR_BYTES))
}

/// Asked for by `GMEM_HOST_SEEDS=10000 cargo test --release --test host_ops`.
fn check(backing: ArenaBacking, usual: u64) -> HostCoverage {
    let nr_seeds = match env::var("GMEM_HOST_SEEDS") {
        Ok(wanted) => wanted.parse().expect("GMEM_HOST_SEEDS is a number"),
        Err(_) => usual,
    };
    let mut coverage = HostCoverage::default();
    for seed in 1..=nr_seeds {
        // Shown if the test fails, also by a panic of the library.
        println!("seed {seed} on {backing}");
        let actions = actions(seed);
        match run_host(&actions, backing, audited) {
            Ok(more) => coverage.add(more),
            Err(disagreement) => fail(&actions, backing, &disagreement),
        }
    }
    println!("{coverage}");
    coverage
}

/// Says it with as few actions as will do.
fn fail(actions: &[HostAction], backing: ArenaBacking, disagreement: &HostDisagreement) {
    let run = |few: &[HostAction]| run_host(few, backing, audited);
    let few = shrink_host(actions, run);
    let last = run(&few).expect_err("it was seen to fail");
    panic!("{disagreement}\n\nof these it takes {few:#?}\n\n{last}");
}

/// Fails unless all of these have come up: a comparison of nothing is no comparison.
fn assert_has_met(coverage: &HostCoverage, wanted: &[&str]) {
    let met: BTreeSet<&str> = coverage.answers.keys().map(String::as_str).collect();
    let missed: Vec<_> = wanted.iter().filter(|answer| !met.contains(*answer)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}\n{coverage}");
}

const EVERYWHERE: [&str; 34] = [
    "Bind Exists EEXIST",
    "Bind Exists EINVAL",
    "Bind Ok",
    "Bind OutOfRange EINVAL",
    "Bind SubscriberRefused EBUSY",
    "Convert Busy EAGAIN",
    "Convert HypervisorRefused EPERM",
    "Convert Ok",
    "Convert SubscriberRefused EBUSY",
    "Convert SubscriberRefused ETIMEDOUT",
    "Dma Detached",
    "Dma NotMapped",
    "Dma Ok",
    "Guest Relinquish Granted(true)",
    "Guest Share Granted(true)",
    "Guest Share NotPrivate",
    "Guest Store NoSlot",
    "Guest Store Ok",
    "Leave Ok",
    "Migrate Busy EAGAIN",
    "Migrate Ok",
    "Migrate SubscriberRefused EBUSY",
    "Migrate Unsupported EOPNOTSUPP",
    "Pin Busy EAGAIN",
    "Pin NotShared EFAULT",
    "Punch Busy EAGAIN",
    "Punch HypervisorRefused EBUSY",
    "Punch Ok",
    "Punch SubscriberRefused ETIMEDOUT",
    "Read NotShared EFAULT",
    "Unbind HypervisorRefused EBUSY",
    "Unbind Ok",
    "Unbind SubscriberRefused EBUSY",
    "Write Ok",
];

/// What takes files that can be mapped; views by every path of a host with userfaultfd.
const ON_FILES: [&str; 9] = [
    "Export Busy EAGAIN",
    "Export NotShared EFAULT",
    "Export Ok",
    "MapView Best Eager Ok",
    "MapView Best Lazy Ok",
    "MapView Fixed Eager Ok",
    "MapView Fixed Lazy Ok",
    "MapView UserfaultfdSyscall Eager Ok",
    "MapView UserfaultfdSyscall Lazy Ok",
];

fn assert_has_faulted(coverage: &HostCoverage) {
    assert!(coverage.faults > 1000, "{coverage}");
    assert!(coverage.touches > 2 * coverage.faults, "{coverage}");
}

#[test]
fn the_heap_does_what_the_model_does() {
    let coverage = check(ArenaBacking::Heap, 60);
    assert_has_met(&coverage, &EVERYWHERE);
    assert_has_met(&coverage, &["Export Unsupported EOPNOTSUPP", "Guest Unshare Granted(true)"]);
}

#[test]
fn a_memory_file_does_what_the_model_does() {
    if common::require(Capability::Uffd) {
        let coverage = check(ArenaBacking::Memfd, 80);
        assert_has_met(&coverage, &EVERYWHERE);
        assert_has_met(&coverage, &ON_FILES);
        assert_has_faulted(&coverage);
    }
}

#[test]
fn transparent_huge_pages_do_what_the_model_does() {
    if common::require(Capability::Uffd) && common::require(Capability::Thp) {
        let _setting = Setting::set(SHMEM_ENABLED, "advise");
        let coverage = check(ArenaBacking::MemfdThp, 40);
        assert_has_met(&coverage, &ON_FILES);
        assert_has_faulted(&coverage);
    }
}

#[test]
fn hugetlb_does_what_the_model_does() {
    if common::require(Capability::Uffd) && common::require(Capability::Hugetlb) {
        let _setting = Setting::set(NR_HUGEPAGES, "5");
        let coverage = check(ArenaBacking::MemfdHugetlb2M, 30);
        assert_has_met(
            &coverage,
            &["Convert Ok", "Export Ok", "Export Unaligned EINVAL", "Migrate Ok"],
        );
        assert_has_faulted(&coverage);
    }
}

/// A model that is wrong is found out, whichever rule it is wrong about: the comparison can fail.
fn assert_noticed(mistakes: &[HostMistake]) {
    for &mistake in mistakes {
        let backing = match mistake {
            // Only a view can tell.
            HostMistake::ViewsShowPrivatePages
            | HostMistake::ViewsShowHoles
            | HostMistake::LaterViewsAreEmpty
                if !common::require(Capability::Uffd) =>
            {
                continue;
            }
            HostMistake::ViewsShowPrivatePages
            | HostMistake::ViewsShowHoles
            | HostMistake::LaterViewsAreEmpty
            | HostMistake::ExportsMapNothing
            | HostMistake::ExportsPinNothing => ArenaBacking::Memfd,
            _ => ArenaBacking::Heap,
        };
        let notices = |&seed: &u64| run_host_mistaken(&actions(seed), backing, mistake).is_err();
        // Few lists have a guest give up what it has written to, or somebody leave for good.
        let first = match mistake {
            HostMistake::RelinquishedPagesKeepBytes => 95,
            HostMistake::TheLostHoldNothing | HostMistake::GuestsPagesMove => 15,
            _ => 1,
        };
        match (first..first + 100).find(notices) {
            Some(seed) => println!("{mistake:?}: noticed with seed {seed}"),
            None => panic!("{mistake:?} was not noticed"),
        }
    }
}

#[test]
fn mistakes_about_views_and_subscribers_are_noticed() {
    let (some, _) = HostMistake::ALL.split_at(HostMistake::ALL.len() / 2);
    assert_noticed(some);
}

#[test]
fn mistakes_about_guests_and_moves_are_noticed() {
    let (_, others) = HostMistake::ALL.split_at(HostMistake::ALL.len() / 2);
    assert_noticed(others);
}
