//! What the hypervisor and the resource manager answer, by their own numbers.

use crate::stage2::TableError;

/// An answer of the hypervisor's that is not OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u64)]
pub(crate) enum HypError {
    Unimplemented = u64::MAX,
    ArgumentInvalid = 1,
    ArgumentSize = 2,
    ArgumentAlignment = 3,
    NoMem = 10,
    NoResources = 11,
    AddrOverflow = 20,
    AddrInvalid = 22,
    Denied = 30,
    Busy = 31,
    Failure = 36,
    CapNull = 50,
    WrongObjectType = 52,
    InsufficientRights = 53,
    CspaceFull = 54,
    NotOwner = 111,
    MappingsFull = 120,
    ExtentType = 121,
}

impl HypError {
    /// As a register shows it.
    pub(crate) const fn register(self) -> u64 {
        self as u64
    }
}

impl From<TableError> for HypError {
    fn from(error: TableError) -> Self {
        match error {
            TableError::NoMemory => Self::NoMem,
            TableError::BeyondIpa => Self::AddrInvalid,
            _ => Self::Failure,
        }
    }
}

/// An answer of the resource manager's that is not OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub(crate) enum RmError {
    Unimplemented = 0xffff_ffff,
    NoMem = 1,
    NoResource = 2,
    Denied = 3,
    MsgInvalid = 4,
    Busy = 5,
    ArgumentInvalid = 6,
    HandleInvalid = 7,
    ValidateFailed = 8,
    MapFailed = 9,
    MemInvalid = 0xa,
    MemInUse = 0xb,
    MemReleased = 0xc,
    VmidInvalid = 0xd,
    VmState = 0x14,
}
