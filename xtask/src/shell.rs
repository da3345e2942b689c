//! Runs commands: shown before they run, passed through while they run, kept for the reader.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// No step's command may take longer, so that a deadlock is a failure and not a mute hang.
const DEFAULT_LIMIT: Duration = Duration::from_secs(35 * 60);

pub(crate) struct Cmd {
    command: Command,
    /// How a person would type it, environment first.
    shown: Vec<String>,
    limit: Duration,
}

pub(crate) struct Finished {
    /// Exit status 0, and in time.
    pub(crate) success: bool,
    /// For people: `exit status: 101`, or that the time was up.
    pub(crate) status: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Cmd {
    pub(crate) fn new(dir: &Path, program: &str) -> Self {
        let mut command = Command::new(program);
        // What is parsed must not be coloured.
        command.current_dir(dir).stdin(Stdio::null()).env("CARGO_TERM_COLOR", "never");
        Self { command, shown: vec![program.into()], limit: DEFAULT_LIMIT }
    }

    pub(crate) fn cargo(dir: &Path) -> Self {
        Self::new(dir, "cargo")
    }

    /// Of another toolchain than the one that runs us.
    pub(crate) fn cargo_of(dir: &Path, toolchain: &str) -> Self {
        let mut cmd = Self::new(dir, "cargo");
        // Ours is inherited through the environment and would also choose the rustc.
        for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
            cmd.command.env_remove(name);
        }
        cmd.arg(&format!("+{toolchain}"))
    }

    pub(crate) fn arg(mut self, arg: &str) -> Self {
        self.command.arg(arg);
        self.shown.push(quoted(arg));
        self
    }

    pub(crate) fn args(self, args: &[&str]) -> Self {
        args.iter().fold(self, |cmd, arg| cmd.arg(arg))
    }

    pub(crate) fn path(mut self, path: &Path) -> Self {
        self.command.arg(path);
        self.shown.push(quoted(&path.display().to_string()));
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        let value = value.into();
        self.shown.insert(0, format!("{name}={}", quoted(&value.to_string_lossy())));
        self.command.env(name, value);
        self
    }

    pub(crate) fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it, with what it prints passed through.
    pub(crate) fn run(mut self) -> Finished {
        println!("$ {}", self.shown.join(" "));
        self.finish(Echo::Through).unwrap_or_else(|e| Finished::not_started(&e))
    }

    /// Runs it, with what it prints kept only: it is for a reader that is no person.
    pub(crate) fn show_and_ask(self) -> Finished {
        println!("$ {}", self.shown.join(" "));
        self.ask()
    }

    /// Runs it mutely: for questions such as "is there such a tool".
    pub(crate) fn ask(mut self) -> Finished {
        self.finish(Echo::Off).unwrap_or_else(|e| Finished::not_started(&e))
    }

    fn finish(&mut self, echo: Echo) -> io::Result<Finished> {
        let mut child = self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let (in_time, stdout, stderr) = thread::scope(|scope| {
            let stdout = scope.spawn(move || copy(stdout, io::stdout(), echo));
            let stderr = scope.spawn(move || copy(stderr, io::stderr(), echo));
            let in_time = wait(&mut child, self.limit);
            (in_time, joined(stdout.join()), joined(stderr.join()))
        });
        let exit = child.wait()?;
        let status = if in_time {
            exit.to_string()
        } else {
            format!("stopped after {} s without an end", self.limit.as_secs())
        };
        Ok(Finished { success: in_time && exit.success(), status, stdout, stderr })
    }
}

impl Finished {
    fn not_started(error: &io::Error) -> Self {
        let status = format!("could not be started: {error}");
        Self { success: false, status, stdout: String::new(), stderr: String::new() }
    }

    /// Both streams: test runners differ in which one they write their summary to.
    pub(crate) fn output(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    Through,
    Off,
}

fn joined(result: thread::Result<String>) -> String {
    result.unwrap_or_else(|_| "(its output could not be read)".into())
}

/// Reads to the end. Output that cannot be passed on is still kept.
fn copy(from: Option<impl Read>, mut to: impl Write, echo: Echo) -> String {
    let mut kept = Vec::new();
    let Some(mut from) = from else { return String::new() };
    let mut buf = [0; 8192];
    loop {
        match from.read(&mut buf) {
            Ok(0) => break,
            Ok(len) => {
                kept.extend_from_slice(&buf[..len]);
                if echo == Echo::Through {
                    let _: io::Result<()> = to.write_all(&buf[..len]).and_then(|()| to.flush());
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Whether the child ended by itself. Otherwise it and its descendants are killed: one that is
/// left would keep the pipes open.
fn wait(child: &mut Child, limit: Duration) -> bool {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    while start.elapsed() < limit {
        match child.try_wait() {
            Ok(None) => thread::sleep(pause),
            Ok(Some(_)) | Err(_) => return true,
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    for pid in descendants(child.id()) {
        let _: io::Result<_> = Command::new("kill").arg("-KILL").arg(pid.to_string()).status();
    }
    false
}

/// The process and all that it started, oldest first.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    found
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+.,:/@".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{word}'") }
}

/// Whether an environment variable is set to something.
pub(crate) fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value != OsStr::new(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Cmd {
        Cmd::new(Path::new("/"), "sh").args(&["-c", script])
    }

    #[test]
    fn output_and_status_are_kept() {
        let finished = sh("echo out; echo err >&2; exit 3").ask();
        assert!(!finished.success);
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
        assert!(finished.status.contains('3'), "{}", finished.status);
        assert!(sh("exit 0").ask().success);
    }

    #[test]
    fn a_hang_ends_with_all_its_children() {
        let start = Instant::now();
        // The inner sleep inherits the pipes: unless it dies too, nobody sees their end.
        let finished = sh("sleep 60 & sleep 60; wait").limit(Duration::from_millis(200)).ask();
        assert!(!finished.success && finished.status.contains("without an end"));
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_program_that_is_not_there_is_a_failure() {
        let finished = Cmd::new(Path::new("/"), "no-such-program-here").ask();
        assert!(!finished.success && finished.status.contains("could not be started"));
    }

    #[test]
    fn commands_are_shown_as_typed() {
        let cmd = sh("true").env("RUSTFLAGS", "--cfg loom");
        assert_eq!(cmd.shown, ["RUSTFLAGS='--cfg loom'", "sh", "-c", "true"]);
    }
}
