//! Every model and every canary goes through here: nobody can forget a bound or the check that loom
//! is really there.

use std::any::Any;
use std::cell::Cell;
use std::io::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use gmem::modelled::{Flaw, seed};

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
    explore_as(name_of::<M>(), "", Bound::Whole, None, model);
}

/// The same for each of these numbers of levels. All but the first do with one preemption less: the steps on the
/// one level more are those on the others, and there are ten times as many executions.
///
/// # Panics
/// As [`explore`].
pub fn explore_on<M: Fn(u32) + Copy + Send + Sync + 'static>(levels: &[u32], model: M) {
    explore_each(levels, None, model);
}

/// Explores a model in which neither side of a grace period runs a fence, so that the words alone have
/// to order what happens: with membarrier readers run none, while loom's readers do, and their fence
/// would hide an ordering that is too weak.
///
/// # Panics
/// As [`explore`].
pub fn explore_words<M: Fn() + Send + Sync + 'static>(model: M) {
    explore_as(name_of::<M>(), "", Bound::Whole, Some(Flaw::SectionsWithoutFences), model);
}

/// The same for each of these numbers of levels, as [`explore_on`] has it.
///
/// # Panics
/// As [`explore`].
pub fn explore_words_on<M: Fn(u32) + Copy + Send + Sync + 'static>(levels: &[u32], model: M) {
    explore_each(levels, Some(Flaw::SectionsWithoutFences), model);
}

fn explore_each<M: Fn(u32) + Copy + Send + Sync + 'static>(
    levels: &[u32],
    flaw: Option<Flaw>,
    model: M,
) {
    for (index, &levels) in levels.iter().enumerate() {
        let bound = if index == 0 { Bound::Whole } else { Bound::OneLess };
        explore_as(name_of::<M>(), &on(levels), bound, flaw, move || model(levels));
    }
}

fn on(levels: u32) -> String {
    format!(" on {levels} levels")
}

fn explore_as<M: Fn() + Send + Sync + 'static>(
    name: &'static str,
    how: &str,
    bound: Bound,
    flaw: Option<Flaw>,
    model: M,
) {
    const { assert!(gmem::MODELLED, "std's atomics are in use: loom explores nothing") };
    let begin = Instant::now();
    let nr_executions = with_panics(Panics::Reported(name), || run(flaw, bound, model))
        .unwrap_or_else(|failure| {
            report(&format!("{name}{how}: FAILED in execution {}", failure.execution));
            panic::resume_unwind(failure.payload)
        });
    report(&format!("{name}{how}: {nr_executions} executions, {:.2?}", begin.elapsed()));
    assert!(nr_executions > 1, "{name}: nothing ran concurrently");
}

/// Explores a model that carries a seeded race, quietly, and checks that it dies of that race.
///
/// # Panics
/// If no execution fails, or if one fails with a message that does not contain `symptom`, or one of
/// several with a bar between them.
pub fn must_be_caught<M: Fn() + Send + Sync + 'static>(symptom: &str, faulty: M) {
    caught_as(name_of::<M>(), "", None, symptom, faulty);
}

/// Explores a model of code with a seeded mistake, quietly, for each of these numbers of levels, and
/// checks that it dies of that mistake.
///
/// # Panics
/// As [`must_be_caught`].
pub fn must_notice<M: Fn(u32) + Copy + Send + Sync + 'static>(
    flaw: Flaw,
    symptom: &str,
    levels: &[u32],
    model: M,
) {
    for &levels in levels {
        let model = move || model(levels);
        caught_as(name_of::<M>(), &on(levels), Some(flaw), symptom, model);
    }
}

fn caught_as<M: Fn() + Send + Sync + 'static>(
    name: &'static str,
    how: &str,
    flaw: Option<Flaw>,
    symptom: &str,
    faulty: M,
) {
    const { assert!(gmem::MODELLED, "std's atomics are in use: loom explores nothing") };
    // Some mistakes of the code are out of reach of two preemptions.
    let bound = flaw.map_or(Bound::Whole, |_| Bound::Canary);
    match with_panics(Panics::Quiet, || run(flaw, bound, faulty)) {
        Ok(nr_executions) => {
            panic!("{name}{how}: the seeded mistake survived {nr_executions} executions")
        }
        Err(failure) => {
            let message = message_of(&*failure.payload);
            report(&format!("{name}{how}: caught in execution {}", failure.execution));
            let is_it = symptom.split('|').any(|symptom| message.contains(symptom));
            assert!(is_it, "{name}{how}: died of something else: {message}");
        }
    }
}

struct Failure {
    execution: usize,
    payload: Box<dyn Any + Send>,
}

fn run<M: Fn() + Send + Sync + 'static>(
    flaw: Option<Flaw>,
    bound: Bound,
    model: M,
) -> Result<usize, Failure> {
    let begun = std::sync::Arc::new(AtomicUsize::new(0));
    let counter = std::sync::Arc::clone(&begun);
    seed(flaw);
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
        builder(bound).check(move || {
            // Relaxed: a counter, and all of loom's threads are one thread of the system.
            counter.fetch_add(1, Ordering::Relaxed);
            model();
        });
    }));
    // Also after a panic: the next model on this thread must not have it.
    seed(None);
    // Relaxed: as above.
    let execution = begun.load(Ordering::Relaxed);
    outcome.map(|()| execution).map_err(|payload| Failure { execution, payload })
}

/// How many preemptions an exploration tries, by what `LOOM_MAX_PREEMPTIONS` says.
#[derive(Clone, Copy)]
enum Bound {
    Whole,
    /// Two at least.
    OneLess,
    /// Three at least.
    Canary,
}

fn builder(bound: Bound) -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    let whole = builder.preemption_bound.unwrap_or(PREEMPTIONS);
    builder.preemption_bound = Some(match bound {
        Bound::Whole => whole,
        Bound::OneLess => whole.saturating_sub(1).max(whole.min(PREEMPTIONS - 1)),
        Bound::Canary => whole.max(PREEMPTIONS),
    });
    builder.max_branches = builder.max_branches.max(BRANCHES);
    // These end an exploration early and call it passed.
    builder.max_duration = None;
    builder.max_permutations = None;
    builder
}

/// The test, or where the runner does not name its threads, the function that the model was written in.
fn name_of<M>() -> &'static str {
    let path = std::any::type_name::<M>().trim_end_matches("::{{closure}}");
    let function = path.split_once("::").map_or(path, |(_, inside)| inside);
    match std::thread::current().name() {
        // The hook that prints panics keeps it.
        Some(test) if test != "main" => String::leak(test.into()),
        _ => function,
    }
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
