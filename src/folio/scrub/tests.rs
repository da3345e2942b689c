use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::*;
use crate::addr::Pgoff;
use crate::backing::ArenaBacking;
use crate::failpoint::arm;
use crate::folio::frames::{Promise, Taken, Wish};
use crate::folio::owner::{Placement, PrivatePlacement, Side};
use crate::folio::part::Zone;
use crate::folio::reservation::{Commitment, Reservation, Wanted};

const HUGE: FolioSize = FolioSize::Huge2M;

fn pool(nr_huge: u64) -> FolioPool {
    FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2 * nr_huge)).unwrap()
}

fn reserve(pool: &FolioPool, nr_huge: u64, nr_base: u64) -> Reservation {
    let blocks = super::super::ledger::Blocks { giant: 0, huge: nr_huge, base: nr_base };
    let wanted = Wanted {
        blocks,
        zones: &[Zone::Normal],
        private: PrivatePlacement::MoveToNormal,
        placement: Placement::default(),
        commitment: Commitment::Reserved,
        account: None,
    };
    pool.reserve(wanted).unwrap()
}

fn take(reservation: &Reservation, nr: u64) -> Result<Pfn, Error> {
    reservation.take(HUGE, Pgoff::new(nr * HUGE_PAGES), Side::Any)
}

/// All of the pool written to, and dirty.
fn all_dirty(pool: &FolioPool) {
    let nr = pool.stat().capacity.whole_pages() / HUGE_PAGES;
    let writer = reserve(pool, nr, 0);
    let taken: Vec<Pfn> = (0..nr).map(|nr| take(&writer, nr).unwrap()).collect();
    let lazy = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    for pfn in taken {
        (0..HUGE_PAGES).for_each(|at| {
            pool.arena().write(Pfn::new(pfn.get() + at).pa(), &[0xaa; 8]).unwrap();
        });
        writer.give_back(pfn, HUGE);
    }
    drop(lazy);
    assert_eq!(pool.stat().dirty, pool.stat().capacity);
}

fn pages(stat: ByteSize) -> u64 {
    stat.whole_pages()
}

fn assert_adds_up(pool: &FolioPool) {
    let stat = pool.stat();
    let parts = [stat.free, stat.reserved, stat.used, stat.quarantined, stat.poisoned];
    assert_eq!(parts.map(pages).iter().sum::<u64>(), pages(stat.capacity), "{stat:?}");
    assert!(pool.verify_scrubbed().is_ok());
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let since = std::time::Instant::now();
    while !holds() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::yield_now();
    }
}

/// Whoever waits for a block in somebody's hands gets it when he dies, and scrubs it himself.
#[test]
fn who_waits_for_a_block_gets_it_from_a_dying_hand() {
    for size in [HUGE, FolioSize::Base] {
        let pool = pool(1);
        all_dirty(&pool);
        let one = match size {
            FolioSize::Base => reserve(&pool, 0, 1),
            _ => reserve(&pool, 1, 0),
        };
        let (pfn, block) = pool.state().next_dirty().unwrap();
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| one.take(size, Pgoff::new(0), Side::Any).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!taker.is_finished(), "it waits");
            let armed = arm(FailPoint::ScrubPanic, 0);
            let died = catch_unwind(AssertUnwindSafe(|| pool.scrub_in_hands(pfn, block)));
            assert!(died.is_err() && armed.has_fired());
            let got = taker.join().unwrap();
            let frames = PfnRange::new(got, size.nr_pages()).unwrap();
            assert_eq!(pool.arena().is_zero(frames), Ok(true));
        });
        assert_eq!(pool.stat().used, size.bytes());
        assert_adds_up(&pool);
    }
}

