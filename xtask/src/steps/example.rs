//! The main job: the `vmm` example serves files to a protected guest, and its last line of JSON
//! says how that went.

use std::collections::BTreeMap;
use std::fs;
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
const ODD_BYTES: usize = 5_000_011;

/// One run of the example.
struct Job {
    name: &'static str,
    file: Option<PathBuf>,
    bytes: Bytes,
}

/// How much of the file the guest must have read.
#[derive(Clone, Copy)]
enum Bytes {
    Exactly(usize),
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
    let mut said = Vec::new();
    for job in &jobs {
        let finished = run(context, job.file.as_deref());
        match judge(&finished, job.bytes) {
            Ok(()) => {
                counts += Counts::ONE_PASSED;
                said.push(job.name.to_string());
            }
            Err(why) => {
                counts += Counts::ONE_FAILED;
                said.push(format!("{}: {why}", job.name));
            }
        }
    }
    match context.skips.lacks("uffd") {
        Some(why) if counts.passed == 0 => Outcome::Skipped(format!("no userfaultfd: {why}")),
        _ => Outcome::tested(said.join(", "), counts, counts.failed == 0),
    }
}

fn jobs(scratch: &Path) -> Result<Vec<Job>, String> {
    let odd: Vec<u8> =
        (0..ODD_BYTES).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
    Ok(vec![
        Job {
            name: "an empty file",
            file: Some(file(scratch, "empty", &[])?),
            bytes: Bytes::Exactly(0),
        },
        Job {
            name: "5 MB and a bit",
            file: Some(file(scratch, "odd", &odd)?),
            bytes: Bytes::Exactly(ODD_BYTES),
        },
        Job { name: "its own executable", file: None, bytes: Bytes::Some },
    ])
}

fn file(scratch: &Path, name: &str, content: &[u8]) -> Result<PathBuf, String> {
    let path = scratch.join(name);
    fs::write(&path, content).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
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

fn judge(finished: &Finished, bytes: Bytes) -> Result<(), String> {
    if !finished.success {
        return Err(finished.status.clone());
    }
    let line = finished.stdout.lines().last().ok_or("it printed nothing")?;
    judge_line(line, bytes)
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
        // With nothing to read, no request is in flight whose pins could be in the way.
        if seen <= 0.0 && !(key == "busy_refused" && read == 0.0) {
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
        let empty =
            GOOD.replace("\"bytes\":12", "\"bytes\":0").replace("refused\":2", "refused\":0");
        assert_eq!(judge_line(&empty, Bytes::Exactly(0)), Ok(()));
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
