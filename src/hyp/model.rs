//! Which hypervisor it is: the one place that has their names.

use std::fmt;
use std::str::FromStr;

use super::gunyah::SharedMemory;
use super::pkvm::Profile;
use super::raw_host::{RawOutcome, RawPath};
use crate::error::{Error, ErrorKind, Op};

/// A hypervisor, and which version or policy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Model {
    /// [pKVM](super::pkvm): pages are given, and a host that takes one back by force destroys it.
    Pkvm(Profile),
    /// [Gunyah](super::gunyah): memory is lent, and comes back.
    Gunyah(SharedMemory),
}

impl Model {
    /// All of them, the default first.
    pub const ALL: [Self; 5] = [
        Self::Pkvm(Profile::Mainline72),
        Self::Pkvm(Profile::Android618),
        Self::Pkvm(Profile::HugeProtected),
        Self::Gunyah(SharedMemory::Dynamic),
        Self::Gunyah(SharedMemory::Static),
    ];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pkvm(Profile::Mainline72) => "pkvm",
            Self::Pkvm(Profile::Android618) => "pkvm-android",
            Self::Pkvm(Profile::HugeProtected) => "pkvm-huge",
            Self::Gunyah(SharedMemory::Dynamic) => "gunyah",
            Self::Gunyah(SharedMemory::Static) => "gunyah-static",
        }
    }

    /// Whether one request of a guest's may be about several pages.
    pub(super) const fn takes_runs(self) -> bool {
        matches!(self, Self::Pkvm(profile) if profile.is_android())
    }

    /// Whether a guest may give pages up for good:
    /// [`MemRelinquish`](super::Hypercall::MemRelinquish).
    pub const fn lets_guests_give_up(self) -> bool {
        matches!(self, Self::Pkvm(profile) if profile.is_android())
    }

    /// Whether the host may take a page from a protected guest that lives: it comes back cleared. Where not, a memslot
    /// stays as long as the guest has something there.
    pub const fn takes_back(self) -> bool {
        matches!(self, Self::Gunyah(_))
    }

    /// Whether memory of a protected guest stays on the side on which it was when it was bound.
    pub const fn fixes_sides(self) -> bool {
        matches!(self, Self::Gunyah(SharedMemory::Static))
    }

    /// What becomes of a host that touches what a guest has to itself, [by itself](super::Hypervisor::raw_host).
    pub const fn answer_to_stray(self, by: RawPath) -> RawOutcome {
        match (self, by) {
            (_, RawPath::Uaccess) => RawOutcome::Efault,
            (Self::Pkvm(_), RawPath::User) => RawOutcome::Sigsegv,
            (Self::Pkvm(_), RawPath::KernelAlias) => RawOutcome::Destroyed,
            (Self::Pkvm(Profile::Android618), RawPath::Dma) => RawOutcome::DmaFault,
            (Self::Pkvm(_), RawPath::Dma) => RawOutcome::Done,
            (Self::Gunyah(_), RawPath::User) => RawOutcome::Sigbus,
            (Self::Gunyah(_), RawPath::KernelAlias) => RawOutcome::Oops,
            (Self::Gunyah(_), RawPath::Dma) => RawOutcome::DmaFault,
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::Pkvm(Profile::default())
    }
}

impl From<Profile> for Model {
    fn from(profile: Profile) -> Self {
        Self::Pkvm(profile)
    }
}

impl From<SharedMemory> for Model {
    fn from(policy: SharedMemory) -> Self {
        Self::Gunyah(policy)
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Model {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|model| model.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            let why = format!("a hypervisor is one of {names}, not {name}");
            Error::new(Op::Hypervisor, ErrorKind::NotFound).because(why)
        })
    }
}