#[test]
fn a_scrubber_that_dies_leaves_its_block_to_the_others() {
    let pool = pool(4);
    all_dirty(&pool);
    let keep = ByteSize::from_mib(8);
    let mortal = {
        let _armed = arm(FailPoint::ScrubPanic, 1);
        pool.start_scrubber(keep).unwrap()
    };
    until("it dies", || !mortal.is_alive());
    let stat = pool.stat();
    assert_eq!((stat.dirty, stat.free), (ByteSize::from_mib(6), ByteSize::from_mib(8)));
    assert!(pool.state().scrubbers.is_empty(), "what comes back is scrubbed by whoever brings it");
    let heir = pool.start_scrubber(keep).unwrap();
    until("all is clean", || pool.stat().dirty == ByteSize::default());
    assert_eq!(pool.verify_scrubbed(), Ok(keep));
    drop((mortal, heir));

    // A sleeping one is woken by what a dying one leaves.
    all_dirty(&pool);
    let (pfn, size) = pool.state().next_dirty().unwrap();
    let sleeper = pool.start_scrubber(keep).unwrap();
    until("the rest is clean", || pool.stat().dirty == ByteSize::from_mib(2));
    std::thread::sleep(Duration::from_millis(20));
    let _armed = arm(FailPoint::ScrubPanic, 0);
    assert!(catch_unwind(AssertUnwindSafe(|| pool.scrub_in_hands(pfn, size))).is_err());
    until("the last one is", || pool.stat().dirty == ByteSize::default());
    assert!(sleeper.is_alive());
    assert_adds_up(&pool);
}

#[test]
fn a_scrubber_that_cannot_scrub_a_block_goes_on_with_the_others() {
    let pool = pool(4);
    all_dirty(&pool);
    let scrubber = {
        let _armed = arm(FailPoint::Scrub, 1);
        pool.start_scrubber(ByteSize::from_mib(8)).unwrap()
    };
    until("all is clean or out of use", || pool.stat().dirty == ByteSize::default());
    let stat = pool.stat();
    assert_eq!((stat.free, stat.quarantined), (ByteSize::from_mib(6), ByteSize::from_mib(2)));
    assert!(scrubber.is_alive());
    let all = reserve(&pool, 3, 0);
    let taken: Vec<Pfn> = (0..3).map(|nr| take(&all, nr).unwrap()).collect();
    assert!(!taken.contains(&Pfn::new(HUGE_PAGES)), "{taken:?}");
    assert_adds_up(&pool);
}

/// Of 1 GiB with a spot that cannot be scrubbed the rest is as good as before.
#[test]
fn of_a_large_block_that_cannot_be_scrubbed_one_piece_is_lost() {
    let pool = pool(512);
    let wanted = super::super::ledger::Blocks { giant: 1, huge: 0, base: 0 };
    pool.state().parts[0].frames.promise(wanted);
    let Taken::Clean(start) = pool.state().parts[0].frames.take(
        FolioSize::Huge1G,
        Wish::default(),
        Promise::Kept,
        |_| None,
    ) else {
        panic!("it is clean");
    };
    pool.state().parts[0].frames.give_back_dirty(start, FolioSize::Huge1G, Promise::None);
    let (pfn, size) = pool.state().next_dirty().unwrap();
    let scrubber = {
        let _armed = arm(FailPoint::Scrub, 77);
        pool.start_scrubber(ByteSize::from_mib(1024)).unwrap()
    };
    std::thread::sleep(Duration::from_millis(20));
    let armed = arm(FailPoint::Scrub, 0);
    assert_eq!((size, pool.scrub_in_hands(pfn, size)), (FolioSize::Huge1G, 0));
    assert!(armed.has_fired());
    until("all the pieces were tried", || pool.stat().dirty == ByteSize::default());
    drop(scrubber);
    let stat = pool.stat();
    assert_eq!((stat.free, stat.quarantined), (ByteSize::from_mib(1022), ByteSize::from_mib(2)));
}

#[test]
fn a_scrubber_keeps_up_with_those_who_take() {
    let pool = pool(6);
    all_dirty(&pool);
    let scrubber = pool.start_scrubber(ByteSize::from_mib(4)).unwrap();
    let one = reserve(&pool, 6, 0);
    for nr in 0..6 {
        let left = 6 - nr;
        until("so much is clean", || pages(pool.stat().dirty) == (left - 2.min(left)) * HUGE_PAGES);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(pages(pool.stat().dirty), (left - 2.min(left)) * HUGE_PAGES, "and no more");
        take(&one, nr).unwrap();
    }
    assert!(scrubber.is_alive());
    assert_adds_up(&pool);
}

