//! The machine behind a pool: its frames with their bytes, and behind them some pages of the kernel's own, the
//! hypervisor's heap and a device, all without.

use std::sync::Arc;

use super::kernel::Kernel;
use crate::addr::Pfn;
use crate::backing::Arena;
use crate::error::Errno;
use crate::geometry::{GIANT_ORDER, HUGE_PAGES};
use crate::hyp::gunyah::Gunyah;
use crate::hyp::gunyah::aspace::BbmLevel;
use crate::hyp::gunyah::machine::{Bank, Machine};
use crate::hyp::gunyah::rm::{Fate, Vmid};
use crate::range::PfnRange;

/// What VMs begin with: a page for each that there can be.
const NR_KERNEL: u64 = (Vmid::LAST_DYNAMIC.0 - Vmid::FIRST_DYNAMIC.0 + 1) as u64;
/// What the heap has at least: for all VMs, and for scattered pages of some of them.
const MIN_HEAP: u64 = 1 << 13;
/// And a page for so many of the pool, for tables of guests that have it page by page at addresses far apart.
const POOL_PAGES_PER_HEAP_PAGE: u64 = 32;
const GIANT_PAGES: u64 = 1 << GIANT_ORDER;

/// Frames of the heap that only what takes memory back may use, so that no guest can keep its memory by using up tables.
/// Three times as many as there are tables if all memory is seen page by page: those of the host, those of blocks of
/// guests' that are taken back in part, and those that the addresses on the way may need; and for many VMs at once, each
/// with some pieces far apart.
fn reserve_for(nr_pages: u64) -> u64 {
    let nr_tables = nr_pages.div_ceil(HUGE_PAGES) + nr_pages.div_ceil(GIANT_PAGES) + 2;
    3 * nr_tables + MIN_HEAP / 2
}

impl Gunyah {
    /// Boots on a machine whose first frames are the arena's, with what they hold.
    ///
    /// # Errors
    /// `EINVAL` for an arena larger than machines are, `ENOMEM`.
    pub(crate) fn on_arena(arena: &Arc<Arena>) -> Result<Self, Errno> {
        let gunyah = Self::on_machine(arena.nr_pages(), Some(Arc::clone(arena)))?;
        gunyah.with(|world| world.hyp.heap.reserve = reserve_for(arena.nr_pages()));
        Ok(gunyah)
    }

    /// The same with so many frames, which may have no bytes.
    pub(super) fn on_machine(nr_pages: u64, bytes: Option<Arc<Arena>>) -> Result<Self, Errno> {
        let nr_heap = MIN_HEAP + reserve_for(nr_pages) + nr_pages / POOL_PAGES_PER_HEAP_PAGE;
        let start = (nr_pages + 1).next_multiple_of(GIANT_PAGES);
        let range = |start, nr| PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno());
        let own = range(start, NR_KERNEL)?;
        let heap = range(start + NR_KERNEL, nr_heap)?;
        let device = range(start + NR_KERNEL + nr_heap, 1)?;
        let banks = vec![
            Bank { frames: range(0, nr_pages)?, bytes: bytes.as_ref().map(|_| Pfn::new(0)) },
            Bank { frames: own, bytes: None },
        ];
        let machine = Machine::new(banks, device, heap, bytes)?;
        let gunyah = Self::boot_with(machine, BbmLevel::default(), Fate::Host, Kernel::new(own))?;
        if !cfg!(test) {
            // It compares every frame after every call: too much for a VMM, even for one that is being debugged.
            gunyah.with(|world| world.hyp.spec = Default::default());
        }
        Ok(gunyah)
    }
}
