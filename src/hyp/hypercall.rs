//! The guest's hypercalls, as pKVM numbers them, from registers that may hold anything.

use std::fmt;

use crate::addr::Ipa;
use crate::geometry::PAGE_SIZE;

const FEATURES: u64 = 0x8600_0000;
const HYP_MEMINFO: u64 = 0xc600_0002;
const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const MEM_RELINQUISH: u64 = 0xc600_0009;
/// The low bits of an identifier: its number among the calls of its service.
const FUNCTION: u64 = 0xffff;

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
    /// It was refused: -3, the only error there is.
    pub const INVALID_PARAMETER: Self = Self::value(u64::MAX - 2);

    const fn value(value: u64) -> Self {
        Self(Registers([value, 0, 0, 0]))
    }

    /// The registers.
    pub const fn regs(self) -> Registers {
        self.0
    }
}

/// What the registers ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Something that the hypervisor answers by itself.
    Answered(HvcResult),
    Share(Ipa),
    Unshare(Ipa),
    Relinquish(Ipa),
    Unknown,
}

/// Total: all registers mean something.
pub(super) const fn decode(Registers(regs): Registers) -> Asked {
    const fn bit(id: u64) -> u64 {
        1 << (id & FUNCTION)
    }
    let features =
        bit(FEATURES) | bit(HYP_MEMINFO) | bit(MEM_SHARE) | bit(MEM_UNSHARE) | bit(MEM_RELINQUISH);
    let invalid = Asked::Answered(HvcResult::INVALID_PARAMETER);
    let ipa = Ipa::new(regs[1]);
    let is_one_page = ipa.is_page_aligned() && regs[2] == 0 && regs[3] == 0;
    // An identifier has 32 bits; what else register 0 holds is not looked at.
    match regs[0] & 0xffff_ffff {
        FEATURES => Asked::Answered(HvcResult::value(features)),
        HYP_MEMINFO => match [regs[1], regs[2], regs[3]] {
            [0, 0, 0] => Asked::Answered(HvcResult::value(PAGE_SIZE.get())),
            _ => invalid,
        },
        MEM_SHARE if is_one_page => Asked::Share(ipa),
        MEM_UNSHARE if is_one_page => Asked::Unshare(ipa),
        MEM_RELINQUISH if is_one_page => Asked::Relinquish(ipa),
        MEM_SHARE | MEM_UNSHARE | MEM_RELINQUISH => invalid,
        _ => Asked::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_calls_are_understood() {
        let ipa = Ipa::new(0x7000);
        assert_eq!(decode(Hypercall::MemShare(ipa).regs()), Asked::Share(ipa));
        assert_eq!(decode(Hypercall::MemUnshare(ipa).regs()), Asked::Unshare(ipa));
        assert_eq!(decode(Hypercall::MemRelinquish(ipa).regs()), Asked::Relinquish(ipa));
        let features = decode(Hypercall::Features.regs());
        assert_eq!(features, Asked::Answered(HvcResult::value(0b10_0001_1101)));
        let meminfo = decode(Hypercall::HypMeminfo.regs());
        assert_eq!(meminfo, Asked::Answered(HvcResult::value(4096)));
        assert_eq!(HvcResult::INVALID_PARAMETER.regs().0, [0xffff_ffff_ffff_fffd, 0, 0, 0]);
    }

    #[test]
    fn arguments_that_are_reserved_must_be_zero() {
        let invalid = Asked::Answered(HvcResult::INVALID_PARAMETER);
        for id in [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH] {
            assert_eq!(decode(Registers([id, 0x7001, 0, 0])), invalid);
            assert_eq!(decode(Registers([id, 0x7000, 1, 0])), invalid);
            assert_eq!(decode(Registers([id, 0x7000, 0, 1])), invalid);
            assert_eq!(decode(Registers([id, u64::MAX, u64::MAX, u64::MAX])), invalid);
        }
        for at in 1..4 {
            let Registers(mut regs) = Hypercall::HypMeminfo.regs();
            regs[at] = 1 << 63;
            assert_eq!(decode(regs.into()), invalid);
        }
    }

    #[test]
    fn only_32_bits_of_the_identifier_count() {
        let upper = 0xdead_beef << 32;
        assert_eq!(decode(Registers([upper | MEM_SHARE, 0, 0, 0])), Asked::Share(Ipa::new(0)));
        for id in [0, 1, MEM_SHARE + 4, MEM_SHARE ^ 1 << 31, 0x8400_0000, u64::MAX] {
            assert_eq!(decode(Registers([id, 0, 0, 0])), Asked::Unknown);
        }
    }
}
