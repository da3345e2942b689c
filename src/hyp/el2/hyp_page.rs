//! What EL2 knows of a frame, in eight bytes: who may see it, who refers to it.
//!
//! A frame that nobody did anything with is all zeroes: the host's own, unknown to EL2's map. That is why the state
//! as EL2 sees it is stored complemented. Chunks of 512 are made when one of theirs is first not zero.

use super::{Pages, State};
use crate::addr::Pfn;
use crate::geometry::{HUGE_ORDER, HUGE_PAGES, index};

const STATE_BITS: u32 = 4;
const STATE: u8 = (1 << STATE_BITS) - 1;
const HYP_COMPLEMENT: u8 = State::NoPage as u8;

/// The record of one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct HypPage {
    /// Pins of a page that the host shares with EL2; or devices that use it, in profiles that know.
    pub(crate) nr_pins: u16,
    /// How often a VM that is gone has kept it, or it turned out broken; 255 is that or more. Upstream's allocator keeps
    /// the order of its own pages here.
    pub(crate) nr_orphaned: u8,
    /// Low: the host's state. High: EL2's, complemented.
    states: u8,
    /// Pages of non-protected guests that the host shares it with.
    pub(crate) nr_guests: u32,
}

const _: () = assert!(size_of::<HypPage>() == 8);

impl HypPage {
    #[inline]
    pub(crate) fn host(self) -> State {
        State::from_bits(self.states & STATE)
    }

    #[inline]
    pub(crate) fn hyp(self) -> State {
        State::from_bits(self.states >> STATE_BITS ^ HYP_COMPLEMENT)
    }

    /// Whether the pins are a device's. Those of EL2's are of pages that it sees.
    pub(crate) fn is_for_dma(self) -> bool {
        let by_host = matches!(self.host(), State::Owned | State::SharedOwned);
        self.nr_pins > 0 && by_host && self.hyp() == State::NoPage
    }

    #[inline]
    pub(crate) fn set_host(&mut self, state: State) {
        self.states = self.states & !STATE | state as u8;
    }

    #[inline]
    pub(crate) fn set_hyp(&mut self, state: State) {
        self.states = self.states & STATE | (state as u8 ^ HYP_COMPLEMENT) << STATE_BITS;
    }
}

const CHUNK: usize = index(HUGE_PAGES);

type Chunk = [HypPage; CHUNK];

/// All records.
#[derive(Debug)]
pub(crate) struct HypPages {
    chunks: Vec<Option<Box<Chunk>>>,
    /// Of every frame beyond memory.
    end: Pfn,
}

impl HypPages {
    /// Records for all frames below `end`.
    pub(crate) fn new(end: Pfn) -> Self {
        let nr = index(end.get().div_ceil(HUGE_PAGES));
        let mut chunks = Vec::new();
        chunks.resize_with(nr, || None);
        Self { chunks, end }
    }

    #[inline(always)]
    pub(crate) fn get(&self, pfn: Pfn) -> HypPage {
        match self.chunks.get(index(pfn.get() >> HUGE_ORDER)) {
            Some(Some(chunk)) => chunk[index(pfn.get() & (HUGE_PAGES - 1))],
            _ => HypPage::default(),
        }
    }

    /// Whether all of these are so.
    #[inline(always)]
    pub(crate) fn all(&self, pages: Pages, is_so: impl Fn(HypPage) -> bool) -> bool {
        match pages.nr() {
            1 => is_so(self.get(pages.start())),
            _ => pages.iter().all(|pfn| is_so(self.get(pfn))),
        }
    }

    /// Changes the record of a frame of memory.
    #[inline(always)]
    pub(crate) fn update(&mut self, pfn: Pfn, change: impl FnOnce(&mut HypPage)) {
        // Callers have checked that it is memory; others have no record.
        let Some(chunk) = self.chunks.get_mut(index(pfn.get() >> HUGE_ORDER)) else { return };
        let new = || Box::new([HypPage::default(); CHUNK]);
        change(&mut chunk.get_or_insert_with(new)[index(pfn.get() & (HUGE_PAGES - 1))]);
    }

    #[inline]
    pub(crate) fn set_host(&mut self, pages: Pages, state: State) {
        pages.iter().for_each(|pfn| self.update(pfn, |page| page.set_host(state)));
    }

    pub(crate) fn set_hyp(&mut self, pages: Pages, state: State) {
        pages.iter().for_each(|pfn| self.update(pfn, |page| page.set_hyp(state)));
    }

    /// Nobody will give these back.
    pub(crate) fn orphan(&mut self, pages: Pages) {
        for pfn in pages.iter() {
            self.update(pfn, |page| page.nr_orphaned = page.nr_orphaned.saturating_add(1));
        }
    }

    /// Frames that nobody will give back. It takes a look at every record.
    pub(crate) fn orphans(&self) -> impl Iterator<Item = Pfn> {
        self.touched().filter(|(_, page)| page.nr_orphaned > 0).map(|(pfn, _)| pfn)
    }

    /// The first frame from `pfn` on whose chunk is made, or that lies behind so many that are not.
    pub(crate) fn skip_untouched(&self, pfn: Pfn, most_chunks: u64) -> Pfn {
        let first = pfn.get() >> HUGE_ORDER;
        let untouched = |nth: &u64| !matches!(self.chunks.get(index(*nth)), Some(Some(_)));
        let nr = (first..).take_while(untouched).take(index(most_chunks)).count() as u64;
        match nr {
            0 => pfn,
            _ => Pfn::new((first + nr) << HUGE_ORDER),
        }
    }

    /// Frames whose record is not all zeroes.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (Pfn, HypPage)> {
        let chunks = self.chunks.iter().enumerate();
        let pages = chunks.filter_map(|(nth, chunk)| Some((nth as u64, chunk.as_deref()?)));
        pages
            .flat_map(|(nth, chunk)| (nth * HUGE_PAGES..).map(Pfn::new).zip(chunk.iter().copied()))
            .filter(|&(pfn, page)| page != HypPage::default() && pfn < self.end)
    }

    /// How many bytes the records take.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn nr_bytes(&self) -> usize {
        let made = self.chunks.iter().flatten().count();
        made * size_of::<Chunk>() + self.chunks.len() * size_of::<Option<Box<Chunk>>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_untouched_frame_is_the_hosts_and_all_zeroes() {
        let mut page = HypPage::default();
        assert_eq!((page.host(), page.hyp(), page.states), (State::Owned, State::NoPage, 0));
        let all = [State::Owned, State::SharedOwned, State::SharedBorrowed, State::NoPage];
        for (host, hyp) in all.iter().flat_map(|&host| all.map(|hyp| (host, hyp))) {
            page.set_host(host);
            page.set_hyp(hyp);
            assert_eq!((page.host(), page.hyp()), (host, hyp));
        }
    }

    #[test]
    fn a_tib_of_untouched_frames_costs_little() {
        let mut pages = HypPages::new(Pfn::new(1 << 28));
        let idle = pages.nr_bytes();
        assert!(idle <= 1 << 22, "{idle}");
        pages.update(Pfn::new(1 << 27), |page| page.nr_guests = 3);
        assert_eq!(pages.nr_bytes(), idle + 4096);
        assert_eq!(pages.get(Pfn::new(1 << 27)).nr_guests, 3);
        assert_eq!(pages.touched().map(|(pfn, _)| pfn).collect::<Vec<_>>(), [Pfn::new(1 << 27)]);
        pages.update(Pfn::new(u64::MAX), |page| page.nr_guests = 1);
        assert_eq!(pages.get(Pfn::new(u64::MAX)), HypPage::default(), "no memory, no record");
    }
}
