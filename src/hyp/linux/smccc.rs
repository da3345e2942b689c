//! Calls that KVM answers itself: versions, PSCI, random numbers, and its own.

use crate::hyp::hypercall::{FEATURES, PLAIN_FEATURES};

/// `KVM_EXIT_SYSTEM_EVENT`.
pub(super) const SYSTEM_EVENT: u32 = 24;

/// How KVM answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Registers([u64; 4]),
    /// The VMM is told that the machine goes off, or starts again.
    Event,
    /// The vCPU is off until another one switches it on.
    Off,
}

const NOT_SUPPORTED: i64 = -1;
const INVALID_PARAMETERS: i64 = -2;
/// `KVM_VENDOR_HYP_UID`.
const UID: [u64; 4] = [0xb66f_b428, 0xe911_c52e, 0x564b_caa9, 0x743a_004d];

const SMCCC_VERSION: u64 = 0x8000_0000;
const PSCI_VERSION: u64 = 0x8400_0000;
const PSCI_CPU_SUSPEND: u64 = 0x8400_0001;
const PSCI_CPU_OFF: u64 = 0x8400_0002;
const PSCI_MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
const PSCI_SYSTEM_OFF: u64 = 0x8400_0008;
const PSCI_SYSTEM_RESET: u64 = 0x8400_0009;
const PSCI_FEATURES: u64 = 0x8400_000a;
const PSCI_AFFINITY_INFO: u64 = 0xc400_0004;
const TRNG_VERSION: u64 = 0x8400_0050;
const KVM_UID: u64 = 0x8600_ff01;

/// Identifiers have 32 bits; what else a register holds is not looked at.
const fn id(register: u64) -> u64 {
    register & 0xffff_ffff
}

/// What KVM says to a call.
pub(super) fn call_of(x: [u64; 4], is_protected: bool) -> Answer {
    let value = match id(x[0]) {
        SMCCC_VERSION => 0x1_0001,
        PSCI_VERSION => 0x1_0003,
        PSCI_CPU_OFF => return Answer::Off,
        PSCI_SYSTEM_OFF | PSCI_SYSTEM_RESET => return Answer::Event,
        PSCI_MIGRATE_INFO_TYPE => 2,
        PSCI_FEATURES if id(x[1]) == PSCI_CPU_SUSPEND => 0,
        // Itself, which is on.
        PSCI_AFFINITY_INFO if x[1] == 0 => 0,
        PSCI_AFFINITY_INFO => INVALID_PARAMETERS,
        TRNG_VERSION => 0x1_0000,
        FEATURES if !is_protected => PLAIN_FEATURES as i64,
        KVM_UID => return Answer::Registers(UID),
        _ => NOT_SUPPORTED,
    };
    Answer::Registers([value as u64, 0, 0, 0])
}
