//! Errors: a small kind for programs, a sentence for people, an errno for those who speak kernel.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::addr::Offset;
use crate::range::PgoffRange;

/// A Linux error number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`.")] pub const $name: Self = Self($value);)*

            fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, ENOENT = 2, EIO = 5, E2BIG = 7, EBADF = 9, EAGAIN = 11, ENOMEM = 12, EACCES = 13,
    EFAULT = 14, EBUSY = 16, EEXIST = 17, ENODEV = 19, EINVAL = 22, ENFILE = 23, EMFILE = 24,
    ENOSPC = 28, ERANGE = 34, ENOSYS = 38, EOVERFLOW = 75, EOPNOTSUPP = 95, ETIMEDOUT = 110,
    ECANCELED = 125, EHWPOISON = 133,
}

impl Errno {
    /// Wraps a positive error number.
    pub const fn new(raw: i32) -> Self {
        Self(raw)
    }

    /// The positive number.
    pub const fn get(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What went wrong, for programs to match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A size of zero, not a whole number of pages, or beyond 2^63 - 1.
    #[error("the size must be a non-zero multiple of the page size below 2^63")]
    InvalidSize,
    /// A range without pages.
    #[error("the range is empty")]
    EmptyRange,
    /// An offset or length that is not a multiple of what the operation needs.
    #[error("offset or length is not aligned")]
    Unaligned,
    /// An end that no address can express.
    #[error("the end of the range overflows")]
    Overflow,
    /// A range that reaches past the end of the object.
    #[error("the range reaches past the end")]
    OutOfRange,
    /// The host asked for memory that is private to the guest.
    #[error("the memory is private to the guest")]
    NotShared,
    /// Somebody holds part of the range; the [`Culprit`] says who. Trying again may help.
    #[error("part of the range is in use")]
    Busy,
    /// Somebody held part of the range for longer than the caller would wait; the [`Culprit`] says
    /// who.
    #[error("part of the range stayed in use")]
    TimedOut,
    /// The caller called a wait off.
    #[error("the wait was cancelled")]
    Cancelled,
    /// A subscriber would not give memory up; [`Error::errno`] is its answer.
    #[error("a subscriber refused")]
    SubscriberRefused,
    /// A pin for good on memory that may be converted. A hand-out
    /// ([`GuestMemfd::subscribe`](crate::GuestMemfd::subscribe)) is the way: it is taken back in time.
    #[error("the memory may be converted: it is handed out, not pinned for good")]
    Convertible,
    /// A counter is at its limit.
    #[error("a counter is at its limit")]
    Saturated,
    /// Not enough free frames, or not enough host memory.
    #[error("out of memory")]
    Exhausted,
    /// An account may not be charged that much.
    #[error("the account is at its limit")]
    LimitReached,
    /// A memslot is in the way, or an object range is bound already.
    #[error("something is there already")]
    Exists,
    /// Nothing is there: no such memslot, owner or virtual machine.
    #[error("nothing is there")]
    NotFound,
    /// This backing, host or build cannot do it.
    #[error("not supported here")]
    Unsupported,
    /// The host lacks something; the message names it.
    #[error("the host lacks a capability")]
    MissingCapability,
    /// The hypervisor said no; [`Error::errno`] is its answer.
    #[error("the hypervisor refused")]
    HypervisorRefused,
    /// The state of the memory is unknown since an earlier failure; it is kept out of use.
    #[error("the memory is quarantined")]
    Quarantined,
    /// The memory is not there any more: [`Error::errno`] is `EHWPOISON` for a hardware error, which the
    /// pool is to be [told of](crate::FolioPool::report_memory_failure), and `EIO` if its file was truncated,
    /// or had a hole punched from outside that nothing was left to fill.
    #[error("the memory failed")]
    MemoryFailure,
    /// A system call failed; [`Error::errno`] is its answer.
    #[error("a system call failed")]
    Os,
}

impl ErrorKind {
    /// What the kernel's guest_memfd answers in the same case, where there is one.
    const fn errno(self) -> Errno {
        match self {
            Self::InvalidSize
            | Self::EmptyRange
            | Self::Unaligned
            | Self::Overflow
            | Self::OutOfRange => Errno::EINVAL,
            Self::NotShared => Errno::EFAULT,
            Self::Busy => Errno::EAGAIN,
            Self::TimedOut => Errno::ETIMEDOUT,
            Self::Cancelled => Errno::ECANCELED,
            Self::SubscriberRefused => Errno::EBUSY,
            Self::Saturated => Errno::EOVERFLOW,
            Self::Exhausted | Self::LimitReached => Errno::ENOMEM,
            Self::Exists => Errno::EEXIST,
            Self::NotFound => Errno::ENOENT,
            Self::Unsupported | Self::Convertible => Errno::EOPNOTSUPP,
            Self::MissingCapability => Errno::ENOSYS,
            Self::HypervisorRefused => Errno::EPERM,
            Self::Quarantined | Self::MemoryFailure => Errno::EHWPOISON,
            Self::Os => Errno::EIO,
        }
    }
}

/// What the library was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each variant is the name of the operation it stands for")]
pub enum Op {
    Range,
    CreatePool,
    Collapse,
    CreateObject,
    Allocate,
    PunchHole,
    ConvertToPrivate,
    ConvertToShared,
    Pin,
    PinExclusive,
    Trim,
    Read,
    Write,
    Atomic,
    ReadFile,
    WriteFile,
    MapView,
    Export,
    BindSlot,
    UnbindSlot,
    GuestFault,
    Hypervisor,
    RegisterOwner,
    Subscribe,
    InstallSigbusHandler,
    Poison,
    Scrub,
    Migrate,
    Compact,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Range => "make a range",
            Self::CreatePool => "create a pool",
            Self::Collapse => "collapse into huge pages",
            Self::CreateObject => "create an object",
            Self::Allocate => "allocate",
            Self::PunchHole => "punch a hole",
            Self::ConvertToPrivate => "convert to private",
            Self::ConvertToShared => "convert to shared",
            Self::Pin => "pin",
            Self::PinExclusive => "pin exclusively",
            Self::Trim => "trim",
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "access atomically",
            Self::ReadFile => "read from a file",
            Self::WriteFile => "write to a file",
            Self::MapView => "map a view",
            Self::Export => "export",
            Self::BindSlot => "bind a memslot",
            Self::UnbindSlot => "delete a memslot",
            Self::GuestFault => "resolve a guest fault",
            Self::Hypervisor => "call the hypervisor",
            Self::RegisterOwner => "register an owner",
            Self::Subscribe => "subscribe",
            Self::InstallSigbusHandler => "install the SIGBUS handler",
            Self::Poison => "report a memory failure",
            Self::Scrub => "scrub",
            Self::Migrate => "migrate",
            Self::Compact => "compact",
        })
    }
}

