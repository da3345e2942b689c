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
use std::sync::atomic::Ordering;

use slab::Slab;

use crate::sync::{Arc, AtomicU64, Mutex, fence, relax};

/// On a cache line of its own: its owner writes it at every access.
#[derive(Debug)]
#[repr(align(128))]
struct Slot(AtomicU64);

/// All readers that a converter may have to wait for.
#[derive(Debug)]
pub struct Domain {
    slots: Mutex<Slab<Arc<Slot>>>,
    barrier: Barrier,
}

/// How the two fences of the argument above are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    /// The converter makes every thread pass a fence; the reader only stops its compiler.
    Membarrier,
    /// Both sides run one.
    Fences,
}

impl Domain {
    /// A domain without readers.
    pub fn new() -> Self {
        // Miri knows fences and no membarrier.
        let modelled = crate::sync::MODELLED || cfg!(miri);
        let available = !modelled && crate::os::barrier::is_available();
        let barrier = if available { Barrier::Membarrier } else { Barrier::Fences };
        Self { slots: Mutex::new(Slab::new()), barrier }
    }

    /// Adds a reader, to be used by one thread. Not a method: loom's `Arc` cannot be a receiver.
    pub fn register(domain: &Arc<Self>) -> Reader {
        let slot = Arc::new(Slot(AtomicU64::new(0)));
        let key = domain.slots.lock().insert(Arc::clone(&slot));
        Reader { domain: Arc::clone(domain), slot, key, depth: Cell::new(0) }
    }

    /// Returns when every section of others than `own` that began before the call has ended.
    ///
    /// `false`, at once, if the kernel refuses the barrier that it granted before: then nothing is
    /// known, and the caller must not go on.
    fn wait(&self, own: Option<usize>) -> bool {
        // A reader that registers while the lock is held has not entered yet; it synchronises with us
        // through the lock and will see the frozen words.
        let slots = self.slots.lock();
        let mut others = slots.iter().filter(|&(key, _)| Some(key) != own).peekable();
        if others.peek().is_none() {
            return true;
        }
        match self.barrier {
            Barrier::Membarrier if !crate::os::barrier::heavy() => return false,
            Barrier::Membarrier => {}
            // SeqCst: pairs with the fence in `Reader::enter`.
            Barrier::Fences => fence(Ordering::SeqCst),
        }
        for (_, slot) in others {
            // Acquire: pairs with the Release in `Section::drop`, and with the one in `Reader::enter`
            // if the reader is back already; its copies come before whatever the converter does
            // next.
            let seen = slot.0.load(Ordering::Acquire);
            let mut spins = 0;
            // Acquire: pairs with the same Release.
            while seen % 2 == 1 && slot.0.load(Ordering::Acquire) == seen {
                relax(spins);
                spins = spins.saturating_add(1);
            }
        }
        true
    }
}

/// One thread's place in the domain.
#[derive(Debug)]
pub struct Reader {
    domain: Arc<Domain>,
    slot: Arc<Slot>,
    key: usize,
    depth: Cell<u32>,
}

impl Reader {
    /// Begins a section; it ends when the value is dropped. Sections nest.
    pub fn enter(&self) -> Section<'_> {
        let depth = self.depth.get();
        self.depth.set(depth + 1);
        if depth == 0 {
            // Relaxed: only this thread writes the slot.
            let count = self.slot.0.load(Ordering::Relaxed);
            // Release: pairs with the Acquire in `Domain::wait`. A converter that waited for the
            // section before may learn of its end from this mark alone. What the mark itself needs,
            // to come before the loads of the words, is the fence below.
            self.slot.0.store(count.wrapping_add(1), Ordering::Release);
            match self.domain.barrier {
                // SeqCst: pairs with membarrier in `Domain::wait`.
                Barrier::Membarrier => std::sync::atomic::compiler_fence(Ordering::SeqCst),
                // SeqCst: pairs with the fence in `Domain::wait`.
                Barrier::Fences => fence(Ordering::SeqCst),
            }
        }
        Section(self)
    }
}

impl Reader {
    /// Returns when every section of other readers that began before the call has ended. Must not be
    /// called from inside one: two that did would wait for each other.
    ///
    /// `false`, at once, if the kernel refuses the barrier that it granted before: then nothing is
    /// known, and the caller must not go on.
    #[must_use]
    pub fn wait_for_others(&self) -> bool {
        self.domain.wait(Some(self.key))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.domain.slots.lock().remove(self.key);
    }
}

/// Proof that the thread is inside a section.
#[derive(Debug)]
pub struct Section<'a>(&'a Reader);

impl Drop for Section<'_> {
    fn drop(&mut self) {
        let depth = self.0.depth.get() - 1;
        self.0.depth.set(depth);
        if depth == 0 {
            // Relaxed: only this thread writes the slot.
            let count = self.0.slot.0.load(Ordering::Relaxed);
            // Release: pairs with the Acquire in `Domain::wait`.
            self.0.slot.0.store(count.wrapping_add(1), Ordering::Release);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn waiting_lasts_until_the_outermost_section_ends() {
        let domain = Arc::new(Domain::new());
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
        let domain = Arc::new(Domain::new());
        for _ in 0..100 {
            drop(Domain::register(&domain));
        }
        assert!(domain.slots.lock().is_empty());
        assert!(domain.wait(None));
    }

    #[test]
    fn a_section_that_unwinds_is_left() {
        let domain = Arc::new(Domain::new());
        let reader = Domain::register(&domain);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _section = reader.enter();
            panic!("inside a section");
        }));
        assert!(outcome.is_err());
        assert!(domain.wait(None));
    }
}
