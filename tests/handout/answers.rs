//! What becomes of a conversion whose subscriber refuses, does not answer, answers too late, leaves or
//! breaks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Offset};
use gmem::error::{Errno, ErrorKind};
use gmem::{Heard, OnSilence, Standing};

use super::{Book, Mood, PRESERVE, PRIVATE, SHARED, SHORT, lock, object, on_side, options, range};

/// Longer than any test: what takes that long has not ended by itself.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_refusal_on_either_side_undoes_everything_and_says_who() {
    for (side, to) in [(SHARED, PRIVATE), (PRIVATE, SHARED)] {
        let (_pool, memfd) = object(16);
        let _ = memfd.convert(memfd.pages(), side, PRESERVE).unwrap();
        let books = [Book::new(), Book::new(), Book::new()];
        let subscribe = |book: &Arc<Book>| {
            memfd.subscribe_with(Arc::clone(book) as _, options().side(side)).unwrap()
        };
        let _all: Vec<_> = books.iter().map(subscribe).collect();
        books[1].is(Mood::Refuse);
        for book in &books {
            book.calls();
        }
        let error = memfd.convert(range(3, 4), to, PRESERVE).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::SubscriberRefused, Errno::EBUSY));
        assert!(error.to_string().contains("vfio0 does not let go"), "{error}");
        assert_eq!(on_side(&memfd, side).len(), 16);
        assert_eq!(books[0].calls(), [("revoke", 4), ("grant", 4)]);
        assert_eq!(books[1].calls(), [("revoke", 4)]);
        assert_eq!(books[2].calls(), [("revoke", 4), ("grant", 4)]);
        assert!(books.iter().all(|book| book.pages().len() == 16));
        books[1].is(Mood::LetGo);
        let _ = memfd.convert(range(3, 4), to, PRESERVE).unwrap();
        assert!(books.iter().all(|book| book.pages().len() == 12));
    }
}

#[test]
fn an_answer_may_come_later_from_another_thread() {
    let (_pool, memfd) = object(16);
    let book = Book::new();
    let _it = memfd.subscribe_with(Arc::clone(&book) as _, options().answer_within(LONG)).unwrap();
    book.is(Mood::Keep);
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let ack = loop {
                match book.ack() {
                    Some(ack) => break ack,
                    None => thread::yield_now(),
                }
            };
            thread::sleep(SHORT);
            assert_eq!(on_side(&memfd, SHARED).len(), 16, "nothing has happened yet");
            // What is not asked for goes on meanwhile.
            memfd.read(Offset::new(8 << 12), &mut [0; 8]).unwrap();
            answered.store(true, Ordering::SeqCst);
            assert_eq!(ack.let_go(), Heard::InTime);
        });
        let _ = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap();
        assert!(answered.load(Ordering::SeqCst));
    });
    book.is(Mood::LetGo);
}

#[test]
fn silence_refuses_the_conversion_and_a_late_answer_is_nobodys() {
    let (_pool, memfd) = object(16);
    let book = Book::new();
    let _it = memfd.subscribe_with(Arc::clone(&book) as _, options().answer_within(SHORT)).unwrap();
    book.calls();
    book.is(Mood::Keep);
    let begin = Instant::now();
    let error = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err();
    assert!(begin.elapsed() >= SHORT);
    assert_eq!((error.kind(), error.errno()), (ErrorKind::SubscriberRefused, Errno::ETIMEDOUT));
    assert!(error.to_string().contains("vfio0 did not answer"), "{error}");
    assert_eq!(on_side(&memfd, SHARED).len(), 16);
    // In this order: it carries out the revoke late, and then the grant.
    assert_eq!(book.calls(), [("revoke", 4), ("grant", 4)]);
    let late = book.ack().unwrap();
    // The next question is not answered by the late answer to this one.
    let error = thread::scope(|scope| {
        let next = scope.spawn(|| memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err());
        let ack = loop {
            match book.ack() {
                Some(ack) => break ack,
                None => thread::yield_now(),
            }
        };
        assert_eq!(late.let_go(), Heard::TooLate);
        let error = next.join().unwrap();
        assert_eq!(ack.let_go(), Heard::TooLate);
        error
    });
    assert_eq!(error.errno(), Errno::ETIMEDOUT);
    book.is(Mood::LetGo);
    assert_eq!(book.pages().len(), 16);
    let _ = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap();
}

