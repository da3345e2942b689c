//! VMs that do anything to the simulated Gunyah: it answers, and its rules hold after every step.

use std::env;
use std::fs;
use std::path::Path;

use gmem::hyp::oracle::{GunyahCoverage, GunyahFlaw, run_gunyah, run_gunyah_flawed};

#[path = "common/seeded.rs"]
mod seeded;

/// Bytes for one list: some 300 steps.
const NR_BYTES: usize = 5000;

/// More is asked for by `GMEM_GUNYAH_SEEDS=1000 cargo test --release --test gunyah_ops`.
fn nr_seeds(usual: u64) -> u64 {
    match env::var("GMEM_GUNYAH_SEEDS") {
        Ok(wanted) => wanted.parse().expect("GMEM_GUNYAH_SEEDS is a number"),
        Err(_) => usual,
    }
}

fn seeds() -> Vec<(String, Vec<u8>)> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gunyah");
    let listed = fs::read_dir(seeds).expect("there are seeds");
    let files = listed.map(|entry| entry.expect("it can be listed").path());
    let mut files: Vec<_> = files.collect();
    files.sort();
    let read = |path: &Path| fs::read(path).expect("it can be read");
    files.iter().map(|path| (path.display().to_string(), read(path))).collect()
}

/// What has to come up, or the lists test less than they seem to.
const EVERYWHERE: [&str; 26] = [
    "paged provide None",
    "paged provide Some(EAGAIN)",
    "paged reclaim None",
    "paged turn None",
    "0x51000010 None",
    "0x51000011 None",
    "0x51000011 Some(Denied)",
    "0x51000012 None",
    "0x51000013 None",
    "0x51000014 None",
    "0x51000014 Some(MemReleased)",
    "0x51000015 None",
    "0x51000015 Some(MemInUse)",
    "0x51000018 None",
    "call 0x602b 0x0",
    "call 0x602c 0x0",
    "call 0x6030 0x0",
    "call 0x6032 0x0",
    "call 0x6033 0x0",
    "call 0x6033 0x6f",
    "life 1 None",
    "life 3 None",
    "life 4 None",
    "life 9 None",
    "life 10 None",
    "touch true",
];

#[test]
fn it_stands_anything() {
    let mut coverage = GunyahCoverage::default();
    for seed in 1..=nr_seeds(8) {
        // Shown if the test fails, also by a panic of the library.
        println!("seed {seed}");
        coverage.add(run_gunyah(&seeded::bytes(seed, NR_BYTES)).expect("all is well"));
    }
    println!("{coverage}");
    let missed: Vec<_> =
        EVERYWHERE.iter().filter(|&&what| !coverage.answers.contains_key(what)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}");
}

#[test]
fn the_seeds_are_well() {
    let mut coverage = GunyahCoverage::default();
    for (name, bytes) in seeds() {
        println!("{name}");
        coverage.add(run_gunyah(&bytes).expect("all is well"));
    }
    println!("{coverage}");
    assert!(coverage.nr_leaks > 0, "the weak point was never come upon");
}

#[test]
fn every_flaw_is_found_from_the_seeds() {
    let seeds = seeds();
    for flaw in GunyahFlaw::ALL {
        let told = seeds.iter().find_map(|(_, bytes)| run_gunyah_flawed(bytes, flaw).err());
        assert!(told.is_some(), "nobody notices {flaw:?}");
        println!("{flaw:?}: {told:?}");
    }
}
