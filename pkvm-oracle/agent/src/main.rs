//! Runs scenarios on this machine's `/dev/kvm` and tells what it saw.
//!
//! As init of a machine of its own: all files in `/scenarios`, and those that `/generate` (a seed
//! and a number) asks for; then it switches the machine off. Else: the files named as arguments.

mod alarm;
mod device;
mod fault;
mod init;
mod kvm;
mod machine;
mod memory;
mod program;
mod run_page;
mod sys;

use std::env;
use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use pkvm_oracle::{Ending, Errno, Scenario, VmKind, begin, ended, lacking, note, observed, parse};

use crate::machine::Real;
use crate::sys::Fork;

/// No scenario may take longer; one that spins takes some seconds a step.
const LIMIT: Duration = Duration::from_secs(60);
/// After a kill that does not work.
const GRACE: Duration = Duration::from_secs(5);

const INIT: u32 = 1;

fn main() -> ExitCode {
    if std::process::id() == INIT {
        init::main()
    }
    let mut scenarios = Vec::new();
    for path in env::args().skip(1) {
        let read = fs::read_to_string(&path).map_err(|error| error.to_string());
        match read.and_then(|text| parse(&text).map_err(|misread| misread.to_string())) {
            Ok(more) => scenarios.extend(more),
            Err(why) => {
                eprintln!("{path}: {why}");
                return ExitCode::FAILURE;
            }
        }
    }
    match kvm::Vm::new(VmKind::Protected) {
        Ok(_) => run_all(&scenarios, Vec::new),
        Err(errno) => println!("{}", lacking(&format!("no protected VM can be made: {errno}"))),
    }
    println!("{}", pkvm_oracle::DONE);
    ExitCode::SUCCESS
}

/// Each in a process of its own. `notes` is asked after each.
fn run_all(scenarios: &[Scenario], mut notes: impl FnMut() -> Vec<String>) {
    for scenario in scenarios {
        println!("{}", begin(&scenario.name));
        let ending = run_one(scenario).unwrap_or_else(|errno| Ending::Status(errno.0));
        for text in notes() {
            println!("{}", note(&text));
        }
        println!("{}", ended(&scenario.name, ending));
    }
}

fn run_one(scenario: &Scenario) -> Result<Ending, Errno> {
    match sys::fork()? {
        Fork::Child => sys::leave(match in_child(scenario) {
            Ok(()) => 0,
            Err(errno) => errno.0,
        }),
        Fork::Parent(pid) => wait(pid, LIMIT),
    }
}

fn in_child(scenario: &Scenario) -> Result<(), Errno> {
    fault::install()?;
    alarm::start()?;
    pkvm_oracle::run(scenario, &mut Real::default(), |line, seen| {
        println!("{}", observed(line.number, seen));
    });
    Ok(())
}

/// How a child ends, at the latest by our hand when the time is up.
fn wait(pid: libc::pid_t, limit: Duration) -> Result<Ending, Errno> {
    let start = Instant::now();
    let mut killed = false;
    loop {
        if let Some(status) = sys::reap(pid, false)? {
            return Ok(match status {
                _ if killed => Ending::Hung,
                0 => Ending::Well,
                _ if libc::WIFSIGNALED(status) => Ending::Killed(libc::WTERMSIG(status)),
                _ => Ending::Status(libc::WEXITSTATUS(status)),
            });
        }
        if start.elapsed() > limit && !killed {
            sys::kill(pid);
            killed = true;
        }
        if start.elapsed() > limit + GRACE {
            return Ok(Ending::Hung);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The child does nothing but end: it has one of this process's threads only.
    fn ending_of(end: fn(), limit: Duration) -> Ending {
        match sys::fork().unwrap() {
            Fork::Child => {
                end();
                sys::leave(0)
            }
            Fork::Parent(pid) => wait(pid, limit).unwrap(),
        }
    }

    #[test]
    fn every_ending_is_told() {
        assert_eq!(ending_of(|| {}, LIMIT), Ending::Well);
        assert_eq!(ending_of(|| sys::leave(3), LIMIT), Ending::Status(3));
        let kill_itself = || sys::kill(std::process::id() as libc::pid_t);
        assert_eq!(ending_of(kill_itself, LIMIT), Ending::Killed(libc::SIGKILL));
        let hang = || loop {
            std::hint::spin_loop();
        };
        assert_eq!(ending_of(hang, Duration::from_millis(50)), Ending::Hung);
    }
}
