//! What EL2's part costs: `cargo bench --bench stage2 -- [--quick] [PART OF A ROW'S NAME]`.
//!
//! Lines are as those of the `state` bench. Ours is a whole hypercall, by raw registers; memory has no bytes, so
//! nothing is zeroed. design/benchmarks.md says what the rows mean and has figures.

mod access;
mod bare;
mod extents;
mod growth;
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "the bench of state uses all of it")]
mod harness;
mod machine;
mod metadata;
mod transitions;

use harness::Bench;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    // cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let bench = Bench::new(quick, filter.unwrap_or_default().leak());

    // First, so that all of its memory is new.
    metadata::rows(bench, quick)?;
    transitions::rows(bench)?;
    access::rows(bench)?;
    extents::rows(bench)?;
    growth::rows(bench)
}
