//! A fence that is cheap on one side.
//!
//! Two threads each store one thing and then look at the other's. With a fence between store and look on
//! both sides, one of them sees the other. Where one side does this all the time and the other hardly
//! ever, the rare one makes every thread of the process pass a fence, by `membarrier(2)`, and the frequent
//! one only stops its compiler.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::sync::fence;

/// How the two fences are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Barrier {
    /// By the rare side, for both.
    Membarrier,
    /// By each side.
    Fences,
}

impl Barrier {
    /// The better one that there is.
    pub(super) fn new() -> Self {
        // Miri knows fences and no membarrier.
        let modelled = crate::sync::MODELLED || cfg!(miri);
        match !modelled && crate::os::barrier::is_available() {
            true => Self::Membarrier,
            false => Self::Fences,
        }
    }

    /// The fence of the frequent side.
    #[inline]
    pub(super) fn light(self) {
        match self {
            // SeqCst: pairs with the system call in `heavy`.
            Self::Membarrier => compiler_fence(Ordering::SeqCst),
            // SeqCst: pairs with the fence in `heavy`.
            Self::Fences => fence(Ordering::SeqCst),
        }
    }

    /// Whether there is a fence of the rare side to be had.
    pub(super) fn is_granted(self) -> bool {
        match self {
            Self::Membarrier => crate::os::barrier::heavy(),
            Self::Fences => true,
        }
    }

    /// The fence of the rare side. `false`: the kernel refuses what it granted before, and there was
    /// none.
    #[must_use]
    pub(super) fn heavy(self) -> bool {
        match self {
            Self::Membarrier => crate::os::barrier::heavy(),
            Self::Fences => {
                // SeqCst: pairs with the fence in `light`.
                fence(Ordering::SeqCst);
                true
            }
        }
    }
}
