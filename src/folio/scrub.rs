//! Scrubbing: nothing that an owner wrote is there for the next one.
//!
//! What comes back in large folios is dirty as long as a [`Scrubber`] is at work, which cleans it in the
//! background. Whoever takes a folio and finds no clean one scrubs one himself. A block that is being
//! scrubbed is in one pair of hands: in no map, but still counted as free, so that promises hold.

use std::thread::{Builder, JoinHandle};

use super::pool::FolioPool;
use super::state::{Order, State, Watch};
use crate::addr::{ByteSize, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails, heir, panics};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::range::PfnRange;
use crate::state::{Flaw, seeded};
use crate::sync::{MutexGuard, is_over};

/// A dirty block that nobody else reaches; dirty again if nobody has come to a result before this is dropped.
struct InHands<'a> {
    pool: &'a FolioPool,
    pfn: Pfn,
    size: FolioSize,
    outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Scrubbed,
    /// Memory of it is gone, for all that is known.
    Failed,
    Dirty,
}

impl Drop for InHands<'_> {
    fn drop(&mut self) {
        if is_over() {
            return;
        }
        if seeded(Flaw::WakesBeforeItIsBack) {
            self.pool.returned().wake_all();
        }
        let mut state = self.pool.state();
        match self.outcome {
            Outcome::Dirty if seeded(Flaw::KeepsWhatWasNotScrubbed) => {}
            Outcome::Scrubbed => state.scrubbed(self.pfn, self.size),
            Outcome::Failed => state.cannot_be_scrubbed(self.pfn, self.size),
            Outcome::Dirty => state.not_scrubbed(self.pfn, self.size),
        }
        drop(state);
        if !seeded(Flaw::WakesBeforeItIsBack) {
            self.pool.returned().wake_all();
        }
        if self.outcome != Outcome::Scrubbed {
            // It may be there again, as it was or in pieces, and who had it in hands be no scrubber, or one that is
            // about to end.
            self.pool.wake_scrubbers();
        }
    }
}

impl FolioPool {
    /// Fills a folio that nobody reaches with zeroes, but for frames that failed.
    pub(super) fn scrub_frames(&self, pfn: Pfn, size: FolioSize) -> Result<(), Error> {
        if fails(FailPoint::Scrub) {
            return Err(Error::new(Op::Scrub, ErrorKind::Os).because("made to fail"));
        }
        self.arena().require(Op::Scrub, PfnRange::new(pfn, size.nr_pages())?)?;
        let poisoned = self.state().poisoned_in(pfn, size.nr_pages());
        let end = pfn.get() + size.nr_pages();
        let mut from = pfn.get();
        for bad in poisoned.iter().map(|bad| bad.get()).chain([end]) {
            if bad > from {
                self.arena().scrub(PfnRange::new(Pfn::new(from), bad - from)?)?;
            }
            from = bad + 1;
        }
        Ok(())
    }

    /// For models: what is left of one who dies with a block in hands.
    #[cfg(all(loom, feature = "loom"))]
    pub(super) fn give_up_a_scrub(&self) -> bool {
        let next = self.state().next_dirty();
        let outcome = Outcome::Dirty;
        next.map(|(pfn, size)| drop(InHands { pool: self, pfn, size, outcome })).is_some()
    }

    /// Scrubs a block that the caller has taken out of the state, and gives it back there, clean or quarantined;
    /// one of 1 GiB that cannot be scrubbed in pieces that wait. Says how many bytes are clean now.
    pub(super) fn scrub_in_hands(&self, pfn: Pfn, size: FolioSize) -> u64 {
        let mut block = InHands { pool: self, pfn, size, outcome: Outcome::Dirty };
        panics(FailPoint::ScrubPanic);
        match self.scrub_frames(pfn, size) {
            Ok(()) => block.outcome = Outcome::Scrubbed,
            Err(_) => block.outcome = Outcome::Failed,
        }
        if block.outcome == Outcome::Scrubbed { size.bytes().get() } else { 0 }
    }

