mod dirty_homes;
mod no_home;

use super::*;
use crate::addr::ByteSize;
use crate::backing::ArenaBacking;
use crate::failpoint::{FailPoint, arm};
use crate::folio::PoolStat;

fn pool(nr_pages: u64) -> FolioPool {
    FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(nr_pages)).unwrap()
}

fn wanted(huge: u64, base: u64) -> Wanted<'static> {
    Wanted {
        blocks: Blocks { giant: 0, huge, base },
        zones: &[Zone::Normal],
        private: PrivatePlacement::MoveToNormal,
        placement: Placement::default(),
        commitment: Commitment::Reserved,
        account: None,
    }
}

fn overcommitted() -> Wanted<'static> {
    Wanted { commitment: Commitment::Overcommitted, ..wanted(1, 0) }
}

fn page(nr: u64) -> Pgoff {
    Pgoff::new(nr)
}

/// The counters, in pages; checks that they add up.
fn stat(pool: &FolioPool) -> [u64; 5] {
    let PoolStat { capacity, free, reserved, used, quarantined, poisoned, .. } = pool.stat();
    let parts = [free, reserved, used, quarantined, poisoned].map(ByteSize::whole_pages);
    assert_eq!(parts.iter().sum::<u64>(), capacity.whole_pages());
    parts
}

