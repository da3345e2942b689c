//! The atomic of the loom models: loom's own, with every access kept in the exploration.
//!
//! Loom explores a store before an earlier load of another thread only if it remembers that load,
//! and it remembers one access for each atomic. A thread that loads and then stores, as every
//! compare-and-swap loop does, replaces the other's load by its own, and the other order is never
//! tried (tokio-rs/loom issues 166 and 392; 0.7.2 has it). Models passed that must fail.
//!
//! So each access first stores to a second atomic that nobody reads. Of two stores loom tries both
//! orders, and a relaxed store that is never read orders nothing.

use std::sync::atomic::Ordering;

#[derive(Debug)]
pub(crate) struct AtomicU64 {
    value: loom::sync::atomic::AtomicU64,
    turn: loom::sync::atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self {
            value: loom::sync::atomic::AtomicU64::new(value),
            turn: loom::sync::atomic::AtomicU64::new(0),
        }
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.take_turn();
        self.value.load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.take_turn();
        self.value.store(value, order);
    }

    pub(crate) fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.take_turn();
        self.value.compare_exchange_weak(current, new, success, failure)
    }

    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.take_turn();
        self.value.fetch_add(value, order)
    }

    pub(crate) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.take_turn();
        self.value.fetch_sub(value, order)
    }

    fn take_turn(&self) {
        // Relaxed: pairs with nothing, and must not.
        self.turn.store(0, Ordering::Relaxed);
    }
}
