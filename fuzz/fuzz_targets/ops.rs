//! Any list of actions, on a pool on the heap, against the naive model.

#![no_main]

use gmem::ArenaBacking;
use gmem::oracle::{self, Action};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let actions = Action::list(bytes);
    if let Err(disagreement) = oracle::run(&actions, ArenaBacking::Heap) {
        panic!("{disagreement}\n\n{actions:#?}");
    }
});
