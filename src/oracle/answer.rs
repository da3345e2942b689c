//! What a call answers, in a form that the model and the library can both give.

use std::fmt;

use crate::addr::Offset;
use crate::backing::WhyKept;
use crate::error::{Culprit, Errno, Error, ErrorKind, Found, Op};
use crate::range::PgoffRange;
use crate::state::Visibility;

/// Start and length, in pages.
pub(super) type Run = (u64, u64);

/// Everything that a snapshot says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageFacts {
    pub(super) visibility: Visibility,
    pub(super) pins: u32,
    pub(super) exclusive: bool,
    pub(super) resident: bool,
}

/// What became of the memory of a punch, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PunchFacts {
    pub(super) returned: u64,
    pub(super) released: u64,
    pub(super) kept: u64,
    pub(super) why_kept: Option<WhyKept>,
}

/// What came of a step.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Changed(u64),
    Punched(PunchFacts),
    Bytes(Vec<u8>),
    Word(u64),
    Sides(Vec<(Run, Visibility)>),
    Pages(Vec<(Run, PageFacts)>),
    Names(Vec<String>),
    Refused(Refused),
}

/// An error, without the words for people.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) op: Op,
    pub(super) kind: ErrorKind,
    pub(super) errno: Errno,
    pub(super) range: Option<Run>,
    pub(super) culprits: Vec<Culprit>,
}

/// A refusal, with the errno that the kernel's guest_memfd gives, or would.
pub(super) fn refused(op: Op, kind: ErrorKind) -> Refused {
    let errno = match kind {
        ErrorKind::NotShared => Errno::EFAULT,
        ErrorKind::Busy => Errno::EAGAIN,
        ErrorKind::TimedOut => Errno::ETIMEDOUT,
        ErrorKind::Cancelled => Errno::ECANCELED,
        ErrorKind::Exhausted => Errno::ENOMEM,
        ErrorKind::NotFound => Errno::ENOENT,
        ErrorKind::Convertible => Errno::EOPNOTSUPP,
        _ => Errno::EINVAL,
    };
    Refused { op, kind, errno, range: None, culprits: Vec::new() }
}

impl Refused {
    pub(super) fn on(mut self, range: Run) -> Self {
        self.range = Some(range);
        self
    }

    pub(super) fn at(mut self, page: u64, found: Found) -> Self {
        self.culprits.push(Culprit { offset: Offset::new(page << 12), found });
        self
    }
}

pub(super) fn pages_of(range: Run) -> std::ops::Range<u64> {
    range.0..range.0 + range.1
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self {
            op: error.op(),
            kind: error.kind(),
            errno: error.errno(),
            range: error.range().map(run_of),
            culprits: error.culprits().to_vec(),
        }
    }
}

pub(super) fn run_of(range: PgoffRange) -> Run {
    (range.start().get(), range.nr_pages())
}

impl Answer {
    /// What differs between two answers, in words short enough to read.
    pub(super) fn differs(&self, real: &Self) -> Option<(String, String)> {
        if self == real {
            return None;
        }
        let first = match (self, real) {
            (Self::Bytes(a), Self::Bytes(b)) => first_difference(a, b),
            (Self::Pages(a), Self::Pages(b)) => first_difference(a, b),
            (Self::Sides(a), Self::Sides(b)) => first_difference(a, b),
            _ => None,
        };
        Some(first.unwrap_or_else(|| (format!("{self:?}"), format!("{real:?}"))))
    }
}

pub(super) fn first_difference<T: PartialEq + fmt::Debug>(
    a: &[T],
    b: &[T],
) -> Option<(String, String)> {
    let longest = a.len().max(b.len());
    let at = (0..longest).find(|&i| a.get(i) != b.get(i))?;
    let say = |what: Option<&T>| match what {
        Some(what) => format!("[{at}] = {what:x?}"),
        None => format!("[{at}] does not exist"),
    };
    Some((say(a.get(at)), say(b.get(at))))
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Changed(pages) => write!(f, "{pages} pages changed sides"),
            Self::Punched(facts) => write!(f, "{facts:?}"),
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Word(word) => write!(f, "{word:#x}"),
            Self::Sides(runs) => write!(f, "{runs:?}"),
            Self::Pages(runs) => write!(f, "{runs:?}"),
            Self::Names(names) => write!(f, "{names:?}"),
            Self::Refused(refused) => write!(f, "refused: {refused:?}"),
        }
    }
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {:?} ({:?})", self.op, self.kind, self.errno)?;
        if let Some((start, nr_pages)) = self.range {
            write!(f, ", pages {start:#x}+{nr_pages:#x}")?;
        }
        let mut culprits = self.culprits.iter();
        culprits.try_for_each(|it| write!(f, ", subpage {} {}", it.offset, it.found))
    }
}
