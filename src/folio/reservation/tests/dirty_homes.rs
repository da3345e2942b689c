//! Where objects come to lie beside a scrubber, and what is there but waits for a scrub.

use super::*;
use crate::backing::PartSpec;
use crate::range::PfnRange;

const HUGE: FolioSize = FolioSize::Huge2M;
const GIANT: FolioSize = FolioSize::Huge1G;

fn take(reservation: &Reservation, nr: u64) -> Result<Pfn, Error> {
    reservation.take(HUGE, page(nr * 512), Side::Any)
}

fn giant(commitment: Commitment, nr: u64) -> Wanted<'static> {
    let blocks = Blocks { giant: nr, huge: 0, base: 0 };
    Wanted { blocks, commitment, ..wanted(0, 0) }
}

/// Makes folios dirty that are free now, and leaves the others clean.
fn make_dirty(pool: &FolioPool, size: FolioSize, which: impl Fn(u64) -> bool) {
    let nr = pool.stat().capacity.whole_pages() / size.nr_pages();
    let one = pool.reserve(Wanted { commitment: Commitment::Overcommitted, ..wanted(nr, 0) });
    let one = one.unwrap();
    let taken: Vec<Pfn> =
        (0..nr).map(|nr| one.take(size, page(nr * size.nr_pages()), Side::Any).unwrap()).collect();
    let (dirty, clean): (Vec<Pfn>, _) =
        taken.into_iter().partition(|pfn| which(pfn.get() / size.nr_pages()));
    clean.into_iter().for_each(|pfn| one.give_back_clean(pfn));
    let lazy = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    for pfn in &dirty {
        pool.arena().write(pfn.pa(), b"secret").unwrap();
        one.give_back(*pfn, size);
    }
    drop(lazy);
    assert_eq!(pool.stat().dirty.get(), size.bytes().get() * dirty.len() as u64);
}

/// Of a large folio each page in which somebody has written.
fn assert_clean(pool: &FolioPool, pfn: Pfn, size: FolioSize) {
    let step = size.nr_pages().min(512);
    for start in (pfn.get()..pfn.get() + size.nr_pages()).step_by(step as usize) {
        let frames = PfnRange::new(Pfn::new(start), if size == GIANT { 1 } else { step }).unwrap();
        assert_eq!(pool.arena().is_zero(frames), Ok(true));
    }
}

#[test]
fn a_guest_is_one_run_in_memory_that_waits_for_a_scrub() {
    for clean in [None, Some(0), Some(3), Some(7)] {
        let pool = pool(8 * 512);
        make_dirty(&pool, HUGE, |nr| Some(nr) != clean);
        let guest = pool.reserve(wanted(8, 0)).unwrap();
        for nr in [5, 0, 7, 2, 1, 6, 3, 4] {
            assert_eq!(take(&guest, nr), Ok(Pfn::new(nr * 512)), "{clean:?}");
            assert_clean(&pool, Pfn::new(nr * 512), HUGE);
        }
    }
}

/// If there is such a run.
#[test]
fn a_guest_is_where_all_is_clean() {
    let pool = pool(8 * 512);
    make_dirty(&pool, HUGE, |nr| nr < 4);
    let guest = pool.reserve(wanted(3, 0)).unwrap();
    assert_eq!([2, 0, 1].map(|nr| take(&guest, nr).unwrap().get()), [6, 4, 5].map(|nr| nr * 512));
    assert_eq!(pool.stat().dirty, ByteSize::from_mib(8), "nobody has scrubbed");
    let other = pool.reserve(wanted(3, 0)).unwrap();
    assert_eq!([2, 0, 1].map(|nr| take(&other, nr).unwrap().get()), [2, 0, 1].map(|nr| nr * 512));
}

#[test]
fn a_guest_of_small_folios_is_one_run_too() {
    let pool = pool(4 * 512);
    make_dirty(&pool, HUGE, |nr| nr != 2);
    let guest = pool.reserve(wanted(0, 4 * 512)).unwrap();
    for nr in [700, 0, 1500, 701, 2047] {
        let pfn = guest.take(FolioSize::Base, page(nr), Side::Any).unwrap();
        assert_eq!(pfn, Pfn::new(nr));
        assert_clean(&pool, pfn, FolioSize::Base);
    }
    assert_eq!(pool.stat().dirty, ByteSize::default());
}