/// What was found at the first subpage that stood in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// So many pins, and who holds them (each owner once; empty if they left meanwhile).
    Pinned {
        /// How many pins the subpage has.
        pins: u32,
        /// The names under which the owners registered.
        owners: Vec<Arc<str>>,
    },
    /// An exclusive pin, and who holds it.
    ExclusivelyPinned {
        /// The names under which the owners registered.
        owners: Vec<Arc<str>>,
    },
    /// A conversion by somebody else is under way.
    Converting,
    /// Private memory where shared was needed.
    Private,
    /// Memory whose state is unknown since an earlier failure.
    Quarantined,
    /// Memory that is not there any more.
    Failed,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned { pins, owners } => {
                write!(f, "has {pins} pin{}", if *pins == 1 { "" } else { "s" })?;
                write_owners(f, owners)
            }
            Self::ExclusivelyPinned { owners } => {
                f.write_str("is pinned exclusively")?;
                write_owners(f, owners)
            }
            Self::Converting => f.write_str("is being converted"),
            Self::Private => f.write_str("is private"),
            Self::Quarantined => f.write_str("is quarantined"),
            Self::Failed => f.write_str("has failed"),
        }
    }
}

fn write_owners(f: &mut fmt::Formatter<'_>, owners: &[Arc<str>]) -> fmt::Result {
    match owners {
        [] => Ok(()),
        _ => write!(f, " ({})", owners.join(", ")),
    }
}

