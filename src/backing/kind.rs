//! What the bytes of a pool can be made of.

use std::fmt;

use crate::geometry::FolioSize;
use crate::os::memfd::PageKind;

/// What the bytes of a pool, or of a part of it, are made of. All of it is committed when the pool is
/// created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArenaBacking {
    /// The process's own heap. Has no host views.
    Heap,
    /// A memory file on 4 KiB pages.
    Memfd,
    /// A memory file for which the kernel is asked to find huge pages. Needs
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` to say `advise` or more. What was
    /// really found is in [`PoolStat::huge`](crate::PoolStat::huge).
    MemfdThp,
    /// A memory file on hugetlb pages of 2 MiB. Needs as many in `/proc/sys/vm/nr_hugepages`.
    /// Host views change sides in units of 2 MiB.
    MemfdHugetlb2M,
    /// A memory file on hugetlb pages of 1 GiB. Needs as many in
    /// `/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages`. Host views change sides in units
    /// of 1 GiB.
    MemfdHugetlb1G,
}

impl ArenaBacking {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::Heap, Self::Memfd, Self::MemfdThp, Self::MemfdHugetlb2M, Self::MemfdHugetlb1G];

    /// The unit in which host views of such memory can change sides, of which it is made as a whole.
    pub const fn view_granule(self) -> FolioSize {
        match self {
            Self::Heap | Self::Memfd | Self::MemfdThp => FolioSize::Base,
            Self::MemfdHugetlb2M => FolioSize::Huge2M,
            Self::MemfdHugetlb1G => FolioSize::Huge1G,
        }
    }

    /// The pages of the file; `None` where there is no file.
    pub(super) const fn pages(self) -> Option<PageKind> {
        match self {
            Self::Heap => None,
            Self::Memfd | Self::MemfdThp => Some(PageKind::Plain),
            Self::MemfdHugetlb2M => Some(PageKind::Hugetlb2M),
            Self::MemfdHugetlb1G => Some(PageKind::Hugetlb1G),
        }
    }

    /// Whether its pages come from the host's pools of hugetlb pages.
    pub(super) const fn is_hugetlb(self) -> bool {
        matches!(self, Self::MemfdHugetlb2M | Self::MemfdHugetlb1G)
    }
}

impl fmt::Display for ArenaBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Heap => "heap",
            Self::Memfd => "memfd, 4 KiB pages",
            Self::MemfdThp => "memfd, transparent huge pages",
            Self::MemfdHugetlb2M => "memfd, hugetlb pages of 2 MiB",
            Self::MemfdHugetlb1G => "memfd, hugetlb pages of 1 GiB",
        })
    }
}
