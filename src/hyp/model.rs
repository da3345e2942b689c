//! Which hypervisor it is: the one place that has their names.

use std::fmt;
use std::str::FromStr;

use super::pkvm::Profile;
use crate::error::{Error, ErrorKind, Op};

/// A hypervisor, and which version or policy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Model {
    /// [pKVM](super::pkvm): pages are given, and a host that takes one back by force destroys it.
    Pkvm(Profile),
}

impl Model {
    /// All of them, the default first.
    pub const ALL: [Self; 3] = [
        Self::Pkvm(Profile::Mainline72),
        Self::Pkvm(Profile::Android618),
        Self::Pkvm(Profile::HugeProtected),
    ];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pkvm(Profile::Mainline72) => "pkvm",
            Self::Pkvm(Profile::Android618) => "pkvm-android",
            Self::Pkvm(Profile::HugeProtected) => "pkvm-huge",
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
