//! The process's epoch domain: one for all objects, with a reader for each thread that ever touched
//! guest memory.

use std::rc::Rc;
use std::sync::LazyLock;

use super::epoch::{Domain, Reader};
use crate::sync::Arc;

static DOMAIN: LazyLock<Arc<Domain>> = LazyLock::new(|| Arc::new(Domain::new()));

thread_local! {
    static READER: Rc<Reader> = Rc::new(Domain::register(&DOMAIN));
}

/// Runs `access` inside a section of this thread. It must be short and must not convert, wait or
/// call out.
pub(crate) fn in_section<R>(access: impl FnOnce() -> R) -> R {
    // A destructor that runs after the thread's reader is gone gets a reader for once.
    let reader = READER.try_with(Rc::clone).unwrap_or_else(|_| Rc::new(Domain::register(&DOMAIN)));
    let _section = reader.enter();
    access()
}

/// Returns when every section that began before the call has ended; see [`Domain::wait`].
#[must_use]
pub(crate) fn wait_for_sections() -> bool {
    DOMAIN.wait()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sections_return_what_they_computed_and_nest() {
        assert_eq!(in_section(|| in_section(|| 7)), 7);
        assert!(wait_for_sections());
    }

    #[test]
    fn a_destructor_after_the_reader_still_works() {
        struct Late;
        impl Drop for Late {
            fn drop(&mut self) {
                assert_eq!(in_section(|| 1), 1);
            }
        }
        thread_local!(static LATE: Late = const { Late });
        std::thread::spawn(|| {
            LATE.with(|_| ());
            in_section(|| ());
        })
        .join()
        .unwrap();
    }
}
