//! A host of up to 12 TiB and 1,000 guests, without bytes: how what it costs grows with its size.

use std::time::Instant;

use gmem::Commitment;
use gmem::addr::{ByteSize, Pfn, Pgoff};
use gmem::frames_only::{FramesOnly, Guest};
use gmem::geometry::FolioSize;

use crate::harness::{Bench, Goal, Random, median, print_row};
use crate::{Outcome, kib_of_status};

const GIB: u64 = 1 << 30;
const IN_FOLIO: u64 = 512;
/// What a guest has: its memory in folios of 2 MiB, and its firmware in pages of 4 KiB at the end.
const NR_FOLIOS: u64 = 11 * 512;
const NR_TAIL: u64 = 500;

struct Object {
    guest: Guest,
    folios: Vec<Option<Pfn>>,
    tail: Vec<Option<Pfn>>,
}

/// What a host of one size cost.
struct Cost {
    /// A folio of 2 MiB that is given back or taken, in nanoseconds.
    operation: f64,
    /// A page of 4 KiB.
    small: f64,
    /// A guest that is promised its memory.
    reserve: f64,
    metadata: f64,
}

pub(crate) fn rows(bench: Bench, quick: bool) -> Outcome<()> {
    let sizes =
        [("12gib", 12, 1), ("120gib", 120, 10), ("1200gib", 1200, 100), ("12tib", 12288, 1000)];
    let mut first = None;
    for (name, nr_gib, nr_guests) in sizes {
        if !bench.wants(&format!("host_{name}")) && first.is_some() {
            continue;
        }
        if !bench.wants_any(
            &sizes.map(|(name, ..)| format!("host_{name}")).each_ref().map(String::as_str),
        ) {
            return Ok(());
        }
        let cost = simulate(name, nr_gib, nr_guests, if quick { 400_000 } else { 4_000_000 })?;
        let base = first.get_or_insert(Cost { ..cost });
        let row = |what: &str, ours: f64, theirs: f64| {
            print_row(
                &format!("host_{name}_{what}"),
                ours,
                "host_12gib",
                theirs,
                ours / theirs,
                Goal::None,
            );
        };
        row("folio", cost.operation, base.operation);
        row("page", cost.small, base.small);
        row("new_guest", cost.reserve, base.reserve);
        row("metadata_per_gib", cost.metadata, base.metadata);
    }
    Ok(())
}

fn reserve(pool: &FramesOnly) -> Outcome<Guest> {
    let size = ByteSize::from_pages(NR_FOLIOS * IN_FOLIO + NR_TAIL);
    Ok(pool.reserve(size, FolioSize::Huge2M, Commitment::Reserved)?)
}

impl Object {
    fn new(guest: Guest) -> Self {
        let (folios, tail) = (vec![None; NR_FOLIOS as usize], vec![None; NR_TAIL as usize]);
        Self { guest, folios, tail }
    }

    /// Gives a folio back, or takes it.
    fn turn(&mut self, pool: &FramesOnly, slot: u64) {
        let entry = &mut self.folios[slot as usize];
        *entry = match entry.take() {
            Some(pfn) => {
                pool.give_back(pfn);
                None
            }
            None => pool.take(self.guest, FolioSize::Huge2M, Pgoff::new(slot * IN_FOLIO)).ok(),
        };
    }

    /// The same with a page of 4 KiB.
    fn turn_small(&mut self, pool: &FramesOnly, slot: u64) {
        let entry = &mut self.tail[slot as usize];
        *entry = match entry.take() {
            Some(pfn) => {
                pool.give_back(pfn);
                None
            }
            None => {
                let page = Pgoff::new(NR_FOLIOS * IN_FOLIO + slot);
                pool.take(self.guest, FolioSize::Base, page).ok()
            }
        };
    }

    fn end(self, pool: &FramesOnly) {
        self.folios.into_iter().chain(self.tail).flatten().for_each(|pfn| pool.give_back(pfn));
        pool.leave(self.guest);
    }
}

fn simulate(name: &str, nr_gib: u64, nr_guests: u64, nr_operations: u32) -> Outcome<Cost> {
    let rss_before = kib_of_status("RssAnon:")?;
    let start = Instant::now();
    let pool = FramesOnly::new(ByteSize::from_bytes(nr_gib * GIB))?;
    let made = start.elapsed();
    let mut random = Random::new();
    let objects: Outcome<Vec<_>> =
        (0..nr_guests).map(|_| Ok(Object::new(reserve(&pool)?))).collect();
    let mut objects = objects?;
    let start = Instant::now();
    // Four of five folios are in use, and all of the firmware.
    for object in &mut objects {
        for slot in (0..NR_FOLIOS).filter(|_| random.below(5) != 0) {
            object.turn(&pool, slot);
        }
        (0..NR_TAIL).for_each(|slot| object.turn_small(&pool, slot));
    }
    let filled = start.elapsed();

    let per_operation = |start: Instant, nr: u32| start.elapsed().as_nanos() as f64 / f64::from(nr);
    let start = Instant::now();
    for _ in 0..nr_operations {
        let object = &mut objects[random.below(nr_guests) as usize];
        object.turn(&pool, random.below(NR_FOLIOS));
    }
    let operation = per_operation(start, nr_operations);
    let start = Instant::now();
    for _ in 0..nr_operations {
        let object = &mut objects[random.below(nr_guests) as usize];
        object.turn_small(&pool, random.below(NR_TAIL));
    }
    let small = per_operation(start, nr_operations);

    // Guests go and others come.
    let mut reserves = Vec::new();
    for _ in 0..100 {
        let gone = random.below(nr_guests) as usize;
        objects.swap_remove(gone).end(&pool);
        let start = Instant::now();
        let guest = reserve(&pool)?;
        reserves.push(per_operation(start, 1));
        objects.push(Object::new(guest));
        let object = objects.last_mut().ok_or("no object")?;
        (0..NR_FOLIOS).filter(|_| random.below(5) != 0).for_each(|slot| object.turn(&pool, slot));
    }
    let longest = reserves.iter().copied().fold(0.0, f64::max);
    let (metadata, (free, largest)) = (pool.metadata(), pool.free());
    let grown = kib_of_status("RssAnon:")?.saturating_sub(rss_before);
    println!(
        "# host_{name}: {nr_guests} guests; {:.2} million operations per second on folios, {:.2} on pages; made in \
         {} ms, filled in {} ms; longest reserve {:.0} us; {} MiB of metadata, the process has grown by {} MiB; {} \
         GiB free, largest block {} MiB",
        1e3 / operation,
        1e3 / small,
        made.as_millis(),
        filled.as_millis(),
        longest / 1e3,
        metadata.get() >> 20,
        grown >> 10,
        free.get() >> 30,
        largest.get() >> 20,
    );
    let reserve = median(reserves);
    Ok(Cost { operation, small, reserve, metadata: metadata.get() as f64 / nr_gib as f64 })
}
