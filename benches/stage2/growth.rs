//! Whether any of it grows with the machine: the same guest of one GiB, but its folios are anywhere in a TiB.

use gmem::addr::ByteSize;

use crate::Outcome;
use crate::access::{self, Turn};
use crate::harness::{Bench, Goal};
use crate::machine::Machine;
use crate::transitions;

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    loads(bench)?;
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

/// The same for a guest's loads: its memory is the last of the machine's.
fn loads(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["growth_vcpu_load_hit", "growth_vcpu_load_walk"]) {
        return Ok(());
    }
    let machine = |nr_gib: u64| access::guest(ByteSize::from_mib(nr_gib << 10));
    let (large, small) = (machine(1024)?, machine(1)?);

    let at = access::addresses(access::NR_CACHED);
    let (mut ours, mut theirs) = (Turn::default(), Turn::default());
    for &at in &at {
        assert!(large.load_u64(at).is_some() && small.load_u64(at).is_some());
    }
    bench.row(
        "growth_vcpu_load_hit",
        "1_gib",
        Goal::AtMost(1.5),
        || large.hit_u64(ours.next(&at)).expect("remembered"),
        || small.hit_u64(theirs.next(&at)).expect("remembered"),
    );

    let at = access::addresses(access::NR_SPREAD);
    let (mut ours, mut theirs) = (Turn::default(), Turn::default());
    bench.row(
        "growth_vcpu_load_walk",
        "1_gib",
        Goal::AtMost(1.5),
        || ours.wait_for(&at, |at| large.load_u64(at)).expect("mapped"),
        || theirs.wait_for(&at, |at| small.load_u64(at)).expect("mapped"),
    );
    Ok(())
}
