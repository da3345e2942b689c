//! A pool: the physical memory that several guests draw from.
//!
//! One lock guards all of its state, and no bytes are touched under it. Who scrubs takes what he scrubs
//! out of the state first, and nobody else reaches it meanwhile.

use std::sync::Arc;

use super::dedication::Dedication;
use super::part::{PartState, Zone};
use super::state::{Poisoned, State};
use crate::addr::{ByteSize, Pfn};
use crate::backing::{Arena, ArenaBacking, HostOffer, Part, PartReport, PartSpec};
use crate::error::Error;
#[cfg(any(doc, test))]
use crate::error::ErrorKind;
use crate::geometry::FolioSize;
use crate::range::PfnRange;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// The counters of a pool at one moment. Whenever no call is under way,
/// `free + reserved + used + quarantined + poisoned = capacity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStat {
    /// All of it.
    pub capacity: ByteSize,
    /// Holding nothing, and promised to nobody.
    pub free: ByteSize,
    /// Holding nothing, and promised to objects.
    pub reserved: ByteSize,
    /// How much of what was promised is not there any more, because memory failed: so much fails when it is
    /// taken, whoever comes last. Zero again as soon as as much is given back, or other promises end.
    pub over_promised: ByteSize,
    /// Holding folios of objects.
    pub used: ByteSize,
    /// Kept out of use, because its state is unknown since a failure.
    pub quarantined: ByteSize,
    /// Kept out of use, because the memory failed.
    pub poisoned: ByteSize,
    /// How much of what holds nothing waits for a scrub.
    pub dirty: ByteSize,
    /// The largest free block, promised or not.
    pub largest_free: ByteSize,
    /// How much the kernel backs by huge pages, by its own account.
    pub huge: ByteSize,
    /// What the pool takes of the host's memory on top of its capacity.
    pub metadata: ByteSize,
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
    arena: Arc<Arena>,
    reports: Vec<PartReport>,
    state: Mutex<State>,
    /// Something is dirty, or a scrubber is to end.
    work: Condvar,
    /// A block came back from somebody who scrubbed it.
    returned: Condvar,
    /// Whether a hypervisor keeps account of the frames.
    claimed: Mutex<Claimed>,
    dedication: Dedication,
}

#[derive(Debug, PartialEq, Eq)]
enum Claimed {
    Yes,
    No,
}

/// A hypervisor's claim to keep account of a pool's frames; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim(FolioPool);

impl Drop for Claim {
    fn drop(&mut self) {
        *self.0.0.claimed.lock() = Claimed::No;
    }
}

/// What a pool is to be made of; from [`FolioPool::builder`].
#[derive(Clone, Debug, Default)]
pub struct PoolBuilder {
    parts: Vec<(PartSpec, Zone)>,
    whom: Whom,
}

#[derive(Clone, Copy, Debug, Default)]
enum Whom {
    #[default]
    Everybody,
    One,
}

impl PoolBuilder {
    /// Adds a part. All parts are on files, or all are on the heap.
    #[must_use]
    pub fn part(mut self, part: PartSpec, zone: Zone) -> Self {
        self.parts.push((part, zone));
        self
    }

    /// Makes it the pool of one object at a time, whose memory can be [exported](crate::GuestMemfd::export).
    /// Once it was, no other object is created in the pool: the peer may still have it mapped.
    #[must_use]
    pub fn dedicated(mut self) -> Self {
        self.whom = Whom::One;
        self
    }

    /// Creates the pool, and commits all of its memory.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`]; [`ErrorKind::Unsupported`] for no part at all, a part that names no backing, or heap
    /// beside files; [`ErrorKind::Unaligned`] if a size is no multiple of hugetlb's pages;
    /// [`ErrorKind::MissingCapability`] if the host does not do such pages or has no such NUMA node;
    /// [`ErrorKind::Exhausted`] if it, the control group or a limit of the process does not have that
    /// much; [`ErrorKind::Os`] for any other system call that fails. Of several backings of a part, what the last
    /// one was refused with.
    pub fn create(self) -> Result<FolioPool, Error> {
        let (specs, zones): (Vec<_>, Vec<_>) = self.parts.into_iter().unzip();
        let (arena, reports) = Arena::obtain(&specs)?;
        let mut state = State::default();
        for (report, zone) in reports.iter().zip(zones) {
            state.parts.push(PartState::new(report.frames, zone)?);
        }
        Ok(FolioPool(Arc::new(Inner {
            arena,
            reports,
            state: Mutex::new(state),
            work: Condvar::new(),
            returned: Condvar::new(),
            claimed: Mutex::new(Claimed::No),
            dedication: match self.whom {
                Whom::Everybody => Dedication::to_everybody(),
                Whom::One => Dedication::to_one(),
            },
        })))
    }
}

