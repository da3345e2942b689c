//! Where folios lie that have no home: outside of all homes, so that no guest is in pieces for their sake.

use super::*;

const HUGE: FolioSize = FolioSize::Huge2M;
const BASE: FolioSize = FolioSize::Base;

fn take_all(reservation: &Reservation, order: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    let take = |nr| reservation.take(HUGE, page(nr * 512), Side::Any).unwrap().get() / 512;
    order.into_iter().map(|nr| (nr, take(nr))).collect()
}

fn is_one_run(taken: &[(u64, u64)]) -> bool {
    taken
        .windows(2)
        .all(|pair| pair[0].1.wrapping_sub(pair[0].0) == pair[1].1.wrapping_sub(pair[1].0))
}

#[test]
fn small_objects_lie_together_in_nobodys_home() {
    let pool = pool(16 * 512);
    let first = pool.reserve(wanted(6, 0)).unwrap();
    let second = pool.reserve(wanted(6, 0)).unwrap();
    let small: Vec<_> = (0..500).map(|_| pool.reserve(wanted(0, 1)).unwrap()).collect();
    let frames: Vec<_> =
        small.iter().map(|one| one.take(BASE, page(0), Side::Any).unwrap().get()).collect();
    assert!(frames.iter().all(|frame| frame / 512 == frames[0] / 512), "{frames:?}");
    for guest in [&first, &second] {
        let taken = take_all(guest, [5, 0, 3, 1, 4, 2]);
        assert!(is_one_run(&taken), "{taken:?}");
    }
}

/// A guest in folios of 4 KiB has broken blocks of its own home; the holes that it leaves there are for itself.
#[test]
fn a_broken_home_is_not_filled_by_others() {
    let pool = pool(8 * 512);
    let guest = pool.reserve(wanted(0, 1024)).unwrap();
    let start = guest.take(BASE, page(0), Side::Any).unwrap().get();
    let small = pool.reserve(wanted(0, 3)).unwrap();
    for nr in 0..3 {
        let frame = small.take(BASE, page(nr), Side::Any).unwrap().get();
        assert!(!(start..start + 1024).contains(&frame), "{frame}");
    }
    for nr in (1..1024).rev() {
        assert_eq!(guest.take(BASE, page(nr), Side::Any).unwrap().get(), start + nr);
    }
}

#[test]
fn who_overcommits_more_than_there_is_stays_out_of_homes_and_is_one_run() {
    let pool = pool(16 * 512);
    let guest = pool.reserve(wanted(6, 0)).unwrap();
    let large = Wanted { commitment: Commitment::Overcommitted, ..wanted(100, 0) };
    let large = pool.reserve(large).unwrap();
    let taken = take_all(&large, 0..10);
    assert!(is_one_run(&taken), "{taken:?}");
    assert!(is_one_run(&take_all(&guest, (0..6).rev())));
}

/// All is somebody's home, so a small one goes where there is room, and is not refused.
#[test]
fn without_such_a_place_any_will_do() {
    let pool = pool(2 * 512);
    let guest = pool.reserve(wanted(2, 0)).unwrap();
    let small = Wanted { commitment: Commitment::Overcommitted, ..wanted(0, 1) };
    let small = pool.reserve(small).unwrap();
    // Promised to the guest, all of it.
    assert!(small.take(BASE, page(0), Side::Any).is_err());
    drop(guest);
    small.take(BASE, page(0), Side::Any).unwrap();
}

#[test]
fn common_blocks_that_are_empty_again_can_be_homes() {
    let pool = pool(4 * 512);
    let small = pool.reserve(wanted(0, 600)).unwrap();
    let frames: Vec<_> =
        (0..511).map(|nr| small.take(BASE, page(nr), Side::Any).unwrap()).collect();
    frames.into_iter().for_each(|pfn| small.give_back(pfn, BASE));
    drop(small);
    let guest = pool.reserve(wanted(4, 0)).unwrap();
    assert!(is_one_run(&take_all(&guest, [3, 1, 2, 0])));
}

/// Full blocks are passed over, and used again when there is room in them.
#[test]
fn room_in_common_blocks_comes_before_new_ones() {
    let pool = pool(64 * 512);
    let guest = pool.reserve(wanted(0, 512 * 20)).unwrap();
    let small: Vec<_> = (0..3).map(|_| pool.reserve(wanted(0, 511)).unwrap()).collect();
    let mut frames = Vec::new();
    for one in &small {
        frames.extend((0..511).map(|nr| (one, one.take(BASE, page(nr), Side::Any).unwrap())));
    }
    let blocks = |frames: &[(&Reservation, Pfn)]| {
        let mut blocks: Vec<_> = frames.iter().map(|(_, pfn)| pfn.get() / 512).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    };
    let before = blocks(&frames);
    assert_eq!(before.len(), 3);
    for at in [700, 20] {
        let (one, pfn) = frames.swap_remove(at);
        one.give_back(pfn, BASE);
    }
    let more = pool.reserve(wanted(0, 5)).unwrap();
    for nr in 0..5 {
        let pfn = more.take(BASE, page(nr), Side::Any).unwrap();
        frames.push((&more, pfn));
    }
    assert_eq!(blocks(&frames), before, "1,533 pages and 3 of 5 more fill 3 blocks");
    drop(guest);
}

/// Who would rather have it at once than in one run.
#[test]
fn a_clean_folio_elsewhere_can_come_before_a_dirty_one_at_home() {
    for placement in [Placement::Contiguous, Placement::CleanFirst] {
        let pool = pool(8 * 512);
        let guest = pool.reserve(Wanted { placement, ..wanted(4, 0) }).unwrap();
        let scrubber = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
        let taken = take_all(&guest, 0..4);
        guest.give_back(Pfn::new(taken[1].1 * 512), HUGE);
        assert_eq!(pool.stat().dirty, ByteSize::from_mib(2));
        let again = take_all(&guest, [1]);
        let (dirty, same) = match placement {
            Placement::Contiguous => (0, true),
            Placement::CleanFirst => (2, false),
        };
        assert_eq!(pool.stat().dirty, ByteSize::from_mib(dirty), "{placement:?}");
        assert_eq!(again[0] == taken[1], same, "{placement:?}");
        // When nothing clean is left, home it is.
        let rest = pool.reserve(wanted(3, 0)).unwrap();
        take_all(&rest, 0..3);
        let last = pool.reserve(Wanted { placement, ..wanted(1, 0) });
        match placement {
            Placement::Contiguous => drop(take_all(&last.unwrap(), [0])),
            Placement::CleanFirst => assert_eq!(take_all(&last.unwrap(), [0])[0].1, taken[1].1),
        }
        drop(scrubber);
    }
}
