//! The machine behind a pool: its frames, and behind them memory without bytes for the host's kernel and for EL2.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::{Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::{GIANT_ORDER, HUGE_PAGES};
use crate::hyp::el2::{El2, Machine, Pages, Profile, Region, RegionKind};
use crate::hyp::kernel::KernelPages;
use crate::range::PfnRange;

/// What the kernel has at least: for 255 VMs with some vCPUs each, and for one with all of them.
const MIN_KERNEL: u64 = 1 << 15;
/// And for tables of guests: half as many as a page each for every 4 KiB would be, of which the pool has one in so many.
const POOL_PAGES_PER_KERNEL_PAGE: u64 = 8;
const GIANT_PAGES: u64 = 1 << GIANT_ORDER;

/// Tables for so many pages, each with an entry of its own; as the original reckons.
fn nr_tables(nr_pages: u64) -> u64 {
    let mut nr = nr_pages;
    let mut sum = 0;
    for _ in 0..4 {
        nr = nr.div_ceil(HUGE_PAGES);
        sum += nr;
    }
    sum
}

/// Boots EL2 on a machine whose first frames are the arena's, with what they hold.
pub(super) fn boot(
    profile: Profile,
    arena: &Arc<Arena>,
    nr_cpus: usize,
) -> Result<(El2, FreePages), Errno> {
    let nr_pages = arena.nr_pages();
    let start = (nr_pages + 1).next_multiple_of(GIANT_PAGES);
    let nr_kernel = MIN_KERNEL + nr_pages / POOL_PAGES_PER_KERNEL_PAGE;
    // All of memory by pages. The original adds a GiB of devices, which this machine has not.
    let tables = |nr: u64| nr_tables(nr) + 1;
    let nr_known = tables(nr_pages) + tables(nr_kernel);
    // Its own part is memory as well.
    let nr_carveout = nr_known + tables(nr_known);
    let region = |start, nr, bytes| -> Result<Region, Errno> {
        let frames = PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno())?;
        Ok(Region { frames, kind: RegionKind::Memory, bytes })
    };
    let regions = vec![
        region(0, nr_pages, Some(Pfn::new(0)))?,
        region(start, nr_kernel + nr_carveout, None)?,
    ];
    let machine = Machine::new(regions, Some(Box::new(Arc::clone(arena))))?;
    let carveout = Pages::new(Pfn::new(start + nr_kernel), nr_carveout);
    let el2 = El2::boot(profile, machine, carveout, nr_cpus)?;
    Ok((el2, FreePages::new(start, nr_kernel)))
}

/// The kernel's pages that are in no use: runs of frames, as long as they can be.
#[derive(Debug)]
pub(super) struct FreePages {
    runs: BTreeMap<u64, u64>,
}

impl FreePages {
    fn new(start: u64, nr: u64) -> Self {
        Self { runs: BTreeMap::from([(start, nr)]) }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn nr(&self) -> u64 {
        self.runs.values().sum()
    }
}

impl KernelPages for FreePages {
    fn take(&mut self, nr: u64) -> Result<u64, Errno> {
        let fits = |&(_, &has): &(&u64, &u64)| has >= nr;
        let (&start, &has) = self.runs.iter().find(fits).ok_or(Errno::ENOMEM)?;
        self.runs.remove(&start);
        if has > nr {
            self.runs.insert(start + nr, has - nr);
        }
        Ok(Pfn::new(start).pa().get())
    }

    fn give(&mut self, at: u64) {
        let mut start = Pa::new(at).pfn().get();
        let mut nr = 1;
        if let Some(behind) = self.runs.remove(&(start + 1)) {
            nr += behind;
        }
        let before = self.runs.range(..start).next_back().map(|(&at, &has)| (at, has));
        if let Some((at, has)) = before.filter(|(at, has)| at + has == start) {
            start = at;
            nr += has;
        }
        self.runs.insert(start, nr);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_come_back_join() {
        let mut free = FreePages::new(8, 8);
        let pages: Vec<u64> = (0..8).map(|_| free.take(1).unwrap()).collect();
        assert_eq!((free.nr(), free.take(1)), (0, Err(Errno::ENOMEM)));
        for nth in [0, 2, 4, 6] {
            free.give(pages[nth]);
        }
        assert_eq!((free.nr(), free.take(2)), (4, Err(Errno::ENOMEM)), "all apart");
        for nth in [1, 7, 5, 3] {
            free.give(pages[nth]);
        }
        assert_eq!(free.take(8), Ok(8 * 4096));
    }
}
