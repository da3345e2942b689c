//! The simulated Gunyah, under VMs that do anything: any bytes become messages, hypercalls with any register, loads and
//! stores, and VMs that come and go. The rules, the specifications and what each step may change are the judges, after
//! every step.

use std::collections::BTreeMap;
use std::fmt;

use super::hostile;

/// Mistakes that it can be made to seem to make.
pub use super::hostile::Flaw as GunyahFlaw;

/// What came up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GunyahCoverage {
    /// How often each message, call, touch or step of a VM's life was answered how.
    pub answers: BTreeMap<String, u64>,
    /// Pages that came back to their owner with what a borrower wrote: nobody had asked for zeroes.
    pub nr_leaks: u64,
}

impl GunyahCoverage {
    /// Adds what came up elsewhere.
    pub fn add(&mut self, other: Self) {
        for (what, nr) in other.answers {
            *self.answers.entry(what).or_default() += nr;
        }
        self.nr_leaks += other.nr_leaks;
    }
}

impl fmt::Display for GunyahCoverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answers.iter().try_for_each(|(what, nr)| writeln!(f, "{nr:8} {what}"))?;
        writeln!(f, "{:8} pages came back as they were", self.nr_leaks)
    }
}

/// Does what the bytes say.
///
/// # Errors
/// The first step after which something was wrong, and what.
pub fn run_gunyah(bytes: &[u8]) -> Result<GunyahCoverage, String> {
    told(hostile::run(bytes, None))
}

/// The same, and it seems to make a mistake.
///
/// # Errors
/// As for [`run_gunyah`]; if the bytes bring the mistake up, it is found.
pub fn run_gunyah_flawed(bytes: &[u8], flaw: GunyahFlaw) -> Result<GunyahCoverage, String> {
    told(hostile::run(bytes, Some(flaw)))
}

fn told(ran: Result<hostile::Coverage, String>) -> Result<GunyahCoverage, String> {
    ran.map(|ran| GunyahCoverage { answers: ran.answers, nr_leaks: ran.nr_leaks })
}
