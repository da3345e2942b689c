//! Bytes that EL2 keeps for each GiB of memory, against what the original does.

use gmem::el2_only::Kind;

use crate::Outcome;
use crate::harness::{Bench, Goal, print_row};
use crate::machine::{GIB_PAGES, Machine, Order};

const PAGE_BYTES: f64 = 4096.0;
/// Eight bytes for each page of a GiB.
const HYP_PAGES: f64 = 8.0 * GIB_PAGES as f64;
/// Entries of one page each, of a GiB in one tree.
const LEAVES: f64 = 8.0 * GIB_PAGES as f64;

pub(crate) fn rows(bench: Bench, quick: bool) -> Outcome<()> {
    // The original's host tables are a few while nothing has changed hands.
    let row = |name: &str, bytes: f64, theirs: f64| {
        let ratio = bytes / theirs;
        print_row(name, bytes, "bytes_of_the_original", theirs, ratio, Goal::AtMost(1.5));
    };
    if bench.wants("metadata_idle") {
        let nr_gib = 1024;
        let before = anonymous_memory()?;
        let machine = Machine::new(nr_gib)?;
        let bytes = machine.el2.metadata().get() as f64 / nr_gib as f64;
        row("metadata_idle", bytes, HYP_PAGES);
        grown("metadata_idle", before, nr_gib)?;
    }
    if bench.wants("metadata_donated") {
        let nr_gib = if quick { 1 } else { 8 };
        let before = anonymous_memory()?;
        let mut machine = Machine::with_guest(nr_gib, nr_gib * GIB_PAGES)?;
        machine.new_guest(Kind::Protected, machine.nr_pages);
        machine.donate_all(&mut machine.cpu(), Order::Random);
        let bytes = machine.el2.metadata().get() as f64 / nr_gib as f64;
        // A table for each 2 MiB in the host's tree and in the guest's, and one above 512 of those.
        row("metadata_donated", bytes, HYP_PAGES + 2.0 * (LEAVES + PAGE_BYTES));
        grown("metadata_donated", before, nr_gib)?;
        machine.end_protected_guest();
    }
    Ok(())
}

fn grown(name: &str, before: u64, nr_gib: u64) -> Outcome<()> {
    let grown = anonymous_memory()?.saturating_sub(before) / nr_gib;
    println!(
        "# {name}: the process has grown by {grown} bytes for each GiB, the bench's own lists included"
    );
    Ok(())
}

/// What the process has of anonymous memory, in bytes.
fn anonymous_memory() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no such line")?;
    Ok(line.split_whitespace().next().ok_or("no number")?.parse::<u64>()? * 1024)
}
