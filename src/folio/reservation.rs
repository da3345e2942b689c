//! Reservations: an object's promise, from which it takes folios without fail.

use std::sync::Weak;

use super::account::Account;
use super::frames::Promise;
use super::ledger::Blocks;
use super::owner::{Demand, Mover, Placement, PrivatePlacement, Side};
use super::part::{Bytes, Got, Zone};
use super::pool::FolioPool;
use super::state::State;
use crate::addr::{Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::sync::is_over;

/// Whether an object is promised what it may ever hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Commitment {
    /// All of it, when it is created: a first touch cannot fail for want of frames.
    #[default]
    Reserved,
    /// Nothing. A first touch fails with [`ErrorKind::Exhausted`] if the pool has nothing left that it has
    /// not promised to others.
    Overcommitted,
}

/// What a reservation is to be.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) blocks: Blocks,
    pub(crate) zones: &'a [Zone],
    pub(crate) private: PrivatePlacement,
    pub(crate) placement: Placement,
    pub(crate) commitment: Commitment,
    pub(crate) account: Option<Account>,
}

/// An object's promise: folios that it may take without fail, and gives back here.
#[derive(Debug)]
pub(crate) struct Reservation {
    pool: FolioPool,
    key: usize,
    /// Not closed before the object is gone.
    _account: Option<Account>,
}

impl FolioPool {
    /// Promises folios to an object.
    pub(crate) fn reserve(&self, wanted: Wanted<'_>) -> Result<Reservation, Error> {
        let promise = match wanted.commitment {
            Commitment::Reserved => Promise::Kept,
            Commitment::Overcommitted => Promise::None,
        };
        let demand = Demand {
            blocks: wanted.blocks,
            zones: wanted.zones,
            private: wanted.private,
            placement: wanted.placement,
            account: wanted.account.as_ref().map(Account::key),
            promise,
        };
        if wanted.account.as_ref().is_some_and(|account| !account.pool().is(self)) {
            return Err(Error::new(Op::CreateObject, ErrorKind::NotFound)
                .because("the account is with another pool"));
        }
        self.dedication().occupy()?;
        // Folios of 1 GiB may be there in pieces: what came back in pieces is scrubbed in pieces.
        let mut steps = wanted.blocks.giant.saturating_mul(MOST_STEPS);
        let outcome = loop {
            let mut state = self.state();
            let outcome = state.reserve(&demand);
            let is_short = matches!(&outcome, Err(error) if error.kind() == ErrorKind::Exhausted);
            let left = steps.checked_sub(1).filter(|_| is_short);
            match left.and_then(|_| state.gather(&demand)) {
                Some(Got::ScrubFirst(pfn)) => {
                    drop(state);
                    self.scrub_in_hands(pfn, FolioSize::Huge2M);
                }
                Some(_) => drop(self.wait_for_scrub(state)),
                None => break outcome,
            }
            steps = left.unwrap_or_default();
        };
        let key = outcome.inspect_err(|_| self.dedication().vacate())?;
        Ok(Reservation { pool: self.clone(), key, _account: wanted.account })
    }
}

/// So many pieces are scrubbed for a folio of 1 GiB, which has half as many, before somebody gives up.
const MOST_STEPS: u64 = 2 * FolioSize::Huge1G.nr_pages() / FolioSize::Huge2M.nr_pages();

fn no_end() -> Error {
    Error::new(Op::Allocate, ErrorKind::Exhausted)
        .because("others take the pieces of every folio of 1 GiB as fast as they are scrubbed")
}

impl Reservation {
    pub(crate) fn pool(&self) -> &FolioPool {
        &self.pool
    }

    /// Refuses what [`spend`](Self::spend) would refuse.
    pub(crate) fn check_exportable(&self) -> Result<(), Error> {
        match self.pool.dedication().is_to_everybody() {
            true => self.spend(),
            false => Ok(()),
        }
    }

    /// The pool's files go out.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless the pool is the object's own.
    pub(crate) fn spend(&self) -> Result<(), Error> {
        self.pool.dedication().spend()
    }

    /// Takes a folio, which is all zeroes, for the pages of the object from `page` on.
    #[inline]
    pub(crate) fn take(&self, size: FolioSize, page: Pgoff, side: Side) -> Result<Pfn, Error> {
        let take = |state: &mut State| state.take(self.key, size, page, side);
        self.until_got(size, take, State::give_back)
    }

    /// Takes a folio of a zone, which is all zeroes, for pages that are to move there from `old`. What they
    /// leave is given to [`moved_out`](Self::moved_out), or if they do not move, the new one is.
    pub(crate) fn take_to(
        &self,
        size: FolioSize,
        page: Pgoff,
        (old, zone): (Pfn, Zone),
    ) -> Result<Pfn, Error> {
        let take = |state: &mut State| state.take_to(self.key, size, page, (old, zone));
        self.until_got(size, take, |state, pfn, bytes| state.moved_out(pfn, old, bytes))
    }