impl FolioPool {
    /// Begins the description of a pool of several parts.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::default()
    }

    /// Creates a pool of `capacity` bytes of one backing, and commits them.
    ///
    /// # Errors
    /// As [`PoolBuilder::create`].
    pub fn new(backing: ArenaBacking, capacity: ByteSize) -> Result<Self, Error> {
        Self::with_preference(&[backing], capacity)
    }

    /// Creates a pool on the first of several backings that this host can provide. What that is, and why the
    /// ones before it were passed over, is in [`parts`](Self::parts).
    ///
    /// # Errors
    /// As [`PoolBuilder::create`].
    pub fn with_preference(preference: &[ArenaBacking], capacity: ByteSize) -> Result<Self, Error> {
        Self::builder().part(PartSpec::new(preference, capacity), Zone::Normal).create()
    }

    /// What this host offers to pools now.
    pub fn probe() -> HostOffer {
        crate::backing::probe()
    }

    /// What the first part is made of.
    pub fn backing(&self) -> ArenaBacking {
        self.0.reports.first().map_or(ArenaBacking::Heap, |part| part.backing)
    }

    /// What was obtained of each part, and why nothing better.
    pub fn parts(&self) -> &[PartReport] {
        &self.0.reports
    }

    /// Whether the other is a handle to the same pool.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The counters.
    pub fn stat(&self) -> PoolStat {
        self.stat_of(|_| true, |arena| arena.huge_bytes())
    }

    /// The counters of the parts of one zone. All zero if there is none.
    pub fn zone_stat(&self, zone: Zone) -> PoolStat {
        self.stat_of(
            |part| part.zone == zone,
            |arena| {
                let of_zone = |part: &&Part| self.zone_of(part.frames().start()) == Some(zone);
                let huge =
                    arena.parts().iter().filter(of_zone).map(|part| arena.huge_bytes_of(part));
                ByteSize::from_bytes(huge.map(ByteSize::get).sum())
            },
        )
    }

    /// The zone that a frame is in; `None` if the pool has no such frame.
    pub fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        self.state().zone_of(pfn)
    }

    /// The counters but for `huge`, which the kernel takes long to tell.
    pub(crate) fn counted(&self) -> PoolStat {
        self.stat_of(|_| true, |_| ByteSize::default())
    }

    fn stat_of(
        &self,
        counts: impl Fn(&PartState) -> bool,
        huge: impl Fn(&Arena) -> ByteSize,
    ) -> PoolStat {
        let pages = ByteSize::from_pages;
        let mut sum = [0; 9];
        let mut largest = 0;
        for part in self.state().parts.iter().filter(|part| counts(part)) {
            let frames = &part.frames;
            let (free, bad) = (frames.free().pages(), frames.poisoned().len() as u64);
            let promised = frames.promised().pages().min(free);
            let gone = frames.nr_quarantined() + bad;
            let used = frames.nr_pages().saturating_sub(free + gone);
            let of_part = [
                frames.nr_pages(),
                free - promised,
                promised,
                frames.free().missing(&frames.promised()),
                used,
                frames.nr_quarantined(),
                bad,
                frames.nr_dirty(),
                part.metadata_bytes(),
            ];
            sum.iter_mut().zip(of_part).for_each(|(sum, one)| *sum += one);
            let order = frames.buddy().largest_order();
            largest = largest.max(order.map_or(0, |order| 1 << order));
        }
        let [capacity, free, reserved, over_promised, used, quarantined, poisoned, dirty, metadata] =
            sum;
        PoolStat {
            capacity: pages(capacity),
            free: pages(free),
            reserved: pages(reserved),
            over_promised: pages(over_promised),
            used: pages(used),
            quarantined: pages(quarantined),
            poisoned: pages(poisoned),
            dirty: pages(dirty),
            largest_free: pages(largest),
            huge: huge(&self.0.arena),
            metadata: ByteSize::from_bytes(metadata),
        }
    }

    /// Reads every clean free frame and makes sure that it is zero; says how much that was. Allocation
    /// waits meanwhile.
    ///
    /// # Errors
    /// The first frame that is not.
    pub fn verify_scrubbed(&self) -> Result<ByteSize, Unscrubbed> {
        let state = self.state();
        let mut nr_pages = 0;
        for part in &state.parts {
            for (start, nr) in part.frames.buddy().free_blocks() {
                for frame in start..start + nr {
                    let pfn = part.pfn(frame);
                    let clean = PfnRange::single(pfn).and_then(|frame| self.0.arena.is_zero(frame));
                    if !matches!(clean, Ok(true)) {
                        return Err(Unscrubbed(pfn));
                    }
                }
                nr_pages += nr;
            }
        }
        Ok(ByteSize::from_pages(nr_pages))
    }

    /// Keeps a frame out of use for good, because its memory failed: the kernel says so by a `SIGBUS` with
    /// `BUS_MCEERR_AO` or `BUS_MCEERR_AR`. A frame in use stays in its folio until that comes back, and the page
    /// in it is quarantined, as by [`GuestMemfd::report_memory_failure`](crate::GuestMemfd::report_memory_failure);
    /// the rest of the folio is used again then. Of hugetlb the kernel gives up the whole page, and so do we.
    /// What nobody was promised fails first. What was promised and cannot be kept any more is counted as
    /// [over-promised](PoolStat::over_promised) from now on, and fails when it is taken: first come, first served.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a frame that the pool does not have; [`ErrorKind::Exhausted`] without host
    /// memory to remember it. If the page of a frame in use cannot be quarantined now, why not: the frame is
    /// kept out of use all the same, and another call tries again.
    pub fn report_memory_failure(&self, pfn: Pfn) -> Result<(), Error> {
        let frames = self.arena().page_of(pfn)?;
        let outcome = self.state().poison(frames)?;
        if let Poisoned::ScrubAround(block, size) = outcome {
            self.scrub_in_hands(block, size);
        }
        // Not under the lock: whoever has it takes his own locks first.
        let owner = self.state().who_has(frames.start());
        owner.map_or(Ok(()), |(owner, page)| owner.fence(page, frames))
    }

    /// Whether a frame is free.
    pub(crate) fn is_free(&self, pfn: Pfn) -> bool {
        let state = self.state();
        let mut parts = state.parts.iter().filter(|part| part.covers(pfn));
        parts.any(|part| part.frames.is_free(pfn.get() - part.start))
    }

    /// Makes the caller the one hypervisor of this pool; `None` if there is one already.
    pub(crate) fn claim(&self) -> Option<Claim> {
        let before = std::mem::replace(&mut *self.0.claimed.lock(), Claimed::Yes);
        (before == Claimed::No).then(|| Claim(self.clone()))
    }

    pub(crate) fn arena(&self) -> &Arc<Arena> {
        &self.0.arena
    }

    /// The unit in which host views of this pool's memory can change sides.
    pub(crate) fn view_granule(&self) -> FolioSize {
        self.0.arena.view_granule()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    pub(super) fn dedication(&self) -> &Dedication {
        &self.0.dedication
    }

    pub(super) fn work(&self) -> &Condvar {
        &self.0.work
    }

    pub(super) fn returned(&self) -> &Condvar {
        &self.0.returned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_free_frame_is_found() {
        let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(4)).unwrap();
        pool.arena().write(Pfn::new(2).pa(), &[1]).unwrap();
        assert_eq!(pool.verify_scrubbed(), Err(Unscrubbed(Pfn::new(2))));
    }

    #[test]
    fn bad_sizes_and_backings_have_errors() {
        let kind = |backing, bytes| {
            FolioPool::new(backing, ByteSize::from_bytes(bytes)).map(|_| ()).map_err(|e| e.kind())
        };
        assert_eq!(kind(ArenaBacking::Heap, 0), Err(ErrorKind::InvalidSize));
        assert_eq!(kind(ArenaBacking::Heap, 4097), Err(ErrorKind::InvalidSize));
        assert_eq!(kind(ArenaBacking::Heap, u64::MAX), Err(ErrorKind::InvalidSize));
        if cfg!(not(miri)) {
            assert_eq!(kind(ArenaBacking::MemfdHugetlb2M, 4096), Err(ErrorKind::Unaligned));
        }
        let error = FolioPool::with_preference(&[], ByteSize::from_pages(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
