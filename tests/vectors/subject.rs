//! What is asked, and what may be answered.

/// What all pages of an object are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Shared,
    Private,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    /// That many bytes, or some other number.
    Number(i64),
    Errno(i32),
    /// What was there.
    Byte(u8),
    /// A `SIGBUS` with `BUS_ADRERR`, at this offset from where the object is mapped.
    Bus(u64),
    /// The process would not have survived in another way.
    Died(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Another object: how large, and the flags of `KVM_CREATE_GUEST_MEMFD`.
    Create(u64, u64),
    /// Something with the descriptor.
    Fd(FdCall),
    /// `fallocate(2)`: mode, offset, length.
    Fallocate(i32, i64, i64),
    Map(Map),
    /// A load or store of a raw pointer. A store changes nothing.
    Touch(u64, Access),
    /// A store of a raw pointer that is known to be good.
    Poke(u64, u8),
    /// A system call on mapped memory.
    Memory(u64, MemoryCall),
    /// `madvise(2)` on that many bytes.
    Advise(i32, u64, u64),
    /// Closes the descriptor.
    Close,
}

impl Op {
    pub(crate) fn needs_uring(self) -> bool {
        matches!(self, Self::Memory(_, MemoryCall::RegisterBuffer | MemoryCall::FixedRead))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Load,
    Store,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    /// All of it, shared, for reading and writing.
    Whole,
    Private,
    Executable,
    ReadOnly,
    /// A byte too far.
    Unaligned,
    /// One page more than there is.
    BeyondTheEnd,
    /// `MAP_HUGETLB`.
    Huge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FdCall {
    Read,
    Write,
    Pread,
    Pwrite,
    Lseek(i32),
    /// To this size.
    Truncate(i64),
    Chmod,
    Chown,
    SetTimes,
    Sync,
    DataSync,
    SyncRange,
    Advise,
    GetSeals,
    AddSeals,
    Lock,
    /// Through `/proc/self/fd`, for reading and writing.
    Reopen,
    Ioctl,
    CopyRange,
    Splice,
    /// From `fstat(2)`.
    Size,
    Blocks,
    BlockSize,
    Mode,
    IsCloseOnExec,
    /// The descriptor works through a duplicate: answers what `BlockSize` does.
    Duplicate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryCall {
    /// `read(2)` into it.
    Read,
    /// `write(2)` from it.
    Write,
    ProcessVmRead,
    ProcessVmWrite,
    /// `/proc/self/mem`.
    ProcMemRead,
    /// `O_DIRECT`, into it and from it.
    DirectRead,
    DirectWrite,
    VmSplice,
    /// io_uring: registers a page of it, and reads into that.
    RegisterBuffer,
    FixedRead,
    Lock,
    LockOnFault,
    /// `mprotect(2)` for execution.
    ProtectExecute,
    RegisterUserfault,
}

/// What gmem makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ours {
    Same,
    Differs(Answer, Why),
    /// No call of gmem says that.
    CannotBeSaid(Why),
}

/// Why it differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    DescriptorIsAName,
    Committed,
    TypesSayLess,
    WholeViewsOnly,
    ViewsDoNotFill,
    OneUserfault,
    ViewIsOrdinaryMemory,
}

impl Why {
    /// As in design/host.md.
    pub(crate) fn heading(self) -> &'static str {
        match self {
            Self::DescriptorIsAName => "**The descriptor is a name.**",
            Self::Committed => "**Memory is promised.**",
            Self::TypesSayLess => "**Types say less.**",
            Self::WholeViewsOnly => "**Views are whole.**",
            Self::ViewsDoNotFill => "**Views do not fill.**",
            Self::OneUserfault => "**A view has its userfaultfd already.**",
            Self::ViewIsOrdinaryMemory => "**A view is shared memory to the kernel.**",
        }
    }
}

pub(crate) trait Subject {
    fn apply(&mut self, op: &Op) -> Answer;
}

pub(crate) const PAGE: u64 = 4096;
/// A huge folio and some pages.
pub(crate) const SIZE: u64 = (2 << 20) + 4 * PAGE;
