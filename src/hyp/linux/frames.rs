//! The kernel's pages: its own, which have no bytes, and those that processes get, which do.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::CPU;
use crate::addr::{Pa, Pfn};
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, PAGE_BYTES, index};
use crate::hyp::el2::{
    Bytes, El2, FrameBytes, KernelOutcome, Machine, Pages, Profile, Region, RegionKind,
};
use crate::hyp::kernel::KernelPages;
use crate::range::PfnRange;
use crate::sync::Mutex;

const KERNEL: u64 = 0x1000;
const NR_KERNEL: u64 = 0x2000;
/// EL2's own, at the end of it.
const NR_CARVEOUT: u64 = 0x400;
const USER: u64 = 0x8000;
const NR_USER: u64 = 0x3000;

/// Who has what, by counts.
#[derive(Debug)]
pub(super) struct Frames {
    kernel: BTreeSet<u64>,
    user: BTreeSet<u64>,
    /// Page tables, page caches and pins that hold a frame.
    refs: HashMap<Pfn, u32>,
    /// Of them, pins.
    pins: HashMap<Pfn, u32>,
    /// The frame of zeroes that whoever only reads is shown.
    pub(super) zero: Pfn,
}

/// EL2 on a machine, and what is left for the kernel.
pub(super) fn boot(profile: Profile) -> Result<(El2, Frames), Errno> {
    let region = |start, nr, bytes: Option<u64>| -> Result<Region, Errno> {
        let frames = PfnRange::new(Pfn::new(start), nr).map_err(|error| error.errno())?;
        Ok(Region { frames, kind: RegionKind::Memory, bytes: bytes.map(Pfn::new) })
    };
    let regions = vec![region(KERNEL, NR_KERNEL, None)?, region(USER, NR_USER, Some(0))?];
    let machine = Machine::new(regions, Some(Box::new(Ram(Mutex::new(HashMap::new())))))?;
    let end = KERNEL + NR_KERNEL - NR_CARVEOUT;
    let el2 = El2::boot(profile, machine, Pages::new(Pfn::new(end), NR_CARVEOUT), 1)?;
    let mut kernel: BTreeSet<u64> = (KERNEL..end).collect();
    let zero = Pfn::new(kernel.pop_first().ok_or(Errno::ENOMEM)?);
    let user = (USER..USER + NR_USER).collect();
    Ok((el2, Frames { kernel, user, refs: HashMap::new(), pins: HashMap::new(), zero }))
}

/// Bytes of frames that somebody has written to.
#[derive(Debug)]
struct Ram(Mutex<HashMap<Pfn, Box<[u8; PAGE_BYTES]>>>);

impl FrameBytes for Ram {
    fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Errno> {
        let within = index(at.in_page().get());
        match self.0.lock().get(&at.pfn()).and_then(|page| page.get(within..within + buf.len())) {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Errno> {
        let within = index(at.in_page().get());
        let mut pages = self.0.lock();
        let page = pages.entry(at.pfn()).or_insert_with(|| Box::new([0; PAGE_BYTES]));
        let bytes = page.get_mut(within..within + buf.len()).ok_or(Errno::EINVAL)?;
        bytes.copy_from_slice(buf);
        Ok(())
    }

    fn zero(&self, frames: PfnRange) -> Result<(), Errno> {
        let mut pages = self.0.lock();
        (frames.start().get()..frames.end().get()).for_each(|pfn| {
            pages.remove(&Pfn::new(pfn));
        });
        Ok(())
    }
}

/// Takes the first run of `nr` frames that begins at a multiple of `nr_align`.
fn take_run(free: &mut BTreeSet<u64>, nr: u64, nr_align: u64) -> Option<u64> {
    let start = free
        .iter()
        .copied()
        .filter(|start| start % nr_align == 0)
        .find(|&start| (start..start + nr).all(|pfn| free.contains(&pfn)))?;
    (start..start + nr).for_each(|pfn| {
        free.remove(&pfn);
    });
    Some(start)
}

impl KernelPages for Frames {
    fn take(&mut self, nr: u64) -> Result<u64, Errno> {
        let start = take_run(&mut self.kernel, nr, 1).ok_or(Errno::ENOMEM)?;
        Ok(Pfn::new(start).pa().get())
    }

    fn give(&mut self, at: u64) {
        self.kernel.insert(Pa::new(at).pfn().get());
    }
}

impl Frames {
    /// Zeroed frames for a process: one, or 512 for a huge page. Each has one reference.
    pub(super) fn user_pages(&mut self, el2: &El2, nr: u64) -> Result<Pfn, Errno> {
        let start = match nr {
            HUGE_PAGES => take_run(&mut self.user, nr, nr),
            // From the end, so that huge pages find room.
            _ => self.user.pop_last(),
        };
        let start = start.ok_or(Errno::ENOMEM)?;
        for pfn in (start..start + nr).map(Pfn::new) {
            // As a kernel does, through its own mapping.
            let cleared = el2.kernel_alias(CPU, pfn.pa(), Bytes::Store(&[0; PAGE_BYTES]));
            if !matches!(cleared, KernelOutcome::Done) {
                return Err(Errno::EIO);
            }
            self.refs.insert(pfn, 1);
        }
        Ok(Pfn::new(start))
    }

    pub(super) fn get(&mut self, pfn: Pfn) {
        if let Some(refs) = self.refs.get_mut(&pfn) {
            *refs += 1;
        }
    }

    /// Lets go of a frame; the last one frees it.
    pub(super) fn put(&mut self, pfn: Pfn) {
        let Some(refs) = self.refs.get_mut(&pfn) else { return };
        *refs -= 1;
        if *refs == 0 {
            self.refs.remove(&pfn);
            self.user.insert(pfn.get());
        }
    }

    /// For as long as a guest has it.
    pub(super) fn pin(&mut self, pfn: Pfn) {
        self.get(pfn);
        *self.pins.entry(pfn).or_default() += 1;
    }

    pub(super) fn unpin(&mut self, pfn: Pfn) {
        if let Some(pins) = self.pins.get_mut(&pfn) {
            *pins -= 1;
            if *pins == 0 {
                self.pins.remove(&pfn);
            }
            self.put(pfn);
        }
    }

    /// All frames that are pinned, and how often.
    pub(super) fn pins(&self) -> BTreeMap<Pfn, u64> {
        self.pins.iter().map(|(&pfn, &pins)| (pfn, u64::from(pins))).collect()
    }

    pub(super) fn is_pinned(&self, pfn: Pfn) -> bool {
        self.pins.contains_key(&pfn)
    }

    /// How many frames processes, page caches and pins hold.
    #[cfg(test)]
    pub(super) fn nr_held(&self) -> usize {
        self.refs.len()
    }

    /// Frames of the kernel's own that are free.
    #[cfg(test)]
    pub(super) fn nr_kernel_free(&self) -> usize {
        self.kernel.len()
    }
}