/// What a scrubber has in hands is some guest's home as well, who waits for it.
#[test]
fn a_guest_is_one_run_though_a_scrubber_has_a_block_of_it() {
    for size in [HUGE, FolioSize::Base] {
        let pool = pool(4 * 512);
        make_dirty(&pool, HUGE, |nr| nr < 2);
        let (pfn, block) = pool.state().next_dirty().unwrap();
        assert_eq!((pfn, block), (Pfn::new(0), HUGE));
        let guest = pool.reserve(match size {
            FolioSize::Base => wanted(0, 4 * 512),
            _ => wanted(4, 0),
        });
        let guest = guest.unwrap();
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| guest.take(size, page(0), Side::Any).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!taker.is_finished(), "it waits");
            pool.scrub_in_hands(pfn, block);
            assert_eq!(taker.join().unwrap(), pfn);
        });
        assert_clean(&pool, pfn, size);
        assert_eq!(take_at(&guest, size, 512), Ok(Pfn::new(512)));
    }
}

fn take_at(guest: &Reservation, size: FolioSize, at: u64) -> Result<Pfn, Error> {
    guest.take(size, page(at), Side::Any)
}

/// A promise is worth more than somebody's home: it is not broken for it, dirty or not.
#[test]
fn a_dirty_home_is_nobodys_if_promises_would_suffer() {
    let pool = pool(2 * 512 + 8);
    make_dirty(&pool, HUGE, |_| true);
    let small = Wanted { commitment: Commitment::Overcommitted, ..wanted(0, 600) };
    let small = pool.reserve(small).unwrap();
    let large = pool.reserve(wanted(2, 0)).unwrap();
    let taken: Vec<Pfn> = (0..8).map(|nr| take_at(&small, FolioSize::Base, nr).unwrap()).collect();
    assert!(taken.iter().all(|pfn| pfn.get() >= 1024), "{taken:?}");
    assert_eq!(take_at(&small, FolioSize::Base, 8).unwrap_err().kind(), ErrorKind::Exhausted);
    assert_eq!(pool.stat().dirty, ByteSize::from_mib(4));
    assert!(take(&large, 0).is_ok() && take(&large, 1).is_ok());
}

/// 1 GiB that came back in one piece is broken where the next guest's home is in it.
#[test]
fn a_guest_is_one_run_in_a_large_folio_that_waits() {
    let pool = pool(1 << 18);
    make_dirty(&pool, GIANT, |_| true);
    let first = pool.reserve(wanted(512, 0)).unwrap();
    for nr in [511, 3, 256, 0, 255] {
        assert_eq!(take(&first, nr), Ok(Pfn::new(nr * 512)));
    }
    assert_clean(&pool, Pfn::new(3 * 512), HUGE);
}

/// 1 GiB of which half the pieces are clean and the others are not, for somebody who was promised nothing
/// and for somebody who is promised it only when it is in one piece.
#[test]
fn room_for_a_large_folio_is_there_in_pieces() {
    let pool = pool(1 << 18);
    for commitment in [Commitment::Overcommitted, Commitment::Reserved] {
        make_dirty(&pool, HUGE, |nr| nr % 64 == 0);
        let one = pool.reserve(giant(commitment, 1)).unwrap();
        let pfn = one.take(GIANT, page(0), Side::Any).unwrap();
        assert_clean(&pool, pfn, GIANT);
        assert_eq!(stat(&pool), [0, 0, 1 << 18, 0, 0]);
        one.give_back_clean(pfn);
    }
}

/// Nothing is scrubbed for somebody who gets nothing anyway.
#[test]
fn nothing_is_scrubbed_in_vain() {
    let pool = pool(1 << 18);
    make_dirty(&pool, HUGE, |nr| nr < 4);
    let dirty = pool.stat().dirty;
    let exhausted = |wanted| pool.reserve(wanted).unwrap_err().kind();
    assert_eq!(exhausted(giant(Commitment::Reserved, 2)), ErrorKind::Exhausted);
    assert_eq!(exhausted(wanted(513, 0)), ErrorKind::Exhausted);
    let careful = pool.reserve(wanted(0, 1)).unwrap();
    assert_eq!(exhausted(giant(Commitment::Reserved, 1)), ErrorKind::Exhausted);
    let greedy = pool.reserve(giant(Commitment::Overcommitted, 1)).unwrap();
    let error = greedy.take(GIANT, page(0), Side::Any).unwrap_err();
    assert_eq!((error.kind(), pool.stat().dirty), (ErrorKind::Exhausted, dirty));
    drop(careful);
    let pfn = greedy.take(GIANT, page(0), Side::Any).unwrap();
    assert_clean(&pool, pfn, GIANT);
}

