//! The order of the locks that come before EL2's: an object's own, the state of a VM, a CPU. In builds with debug assertions
//! each thread knows which of them it has, and fails at once where it would stand still some day.

use std::ops::{Deref, DerefMut};
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use crate::sync::RwLock;

/// What a thread may have one of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    State,
    Cpu,
}

/// A thread has one, until this is dropped.
#[derive(Debug)]
#[cfg_attr(not(debug_assertions), expect(dead_code, reason = "nobody asks"))]
pub(super) struct Held(Kind);

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    use super::{Held, Kind};

    thread_local! {
        static STATE: Cell<bool> = const { Cell::new(false) };
        static CPU: Cell<bool> = const { Cell::new(false) };
    }

    /// The thread is about to wait for one.
    pub(in crate::hyp) fn hold(kind: Kind) -> Held {
        assert!(!CPU.get(), "who has a CPU asks for {kind:?}");
        match kind {
            Kind::State => assert!(!STATE.replace(true), "who has a VM's state asks for another"),
            Kind::Cpu => CPU.set(true),
        }
        Held(kind)
    }

    impl Drop for Held {
        fn drop(&mut self) {
            match self.0 {
                Kind::State => STATE.set(false),
                Kind::Cpu => CPU.set(false),
            }
        }
    }

    /// The thread is about to call an object, which has locks of its own, and calls a VM with them.
    pub(in crate::hyp) fn may_call_objects() {
        assert!(!STATE.get() && !CPU.get(), "who calls an object has a VM's state or a CPU");
    }
}

#[cfg(not(debug_assertions))]
mod held {
    use super::{Held, Kind};

    #[inline(always)]
    pub(in crate::hyp) fn hold(kind: Kind) -> Held {
        Held(kind)
    }

    #[inline(always)]
    pub(in crate::hyp) fn may_call_objects() {}
}

pub(super) use held::{hold, may_call_objects};

/// The lock of a VM's state.
#[derive(Debug)]
pub(super) struct StateLock<T>(RwLock<T>);

/// A state that nobody changes meanwhile.
#[derive(Debug)]
pub(super) struct Reading<'a, T> {
    state: RwLockReadGuard<'a, T>,
    _held: Held,
}

/// A state that nobody else looks at meanwhile.
#[derive(Debug)]
pub(super) struct Writing<'a, T> {
    state: RwLockWriteGuard<'a, T>,
    _held: Held,
}

impl<T> StateLock<T> {
    pub(super) fn new(state: T) -> Self {
        Self(RwLock::new(state))
    }

    pub(super) fn read(&self) -> Reading<'_, T> {
        let held = hold(Kind::State);
        Reading { state: self.0.read(), _held: held }
    }

    pub(super) fn write(&self) -> Writing<'_, T> {
        let held = hold(Kind::State);
        Writing { state: self.0.write(), _held: held }
    }
}

impl<T> Deref for Reading<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T> Deref for Writing<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T> DerefMut for Writing<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.state
    }
}
