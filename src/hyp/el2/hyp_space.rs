//! What EL2 maps for itself: pages that it owns, and shared pages while it has them pinned.

use super::Pages;
use crate::addr::Pfn;
use crate::geometry::{HUGE_ORDER, HUGE_PAGES, index};

const WORD_BITS: u64 = u64::BITS as u64;
const NR_WORDS: usize = (HUGE_PAGES / WORD_BITS) as usize;

/// A bit for each frame; a chunk for each 2 MiB of which a frame was ever mapped.
#[derive(Debug)]
pub(crate) struct HypSpace {
    chunks: Vec<Option<Box<[u64; NR_WORDS]>>>,
}

impl HypSpace {
    /// An empty map of frames below `end`.
    pub(crate) fn new(end: Pfn) -> Self {
        let mut chunks = Vec::new();
        chunks.resize_with(index(end.get().div_ceil(HUGE_PAGES)), || None);
        Self { chunks }
    }

    fn change(&mut self, pages: Pages, change: impl Fn(&mut u64, u64)) {
        for pfn in pages.iter() {
            let Some(chunk) = self.chunks.get_mut(index(pfn.get() >> HUGE_ORDER)) else { return };
            let words = chunk.get_or_insert_with(|| Box::new([0; NR_WORDS]));
            let bit = pfn.get() % HUGE_PAGES;
            change(&mut words[index(bit / WORD_BITS)], 1 << (bit % WORD_BITS));
        }
    }

    pub(crate) fn map(&mut self, pages: Pages) {
        self.change(pages, |word, bit| *word |= bit);
    }

    pub(crate) fn unmap(&mut self, pages: Pages) {
        self.change(pages, |word, bit| *word &= !bit);
    }

    pub(crate) fn maps(&self, pfn: Pfn) -> bool {
        let chunk = self.chunks.get(index(pfn.get() >> HUGE_ORDER));
        let Some(Some(words)) = chunk else { return false };
        let bit = pfn.get() % HUGE_PAGES;
        words[index(bit / WORD_BITS)] & (1 << (bit % WORD_BITS)) != 0
    }

    /// Every frame that is mapped.
    pub(crate) fn mapped(&self) -> impl Iterator<Item = Pfn> {
        let chunks = self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.is_some());
        let frames = chunks.flat_map(|(nth, _)| {
            let first = nth as u64 * HUGE_PAGES;
            (first..first + HUGE_PAGES).map(Pfn::new)
        });
        frames.filter(|&pfn| self.maps(pfn))
    }

    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn nr_bytes(&self) -> usize {
        let made = self.chunks.iter().flatten().count();
        made * size_of::<[u64; NR_WORDS]>() + self.chunks.len() * size_of::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_is_mapped_until_it_is_not() {
        let mut space = HypSpace::new(Pfn::new(2000));
        space.map(Pages::new(Pfn::new(510), 4));
        space.unmap(Pages::new(Pfn::new(511), 1));
        assert_eq!(space.mapped().map(Pfn::get).collect::<Vec<_>>(), [510, 512, 513]);
        assert!(space.maps(Pfn::new(512)) && !space.maps(Pfn::new(511)));
        assert!(!space.maps(Pfn::new(u64::MAX)));
    }
}
