//! A pool under several threads: who takes, who gives back, who scrubs, who touches first. The lock, the
//! arithmetic and the folio map are the library's; bytes are real.
//!
//! Judges: a frame's mark is where its owner left it; two owners of a frame race at its cell; the counters
//! add up in the end; a sleeper whom nobody wakes is a deadlock, which loom finds.

use std::sync::Arc;

use gmem::addr::{Pfn, Pgoff};
use gmem::error::ErrorKind;
use gmem::geometry::FolioSize;
use gmem::modelled::Flaw;
use gmem::modelled_pool::{Guest, Look, Mark, Scrubber, counted, give_up_a_scrub, pool};
use gmem::{FolioPool, PoolStat};
use loom::thread;
use loom_tests::{Memory, explore, must_be_caught, must_notice};

use FolioSize::{Base, Huge2M};

/// Frames of 2 MiB.
const HUGE: u64 = 512;

fn pages(pool: &FolioPool) -> [u64; 4] {
    let PoolStat { capacity, free, reserved, used, dirty, .. } = counted(pool);
    assert_eq!(free.get() + reserved.get() + used.get(), capacity.get(), "frames are lost");
    [free, reserved, used, dirty].map(|size| size.whole_pages())
}

/// A frame that is had: nobody else writes to it, and it was zero.
fn use_up(guest: &Guest, memory: &Memory, pfn: Pfn, mark: u8) {
    assert!(guest.is_zero(pfn), "not scrubbed");
    let cell = Pgoff::new(pfn.get() % HUGE % 4);
    memory.write(cell, u64::from(mark));
    guest.write(pfn, Mark(mark));
    thread::yield_now();
    assert_eq!(guest.read(pfn), Some(Mark(mark)), "somebody else wrote");
    assert_eq!(memory.read(cell), u64::from(mark), "somebody else wrote");
}

fn take_and_give_back(guest: &Guest, memory: &Memory, mark: u8) {
    let pfn = guest.take().expect("promised");
    use_up(guest, memory, pfn, mark);
    guest.give_back(pfn);
}

/// Two who were promised a frame each, and one who was not, on three frames or two.
fn three_on(nr_frames: u64) {
    let pool = pool(nr_frames).unwrap();
    let memory = Arc::new(Memory::new(4, 0));
    let guests = [Some(1), Some(1), None].map(|nr| Guest::new(&pool, Base, nr).unwrap());
    let [one, two, greedy] = guests.clone();
    let of_one = memory.clone();
    let first = thread::spawn(move || take_and_give_back(&one, &of_one, 1));
    let of_two = memory.clone();
    let second = thread::spawn(move || {
        let pfn = two.take().expect("promised");
        use_up(&two, &of_two, pfn, 2);
    });
    match greedy.take() {
        Ok(pfn) => {
            assert!(nr_frames > 2, "took what was promised");
            use_up(&greedy, &memory, pfn, 3);
            greedy.give_back(pfn);
        }
        Err(error) => assert_eq!((error.kind(), nr_frames), (ErrorKind::Exhausted, 2)),
    }
    first.join().unwrap();
    second.join().unwrap();
    assert_eq!(pages(&pool), [nr_frames - 2, 1, 1, 0]);
    drop((guests, greedy));
}

/// Proves: nobody gets a frame that somebody else has, and none is lost, whoever takes and gives back
/// meanwhile.
#[test]
fn takes() {
    explore(|| three_on(3));
}

/// Proves: what is promised is there, whatever those take who were promised nothing.
#[test]
fn promises() {
    explore(|| three_on(2));
}

/// Seed: who was promised nothing takes what others were.
#[test]
fn canary_takes_what_is_promised() {
    must_notice(Flaw::TakesWhatIsPromised, "promised", &[2], |_| three_on(2));
}

/// A scrubber at work while the folio is wanted that came back dirty, by somebody who wants all of it, or a
/// frame of it.
fn scrubber_and(wanted: FolioSize) {
    let pool = pool(HUGE).unwrap();
    let memory = Memory::new(4, 0);
    let scrubber = Scrubber::of(&pool);
    let end = scrubber.dismissal(&pool);
    {
        let before = Guest::new(&pool, Huge2M, Some(1)).unwrap();
        let pfn = before.take().unwrap();
        before.write(pfn, Mark(9));
        before.give_back(pfn);
        assert_eq!(pages(&pool), [0, HUGE, 0, HUGE]);
    }
    let guest = Guest::new(&pool, wanted, Some(1)).unwrap();
    let scrubbing = thread::spawn(move || scrubber.run());
    let pfn = guest.take().expect("promised");
    use_up(&guest, &memory, pfn, 1);
    end();
    scrubbing.join().unwrap();
    assert_eq!(guest.read(pfn), Some(Mark(1)), "somebody else wrote");
    let taken = if wanted == Base { 1 } else { HUGE };
    let [free, reserved, used, _] = pages(&pool);
    assert_eq!([free, reserved, used], [HUGE - taken, 0, taken], "frames are lost");
}

/// Proves: a folio is scrubbed by its taker or by the scrubber, and had by one of the two at a time; the
/// scrubber ends when it is told to.
#[test]
fn scrubber_and_taker() {
    explore(|| scrubber_and(Huge2M));
}

/// Proves: the same where the taker wants a frame of the block only, and waits if the scrubber has it.
#[test]
fn scrubber_and_taker_of_a_part() {
    explore(|| scrubber_and(Base));
}

