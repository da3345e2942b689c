//! The simulated EL2, under a host and guests that do anything: any bytes become hypercalls with any argument,
//! accesses of every kind, and VMs that come and go. There is no second model: EL2's own rules, its specification and what
//! each step may change are the judges, after every step.

use std::collections::BTreeMap;
use std::fmt;

use crate::hyp::el2::Profile;
use crate::hyp::el2::hostile::{self, Flaw};

/// Mistakes that EL2 can be made to seem to make.
pub use crate::hyp::el2::hostile::Flaw as PkvmFlaw;

/// Which EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PkvmProfile {
    /// Mainline 7.2.
    Mainline72,
    /// Android's 6.18.
    Android618,
    /// Mainline with huge pages of protected guests.
    HugeProtected,
}

impl PkvmProfile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mainline72, Self::Android618, Self::HugeProtected];

    const fn of_el2(self) -> Profile {
        match self {
            Self::Mainline72 => Profile::Mainline72,
            Self::Android618 => Profile::Android618,
            Self::HugeProtected => Profile::HugeProtected,
        }
    }
}

/// What came up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PkvmCoverage {
    /// How often each call was answered how.
    pub answers: BTreeMap<String, u64>,
}

impl PkvmCoverage {
    /// Adds what came up elsewhere.
    pub fn add(&mut self, other: Self) {
        for (what, nr) in other.answers {
            *self.answers.entry(what).or_default() += nr;
        }
    }
}

impl fmt::Display for PkvmCoverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answers.iter().try_for_each(|(what, nr)| writeln!(f, "{nr:8} {what}"))
    }
}

/// Does what the bytes say.
///
/// # Errors
/// The first step after which something was wrong, and what.
pub fn run_pkvm(profile: PkvmProfile, bytes: &[u8]) -> Result<PkvmCoverage, String> {
    Ok(PkvmCoverage { answers: hostile::run(profile.of_el2(), bytes, None)? })
}

/// The same on an EL2 that seems to make a mistake.
///
/// # Errors
/// As for [`run_pkvm`]; if the bytes bring the mistake up, it is found.
pub fn run_pkvm_flawed(
    profile: PkvmProfile,
    bytes: &[u8],
    flaw: Flaw,
) -> Result<PkvmCoverage, String> {
    Ok(PkvmCoverage { answers: hostile::run(profile.of_el2(), bytes, Some(flaw))? })
}
