//! What a VMM can see of pKVM, as text: steps of a host and its guests, and what each step shows.
//!
//! A [`Scenario`] is run by [`run`] against anything that is a [`Machine`]: the agent in
//! `agent/` is one, on `/dev/kvm` under a real protected hypervisor; a simulation is another. Both
//! give the same observations, line by line, or one of them is wrong.
//!
//! The language is told in design/pkvm-oracle.md. There is nothing here but `std` and no `unsafe`.

mod console;
mod errno;
mod generate;
mod name;
mod observation;
mod scenario;
mod step;
mod verdict;
mod words;

pub use console::{DONE, Ending, TAINTED, Told, Transcript, begin, ended, lacking, note, observed};
pub use errno::Errno;
pub use generate::{Seed, generate};
pub use name::{Ipa, Name, PAGE_SIZE, Pages, Place, VcpuName};
pub use observation::{Observation, Signal};
pub use scenario::{Expectation, Line, Misread, Scenario, parse, parse_as};
pub use step::{
    Backing, COMMAND, GuestAct, HUGE_PAGES, HostAct, MEM_SHARE, MEM_UNSHARE, MEMORY_PAGES_MAX,
    PROGRAM, PROGRAM_SLOT, Size, SlotFlags, Step, VmKind,
};
pub use verdict::{Disagreement, Verdict};

/// Something that can be told to do steps.
pub trait Machine {
    /// Does one step and says what was seen. Whatever happens is an observation.
    fn step(&mut self, step: &Step) -> Observation;
}

/// Runs a scenario to its end. `see` is given each line with what it showed, as soon as it did.
pub fn run(
    scenario: &Scenario,
    machine: &mut dyn Machine,
    mut see: impl FnMut(&Line, &Observation),
) {
    for line in &scenario.lines {
        let observation = machine.step(&line.step);
        see(line, &observation);
    }
}
