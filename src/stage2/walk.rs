//! How a table is cut into levels, and what may stop a walk.

use super::pte::Level;
use crate::addr::Gfn;
use crate::error::Errno;
use crate::geometry::index;

/// Why a table did not do what it was asked; it is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum TableError {
    #[error("the address lies beyond the guest's address space")]
    BeyondIpa,
    #[error("nothing is mapped there")]
    Absent,
    #[error("a block covers the page")]
    Block,
    #[error("smaller pages are mapped under the block")]
    TableInTheWay,
    #[error("a misaligned or impossible mapping")]
    Invalid,
    #[error("the page is mapped there already")]
    Unchanged,
    #[error("no memory for tables")]
    NoMemory,
}

impl From<TableError> for Errno {
    fn from(error: TableError) -> Self {
        match error {
            TableError::BeyondIpa => Self::ERANGE,
            TableError::Absent => Self::ENOENT,
            TableError::Block => Self::E2BIG,
            TableError::TableInTheWay => Self::EEXIST,
            TableError::Invalid => Self::EINVAL,
            TableError::Unchanged => Self::EAGAIN,
            TableError::NoMemory => Self::ENOMEM,
        }
    }
}

/// How many levels a table has, and how many entries each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableShape {
    root: Level,
    root_bits: u32,
    index_bits: u32,
}

impl TableShape {
    /// 40 bits of address from level 1, the root made of two tables: Arm's default for guests.
    pub(crate) const IPA_40: Self =
        Self { root: Level::above_pages(2), root_bits: 10, index_bits: 9 };
    /// 48 bits of address from level 0: as much as a descriptor can address.
    pub(crate) const IPA_48: Self =
        Self { root: Level::above_pages(3), root_bits: 9, index_bits: 9 };

    /// A shape of `levels` levels with `1 << index_bits` entries in each table but the root, so that
    /// tests may have tables small enough to try everything. Refuses what 4 KiB tables, a root of at
    /// most 16 of them, and 48 bits of address do not allow.
    #[cfg(test)]
    pub(crate) fn new(levels: u8, root_bits: u32, index_bits: u32) -> Result<Self, TableError> {
        const MAX_GFN_BITS: u32 = 36;
        const MAX_INDEX_BITS: u32 = 9;
        const MAX_CONCATENATION_BITS: u32 = 4;
        const MAX_LEVELS: u8 = 5;
        let fits = (1..=MAX_LEVELS).contains(&levels)
            && (1..=MAX_INDEX_BITS).contains(&index_bits)
            && (1..=index_bits + MAX_CONCATENATION_BITS).contains(&root_bits);
        if !fits {
            return Err(TableError::Invalid);
        }
        let shape = Self { root: Level::above_pages(levels - 1), root_bits, index_bits };
        if shape.gfn_bits() > MAX_GFN_BITS {
            return Err(TableError::Invalid);
        }
        Ok(shape)
    }

    const fn gfn_bits(self) -> u32 {
        self.root_bits + self.index_bits * self.root.height()
    }

    /// The first guest frame beyond the address space.
    pub(crate) const fn gfn_limit(self) -> Gfn {
        Gfn::new(1 << self.gfn_bits())
    }

    pub(super) const fn root(self) -> Level {
        self.root
    }

    /// How many bits of an address choose an entry of a table that is not the root.
    #[inline]
    pub(super) const fn index_bits(self) -> u32 {
        self.index_bits
    }

    /// How many entries a table of this level has.
    pub(super) fn nr_entries(self, level: Level) -> usize {
        if level == self.root { 1 << self.root_bits } else { 1 << self.index_bits }
    }

    const fn shift(self, level: Level) -> u32 {
        self.index_bits * level.height()
    }

    /// How many pages an entry of this level spans.
    pub(crate) const fn pages_at(self, level: Level) -> u64 {
        1 << self.shift(level)
    }

    /// Which entry of a table of this level leads to `gfn`, which is below [`Self::gfn_limit`].
    pub(super) fn index(self, gfn: Gfn, level: Level) -> usize {
        index(gfn.get() >> self.shift(level)) & (self.nr_entries(level) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_arm_does_not_have_are_refused() {
        for (levels, root, index) in [
            (0, 9, 9),
            (6, 1, 1),
            (4, 0, 9),
            (4, 9, 0),
            (4, 9, 10),
            (3, 14, 9),
            (5, 9, 9),
            (255, 1, 1),
            (1, u32::MAX, 1),
            (1, 1, u32::MAX),
        ] {
            assert_eq!(TableShape::new(levels, root, index), Err(TableError::Invalid));
        }
        assert_eq!(TableShape::new(3, 10, 9), Ok(TableShape::IPA_40));
        assert_eq!(TableShape::new(4, 9, 9), Ok(TableShape::IPA_48));
        assert_eq!(TableShape::IPA_40.gfn_limit(), Gfn::new(1 << 28));
    }

    #[test]
    fn indices_follow_the_bits() {
        let gfn = Gfn::new(3 << 18 | 5 << 9 | 7);
        let index = |level| TableShape::IPA_40.index(gfn, level);
        assert_eq!([index(Level::BLOCK_1G), index(Level::BLOCK_2M), index(Level::PAGE)], [3, 5, 7]);
        assert_eq!(TableShape::IPA_40.pages_at(Level::BLOCK_2M), 512);
        assert_eq!(TableShape::IPA_40.pages_at(Level::BLOCK_1G), 1 << 18);
    }
}
