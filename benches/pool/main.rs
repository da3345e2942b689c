//! What the pool costs: `cargo bench --bench pool -- [--quick] [PART OF A ROW'S NAME]`.
//!
//! Lines are as those of the `state` bench. What has bytes is measured through the public interface; the rows
//! about frames alone drive the pool's arithmetic behind its lock, without memory. design/benchmarks.md
//! says what the rows mean and has figures.

mod bytes;
mod fragments;
mod frames;
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "the bench of state uses all of it")]
mod harness;
mod host;
mod kernel;
#[path = "../../tests/common/setting.rs"]
mod setting;

use harness::Bench;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    // cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let bench = Bench::new(quick, filter.unwrap_or_default().leak());

    frames::rows(bench)?;
    bytes::rows(bench)?;
    fragments::rows(bench)?;
    host::rows(bench, quick)
}

/// A line of `/proc/self/status`, in KiB.
fn kib_of_status(name: &str) -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).ok_or("no such line")?;
    Ok(line.split_whitespace().next().ok_or("no number")?.parse()?)
}
