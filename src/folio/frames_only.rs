//! A pool without bytes: its arithmetic behind its lock, and nothing to scrub. For benches, on hosts of any size.

use super::frames::Promise;
use super::map::Shape;
use super::owner::{Demand, Placement, PrivatePlacement, Side};
use super::part::{Bytes, Got, PartState, Zone};
use super::reservation::Commitment;
use super::state::State;
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::range::PfnRange;
use crate::sync::Mutex;

/// What a [`FolioPool`](super::FolioPool) has behind its lock.
#[derive(Debug)]
pub struct FramesOnly(Mutex<State>);

/// Somebody who has folios, as an object does.
#[derive(Clone, Copy, Debug)]
pub struct Guest(usize);

impl FramesOnly {
    /// One part of zone [`Zone::Normal`], all of it free and clean.
    ///
    /// # Errors
    /// As [`PoolBuilder::create`](super::PoolBuilder::create).
    pub fn new(capacity: ByteSize) -> Result<Self, Error> {
        let mut state = State::default();
        let frames = PfnRange::new(Pfn::new(0), capacity.whole_pages())?;
        state.parts.push(PartState::new(frames, Zone::Normal)?);
        Ok(Self(Mutex::new(state)))
    }

    /// What the creation of an object asks of its pool.
    ///
    /// # Errors
    /// As [`GuestMemfdBuilder::create`](crate::GuestMemfdBuilder::create).
    pub fn reserve(
        &self,
        size: ByteSize,
        folio_size: FolioSize,
        commitment: Commitment,
    ) -> Result<Guest, Error> {
        let demand = Demand {
            blocks: Shape::new(size.whole_pages(), folio_size).blocks(),
            zones: &[Zone::Normal],
            private: PrivatePlacement::default(),
            placement: Placement::default(),
            account: None,
            promise: match commitment {
                Commitment::Reserved => Promise::Kept,
                Commitment::Overcommitted => Promise::None,
            },
        };
        self.0.lock().reserve(&demand).map(Guest)
    }

    /// What a first touch asks of its pool.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] if there is none.
    #[inline]
    pub fn take(&self, guest: Guest, size: FolioSize, page: Pgoff) -> Result<Pfn, Error> {
        match self.0.lock().take(guest.0, size, page, Side::Any)? {
            Got::Clean(pfn) => Ok(pfn),
            // Nothing is ever given back dirty.
            Got::Dirty(_) | Got::ScrubFirst(_) | Got::Wait => {
                Err(Error::new(Op::Allocate, ErrorKind::Busy))
            }
        }
    }

    /// Takes a folio back that is all zeroes.
    #[inline]
    pub fn give_back(&self, pfn: Pfn) {
        self.0.lock().give_back(pfn, Bytes::Zero);
    }

    /// Ends a guest that has given everything back.
    pub fn leave(&self, guest: Guest) {
        self.0.lock().leave(guest.0);
    }

    /// As [`PoolStat::metadata`](super::PoolStat::metadata).
    pub fn metadata(&self) -> ByteSize {
        let state = self.0.lock();
        ByteSize::from_bytes(state.parts.iter().map(PartState::metadata_bytes).sum())
    }

    /// What is free, and the largest free block.
    pub fn free(&self) -> (ByteSize, ByteSize) {
        let state = self.0.lock();
        let free = state.parts.iter().map(|part| part.frames.free().pages()).sum();
        let orders = state.parts.iter().filter_map(|part| part.frames.buddy().largest_order());
        let largest = orders.max().map_or(0, |order| 1 << order);
        (ByteSize::from_pages(free), ByteSize::from_pages(largest))
    }
}
