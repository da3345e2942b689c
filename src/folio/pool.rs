//! A pool: the physical memory that several guests draw from.
//!
//! Counters, in frames, at every moment: `capacity = free + used + quarantined`, and `reserved` of
//! the free ones are promised to objects. A promise is kept in the right shape: as many whole huge
//! blocks stay free as huge folios are promised.
//!
//! A frame is scrubbed on its way back, so every free frame is zero.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buddy::Buddy;
use crate::addr::{ByteSize, Pfn};
use crate::backing::{Arena, ArenaBacking, HostOffer, PartSpec};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::range::PfnRange;

/// The counters of a pool at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStat {
    /// All of it.
    pub capacity: ByteSize,
    /// Not holding anything, promised or not.
    pub free: ByteSize,
    /// How much of the free memory is promised to objects.
    pub reserved: ByteSize,
    /// Holding folios of objects.
    pub used: ByteSize,
    /// Kept out of use, because its state is unknown since a failure.
    pub quarantined: ByteSize,
    /// How much the kernel backs by huge pages, by its own account.
    pub huge: ByteSize,
}

/// A free frame that is not all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("free frame {0} is not scrubbed")]
pub struct Unscrubbed(pub Pfn);

/// A physical memory that objects draw their folios from. Clones are handles to the same pool, which
/// lives as long as a handle or an object does.
#[derive(Clone, Debug)]
pub struct FolioPool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    backing: ArenaBacking,
    arena: Arc<Arena>,
    frames: Mutex<Frames>,
    /// Whether a hypervisor keeps account of the frames.
    claimed: Mutex<bool>,
}

/// A hypervisor's claim to keep account of a pool's frames; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim(FolioPool);

impl Drop for Claim {
    fn drop(&mut self) {
        *self.0.claimed() = false;
    }
}

#[derive(Debug)]
struct Frames {
    buddy: Buddy,
    reserved_huge: u64,
    reserved_base: u64,
    quarantined: u64,
}

impl Frames {
    /// Huge blocks and frames that could be promised.
    fn unreserved(&self) -> (u64, u64) {
        let huge = self.buddy.nr_free_huge().saturating_sub(self.reserved_huge);
        let small =
            (huge * HUGE_PAGES + self.buddy.nr_free_small()).saturating_sub(self.reserved_base);
        (huge.min(small / HUGE_PAGES), small)
    }
}

impl FolioPool {
    /// Creates a pool of `capacity` bytes and commits them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`]; [`ErrorKind::Unaligned`] if hugetlb is asked for and the capacity
    /// is no multiple of its pages; [`ErrorKind::MissingCapability`] if the host does not do such pages;
    /// [`ErrorKind::Exhausted`] if it, the control group or a limit of the process does not have that
    /// much; [`ErrorKind::Os`] for any other system call that fails.
    pub fn new(backing: ArenaBacking, capacity: ByteSize) -> Result<Self, Error> {
        let (arena, _) = Arena::obtain(&[PartSpec::new([backing], capacity)])?;
        let nr_pages = arena.nr_pages();
        let buddy = Buddy::new(nr_pages)?;
        let frames = Frames { buddy, reserved_huge: 0, reserved_base: 0, quarantined: 0 };
        Ok(Self(Arc::new(Inner {
            backing,
            arena,
            frames: Mutex::new(frames),
            claimed: Mutex::new(false),
        })))
    }

    /// Creates a pool on the first of several backings that this host can provide; also says why
    /// the ones before it were passed over.
    ///
    /// # Errors
    /// What [`FolioPool::new`] said of the last one; [`ErrorKind::Unsupported`] for an empty list.
    pub fn with_preference(
        preference: &[ArenaBacking],
        capacity: ByteSize,
    ) -> Result<(Self, Vec<(ArenaBacking, Error)>), Error> {
        let mut passed_over = Vec::new();
        for &backing in preference {
            match Self::new(backing, capacity) {
                Ok(pool) => return Ok((pool, passed_over)),
                Err(error) => passed_over.push((backing, error)),
            }
        }
        Err(passed_over.pop().map_or_else(
            || Error::new(Op::CreatePool, ErrorKind::Unsupported).because("no backing was named"),
            |(_, error)| error,
        ))
    }

    /// What this host offers to pools now.
    pub fn probe() -> HostOffer {
        crate::backing::probe()
    }