    /// What is taken and cannot be had after all goes `back`, as if it had not been taken.
    #[inline]
    fn until_got(
        &self,
        size: FolioSize,
        mut take: impl FnMut(&mut State) -> Result<Got, Error>,
        back: impl Fn(&mut State, Pfn, Bytes),
    ) -> Result<Pfn, Error> {
        let mut steps = MOST_STEPS;
        loop {
            let mut state = self.pool.state();
            let got = take(&mut state)?;
            match got {
                Got::Clean(pfn) => {
                    let is_short = state.is_short_of_clean();
                    drop(state);
                    if is_short {
                        self.pool.wake_scrubbers();
                    }
                    return Ok(pfn);
                }
                Got::Dirty(pfn) => {
                    drop(state);
                    if self.pool.scrub_frames(pfn, size).is_ok() {
                        return Ok(pfn);
                    }
                    // One block less: this ends.
                    self.lose(pfn, size, &back);
                }
                Got::ScrubFirst(pfn) => {
                    drop(state);
                    self.pool.scrub_in_hands(pfn, FolioSize::Huge2M);
                    // Who wants a piece was served meanwhile, or it is out of use: this ends. Who wants all the
                    // pieces of 1 GiB can be kept from that for ever.
                    if size == FolioSize::Huge1G {
                        steps = steps.checked_sub(1).ok_or_else(no_end)?;
                    }
                }
                Got::Wait => drop(self.pool.wait_for_scrub(state)),
            }
        }
    }

    /// A folio that was taken dirty cannot be scrubbed: it is lost as a free one would be.
    #[cold]
    fn lose(&self, pfn: Pfn, size: FolioSize, back: impl Fn(&mut State, Pfn, Bytes)) {
        let mut state = self.pool.state();
        back(&mut state, pfn, Bytes::Dirty);
        state.lose_dirty(pfn, size);
        drop(state);
        // Of 1 GiB the pieces are there for others, and for scrubbers.
        self.pool.returned().wake_all();
        self.pool.wake_scrubbers();
    }

    /// Gives a folio back, and is promised another. Scrubs it, unless somebody does that in the background.
    pub(crate) fn give_back(&self, pfn: Pfn, size: FolioSize) {
        if self.scrubbed_back(pfn, size, State::give_back).is_err() {
            self.quarantine(pfn);
        }
    }

    /// Gives a folio back whose contents are in another of the object's.
    pub(crate) fn moved_out(&self, gone: Pfn, stays: Pfn, size: FolioSize) {
        let back = |state: &mut State, pfn, bytes| state.moved_out(pfn, stays, bytes);
        if self.scrubbed_back(gone, size, back).is_err() {
            self.quarantine(gone);
        }
    }

    fn scrubbed_back(
        &self,
        pfn: Pfn,
        size: FolioSize,
        back: impl Fn(&mut State, Pfn, Bytes),
    ) -> Result<(), Error> {
        if size != FolioSize::Base {
            let mut state = self.pool.state();
            if !state.scrubbers.is_empty() && state.poisoned_in(pfn, size.nr_pages()).is_empty() {
                back(&mut state, pfn, Bytes::Dirty);
                drop(state);
                self.pool.wake_scrubbers();
                return Ok(());
            }
        }
        self.pool.scrub_frames(pfn, size)?;
        back(&mut self.pool.state(), pfn, Bytes::Zero);
        Ok(())
    }

    /// Says who moves the object's folios when the pool wants room.
    pub(crate) fn set_mover(&self, mover: Weak<dyn Mover>) {
        self.pool.state().set_mover(self.key, mover);
    }

    /// The frames of a folio that failed, in ascending order.
    pub(crate) fn failed_in(&self, pfn: Pfn, nr_pages: u64) -> Vec<Pfn> {
        self.pool.state().poisoned_in(pfn, nr_pages)
    }

    /// In which zone a frame is.
    pub(crate) fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        self.pool.zone_of(pfn)
    }

    /// Gives a folio back to which nobody has written.
    #[inline]
    pub(crate) fn give_back_clean(&self, pfn: Pfn) {
        self.pool.state().give_back(pfn, Bytes::Zero);
    }

    /// Gives a clean folio back that seems to have no memory. One of 2 MiB or more waits for a scrub then, which finds
    /// out, and is not the first to be taken again.
    #[cold]
    pub(crate) fn give_back_in_doubt(&self, pfn: Pfn, size: FolioSize) {
        let mut state = self.pool.state();
        let waits = size != FolioSize::Base && state.poisoned_in(pfn, size.nr_pages()).is_empty();
        state.give_back(pfn, if waits { Bytes::Dirty } else { Bytes::Zero });
        drop(state);
        self.pool.wake_scrubbers();
    }

    /// Counts a folio as lost. It is in no free map and in no object any more.
    pub(crate) fn quarantine(&self, pfn: Pfn) {
        self.pool.state().quarantine(pfn);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !is_over() {
            self.pool.state().leave(self.key);
            self.pool.dedication().vacate();
        }
    }
}

#[cfg(test)]
mod tests;
