//! A guest's loads of eight bytes, against the least that a program can do for one.

use gmem::addr::{ByteSize, Ipa};
use gmem::error::Error;
use gmem::guest_only::GuestOnly;

use crate::Outcome;
use crate::harness::{Bench, Goal, Random};

const PAGE: u64 = 4096;
const WORDS: usize = 512;
/// Pages that have a line each.
pub(crate) const NR_CACHED: u64 = 64;
/// Pages of a guest that loads from one after the other, so that the last 64 are never the right ones. No more than that,
/// so that what is measured is the walk, and not the processor's own caches.
pub(crate) const NR_SPREAD: u64 = 1 << 10;

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["vcpu_load_hit", "vcpu_load_walk"]) {
        return Ok(());
    }
    let guest = guest(ByteSize::from_mib(1024))?;

    let (at, cache) = (addresses(NR_CACHED), BareCache::new());
    let (mut ours, mut theirs) = (Turn::default(), Turn::default());
    at.iter().for_each(|&at| assert!(guest.load_u64(at).is_some()));
    bench.row(
        "vcpu_load_hit",
        "bare_64_entry_array",
        Goal::AtMost(3.0),
        || guest.hit_u64(ours.next(&at)).expect("remembered"),
        || cache.load(theirs.next(&at)).expect("remembered"),
    );
    bench.row(
        "vcpu_load_hit_in_turn",
        "bare_64_entry_array_in_turn",
        Goal::None,
        || ours.wait_for(&at, |at| guest.hit_u64(at)).expect("remembered"),
        || theirs.wait_for(&at, |at| cache.load(at)).expect("remembered"),
    );

    let (at, table) = (addresses(NR_SPREAD), BareTable::new());
    let (mut ours, mut theirs) = (Turn::default(), Turn::default());
    // How long a walk takes: each has to wait for the one before. The row below says how many a core gets done, for the
    // peer's next walk begins before the last one ends.
    bench.row(
        "vcpu_load_walk",
        "bare_four_level_walk",
        Goal::AtMost(2.0),
        || ours.wait_for(&at, |at| guest.load_u64(at)).expect("mapped"),
        || theirs.wait_for(&at, |at| table.load(at)).expect("mapped"),
    );
    bench.row(
        "vcpu_load_walk_overlapping",
        "bare_four_level_walk_overlapping",
        Goal::None,
        || guest.load_u64(ours.next(&at)).expect("mapped"),
        || table.load(theirs.next(&at)).expect("mapped"),
    );
    bench.row(
        "vcpu_load_walk_by_cpu",
        "bare_four_level_walk",
        Goal::None,
        || ours.wait_for(&at, |at| guest.load_by_cpu_u64(at)).expect("mapped"),
        || theirs.wait_for(&at, |at| table.load(at)).expect("mapped"),
    );
    Ok(())
}

/// A guest of so many pages, at the end of a machine of so much memory.
pub(crate) fn guest(memory: ByteSize) -> Result<GuestOnly, Error> {
    GuestOnly::new(memory, ByteSize::from_pages(NR_SPREAD))
}

/// Where a guest of so many pages loads: a word of each, in no order.
pub(crate) fn addresses(nr_pages: u64) -> Vec<Ipa> {
    let mut random = Random::new();
    let mut pages: Vec<_> = (0..nr_pages).collect();
    for last in (1..pages.len()).rev() {
        pages.swap(last, random.below(last as u64 + 1) as usize);
    }
    let word = |page| Ipa::new(page * PAGE + 8 * random.below(WORDS as u64));
    pages.into_iter().map(word).collect()
}

/// One address after the other, round and round.
#[derive(Default)]
pub(crate) struct Turn(usize);

impl Turn {
    #[inline]
    pub(crate) fn next(&mut self, at: &[Ipa]) -> Ipa {
        self.0 = if self.0 + 1 < at.len() { self.0 + 1 } else { 0 };
        at[self.0]
    }

    /// The next address is not known before this word is, as where a guest follows pointers. All words are small.
    #[inline]
    pub(crate) fn wait_for(
        &mut self,
        at: &[Ipa],
        load: impl FnOnce(Ipa) -> Option<u64>,
    ) -> Option<u64> {
        let word = load(self.next(at))?;
        self.0 += (word >> 32) as usize;
        Some(word)
    }
}

/// A word of a frame: where the bytes of guests are.
fn word_of(memory: &[u64], frame: u64, at: Ipa) -> Option<u64> {
    memory.get(frame as usize * WORDS + at.in_page().get() as usize / 8).copied()
}

/// 64 pages and where they lead.
struct BareCache {
    lines: Vec<(u64, u64)>,
    memory: Vec<u64>,
}

impl BareCache {
    fn new() -> Self {
        let lines = (0..NR_CACHED).map(|page| (page, NR_CACHED - 1 - page)).collect();
        Self { lines, memory: vec![1; NR_CACHED as usize * WORDS] }
    }

    #[inline]
    fn load(&self, at: Ipa) -> Option<u64> {
        let page = at.gfn().get();
        let (tag, frame) = self.lines[(page % NR_CACHED) as usize];
        if tag == page { word_of(&self.memory, frame, at) } else { None }
    }
}

/// Four levels of tables of 512 words, all in one array. An entry is where the next table begins, or the frame, and one.
struct BareTable {
    entries: Vec<u64>,
    memory: Vec<u64>,
}

impl BareTable {
    fn new() -> Self {
        let mut table = Self { entries: vec![0; WORDS], memory: Vec::new() };
        for page in 0..NR_SPREAD {
            let mut base = 0;
            for shift in [27, 18, 9] {
                let at = base + (page >> shift) as usize % WORDS;
                if table.entries[at] == 0 {
                    table.entries[at] = table.entries.len() as u64 + 1;
                    table.entries.resize(table.entries.len() + WORDS, 0);
                }
                base = table.entries[at] as usize - 1;
            }
            table.entries[base + page as usize % WORDS] = NR_SPREAD - page;
        }
        table.memory = vec![1; NR_SPREAD as usize * WORDS];
        table
    }

    #[inline]
    fn load(&self, at: Ipa) -> Option<u64> {
        let page = at.gfn().get();
        let mut next = 0;
        for shift in [27, 18, 9, 0] {
            let entry = self.entries[next as usize + (page >> shift) as usize % WORDS];
            next = entry.checked_sub(1)?;
        }
        word_of(&self.memory, next, at)
    }
}
