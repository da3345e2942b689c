//! The summary of a run, in plain words and as JSON.

use std::fmt::Write;

use gmem::hyp::VmKind;

use crate::args::name_of;
use crate::outcome::Outcome;

impl Outcome {
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
            self.refusals(),
            self.incidents(),
            format!(
                "done: {} conversions in place; audit {}; {} bytes back in the pool and zero, {} \
                 frames missing",
                self.conversions,
                self.audit(),
                self.aftermath.scrubbed_bytes,
                self.aftermath.leaked_frames
            ),
        ]
    }

    fn refusals(&self) -> String {
        let (intruder, bad) = (self.intruder, self.device.bad_descriptors);
        match self.kind {
            VmKind::Protected => format!(
                "refused: {} conversions of pinned pages, {} touches of private memory (SIGBUS), {} \
                 checked reads of it, {bad} bad descriptors",
                intruder.busy_refused, intruder.sigbus, intruder.reads_refused
            ),
            VmKind::NonProtected => format!(
                "refused: {} punches of pinned pages, {} conversions to private, {bad} bad \
                 descriptors; {} touches of memory went through, for none is private",
                intruder.busy_refused, intruder.private_refused, intruder.open_touches
            ),
        }
    }

    fn incidents(&self) -> String {
        let seen = self.aftermath.incidents;
        format!(
            "incidents: pages destroyed {}, reads of private memory by a device {}, oopses {}; \
             prevented: accesses {}, pins {}, conversions {}",
            seen.nr_destroyed,
            seen.nr_dma_into_private,
            seen.nr_oopses,
            seen.nr_accesses_prevented,
            seen.nr_pins_prevented,
            seen.nr_conversions_prevented
        )
    }

    /// The summary for programs, on one line.
    pub(crate) fn json(&self) -> String {
        let (seen, hazard) = (&self.aftermath.incidents, self.hazard.unwrap_or_default());
        let caused = object(&[
            ("destroyed", &seen.nr_destroyed.to_string()),
            ("dma_into_private", &seen.nr_dma_into_private.to_string()),
            ("oopses", &seen.nr_oopses.to_string()),
            ("stuck", &seen.nr_stuck.to_string()),
            ("orphaned", &seen.nr_orphaned.to_string()),
        ]);
        let prevented = object(&[
            ("accesses", &seen.nr_accesses_prevented.to_string()),
            ("pins", &seen.nr_pins_prevented.to_string()),
            ("conversions", &seen.nr_conversions_prevented.to_string()),
        ]);
        object(&[
            ("sha256_match", &self.sha256_match().to_string()),
            ("bytes", &self.disk_bytes.to_string()),
            ("sigbus", &self.intruder.sigbus.to_string()),
            ("busy_refused", &self.intruder.busy_refused.to_string()),
            ("bad_descriptors", &self.device.bad_descriptors.to_string()),
            ("conversions", &self.conversions.to_string()),
            ("audit", &quoted(&self.audit())),
            ("leaked_frames", &self.aftermath.leaked_frames.to_string()),
            ("ok", &self.complaints().is_empty().to_string()),
            ("guest", &quoted(name_of(self.kind))),
            ("hypervisor", &quoted(self.hypervisor.name())),
            ("incidents", &object(&[("caused", &caused), ("prevented", &prevented)])),
            ("sha256", &quoted(&hex(&self.host_sha256))),
            ("requests", &self.device.requests.to_string()),
            ("reads_refused", &self.intruder.reads_refused.to_string()),
            ("private_refused", &self.intruder.private_refused.to_string()),
            ("open_touches", &self.intruder.open_touches.to_string()),
            ("signals", &hazard.signals.to_string()),
            ("efault", &hazard.efault.to_string()),
            ("poisoned_exits", &hazard.poisoned_exits.to_string()),
            ("scrubbed_bytes", &self.aftermath.scrubbed_bytes.to_string()),
            ("backing", &quoted(&self.backing)),
            ("seconds", &format!("{:.3}", self.serving.as_secs_f64())),
        ])
    }

    fn audit(&self) -> String {
        match self.aftermath.findings.as_slice() {
            [] => "clean".to_owned(),
            findings => findings.join("; "),
        }
    }
}

/// The line of JSON for a run that came to no outcome. How many frames are missing it cannot say.
pub(crate) fn json_of_failure(why: &str) -> String {
    object(&[
        ("sha256_match", "false"),
        ("bytes", "0"),
        ("sigbus", "0"),
        ("busy_refused", "0"),
        ("bad_descriptors", "0"),
        ("conversions", "0"),
        ("audit", &quoted("not run")),
        ("leaked_frames", "null"),
        ("ok", "false"),
        ("incidents", "null"),
        ("error", &quoted(why)),
    ])
}

/// A JSON object. The values are JSON already.
fn object(fields: &[(&str, &str)]) -> String {
    let fields: Vec<_> = fields.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
    format!("{{{}}}", fields.join(","))
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
    use crate::outcome::tests::{good, good_non_protected};

    #[test]
    fn json_begins_with_what_was_promised() {
        let expected = "{\"sha256_match\":true,\"bytes\":3,\"sigbus\":8,\"busy_refused\":1,\
                        \"bad_descriptors\":3,\"conversions\":9,\"audit\":\"clean\",\
                        \"leaked_frames\":0,\"ok\":true,\"guest\":\"protected\",\"hypervisor\":\"";
        assert!(good().json().starts_with(expected), "{}", good().json());
        let expected = "\"incidents\":\
                        {\"caused\":{\"destroyed\":1,\"dma_into_private\":1,\"oopses\":0,\
                        \"stuck\":0,\"orphaned\":0},\"prevented\":{\"accesses\":5,\"pins\":3,\
                        \"conversions\":2}},\"sha256\":\"abab";
        assert!(good().json().contains(expected), "{}", good().json());
    }

    #[test]
    fn each_kind_of_guest_is_told_of_in_its_words() {
        let (protected, other) =
            (good().lines().join("\n"), good_non_protected().lines().join("\n"));
        assert!(protected.contains("(SIGBUS)") && protected.contains("pages destroyed 1"));
        assert!(!other.contains("(SIGBUS)") && other.contains("4 touches of memory went through"));
        assert!(other.contains("pages destroyed 0"));
    }

    #[test]
    fn strings_are_escaped() {
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\u000ad\"");
        assert!(json_of_failure("x").ends_with("\"ok\":false,\"incidents\":null,\"error\":\"x\"}"));
    }
}
