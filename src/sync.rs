//! The seam to the scheduler: everything that synchronises comes from here, so that loom can take
//! its place.
//!
//! The list is closed. Locks do not poison: what they guard is consistent at every point where a
//! panic could start, and a VMM that survives one must still be able to tear down.

#[cfg(all(loom, feature = "loom"))]
mod modelled;
#[cfg(not(all(loom, feature = "loom")))]
mod spin;

#[cfg(all(loom, feature = "loom"))]
mod facade {
    pub(crate) use super::modelled::AtomicU64;
    pub(crate) use loom::sync::atomic::fence;
    pub(crate) use loom::sync::{Arc, MutexGuard};
    pub(crate) use loom::thread::yield_now;

    pub(super) type RawMutex<T> = loom::sync::Mutex<T>;
    pub(super) type RawCondvar = loom::sync::Condvar;

    /// What stays for as long as the process, but for models: these have millions of executions, each with
    /// what is its own, and let go of it.
    pub(crate) type Lasting<T> = std::sync::Arc<T>;

    pub(crate) fn lasting<T>(value: T) -> Lasting<T> {
        Lasting::new(value)
    }

    pub(crate) fn same<T>(value: &Lasting<T>) -> Lasting<T> {
        Lasting::clone(value)
    }

    /// Under loom every step is a scheduling point already, and a sleep has no meaning.
    pub(crate) fn relax(_spins: u32) {
        yield_now();
    }
}

#[cfg(not(all(loom, feature = "loom")))]
mod facade {
    pub(crate) use std::sync::atomic::{AtomicU64, fence};
    pub(crate) use std::sync::{Arc, MutexGuard};

    pub(super) type RawMutex<T> = std::sync::Mutex<T>;
    pub(super) type RawCondvar = std::sync::Condvar;

    /// What stays for as long as the process.
    pub(crate) type Lasting<T> = &'static T;

    pub(crate) fn lasting<T>(value: T) -> Lasting<T> {
        Box::leak(Box::new(value))
    }

    #[inline]
    pub(crate) fn same<T>(value: &Lasting<T>) -> Lasting<T> {
        value
    }

    /// Waits a little, longer the longer it has been going on: a few spins, then yields, then
    /// sleeps of 50 us, so that a descheduled thread gets its core back.
    pub(crate) fn relax(spins: u32) {
        match spins {
            0..=63 => std::hint::spin_loop(),
            64..=127 => std::thread::yield_now(),
            _ => std::thread::sleep(std::time::Duration::from_micros(50)),
        }
    }
}

pub(crate) use facade::*;
#[cfg(not(all(loom, feature = "loom")))]
pub(crate) use spin::{SpinGuard, SpinMutex};

/// Models have one kind of lock.
#[cfg(all(loom, feature = "loom"))]
pub(crate) type SpinMutex<T> = Mutex<T>;
#[cfg(all(loom, feature = "loom"))]
pub(crate) type SpinGuard<'a, T> = MutexGuard<'a, T>;

use std::time::Instant;

/// Whether loom has really taken the place of `std`: models assert it first.
pub const MODELLED: bool = cfg!(all(loom, feature = "loom"));

/// Whether a model has failed and unwinds: whoever waits for a lock then lets another thread run into the same
/// mistake, and a second panic aborts the process.
#[inline]
pub(crate) fn is_over() -> bool {
    MODELLED && std::thread::panicking()
}

/// A mutex without poisoning.
#[derive(Debug)]
pub(crate) struct Mutex<T>(RawMutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(RawMutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The lock, if nobody has it just now.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(all(loom, feature = "loom"))]
impl<T> Mutex<T> {
    /// As for spin locks. In a model everybody has a turn.
    pub(crate) fn give_way(&self) {}
}

/// A condition variable for [`Mutex`].
#[derive(Debug)]
pub(crate) struct Condvar(RawCondvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(RawCondvar::new())
    }

    /// Sleeps until it is woken, or for no reason, or until the deadline. Models have no clock: there a
    /// deadline never comes.
    pub(crate) fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Option<Instant>,
    ) -> MutexGuard<'a, T> {
        match deadline.filter(|_| !MODELLED) {
            None => self.0.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let woken = self.0.wait_timeout(guard, left);
                woken.unwrap_or_else(std::sync::PoisonError::into_inner).0
            }
        }
    }

    pub(crate) fn wake_all(&self) {
        self.0.notify_all();
    }
}

/// A reader-writer lock without poisoning. Models do not reach the floors that use it.
#[derive(Debug)]
pub(crate) struct RwLock<T>(std::sync::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::sync::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> std::sync::RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> std::sync::RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
