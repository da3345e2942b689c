//! What all threads of a run share: the first thing that went wrong, and a sign of life.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Fallible;

/// How long nothing may happen before the run is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long threads have to notice that it was.
const GRACE: Duration = Duration::from_secs(5);

/// The state of the run as a whole.
#[derive(Debug)]
pub(crate) struct Run {
    patience: Duration,
    stopped: AtomicBool,
    why: Mutex<Option<String>>,
    beats: AtomicU64,
    over: Mutex<bool>,
    over_changed: Condvar,
}

impl Default for Run {
    fn default() -> Self {
        Self::with_patience(PATIENCE)
    }
}

impl Run {
    fn with_patience(patience: Duration) -> Self {
        Self {
            patience,
            stopped: AtomicBool::new(false),
            why: Mutex::default(),
            beats: AtomicU64::new(0),
            over: Mutex::default(),
            over_changed: Condvar::new(),
        }
    }

    /// Says that something moved.
    pub(crate) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the run. Only the first reason is kept: what follows is a consequence.
    pub(crate) fn fail(&self, why: impl Into<String>) {
        lock(&self.why).get_or_insert(why.into());
        self.stopped.store(true, Ordering::Release);
    }

    /// An error once the run was ended, for every loop that waits for somebody else.
    pub(crate) fn check(&self) -> Fallible<()> {
        match self.stopped.load(Ordering::Acquire) {
            true => Err("stopped, because another part of the machine failed".into()),
            false => Ok(()),
        }
    }

    /// Why the run was ended, if it was.
    pub(crate) fn verdict(&self) -> Fallible<()> {
        match lock(&self.why).clone() {
            Some(why) => Err(why.into()),
            None => Ok(()),
        }
    }

    /// Tells the watchdog that all is over.
    pub(crate) fn finish(&self) {
        *lock(&self.over) = true;
        self.over_changed.notify_all();
    }

    /// The watchdog's thread: a run in which nothing moves is ended, first politely, then not.
    pub(crate) fn watch(&self) {
        let mut seen = (self.beats.load(Ordering::Relaxed), Instant::now());
        let mut stopped_at = None;
        let mut over = lock(&self.over);
        while !*over {
            let tick = self.patience.min(Duration::from_millis(200));
            over = match self.over_changed.wait_timeout(over, tick) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
            let beats = self.beats.load(Ordering::Relaxed);
            if beats != seen.0 {
                seen = (beats, Instant::now());
            } else if seen.1.elapsed() > self.patience {
                self.fail(format!("nothing moved for {} s; giving up", self.patience.as_secs()));
            }
            if self.check().is_err() && !*over {
                let since: &mut Instant = stopped_at.get_or_insert_with(Instant::now);
                if since.elapsed() > GRACE {
                    let why = lock(&self.why).clone().unwrap_or_default();
                    eprintln_quietly(&format!("vmm: {why}; a thread hangs, so this ends here"));
                    std::process::exit(1);
                }
            }
        }
    }
}

/// A line on standard error; if nobody reads it, so be it.
pub(crate) fn eprintln_quietly(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A lock whose holders leave it consistent even when they panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_run_in_which_nothing_moves_is_ended() {
        let run = Run::with_patience(Duration::from_millis(20));
        thread::scope(|s| {
            s.spawn(|| run.watch());
            while run.check().is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
            run.finish();
        });
        let why = run.verdict().unwrap_err().to_string();
        assert!(why.contains("nothing moved"), "{why}");
    }

    #[test]
    fn a_run_in_which_something_moves_goes_on() {
        let run = Run::with_patience(Duration::from_millis(200));
        thread::scope(|s| {
            s.spawn(|| run.watch());
            for _ in 0..40 {
                run.beat();
                thread::sleep(Duration::from_millis(10));
            }
            run.finish();
        });
        assert!(run.verdict().is_ok());
    }

    #[test]
    fn the_first_reason_is_the_one_that_is_kept() {
        let run = Run::default();
        run.fail("first");
        run.fail("second");
        assert!(run.check().is_err());
        assert_eq!(run.verdict().unwrap_err().to_string(), "first");
    }
}
