//! Memory that changes hands between extents, and who has a frame.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;

use gmem::addr::{ByteSize, Gfn, Pfn};
use gmem::hyp::extents_only::{ExtentsOnly, OwnersOnly};
use gmem::range::PfnRange;

use crate::Outcome;
use crate::bare::BareTree;
use crate::harness::{Bench, Goal, Random};
use crate::machine::GIB_PAGES;

const HUGE: u64 = 512;
/// Blocks that are known page by page: as many as a GiB has.
const NR_BLOCKS: u64 = GIB_PAGES / HUGE;
/// Pages that are looked up.
const NR_LOOKED_UP: u64 = 1 << 16;

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    moves(bench)?;
    lookups(bench)
}

/// What memory goes through on one way and back.
type Way = fn(&mut ExtentsOnly, PfnRange, Gfn);

const WAYS: [(&str, Way); 2] = [
    ("parcel", |machine, frames, at| machine.lend_and_reclaim(frames, at).expect("possible")),
    ("demand", |machine, frames, at| machine.provide_and_reclaim(frames, at).expect("possible")),
];

/// From the host to the VM and back. The peer has a map by number, once for each side: out of one, into the other, and back.
fn moves(bench: Bench) -> Outcome<()> {
    let sizes = [("4k", 1), ("2m", HUGE)];
    let names = WAYS.map(|(way, _)| sizes.map(|(size, _)| format!("{way}_{size}"))).concat();
    if !bench.wants_any(&names.iter().map(String::as_str).collect::<Vec<_>>()) {
        return Ok(());
    }
    let boot = ExtentsOnly::boot(ByteSize::from_pages(GIB_PAGES));
    let machine = RefCell::new(boot.map_err(|errno| format!("boot: {errno}"))?);
    for (way, act) in WAYS {
        for (size, nr) in sizes {
            let (mut ours, mut theirs) = (Random::new(), Random::new());
            let mut maps: [BTreeMap<u64, u64>; 2] = Default::default();
            maps[0].extend((0..NR_BLOCKS).map(|nth| (nth, 0)));
            bench.slower(40).row(
                &format!("{way}_{size}"),
                "two_maps",
                Goal::None,
                || {
                    let pfn = ours.below(NR_BLOCKS) * HUGE;
                    let frames = PfnRange::new(Pfn::new(pfn), nr).expect("it is in the machine");
                    act(&mut machine.borrow_mut(), frames, Gfn::new(pfn));
                },
                || {
                    let nth = theirs.below(NR_BLOCKS);
                    for [from, to] in [[0, 1], [1, 0]] {
                        let owner = maps[from].remove(&nth).expect("it is there");
                        maps[to].insert(nth, black_box(owner));
                    }
                },
            );
        }
    }
    assert_eq!(machine.borrow().check(), Vec::<String>::new());
    Ok(())
}

/// A machine, the pages that are looked up in it, and which is next.
struct Owners {
    owners: OwnersOnly,
    pages: Vec<u64>,
    next: usize,
}

impl Owners {
    /// Blocks are anywhere in a machine of that size.
    fn new(nr_gib: u64) -> Outcome<Self> {
        let mut random = Random::new();
        let span = nr_gib * GIB_PAGES / NR_BLOCKS;
        let blocks: Vec<u64> =
            (0..NR_BLOCKS).map(|nth| nth * span + random.below(span / HUGE) * HUGE).collect();
        let memory = PfnRange::new(Pfn::new(0), nr_gib * GIB_PAGES)?;
        let owners = OwnersOnly::new(memory, blocks.iter().map(|&block| Pfn::new(block)));
        let owners = owners.map_err(|errno| format!("owners: {errno}"))?;
        let mut page = |_| blocks[random.below(NR_BLOCKS) as usize] + random.below(HUGE);
        Ok(Self { owners, pages: (0..NR_LOOKED_UP).map(&mut page).collect(), next: 0 })
    }

    /// Looks the next page up. Which one that is waits for what was found before.
    #[inline]
    fn turn(&mut self, found: impl FnOnce(&OwnersOnly, u64) -> bool) -> bool {
        let found = found(&self.owners, self.pages[self.next]);
        self.next = (self.next + 1 + usize::from(found)) % self.pages.len();
        found
    }
}

fn lookups(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["owner_lookup", "growth_owner_lookup"]) {
        return Ok(());
    }
    let look = |owners: &OwnersOnly, page| owners.is_of_extent(Pfn::new(page));
    let (mut small, mut large, mut bare) = (Owners::new(1)?, Owners::new(1024)?, Owners::new(1)?);
    let mut tree = BareTree::new(bare.pages.iter().copied());
    bench.row(
        "owner_lookup",
        "bare_walk",
        Goal::None,
        || small.turn(look),
        || bare.turn(|_, page| *tree.entry(page) != 0),
    );
    bench.row(
        "growth_owner_lookup",
        "1_gib",
        Goal::AtMost(1.5),
        || large.turn(look),
        || small.turn(look),
    );
    Ok(())
}
