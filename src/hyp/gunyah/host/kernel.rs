//! What the host's kernel itself has of frames: entries of its direct map, mappings of user space, pins.

use std::collections::BTreeMap;

use crate::addr::Pfn;
use crate::error::Errno;
use crate::range::PfnRange;

/// How often user space has a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    pub(crate) nr_mapped: u32,
    pub(crate) nr_pinned: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Kernel {
    /// What the direct map leaves out, by its start: the end. Neighbours are one.
    hidden: BTreeMap<u64, u64>,
    /// Frames that user space has mapped or pinned.
    uses: BTreeMap<Pfn, Uses>,
    /// Pages of its own.
    pub(super) free: Vec<Pfn>,
}

impl Kernel {
    pub(super) fn new(own: PfnRange) -> Self {
        Self { free: own.iter().rev().collect(), ..Self::default() }
    }

    /// One more page of its own.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn free_page(&mut self, pfn: Pfn) {
        self.free.push(pfn);
    }

    /// A frame's mappings and pins.
    pub(crate) fn uses(&self, pfn: Pfn) -> Uses {
        self.uses.get(&pfn).copied().unwrap_or_default()
    }

    /// Changes what user space has of a frame. What it has not at all is not kept.
    pub(crate) fn note_use(&mut self, pfn: Pfn, change: impl FnOnce(&mut Uses)) {
        let mut uses = self.uses(pfn);
        change(&mut uses);
        match uses == Uses::default() {
            true => drop(self.uses.remove(&pfn)),
            false => drop(self.uses.insert(pfn, uses)),
        }
    }

    /// # Errors
    /// `EPERM` if user space has any of the frames.
    pub(super) fn check_unused(&self, frames: PfnRange) -> Result<(), Errno> {
        match self.uses.range(frames.start()..frames.end()).next() {
            None => Ok(()),
            Some(_) => Err(Errno::EPERM),
        }
    }

    /// Whether the direct map has a frame.
    pub(crate) fn sees(&self, pfn: Pfn) -> bool {
        let before = self.hidden.range(..=pfn.get()).next_back();
        before.is_none_or(|(_, &end)| end <= pfn.get())
    }

    /// Takes frames out of the direct map.
    pub(super) fn hide(&mut self, frames: PfnRange) {
        self.show(frames);
        let (mut start, mut end) = (frames.start().get(), frames.end().get());
        if let Some((&before, &at)) = self.hidden.range(..start).next_back() {
            if at == start {
                start = before;
            }
        }
        if let Some(last) = self.hidden.remove(&end) {
            end = last;
        }
        self.hidden.insert(start, end);
    }

    /// Puts them back.
    pub(super) fn show(&mut self, frames: PfnRange) {
        let (start, end) = (frames.start().get(), frames.end().get());
        for cut in [start, end] {
            let across = self.hidden.range_mut(..cut).next_back();
            if let Some((_, last)) = across.filter(|(_, last)| **last > cut) {
                let rest = std::mem::replace(last, cut);
                self.hidden.insert(cut, rest);
            }
        }
        while let Some((&at, _)) = self.hidden.range(start..end).next() {
            self.hidden.remove(&at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a list of frames.
        #[test]
        fn the_direct_map_is_a_list_of_frames(
            steps in prop::collection::vec((0_u64..30, 1_u64..12, any::<bool>()), 1..60)
        ) {
            let mut kernel = Kernel::default();
            let mut list = [true; 50];
            for (start, nr, hide) in steps {
                let frames = PfnRange::new(Pfn::new(start), nr).unwrap();
                if hide { kernel.hide(frames) } else { kernel.show(frames) }
                list[start as usize..(start + nr) as usize].fill(!hide);
                for (pfn, &sees) in list.iter().enumerate() {
                    prop_assert_eq!(kernel.sees(Pfn::new(pfn as u64)), sees);
                }
            }
            let runs = list.chunk_by(|a, b| a == b).filter(|run| !run[0]).count();
            prop_assert_eq!(kernel.hidden.len(), runs, "neighbours are one");
        }
    }
}
