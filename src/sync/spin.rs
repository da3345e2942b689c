//! A lock for sections of some ten nanoseconds: one locked instruction, where a futex takes two.
//!
//! Whoever has to wait spins, then yields, then sleeps, so a holder that lost its core gets it back. It is not fair: who locks
//! it again and again [gives way](SpinMutex::give_way) in between.

// UNSAFETY: one cell, reached only through the guard that the flag lets exist once.
#![expect(unsafe_code, reason = "a lock hands out what it guards")]

use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// So many turns somebody gives way at most: until who sleeps has looked again a few times.
const MOST_TURNS: u32 = 128 + 4;

/// A spin lock, without poisoning.
pub(crate) struct SpinMutex<T> {
    is_locked: AtomicBool,
    nr_waiting: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached by one thread at a time, which may also move it away or drop it.
unsafe impl<T: Send> Sync for SpinMutex<T> {}

/// The right to what the lock guards, until it is dropped.
pub(crate) struct SpinGuard<'a, T> {
    lock: &'a SpinMutex<T>,
    /// It gives away references as `&mut T` does, and can be shared by threads if that can.
    exclusive: PhantomData<&'a mut T>,
}

impl<T> SpinMutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            is_locked: AtomicBool::new(false),
            nr_waiting: AtomicU32::new(0),
            value: UnsafeCell::new(value),
        }
    }

    #[inline]
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        // Acquire: pairs with the release in `SpinGuard::drop`.
        if self.is_locked.swap(true, Ordering::Acquire) {
            self.wait();
        }
        SpinGuard { lock: self, exclusive: PhantomData }
    }

    /// Waits for those who wait for the lock, which the caller has not got and is about to take once more; not for ever.
    #[inline]
    pub(crate) fn give_way(&self) {
        // Relaxed: a hint; nothing is read because of it.
        let is_wanted = || self.nr_waiting.load(Ordering::Relaxed) > 0;
        (0..MOST_TURNS).take_while(|_| is_wanted()).for_each(super::relax);
    }

    #[cold]
    fn wait(&self) {
        // Relaxed: the hint for `give_way`.
        self.nr_waiting.fetch_add(1, Ordering::Relaxed);
        let mut spins = 0;
        loop {
            // Relaxed: a hint; the swap decides.
            while self.is_locked.load(Ordering::Relaxed) {
                super::relax(spins);
                spins = spins.saturating_add(1);
            }
            // Acquire: pairs with the release in `SpinGuard::drop`.
            if !self.is_locked.swap(true, Ordering::Acquire) {
                // Relaxed: as above.
                self.nr_waiting.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard has set the flag, so there is no other, and references end with borrows of it.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; and this guard is borrowed for as long as nobody else may be.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with the acquire of whoever locks next.
        self.lock.is_locked.store(false, Ordering::Release);
    }
}

impl<T> fmt::Debug for SpinMutex<T> {
    /// Without the value: a debugger must not wait.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpinMutex").field("is_locked", &self.is_locked).finish_non_exhaustive()
    }
}

impl<T: fmt::Debug> fmt::Debug for SpinGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        const NR_TURNS: u64 = if cfg!(miri) { 50 } else { 20_000 };
        let lock = SpinMutex::new((0, 0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..NR_TURNS {
                        let mut both = lock.lock();
                        assert_eq!(both.0, both.1);
                        both.0 += 1;
                        std::hint::black_box(&both);
                        both.1 += 1;
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), (3 * NR_TURNS, 3 * NR_TURNS));
    }

    /// Who waits gets the lock in between, from somebody who has it nearly always.
    #[test]
    fn somebody_who_comes_again_and_again_gives_way() {
        const NR_TURNS: u32 = if cfg!(miri) { 3 } else { 50 };
        let (lock, turns) = (SpinMutex::new(0_u32), SpinMutex::new(0_u32));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                for turn in 1..=NR_TURNS {
                    while *turns.lock() < turn {
                        std::thread::yield_now();
                    }
                    *lock.lock() += 1;
                }
            });
            for turn in 1..=NR_TURNS {
                let had = lock.lock();
                let seen = *had;
                *turns.lock() = turn;
                // Until it waits.
                while lock.nr_waiting.load(Ordering::Relaxed) == 0 {
                    std::thread::yield_now();
                }
                drop(had);
                while *lock.lock() == seen {
                    lock.give_way();
                }
            }
            waiter.join().unwrap();
        });
        assert_eq!((*lock.lock(), lock.nr_waiting.load(Ordering::Relaxed)), (NR_TURNS, 0));
        lock.give_way();
    }

    #[test]
    fn a_panic_gives_it_back() {
        let lock = SpinMutex::new(1);
        let panicked = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _guard = lock.lock();
                panic!("on purpose");
            });
            thread.join().is_err()
        });
        assert!(panicked);
        assert_eq!(*lock.lock(), 1);
        assert_eq!(format!("{lock:?}"), "SpinMutex { is_locked: false, .. }");
    }
}