#[test]
fn who_does_not_answer_is_fenced_off_and_told_nothing_until_it_comes_again() {
    for mood in [Mood::Keep, Mood::Lose] {
        let (_pool, memfd) = object(16);
        let (book, other) = (Book::new(), Book::new());
        let terms = options().answer_within(SHORT).on_silence(OnSilence::FenceOff);
        let it = memfd.subscribe_with(Arc::clone(&book) as _, terms.clone()).unwrap();
        let _other = memfd.subscribe(Arc::clone(&other) as _).unwrap();
        book.fences(Ok(()));
        book.is(mood);
        book.calls();
        let _ = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap();
        assert_eq!(book.calls(), [("revoke", 4), ("fence", 0)]);
        assert_eq!(it.standing(), Standing::FencedOff);
        if let Some(late) = book.ack() {
            assert_eq!(late.refuse(Errno::EBUSY), Heard::TooLate);
        }
        let _ = memfd.convert(range(8, 4), PRIVATE, PRESERVE).unwrap();
        let _ = memfd.convert(range(0, 4), SHARED, PRESERVE).unwrap();
        let _ = memfd.punch_hole(range(5, 1)).unwrap();
        drop(it);
        assert_eq!(book.calls(), [], "it is told nothing");
        book.is(Mood::LetGo);
        let it = memfd.subscribe_with(Arc::clone(&book) as _, terms).unwrap();
        assert_eq!(it.standing(), Standing::Told);
        assert_eq!(book.pages(), on_side(&memfd, SHARED));
        assert_eq!(other.pages(), on_side(&memfd, SHARED));
    }
}

#[test]
fn a_fence_that_fails_refuses_the_conversion() {
    let (_pool, memfd) = object(16);
    let (book, other) = (Book::new(), Book::new());
    let terms = options().answer_within(SHORT).on_silence(OnSilence::FenceOff);
    let _other = memfd.subscribe(Arc::clone(&other) as _).unwrap();
    let it = memfd.subscribe_with(Arc::clone(&book) as _, terms).unwrap();
    book.fences(Err(Errno::ENODEV));
    book.is(Mood::Lose);
    let error = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::SubscriberRefused, Errno::ENODEV));
    assert!(error.to_string().contains("cannot be fenced off"), "{error}");
    assert_eq!(it.standing(), Standing::Told);
    assert_eq!(other.pages().len(), 16);
    // Nobody is cut off for a conversion that another one refuses.
    other.is(Mood::Refuse);
    book.fences(Ok(()));
    book.calls();
    let error = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY);
    assert_eq!(book.calls(), [("revoke", 4), ("grant", 4)]);
    other.is(Mood::LetGo);
}

#[test]
fn a_lost_answer_is_not_waited_for() {
    let (_pool, memfd) = object(16);
    let book = Book::new();
    let _it = memfd.subscribe_with(Arc::clone(&book) as _, options().answer_within(LONG)).unwrap();
    book.is(Mood::Lose);
    let begin = Instant::now();
    let error = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err();
    assert_eq!(error.errno(), Errno::ETIMEDOUT);
    assert!(begin.elapsed() < LONG / 2);
    book.is(Mood::LetGo);
}

