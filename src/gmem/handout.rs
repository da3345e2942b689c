//! What is handed out: runs of pages with the frames behind them, as an IOMMU maps them.

use super::layout::{Binding, Layout};
use super::object::{Inner, runs};
use crate::addr::{Gfn, Pfn, Pgoff};
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::state::{Phase, Visibility};

/// What a page table takes at once, the largest first.
const SIZES: [FolioSize; 2] = [FolioSize::Huge1G, FolioSize::Huge2M];

/// Pages that follow each other in the object, in the arena and, if they are bound, in the guest.
///
/// A run is as long as it can be. [`leaves`](Self::leaves) cuts it into what a page table takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOutRun {
    /// The pages of the object.
    pub pages: PgoffRange,
    /// The frames of the arena that are behind them.
    pub frames: PfnRange,
    /// Where the guest sees the first of them, if a memslot covers the run.
    pub guest: Option<Gfn>,
}

impl HandOutRun {
    /// The run in pieces of 1 GiB, 2 MiB and 4 KiB that are aligned in the arena and in `device`, the page
    /// number at which a device is to find the run. Each is as large as it can be.
    pub fn leaves(&self, device: Gfn) -> impl Iterator<Item = (Gfn, Self)> + use<> {
        let run = *self;
        let pieces = leaves(device, run.frames.start(), run.pages.nr_pages());
        pieces.filter_map(move |(skip, size)| {
            Some((device.checked_add(skip)?, run.slice(skip, size)?))
        })
    }

    /// Up to `most` pages of the run, without the first `skip`.
    pub(crate) fn slice(&self, skip: u64, most: u64) -> Option<Self> {
        Some(Self {
            pages: self.pages.slice(skip, most)?,
            frames: self.frames.slice(skip, most)?,
            guest: match self.guest {
                Some(guest) => Some(guest.checked_add(skip)?),
                None => None,
            },
        })
    }
}

/// How many pages of a run lie before each of its leaves, and how many are in that.
pub(crate) fn leaves(
    at: Gfn,
    frame: Pfn,
    nr_pages: u64,
) -> impl Iterator<Item = (u64, u64)> + use<> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = nr_pages.checked_sub(done).filter(|&left| left > 0)?;
        let ends = at.checked_add(done)?.get() | frame.checked_add(done)?.get();
        let fits = |&size: &u64| size <= left && ends % size == 0;
        let size = SIZES.into_iter().map(FolioSize::nr_pages).find(fits).unwrap_or(1);
        let skip = done;
        done += size;
        Some((skip, size))
    })
}

/// The binding of a page, and the pages from there on that have the same one, or none.
fn bound(layout: &Layout, page: Pgoff) -> (Option<&Binding>, Option<Pgoff>) {
    let bindings = || layout.bindings.iter().map(|(_, binding)| binding);
    match bindings().find(|binding| binding.pages.contains(page)) {
        Some(binding) => (Some(binding), Some(binding.pages.end())),
        None => {
            let starts = bindings().map(|binding| binding.pages.start());
            (None, starts.filter(|&start| start > page).min())
        }
    }
}

impl Inner {
    /// The runs that these pages come to: what is resident of them.
    pub(super) fn hand_out_runs<'a>(
        &'a self,
        layout: &'a Layout,
        pages: impl Iterator<Item = PgoffRange> + 'a,
    ) -> impl Iterator<Item = HandOutRun> + 'a {
        pages.flat_map(|range| self.frames.resident(range)).flat_map(move |(pages, frames)| {
            let run = HandOutRun { pages, frames, guest: None };
            let mut done = 0;
            std::iter::from_fn(move || {
                let at = pages.start().checked_add(done).filter(|&at| at < pages.end())?;
                let (binding, end) = bound(layout, at);
                let end = end.map_or(pages.end(), |end| end.min(pages.end()));
                let mut part = run.slice(done, end.get() - at.get())?;
                part.guest = binding.and_then(|binding| {
                    binding.gfn.checked_add(at.get() - binding.pages.start().get())
                });
                done += part.pages.nr_pages();
                Some(part)
            })
        })
    }

    /// What of a range is on one side by its words, as runs, with the layout locked.
    pub(super) fn on_side(
        &self,
        range: PgoffRange,
        side: Visibility,
    ) -> impl Iterator<Item = PgoffRange> {
        let sides = self.spans(range).map(move |(pages, word)| {
            (pages, word.visibility() == side && word.phase() != Phase::Quarantined)
        });
        runs(sides).filter(|&(_, is_there)| is_there).map(|(pages, _)| pages)
    }
}
