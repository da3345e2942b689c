//! What the simulated EL2 costs: `cargo bench --bench stage2 -- [--quick] [PART OF A ROW'S NAME]`.
//!
//! Each row measures ours and a peer in the same process, turn by turn, and prints medians:
//! `row NAME ours=NS peer=PEERNAME peer_ns=NS ratio=R`. design/benchmarks.md says what the rows mean and has
//! figures.

mod access;
#[expect(dead_code, reason = "other benches use the rest of it")]
#[path = "../common/mod.rs"]
mod harness;

use harness::Bench;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    // cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let bench = Bench::new(quick, filter.unwrap_or_default().leak());

    access::rows(bench)
}
