//! The audit: whole-system invariants, checked across floors, when nothing is under way.
//!
//! It is meant for tests, for the end of a guest's life, and for whoever does not believe us. It
//! looks at every page, and waits for conversions to end.

use std::collections::BTreeMap;
use std::fmt;

use crate::addr::Pfn;
use crate::folio::FolioPool;
use crate::gmem::GuestMemfd;

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Report {
    findings: Vec<String>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// A sentence for everything that is wrong.
    pub fn findings(&self) -> &[String] {
        &self.findings
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.findings.as_slice() {
            [] => f.write_str("clean"),
            findings => f.write_str(&findings.join("; ")),
        }
    }
}

/// Checks a pool and the objects that draw from it.
///
/// Of each object: pins counted and pins written down agree; what is pinned is shared; no page is
/// left half converted; what views map is shared, and is what the kernel's page tables hold. Of the
/// pool: its counters add up, no frame is in two objects or free and in one, and free frames are
/// zero.
pub fn check(pool: &FolioPool, objects: &[&GuestMemfd]) -> Report {
    let mut findings = Vec::new();
    check_pool(pool, &mut findings);
    let mut owner_of: BTreeMap<Pfn, &str> = BTreeMap::new();
    for object in objects {
        object.check_invariants(&mut findings);
        for pfn in object.frames().iter().flat_map(|frames| frames.iter()) {
            if let Some(other) = owner_of.insert(pfn, object.name()) {
                findings.push(format!("frame {pfn} is in {other} and in {}", object.name()));
            }
            if pool.is_free(pfn) {
                findings.push(format!("frame {pfn} is in {} and free", object.name()));
            }
        }
    }
    Report { findings }
}

fn check_pool(pool: &FolioPool, findings: &mut Vec<String>) {
    let stat = pool.stat();
    let sum = stat.free.get() + stat.used.get() + stat.quarantined.get();
    if sum != stat.capacity.get() {
        findings.push(format!("the pool's counters do not add up: {stat:?}"));
    }
    if stat.reserved > stat.free {
        findings.push(format!("the pool has promised more than it has: {stat:?}"));
    }
    if let Err(unscrubbed) = pool.verify_scrubbed() {
        findings.push(unscrubbed.to_string());
    }
}
