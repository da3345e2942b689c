//! Grace periods: a converter waits for the accesses that began before it froze the words.
//!
//! A reader marks its own slot, looks at the words, copies, and unmarks. It runs no atomic
//! read-modify-write and, where `membarrier` is to be had, no fence. The argument is the one of
//! store buffering: reader `mark; fence; look`, converter `freeze; fence; scan`. Either the reader
//! sees the frozen word and turns back, or the converter sees the mark and waits.
//!
//! The slot counts: odd inside a section, even outside. A converter waits for the count it saw to
//! change, so a reader that comes back at once cannot hold it up.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use slab::Slab;

use super::barrier::Barrier;
use super::flaw::{Flaw, seeded};
use crate::sync::{Arc, AtomicU64, Lasting, MODELLED, Mutex, lasting, relax, same};

/// On a cache line of its own: its owner writes it at every access.
#[derive(Debug)]
#[repr(align(128))]
struct Slot(AtomicU64);

/// All readers that a converter may have to wait for.
#[derive(Debug)]
pub struct Domain {
    slots: Mutex<Slots>,
    barrier: Barrier,
}

/// Slots are never given back to the allocator, only to the next reader: so a section needs to know
/// nothing but its slot, and there are as many as there ever were readers at once. Those of a domain
/// that ends go to the next domain.
#[derive(Debug, Default)]
struct Slots {
    taken: Slab<Lasting<Slot>>,
    /// Their readers are gone. Room for all is reserved.
    idle: Vec<Lasting<Slot>>,
}

/// Slots of domains that have ended. An execution of a model must not find what the one before has left.
static UNUSED: LazyLock<Mutex<Vec<Lasting<Slot>>>> = LazyLock::new(|| Mutex::new(Vec::new()));

fn unused_slot() -> Lasting<Slot> {
    let left = if MODELLED { None } else { UNUSED.lock().pop() };
    left.unwrap_or_else(|| lasting(Slot(AtomicU64::new(0))))
}

/// Far longer than a processor keeps a store to itself, and who does not run has passed a barrier.
const VISIBLE_AFTER: Duration = Duration::from_millis(2);

impl Domain {
    /// A domain without readers.
    pub fn new() -> Self {
        Self { slots: Mutex::new(Slots::default()), barrier: Barrier::new() }
    }

    /// Adds a reader, to be used by one thread. Not a method: loom's `Arc` cannot be a receiver.
    pub fn register(domain: &Arc<Self>) -> Reader {
        let mut slots = domain.slots.lock();
        let slot = slots.idle.pop().unwrap_or_else(unused_slot);
        let key = slots.taken.insert(same(&slot));
        let nr_taken = slots.taken.len();
        slots.idle.reserve(nr_taken);
        drop(slots);
        Reader {
            domain: Arc::clone(domain),
            slot,
            key,
            barrier: domain.barrier,
            not_shared: PhantomData,
        }
    }

    /// Returns when every section of others than `own` that began before the call has ended.
    ///
    /// `false`, at once, if the kernel refuses the barrier that it granted before: then nothing is
    /// known, and the caller must not go on.
    fn wait(&self, own: Option<usize>) -> bool {
        // A reader that registers while the lock is held has not entered yet; it synchronises with us
        // through the lock and will see the frozen words.
        let slots = self.slots.lock();
        // What is the caller's own is one of them.
        if slots.taken.len() == usize::from(own.is_some()) {
            return true;
        }
        if !seeded(Flaw::SectionsWithoutFences) && !self.barrier.heavy() {
            return false;
        }
        wait_for_marks(
            slots.taken.iter().filter(|&(key, _)| Some(key) != own).map(|(_, slot)| slot),
        );
        true
    }

    /// Returns when every section that began before the call has ended. Must not be called from inside one.
    ///
    /// `false` as for [`Reader::wait_for_others`].
    #[must_use]
    pub fn wait_for_all(&self) -> bool {
        self.wait(None)
    }

    /// The same where the kernel refuses the barrier, for a caller who cannot turn back: slow, and by the clock.
    /// No section that begins later may find anything to do.
    pub(crate) fn wait_by_the_clock(&self) {
        std::thread::sleep(VISIBLE_AFTER);
        let slots = self.slots.lock();
        wait_for_marks(slots.taken.iter().map(|(_, slot)| slot));
    }
}