    /// Scrubs all that waits for it; says how many bytes are clean now. There is no need to, but that the next
    /// one who takes a folio finds it clean. What cannot be scrubbed is [quarantined](super::PoolStat::quarantined).
    pub fn scrub(&self) -> ByteSize {
        ByteSize::from_bytes(self.scrub_all())
    }

    pub(super) fn scrub_all(&self) -> u64 {
        let next = || self.state().next_dirty();
        std::iter::from_fn(next).map(|(pfn, size)| self.scrub_in_hands(pfn, size)).sum()
    }

    /// Sleeps until somebody has given back what he scrubbed.
    pub(super) fn wait_for_scrub<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
    ) -> MutexGuard<'a, State> {
        self.returned().wait_until(state, None)
    }

    pub(super) fn wake_scrubbers(&self) {
        self.work().wake_all();
    }

    /// Starts a thread that cleans folios of 2 MiB and more when they come back, as long as less than
    /// `keep_clean` bytes of such folios are clean; the others wait until they are needed. What it cannot scrub,
    /// since the memory is gone, it [quarantines](super::PoolStat::quarantined), and goes on.
    ///
    /// An object that touches again what it has punched gets the same frames, so that it stays one run, and scrubs
    /// them itself if they wait still. If that is to be rare, let more be kept clean than is free.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] if the host gives no thread.
    pub fn start_scrubber(&self, keep_clean: ByteSize) -> Result<Scrubber, Error> {
        let mut running = self.hire_scrubber(keep_clean);
        let key = running.key;
        let thread = Builder::new()
            .name(String::from("gmem-scrub"))
            .spawn(heir(move || running.clean()))
            .map_err(|error| {
                Error::new(Op::Scrub, ErrorKind::Os).because(format!("no thread: {error}"))
            })?;
        Ok(Scrubber { pool: self.clone(), key, thread: Some(thread) })
    }

    /// What such a thread is to run.
    pub(super) fn hire_scrubber(&self, keep_clean: ByteSize) -> Running {
        let mut state = self.state();
        state.nr_scrubbers += 1;
        let key = state.nr_scrubbers;
        let keep_clean = keep_clean.whole_pages() / HUGE_PAGES;
        state.scrubbers.insert(key, Watch { order: Order::Work, keep_clean });
        Running { pool: self.clone(), key }
    }

    /// Tells a scrubber to end.
    pub(super) fn dismiss_scrubber(&self, key: u64) {
        if let Some(watch) = self.state().scrubbers.get_mut(&key) {
            watch.order = Order::End;
        }
        self.wake_scrubbers();
    }
}

/// A thread that scrubs; it ends when this is dropped. What it leaves dirty is scrubbed by whoever
/// takes it.
#[derive(Debug)]
#[must_use = "the thread ends when this is dropped"]
pub struct Scrubber {
    pool: FolioPool,
    key: u64,
    thread: Option<JoinHandle<()>>,
}

impl Scrubber {
    /// Whether the thread is at work still; it is unless it died in a panic.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        self.pool.dismiss_scrubber(self.key);
        if let Some(thread) = self.thread.take() {
            // Should it have died, it has put back what it held.
            let _: std::thread::Result<()> = thread.join();
        }
    }
}

/// The thread's own: counted among the scrubbers for as long as it lives.
pub(super) struct Running {
    pool: FolioPool,
    pub(super) key: u64,
}

impl Running {
    pub(super) fn clean(&mut self) {
        while let Some((pfn, size)) = self.next() {
            self.pool.scrub_in_hands(pfn, size);
        }
    }

    fn next(&self) -> Option<(Pfn, FolioSize)> {
        let mut state = self.pool.state();
        loop {
            let watch = *state.scrubbers.get(&self.key)?;
            if watch.order == Order::End {
                return None;
            }
            if state.nr_clean_huge() < watch.keep_clean {
                if let Some(next) = state.next_dirty() {
                    return Some(next);
                }
            }
            if seeded(Flaw::SleepsOnOldNews) {
                drop(state);
                state = self.pool.state();
            }
            state = self.pool.work().wait_until(state, None);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !is_over() {
            self.pool.state().scrubbers.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests;
