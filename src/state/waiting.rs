//! Waiting for others: until pins are gone, or until a conversion has settled.
//!
//! Words are changed without a lock, so a sleeper could miss the change that it sleeps for. It says
//! that it is there first and looks second; whoever changes a word looks for sleepers afterwards. With a
//! [`Barrier`] between the two, one of them sees the other; sleepers pay for it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::barrier::Barrier;
use super::flaw::{Flaw, seeded};
use crate::sync::{Arc, AtomicU64, Condvar, Mutex};

/// Those who sleep.
#[derive(Debug)]
pub struct Waiters {
    nr_waiting: AtomicU64,
    lock: Mutex<()>,
    changed: Condvar,
    barrier: Barrier,
}

/// How long a sleeper sleeps who cannot rely on being woken.
const NAP: Duration = Duration::from_millis(1);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// It is as was hoped.
    Over,
    TimedOut,
    Cancelled,
}

impl Waiters {
    /// Nobody sleeps.
    pub fn new() -> Self {
        Self {
            nr_waiting: AtomicU64::new(0),
            lock: Mutex::new(()),
            changed: Condvar::new(),
            barrier: Barrier::new(),
        }
    }

    /// Lets those who sleep look again. To be called after the change that they may sleep for.
    #[inline]
    pub fn wake(&self) {
        if seeded(Flaw::WakesNobody) {
            return;
        }
        self.barrier.light();
        // Relaxed: pairs with nothing; the fence has ordered it after the change.
        if self.nr_waiting.load(Ordering::Relaxed) > 0 {
            // Whoever has looked already and does not sleep yet holds the lock.
            drop(self.lock.lock());
            self.changed.wake_all();
        }
    }

    /// Sleeps as long as `busy` says so, or as long as the caller is willing.
    pub(super) fn sleep_while(&self, wait: &Wait, mut busy: impl FnMut() -> bool) -> Waited {
        // Relaxed: the fence orders it before the look.
        self.nr_waiting.fetch_add(1, Ordering::Relaxed);
        // Should the kernel refuse the barrier by now, nobody can be relied on to wake us.
        let woken = self.barrier.heavy();
        let mut lock = self.lock.lock();
        let waited = loop {
            if !busy() {
                break Waited::Over;
            }
            match wait.left() {
                Ok(deadline) if woken => lock = self.changed.wait_until(lock, deadline),
                Ok(_) => {
                    let soon = Instant::now() + NAP;
                    lock = self.changed.wait_until(lock, Some(soon));
                }
                Err(ended) => break ended,
            }
        };
        drop(lock);
        // Relaxed: pairs with nothing; who still sees the old number wakes nobody for nothing.
        self.nr_waiting.fetch_sub(1, Ordering::Relaxed);
        waited
    }
}

impl Default for Waiters {
    fn default() -> Self {
        Self::new()
    }
}

/// Ends waits before their time, from another thread. Clones are the same token.
#[derive(Clone, Debug)]
pub struct CancelToken {
    cancelled: Arc<AtomicU64>,
    waiters: Arc<Waiters>,
}

impl CancelToken {
    /// A token for those who sleep here.
    pub fn of(waiters: &Arc<Waiters>) -> Self {
        Self { cancelled: Arc::new(AtomicU64::new(0)), waiters: Arc::clone(waiters) }
    }

    /// Ends every wait that was given this token, now and in future.
    pub fn cancel(&self) {
        // Release: pairs with the Acquire in `is_cancelled`: what the caller did before is seen by
        // whoever learns of it.
        self.cancelled.store(1, Ordering::Release);
        self.waiters.wake();
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        // Acquire: pairs with the Release in `cancel`.
        self.cancelled.load(Ordering::Acquire) != 0
    }
}

/// How long an operation may wait for others: not at all unless said otherwise.
#[derive(Clone, Debug, Default)]
pub struct Wait {
    until: Until,
    cancel: Option<CancelToken>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Until {
    #[default]
    Now,
    Deadline(Instant),
    Forever,
}

impl Wait {
    /// Not at all: what cannot be done at once is refused.
    pub fn never() -> Self {
        Self::default()
    }

    /// Until that moment.
    pub fn until(deadline: Instant) -> Self {
        Self { until: Until::Deadline(deadline), cancel: None }
    }

    /// For that long, counted from now. A time beyond the clock's range is forever.
    pub fn at_most(time: Duration) -> Self {
        let deadline = Instant::now().checked_add(time);
        Self { until: deadline.map_or(Until::Forever, Until::Deadline), cancel: None }
    }

    /// As long as it takes, or until the token is cancelled.
    pub fn until_cancelled(token: &CancelToken) -> Self {
        Self { until: Until::Forever, cancel: Some(token.clone()) }
    }

    /// The same, but no longer than until the token is cancelled.
    #[must_use]
    pub fn or_cancelled(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// Whether there is any waiting at all.
    pub(crate) fn is_never(&self) -> bool {
        matches!(self.until, Until::Now)
    }

    /// How a wait would end that has nothing to wait for.
    pub(super) fn is_over(&self) -> Waited {
        self.left().map_or_else(|ended| ended, |_| Waited::Over)
    }

    /// Until when to sleep, or why no longer.
    fn left(&self) -> Result<Option<Instant>, Waited> {
        if self.cancel.as_ref().is_some_and(CancelToken::is_cancelled) {
            return Err(Waited::Cancelled);
        }
        match self.until {
            Until::Now => Err(Waited::TimedOut),
            Until::Deadline(deadline) if Instant::now() >= deadline => Err(Waited::TimedOut),
            Until::Deadline(deadline) => Ok(Some(deadline)),
            Until::Forever => Ok(None),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_sleeper_is_woken_by_a_change_a_deadline_or_a_token() {
        let waiters = Arc::new(Waiters::new());
        let ready = std::sync::atomic::AtomicBool::new(false);
        let token = CancelToken::of(&waiters);
        assert!(!token.is_cancelled());
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                let wait = Wait::at_most(Duration::MAX);
                // SeqCst: pairs with the store below; a test.
                waiters.sleep_while(&wait, || !ready.load(Ordering::SeqCst))
            });
            let cancelled =
                scope.spawn(|| waiters.sleep_while(&Wait::until_cancelled(&token), || true));
            // SeqCst: pairs with the load above; a test.
            ready.store(true, Ordering::SeqCst);
            waiters.wake();
            assert_eq!(sleeper.join().unwrap(), Waited::Over);
            token.cancel();
            assert_eq!(cancelled.join().unwrap(), Waited::Cancelled);
        });
        let soon = Wait::at_most(Duration::from_millis(5));
        assert_eq!(waiters.sleep_while(&soon, || true), Waited::TimedOut);
        assert_eq!(waiters.sleep_while(&soon.or_cancelled(&token), || true), Waited::Cancelled);
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        assert_eq!(Wait::until(now).is_over(), Waited::TimedOut);
        assert_eq!(Wait::until(now + hour).is_over(), Waited::Over);
        assert!(Wait::never().is_never() && !Wait::until(now + hour).is_never());
        assert_eq!(waiters.sleep_while(&Wait::never(), || true), Waited::TimedOut);
        assert_eq!(waiters.sleep_while(&Wait::never(), || false), Waited::Over);
    }
}
