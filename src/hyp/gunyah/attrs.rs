//! Rights to memory, and what kind of memory it is: of extents, and of mappings.

use super::error::HypError;
use crate::stage2::Prot;

/// Rights: execute 1, write 2, read 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Access(u8);

impl Access {
    pub(crate) const X: Self = Self(1);
    pub(crate) const W: Self = Self(2);
    pub(crate) const R: Self = Self(4);
    pub(crate) const RX: Self = Self(5);
    pub(crate) const RW: Self = Self(6);
    pub(crate) const RWX: Self = Self(7);

    /// From the low three bits.
    pub(crate) const fn of(raw: u8) -> Self {
        Self(raw & 7)
    }

    pub(crate) const fn covers(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What both allow.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What either allows.
    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether an extent may have exactly these.
    fn is_of_extents(self) -> bool {
        [Self::X, Self::W, Self::R, Self::RX, Self::RW, Self::RWX].contains(&self)
    }

    pub(crate) const fn prot(self) -> Prot {
        Prot::of(self.covers(Self::R), self.covers(Self::W), self.covers(Self::X))
    }
}

/// What somebody may do, be it at one level of privilege only.
impl From<Prot> for Access {
    fn from(prot: Prot) -> Self {
        let executes = prot.executes_at().contains(&true);
        Self(u8::from(prot.reads()) << 2 | u8::from(prot.writes()) << 1 | u8::from(executes))
    }
}

/// What an extent's memory may be mapped as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MemType {
    Any,
    Device,
    Uncached,
}

/// What a mapping's memory is: the attribute bits of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct MapType(u8);

impl MapType {
    /// Device, nGnRE.
    pub(crate) const DEVICE: Self = Self(1);
    /// Not cached.
    pub(crate) const UNCACHED: Self = Self(0b0101);
    /// Cached, write back.
    pub(crate) const CACHED: Self = Self(0b1111);

    pub(crate) const fn is_device(self) -> bool {
        self.0 < 4
    }

    fn fits(self, extent: MemType) -> bool {
        match self.0 {
            0..=3 => true,
            0b0101 => extent != MemType::Device,
            0b0110 | 0b0111 | 0b1001 | 0b1010 | 0b1011 | 0b1101 | 0b1110 | 0b1111 => {
                extent == MemType::Any
            }
            _ => false,
        }
    }
}

/// Rights at both levels of privilege, and the kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct MapAttrs {
    pub(crate) user: Access,
    pub(crate) kernel: Access,
    pub(crate) kind: MapType,
}

impl MapAttrs {
    /// The same rights for both.
    pub(crate) const fn new(access: Access, kind: MapType) -> Self {
        Self { user: access, kernel: access, kind }
    }

    /// From a register.
    ///
    /// # Errors
    /// `ArgumentInvalid` for bits that mean nothing.
    pub(crate) fn decode(raw: u64) -> Result<Self, HypError> {
        if raw & !0x00ff_0077 != 0 {
            return Err(HypError::ArgumentInvalid);
        }
        let [low, _, kind, ..] = raw.to_le_bytes();
        Ok(Self { user: Access::of(low), kernel: Access::of(low >> 4), kind: MapType(kind) })
    }

    pub(crate) const fn encode(self) -> u64 {
        self.user.0 as u64 | (self.kernel.0 as u64) << 4 | (self.kind.0 as u64) << 16
    }

    /// What somebody may do, be it at one level of privilege only.
    pub(crate) const fn access(self) -> Access {
        self.user.or(self.kernel)
    }

    /// As a descriptor says it: who executes for each level, who loads and stores once for both. The original wants these
    /// to be alike, and stops if they are not.
    pub(crate) const fn prot(self) -> Prot {
        let (all, x) = (self.access(), Access::X);
        let executes = [self.user.covers(x), self.kernel.covers(x)];
        Prot::at_levels(all.covers(Access::R), all.covers(Access::W), executes)
    }

    /// No more than an extent has.
    pub(crate) const fn masked(self, by: Access) -> Self {
        Self { user: self.user.and(by), kernel: self.kernel.and(by), kind: self.kind }
    }

    /// The same memory with other rights.
    pub(crate) const fn with_access(self, other: Self) -> Self {
        Self { user: other.user, kernel: other.kernel, kind: self.kind }
    }

    pub(crate) fn fits(self, access: Access, memtype: MemType) -> bool {
        access.covers(self.user) && access.covers(self.kernel) && self.kind.fits(memtype)
    }
}

/// Whether ranges are fixed, or come and go by donation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ExtentKind {
    Basic,
    Sparse,
}

/// What an extent is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ExtentAttrs {
    pub(crate) kind: ExtentKind,
    pub(crate) memtype: MemType,
    pub(crate) access: Access,
}

impl ExtentAttrs {
    /// From a register. Memory that is forced to be cached needs a feature that this machine lacks.
    ///
    /// # Errors
    /// `ArgumentInvalid` for what is no extent.
    pub(crate) fn decode(raw: u64) -> Result<Self, HypError> {
        if raw & !0x0003_0307 != 0 {
            return Err(HypError::ArgumentInvalid);
        }
        let kind = match raw >> 16 & 3 {
            0 => ExtentKind::Basic,
            1 => ExtentKind::Sparse,
            _ => return Err(HypError::ArgumentInvalid),
        };
        let memtype = match raw >> 8 & 3 {
            0 => MemType::Any,
            1 => MemType::Device,
            2 => MemType::Uncached,
            _ => return Err(HypError::ArgumentInvalid),
        };
        let access = Access::of(raw.to_le_bytes()[0]);
        match access.is_of_extents() {
            true => Ok(Self { kind, memtype, access }),
            false => Err(HypError::ArgumentInvalid),
        }
    }
}
