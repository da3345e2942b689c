//! Any list of what happens on the host's side of an object, on a memory file, against the naive model.

#![no_main]

use gmem::hyp::pkvm::Hypervisor;
use gmem::oracle::{HostAction, run_host};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, audit};
use libfuzzer_sys::fuzz_target;

/// The audit, for the comparison.
fn audited(pool: &FolioPool, memfd: &GuestMemfd, host: &Hypervisor) -> Result<(), String> {
    let report = audit::check_under(pool, &[memfd], host);
    if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
}

fuzz_target!(|bytes: &[u8]| {
    let actions = HostAction::list(bytes);
    if let Err(disagreement) = run_host(&actions, ArenaBacking::Memfd, audited) {
        panic!("{disagreement}\n\n{actions:#?}");
    }
});
