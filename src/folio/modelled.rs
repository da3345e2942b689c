//! What the loom models of pools drive: the promise of an object without the object.

use std::sync::Arc;

use super::map::{FolioMap, Shape};
use super::owner::{Placement, PrivatePlacement, Side};
use super::part::Zone;
use super::pool::{FolioPool, PoolStat};
use super::reservation::{Commitment, Reservation, Wanted};
use super::scrub::Running;
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::backing::ArenaBacking;
use crate::error::Error;
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::sync::Mutex;

/// A pool of so many frames.
///
/// # Errors
/// As [`FolioPool::new`].
pub fn pool(nr_frames: u64) -> Result<FolioPool, Error> {
    FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(nr_frames))
}

/// The pool's counters, but for what the kernel takes long to tell.
pub fn counted(pool: &FolioPool) -> PoolStat {
    pool.counted()
}

/// A guest of a pool: what it is promised, and the frames of its one folio, which anybody may touch first.
#[derive(Debug)]
pub struct Guest {
    reservation: Reservation,
    size: FolioSize,
    map: FolioMap,
    /// Stands for the lock of an object's layout, which who touches holds for writing.
    layout: Mutex<()>,
}

impl Guest {
    /// One that is promised `nr_folios`, or none and takes what is free.
    ///
    /// # Errors
    /// As an object's creation.
    pub fn new(
        pool: &FolioPool,
        size: FolioSize,
        nr_folios: Option<u64>,
    ) -> Result<Arc<Self>, Error> {
        let nr_pages = nr_folios.unwrap_or(1) * size.nr_pages();
        let shape = Shape::new(nr_pages, size);
        let reservation = pool.reserve(Wanted {
            blocks: shape.blocks(),
            zones: &[Zone::Normal],
            private: PrivatePlacement::default(),
            placement: Placement::default(),
            commitment: match nr_folios {
                Some(_) => Commitment::Reserved,
                None => Commitment::Overcommitted,
            },
            account: None,
        })?;
        let map = FolioMap::new(shape)?;
        Ok(Arc::new(Self { reservation, size, map, layout: Mutex::new(()) }))
    }

    /// Takes a folio.
    ///
    /// # Errors
    /// As a first touch.
    pub fn take(&self) -> Result<Pfn, Error> {
        self.reservation.take(self.size, Pgoff::new(0), Side::SharedOnly)
    }

    /// Gives a folio back.
    pub fn give_back(&self, pfn: Pfn) {
        self.reservation.give_back(pfn, self.size);
    }

    /// Touches the first page, as `populate` does; `prepare` stands for what is done to a folio before it is
    /// to be seen. Where it looks first, in the lock or before it, is the question.
    ///
    /// # Errors
    /// As a first touch.
    pub fn touch(&self, look: Look, prepare: impl FnOnce(Pfn)) -> Result<Pfn, Error> {
        let before = self.seen();
        let _layout = self.layout.lock();
        let found = match look {
            Look::InTheLock => self.seen(),
            Look::BeforeTheLock => before,
        };
        if let Some(pfn) = found {
            return Ok(pfn);
        }
        let pfn = self.take()?;
        prepare(pfn);
        for slot in self.map.shape().slots(PgoffRange::single(Pgoff::new(0))?) {
            self.map.set(&slot, Some(pfn));
        }
        Ok(pfn)
    }

    /// Takes the folio away again, as a hole punch does.
    ///
    /// # Errors
    /// None that a model can meet.
    pub fn punch(&self) -> Result<(), Error> {
        let _layout = self.layout.lock();
        for slot in self.map.shape().slots(PgoffRange::single(Pgoff::new(0))?) {
            if let Some(pfn) = self.map.get(&slot) {
                self.map.set(&slot, None);
                self.give_back(pfn);
            }
        }
        Ok(())
    }

    /// The frame of the first page, as an access finds it: without a lock.
    pub fn seen(&self) -> Option<Pfn> {
        self.map.frame(Pgoff::new(0))
    }

    /// Writes into the first page of a folio.
    pub fn write(&self, pfn: Pfn, Mark(byte): Mark) {
        let _: Result<(), Error> = self.reservation.pool().arena().write(pfn.pa(), &[byte; 8]);
    }

    /// The first byte of a folio, if the next seven are the same.
    pub fn read(&self, pfn: Pfn) -> Option<Mark> {
        let mut bytes = [0; 8];
        self.reservation.pool().arena().read(pfn.pa(), &mut bytes).ok()?;
        bytes.iter().all(|&byte| byte == bytes[0]).then_some(Mark(bytes[0]))
    }

    /// Whether all of a folio is zero.
    pub fn is_zero(&self, pfn: Pfn) -> bool {
        let frames = PfnRange::new(pfn, self.size.nr_pages());
        frames.and_then(|frames| self.reservation.pool().arena().is_zero(frames)) == Ok(true)
    }
}

/// A byte that somebody leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u8);

/// When somebody looks whether there is a folio already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// When nobody else can put one there.
    InTheLock,
    /// Earlier: a mistake.
    BeforeTheLock,
}

/// What a scrubber's thread runs, for a thread of loom's.
#[expect(missing_debug_implementations, reason = "it is run, and not looked at")]
pub struct Scrubber(Running);

impl Scrubber {
    /// One that cleans all there is.
    pub fn of(pool: &FolioPool) -> Self {
        Self(pool.hire_scrubber(ByteSize::from_bytes(u64::MAX)))
    }

    /// To end it with.
    pub fn dismissal(&self, pool: &FolioPool) -> impl FnOnce() + use<> {
        let (pool, key) = (pool.clone(), self.0.key);
        move || pool.dismiss_scrubber(key)
    }

    /// Cleans until it is dismissed.
    pub fn run(mut self) {
        self.0.clean();
    }
}

/// Takes a dirty block to scrub it and ends before that is done, as a thread that panics does; says
/// whether there was one.
pub fn give_up_a_scrub(pool: &FolioPool) -> bool {
    pool.give_up_a_scrub()
}
