//! What a run has shown, in plain words and as JSON.

use std::fmt::Write;
use std::time::Duration;

use crate::device::DeviceStat;
use crate::intruder::IntruderStat;

/// The facts; [`Outcome::complaints`] judges them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) backing: String,
    pub(crate) disk_bytes: u64,
    pub(crate) guest: Option<GuestReport>,
    pub(crate) host_sha256: [u8; 32],
    pub(crate) device: DeviceStat,
    pub(crate) intruder: IntruderStat,
    pub(crate) conversions: u64,
    pub(crate) serving: Duration,
    /// What the audits found, before and after the machine was torn down.
    pub(crate) findings: Vec<String>,
    /// What is not as it was before there was a guest.
    pub(crate) left_behind: Vec<String>,
    pub(crate) leaked_frames: u64,
    pub(crate) scrubbed_bytes: u64,
}

/// What the guest said at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestReport {
    pub(crate) disk_bytes: u64,
    pub(crate) sha256: [u8; 32],
}

/// How many descriptors the guest makes that the device has to refuse.
const MALICIOUS: u64 = 3;

impl Outcome {
    fn sha256_match(&self) -> bool {
        self.guest.is_some_and(|guest| {
            guest.sha256 == self.host_sha256 && guest.disk_bytes == self.disk_bytes
        })
    }

    /// Everything that did not hold.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut complaints = self.findings.clone();
        complaints.extend(self.left_behind.iter().cloned());
        let mut expect = |held: bool, complaint: &str| {
            if !held {
                complaints.push(complaint.to_owned());
            }
        };
        expect(self.guest.is_some(), "the guest did not report");
        expect(self.sha256_match(), "the guest's hash of FILE is not the host's");
        expect(self.intruder.busy_refused > 0, "nobody tried to convert pinned pages");
        expect(self.intruder.sigbus > 0, "nobody touched private memory");
        expect(
            self.device.bad_descriptors == MALICIOUS,
            "not exactly the malicious descriptors were refused",
        );
        expect(self.leaked_frames == 0, "frames are missing from the pool");
        complaints
    }

    /// The summary for people.
    pub(crate) fn lines(&self) -> Vec<String> {
        let seconds = self.serving.as_secs_f64();
        let rate = self.disk_bytes as f64 / f64::from(1 << 20) / seconds.max(1e-9);
        let guest = self.guest.map_or_else(|| "none".to_owned(), |guest| hex(&guest.sha256));
        vec![
            format!("SHA-256 by the guest  {guest}"),
            format!("SHA-256 by the host   {}", hex(&self.host_sha256)),
            format!(
                "{} bytes in {} requests, {seconds:.2} s, {rate:.0} MiB/s",
                self.disk_bytes, self.device.requests
            ),
            format!(
                "refused: {} conversions of pinned pages, {} touches of private memory (SIGBUS), {} \
                 checked reads of it, {} bad descriptors",
                self.intruder.busy_refused,
                self.intruder.sigbus,
                self.intruder.reads_refused,
                self.device.bad_descriptors
            ),
            format!(
                "done: {} conversions in place; audit {}; {} bytes back in the pool and zero, {} \
                 frames missing",
                self.conversions,
                self.audit(),
                self.scrubbed_bytes,
                self.leaked_frames
            ),
        ]
    }

    /// The summary for programs, on one line.
    pub(crate) fn json(&self) -> String {
        let mut out = String::from("{");
        let mut field = |name: &str, value: &str| {
            let comma = if out.len() > 1 { "," } else { "" };
            let _ = write!(out, "{comma}\"{name}\":{value}");
        };
        field("sha256_match", &self.sha256_match().to_string());
        field("bytes", &self.disk_bytes.to_string());
        field("sigbus", &self.intruder.sigbus.to_string());
        field("busy_refused", &self.intruder.busy_refused.to_string());
        field("bad_descriptors", &self.device.bad_descriptors.to_string());
        field("conversions", &self.conversions.to_string());
        field("audit", &quoted(&self.audit()));
        field("leaked_frames", &self.leaked_frames.to_string());
        field("ok", &self.complaints().is_empty().to_string());
        field("sha256", &quoted(&hex(&self.host_sha256)));
        field("requests", &self.device.requests.to_string());
        field("reads_refused", &self.intruder.reads_refused.to_string());
        field("scrubbed_bytes", &self.scrubbed_bytes.to_string());
        field("backing", &quoted(&self.backing));
        field("seconds", &format!("{:.3}", self.serving.as_secs_f64()));
        out.push('}');
        out
    }

    fn audit(&self) -> String {
        match self.findings.as_slice() {
            [] => "clean".to_owned(),
            findings => findings.join("; "),
        }
    }
}

/// The line of JSON for a run that came to no outcome. How many frames are missing it cannot say.
pub(crate) fn json_of_failure(why: &str) -> String {
    format!(
        "{{\"sha256_match\":false,\"bytes\":0,\"sigbus\":0,\"busy_refused\":0,\"bad_descriptors\":0,\
         \"conversions\":0,\"audit\":\"not run\",\"leaked_frames\":null,\"ok\":false,\"error\":{}}}",
        quoted(why)
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Outcome {
        Outcome {
            backing: "memfd".into(),
            disk_bytes: 3,
            guest: Some(GuestReport { disk_bytes: 3, sha256: [0xab; 32] }),
            host_sha256: [0xab; 32],
            device: DeviceStat { requests: 5, bytes: 512, bad_descriptors: 3 },
            intruder: IntruderStat { busy_refused: 1, sigbus: 8, reads_refused: 4 },
            conversions: 9,
            serving: Duration::from_millis(1500),
            findings: vec![],
            left_behind: vec![],
            leaked_frames: 0,
            scrubbed_bytes: 4096,
        }
    }

    #[test]
    fn json_begins_with_what_was_promised() {
        let expected = "{\"sha256_match\":true,\"bytes\":3,\"sigbus\":8,\"busy_refused\":1,\
                        \"bad_descriptors\":3,\"conversions\":9,\"audit\":\"clean\",\
                        \"leaked_frames\":0,\"ok\":true,\"sha256\":\"abab";
        assert!(good().json().starts_with(expected), "{}", good().json());
    }

    #[test]
    fn whatever_did_not_hold_is_a_complaint() {
        assert!(good().complaints().is_empty());
        let spoil: [fn(&mut Outcome); 8] = [
            |o| o.guest = None,
            |o| o.host_sha256[31] = 0,
            |o| o.intruder.busy_refused = 0,
            |o| o.intruder.sigbus = 0,
            |o| o.device.bad_descriptors = 2,
            |o| o.leaked_frames = 1,
            |o| o.findings.push("a finding".into()),
            |o| o.left_behind.push("something".into()),
        ];
        for spoil in spoil {
            let mut outcome = good();
            spoil(&mut outcome);
            assert!(!outcome.complaints().is_empty());
            assert!(outcome.json().contains("\"ok\":false"));
        }
    }

    #[test]
    fn strings_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\u000ad\"");
        assert!(json_of_failure("x").ends_with("\"ok\":false,\"error\":\"x\"}"));
    }
}
