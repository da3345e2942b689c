//! What a step shows.

use std::str::FromStr;

use pkvm_oracle::Observation;

use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::rm::vm::VmState;

/// Where a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    Host,
    Lent,
    Shared,
    Parcel,
    /// A VM's own.
    Vm,
    /// No VM's.
    Lost,
}

/// What a VM was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Shared,
    Released,
    Accepted,
    Recall,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// As any machine shows it.
    Plain(Observation),
    /// `dies`: the kernel does, and nothing is done after that.
    Dies,
    /// `MEM_INUSE`: the resource manager refuses.
    Refused(RmError),
    /// `RUNNING`.
    State(VmState),
    /// `NONE`: there is no such VM.
    NoVm,
    /// `at 0x1000`: where a parcel was put.
    At(u64),
    /// `lent`.
    Holder(Holder),
    /// `hears RELEASED`.
    Hears(Heard),
}

impl Seen {
    pub(super) const OK: Self = Self::Plain(Observation::Ok);
    pub(super) const NOTHING: Self = Self::Plain(Observation::Nothing);
}

const WORDS: &[(&str, Seen)] = &[
    ("dies", Seen::Dies),
    ("NOMEM", Seen::Refused(RmError::NoMem)),
    ("NORESOURCE", Seen::Refused(RmError::NoResource)),
    ("DENIED", Seen::Refused(RmError::Denied)),
    ("MSG_INVALID", Seen::Refused(RmError::MsgInvalid)),
    ("ARGUMENT_INVALID", Seen::Refused(RmError::ArgumentInvalid)),
    ("HANDLE_INVALID", Seen::Refused(RmError::HandleInvalid)),
    ("VALIDATE_FAILED", Seen::Refused(RmError::ValidateFailed)),
    ("MAP_FAILED", Seen::Refused(RmError::MapFailed)),
    ("MEM_INVALID", Seen::Refused(RmError::MemInvalid)),
    ("MEM_INUSE", Seen::Refused(RmError::MemInUse)),
    ("MEM_RELEASED", Seen::Refused(RmError::MemReleased)),
    ("VMID_INVALID", Seen::Refused(RmError::VmidInvalid)),
    ("VM_STATE", Seen::Refused(RmError::VmState)),
    ("UNIMPLEMENTED", Seen::Refused(RmError::Unimplemented)),
    ("NONE", Seen::NoVm),
    ("RUNNING", Seen::State(VmState::Running)),
    ("PAUSED", Seen::State(VmState::Paused)),
    ("EXITED", Seen::State(VmState::Exited)),
    ("RESET", Seen::State(VmState::Reset)),
    ("host", Seen::Holder(Holder::Host)),
    ("lent", Seen::Holder(Holder::Lent)),
    ("shared", Seen::Holder(Holder::Shared)),
    ("parcel", Seen::Holder(Holder::Parcel)),
    ("vm", Seen::Holder(Holder::Vm)),
    ("lost", Seen::Holder(Holder::Lost)),
    ("hears SHARED", Seen::Hears(Heard::Shared)),
    ("hears RELEASED", Seen::Hears(Heard::Released)),
    ("hears ACCEPTED", Seen::Hears(Heard::Accepted)),
    ("hears RECALL", Seen::Hears(Heard::Recall)),
];

impl FromStr for Seen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, seen)) = WORDS.iter().find(|(word, _)| *word == text) {
            return Ok(*seen);
        }
        match text.strip_prefix("at ") {
            Some(at) => super::step::number(at).map(Self::At),
            None => text.parse().map(Self::Plain),
        }
    }
}