/// Seed: a block that is being scrubbed stays where others find it.
#[test]
fn canary_scrubs_in_place() {
    let symptom = "somebody else wrote|frames are lost|not scrubbed";
    must_notice(Flaw::ScrubsInPlace, symptom, &[2], |_| scrubber_and(Huge2M));
}

/// Seed: who waits is woken before the block is back.
#[test]
fn canary_wakes_before_it_is_back() {
    must_notice(Flaw::WakesBeforeItIsBack, "deadlock", &[2], |_| scrubber_and(Base));
}

/// Seed: the scrubber goes to sleep on what it saw before.
#[test]
fn canary_sleeps_on_old_news() {
    must_notice(Flaw::SleepsOnOldNews, "deadlock", &[2], |_| scrubber_and(Huge2M));
}

/// A dirty block in the hands of somebody who dies, while others want folios.
fn dead_scrubber() {
    let pool = pool(HUGE).unwrap();
    let memory = Memory::new(4, 0);
    let scrubber = Scrubber::of(&pool);
    {
        let before = Guest::new(&pool, Huge2M, Some(1)).unwrap();
        let pfn = before.take().unwrap();
        before.write(pfn, Mark(9));
        before.give_back(pfn);
    }
    drop(scrubber);
    let guest = Guest::new(&pool, Base, Some(2)).unwrap();
    let other = guest.clone();
    let of_pool = pool.clone();
    let dying = thread::spawn(move || give_up_a_scrub(&of_pool));
    let taker = thread::spawn(move || other.take().expect("promised"));
    let pfn = guest.take().expect("promised");
    use_up(&guest, &memory, pfn, 1);
    dying.join().unwrap();
    let second = taker.join().unwrap();
    assert_ne!(pfn, second, "one frame for two");
    assert_eq!(guest.read(second), Some(Mark(0)), "not scrubbed");
    assert_eq!(pages(&pool), [HUGE - 2, 0, 2, 0]);
}

/// Proves: what a thread had in hands when it died is there for the next one, and who waited for it is
/// woken.
#[test]
fn dying_scrubber_and_takers() {
    explore(dead_scrubber);
}

/// Seed: it stays in the hands of the dead.
#[test]
fn canary_keeps_what_was_not_scrubbed() {
    must_notice(Flaw::KeepsWhatWasNotScrubbed, "deadlock", &[2], |_| dead_scrubber());
}

/// Several threads that touch a folio first.
fn touches(nr_threads: u64, look: Look) {
    let pool = pool(2 * HUGE).unwrap();
    let guest = Guest::new(&pool, Huge2M, Some(2)).unwrap();
    let others: Vec<_> = (1..nr_threads)
        .map(|_| {
            let guest = guest.clone();
            thread::spawn(move || guest.touch(look, |_| ()).expect("promised"))
        })
        .collect();
    let pfn = guest.touch(look, |_| ()).expect("promised");
    for other in others {
        assert_eq!(other.join().unwrap(), pfn, "touched twice");
    }
    assert_eq!(guest.seen(), Some(pfn));
    assert_eq!(pages(&pool), [0, HUGE, HUGE, 0], "touched twice");
}

/// Proves: of two and of three who touch a huge folio first, one allocates it, and all have the same.
#[test]
fn first_touch() {
    explore(|| touches(2, Look::InTheLock));
    explore(|| touches(3, Look::InTheLock));
}

/// Seed: they look before they have the lock.
#[test]
fn canary_looks_before_the_lock() {
    must_be_caught("touched twice", || touches(2, Look::BeforeTheLock));
}

/// A touch, a punch and a touch.
fn touch_and_punch() {
    let pool = pool(HUGE).unwrap();
    let guest = Guest::new(&pool, Huge2M, Some(1)).unwrap();
    let toucher = guest.clone();
    let puncher = guest.clone();
    let touching = thread::spawn(move || toucher.touch(Look::InTheLock, |_| ()).is_ok());
    let punching = thread::spawn(move || puncher.punch().is_ok());
    guest.touch(Look::InTheLock, |_| ()).expect("promised");
    assert!(touching.join().unwrap() && punching.join().unwrap());
    let used = if guest.seen().is_some() { HUGE } else { 0 };
    assert_eq!(pages(&pool), [0, HUGE - used, used, 0]);
}

/// Proves: a punch between two touches gives back what it found, and the promise is good for the next.
#[test]
fn touches_and_a_punch() {
    explore(touch_and_punch);
}

/// A folio that is prepared and shown, while somebody looks for it without a lock.
fn shown() {
    let pool = pool(1).unwrap();
    let memory = Arc::new(Memory::new(1, 0));
    let guest = Guest::new(&pool, Base, Some(1)).unwrap();
    let (toucher, bytes) = (guest.clone(), memory.clone());
    let touching = thread::spawn(move || {
        toucher.touch(Look::InTheLock, |_| bytes.write(Pgoff::new(0), 7)).expect("promised")
    });
    if guest.seen().is_some() {
        assert_eq!(memory.read(Pgoff::new(0)), 7);
    }
    touching.join().unwrap();
}

/// Proves: who finds a folio without a lock finds what was done to it before it was shown.
#[test]
fn found_without_a_lock() {
    explore(shown);
}

/// Seed: it is shown by a relaxed store.
#[test]
fn canary_publishes_folios_early() {
    must_notice(Flaw::PublishesFoliosEarly, super::RACE, &[2], |_| shown());
}
