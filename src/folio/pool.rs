//! A pool: the physical memory that several guests draw from.
//!
//! One lock guards all of its state, and no bytes are touched under it. Who scrubs takes what he scrubs
//! out of the state first, and nobody else reaches it meanwhile.

use std::fmt;
use std::sync::Arc;

use super::state::{ArenaState, Poisoned, State, Zone};
use crate::addr::{ByteSize, Pfn};
use crate::backing::Arena;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::os::memfd::PageKind;
use crate::range::PfnRange;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// What the bytes of a pool are made of. All of it is committed when the pool is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArenaBacking {
    /// The process's own heap. Has no host views.
    Heap,
    /// A memory file on 4 KiB pages.
    Memfd,
    /// A memory file for which the kernel is asked to find huge pages. Needs
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` to say `advise` or more. What was
    /// really found is in [`PoolStat::huge`].
    MemfdThp,
    /// A memory file on hugetlb pages of 2 MiB. Needs as many in `/proc/sys/vm/nr_hugepages`.
    /// Host views change sides in units of 2 MiB.
    MemfdHugetlb2M,
}

impl fmt::Display for ArenaBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Heap => "heap",
            Self::Memfd => "memfd, 4 KiB pages",
            Self::MemfdThp => "memfd, transparent huge pages",
            Self::MemfdHugetlb2M => "memfd, hugetlb pages of 2 MiB",
        })
    }
}

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
    backing: ArenaBacking,
    arena: Arc<Arena>,
    state: Mutex<State>,
    /// Something is dirty, or a scrubber is to end.
    work: Condvar,
    /// A block came back from somebody who scrubbed it.
    returned: Condvar,
    /// Whether a hypervisor keeps account of the frames.
    claimed: Mutex<Claimed>,
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

impl FolioPool {
    /// Creates a pool of `capacity` bytes and commits them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`]; [`ErrorKind::Unaligned`] if hugetlb is asked for and the capacity
    /// is no multiple of 2 MiB; [`ErrorKind::MissingCapability`] if the host does not do such pages;
    /// [`ErrorKind::Exhausted`] if it, the control group or a limit of the process does not have that
    /// much; [`ErrorKind::Os`] for any other system call that fails.
    pub fn new(backing: ArenaBacking, capacity: ByteSize) -> Result<Self, Error> {
        if !capacity.is_page_aligned() {
            return Err(Error::new(Op::CreatePool, ErrorKind::InvalidSize));
        }
        let nr_pages = capacity.whole_pages();
        let arena = match backing {
            ArenaBacking::Heap => Arena::heap(nr_pages)?,
            ArenaBacking::Memfd => Arena::file(PageKind::Plain, nr_pages)?,
            ArenaBacking::MemfdThp => Arena::huge_file(nr_pages)?,
            ArenaBacking::MemfdHugetlb2M if nr_pages % HUGE_PAGES != 0 => {
                return Err(Error::new(Op::CreatePool, ErrorKind::Unaligned)
                    .because("hugetlb wants a multiple of 2 MiB"));
            }
            ArenaBacking::MemfdHugetlb2M => Arena::file(PageKind::Hugetlb2M, nr_pages)?,
        };
        let frames = PfnRange::new(Pfn::new(0), nr_pages)?;
        let mut state = State::default();
        state.arenas.push(ArenaState::new(frames, Zone::Normal)?);
        Ok(Self(Arc::new(Inner {
            backing,
            arena,
            state: Mutex::new(state),
            work: Condvar::new(),
            returned: Condvar::new(),
            claimed: Mutex::new(Claimed::No),
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

    /// What the pool is made of.
    pub fn backing(&self) -> ArenaBacking {
        self.0.backing
    }

    /// Whether the other is a handle to the same pool.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The counters.
    pub fn stat(&self) -> PoolStat {
        let pages = ByteSize::from_pages;
        let mut sum = [0; 8];
        let mut largest = 0;
        for arena in &self.state().arenas {
            let frames = &arena.frames;
            let (free, bad) = (frames.free().pages(), frames.poisoned().len() as u64);
            let promised = frames.promised().pages().min(free);
            let gone = frames.nr_quarantined() + bad;
            let used = frames.nr_pages().saturating_sub(free + gone);
            let of_arena = [
                frames.nr_pages(),
                free - promised,
                promised,
                used,
                frames.nr_quarantined(),
                bad,
                frames.nr_dirty(),
                arena.metadata_bytes(),
            ];
            sum.iter_mut().zip(of_arena).for_each(|(sum, one)| *sum += one);
            let order = frames.buddy().largest_order();
            largest = largest.max(order.map_or(0, |order| 1 << order));
        }
        let [capacity, free, reserved, used, quarantined, poisoned, dirty, metadata] = sum;
        PoolStat {
            capacity: pages(capacity),
            free: pages(free),
            reserved: pages(reserved),
            used: pages(used),
            quarantined: pages(quarantined),
            poisoned: pages(poisoned),
            dirty: pages(dirty),
            largest_free: pages(largest),
            huge: match self.0.backing {
                ArenaBacking::Heap | ArenaBacking::Memfd => pages(0),
                ArenaBacking::MemfdThp => crate::os::thp::huge_mapped(self.0.arena.hva()),
                ArenaBacking::MemfdHugetlb2M => pages(capacity),
            },
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
        for arena in &state.arenas {
            for (start, nr) in arena.frames.buddy().free_blocks() {
                for frame in start..start + nr {
                    let pfn = arena.pfn(frame);
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
    /// `BUS_MCEERR_AO` or `BUS_MCEERR_AR`. A frame in use stays in its folio until that comes back; the rest
    /// of the folio is used again then. What was promised and cannot be kept any more fails when it
    /// is taken.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] for a frame that the pool does not have; [`ErrorKind::Exhausted`] without host
    /// memory to remember it.
    pub fn report_memory_failure(&self, pfn: Pfn) -> Result<(), Error> {
        let outcome = self.state().poison(pfn)?;
        if let Poisoned::ScrubAround(block, size) = outcome {
            self.scrub_in_hands(block, size);
        }
        Ok(())
    }

    /// Whether a frame is free.
    pub(crate) fn is_free(&self, pfn: Pfn) -> bool {
        let state = self.state();
        let mut arenas = state.arenas.iter().filter(|arena| arena.covers(pfn));
        arenas.any(|arena| arena.frames.is_free(pfn.get() - arena.start))
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
        match self.0.backing {
            ArenaBacking::MemfdHugetlb2M => FolioSize::Huge2M,
            _ => FolioSize::Base,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
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
        assert_eq!(kind(ArenaBacking::MemfdHugetlb2M, 4096), Err(ErrorKind::Unaligned));
        let error = FolioPool::with_preference(&[], ByteSize::from_pages(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
