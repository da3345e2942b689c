//! The main job: the `vmm` example serves files to guests, protected and not, and its last line of
//! JSON says how that went.

mod verdict;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Context;
use crate::counts::Counts;
use crate::report::Outcome;
use crate::shell::{Cmd, Finished};
use verdict::{judge_line, judge_refusal};

/// A deadlock in the example must not look like a slow machine.
const LIMIT: Duration = Duration::from_secs(5 * 60);
/// Neither a whole number of sectors nor of pages.
const ODD_BYTES: u64 = 5_000_011;
const LARGE_BYTES: u64 = 200 << 20;
/// More than the guest has memory; a hole, so that it takes no disk.
const HUGE_BYTES: u64 = 1 << 30;

/// One run of the example.
struct Job {
    name: &'static str,
    hypervisor: Hypervisor,
    guest: Guest,
    file: Option<PathBuf>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Protected,
    NonProtected,
}

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hypervisor {
    Pkvm,
    Android,
    HugePkvm,
    Gunyah,
    StaticGunyah,
}

impl Hypervisor {
    /// What the example calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Pkvm => "pkvm",
            Self::Android => "pkvm-android",
            Self::HugePkvm => "pkvm-huge",
            Self::Gunyah => "gunyah",
            Self::StaticGunyah => "gunyah-static",
        }
    }

    /// Whether a page is destroyed that the host's kernel touches, and whether a device reaches it.
    fn loses(self) -> (bool, bool) {
        match self {
            Self::Pkvm | Self::HugePkvm => (true, true),
            Self::Android => (true, false),
            Self::Gunyah | Self::StaticGunyah => (false, false),
        }
    }
}

impl Guest {
    /// What the example calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Protected => "protected",
            Self::NonProtected => "non-protected",
        }
    }
}

/// How it has to end.
#[derive(Clone, Copy)]
enum End {
    Served(Bytes),
    /// With a complaint that has these words in it.
    Refused(&'static str),
}

/// How much of the file the guest must have read.
#[derive(Clone, Copy)]
enum Bytes {
    Exactly(u64),
    Some,
}

pub(super) fn vmm(context: &Context) -> Outcome {
    let build = Cmd::cargo(&context.root).args(&["build", "--release", "--example", "vmm"]).run();
    if !build.success {
        return Outcome::failed(format!("build: {}", build.status));
    }
    let jobs = match jobs(&context.scratch) {
        Ok(jobs) => jobs,
        Err(why) => return Outcome::failed(why),
    };
    let mut counts = Counts::default();
    let mut nr_served = 0;
    let mut said = Vec::new();
    for job in &jobs {
        let finished = run(context, job);
        match judge(&finished, job) {
            Ok(()) => {
                counts += Counts::ONE_PASSED;
                nr_served += usize::from(matches!(job.end, End::Served(_)));
                said.push(job.name.to_string());
            }
            Err(why) => {
                counts += Counts::ONE_FAILED;
                said.push(format!("{}: {why}", job.name));
            }
        }
    }
    match context.skips.lacks("uffd") {
        Some(why) if nr_served == 0 => Outcome::Skipped(format!("no userfaultfd: {why}")),
        _ => Outcome::tested(said.join(", "), counts, counts.failed == 0),
    }
}

fn jobs(scratch: &Path) -> Result<Vec<Job>, String> {
    use Guest::{NonProtected, Protected};
    use Hypervisor::{Android, Gunyah, HugePkvm, Pkvm, StaticGunyah};
    let served = |name, (hypervisor, guest), file: fn(u64, &Path) -> io::Result<()>, bytes| {
        let path = scratch.join(name);
        file(bytes, &path).map_err(|e| format!("{}: {e}", path.display()))?;
        let end = End::Served(Bytes::Exactly(bytes));
        Ok::<_, String>(Job { name, hypervisor, guest, file: Some(path), end })
    };
    Ok(vec![
        served("an empty file", (Pkvm, Protected), noise, 0)?,
        served("5 MB and a bit", (Pkvm, Protected), noise, ODD_BYTES)?,
        served("200 MiB", (Pkvm, Protected), noise, LARGE_BYTES)?,
        served("1 GiB", (Pkvm, Protected), hole, HUGE_BYTES)?,
        Job {
            name: "its own executable",
            hypervisor: Pkvm,
            guest: Protected,
            file: None,
            end: End::Served(Bytes::Some),
        },
        served("an empty file, not protected", (Pkvm, NonProtected), noise, 0)?,
        served("200 MiB, not protected", (Pkvm, NonProtected), noise, LARGE_BYTES)?,
        served("5 MB on pkvm-android", (Android, Protected), noise, ODD_BYTES)?,
        served("5 MB on pkvm-huge", (HugePkvm, Protected), noise, ODD_BYTES)?,
        served("200 MiB on gunyah", (Gunyah, Protected), noise, LARGE_BYTES)?,
        served("5 MB on gunyah, not protected", (Gunyah, NonProtected), noise, ODD_BYTES)?,
        served("5 MB on gunyah-static", (StaticGunyah, Protected), noise, ODD_BYTES)?,
        served("an empty file on gunyah-static", (StaticGunyah, Protected), noise, 0)?,
        Job {
            name: "its own executable, not protected",
            hypervisor: Pkvm,
            guest: NonProtected,
            file: None,
            end: End::Served(Bytes::Some),
        },
        Job {
            name: "no file refused",
            hypervisor: Pkvm,
            guest: Protected,
            file: Some(scratch.join("there is none")),
            end: End::Refused("No such file"),
        },
        Job {
            name: "a directory refused",
            hypervisor: Pkvm,
            guest: NonProtected,
            file: Some(scratch.to_path_buf()),
            end: End::Refused("is a directory"),
        },
    ])
}

/// A file of so many bytes, no two blocks of it alike.
fn noise(bytes: u64, path: &Path) -> io::Result<()> {
    let mut out = io::BufWriter::new(fs::File::create(path)?);
    for at in (0..bytes).step_by(8) {
        let word = at.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes();
        let left = usize::try_from((bytes - at).min(8)).unwrap_or(8);
        out.write_all(&word[..left])?;
    }
    out.flush()
}

/// A file of so many zeroes that takes no disk.
fn hole(bytes: u64, path: &Path) -> io::Result<()> {
    fs::File::create(path)?.set_len(bytes)
}

fn run(context: &Context, job: &Job) -> Finished {
    let cmd = Cmd::cargo(&context.root)
        .args(&["run", "--quiet", "--release", "--example", "vmm", "--", "--json"])
        .args(&["--hypervisor", job.hypervisor.name(), "--guest", job.guest.name()])
        .limit(LIMIT);
    match &job.file {
        Some(file) => cmd.path(file).run(),
        None => cmd.run(),
    }
}

fn judge(finished: &Finished, job: &Job) -> Result<(), String> {
    let last = finished.stdout.lines().last();
    match job.end {
        End::Served(_) if !finished.success => Err(finished.status.clone()),
        End::Served(bytes) => {
            let of = (job.hypervisor, job.guest);
            judge_line(last.ok_or("it printed nothing")?, of, bytes)
        }
        End::Refused(_) if finished.success => Err("it went through".into()),
        End::Refused(words) => judge_refusal(last.ok_or("it printed nothing")?, words),
    }
}
