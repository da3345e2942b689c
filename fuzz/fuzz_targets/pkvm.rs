//! A host and guests that do anything to the simulated EL2, with any argument.

#![no_main]

use gmem::hyp::oracle::{PkvmProfile, run_pkvm};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, bytes)) = bytes.split_first() else { return };
    let profile = PkvmProfile::ALL[usize::from(first) % PkvmProfile::ALL.len()];
    if let Err(wrong) = run_pkvm(profile, bytes) {
        panic!("{profile:?}: {wrong}");
    }
});
