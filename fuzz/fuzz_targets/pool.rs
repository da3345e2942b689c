//! Any list of what a VMM asks of a pool, against the naive model; and the arithmetic below it.

#![no_main]

use gmem::oracle::{PoolAction, compare_frames, run_pool};
use gmem::{FolioPool, GuestMemfd, audit};
use libfuzzer_sys::fuzz_target;

/// The audit, for the comparison.
fn audited(pool: &FolioPool, objects: &[&GuestMemfd]) -> Result<(), String> {
    let report = audit::check(pool, objects);
    if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
}

fuzz_target!(|bytes: &[u8]| {
    if let Err(what) = compare_frames(bytes) {
        panic!("{what}");
    }
    let actions = PoolAction::list(bytes);
    if let Err(disagreement) = run_pool(&actions, audited) {
        panic!("{disagreement}\n\n{actions:#?}");
    }
});
