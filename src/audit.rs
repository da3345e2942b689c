//! The audit: whole-system invariants, checked across floors, when nothing is under way.
//!
//! It is meant for tests, for the end of a guest's life, and for whoever does not believe us. It
//! looks at every page, and waits for conversions to end.

use std::collections::BTreeMap;
use std::fmt;

use crate::addr::Pfn;
use crate::folio::FolioPool;
use crate::gmem::GuestMemfd;
use crate::hyp::Hypervisor;
use crate::state::Visibility;

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
/// Of each object: pins counted and pins written down agree; what is pinned is shared; what is exported is pinned; no page is
/// left half converted; holes are in folios of the object's own, and zero; what views map is shared and not quarantined, is the frame that the
/// object has there, and is what the kernel's page tables hold. Of the
/// pool: its counters add up, no frame is in two objects or free and in one, and free frames are
/// there, and zero.
pub fn check(pool: &FolioPool, objects: &[&GuestMemfd]) -> Report {
    let mut findings = Vec::new();
    check_pool(pool, &mut findings);
    check_objects(pool, objects, &mut findings);
    Report { findings }
}

/// [`check`], and what guests hold of the pool according to their hypervisor.
///
/// Guests are to stand still meanwhile: objects and hypervisor are looked at one after the other.
///
/// Of the hypervisor: its own tables agree with each other, and what an object shares is the host's to see; no page was left
/// with a guest that is gone. Of each frame that it has given to a guest: it is in one of the objects, private there if
/// it is the guest's alone, and shared if not.
pub fn check_under(pool: &FolioPool, objects: &[&GuestMemfd], host: &Hypervisor) -> Report {
    let mut findings = Vec::new();
    check_pool(pool, &mut findings);
    let frames = check_objects(pool, objects, &mut findings);
    let shared = frames.iter().filter(|(_, (_, visibility))| *visibility == Visibility::Shared);
    findings.extend(host.check_invariants(shared.map(|(&pfn, _)| pfn).collect()));
    host.each_frame_of_guests(|pfn, given| match frames.get(&pfn) {
        Some((_, visibility)) if *visibility == given => {}
        Some((name, visibility)) => findings
            .push(format!("frame {pfn} is {visibility} in {name}, and {given} to the hypervisor")),
        None => findings.push(format!("frame {pfn} is a guest's, and in no object")),
    });
    Report { findings }
}

/// Frames by number: in which object, and who may see them there.
type Frames<'a> = BTreeMap<Pfn, (&'a str, Visibility)>;

fn check_objects<'a>(
    pool: &FolioPool,
    objects: &[&'a GuestMemfd],
    findings: &mut Vec<String>,
) -> Frames<'a> {
    let mut frames = Frames::new();
    for object in objects {
        object.check_invariants(findings);
        for (pfn, visibility) in object.frames() {
            if let Some((other, _)) = frames.insert(pfn, (object.name(), visibility)) {
                findings.push(format!("frame {pfn} is in {other} and in {}", object.name()));
            }
            if pool.is_free(pfn) {
                findings.push(format!("frame {pfn} is in {} and free", object.name()));
            }
        }
    }
    frames
}

fn check_pool(pool: &FolioPool, findings: &mut Vec<String>) {
    let stat = pool.counted();
    let parts = [stat.free, stat.reserved, stat.used, stat.quarantined, stat.poisoned];
    if parts.iter().map(|part| part.get()).sum::<u64>() != stat.capacity.get() {
        findings.push(format!("the pool's counters do not add up: {stat:?}"));
    }
    // Somebody has taken it from outside, and a look at it might be the end of the process.
    let missing = pool.arena().missing().get();
    // Holes are in folios that are in use, or that are quarantined since they could not be filled.
    let may_lack = stat.used.get() + stat.quarantined.get();
    let lost = missing + pool.arena().released().get().saturating_sub(may_lack);
    if lost > 0 {
        findings.push(format!("{lost} bytes of the pool have no memory behind them"));
    }
    if let Some(Err(unscrubbed)) = (missing == 0).then(|| pool.verify_scrubbed()) {
        findings.push(unscrubbed.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{ByteSize, Offset};
    use crate::backing::ArenaBacking;

    #[test]
    fn what_is_wrong_is_found() {
        let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(4)).unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_pages(2)).initial(Visibility::Shared);
        let object = builder.create(&pool).unwrap();
        object.write(Offset::new(0), &[1]).unwrap();
        assert_eq!(check(&pool, &[&object]).to_string(), "clean");

        let twice = check(&pool, &[&object, &object]);
        assert_eq!(twice.findings().len(), 1, "{twice}");
        assert!(twice.to_string().contains("is in guest and in guest"), "{twice}");

        pool.arena().write(crate::addr::Pa::new(3 << 12), &[1]).unwrap();
        let dirty = check(&pool, &[&object]);
        assert!(!dirty.is_clean());
        assert_eq!(dirty.findings(), ["free frame 0x3 is not scrubbed"]);
    }
}