/// A subpage that stood in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// Where it lies in the object: the first byte of the subpage.
    pub offset: Offset,
    /// What was found there.
    pub found: Found,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Report {
    op: Op,
    kind: ErrorKind,
    errno: Errno,
    range: Option<PgoffRange>,
    culprits: Vec<Culprit>,
    detail: Option<Cow<'static, str>>,
}

/// Why an operation was refused. Nothing has changed when one is returned, unless its
/// documentation says otherwise.
///
/// Reads like `convert to private 0x40000..0x48000: part of the range is in use: subpage 0x43000
/// has 2 pins (virtio-blk)`.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(Box<Report>);

impl Error {
    /// Cold, so that the way to an error is laid out apart from the way on.
    #[cold]
    pub(crate) fn new(op: Op, kind: ErrorKind) -> Self {
        let errno = kind.errno();
        Self(Box::new(Report { op, kind, errno, range: None, culprits: Vec::new(), detail: None }))
    }

    pub(crate) fn of(mut self, op: Op) -> Self {
        self.0.op = op;
        self
    }

    pub(crate) fn on(mut self, range: PgoffRange) -> Self {
        self.0.range = Some(range);
        self
    }

    pub(crate) fn at(mut self, offset: Offset, found: Found) -> Self {
        self.0.culprits.push(Culprit { offset, found });
        self
    }

    pub(crate) fn errno_is(mut self, errno: Errno) -> Self {
        self.0.errno = errno;
        self
    }

    pub(crate) fn because(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// The operation that was refused.
    pub fn op(&self) -> Op {
        self.0.op
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno that the kernel's guest_memfd, the hypervisor or the system call gives.
    pub fn errno(&self) -> Errno {
        self.0.errno
    }

    /// The pages that the operation was asked for, where it had a range. Of several, the one with the
    /// culprit, joined with those that touch it.
    pub fn range(&self) -> Option<PgoffRange> {
        self.0.range
    }

    /// The first subpage that stood in the way, where one did.
    pub fn culprit(&self) -> Option<&Culprit> {
        self.0.culprits.first()
    }

    /// All subpages that stood in the way, the first one first, as far as the caller asked for them and
    /// they were still there to be found.
    pub fn culprits(&self) -> &[Culprit] {
        &self.0.culprits
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(range) = &self.range {
            write!(f, " {range}")?;
        }
        write!(f, ": {}", self.kind)?;
        if let Some((Culprit { offset, found }, others)) = self.culprits.split_first() {
            write!(f, ": subpage {offset} {found}")?;
            match others.len() {
                0 => {}
                more => write!(f, " and {more} more")?,
            }
        }
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        match self.kind {
            ErrorKind::Os | ErrorKind::HypervisorRefused | ErrorKind::SubscriberRefused => {
                write!(f, " ({})", self.errno)
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({})", self.0)
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = Self::from_raw_os_error(error.errno().get()).kind();
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pgoff;

    #[test]
    fn reads_as_a_sentence() {
        let range = PgoffRange::new(Pgoff::new(0x40), 8).expect("a valid range");
        let owners = vec!["virtio-blk".into()];
        let error = Error::new(Op::ConvertToPrivate, ErrorKind::Busy)
            .on(range)
            .at(Offset::new(0x43000), Found::Pinned { pins: 2, owners });
        assert_eq!(
            error.to_string(),
            "convert to private 0x40000..0x48000: part of the range is in use: subpage 0x43000 has 2 \
             pins (virtio-blk)"
        );
        assert_eq!(error.errno(), Errno::EAGAIN);
    }

    #[test]
    fn os_errors_carry_their_errno() {
        let error = Error::new(Op::MapView, ErrorKind::Os).errno_is(Errno::EMFILE).because("mmap");
        assert_eq!(error.to_string(), "map a view: a system call failed: mmap (EMFILE)");
        assert_eq!(error.errno(), Errno::EMFILE);
    }
}
