//! A simulated IOMMU: devices that reach guest memory by addresses of their own, and only what their domain
//! maps.
//!
//! | file | holds |
//! |---|---|
//! | `mod` | the domain: its table, and how it follows an object |
//! | `tlb` | what a device remembers of translations, until it is told to forget |
//! | `dma` | devices: transfers, and the faults that they end in |
//!
//! ```
//! use std::sync::Arc;
//! use gmem::addr::{ByteSize, Ipa, Offset};
//! use gmem::hyp::iommu::{Domain, Places};
//! use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, Visibility};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2))?;
//! let memfd = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared).create(&pool)?;
//! let domain = Domain::new(&pool, Places::Object)?;
//! let _subscription = memfd.subscribe(Arc::new(domain.clone()))?;
//!
//! memfd.write(Offset::new(0x3000), b"hello")?;
//! let device = domain.attach_device();
//! let mut seen = [0; 5];
//! device.read(Ipa::new(0x3000), &mut seen)?;
//! assert_eq!(&seen, b"hello");
//!
//! let _ = memfd.convert(memfd.pages(), Visibility::Private, ContentPolicy::Preserve)?;
//! assert!(device.read(Ipa::new(0x3000), &mut seen).is_err());
//! # Ok(())
//! # }
//! ```

mod dma;
mod tlb;

use std::sync::Arc;

use dma::Faults;
pub use dma::{Device, DmaFault, DmaFaultKind};
use tlb::{Iotlb, Translation};

use crate::addr::{Gfn, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::folio::FolioPool;
use crate::gmem::{HandOutRun, Subscriber, leaves};
use crate::range::{GfnRange, PfnRange};
use crate::stage2::{Entry, Leaf, Level, PageState, Prot, Table, TableError, TableShape};
use crate::state::Ack;
use crate::sync::{Mutex, RwLock};

/// At which addresses devices find the pages of an object.
///
/// A domain is for one object or guest: where the pages of two come to the same address, a device finds those of one of
/// them or none, and none that was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Places {
    /// Where the guest sees them, as a driver in the guest expects. What no memslot covers is not mapped.
    Guest,
    /// At their offsets in the object.
    Object,
}

/// What a revoke leaves out: mistakes that tests seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Care {
    Complete,
    #[cfg(any(test, feature = "oracle"))]
    ForgetsIotlbs,
}

/// A domain: the table that its devices share. Clones are handles to the same one.
///
/// It follows every object that it is [subscribed](crate::GuestMemfd::subscribe) to, and answers at once.
#[derive(Clone, Debug)]
pub struct Domain(Arc<Core>);

/// Lock order: an IOTLB, then the table. Who changes the table lets go of it before it invalidates.
#[derive(Debug)]
pub(super) struct Core {
    arena: Arc<Arena>,
    places: Places,
    care: Care,
    table: RwLock<Mappings>,
    tlbs: Mutex<Vec<Arc<Iotlb>>>,
    faults: Mutex<Faults>,
}

#[derive(Debug)]
struct Mappings {
    table: Table,
    state: DomainState,
}

/// Whether a domain lets anything through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainState {
    /// What it has mapped.
    Attached,
    /// Nothing: it was fenced off.
    Detached,
}

impl Domain {
    /// A domain for the memory of this pool, with nothing mapped and 48 bits of address.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn new(pool: &FolioPool, places: Places) -> Result<Self, Error> {
        Self::with_care(pool, places, Care::Complete)
    }

    /// A broken one: devices go on with the translations that they remember.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(any(test, feature = "oracle"))]
    #[doc(hidden)]
    pub fn forgetting_iotlbs(pool: &FolioPool, places: Places) -> Result<Self, Error> {
        Self::with_care(pool, places, Care::ForgetsIotlbs)
    }

    fn with_care(pool: &FolioPool, places: Places, care: Care) -> Result<Self, Error> {
        let mappings = Mappings { table: empty()?, state: DomainState::Attached };
        Ok(Self(Arc::new(Core {
            arena: Arc::clone(pool.arena()),
            places,
            care,
            table: RwLock::new(mappings),
            tlbs: Mutex::new(Vec::new()),
            faults: Mutex::new(Faults::default()),
        })))
    }

    /// Adds a device.
    pub fn attach_device(&self) -> Device {
        let tlb = Arc::new(Iotlb::new());
        self.0.tlbs.lock().push(Arc::clone(&tlb));
        Device::new(Arc::clone(&self.0), tlb)
    }

    /// Whether it lets anything through.
    pub fn state(&self) -> DomainState {
        self.0.table.read().state
    }

    /// Begins anew after it was fenced off, with nothing mapped: to be called before it is subscribed again. The
    /// subscription that was fenced off maps nothing any more, whether or not it is dropped by then.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn reattach(&self) -> Result<(), Error> {
        *self.0.table.write() = Mappings { table: empty()?, state: DomainState::Attached };
        Ok(())
    }

    /// Every leaf of the table, ascending: where devices find it, and its frames.
    pub fn leaves(&self) -> Vec<(GfnRange, PfnRange)> {
        let mappings = self.0.table.read();
        let shape = mappings.table.shape();
        let leaf = |(gfn, level, entry)| match entry {
            Entry::Leaf(Leaf { pfn, .. }) => {
                let nr_pages = shape.pages_at(level);
                Some((GfnRange::new(gfn, nr_pages).ok()?, PfnRange::new(pfn, nr_pages).ok()?))
            }
            _ => None,
        };
        mappings.table.entries().filter_map(leaf).collect()
    }

    /// How many faults its devices have had.
    pub fn nr_faults(&self) -> u64 {
        self.0.faults.lock().nr()
    }

    /// The last of them, the oldest first.
    pub fn last_faults(&self) -> Vec<DmaFault> {
        self.0.faults.lock().last()
    }
}