    /// What the pool is made of.
    pub fn backing(&self) -> ArenaBacking {
        self.0.backing
    }

    /// The counters.
    pub fn stat(&self) -> PoolStat {
        let capacity = self.0.arena.capacity().whole_pages();
        let frames = self.frames();
        let free = frames.buddy.nr_free();
        let pages = ByteSize::from_pages;
        PoolStat {
            capacity: pages(capacity),
            free: pages(free),
            reserved: pages(frames.reserved_huge * HUGE_PAGES + frames.reserved_base),
            used: pages(capacity - free - frames.quarantined),
            quarantined: pages(frames.quarantined),
            huge: match self.0.backing {
                ArenaBacking::Heap | ArenaBacking::Memfd => pages(0),
                _ => self.0.arena.huge_bytes(),
            },
        }
    }

    /// Reads every free frame and makes sure that it is zero; says how much that was. Allocation
    /// waits meanwhile.
    ///
    /// # Errors
    /// The first frame that is not.
    pub fn verify_scrubbed(&self) -> Result<ByteSize, Unscrubbed> {
        let frames = self.frames();
        for block in frames.buddy.free_blocks() {
            for pfn in block.iter() {
                let clean = PfnRange::single(pfn).and_then(|frame| self.0.arena.is_zero(frame));
                if !matches!(clean, Ok(true)) {
                    return Err(Unscrubbed(pfn));
                }
            }
        }
        Ok(ByteSize::from_pages(frames.buddy.nr_free()))
    }

    /// Whether a frame is in the free map.
    pub(crate) fn is_free(&self, pfn: Pfn) -> bool {
        self.frames().buddy.is_free(pfn)
    }

    /// Makes the caller the one hypervisor of this pool; `None` if there is one already.
    pub(crate) fn claim(&self) -> Option<Claim> {
        let claimed_before = std::mem::replace(&mut *self.claimed(), true);
        (!claimed_before).then(|| Claim(self.clone()))
    }

    fn claimed(&self) -> MutexGuard<'_, bool> {
        self.0.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.0.arena
    }

    /// The unit in which host views of this pool's memory can change sides.
    pub(crate) fn view_granule(&self) -> FolioSize {
        self.0.arena.view_granule()
    }

    /// Promises folios to an object.
    pub(crate) fn reserve(&self, huge: u64, base: u64) -> Result<Reservation, Error> {
        let mut frames = self.frames();
        let (free_huge, free_pages) = frames.unreserved();
        let pages = huge.checked_mul(HUGE_PAGES).and_then(|pages| pages.checked_add(base));
        if huge > free_huge || pages.is_none_or(|pages| pages > free_pages) {
            return Err(Error::new(Op::CreateObject, ErrorKind::Exhausted).because(format!(
                "{huge} folios of 2 MiB and {base} of 4 KiB wanted; the pool can still promise \
                 {free_huge} of 2 MiB, {free_pages} of 4 KiB in all",
            )));
        }
        frames.reserved_huge += huge;
        frames.reserved_base += base;
        Ok(Reservation { pool: self.clone(), left: Mutex::new((huge, base)) })
    }

    fn frames(&self) -> MutexGuard<'_, Frames> {
        self.0.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An object's promise: folios that it may take without fail, and gives back here.
#[derive(Debug)]
pub(crate) struct Reservation {
    pool: FolioPool,
    /// How many huge and base folios have not been taken.
    left: Mutex<(u64, u64)>,
}

impl Reservation {
    pub(crate) fn pool(&self) -> &FolioPool {
        &self.pool
    }

    /// Takes a folio, which is all zeroes.
    pub(crate) fn take(&self, size: FolioSize) -> Result<Pfn, Error> {
        let exhausted = || {
            Error::new(Op::Allocate, ErrorKind::Exhausted)
                .because("more folios were asked for than the object has places for")
        };
        let mut left = self.left();
        let mut frames = self.pool.frames();
        let (mine, reserved) = match size {
            FolioSize::Huge1G => return Err(exhausted()),
            FolioSize::Huge2M => (&mut left.0, &mut frames.reserved_huge),
            FolioSize::Base => (&mut left.1, &mut frames.reserved_base),
        };
        *mine = mine.checked_sub(1).ok_or_else(exhausted)?;
        *reserved -= 1;
        frames.buddy.allocate(size.order()).ok_or_else(exhausted)
    }

