//! VMs that do anything to the simulated Gunyah: any bytes as messages, any registers as hypercalls.

#![no_main]

use gmem::hyp::oracle::run_gunyah;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Err(wrong) = run_gunyah(bytes) {
        panic!("{wrong}");
    }
});
