//! Numbers by which things of one process are told apart for as long as it lives.

use std::fmt;
// Not from the facade: the numbers order nothing.
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// A new one, which nothing has.
            #[doc(hidden)]
            pub fn new_unique() -> Self {
                static NEXT: AtomicU64 = AtomicU64::new(1);
                // Relaxed: the numbers must differ, and order nothing.
                Self(NEXT.fetch_add(1, Ordering::Relaxed))
            }

            /// The number; never zero.
            pub const fn as_u64(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, " {}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

identity! {
    /// A number that no other object of the process has, or had.
    ObjectId, "object"
}

identity! {
    /// A number that no other view of the process has, or had.
    ViewId, "view"
}
