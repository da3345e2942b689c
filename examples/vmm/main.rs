//! A small VMM: boots a guest on gmem, protected or not, and lets it read a real file through virtio.
//!
//! | module | holds |
//! |---|---|
//! | `machine` | the machine: built, and run until the guest powers off |
//! | `firmware` | what the guest finds in memory when it boots |
//! | `board` | what a vCPU's exits lead to |
//! | `cpu` | the run loop: a vCPU with its VMM behind it |
//! | `transport`, `device` | the disk: registers, and the thread that serves requests |
//! | `intruder` | a thread that goes at private and pinned memory meanwhile |
//! | `hazard` | what a host's own pointer does to a guest's page, and how a pin saves it |
//! | `aftermath` | what is left when all is over |
//! | `guest` | the guest's own code: both vCPUs' programs, and the disk driver |
//! | `layout` | what guest and VMM agree on |
//! | `disk` | FILE, and the host's own hash of it |
//! | `outcome`, `report` | what the run has shown: the verdict, the words |
//! | `args`, `console` | command line, output |
//! | `run`, `threads` | the watchdog, and the threads that it watches |

#![cfg_attr(
    not(test),
    deny(
        clippy::cast_possible_truncation,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

mod aftermath;
mod args;
mod board;
mod console;
mod cpu;
mod device;
mod disk;
mod firmware;
mod guest;
mod hazard;
mod intruder;
mod layout;
mod machine;
mod outcome;
mod report;
mod run;
mod threads;
mod transport;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::Builder;

use gmem::geometry::FolioSize;
use gmem::render::Picture;

use args::{Args, Command};
use console::Console;
use disk::Disk;
use outcome::Outcome;
use run::{Run, eprintln_quietly};

/// What an example fails with: a sentence for people.
type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(args)) => args,
        Ok(Command::Help) => {
            let _ = writeln!(std::io::stdout(), "{}", args::usage());
            return ExitCode::SUCCESS;
        }
        Err(complaint) => {
            eprintln_quietly(&format!("vmm: {complaint} (see --help)"));
            return ExitCode::from(2);
        }
    };
    let outcome = boot(&args);
    let (json, complaints) = match &outcome {
        Ok(outcome) => (outcome.json(), outcome.complaints()),
        Err(error) => (report::json_of_failure(&error.to_string()), vec![error.to_string()]),
    };
    for complaint in &complaints {
        eprintln_quietly(&format!("vmm: {complaint}"));
    }
    // Whoever asked for the line relies on getting it.
    let told = !args.json || writeln!(std::io::stdout(), "{json}").is_ok();
    if told && complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// All of it, from FILE to the picture.
fn boot(args: &Args) -> Fallible<Outcome> {
    let disk = match &args.file {
        Some(path) => Disk::open(path)?,
        None => Disk::open(Path::new("/proc/self/exe"))?,
    };
    if let Some(map) = &args.map {
        check_map(map, &disk)?;
    }
    let console = Arc::new(Console::new());
    let name = args.file.as_ref().map_or("this program".into(), |path| path.to_string_lossy());
    console.say("vmm", &format!("the disk will hold {name}: {} bytes", disk.len_bytes()));

    let run = Arc::new(Run::default());
    let watchdog = {
        let run = run.clone();
        let thread = Builder::new().name("watchdog".into()).spawn(move || run.watch());
        thread.map_err(|error| format!("cannot start a thread for the watchdog: {error}"))?
    };
    let outcome = machine::run(args, &disk, &console, &run);
    run.finish();
    let watched = watchdog.join();
    let (outcome, snapshot) = outcome?;
    watched.map_err(|_| "the watchdog panicked")?;

    if let Some(map) = &args.map {
        let title = format!("A {} guest while its disk reads {name}", args::name_of(args.guest));
        let picture = Picture { title: &title, folio_size: FolioSize::Huge2M, pages: &snapshot };
        std::fs::write(map, picture.to_svg()).map_err(|e| format!("{}: {e}", map.display()))?;
        console.say("vmm", &format!("wrote a picture of guest memory to {}", map.display()));
    }
    for line in outcome.lines() {
        console.say("vmm", &line);
    }
    Ok(outcome)
}

/// Complains now about a picture that could not be written later, or had better not be.
fn check_map(map: &Path, disk: &Disk) -> Fallible<()> {
    let trouble = |why: &str| Err(format!("{}: {why}", map.display()).into());
    if disk.is_same_file(map) {
        return trouble("is FILE, and would be overwritten");
    }
    if map.is_dir() {
        return trouble("is a directory");
    }
    // The parent of a bare name is the empty path.
    match map.parent() {
        Some(parent) if parent == Path::new("") || parent.is_dir() => Ok(()),
        _ => trouble("there is no such directory"),
    }
}