#[test]
fn a_promise_is_kept_whatever_others_take() {
    let pool = pool(3 * 512);
    let huge = pool.reserve(wanted(2, 0)).unwrap();
    let base = pool.reserve(wanted(0, 512)).unwrap();
    let error = pool.reserve(wanted(0, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("4096 bytes are missing"), "{error}");
    for nr in 0..512 {
        base.take(FolioSize::Base, page(nr), Side::Any).unwrap();
    }
    assert_eq!(
        base.take(FolioSize::Base, page(0), Side::Any).unwrap_err().kind(),
        ErrorKind::Exhausted
    );
    huge.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    huge.take(FolioSize::Huge2M, page(512), Side::Any).unwrap();
    assert_eq!(stat(&pool), [0, 0, 3 * 512, 0, 0]);
}

#[test]
fn what_comes_back_is_scrubbed_and_promised_again() {
    let pool = pool(512);
    let reservation = pool.reserve(wanted(1, 0)).unwrap();
    let pfn = reservation.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    pool.arena().write(pfn.pa(), b"secret").unwrap();
    reservation.give_back(pfn, FolioSize::Huge2M);
    assert_eq!(stat(&pool), [0, 512, 0, 0, 0]);
    assert_eq!(pool.verify_scrubbed(), Ok(FolioSize::Huge2M.bytes()));
    drop(reservation);
    assert_eq!(stat(&pool), [512, 0, 0, 0, 0]);
}

#[test]
fn giving_back_twice_changes_nothing() {
    let pool = pool(1024);
    let reservation = pool.reserve(wanted(2, 0)).unwrap();
    let pfn = reservation.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    reservation.give_back(pfn, FolioSize::Huge2M);
    let before = pool.stat();
    reservation.give_back(pfn, FolioSize::Huge2M);
    reservation.give_back_clean(Pfn::new(3));
    reservation.give_back_clean(Pfn::new(77_777));
    reservation.quarantine(pfn);
    assert_eq!(pool.stat(), before);
}

#[test]
fn quarantined_frames_are_neither_free_nor_used() {
    let pool = pool(512);
    let reservation = pool.reserve(wanted(1, 0)).unwrap();
    let pfn = reservation.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    reservation.quarantine(pfn);
    assert_eq!(stat(&pool), [0, 0, 0, 512, 0]);
    reservation.give_back(pfn, FolioSize::Huge2M);
    drop(reservation);
    assert_eq!(stat(&pool), [0, 0, 0, 512, 0]);
}

#[test]
fn an_object_is_one_run_of_frames_though_others_touch_first() {
    let pool = pool(8 * 512);
    let one = pool.reserve(wanted(3, 0)).unwrap();
    let two = pool.reserve(wanted(3, 0)).unwrap();
    let mut starts = [Vec::new(), Vec::new()];
    for nr in [2, 0, 1] {
        for (reservation, starts) in [&one, &two].into_iter().zip(&mut starts) {
            let pfn = reservation.take(FolioSize::Huge2M, page(nr * 512), Side::Any).unwrap();
            starts.push(pfn.get() - nr * 512);
        }
    }
    assert_eq!(starts, [[0; 3], [3 * 512; 3]]);
}

#[test]
fn who_overcommits_gets_what_nobody_was_promised() {
    let pool = pool(2 * 512);
    let greedy = pool.reserve(overcommitted()).unwrap();
    let careful = pool.reserve(wanted(1, 0)).unwrap();
    let pfn = greedy.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    let error = greedy.take(FolioSize::Huge2M, page(512), Side::Any).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(
        greedy.take(FolioSize::Base, page(512), Side::Any).unwrap_err().kind(),
        ErrorKind::Exhausted
    );
    careful.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    greedy.give_back(pfn, FolioSize::Huge2M);
    assert_eq!(stat(&pool), [512, 0, 512, 0, 0]);
}

#[test]
fn an_account_is_charged_for_promises_and_for_what_overcommits() {
    let pool = pool(4 * 512);
    let account = pool.open_account(Some(ByteSize::from_mib(4)));
    let on = |wanted: Wanted<'static>| Wanted { account: Some(account.clone()), ..wanted };
    let charged = || account.stat().charged.whole_pages();
    assert_eq!(pool.reserve(on(wanted(3, 0))).unwrap_err().kind(), ErrorKind::LimitReached);
    assert_eq!((charged(), stat(&pool)), (0, [2048, 0, 0, 0, 0]));
    let one = pool.reserve(on(wanted(1, 0))).unwrap();
    let two = pool.reserve(on(overcommitted())).unwrap();
    assert_eq!(charged(), 512);
    let pfn = two.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    assert_eq!((charged(), account.stat().used.whole_pages()), (1024, 512));
    let error = two.take(FolioSize::Base, page(512), Side::Any).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitReached);
    account.set_limit(None);
    let more = two.take(FolioSize::Base, page(512), Side::Any).unwrap();
    two.give_back(more, FolioSize::Base);
    two.give_back(pfn, FolioSize::Huge2M);
    one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    drop((one, two));
    assert_eq!((charged(), account.stat().peak.whole_pages()), (0, 1025));
    let elsewhere = self::pool(1).open_account(None);
    let error = pool.reserve(Wanted { account: Some(elsewhere), ..wanted(1, 0) }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_failed_frame_never_comes_again() {
    let pool = pool(2 * 512);
    pool.report_memory_failure(Pfn::new(600)).unwrap();
    pool.report_memory_failure(Pfn::new(600)).unwrap();
    assert_eq!(stat(&pool), [1023, 0, 0, 0, 1]);
    assert_eq!(pool.reserve(wanted(2, 0)).unwrap_err().kind(), ErrorKind::Exhausted);
    let one = pool.reserve(wanted(1, 500)).unwrap();
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    assert_eq!(pfn, Pfn::new(0));
    // In use: it stays where it is until the folio comes back.
    pool.report_memory_failure(Pfn::new(7)).unwrap();
    assert_eq!(stat(&pool), [11, 500, 511, 0, 2]);
    pool.arena().write(Pfn::new(8).pa(), b"secret").unwrap();
    one.give_back(pfn, FolioSize::Huge2M);
    assert_eq!(stat(&pool), [1022 - 500, 500, 0, 0, 2]);
    assert_eq!(
        one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap_err().kind(),
        ErrorKind::Exhausted
    );
    assert_eq!(pool.verify_scrubbed(), Ok(ByteSize::from_pages(1022)));
    drop(one);
    let rest = pool.reserve(wanted(0, 1022)).unwrap();
    for nr in 0..1022 {
        let pfn = rest.take(FolioSize::Base, page(nr), Side::Any).unwrap();
        assert!(![7, 600].contains(&pfn.get()));
    }
    let error = pool.report_memory_failure(Pfn::new(1024)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

#[test]
fn a_quarantined_frame_that_fails_is_counted_once() {
    let pool = pool(512);
    let one = pool.reserve(wanted(1, 0)).unwrap();
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    one.quarantine(pfn);
    pool.report_memory_failure(Pfn::new(9)).unwrap();
    assert_eq!(stat(&pool), [0, 0, 0, 511, 1]);
}

#[test]
fn with_a_scrubber_what_comes_back_is_dirty_until_somebody_takes_it() {
    let pool = pool(3 * 512);
    // It keeps nothing clean, so all is left to whoever takes it.
    let scrubber = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    let one = pool.reserve(wanted(3, 0)).unwrap();
    let taken: Vec<_> =
        (0..3).map(|nr| one.take(FolioSize::Huge2M, page(nr * 512), Side::Any).unwrap()).collect();
    for pfn in taken {
        pool.arena().write(pfn.pa(), b"secret").unwrap();
        one.give_back(pfn, FolioSize::Huge2M);
    }
    assert_eq!(pool.stat().dirty, ByteSize::from_mib(6));
    assert_eq!(stat(&pool), [0, 1536, 0, 0, 0]);
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    let frames = crate::range::PfnRange::new(pfn, 512).unwrap();
    assert_eq!(pool.arena().is_zero(frames), Ok(true));
    drop(one);
    // Base folios come out of dirty blocks, too.
    let two = pool.reserve(wanted(0, 3)).unwrap();
    for nr in 0..3 {
        let pfn = two.take(FolioSize::Base, page(nr), Side::Any).unwrap();
        let frame = crate::range::PfnRange::single(pfn).unwrap();
        assert_eq!(pool.arena().is_zero(frame), Ok(true));
    }
    assert_eq!(pool.stat().dirty, ByteSize::from_mib(2));
    pool.report_memory_failure(Pfn::new(3 * 512 - 1)).unwrap();
    assert_eq!(pool.stat().dirty, ByteSize::from_bytes(0));
    assert_eq!(stat(&pool), [1536 - 3 - 512 - 1, 0, 515, 0, 1]);
    assert!(pool.verify_scrubbed().is_ok());
    drop(scrubber);
}

#[test]
fn a_scrubber_cleans_as_much_as_it_is_to_keep() {
    let pool = pool(4 * 512);
    let one = pool.reserve(wanted(4, 0)).unwrap();
    let taken: Vec<_> =
        (0..4).map(|nr| one.take(FolioSize::Huge2M, page(nr * 512), Side::Any).unwrap()).collect();
    let scrubber = pool.start_scrubber(ByteSize::from_mib(4)).unwrap();
    for pfn in taken {
        pool.arena().write(pfn.pa(), b"secret").unwrap();
        one.give_back(pfn, FolioSize::Huge2M);
    }
    while pool.stat().dirty != ByteSize::from_mib(4) {
        assert!(scrubber.is_alive());
        std::thread::yield_now();
    }
    assert_eq!(pool.verify_scrubbed(), Ok(ByteSize::from_mib(4)));
    assert_eq!(pool.scrub(), ByteSize::from_mib(4));
    assert_eq!(pool.verify_scrubbed(), Ok(ByteSize::from_mib(8)));
}

/// A block that cannot be scrubbed is out of use, and the others are scrubbed all the same.
#[test]
fn a_scrub_that_fails_costs_one_block() {
    let pool = pool(4 * 512);
    let one = pool.reserve(wanted(3, 0)).unwrap();
    let scrubber = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    let folios = [0, 1, 2].map(|nr| one.take(FolioSize::Huge2M, page(nr * 512), Side::Any));
    folios.into_iter().for_each(|pfn| one.give_back(pfn.unwrap(), FolioSize::Huge2M));
    drop(scrubber);
    let armed = arm(FailPoint::Scrub, 1);
    assert_eq!(pool.scrub(), ByteSize::from_mib(4));
    assert!(armed.has_fired());
    assert_eq!(pool.stat().dirty, ByteSize::default());
    assert_eq!(stat(&pool), [0, 3 * 512, 0, 512, 0], "the promise takes what is left");
    drop(one);
    assert_eq!(pool.reserve(wanted(4, 0)).unwrap_err().kind(), ErrorKind::Exhausted);
    pool.reserve(wanted(3, 0)).unwrap();
}

/// Without memory to write something down nothing has changed, and the next attempt may succeed.
#[test]
fn what_cannot_be_written_down_does_not_happen() {
    let pool = pool(4 * 512);
    let account = pool.open_account(None);
    let on = |wanted: Wanted<'static>| Wanted { account: Some(account.clone()), ..wanted };
    let armed = arm(FailPoint::Record, 0);
    let error = pool.reserve(on(wanted(2, 0))).unwrap_err();
    assert_eq!((error.kind(), armed.has_fired()), (ErrorKind::Exhausted, true));
    assert_eq!((stat(&pool), account.stat().charged.get()), ([4 * 512, 0, 0, 0, 0], 0));
    let one = pool.reserve(on(wanted(2, 0))).unwrap();
    let two = pool.reserve(on(overcommitted())).unwrap();
    let before = (stat(&pool), account.stat());
    for owner in [&one, &two] {
        let armed = arm(FailPoint::Record, 0);
        let error = owner.take(FolioSize::Huge2M, page(0), Side::Any).unwrap_err();
        assert_eq!((error.kind(), armed.has_fired()), (ErrorKind::Exhausted, true));
        assert_eq!((stat(&pool), account.stat()), before);
    }
    drop(two);
    for nr in [0, 1] {
        one.take(FolioSize::Huge2M, page(nr * 512), Side::Any).unwrap();
    }
    assert_eq!(stat(&pool), [2 * 512, 0, 2 * 512, 0, 0]);
}

/// The peak is what was charged, not what was asked for.
#[test]
fn a_take_in_vain_leaves_no_peak() {
    let pool = pool(512);
    let account = pool.open_account(None);
    let careful = pool.reserve(wanted(0, 512)).unwrap();
    let greedy = Wanted { account: Some(account.clone()), ..overcommitted() };
    let greedy = pool.reserve(greedy).unwrap();
    let error = greedy.take(FolioSize::Huge2M, page(0), Side::Any).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(account.stat().peak.get(), 0);
    drop(careful);
}

#[test]
fn what_is_quarantined_is_used_by_nobody() {
    let pool = pool(512);
    let account = pool.open_account(None);
    let one = pool.reserve(Wanted { account: Some(account.clone()), ..wanted(1, 0) }).unwrap();
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    one.quarantine(pfn);
    one.quarantine(pfn);
    assert_eq!((account.stat().used.get(), stat(&pool)), (0, [0, 0, 0, 512, 0]));
}

/// A part that is named twice would be owed twice, and others' promises end with this one's.
#[test]
fn a_zone_that_is_named_twice_is_one() {
    let pool = pool(4 * 512);
    let zones = &[Zone::Normal, Zone::Normal];
    let twice = pool.reserve(Wanted { zones, ..wanted(6, 0) }).unwrap_err();
    assert_eq!(twice.to_string(), pool.reserve(wanted(6, 0)).unwrap_err().to_string());
    assert!(
        twice.to_string().contains("still promise 0, 4 or 2048; 4194304 bytes are missing"),
        "{twice}"
    );
    let one = pool.reserve(Wanted { zones, ..wanted(1, 0) }).unwrap();
    let two = pool.reserve(wanted(2, 0)).unwrap();
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    one.give_back(pfn, FolioSize::Huge2M);
    assert_eq!(stat(&pool), [512, 3 * 512, 0, 0, 0]);
    drop(one);
    assert_eq!(stat(&pool), [2 * 512, 2 * 512, 0, 0, 0]);
    drop(two);
}

/// Where there is a block to be scrubbed with a failed frame in it, and the scrub fails, nobody gets it.
#[test]
fn a_failed_frame_in_a_block_that_stays_dirty_is_not_handed_out() {
    let pool = pool(512);
    let one = pool.reserve(wanted(1, 0)).unwrap();
    let scrubber = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    let pfn = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap();
    one.give_back(pfn, FolioSize::Huge2M);
    let armed = arm(FailPoint::Scrub, 0);
    pool.report_memory_failure(Pfn::new(5)).unwrap();
    assert!(armed.has_fired());
    assert_eq!(stat(&pool), [0, 0, 0, 511, 1]);
    let error = one.take(FolioSize::Huge2M, page(0), Side::Any).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    pool.report_memory_failure(Pfn::new(6)).unwrap();
    drop((one, scrubber));
    assert_eq!(stat(&pool), [0, 0, 0, 510, 2]);
}

/// A frame that fails while a compaction has it out of everybody's reach does not come back with the rest.
#[test]
fn a_frame_that_fails_while_it_is_isolated_stays_out() {
    let mut frames = crate::folio::frames::Frames::new(512).unwrap();
    frames.take(FolioSize::Base, crate::folio::frames::Wish::default(), Promise::None, |_| None);
    let runs = frames.isolate(0, FolioSize::Huge2M).unwrap();
    let no = crate::folio::frames::IsQuarantined::No;
    assert_eq!(frames.poison(7, 1, no), Ok(true));
    for (start, nr_pages) in runs {
        frames.free_run(start, nr_pages);
    }
    assert_eq!((frames.free().pages(), frames.is_free(7), frames.is_free(8)), (510, false, true));
}

/// Of a page of 1 GiB that fails nothing is free, in whatever state its pieces are.
#[test]
fn a_failed_gib_is_in_no_map_in_pieces_either() {
    use crate::folio::frames::{Frames, IsQuarantined, Taken, Wish};
    let (huge, giant) = (FolioSize::Huge2M, FolioSize::Huge1G);
    for in_pieces in [true, false] {
        let mut frames = Frames::new(giant.nr_pages() + 512).unwrap();
        assert_eq!(frames.take(giant, Wish::default(), Promise::None, |_| None), Taken::Clean(0));
        frames.give_back_dirty(0, giant, Promise::None);
        let mut in_hands = None;
        if in_pieces {
            frames.next_dirty().unwrap();
            frames.cannot_be_scrubbed(0, giant, |_| ());
            let (clean, _) = frames.next_dirty().unwrap();
            frames.scrubbed(clean, huge);
            in_hands = frames.next_dirty();
        }
        assert_eq!(frames.free().pages(), giant.nr_pages() + 512);
        assert_eq!(frames.poison(0, giant.nr_pages(), IsQuarantined::No), Ok(true));
        assert_eq!(frames.dirty_around(0), None);
        in_hands.into_iter().for_each(|(start, size)| frames.scrubbed(start, size));
        assert_eq!((frames.free().pages(), frames.nr_dirty()), (512, 0), "{in_pieces}");
        assert_eq!(
            frames.take(huge, Wish::default(), Promise::None, |_| None),
            Taken::Clean(giant.nr_pages())
        );
        assert_eq!(frames.take(huge, Wish::default(), Promise::None, |_| None), Taken::Nothing);
    }
}