/// A block cannot be handed out whole with a failed frame in it. If nobody scrubs around that, it is
/// not handed out at all.
#[test]
fn a_frame_that_fails_in_somebodys_hands_stays_out_whatever_becomes_of_the_scrub() {
    for fate in [None, Some(FailPoint::Scrub), Some(FailPoint::ScrubPanic)] {
        let pool = pool(2);
        all_dirty(&pool);
        let (pfn, size) = pool.state().next_dirty().unwrap();
        assert_eq!(pfn, Pfn::new(0));
        pool.report_memory_failure(Pfn::new(7)).unwrap();
        let armed = fate.map(|fate| arm(fate, 0));
        let _ = catch_unwind(AssertUnwindSafe(|| pool.scrub_in_hands(pfn, size)));
        assert!(armed.iter().all(crate::failpoint::Armed::has_fired));
        let quarantined = if fate.is_some() { 511 } else { 0 };
        let stat = pool.stat();
        assert_eq!((pages(stat.quarantined), pages(stat.poisoned)), (quarantined, 1), "{fate:?}");
        pool.report_memory_failure(Pfn::new(7)).unwrap();
        assert_adds_up(&pool);
        let nr_base = 511 - quarantined;
        let rest = reserve(&pool, 1, nr_base);
        assert_eq!(take(&rest, 0), Ok(Pfn::new(512)));
        for nr in 0..nr_base {
            let pfn = rest.take(FolioSize::Base, Pgoff::new(512 + nr), Side::Any).unwrap();
            assert!(pfn < Pfn::new(512) && pfn != Pfn::new(7));
            assert_eq!(pool.arena().is_zero(PfnRange::single(pfn).unwrap()), Ok(true));
        }
        assert_eq!(pages(pool.stat().free), 0);
        pool.report_memory_failure(Pfn::new(8)).unwrap();
        assert_eq!(pages(pool.stat().poisoned), 2);
        assert_adds_up(&pool);
    }
}

/// A frame that fails in a dirty block, where the scrub around it fails too.
#[test]
fn a_failed_frame_in_a_dirty_block_that_cannot_be_scrubbed() {
    let pool = pool(2);
    all_dirty(&pool);
    let _armed = arm(FailPoint::Scrub, 0);
    pool.report_memory_failure(Pfn::new(513)).unwrap();
    let stat = pool.stat();
    assert_eq!((pages(stat.quarantined), pages(stat.poisoned), pages(stat.dirty)), (511, 1, 512));
    assert_adds_up(&pool);
}

#[test]
fn a_scrub_that_fails_for_whoever_takes_or_gives_back_quarantines() {
    let pool = pool(3);
    all_dirty(&pool);
    let one = reserve(&pool, 3, 0);
    let armed = arm(FailPoint::Scrub, 0);
    let first = take(&one, 0).unwrap();
    assert!(armed.has_fired());
    assert_ne!(first, Pfn::new(0), "that is lost");
    let stat = pool.stat();
    assert_eq!([stat.quarantined, stat.over_promised].map(pages), [512; 2]);
    let taken = [first, take(&one, 1).unwrap()];
    assert_eq!(take(&one, 2).unwrap_err().kind(), ErrorKind::Exhausted, "one is missing");
    let armed = arm(FailPoint::Scrub, 0);
    one.give_back(taken[0], HUGE);
    assert!(armed.has_fired());
    assert_eq!(pages(pool.stat().quarantined), 1024);
    assert_eq!(take(&one, 0).unwrap_err().kind(), ErrorKind::Exhausted);
    one.give_back(taken[1], HUGE);
    assert_eq!(take(&one, 0), Ok(taken[1]));
    assert_adds_up(&pool);
}

