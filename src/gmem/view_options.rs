//! How a view is to be made, and what it came to.

use std::fmt;

/// By what a view keeps private pages out of reach. All have the same signals; see design/host.md for
/// what each costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ViewPath {
    /// The first of the others that the host offers, in the order in which they stand here.
    #[default]
    Best,
    /// userfaultfd(2), for user-mode faults only: needs no privilege, but Linux 5.19.
    UserfaultfdSyscall,
    /// The same through `/dev/userfaultfd`, where the system call is refused and the device is not.
    UserfaultfdDevice,
    /// An empty file mapped over what is private. Needs nothing; each run of pages that differs from its
    /// neighbours is a mapping of its own, of which the kernel allows some ten thousand
    /// (`vm.max_map_count`), and a conversion beyond that is refused.
    Fixed,
}

impl ViewPath {
    /// What [`ViewPath::Best`] tries, in this order.
    pub(super) const BY_PREFERENCE: [Self; 3] =
        [Self::UserfaultfdSyscall, Self::UserfaultfdDevice, Self::Fixed];
}

impl fmt::Display for ViewPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Best => "best",
            Self::UserfaultfdSyscall => "userfaultfd(2)",
            Self::UserfaultfdDevice => "/dev/userfaultfd",
            Self::Fixed => "MAP_FIXED",
        })
    }
}

/// When a page that is shared gets its page-table entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ViewMapping {
    /// When it turns shared: a later touch never takes a fault.
    #[default]
    Eager,
    /// When it is touched, where the kernel can fault it in by itself: in blocks of 2 MiB that turn shared
    /// as a whole, and with [`ViewPath::Fixed`] everywhere. Other pages are mapped when they turn shared, as
    /// is all that is in huge pages.
    Lazy,
}

/// How a view is to be made: by the best path, with eager mapping, unless said otherwise.
#[derive(Clone, Debug, Default)]
pub struct ViewOptions {
    pub(super) path: ViewPath,
    pub(super) mapping: ViewMapping,
}

impl ViewOptions {
    /// By what private pages are kept out of reach. If it is not to be had there is no view.
    #[must_use]
    pub fn path(mut self, path: ViewPath) -> Self {
        self.path = path;
        self
    }

    /// When shared pages are mapped.
    #[must_use]
    pub fn mapping(mut self, mapping: ViewMapping) -> Self {
        self.mapping = mapping;
        self
    }
}
