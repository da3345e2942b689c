//! The atomic of the loom models: loom's own, with every access kept in the exploration.
//!
//! Loom explores a store before an earlier load of another thread only if it remembers that load,
//! and it remembers one access for each atomic. A thread that loads and then stores, as every
//! compare-and-swap loop does, replaces the other's load by its own, and the other order is never
//! tried (tokio-rs/loom issues 166 and 392; 0.7.2 has it). Models passed that must fail.
//!
//! So each access first stores to a second atomic that nobody reads. Of two stores loom tries both
//! orders, and a relaxed store that is never read orders nothing.
//!
//! While a panic unwinds, the words are out of loom's hands. A scheduling point there would let another
//! thread run into the same mistake, and a second panic aborts the process before anybody has read
//! the first.

use std::sync::atomic::Ordering;
use std::thread::panicking;

#[derive(Debug)]
pub(crate) struct AtomicU64 {
    value: loom::sync::atomic::AtomicU64,
    turn: loom::sync::atomic::AtomicU64,
    /// What was written last, for a panic.
    last: std::sync::atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self {
            value: loom::sync::atomic::AtomicU64::new(value),
            turn: loom::sync::atomic::AtomicU64::new(0),
            last: std::sync::atomic::AtomicU64::new(value),
        }
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        if panicking() {
            return self.last();
        }
        self.take_turn();
        self.value.load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        if !panicking() {
            self.take_turn();
            self.value.store(value, order);
        }
        self.set_last(value);
    }

    pub(crate) fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        let found = if panicking() {
            Some(self.last()).filter(|&last| last == current).ok_or(self.last())
        } else {
            self.take_turn();
            self.value.compare_exchange_weak(current, new, success, failure)
        };
        if found.is_ok() {
            self.set_last(new);
        }
        found
    }

    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.fetch(|atomic| atomic.fetch_add(value, order), |found| found.wrapping_add(value))
    }

    pub(crate) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.fetch(|atomic| atomic.fetch_sub(value, order), |found| found.wrapping_sub(value))
    }

    fn fetch(
        &self,
        modelled: impl FnOnce(&loom::sync::atomic::AtomicU64) -> u64,
        change: impl FnOnce(u64) -> u64,
    ) -> u64 {
        let found = if panicking() {
            self.last()
        } else {
            self.take_turn();
            modelled(&self.value)
        };
        self.set_last(change(found));
        found
    }

    fn take_turn(&self) {
        // Relaxed: pairs with nothing, and must not.
        self.turn.store(0, Ordering::Relaxed);
    }

    fn last(&self) -> u64 {
        // Relaxed: all of loom's threads are one thread of the system.
        self.last.load(Ordering::Relaxed)
    }

    fn set_last(&self, value: u64) {
        // Relaxed: as in `last`.
        self.last.store(value, Ordering::Relaxed);
    }
}
