//! Any list of what happens on the host's side of an object, on a memory file, against the naive model.

#![no_main]

use gmem::hyp::Hypervisor;
use gmem::oracle::{HostAction, run_host};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, audit};
use libfuzzer_sys::fuzz_target;

const MOST_ACTIONS: usize = 80;

/// The audit, for the comparison.
fn audited(pool: &FolioPool, memfd: &GuestMemfd, host: &Hypervisor) -> Result<(), String> {
    let report = audit::check_under(pool, &[memfd], host);
    if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
}

fuzz_target!(|bytes: &[u8]| {
    let mut actions = HostAction::list(bytes);
    // Each is system calls, and a look at hundreds of pages.
    actions.truncate(MOST_ACTIONS);
    if let Err(disagreement) = run_host(&actions, ArenaBacking::Memfd, audited) {
        panic!("{disagreement}\n\n{actions:#?}");
    }
});
