//! What a device remembers of translations.

use crate::addr::{Gfn, Pfn};
use crate::sync::{Mutex, MutexGuard};

/// How many translations a device remembers.
const SIZE: usize = 32;

/// A leaf that was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) first: Gfn,
    pub(super) nr_pages: u64,
    pub(super) frame: Pfn,
}

impl Translation {
    pub(super) fn overlaps(&self, gfn: Gfn, nr_pages: u64) -> bool {
        let (one, other) = (self.first.get(), gfn.get());
        one < other.saturating_add(nr_pages) && other < one.saturating_add(self.nr_pages)
    }

    pub(super) fn frame_of(&self, gfn: Gfn) -> Option<Pfn> {
        let skip = gfn.get().checked_sub(self.first.get()).filter(|&skip| skip < self.nr_pages)?;
        self.frame.checked_add(skip)
    }
}

/// A device's IOTLB. A transfer holds it from its look to the end of its copy, so whoever made it forget
/// something knows that no transfer is under way there.
#[derive(Debug)]
pub(super) struct Iotlb(Mutex<Entries>);

#[derive(Debug)]
pub(super) struct Entries {
    known: Vec<Translation>,
    next: usize,
}

impl Iotlb {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Entries { known: Vec::new(), next: 0 }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock()
    }

    pub(super) fn forget(&self, which: impl Fn(&Translation) -> bool) {
        self.lock().known.retain(|known| !which(known));
    }
}

impl Entries {
    pub(super) fn find(&self, gfn: Gfn) -> Option<Pfn> {
        self.known.iter().find_map(|known| known.frame_of(gfn))
    }

    /// Remembers, in the place of an older one if need be.
    pub(super) fn remember(&mut self, translation: Translation) {
        if self.known.len() < SIZE {
            self.known.push(translation);
            return;
        }
        let next = self.next % SIZE;
        if let Some(place) = self.known.get_mut(next) {
            *place = translation;
        }
        self.next = next + 1;
    }
}
