//! Threads whose failure ends the run.

use std::thread::{Builder, Scope, ScopedJoinHandle};

use crate::Fallible;
use crate::run::Run;

/// A thread of the run, which comes to a `T`.
pub(crate) type Thread<'scope, T> = ScopedJoinHandle<'scope, Fallible<T>>;

/// Starts a thread whose failure, or panic, ends the run.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: &'scope Run,
    name: &'static str,
    body: impl FnOnce() -> Fallible<T> + Send + 'scope,
) -> Fallible<Thread<'scope, T>> {
    let thread = move || {
        let _alarm = Alarm { run, name };
        let outcome = body();
        if let Err(error) = &outcome {
            run.fail(format!("{name}: {error}"));
        }
        outcome
    };
    Builder::new().name(name.into()).spawn_scoped(scope, thread).map_err(|error| {
        run.fail(format!("cannot start a thread for the {name}: {error}"));
        error.into()
    })
}

/// Waits for what a thread comes to.
pub(crate) fn join<T>(thread: Thread<'_, T>) -> Fallible<T> {
    thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))
}

/// Ends the run when its thread panics.
struct Alarm<'a> {
    run: &'a Run,
    name: &'static str,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.run.fail(format!("{} panicked", self.name));
        }
    }
}
