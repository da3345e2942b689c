//! The views of the process, as a signal handler finds them: without a lock and without memory.
//!
//! A list of nodes that are never freed, only used again. A node has the addresses of one view, and a
//! pointer to what else there is to know. Who follows the pointer is counted in the node; who takes it away waits until nobody is.

// UNSAFETY: a pointer that is read under a count, and freed when that is zero.
#![expect(unsafe_code, reason = "a signal handler cannot take a lock or hold an Arc")]

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::addr::{ByteSize, Hva, Offset, Pgoff};
use crate::identity::{ObjectId, ViewId};
use crate::os::sigbus::{FaultCause, FaultReason, HostFault};

/// Knows why a page of an object faults. Asked in signal handlers: no lock, no memory, no system call.
pub(crate) trait Decode: Send + Sync {
    /// Why a touch of the page is a `SIGBUS`, unless the memory failed.
    fn reason(&self, page: Pgoff) -> FaultReason;
}

/// A view to be found by its addresses.
pub(crate) struct Entry {
    pub(crate) object: ObjectId,
    pub(crate) view: ViewId,
    pub(crate) start: Hva,
    pub(crate) size: ByteSize,
    pub(crate) decode: Arc<dyn Decode>,
}

impl Entry {
    /// What there is to say of a fault at this address.
    pub(crate) fn decode(&self, hva: Hva, cause: FaultCause) -> HostFault {
        let into = hva.get().wrapping_sub(self.start.get());
        let offset = Offset::new(into as u64);
        let reason = match cause {
            FaultCause::MemoryFailure => FaultReason::MemoryFailure,
            FaultCause::NotMapped | FaultCause::Inaccessible | FaultCause::Other => {
                self.decode.reason(offset.pgoff())
            }
        };
        HostFault { object: self.object, view: self.view, hva, offset, cause, reason }
    }
}

struct Node {
    /// Where the view begins, and how long it is: zero if the node is free.
    start: AtomicUsize,
    len: AtomicUsize,
    entry: AtomicPtr<Entry>,
    nr_readers: AtomicUsize,
    /// Written before the node is in the list, and never again.
    next: *const Node,
}

static HEAD: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
/// Held by who enters and leaves, not by who looks.
static WRITERS: Mutex<()> = Mutex::new(());

fn nodes() -> impl Iterator<Item = &'static Node> {
    // Acquire: pairs with the Release in `enter`: who finds a node finds it initialised.
    let mut next = HEAD.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: null, or a node that is never freed.
        let node = unsafe { next.as_ref() }?;
        next = node.next;
        Some(node)
    })
}

impl Node {
    fn covers(&self, hva: Hva) -> bool {
        // Relaxed: both are hints. A torn pair is found out when the entry is asked.
        let (start, len) = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        hva.get().wrapping_sub(start) < len
    }

    /// What is in the node, for as long as `look` runs.
    fn with<R>(&self, look: impl FnOnce(&Entry) -> R) -> Option<R> {
        // SeqCst, here and below: pairs with `leave`. Either the count is seen there, or the entry is
        // gone here.
        self.nr_readers.fetch_add(1, Ordering::SeqCst);
        // SeqCst: pairs with the exchange in `leave`.
        let entry = self.entry.load(Ordering::SeqCst);
        // SAFETY: null, or an entry that is not freed while the node counts a reader.
        let found = unsafe { entry.as_ref() }.map(look);
        // SeqCst: pairs with the load in `leave`: who sees zero frees what was looked at.
        self.nr_readers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

/// Decodes a fault at an address; `None` if no view is there. Async-signal-safe.
pub(super) fn decode(hva: Hva, cause: FaultCause) -> Option<HostFault> {
    let inside = |entry: &Entry| {
        let into = hva.get().wrapping_sub(entry.start.get()) as u64;
        (into < entry.size.get()).then(|| entry.decode(hva, cause))
    };
    nodes().filter(|node| node.covers(hva)).find_map(|node| node.with(inside).flatten())
}

/// A view is found for as long as this lives. Dropped before the addresses go to somebody else.
pub(crate) struct Entered {
    node: &'static Node,
    entry: *mut Entry,
}

// SAFETY: the pointer is to an entry that may be shared and sent.
unsafe impl Send for Entered {}
// SAFETY: as above.
unsafe impl Sync for Entered {}

impl Entered {
    pub(crate) fn entry(&self) -> &Entry {
        // SAFETY: freed when this is dropped, and written by nobody.
        unsafe { &*self.entry }
    }
}

impl fmt::Debug for Entered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.entry().view, self.entry().object)
    }
}

