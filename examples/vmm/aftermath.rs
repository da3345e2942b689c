//! What is left when all is over: nothing, if all went well.

use gmem::addr::ByteSize;
use gmem::hyp::{HostStat, Hypervisor, IncidentStat, Vm, VmKind};
use gmem::{FolioPool, GuestMemfd, ObjectStat, audit};

use crate::Fallible;

/// What was found.
#[derive(Debug)]
pub(crate) struct Aftermath {
    /// What the audits found, before and after the guests were torn down.
    pub(crate) findings: Vec<String>,
    /// What is not as it was before there was a guest.
    pub(crate) left_behind: Vec<String>,
    pub(crate) leaked_frames: u64,
    pub(crate) scrubbed_bytes: u64,
    /// What the hypervisor has counted.
    pub(crate) incidents: IncidentStat,
}

/// A guest that has powered off: nothing runs any more, and its memory is still there.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) memfd: GuestMemfd,
    /// What of a protected guest's memory is shared for good.
    pub(crate) for_good: ByteSize,
}

/// Tears the guests down, and looks at everything before and after.
pub(crate) fn take_apart(
    pool: &FolioPool,
    hypervisor: &Hypervisor,
    guests: Vec<Guest>,
) -> Fallible<Aftermath> {
    let objects: Vec<&GuestMemfd> = guests.iter().map(|guest| &guest.memfd).collect();
    let mut findings = audit::check_under(pool, &objects, hypervisor).findings().to_vec();
    let mut left_behind: Vec<String> = guests.iter().flat_map(Guest::remains).collect();

    for guest in guests {
        guest.vm.teardown()?;
    }
    findings.extend_from_slice(audit::check_under(pool, &[], hypervisor).findings());
    let given = hypervisor.stat();
    if given != HostStat::default() {
        left_behind.push(format!("the hypervisor still counts {given:?}"));
    }
    let stat = pool.stat();
    if [stat.used, stat.reserved, stat.quarantined] != [ByteSize::default(); 3] {
        left_behind.push(format!("the pool still counts {stat:?}"));
    }
    let scrubbed_bytes = match pool.verify_scrubbed() {
        Ok(size) => size.get(),
        Err(unscrubbed) => {
            left_behind.push(unscrubbed.to_string());
            0
        }
    };
    Ok(Aftermath {
        findings,
        left_behind,
        leaked_frames: stat.used.whole_pages(),
        scrubbed_bytes,
        // Last: what a teardown has not taken back is an incident too.
        incidents: hypervisor.incidents(),
    })
}

impl Guest {
    /// What it should not have any more.
    fn remains(&self) -> Vec<String> {
        let ObjectStat { shared, private, pinned, quarantined, .. } = self.memfd.stat();
        // What a guest of its kind never has, or has taken back by now.
        let other_side = match self.vm.kind() {
            VmKind::Protected => (shared, "shared", self.for_good),
            VmKind::NonProtected => (private, "private", ByteSize::default()),
        };
        let none = ByteSize::default();
        let found = [other_side, (pinned, "pinned", none), (quarantined, "quarantined", none)];
        let found = found.into_iter().filter(|(amount, _, wanted)| amount != wanted);
        let name = self.memfd.name();
        found
            .map(|(amount, what, _)| format!("{amount} bytes of {name} are still {what}"))
            .collect()
    }
}