#[test]
fn a_subscription_that_is_dropped_in_the_middle_ends_the_wait() {
    for on_silence in [OnSilence::RefuseConversion, OnSilence::FenceOff] {
        let (_pool, memfd) = object(16);
        let book = Book::new();
        let terms = options().answer_within(LONG).on_silence(on_silence);
        let it = memfd.subscribe_with(Arc::clone(&book) as _, terms).unwrap();
        book.fences(Ok(()));
        book.is(Mood::Keep);
        let begin = Instant::now();
        thread::scope(|scope| {
            let converts = scope.spawn(|| memfd.convert(range(0, 4), PRIVATE, PRESERVE));
            while lock(&book.acks).is_empty() {
                thread::yield_now();
            }
            book.is(Mood::LetGo);
            drop(it);
            match on_silence {
                OnSilence::RefuseConversion => {
                    let error = converts.join().unwrap().unwrap_err();
                    assert_eq!(error.errno(), Errno::ETIMEDOUT);
                }
                OnSilence::FenceOff => assert!(converts.join().unwrap().is_ok()),
            }
        });
        assert!(begin.elapsed() < LONG / 2);
        assert!(book.pages().is_empty(), "it has let go of everything");
        assert_eq!(book.ack().unwrap().let_go(), Heard::TooLate);
        let _ = memfd.convert(memfd.pages(), PRIVATE, PRESERVE).unwrap();
    }
}

#[test]
fn who_leaves_without_letting_go_holds_its_pages_for_good() {
    for mood in [Mood::Refuse, Mood::Lose, Mood::Keep, Mood::Panic] {
        let (pool, memfd) = object(16);
        let _ = memfd.convert(range(12, 4), PRIVATE, PRESERVE).unwrap();
        let book = Book::new();
        let terms = options().answer_within(SHORT);
        let it = memfd.subscribe_with(Arc::clone(&book) as _, terms).unwrap();
        book.is(mood);
        drop(it);
        let error = memfd.convert(range(0, 4), PRIVATE, PRESERVE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::SubscriberRefused);
        assert!(error.to_string().contains("vfio0 has left"), "{error}");
        assert_eq!(memfd.punch_hole(range(0, 1)).unwrap_err().kind(), ErrorKind::SubscriberRefused);
        drop(memfd);
        assert_eq!(pool.stat().quarantined, ByteSize::from_pages(12));
        assert_eq!(pool.stat().free, ByteSize::from_pages(4));
    }
    // Who can be cut off does not.
    let (pool, memfd) = object(16);
    let book = Book::new();
    let it = memfd.subscribe(Arc::clone(&book) as _).unwrap();
    book.is(Mood::Refuse);
    book.fences(Ok(()));
    drop(it);
    let _ = memfd.convert(memfd.pages(), PRIVATE, PRESERVE).unwrap();
    drop(memfd);
    assert_eq!(pool.stat().free, ByteSize::from_pages(16));
}

#[test]
fn a_panic_while_others_were_asked_leaves_the_pages_to_nobody() {
    let (_pool, memfd) = object(16);
    let (slow, broken) = (Book::new(), Book::new());
    let terms = options().answer_within(LONG);
    let _slow = memfd.subscribe_with(Arc::clone(&slow) as _, terms.clone()).unwrap();
    let _broken = memfd.subscribe_with(Arc::clone(&broken) as _, terms).unwrap();
    slow.is(Mood::Keep);
    broken.is(Mood::Panic);
    let convert = || memfd.convert(range(0, 4), PRIVATE, PRESERVE);
    assert!(catch_unwind(AssertUnwindSafe(convert)).is_err());
    assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(4));
    assert_eq!(slow.ack().unwrap().let_go(), Heard::TooLate);
    [slow, broken].iter().for_each(|book| book.is(Mood::LetGo));
    // Quarantined pages are not given to newcomers.
    let newcomer = Book::new();
    let _newcomer = memfd.subscribe(Arc::clone(&newcomer) as _).unwrap();
    assert_eq!(newcomer.pages(), (4..16).collect::<Vec<_>>());
}
