//! Every model and every canary goes through here: nobody can forget a bound or the check that loom
//! is really there.

use std::any::Any;
use std::cell::Cell;
use std::io::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Two preemptions are known to be too few: wrong variants of this kind of code passed at two and
/// failed at three.
const PREEMPTIONS: usize = 3;

/// Far more than any model needs, so that whoever reaches it spins.
const BRANCHES: usize = 20_000;

/// Explores all executions of a model within the bounds, and prints how many there were.
///
/// # Panics
/// If an execution fails, or if there was only one: then nothing ran concurrently.
pub fn explore<M: Fn() + Send + Sync + 'static>(model: M) {
    const { assert!(gmem::MODELLED, "std's atomics are in use: loom explores nothing") };
    let name = name_of::<M>();
    let begin = Instant::now();
    let nr_executions =
        with_panics(Panics::Reported(name), || run(model)).unwrap_or_else(|failure| {
            report(&format!("{name}: FAILED in execution {}", failure.execution));
            panic::resume_unwind(failure.payload)
        });
    report(&format!("{name}: {nr_executions} executions, {:.2?}", begin.elapsed()));
    assert!(nr_executions > 1, "{name}: nothing ran concurrently");
}

/// Explores a model that carries a seeded race, quietly, and checks that it dies of that race.
///
/// # Panics
/// If no execution fails, or if one fails with a message that does not contain `symptom`.
pub fn must_be_caught<M: Fn() + Send + Sync + 'static>(symptom: &str, faulty: M) {
    const { assert!(gmem::MODELLED, "std's atomics are in use: loom explores nothing") };
    let name = name_of::<M>();
    match with_panics(Panics::Quiet, || run(faulty)) {
        Ok(nr_executions) => panic!("{name}: the seeded race survived {nr_executions} executions"),
        Err(failure) => {
            let message = message_of(&*failure.payload);
            report(&format!("{name}: caught in execution {}", failure.execution));
            assert!(message.contains(symptom), "{name}: died of something else: {message}");
        }
    }
}

struct Failure {
    execution: usize,
    payload: Box<dyn Any + Send>,
}

fn run<M: Fn() + Send + Sync + 'static>(model: M) -> Result<usize, Failure> {
    let begun = std::sync::Arc::new(AtomicUsize::new(0));
    let counter = std::sync::Arc::clone(&begun);
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
        builder().check(move || {
            // Relaxed: a counter, and all of loom's threads are one thread of the system.
            counter.fetch_add(1, Ordering::Relaxed);
            model();
        });
    }));
    // Relaxed: as above.
    let execution = begun.load(Ordering::Relaxed);
    outcome.map(|()| execution).map_err(|payload| Failure { execution, payload })
}

fn builder() -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.max_branches = builder.max_branches.max(BRANCHES);
    // These end an exploration early and call it passed.
    builder.max_duration = None;
    builder.max_permutations = None;
    builder
}

/// The path of the function that the closure was written in.
fn name_of<M>() -> &'static str {
    let path = std::any::type_name::<M>().trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_, inside)| inside)
}

/// Past the capture of the test runner: figures are wanted from a run that passes, too.
fn report(line: &str) {
    // Nothing depends on it, and stderr may be closed.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn message_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("not a message")
}

/// What becomes of the panic messages of this thread. All threads of a model are threads of loom's
/// and run on the one thread of the system that explores it.
#[derive(Clone, Copy)]
enum Panics {
    /// As in any test.
    Normal,
    /// Written at once. A model that fails while it holds a freeze may fail once more while that is
    /// quarantined; the process aborts then, and takes with it what the test runner has captured.
    Reported(&'static str),
    /// Expected.
    Quiet,
}

thread_local! {
    static PANICS: Cell<Panics> = const { Cell::new(Panics::Normal) };
}

fn with_panics<R>(panics: Panics, work: impl FnOnce() -> R) -> R {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let normal = panic::take_hook();
        panic::set_hook(Box::new(move |info| match PANICS.get() {
            Panics::Normal => normal(info),
            Panics::Reported(name) => report(&format!("{name}: {info}")),
            Panics::Quiet => {}
        }));
    });
    PANICS.set(panics);
    let result = work();
    PANICS.set(Panics::Normal);
    result
}
