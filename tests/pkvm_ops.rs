//! Hosts and guests that do anything to the simulated EL2: it answers, and its rules hold after every step.

use std::env;
use std::fs;
use std::path::Path;

use gmem::hyp::oracle::{PkvmCoverage, PkvmFlaw, PkvmProfile, run_pkvm, run_pkvm_flawed};

#[path = "common/seeded.rs"]
mod seeded;

/// Bytes for one list: some 200 steps.
const NR_BYTES: usize = 2000;

/// More is asked for by `GMEM_PKVM_SEEDS=1000 cargo test --release --test pkvm_ops`.
fn nr_seeds(usual: u64) -> u64 {
    match env::var("GMEM_PKVM_SEEDS") {
        Ok(wanted) => wanted.parse().expect("GMEM_PKVM_SEEDS is a number"),
        Err(_) => usual,
    }
}

fn check(profile: PkvmProfile, wanted: &[&str]) {
    let mut coverage = PkvmCoverage::default();
    for seed in 1..=nr_seeds(7) {
        // Shown if the test fails, also by a panic of the library.
        println!("seed {seed} on {profile:?}");
        coverage.add(run_pkvm(profile, &seeded::bytes(seed, NR_BYTES)).expect("all is well"));
    }
    println!("{coverage}");
    let missed: Vec<_> =
        wanted.iter().filter(|&&what| !coverage.answers.contains_key(what)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}");
}

const EVERYWHERE: [&str; 18] = [
    "DonateGuest EPERM",
    "DonateGuest Ok",
    "ForceReclaimGuestPage EAGAIN",
    "ForceReclaimGuestPage EFAULT",
    "ForceReclaimGuestPage Ok",
    "ShareGuest EINVAL",
    "ShareGuest Ok",
    "ShareHyp EPERM",
    "ShareHyp Ok",
    "UnshareGuest ENOENT",
    "UnshareGuest Ok",
    "another VM",
    "guest's 0xc6000003 Ok",
    "guest's 0xc6000003 fault",
    "kernel DoneAfterReclaim",
    "uaccess refused",
    "user space refused",
    "vCPU Ok",
];

#[test]
fn mainline_stands_anything() {
    check(PkvmProfile::Mainline72, &EVERYWHERE);
}

#[test]
fn android_stands_anything() {
    check(PkvmProfile::Android618, &EVERYWHERE);
}

#[test]
fn huge_pages_stand_anything() {
    check(PkvmProfile::HugeProtected, &EVERYWHERE);
}

#[test]
fn every_flaw_is_found() {
    for flaw in PkvmFlaw::ALL {
        let told = (1..=20).find_map(|seed| {
            let bytes = seeded::bytes(seed, NR_BYTES);
            run_pkvm_flawed(PkvmProfile::Mainline72, &bytes, flaw).err()
        });
        assert!(told.is_some(), "nobody notices {flaw:?}");
        println!("{flaw:?}: {told:?}");
    }
}

#[test]
fn the_seeds_are_well() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/pkvm");
    let mut nr = 0;
    for entry in fs::read_dir(seeds).expect("there are seeds") {
        let bytes = fs::read(entry.expect("it can be listed").path()).expect("it can be read");
        let (&first, bytes) = bytes.split_first().expect("it says which profile");
        let profile = PkvmProfile::ALL[usize::from(first) % PkvmProfile::ALL.len()];
        run_pkvm(profile, bytes).expect("all is well");
        nr += 1;
    }
    assert!(nr > 0, "no seed at all");
}
