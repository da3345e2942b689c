//! How a row is measured: ours and a peer in one process, turn by turn, and medians of the turns.

use std::hint::black_box;
use std::time::Instant;

/// How much to measure.
#[derive(Clone, Copy)]
pub(crate) struct Bench {
    runs: usize,
    calls_per_run: u32,
    /// How many of our calls there are for one of the peer's.
    ours_per_peer: u32,
    /// Only rows whose name contains this.
    filter: &'static str,
}

/// What a row must reach.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
    /// Printed for the reader.
    None,
}

impl Bench {
    /// A measurement of seconds, or of a moment.
    pub(crate) fn new(quick: bool, filter: &'static str) -> Self {
        let (runs, calls_per_run) = if quick { (7, 4_000) } else { (31, 20_000) };
        Self { runs, calls_per_run, ours_per_peer: 1, filter }
    }

    /// The same with so many of our calls for each of the peer's, where a peer takes much longer.
    pub(crate) fn ours_per_peer(self, ours_per_peer: u32) -> Self {
        Self { ours_per_peer, ..self }
    }

    pub(crate) fn wants_any(self, names: &[&str]) -> bool {
        names.iter().any(|name| self.wants(name))
    }

    pub(crate) fn wants(self, name: &str) -> bool {
        name.contains(self.filter)
    }

    /// The same with so many times fewer calls: for what takes longer.
    pub(crate) fn slower(self, times: u32) -> Self {
        Self { calls_per_run: (self.calls_per_run / times).max(1), ..self }
    }

    pub(crate) fn runs(self) -> usize {
        self.runs
    }

    pub(crate) fn calls_per_run(self) -> u32 {
        self.calls_per_run
    }

    /// Runs both in turn and prints the row. The bodies are what one call is; their results are
    /// kept from the optimiser.
    pub(crate) fn row<A, B>(
        self,
        name: &str,
        peer: &str,
        goal: Goal,
        mut ours: impl FnMut() -> A,
        mut theirs: impl FnMut() -> B,
    ) {
        let time_ours = |nr_calls: u32| time(nr_calls * self.ours_per_peer, &mut ours);
        self.timed_row(name, peer, goal, time_ours, |nr_calls| time(nr_calls, &mut theirs));
    }

    /// The same where only a part of what is done is to be timed: each body makes so many calls and
    /// says how many nanoseconds one took.
    pub(crate) fn timed_row(
        self,
        name: &str,
        peer: &str,
        goal: Goal,
        mut ours: impl FnMut(u32) -> f64,
        mut theirs: impl FnMut(u32) -> f64,
    ) {
        if !self.wants(name) {
            return;
        }
        let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
        // The first turn warms up, and is not counted.
        for turn in 0..=self.runs {
            let times = (ours(self.calls_per_run), theirs(self.calls_per_run));
            if turn > 0 {
                our_times.push(times.0);
                peer_times.push(times.1);
            }
        }
        let (ours, theirs) = (median(our_times), median(peer_times));
        print_row(name, ours, peer, theirs, ours / theirs, goal);
    }
}

/// How many nanoseconds one of so many calls takes.
pub(crate) fn time<R>(nr_calls: u32, call: &mut impl FnMut() -> R) -> f64 {
    let start = Instant::now();
    for _ in 0..nr_calls {
        black_box(call());
    }
    start.elapsed().as_nanos() as f64 / f64::from(nr_calls)
}

/// Prints a row, and whether it reaches its goal.
pub(crate) fn print_row(name: &str, ours: f64, peer: &str, theirs: f64, ratio: f64, goal: Goal) {
    println!("row {name} ours={ours:.1} peer={peer} peer_ns={theirs:.1} ratio={ratio:.6}");
    let (sign, limit, holds) = match goal {
        Goal::AtMost(limit) => ("<=", limit, ratio <= limit),
        Goal::AtLeast(limit) => (">=", limit, ratio >= limit),
        Goal::None => return,
    };
    println!("# {name} must be {sign} {limit}: {}", if holds { "it is" } else { "IT IS NOT" });
}

pub(crate) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Numbers that look random and are the same in every run: SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        Self(0x6765_6d6d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit
    }
}
