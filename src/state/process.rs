//! What all objects of the process share: one domain of grace periods and one list of who holds pins,
//! with a place in both for each thread that ever touched guest memory; and one place to wait.

use std::sync::LazyLock;

use super::epoch::{Domain, Reader, Section};
use super::holders::{Holders, ObjectId, OwnerId, Records};
use super::waiting::{CancelToken, Waiters};
use crate::range::PgoffRange;
use crate::sync::Arc;

static DOMAIN: LazyLock<Arc<Domain>> = LazyLock::new(|| Arc::new(Domain::new()));
static WAITERS: LazyLock<Arc<Waiters>> = LazyLock::new(|| Arc::new(Waiters::new()));

static HOLDERS: LazyLock<Arc<Holders>> = LazyLock::new(|| Arc::new(Holders::new()));

thread_local! {
    static LOCAL: Local = Local::register();
}

/// What a thread has of its own.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) reader: Reader,
    pub(crate) records: Records,
}

impl Local {
    fn register() -> Self {
        Self { reader: Domain::register(&DOMAIN), records: Holders::register(&HOLDERS) }
    }
}

/// Runs `work` with what this thread has of its own.
#[inline]
pub(crate) fn with_local<R>(mut work: impl FnMut(&Local) -> R) -> R {
    match LOCAL.try_with(|local| work(local)) {
        Ok(result) => result,
        // A destructor that runs after the thread's own is gone gets one for once.
        Err(_) => work(&Local::register()),
    }
}

/// Runs `work` with this thread's reader.
#[inline]
pub(crate) fn with_reader<R>(mut work: impl FnMut(&Reader) -> R) -> R {
    with_local(|local| work(&local.reader))
}

/// Calls `seen` with the pages and the owner of every pin of the object; see [`Holders::each`].
pub(crate) fn each_holder(object: ObjectId, seen: impl FnMut(PgoffRange, OwnerId)) {
    HOLDERS.each(object, seen);
}

/// Begins a section of this thread; it ends when the value is dropped. What runs meanwhile must be short
/// and must not convert, wait or call out.
#[inline]
pub(crate) fn enter_section() -> ThreadSection {
    match LOCAL.try_with(|local| local.reader.enter_detached()) {
        // The thread's own is there as long as any stack frame of the thread.
        Ok(section) => ThreadSection { _section: section, _temporary: None },
        Err(_) => enter_for_once(),
    }
}

#[cold]
fn enter_for_once() -> ThreadSection {
    let reader = Box::new(Domain::register(&DOMAIN));
    ThreadSection { _section: reader.enter_detached(), _temporary: Some(reader) }
}

/// Proof that this thread is inside a section.
#[derive(Debug)]
#[must_use = "the section ends when this is dropped"]
pub(crate) struct ThreadSection {
    // Dropped first: the section ends before its reader goes.
    _section: Section<'static>,
    _temporary: Option<Box<Reader>>,
}

/// Where everybody sleeps.
pub(crate) fn waiters() -> &'static Arc<Waiters> {
    &WAITERS
}

impl CancelToken {
    /// A token that ends waits of this process.
    pub fn new() -> Self {
        Self::of(waiters())
    }
}

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sections_nest() {
        let outer = enter_section();
        drop(enter_section());
        drop(outer);
        assert!(with_reader(Reader::wait_for_others));
    }

    #[test]
    fn a_destructor_after_the_reader_still_works() {
        struct Late;
        impl Drop for Late {
            fn drop(&mut self) {
                let section = enter_section();
                assert!(section._temporary.is_some());
            }
        }
        thread_local!(static LATE: Late = const { Late });
        std::thread::spawn(|| {
            LATE.with(|_| ());
            drop(enter_section());
        })
        .join()
        .unwrap();
    }
}
