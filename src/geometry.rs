//! Page and folio sizes, NUMA nodes, and the limits that every other file may rely on.

use std::fmt;

use crate::addr::ByteSize;

/// log2 of the page size in bytes.
pub const PAGE_SHIFT: u32 = 12;
/// The page: 4 KiB, the unit of visibility, pins and stage-2 leaves.
pub const PAGE_SIZE: ByteSize = ByteSize::from_bytes(1 << PAGE_SHIFT);
/// log2 of the pages in a huge folio.
pub(crate) const HUGE_ORDER: u8 = 9;
/// Pages in a huge folio.
pub(crate) const HUGE_PAGES: u64 = 1 << HUGE_ORDER;
/// log2 of the pages in a folio of 1 GiB.
pub(crate) const GIANT_ORDER: u8 = 18;
/// [`PAGE_SIZE`] where an index is wanted.
pub(crate) const PAGE_BYTES: usize = 1 << PAGE_SHIFT;
/// The largest byte position that any address space may reach: Linux's `loff_t`.
pub(crate) const MAX_BYTES: u64 = i64::MAX as u64;
/// The same in whole pages.
pub(crate) const MAX_PAGES: u64 = MAX_BYTES >> PAGE_SHIFT;

const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE.get());
const _: () = assert!(MAX_PAGES << PAGE_SHIFT <= MAX_BYTES);
// Buffers are indexed with usize and positions are u64: the two must agree.
const _: () = assert!(size_of::<usize>() == size_of::<u64>());

/// A page number or byte position that is known to be inside of something in memory, as an index.
#[expect(clippy::cast_possible_truncation, reason = "asserted above: the widths are the same")]
pub(crate) const fn index(position: u64) -> usize {
    position as usize
}

/// How large the folios of an object are. A folio is allocated and freed as one and is
/// never split because a subpage changed sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum FolioSize {
    /// 4 KiB.
    Base,
    /// 2 MiB. What is left of an object behind its last whole 2 MiB is made of 4 KiB folios.
    #[default]
    Huge2M,
    /// 1 GiB. What is left of an object behind its last whole GiB is made of folios of 2 MiB, and of 4 KiB.
    Huge1G,
}

impl FolioSize {
    pub(crate) const fn order(self) -> u8 {
        match self {
            Self::Base => 0,
            Self::Huge2M => HUGE_ORDER,
            Self::Huge1G => GIANT_ORDER,
        }
    }

    pub(crate) const fn nr_pages(self) -> u64 {
        1 << self.order()
    }

    /// The size of one folio.
    pub const fn bytes(self) -> ByteSize {
        ByteSize::from_bytes(self.nr_pages() << PAGE_SHIFT)
    }
}

/// A NUMA node of the host, by the number that the kernel gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NumaNode(u32);

impl NumaNode {
    /// Wraps the number. Nothing is checked: the host may have no such node.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The number itself.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for NumaNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
