//! Whether any of it grows with the machine: the same guest of one GiB, but its folios are anywhere in a TiB.

use crate::Outcome;
use crate::harness::{Bench, Goal};
use crate::machine::Machine;
use crate::transitions;

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    let turns: Vec<_> = transitions::TURNS.into_iter().collect();
    let names: Vec<_> = turns.iter().map(|(name, _)| format!("growth_{name}")).collect();
    if !bench.wants_any(&names.iter().map(String::as_str).collect::<Vec<_>>()) {
        return Ok(());
    }
    let (mut large, mut small) = (Machine::new(1024)?, Machine::new(1)?);
    for ((_, turn), name) in turns.into_iter().zip(&names) {
        let ours = |_| turn(&mut large);
        bench.timed_row(name, "1_gib", Goal::AtMost(1.5), ours, |_| turn(&mut small));
    }
    Ok(())
}
