//! What a run has shown, and whether that is how it should be.

use std::time::Duration;

use gmem::hyp::{IncidentStat, Model, VmKind};

use crate::aftermath::Aftermath;
use crate::device::DeviceStat;
use crate::hazard::HazardStat;
use crate::intruder::IntruderStat;

/// The facts; [`Outcome::complaints`] judges them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) kind: VmKind,
    pub(crate) hypervisor: Model,
    pub(crate) backing: String,
    pub(crate) disk_bytes: u64,
    pub(crate) guest: Option<GuestReport>,
    pub(crate) host_sha256: [u8; 32],
    pub(crate) device: DeviceStat,
    pub(crate) intruder: IntruderStat,
    /// Of the small guest, which is there beside a protected one.
    pub(crate) hazard: Option<HazardStat>,
    pub(crate) conversions: u64,
    pub(crate) serving: Duration,
    pub(crate) aftermath: Aftermath,
}

/// What the guest said at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestReport {
    pub(crate) disk_bytes: u64,
    pub(crate) sha256: [u8; 32],
}

impl Outcome {
    pub(crate) fn sha256_match(&self) -> bool {
        self.guest.is_some_and(|guest| {
            guest.sha256 == self.host_sha256 && guest.disk_bytes == self.disk_bytes
        })
    }

    /// How many descriptors the guest makes that the device has to refuse, and how many of these because
    /// they point at private memory.
    fn malicious(&self) -> (u64, u64) {
        match self.kind {
            VmKind::Protected => (3, 2),
            VmKind::NonProtected => (2, 0),
        }
    }

    /// What has to be in the hypervisor's count: everything that was seen here, and nothing else.
    fn expected_incidents(&self) -> IncidentStat {
        let mut expected = IncidentStat::default();
        let hazard = self.hazard.unwrap_or_default();
        let (_, descriptors) = self.malicious();
        expected.nr_destroyed = hazard.destroyed;
        expected.nr_oopses = hazard.fatal;
        expected.nr_dma_into_private = hazard.dma_into_private;
        expected.nr_accesses_prevented = self.intruder.reads_refused + hazard.accesses_prevented;
        expected.nr_pins_prevented = descriptors + hazard.pins_prevented;
        expected.nr_conversions_prevented =
            self.intruder.busy_refused + hazard.conversions_prevented;
        expected
    }

    /// Everything that did not hold.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let Aftermath { findings, left_behind, leaked_frames, incidents, .. } = &self.aftermath;
        let mut complaints = findings.clone();
        complaints.extend(left_behind.iter().cloned());
        let expected = self.expected_incidents();
        if *incidents != expected {
            complaints.push(format!("the hypervisor counts {incidents:?}, not {expected:?}"));
        }
        let mut expect = |held: bool, complaint: &str| {
            if !held {
                complaints.push(complaint.to_owned());
            }
        };
        expect(self.guest.is_some(), "the guest did not report");
        expect(self.sha256_match(), "the guest's hash of FILE is not the host's");
        expect(self.intruder.busy_refused > 0, "nobody tried to take pinned pages");
        match self.kind {
            VmKind::Protected => {
                expect(self.intruder.sigbus > 0, "nobody touched private memory");
                expect(self.hazard.is_some(), "the hazard was not shown");
            }
            VmKind::NonProtected => {
                expect(self.intruder.open_touches > 0, "nobody touched the guest's memory");
                expect(self.intruder.private_refused > 0, "nobody tried to make memory private");
                expect(self.conversions == 0, "memory of a guest that has none to itself turned");
            }
        }
        expect(
            self.device.bad_descriptors == self.malicious().0,
            "not exactly the malicious descriptors were refused",
        );
        expect(*leaked_frames == 0, "frames are missing from the pool");
        complaints
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a run of a protected guest comes to, on a small disk.
    pub(crate) fn good() -> Outcome {
        let mut incidents = IncidentStat::default();
        incidents.nr_destroyed = 1;
        incidents.nr_dma_into_private = 1;
        incidents.nr_accesses_prevented = 5;
        incidents.nr_pins_prevented = 3;
        incidents.nr_conversions_prevented = 2;
        Outcome {
            kind: VmKind::Protected,
            hypervisor: Model::default(),
            backing: "memfd".into(),
            disk_bytes: 3,
            guest: Some(GuestReport { disk_bytes: 3, sha256: [0xab; 32] }),
            host_sha256: [0xab; 32],
            device: DeviceStat { requests: 5, bytes: 512, bad_descriptors: 3 },
            intruder: IntruderStat {
                busy_refused: 1,
                sigbus: 8,
                reads_refused: 4,
                ..IntruderStat::default()
            },
            hazard: Some(HazardStat {
                destroyed: 1,
                dma_into_private: 1,
                poisoned_exits: 1,
                fatal: 0,
                signals: 1,
                efault: 1,
                accesses_prevented: 1,
                pins_prevented: 1,
                conversions_prevented: 1,
            }),
            conversions: 9,
            serving: Duration::from_millis(1500),
            aftermath: Aftermath {
                findings: vec![],
                left_behind: vec![],
                leaked_frames: 0,
                scrubbed_bytes: 4096,
                incidents,
            },
        }
    }

    /// And of a guest that is not protected.
    pub(crate) fn good_non_protected() -> Outcome {
        let mut outcome = good();
        outcome.kind = VmKind::NonProtected;
        outcome.device.bad_descriptors = 2;
        outcome.intruder = IntruderStat {
            busy_refused: 1,
            private_refused: 1,
            open_touches: 4,
            ..IntruderStat::default()
        };
        outcome.hazard = None;
        outcome.conversions = 0;
        outcome.aftermath.incidents = IncidentStat::default();
        outcome.aftermath.incidents.nr_conversions_prevented = 1;
        outcome
    }

    fn complains(mut outcome: Outcome, spoil: fn(&mut Outcome)) {
        assert_eq!(outcome.complaints(), Vec::<String>::new());
        spoil(&mut outcome);
        assert!(!outcome.complaints().is_empty());
        assert!(outcome.json().contains("\"ok\":false"));
    }

    #[test]
    fn whatever_did_not_hold_is_a_complaint() {
        let spoil: [fn(&mut Outcome); 12] = [
            |o| o.guest = None,
            |o| o.host_sha256[31] = 0,
            |o| o.intruder.busy_refused = 0,
            |o| o.intruder.sigbus = 0,
            |o| o.device.bad_descriptors = 2,
            |o| o.hazard = None,
            |o| o.aftermath.leaked_frames = 1,
            |o| o.aftermath.findings.push("a finding".into()),
            |o| o.aftermath.left_behind.push("something".into()),
            |o| o.aftermath.incidents.nr_destroyed = 2,
            |o| o.aftermath.incidents.nr_oopses = 1,
            |o| o.aftermath.incidents.nr_conversions_prevented = 1,
        ];
        spoil.into_iter().for_each(|spoil| complains(good(), spoil));
    }

    #[test]
    fn so_it_is_of_a_guest_that_is_not_protected() {
        let spoil: [fn(&mut Outcome); 6] = [
            |o| o.intruder.busy_refused = 0,
            |o| o.intruder.private_refused = 0,
            |o| o.intruder.open_touches = 0,
            |o| o.device.bad_descriptors = 3,
            |o| o.conversions = 1,
            |o| o.aftermath.incidents.nr_dma_into_private = 1,
        ];
        spoil.into_iter().for_each(|spoil| complains(good_non_protected(), spoil));
    }
}
