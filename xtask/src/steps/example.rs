//! The main job: the `vmm` example serves files to a protected guest, and its last line of JSON
//! says how that went.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Context;
use crate::counts::Counts;
use crate::json::{Value, parse_object};
use crate::report::Outcome;
use crate::shell::{Cmd, Finished};

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
    file: Option<PathBuf>,
    end: End,
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
        let finished = run(context, job.file.as_deref());
        match judge(&finished, job.end) {
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
    let served = |name, file: fn(u64, &Path) -> io::Result<()>, bytes| {
        let path = scratch.join(name);
        file(bytes, &path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok::<_, String>(Job { name, file: Some(path), end: End::Served(Bytes::Exactly(bytes)) })
    };
    Ok(vec![
        served("an empty file", noise, 0)?,
        served("5 MB and a bit", noise, ODD_BYTES)?,
        served("200 MiB", noise, LARGE_BYTES)?,
        served("1 GiB", hole, HUGE_BYTES)?,
        Job { name: "its own executable", file: None, end: End::Served(Bytes::Some) },
        Job {
            name: "no file refused",
            file: Some(scratch.join("there is none")),
            end: End::Refused("No such file"),
        },
        Job {
            name: "a directory refused",
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

fn run(context: &Context, file: Option<&Path>) -> Finished {
    let cmd = Cmd::cargo(&context.root)
        .args(&["run", "--quiet", "--release", "--example", "vmm", "--", "--json"])
        .limit(LIMIT);
    match file {
        Some(file) => cmd.path(file).run(),
        None => cmd.run(),
    }
}

fn judge(finished: &Finished, end: End) -> Result<(), String> {
    let last = finished.stdout.lines().last();
    match end {
        End::Served(_) if !finished.success => Err(finished.status.clone()),
        End::Served(bytes) => judge_line(last.ok_or("it printed nothing")?, bytes),
        End::Refused(_) if finished.success => Err("it went through".into()),
        End::Refused(words) => judge_refusal(last.ok_or("it printed nothing")?, words),
    }
}

/// A run that could not begin still has every key, and says why.
fn judge_refusal(line: &str, words: &str) -> Result<(), String> {
    let object = parse_object(line)?;
    expect(&object, "sha256_match", &Value::Bool(false))?;
    expect(&object, "ok", &Value::Bool(false))?;
    expect(&object, "bytes", &Value::Number(0.0))?;
    match object.get("error") {
        Some(Value::Text(error)) if error.contains(words) => Ok(()),
        other => Err(format!("error is {other:?}, without `{words}`")),
    }
}

fn judge_line(line: &str, bytes: Bytes) -> Result<(), String> {
    let object = parse_object(line)?;
    expect(&object, "sha256_match", &Value::Bool(true))?;
    expect(&object, "audit", &Value::Text("clean".into()))?;
    expect(&object, "leaked_frames", &Value::Number(0.0))?;
    let read = number(&object, "bytes")?;
    match bytes {
        Bytes::Exactly(wanted) if read != wanted as f64 => {
            return Err(format!("bytes is {read}, not {wanted}"));
        }
        Bytes::Some if read <= 0.0 => return Err("bytes is 0".into()),
        _ => {}
    }
    for key in ["sigbus", "busy_refused", "bad_descriptors", "conversions"] {
        let seen = number(&object, key)?;
        if seen <= 0.0 {
            return Err(format!("{key} is {seen}: the example did not try that"));
        }
    }
    Ok(())
}

type Object = BTreeMap<String, Value>;

fn expect(object: &Object, key: &str, wanted: &Value) -> Result<(), String> {
    match object.get(key) {
        Some(found) if found == wanted => Ok(()),
        Some(found) => Err(format!("{key} is {found:?}, not {wanted:?}")),
        None => Err(format!("the JSON has no key {key}")),
    }
}

fn number(object: &Object, key: &str) -> Result<f64, String> {
    match object.get(key) {
        Some(Value::Number(number)) => Ok(*number),
        Some(found) => Err(format!("{key} is {found:?}, not a number")),
        None => Err(format!("the JSON has no key {key}")),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    const GOOD: &str = r#"{"sha256_match":true,"bytes":12,"sigbus":1,"busy_refused":2,
        "bad_descriptors":2,"conversions":9,"audit":"clean","leaked_frames":0}"#;

    #[test]
    fn a_good_line_passes() {
        assert_eq!(judge_line(GOOD, Bytes::Exactly(12)), Ok(()));
        assert_eq!(judge_line(GOOD, Bytes::Some), Ok(()));
        let empty = GOOD.replace("\"bytes\":12", "\"bytes\":0");
        assert_eq!(judge_line(&empty, Bytes::Exactly(0)), Ok(()));
    }

    #[test]
    fn a_refusal_has_to_say_why() {
        let line = r#"{"sha256_match":false,"bytes":0,"ok":false,"error":"x: is a directory"}"#;
        assert_eq!(judge_refusal(line, "is a directory"), Ok(()));
        assert!(judge_refusal(line, "No such file").is_err());
        assert!(judge_refusal(GOOD, "").is_err());
    }

    #[test]
    fn each_promise_is_looked_at() {
        for (from, to) in [
            ("true", "false"),
            ("\"bytes\":12", "\"bytes\":11"),
            ("\"sigbus\":1", "\"sigbus\":0"),
            ("\"busy_refused\":2", "\"busy_refused\":0"),
            ("\"bad_descriptors\":2,", ""),
            ("\"conversions\":9", "\"conversions\":\"9\""),
            ("clean", "dirty"),
            ("\"leaked_frames\":0", "\"leaked_frames\":1"),
        ] {
            let bad = GOOD.replace(from, to);
            assert_ne!(bad, GOOD);
            assert!(judge_line(&bad, Bytes::Exactly(12)).is_err(), "{from} -> {to} passed");
        }
        assert!(judge_line("done", Bytes::Some).is_err());
    }
}