/// Waits for the sections whose marks are to be seen.
fn wait_for_marks<'a>(slots: impl Iterator<Item = &'a Lasting<Slot>>) {
    for slot in slots {
        // Acquire: pairs with the Release in `Section::drop`, and with the one in `Reader::enter` if the
        // reader is back already; its copies come before whatever the converter does next.
        let seen = slot.0.load(Ordering::Acquire);
        let mut spins = 0;
        // Acquire: pairs with the same Release.
        while seen % 2 == 1 && slot.0.load(Ordering::Acquire) == seen {
            relax(spins);
            spins = spins.saturating_add(1);
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if !MODELLED {
            // Readers keep their domain, so all of its slots are idle.
            UNUSED.lock().append(&mut self.slots.lock().idle);
        }
    }
}

impl Default for Domain {
    fn default() -> Self {
        Self::new()
    }
}

/// One thread's place in the domain.
#[derive(Debug)]
pub struct Reader {
    domain: Arc<Domain>,
    slot: Lasting<Slot>,
    key: usize,
    barrier: Barrier,
    /// For one thread: not even to be looked at by another.
    not_shared: PhantomData<Cell<()>>,
}

impl Reader {
    /// Begins a section; it ends when the value is dropped. Sections nest, and one that is begun inside
    /// of another is part of that.
    #[inline]
    pub fn enter(&self) -> Section<'_> {
        self.enter_detached()
    }

    /// The same for a caller who sees to it that the section ends before the reader goes.
    #[inline]
    pub(super) fn enter_detached<'a>(&self) -> Section<'a> {
        // Relaxed: only this thread writes the slot.
        let count = self.slot.0.load(Ordering::Relaxed);
        if count % 2 == 1 {
            return Section { ends: None, reader: PhantomData };
        }
        // Release: pairs with the Acquire in `Domain::wait`. A converter that waited for the
        // section before may learn of its end from this mark alone. What the mark itself needs,
        // to come before the loads of the words, is the barrier.
        self.slot.0.store(count.wrapping_add(1), Ordering::Release);
        if !seeded(Flaw::SectionsWithoutFences) {
            self.barrier.light();
        }
        Section { ends: Some((same(&self.slot), count.wrapping_add(2))), reader: PhantomData }
    }
}

impl Reader {
    /// Whether [`wait_for_others`](Self::wait_for_others) can be relied on. The kernel does not grant
    /// again what it has refused.
    #[must_use]
    pub(super) fn can_wait(&self) -> bool {
        self.barrier.is_granted()
    }

    /// Returns when every section of other readers that began before the call has ended. Must not be
    /// called from inside one: two that did would wait for each other.
    ///
    /// `false`, at once, if the kernel refuses the barrier that it granted before: then nothing is
    /// known, and the caller must not go on.
    #[must_use]
    pub fn wait_for_others(&self) -> bool {
        self.domain.wait(Some(self.key))
    }

    /// Whether who waits in this domain waits for this reader.
    #[inline]
    pub(crate) fn is_of(&self, domain: &Arc<Domain>) -> bool {
        Arc::ptr_eq(&self.domain, domain)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut slots = self.domain.slots.lock();
        if let Some(slot) = slots.taken.try_remove(self.key) {
            slots.idle.push(slot);
        }
    }
}

/// Proof that the thread is inside a section: with the slot, and what it says afterwards, unless the
/// section is inside of another.
#[derive(Debug)]
pub struct Section<'a> {
    ends: Option<(Lasting<Slot>, u64)>,
    reader: PhantomData<&'a Reader>,
}

impl Drop for Section<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some((slot, after)) = &self.ends {
            // Release: pairs with the Acquire in `Domain::wait`.
            slot.0.store(*after, Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
pub(super) mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    /// A domain that stays, as a process's own does: with it go slots that nothing would free, and
    /// Miri looks for leaks.
    pub(in crate::state) fn lasting_domain() -> Arc<Domain> {
        static ALL: std::sync::Mutex<Vec<Arc<Domain>>> = std::sync::Mutex::new(Vec::new());
        let domain = Arc::new(Domain::new());
        ALL.lock().unwrap().push(Arc::clone(&domain));
        domain
    }

    #[test]
    fn waiting_lasts_until_the_outermost_section_ends() {
        let domain = lasting_domain();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (entered, ready) = std::sync::mpsc::channel();
            let (domain, ended) = (&domain, &ended);
            scope.spawn(move || {
                let reader = Domain::register(domain);
                let outer = reader.enter();
                drop(reader.enter());
                entered.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                ended.store(true, Ordering::SeqCst);
                drop(outer);
            });
            ready.recv().unwrap();
            assert!(domain.wait(None));
            assert!(ended.load(Ordering::SeqCst), "the nested section did not end the outer one");
        });
    }

    #[test]
    fn readers_leave_no_slot_behind() {
        let domain = lasting_domain();
        for _ in 0..100 {
            drop(Domain::register(&domain));
        }
        assert!(domain.slots.lock().taken.is_empty());
        assert!(domain.wait(None));
    }

    #[test]
    fn slots_of_a_domain_that_ends_serve_the_next() {
        let slots: Vec<_> = (0..50)
            .map(|_| {
                let reader = Domain::register(&Arc::new(Domain::new()));
                std::ptr::from_ref::<Slot>(reader.slot).addr()
            })
            .collect();
        let mut different = slots.clone();
        different.sort_unstable();
        different.dedup();
        // Other tests take and leave some meanwhile.
        assert!(different.len() < slots.len(), "each domain has made a slot of its own");
    }

    #[test]
    fn without_a_barrier_a_section_is_waited_for_all_the_same() {
        let domain = lasting_domain();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (entered, ready) = std::sync::mpsc::channel();
            let (domain, ended) = (&domain, &ended);
            scope.spawn(move || {
                let reader = Domain::register(domain);
                let section = reader.enter();
                entered.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                ended.store(true, Ordering::SeqCst);
                drop(section);
            });
            ready.recv().unwrap();
            domain.wait_by_the_clock();
            assert!(ended.load(Ordering::SeqCst));
        });
    }

    #[test]
    fn a_section_that_unwinds_is_left() {
        let domain = lasting_domain();
        let reader = Domain::register(&domain);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _section = reader.enter();
            panic!("inside a section");
        }));
        assert!(outcome.is_err());
        assert!(domain.wait(None));
    }
}