/// Makes a view known to the handler.
pub(crate) fn enter(entry: Entry) -> Entered {
    let (start, len) = (entry.start.get(), usize::try_from(entry.size.get()).unwrap_or(0));
    let entry = Box::into_raw(Box::new(entry));
    let _writers = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
    // Relaxed: pointers change under the lock.
    let free = nodes().find(|node| node.entry.load(Ordering::Relaxed).is_null());
    let node = free.unwrap_or_else(add_node);
    // Release: pairs with the load in `with`.
    node.entry.store(entry, Ordering::Release);
    // Relaxed: both are hints. Nobody touches the view before its maker has returned.
    node.start.store(start, Ordering::Relaxed);
    node.len.store(len, Ordering::Relaxed);
    Entered { node, entry }
}

/// With the writers' lock held.
fn add_node() -> &'static Node {
    // Shared from here on: who follows the pointer in the list does so beside others.
    let node: &'static Node = Box::leak(Box::new(Node {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        entry: AtomicPtr::new(ptr::null_mut()),
        nr_readers: AtomicUsize::new(0),
        // Relaxed: changes under the lock.
        next: HEAD.load(Ordering::Relaxed),
    }));
    // Release: pairs with the Acquire in `nodes`.
    HEAD.store(ptr::from_ref(node).cast_mut(), Ordering::Release);
    node
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Relaxed: a hint, so that few come to read any more.
        self.node.len.store(0, Ordering::Relaxed);
        // SeqCst: pairs with the count in `with`.
        self.node.entry.store(ptr::null_mut(), Ordering::SeqCst);
        // SeqCst: pairs with the counts in `with`. A handler looks for some nanoseconds, and calls nobody.
        while self.node.nr_readers.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        // SAFETY: made by `enter`; nobody finds it any more, and nobody is at it.
        drop(unsafe { Box::from_raw(self.entry) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Always(FaultReason);

    impl Decode for Always {
        fn reason(&self, _: Pgoff) -> FaultReason {
            self.0
        }
    }

    fn entry(start: usize, reason: FaultReason) -> Entry {
        Entry {
            object: ObjectId::new_unique(),
            view: ViewId::new_unique(),
            start: Hva::new(start),
            size: ByteSize::from_pages(2),
            decode: Arc::new(Always(reason)),
        }
    }

    // At the top of the address space, where no view of another test is.
    const BASE: usize = usize::MAX - 0xff_ffff;

    #[test]
    fn a_view_is_found_by_its_addresses_until_it_leaves() {
        let at = |skip| decode(Hva::new(BASE + skip), FaultCause::NotMapped);
        assert_eq!(at(0), None);
        let first = enter(entry(BASE, FaultReason::Private));
        let second = enter(entry(BASE + 0x3000, FaultReason::Hole));
        let found = at(0x1fff).unwrap();
        assert_eq!((found.view, found.object), (first.entry().view, first.entry().object));
        assert_eq!((found.offset, found.reason), (Offset::new(0x1fff), FaultReason::Private));
        assert_eq!(at(0x2000), None);
        assert_eq!(at(0x3000).unwrap().reason, FaultReason::Hole);
        let failed = decode(Hva::new(BASE), FaultCause::MemoryFailure).unwrap();
        assert_eq!(failed.reason, FaultReason::MemoryFailure);
        drop(first);
        assert_eq!((at(0), at(0x3000).map(|it| it.view)), (None, Some(second.entry().view)));
    }

    #[test]
    fn views_come_and_go_under_who_looks() {
        let rounds = if cfg!(miri) { 20 } else { 5_000 };
        let base = BASE + 0x10_0000;
        let at = |skip| decode(Hva::new(base + skip), FaultCause::NotMapped);
        std::thread::scope(|scope| {
            let stays = enter(entry(base, FaultReason::Absent));
            for nr in 1..3_usize {
                scope.spawn(move || {
                    for _ in 0..rounds {
                        let mine = enter(entry(base + nr * 0x2000, FaultReason::Private));
                        let found = at(nr * 0x2000).map(|found| found.view);
                        assert_eq!(found, Some(mine.entry().view));
                    }
                });
            }
            for round in 0..rounds {
                assert_eq!(at(0x10).map(|found| found.view), Some(stays.entry().view));
                let other = at(0x2000 + (round % 2) * 0x2000);
                assert!(other.is_none_or(|found| found.reason == FaultReason::Private));
            }
        });
    }
}
