//! Any list of what a VMM asks of a pool, against the naive model; and the arithmetic below it.

#![no_main]

use gmem::oracle::{PoolAction, compare_frames, run_pool};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Err(what) = compare_frames(bytes) {
        panic!("{what}");
    }
    let actions = PoolAction::list(bytes);
    if let Err(disagreement) = run_pool(&actions) {
        panic!("{disagreement}\n\n{actions:#?}");
    }
});
