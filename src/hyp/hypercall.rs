//! The guest's hypercalls, as pKVM numbers them, from registers that may hold anything.

use std::fmt;

use crate::addr::Ipa;

pub(super) const FEATURES: u64 = 0x8600_0000;
pub(super) const HYP_MEMINFO: u64 = 0xc600_0002;
pub(super) const MEM_SHARE: u64 = 0xc600_0003;
pub(super) const MEM_UNSHARE: u64 = 0xc600_0004;
pub(super) const MEM_RELINQUISH: u64 = 0xc600_0009;
/// What KVM says of itself to a guest that is not protected: that it tells features, and has a clock.
pub(super) const PLAIN_FEATURES: u64 = 3;
/// How many pages one call may name where it may name several.
const MOST_PAGES: u64 = 256;

/// A vCPU's registers 0 to 3: what a hypercall is made of. They may hold anything.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Registers(pub [u64; 4]);

impl From<[u64; 4]> for Registers {
    fn from(raw: [u64; 4]) -> Self {
        Self(raw)
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x0, x1, x2, x3] = self.0;
        write!(f, "{x0:#x}({x1:#x}, {x2:#x}, {x3:#x})")
    }
}

/// A hypercall that the hypervisor knows, well formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hypercall {
    /// Which of these calls there are: a bit for the number of each.
    Features,
    /// How large the unit of sharing is.
    HypMeminfo,
    /// Let the host see the page at this address.
    MemShare(Ipa),
    /// Have the page to itself again.
    MemUnshare(Ipa),
    /// Give the page up: its memory is the host's, zeroed unless the host could see it. A balloon's call, and
    /// what has to come before the VMM can take a memslot away.
    MemRelinquish(Ipa),
}

impl Hypercall {
    /// The registers that make the call.
    pub const fn regs(self) -> Registers {
        Registers(match self {
            Self::Features => [FEATURES, 0, 0, 0],
            Self::HypMeminfo => [HYP_MEMINFO, 0, 0, 0],
            Self::MemShare(ipa) => [MEM_SHARE, ipa.get(), 0, 0],
            Self::MemUnshare(ipa) => [MEM_UNSHARE, ipa.get(), 0, 0],
            Self::MemRelinquish(ipa) => [MEM_RELINQUISH, ipa.get(), 0, 0],
        })
    }
}

impl From<Hypercall> for Registers {
    fn from(call: Hypercall) -> Self {
        call.regs()
    }
}

/// What the guest finds in its registers after a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvcResult(Registers);

impl HvcResult {
    /// It was done.
    pub const SUCCESS: Self = Self::value(0);
    /// It was refused: -3, the only error that the hypervisor has.
    pub const INVALID_PARAMETER: Self = Self::value(u64::MAX - 2);
    /// Nobody knows the call: -1.
    pub const NOT_SUPPORTED: Self = Self::value(u64::MAX);

    /// Whether it was done. Where calls may name several pages, register 1 has how many.
    pub const fn is_success(self) -> bool {
        self.0.0[0] == 0
    }

    pub(super) const fn of(regs: [u64; 4]) -> Self {
        Self(Registers(regs))
    }

    pub(super) const fn value(value: u64) -> Self {
        Self(Registers([value, 0, 0, 0]))
    }

    /// The registers.
    pub const fn regs(self) -> Registers {
        self.0
    }
}

/// What the registers ask for, as far as the host has to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Pages from this address on, as many as there are up to this number, are to change sides.
    Share(Ipa, u64),
    Unshare(Ipa, u64),
    Relinquish(Ipa),
    /// EL2 answers, or passes on.
    Other,
}

/// The bit that says in the answer to `FEATURES` that there is such a call.
pub(super) const fn feature(id: u64) -> u64 {
    1 << (id & 0x3f)
}

/// How EL2 sees the registers: an identifier has 32 bits; what else register 0 holds is not looked at.
pub(super) const fn seen(Registers([x0, x1, x2, x3]): Registers) -> [u64; 4] {
    [x0 & 0xffff_ffff, x1, x2, x3]
}

/// Total: all registers mean something. What is not well formed EL2 refuses.
pub(super) const fn decode(regs: Registers, takes_runs: bool) -> Asked {
    let [id, x1, x2, x3] = seen(regs);
    let ipa = Ipa::new(x1);
    if !ipa.is_page_aligned() || x3 != 0 || x2 != 0 && (!takes_runs || id == MEM_RELINQUISH) {
        return Asked::Other;
    }
    let nr_pages = match x2 {
        0 => 1,
        1..MOST_PAGES => x2,
        _ => MOST_PAGES,
    };
    match id {
        MEM_SHARE => Asked::Share(ipa, nr_pages),
        MEM_UNSHARE => Asked::Unshare(ipa, nr_pages),
        MEM_RELINQUISH => Asked::Relinquish(ipa),
        _ => Asked::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_calls_are_understood() {
        let ipa = Ipa::new(0x7000);
        for takes_runs in [false, true] {
            let asked = |call: Hypercall| decode(call.regs(), takes_runs);
            assert_eq!(asked(Hypercall::MemShare(ipa)), Asked::Share(ipa, 1));
            assert_eq!(asked(Hypercall::MemUnshare(ipa)), Asked::Unshare(ipa, 1));
            assert_eq!(asked(Hypercall::MemRelinquish(ipa)), Asked::Relinquish(ipa));
            assert_eq!(asked(Hypercall::Features), Asked::Other);
            assert_eq!(asked(Hypercall::HypMeminfo), Asked::Other);
        }
        assert_eq!(HvcResult::INVALID_PARAMETER.regs().0, [0xffff_ffff_ffff_fffd, 0, 0, 0]);
    }

    #[test]
    fn arguments_that_are_reserved_must_be_zero() {
        for id in [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH] {
            for takes_runs in [false, true] {
                let asked = |x: [u64; 3]| decode(Registers([id, x[0], x[1], x[2]]), takes_runs);
                assert_eq!(asked([0x7001, 0, 0]), Asked::Other);
                assert_eq!(asked([0x7000, 0, 1]), Asked::Other);
                assert_eq!(asked([u64::MAX, u64::MAX, u64::MAX]), Asked::Other);
                let is_run = takes_runs && id != MEM_RELINQUISH;
                assert_eq!(asked([0x7000, 2, 0]) != Asked::Other, is_run);
            }
        }
        let many = Registers([MEM_SHARE, 0x7000, u64::MAX, 0]);
        assert_eq!(decode(many, true), Asked::Share(Ipa::new(0x7000), 256));
    }

    #[test]
    fn only_32_bits_of_the_identifier_count() {
        let upper = 0xdead_beef << 32;
        let regs = Registers([upper | MEM_SHARE, 0, 0, 0]);
        assert_eq!(decode(regs, false), Asked::Share(Ipa::new(0), 1));
        assert_eq!(seen(regs), [MEM_SHARE, 0, 0, 0]);
        for id in [0, 1, MEM_SHARE + 4, MEM_SHARE ^ 1 << 31, 0x8400_0000, u64::MAX] {
            assert_eq!(decode(Registers([id, 0, 0, 0]), false), Asked::Other);
        }
    }
}