fn empty() -> Result<Table, Error> {
    let exhausted = |_: TableError| Error::new(Op::Subscribe, ErrorKind::Exhausted);
    Table::with_limit(TableShape::IPA_48, usize::MAX).map_err(exhausted)
}

impl Subscriber for Domain {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        // Whether the conversion still waits is its own affair: a grant follows if it does not.
        let _ = match self.0.unmap(runs) {
            Ok(()) => ack.let_go(),
            Err(errno) => ack.refuse(errno),
        };
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let mappings = &mut *self.0.table.write();
        if mappings.state == DomainState::Attached {
            for (gfn, run) in self.0.placed(runs) {
                map(&mut mappings.table, gfn, run.frames.start(), run.pages.nr_pages());
            }
        }
    }

    fn fence(&self) -> Result<(), Errno> {
        self.0.table.write().state = DomainState::Detached;
        self.0.invalidate(|_| true);
        Ok(())
    }
}

impl Core {
    /// The runs that have a place, and where that is.
    fn placed<'a>(&self, runs: &'a [HandOutRun]) -> impl Iterator<Item = (Gfn, &'a HandOutRun)> {
        let places = self.places;
        runs.iter().filter_map(move |run| match places {
            Places::Guest => run.guest.map(|gfn| (gfn, run)),
            Places::Object => Some((Gfn::new(run.pages.start().get()), run)),
        })
    }

    /// Everything, or nothing for want of memory to split leaves with. When it returns, no transfer to
    /// these pages is under way.
    fn unmap(&self, runs: &[HandOutRun]) -> Result<(), Errno> {
        let mut mappings = self.table.write();
        let table = &mut mappings.table;
        let ends = self.placed(runs).flat_map(|(gfn, run)| {
            let last = gfn.checked_add(run.pages.nr_pages() - 1);
            [Some((gfn, 1)), last.map(|last| (last, 1))].into_iter().flatten()
        });
        table.reserve(ends)?;
        for (gfn, run) in self.placed(runs) {
            clear(table, gfn, run.pages.nr_pages());
        }
        drop(mappings);
        // After the table: what a device looks up from here on is not there.
        let is_revoked = |at: &Translation| {
            self.placed(runs).any(|(gfn, run)| at.overlaps(gfn, run.pages.nr_pages()))
        };
        self.invalidate(is_revoked);
        Ok(())
    }

    fn invalidate(&self, which: impl Fn(&Translation) -> bool) {
        if self.care == Care::Complete {
            self.tlbs.lock().iter().for_each(|tlb| tlb.forget(&which));
        }
    }

    /// What the table says, for a device that does not know.
    fn translate(&self, gfn: Gfn) -> Result<Translation, DmaFaultKind> {
        let mappings = self.table.read();
        if mappings.state == DomainState::Detached {
            return Err(DmaFaultKind::Detached);
        }
        match mappings.table.lookup(gfn) {
            Ok((level, Entry::Leaf(leaf))) => {
                let nr_pages = mappings.table.shape().pages_at(level);
                let first = Gfn::new(gfn.get() & !(nr_pages - 1));
                Ok(Translation { first, nr_pages, frame: leaf.pfn })
            }
            _ => Err(DmaFaultKind::NotMapped),
        }
    }
}

/// Maps pages by leaves as large as they can be. What there is no memory for stays out of reach.
fn map(table: &mut Table, gfn: Gfn, frame: Pfn, nr_pages: u64) {
    for (skip, size) in leaves(gfn, frame, nr_pages) {
        let (Some(at), Some(pfn)) = (gfn.checked_add(skip), frame.checked_add(skip)) else {
            return;
        };
        let leaf = |pfn| Leaf { pfn, prot: Prot::RWX, state: PageState::Owned };
        let outcome = table.map(at, level_of(table, size), leaf(pfn));
        if outcome != Err(TableError::TableInTheWay) {
            continue;
        }
        // Some of it is there already: it was granted twice.
        for page in 0..size {
            if let (Some(at), Some(pfn)) = (at.checked_add(page), pfn.checked_add(page)) {
                let _ = table.map(at, Level::PAGE, leaf(pfn));
            }
        }
    }
}

fn level_of(table: &Table, nr_pages: u64) -> Level {
    let is_it = |level: &Level| table.shape().pages_at(*level) == nr_pages;
    [Level::BLOCK_1G, Level::BLOCK_2M].into_iter().find(is_it).unwrap_or(Level::PAGE)
}

/// Empties what is mapped of these pages. A leaf of which some are not meant is replaced by smaller ones.
fn clear(table: &mut Table, gfn: Gfn, nr_pages: u64) {
    let end = gfn.get().saturating_add(nr_pages);
    let mut next = gfn;
    while let Some((first, level, entry)) = table.next_entry(next).filter(|e| e.0.get() < end) {
        let size = table.shape().pages_at(level);
        let behind = first.get().saturating_add(size);
        if let (Entry::Leaf(leaf), Ok(_)) = (entry, table.clear(first, level)) {
            let before = gfn.get().saturating_sub(first.get());
            map(table, first, leaf.pfn, before);
            let skip = size - behind.saturating_sub(end).min(size);
            if let (Some(at), Some(pfn)) = (first.checked_add(skip), leaf.pfn.checked_add(skip)) {
                map(table, at, pfn, size - skip);
            }
        }
        next = Gfn::new(behind);
    }
}