/// One frame less than was promised: who comes first is served, and only the last one is not. The counter tells
/// as soon as the frame fails, and what nobody was promised fails first.
#[test]
fn a_failed_frame_costs_one_promise_and_not_all() {
    let pool = pool(4);
    let over = || pages(pool.stat().over_promised);
    let [one, two] = [reserve(&pool, 2, 0), reserve(&pool, 1, 0)];
    pool.report_memory_failure(Pfn::new(3 * 512)).unwrap();
    assert_eq!(over(), 0, "of what was free");
    pool.report_memory_failure(Pfn::new(700)).unwrap();
    assert_eq!(over(), 512);
    let taken = [take(&one, 0).unwrap(), take(&two, 0).unwrap()];
    assert_eq!(over(), 512);
    assert_eq!(take(&one, 1).unwrap_err().kind(), ErrorKind::Exhausted);
    two.give_back(taken[1], HUGE);
    assert_eq!(take(&one, 1), Ok(taken[1]));
    assert_eq!(take(&two, 0).unwrap_err().kind(), ErrorKind::Exhausted);
    assert_eq!(over(), 512);
    drop(two);
    assert_eq!(over(), 0, "nobody is owed more than there is");
    drop(one);
    assert_adds_up(&pool);
}

/// The same in a scrubber's hands, where it is known when they let go, and if the scrub fails.
#[test]
fn what_fails_in_hands_is_missing_when_they_let_go() {
    for fate in [None, Some(FailPoint::Scrub)] {
        let pool = pool(2);
        all_dirty(&pool);
        let one = reserve(&pool, 2, 0);
        let (pfn, size) = pool.state().next_dirty().unwrap();
        if fate.is_none() {
            pool.report_memory_failure(pfn).unwrap();
        }
        assert_eq!(pages(pool.stat().over_promised), 0);
        let _armed = fate.map(|fate| arm(fate, 0));
        pool.scrub_in_hands(pfn, size);
        assert_eq!(pages(pool.stat().over_promised), 512);
        assert_eq!(take(&one, 0), Ok(Pfn::new(512)));
        assert_eq!(take(&one, 1).unwrap_err().kind(), ErrorKind::Exhausted);
        assert_adds_up(&pool);
    }
}

/// A dirty folio that its taker cannot scrub is lost to the pool and not to him, whoever pays for it.
#[test]
fn who_takes_what_is_lost_has_his_promise_still() {
    for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
        let pool = pool(3);
        all_dirty(&pool);
        let account = pool.open_account(None);
        let (zones, private) = (&[Zone::Normal][..], PrivatePlacement::MoveToNormal);
        let blocks = super::super::ledger::Blocks { giant: 0, huge: 2, base: 0 };
        let wanted = Wanted {
            blocks,
            zones,
            private,
            placement: Placement::default(),
            commitment,
            account: Some(account.clone()),
        };
        let one = pool.reserve(wanted).unwrap();
        let armed = arm(FailPoint::Scrub, 0);
        let taken = [take(&one, 0).unwrap(), take(&one, 1).unwrap()];
        assert!(armed.has_fired());
        assert_eq!(taken, [Pfn::new(512), Pfn::new(1024)], "{commitment:?}");
        let stat = pool.stat();
        let found = [stat.free, stat.reserved, stat.used, stat.quarantined, stat.over_promised];
        assert_eq!(found.map(pages), [0, 0, 1024, 512, 0]);
        let paid = account.stat();
        assert_eq!([paid.used, paid.charged].map(pages), [1024; 2], "{commitment:?}");
        taken.into_iter().for_each(|pfn| one.give_back(pfn, HUGE));
        drop(one);
        let paid = account.stat();
        assert_eq!([paid.used, paid.charged].map(pages), [0; 2], "{commitment:?}");
        assert_adds_up(&pool);
    }
}

/// The same for who moves a folio, to whom nothing is promised again.
#[test]
fn a_move_to_what_is_lost_goes_elsewhere() {
    let pool = pool(4);
    all_dirty(&pool);
    let one = reserve(&pool, 1, 0);
    let old = take(&one, 0).unwrap();
    let armed = arm(FailPoint::Scrub, 0);
    let new = one.take_to(HUGE, Pgoff::new(0), (old, Zone::Normal)).unwrap();
    assert!(armed.has_fired());
    let stat = pool.stat();
    let found = [stat.free, stat.reserved, stat.used, stat.quarantined];
    assert_eq!(found.map(pages), [512, 0, 1024, 512]);
    one.moved_out(old, new, HUGE);
    assert_eq!(pages(pool.stat().reserved), 0);
    assert_adds_up(&pool);
}
