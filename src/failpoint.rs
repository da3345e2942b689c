//! Failures on demand: each step of a conversion that may fail asks here first, and tests make it fail.
//!
//! In a build without tests every answer is a constant `no`.

/// A step that may fail.
#[cfg_attr(not(feature = "oracle"), expect(unreachable_pub, reason = "public for fuzzers alone"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailPoint {
    /// Memory for the list of ranges, of what is held, or of what is told to others.
    Memory,
    /// A folio for a page that a view is to show.
    Folio,
    /// Memory for a hole that is filled again.
    Commit,
    /// membarrier(2).
    Barrier,
    /// The same, where translations are forgotten.
    ForgettingBarrier,
    /// Taking pages out of a view.
    View,
    /// The hypervisor.
    Hypervisor,
    /// Memory for the record of a folio or of an object.
    Record,
    /// A scrub.
    Scrub,
    /// The same, by a panic of whoever scrubs.
    ScrubPanic,
    /// What keeps the file of an arena at its size: left out, and nothing fails yet.
    Seal,
    /// A teardown that lets go of its machine before it tells objects: left out, and somebody may stand still.
    LetGoOfMachine,
}

#[cfg(not(any(test, feature = "oracle")))]
#[inline(always)]
pub(crate) const fn fails(_: FailPoint) -> bool {
    false
}

#[cfg(not(any(test, feature = "oracle")))]
#[inline(always)]
pub(crate) const fn panics(_: FailPoint) {}

#[cfg(not(any(test, feature = "oracle")))]
#[inline(always)]
pub(crate) fn heir<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    body
}

#[cfg(any(test, feature = "oracle"))]
pub(crate) use armed::{fails, heir, panics};

#[cfg(any(test, feature = "oracle"))]
pub use armed::{Armed, arm};

#[cfg(any(test, feature = "oracle"))]
mod armed {
    use std::cell::Cell;

    use super::FailPoint;

    #[derive(Clone, Copy)]
    struct Plan {
        point: FailPoint,
        /// How often it still succeeds.
        spared: u32,
    }

    thread_local! {
        static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
    }

    /// Makes a step of this thread fail once, after it has succeeded `spared` times.
    pub fn arm(point: FailPoint, spared: u32) -> Armed {
        PLAN.set(Some(Plan { point, spared }));
        Armed(())
    }

    /// Disarms when it is dropped.
    #[derive(Debug)]
    #[must_use = "the failure is called off when this is dropped"]
    pub struct Armed(());

    impl Armed {
        /// Whether the step has failed.
        pub fn has_fired(&self) -> bool {
            PLAN.get().is_none()
        }
    }

    impl Drop for Armed {
        fn drop(&mut self) {
            PLAN.set(None);
        }
    }

    /// Panics where [`fails`] would say that a step fails.
    #[expect(clippy::panic, reason = "what a test has asked for")]
    pub(crate) fn panics(point: FailPoint) {
        if fails(point) {
            panic!("made to panic");
        }
    }

    /// What is to run on another thread, with the same failures ahead as here.
    pub(crate) fn heir<T>(body: impl FnOnce() -> T) -> impl FnOnce() -> T {
        let plan = PLAN.get();
        move || {
            PLAN.set(plan);
            body()
        }
    }

    #[inline]
    pub(crate) fn fails(point: FailPoint) -> bool {
        PLAN.get().is_some() && fires(point)
    }

    #[cold]
    fn fires(point: FailPoint) -> bool {
        match PLAN.get() {
            Some(plan) if plan.point == point => {
                let left = plan.spared.checked_sub(1);
                PLAN.set(left.map(|spared| Plan { spared, ..plan }));
                left.is_none()
            }
            _ => false,
        }
    }
}
