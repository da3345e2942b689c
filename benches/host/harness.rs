//! How a row is measured: ours and a peer in one process, turn by turn, and medians of the turns. What counts
//! is the time that the thread has had of a processor: it is the only one here, and waits for nobody.

use std::hint::black_box;

use crate::bare::cpu_time;

/// How much to measure, and whether all that was measured is as it must be.
pub(crate) struct Bench {
    quick: bool,
    /// Only rows whose name contains this.
    filter: String,
    missed: bool,
}

impl Bench {
    pub(crate) fn new(quick: bool, filter: String) -> Self {
        Self { quick, filter, missed: false }
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    pub(crate) fn wants_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.wants(name))
    }

    /// Whether a row is not as it must be.
    pub(crate) fn missed(&self) -> bool {
        self.missed
    }

    /// Runs both in turn and prints the row. The bodies are one call each, of which there are `calls` in
    /// a turn and fewer with `--quick`. Times are per call and `per_call`th part of it.
    pub(crate) fn row<A, B>(
        &mut self,
        row: Row<'_>,
        mut ours: impl FnMut() -> A,
        mut theirs: impl FnMut() -> B,
    ) {
        if !self.wants(row.name) {
            return;
        }
        let (turns, calls) = match self.quick {
            true => (7, (row.calls / 4).max(1)),
            false => (31, row.calls),
        };
        let time = |call: &mut dyn FnMut()| {
            let start = cpu_time();
            for _ in 0..calls {
                call();
            }
            (cpu_time() - start) / f64::from(calls) / f64::from(row.per_call)
        };
        let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
        // The first turn warms up, and is not counted.
        for turn in 0..=turns {
            let our_time = time(&mut || drop(black_box(ours())));
            let peer_time = time(&mut || drop(black_box(theirs())));
            if turn > 0 {
                our_times.push(our_time);
                peer_times.push(peer_time);
            }
        }
        self.print(row, median(our_times), median(peer_times));
    }

    /// Prints a row, and whether it is as it must be.
    pub(crate) fn print(&mut self, row: Row<'_>, ours: f64, theirs: f64) {
        let Row { name, peer, at_most, .. } = row;
        let ratio = ours / theirs;
        println!("row {name} ours={ours:.1} peer={peer} peer_ns={theirs:.1} ratio={ratio:.6}");
        let Some(limit) = at_most else { return };
        let holds = ratio <= limit;
        self.missed |= !holds;
        println!("# {name} must be <= {limit}: {}", if holds { "it is" } else { "IT IS NOT" });
    }
}

/// A row as it is to be.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) name: &'a str,
    pub(crate) peer: &'a str,
    /// What the ratio must not exceed; `None` for a row that is for the reader.
    pub(crate) at_most: Option<f64>,
    /// How many calls a turn has.
    pub(crate) calls: u32,
    /// How many of what is measured a call does.
    pub(crate) per_call: u32,
}

impl<'a> Row<'a> {
    pub(crate) fn new(name: &'a str, peer: &'a str, calls: u32) -> Self {
        Self { name, peer, at_most: None, calls, per_call: 1 }
    }

    pub(crate) fn at_most(self, ratio: f64) -> Self {
        Self { at_most: Some(ratio), ..self }
    }

    pub(crate) fn per_call(self, per_call: u32) -> Self {
        Self { per_call, ..self }
    }
}

pub(crate) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