    /// Scrubs a folio and gives it back; the promise is as before.
    pub(crate) fn give_back(&self, pfn: Pfn, size: FolioSize) {
        let scrubbed =
            PfnRange::new(pfn, size.nr_pages()).and_then(|frames| self.pool.0.arena.zero(frames));
        if scrubbed.is_err() {
            self.quarantine(size);
            return;
        }
        let mut left = self.left();
        let mut frames = self.pool.frames();
        frames.buddy.free(pfn, size.order());
        match size {
            FolioSize::Huge1G | FolioSize::Huge2M => {
                left.0 += 1;
                frames.reserved_huge += 1;
            }
            FolioSize::Base => {
                left.1 += 1;
                frames.reserved_base += 1;
            }
        }
    }

    /// Counts a folio as lost. It is in no free map and in no object any more.
    pub(crate) fn quarantine(&self, size: FolioSize) {
        self.pool.frames().quarantined += size.nr_pages();
    }

    fn left(&self) -> MutexGuard<'_, (u64, u64)> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (huge, base) = *self.left();
        let mut frames = self.pool.frames();
        frames.reserved_huge -= huge;
        frames.reserved_base -= base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(nr_pages: u64) -> FolioPool {
        FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(nr_pages)).unwrap()
    }

    #[test]
    fn a_promise_is_kept_whatever_others_take() {
        let pool = pool(3 * 512);
        let huge = pool.reserve(2, 0).unwrap();
        let base = pool.reserve(0, 512).unwrap();
        assert_eq!(pool.reserve(0, 1).unwrap_err().kind(), ErrorKind::Exhausted);
        for _ in 0..512 {
            base.take(FolioSize::Base).unwrap();
        }
        assert_eq!(base.take(FolioSize::Base).unwrap_err().kind(), ErrorKind::Exhausted);
        huge.take(FolioSize::Huge2M).unwrap();
        huge.take(FolioSize::Huge2M).unwrap();
        assert_eq!(pool.stat().free, ByteSize::from_bytes(0));
    }

    #[test]
    fn what_comes_back_is_scrubbed_and_promised_again() {
        let pool = pool(512);
        let reservation = pool.reserve(1, 0).unwrap();
        let pfn = reservation.take(FolioSize::Huge2M).unwrap();
        pool.arena().write(pfn.pa(), b"secret").unwrap();
        reservation.give_back(pfn, FolioSize::Huge2M);
        assert_eq!(pool.stat().reserved, FolioSize::Huge2M.bytes());
        assert_eq!(pool.verify_scrubbed(), Ok(FolioSize::Huge2M.bytes()));
        drop(reservation);
        assert_eq!(pool.stat().reserved, ByteSize::from_bytes(0));
    }

    #[test]
    fn a_dirty_free_frame_is_found() {
        let pool = pool(4);
        pool.arena().write(Pfn::new(2).pa(), &[1]).unwrap();
        assert_eq!(pool.verify_scrubbed(), Err(Unscrubbed(Pfn::new(2))));
    }

    #[test]
    fn quarantined_frames_are_neither_free_nor_used() {
        let pool = pool(512);
        let reservation = pool.reserve(1, 0).unwrap();
        reservation.take(FolioSize::Huge2M).unwrap();
        reservation.quarantine(FolioSize::Huge2M);
        let stat = pool.stat();
        assert_eq!(stat.quarantined, stat.capacity);
        assert_eq!((stat.free, stat.used), Default::default());
    }

    #[test]
    fn bad_sizes_and_backings_have_errors() {
        let kind = |backing, bytes| {
            FolioPool::new(backing, ByteSize::from_bytes(bytes)).map(|_| ()).map_err(|e| e.kind())
        };
        assert_eq!(kind(ArenaBacking::Heap, 0), Err(ErrorKind::InvalidSize));
        assert_eq!(kind(ArenaBacking::Heap, 4097), Err(ErrorKind::InvalidSize));
        assert_eq!(kind(ArenaBacking::Heap, u64::MAX), Err(ErrorKind::InvalidSize));
        assert_eq!(kind(ArenaBacking::MemfdHugetlb2M, 4096), Err(ErrorKind::Unaligned));
        let error = FolioPool::with_preference(&[], ByteSize::from_pages(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