/// The last piece is in a scrubber's hands, or is taken by somebody else while the others are scrubbed.
#[test]
fn a_large_folio_waits_for_its_last_piece_and_does_without_if_another_gets_it() {
    let pool = pool(1 << 18);
    for is_taken in [false, true] {
        make_dirty(&pool, HUGE, |nr| nr < 2);
        let large = pool.reserve(giant(Commitment::Overcommitted, 1)).unwrap();
        let small = pool.reserve(overcommitted()).unwrap();
        let (pfn, size) = pool.state().next_dirty().unwrap();
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| large.take(GIANT, page(0), Side::Any));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!taker.is_finished(), "it waits");
            assert_eq!(pool.stat().dirty, HUGE.bytes(), "what could be scrubbed is");
            let taken = is_taken.then(|| small.take(HUGE, page(0), Side::Any).unwrap());
            pool.scrub_in_hands(pfn, size);
            match (taken, taker.join().unwrap()) {
                (None, Ok(pfn)) => {
                    assert_clean(&pool, pfn, GIANT);
                    large.give_back_clean(pfn);
                }
                (Some(_), Err(error)) => assert_eq!(error.kind(), ErrorKind::Exhausted),
                other => panic!("{other:?}"),
            }
        });
    }
}

/// A block that cannot be scrubbed is fenced off, and the next one is tried. In the end there is none.
#[test]
fn who_scrubs_first_does_not_do_so_for_ever() {
    for nr_blocks in [1, 2] {
        let pool = pool(nr_blocks * 512);
        make_dirty(&pool, HUGE, |_| true);
        let one = pool.reserve(wanted(0, 4)).unwrap();
        let armed = arm(FailPoint::Scrub, 0);
        let taken = one.take(FolioSize::Base, page(0), Side::Any);
        assert!(armed.has_fired());
        if nr_blocks == 1 {
            assert_eq!(taken.unwrap_err().kind(), ErrorKind::Exhausted);
            assert_eq!(stat(&pool), [0, 0, 0, 512, 0]);
        } else {
            assert_eq!(taken, Ok(Pfn::new(512)));
            assert_eq!(stat(&pool), [508, 3, 1, 512, 0]);
        }
        assert!(pool.verify_scrubbed().is_ok());
    }
}

/// A home outside of the promise that somebody scrubs just now is waited for; what is elsewhere is no reason to go to
/// pieces, and that there is room in the promise neither.
#[test]
fn who_floats_waits_for_his_home() {
    let part = || PartSpec::new([ArenaBacking::Heap], ByteSize::from_pages(4 * 512));
    let builder = FolioPool::builder().part(part(), Zone::Movable).part(part(), Zone::Normal);
    let pool = builder.create().unwrap();
    let zones = &[Zone::Movable, Zone::Normal];
    let one = pool.reserve(Wanted { zones, ..wanted(2, 0) }).unwrap();
    let [home, next] = [0, 1].map(|nr| {
        let taken = one.take(HUGE, page(nr * 512), Side::SharedOnly).unwrap();
        assert_eq!(pool.zone_of(taken), Some(Zone::Movable));
        taken
    });
    assert_eq!(next.get(), home.get() + 512);
    let lazy = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    one.give_back(home, HUGE);
    drop(lazy);
    let (pfn, size) = pool.state().next_dirty().unwrap();
    assert_eq!(pfn, home);
    let again = || pool.state().take(one.key, HUGE, page(0), Side::SharedOnly);
    assert_eq!(again(), Ok(Got::Wait));
    pool.scrub_in_hands(pfn, size);
    assert_eq!(again(), Ok(Got::Clean(home)));
}
