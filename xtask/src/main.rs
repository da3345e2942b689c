//! `cargo xtask test`: runs every check that this machine allows and says what it left out.

mod cli;
mod counts;
mod json;
#[path = "../../tests/common/names.rs"]
mod names;
mod pkvm;
mod report;
mod shell;
mod skiplog;
mod steps;
mod toolchains;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use cli::{Invocation, Options};
use pkvm::{Missing, Wish};
use report::{Outcome, Report};
use skiplog::SkipLog;

/// What every step needs to know.
struct Context {
    /// The repository.
    root: PathBuf,
    /// Where cargo builds.
    target: PathBuf,
    /// Where steps may leave files.
    scratch: PathBuf,
    /// `--quick`.
    quick: bool,
    /// Where tests note what they skipped.
    skips: SkipLog,
}

fn main() -> ExitCode {
    match cli::parse(env::args().skip(1)) {
        Ok(Invocation::Help) => {
            print!("{}", cli::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Invocation::List) => {
            print!("{}", steps::list());
            ExitCode::SUCCESS
        }
        Ok(Invocation::Test(options)) => match test(&options) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(message) => complain(&message),
        },
        Ok(Invocation::Pkvm(wish)) => match pkvm(wish) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(message) => complain(&message),
        },
        Err(message) => complain(&message),
    }
}

fn complain(message: &str) -> ExitCode {
    eprintln!("xtask: {message}");
    ExitCode::from(2)
}

/// Whether all went well.
fn test(options: &Options) -> Result<bool, String> {
    let required = env::var("GMEM_REQUIRE").unwrap_or_default();
    let required = names::parse_required(&required)?;
    let context = context(options)?;

    let mut report = Report::new(&required);
    for step in steps::ALL {
        if !options.selects(step.name) {
            report.add(step.name, Outcome::NotSelected, 0.0);
            continue;
        }
        println!("\n=== {}: {}", step.name, step.about);
        let start = Instant::now();
        let outcome = if options.quick && !step.in_quick {
            Outcome::Skipped("left out by --quick".into())
        } else {
            (step.run)(&context)
        };
        report.add(step.name, outcome, start.elapsed().as_secs_f64());
    }
    report.note_skips(context.skips.read()?);
    println!("\n{report}");
    Ok(report.passed())
}

/// Whether the real pKVM agrees. That it could not be asked is an error: somebody asked for it.
fn pkvm(wish: Wish) -> Result<bool, String> {
    let context = context(&Options::default())?;
    match pkvm::run(&context, wish, Missing::Obtain) {
        Outcome::Ran { what, .. } => {
            println!("pkvm: agrees: {what}");
            Ok(true)
        }
        Outcome::Failed { why, .. } => {
            println!("pkvm: FAILED: {why}");
            Ok(false)
        }
        Outcome::Skipped(why) => Err(format!("pkvm cannot run here: {why}")),
        Outcome::NotSelected => Ok(false),
    }
}

fn context(options: &Options) -> Result<Context, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(PathBuf::from)
        .ok_or("xtask has no parent directory")?;
    let target = match env::var_os("CARGO_TARGET_DIR") {
        // The invocation's own directory, not ours: cargo reads it the same way.
        Some(dir) => env::current_dir().map_err(|e| e.to_string())?.join(dir),
        None => root.join("target"),
    };
    let scratch = target.join("xtask");
    fs::create_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let skips = SkipLog::create(scratch.join("skips.log"))?;
    Ok(Context { root, target, scratch, quick: options.quick, skips })
}
