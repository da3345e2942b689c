//! Which EL2 this is.

use crate::error::Errno;

/// `ENOMEMHOSTS2`: Android's word for host tables without memory, which the host can do something about.
pub(crate) const ENOMEM_HOST_TABLES: Errno = Errno::new(522);

/// Which pKVM a hypervisor answers as. What a profile lacks it answers as the original does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Profile {
    /// Mainline 7.2.
    #[default]
    Mainline72,
    /// Android's 6.18: guests give pages back, donations of blocks, a firmware for guests, pins by devices.
    Android618,
    /// Mainline with the series for huge pages of protected guests.
    HugeProtected,
}

impl Profile {
    /// How many pages a protected guest may be given at once.
    pub(crate) const fn donates(self, nr_pages: u64) -> bool {
        match self {
            Self::Mainline72 => nr_pages == 1,
            Self::Android618 | Self::HugeProtected => nr_pages == 1 || nr_pages == 512,
        }
    }

    /// Whether a block that is given away is one entry of the host's table.
    pub(crate) const fn annotates_blocks(self) -> bool {
        matches!(self, Self::HugeProtected)
    }

    /// Whether EL2 splits a protected guest's block when the host asks.
    pub(crate) const fn splits(self) -> bool {
        matches!(self, Self::Android618 | Self::HugeProtected)
    }

    /// What is said if the host's tables have no memory.
    pub(crate) fn host_tables_short(self, errno: Errno) -> Errno {
        match self {
            Self::Android618 if errno == Errno::ENOMEM => ENOMEM_HOST_TABLES,
            _ => errno,
        }
    }

    /// Whether the host's memory is mapped when EL2 boots, and not when it is first touched.
    pub(crate) const fn prefaults(self) -> bool {
        matches!(self, Self::Android618)
    }

    /// Whether the pages around one that leaves a block of the host's stay mapped.
    pub(crate) const fn keeps_siblings(self) -> bool {
        matches!(self, Self::Android618 | Self::HugeProtected)
    }

    /// Guests may give pages back, share runs, and have a firmware; devices are behind EL2's IOMMU; the host lists
    /// what it gives.
    pub(crate) const fn is_android(self) -> bool {
        matches!(self, Self::Android618)
    }
}
