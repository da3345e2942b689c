//! What is left in large blocks after a million random operations, without bytes.

use gmem::Commitment;
use gmem::addr::{ByteSize, Pfn, Pgoff};
use gmem::frames_only::{FramesOnly, Guest};
use gmem::geometry::FolioSize;

use crate::Outcome;
use crate::frames::Peer;
use crate::harness::{Bench, Random};

const GIB_PAGES: u64 = 1 << 18;
const NR_GIB: u64 = 16;
const NR_PAGES: u64 = NR_GIB * GIB_PAGES;
/// Four fifths.
const MOST_USED: u64 = NR_PAGES / 5 * 4;
const NR_OPERATIONS: u64 = 1_000_000;

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    if bench.wants("frag_objects") {
        objects()?;
    }
    for (name, huge_of_100, start) in [
        ("frag_mixed", 10, Start::Empty),
        ("frag_4k", 0, Start::Empty),
        ("frag_4k_from_full", 0, Start::Full),
    ] {
        if bench.wants(name) {
            anywhere(name, huge_of_100, start)?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    Empty,
    /// All in folios of 4 KiB, of which random ones then come back.
    Full,
}

/// An allocator of frames, ours or the peer's.
trait Frames {
    fn take(&mut self, order: u8) -> Option<u64>;
    fn give_back(&mut self, frame: u64, order: u8);
}

struct Ours {
    pool: FramesOnly,
    guest: Guest,
}

impl Ours {
    fn new() -> Outcome<Self> {
        let pool = FramesOnly::new(ByteSize::from_pages(NR_PAGES))?;
        // Less than 2 MiB has no home: it takes the lowest frames there are.
        let size = ByteSize::from_pages(1);
        let guest = pool.reserve(size, FolioSize::Base, Commitment::Overcommitted)?;
        Ok(Self { pool, guest })
    }
}

fn size(order: u8) -> FolioSize {
    if order == 0 { FolioSize::Base } else { FolioSize::Huge2M }
}

impl Frames for Ours {
    fn take(&mut self, order: u8) -> Option<u64> {
        self.pool.take(self.guest, size(order), Pgoff::new(0)).ok().map(Pfn::get)
    }

    fn give_back(&mut self, frame: u64, _order: u8) {
        self.pool.give_back(Pfn::new(frame));
    }
}

impl Frames for Peer {
    fn take(&mut self, order: u8) -> Option<u64> {
        self.lock().alloc(1 << order).map(|frame| frame as u64)
    }

    fn give_back(&mut self, frame: u64, order: u8) {
        self.lock().dealloc(frame as usize, 1 << order);
    }
}

#[derive(Default)]
struct Tally {
    used: u64,
    huge_asked: u64,
    huge_got: u64,
}

/// Random folios come and go at four fifths of use, wherever the allocator puts them.
fn churn(frames: &mut impl Frames, huge_of_100: u64, start: Start) -> Tally {
    let (mut random, mut live, mut tally) = (Random::new(), Vec::new(), Tally::default());
    if start == Start::Full {
        while let Some(frame) = frames.take(0) {
            live.push((frame, 0));
            tally.used += 1;
        }
        while tally.used > MOST_USED {
            let (frame, order) = live.swap_remove(random.below(live.len() as u64) as usize);
            frames.give_back(frame, order);
            tally.used -= 1 << order;
        }
    }
    let mut left = NR_OPERATIONS;
    let mut is_full = start == Start::Full;
    while left > 0 {
        // Filling up is no random operation.
        left -= u64::from(is_full);
        let order = if random.below(100) < huge_of_100 { 9 } else { 0 };
        if tally.used + (1 << order) > MOST_USED {
            is_full = true;
            let (frame, order) = live.swap_remove(random.below(live.len() as u64) as usize);
            frames.give_back(frame, order);
            tally.used -= 1 << order;
            continue;
        }
        let taken = frames.take(order);
        if order > 0 && is_full {
            tally.huge_asked += 1;
            tally.huge_got += u64::from(taken.is_some());
        }
        if let Some(frame) = taken {
            live.push((frame, order));
            tally.used += 1 << order;
        }
    }
    tally
}

/// How many folios of 2 MiB there are still to be had.
fn huge_left(frames: &mut impl Frames) -> u64 {
    std::iter::from_fn(|| frames.take(9)).count() as u64
}

fn anywhere(name: &str, huge_of_100: u64, start: Start) -> Outcome<()> {
    let mut ours = Ours::new()?;
    let tally = churn(&mut ours, huge_of_100, start);
    let (_, largest) = ours.pool.free();
    let mut peer = Peer::new();
    peer.lock().add_frame(0, NR_PAGES as usize);
    let theirs = churn(&mut peer, huge_of_100, start);
    report(name, &tally, largest, huge_left(&mut ours));
    let left = huge_left(&mut peer);
    println!(
        "# {name}: buddy_system_allocator: {left} more, with {:.1} % in use",
        theirs.used as f64 * 100.0 / NR_PAGES as f64
    );
    Ok(())
}

/// `ratio` is how much of what is free can be had as folios of 2 MiB.
fn report(name: &str, tally: &Tally, largest: ByteSize, left: u64) {
    let free = NR_PAGES - tally.used;
    let order = largest.whole_pages().checked_ilog2();
    let order = order.map_or_else(|| String::from("none"), |order| order.to_string());
    let ratio = left as f64 * 512.0 / free as f64;
    println!("row {name} ours={order} peer=- peer_ns=0 ratio={ratio:.6}");
    println!(
        "# {name}: largest free order {order}, with {:.1} % in use; {} of {} allocations of 2 MiB went well on the \
         way; {left} more do afterwards, of {} if what is free were in one piece",
        tally.used as f64 * 100.0 / NR_PAGES as f64,
        tally.huge_got,
        tally.huge_asked,
        free / 512,
    );
}

/// Objects, each of which wants its folios where its home is: half of them of 2 MiB, half of 4 KiB.
fn objects() -> Outcome<()> {
    let pool = FramesOnly::new(ByteSize::from_pages(NR_PAGES))?;
    let mut objects = Vec::new();
    for nr in 0..NR_GIB {
        let order: u8 = if nr % 2 == 0 { 9 } else { 0 };
        let size = ByteSize::from_pages(GIB_PAGES);
        let guest = pool.reserve(size, self::size(order), Commitment::Overcommitted)?;
        objects.push((guest, order, vec![None; (GIB_PAGES >> order) as usize]));
    }
    let (mut random, mut tally) = (Random::new(), Tally::default());
    let (mut left, mut is_full) = (NR_OPERATIONS, false);
    while left > 0 {
        // Within a folio of 2 MiB of four fifths, as soon as it has come that far.
        let takes = tally.used + 512 <= MOST_USED;
        is_full |= !takes;
        let (guest, order, slots) = &mut objects[random.below(NR_GIB) as usize];
        let slot = random.below(slots.len() as u64);
        let entry = &mut slots[slot as usize];
        match entry.take() {
            Some(pfn) if !takes => {
                pool.give_back(pfn);
                tally.used -= 1 << *order;
            }
            None if takes => {
                *entry = pool.take(*guest, self::size(*order), Pgoff::new(slot << *order)).ok();
                tally.used += u64::from(entry.is_some()) << *order;
                if *order > 0 && is_full {
                    tally.huge_asked += 1;
                    tally.huge_got += u64::from(entry.is_some());
                }
            }
            as_it_was => {
                *entry = as_it_was;
                continue;
            }
        }
        // Filling up is no random operation.
        left -= u64::from(is_full);
    }
    let (_, largest) = pool.free();
    let guest = objects[0].0;
    let more = || pool.take(guest, FolioSize::Huge2M, Pgoff::new(0)).ok();
    let more = std::iter::from_fn(more).count() as u64;
    report("frag_objects", &tally, largest, more);
    Ok(())
}
