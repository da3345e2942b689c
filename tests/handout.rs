//! Hand-outs: who is told what and when. design/handout.md has the table.

#[path = "handout/answers.rs"]
mod answers;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use gmem::addr::{ByteSize, Gfn, Pfn, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::hyp::{Hypervisor, Model};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, Heard, PartSpec, PinMode,
    Residency, Sides, SubscribeOptions, Subscriber, Visibility, Zone,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;
const SHORT: Duration = Duration::from_millis(20);

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// How a subscriber takes it to be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mood {
    #[default]
    LetGo,
    Refuse,
    /// Lets go, and answers when the test says so.
    Keep,
    /// Loses the means to answer.
    Lose,
    Panic,
}

/// Keeps account of what it has, and breaks if it is told nonsense.
#[derive(Debug, Default)]
struct Book {
    has: Mutex<BTreeMap<u64, (Pfn, Option<Gfn>)>>,
    mood: Mutex<Mood>,
    acks: Mutex<Vec<Ack>>,
    fence: Mutex<Option<Errno>>,
    calls: Mutex<Vec<(&'static str, u64)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pages_of(runs: &[HandOutRun]) -> impl Iterator<Item = (u64, (Pfn, Option<Gfn>))> {
    runs.iter().flat_map(|run| {
        let frames = run.frames.iter().enumerate();
        run.pages.iter().zip(frames).map(|(page, (nth, frame))| {
            (page.get(), (frame, run.guest.map(|gfn| gfn.checked_add(nth as u64).unwrap())))
        })
    })
}

impl Book {
    fn new() -> Arc<Self> {
        let book = Self::default();
        *lock(&book.fence) = Some(Errno::EOPNOTSUPP);
        Arc::new(book)
    }

    fn is(&self, mood: Mood) {
        *lock(&self.mood) = mood;
    }

    fn fences(&self, outcome: Result<(), Errno>) {
        *lock(&self.fence) = outcome.err();
    }

    fn pages(&self) -> Vec<u64> {
        lock(&self.has).keys().copied().collect()
    }

    fn calls(&self) -> Vec<(&'static str, u64)> {
        std::mem::take(&mut *lock(&self.calls))
    }

    fn ack(&self) -> Option<Ack> {
        lock(&self.acks).pop()
    }

    fn was_called(&self, what: &'static str, runs: &[HandOutRun]) {
        let nr_pages = runs.iter().map(|run| run.pages.nr_pages()).sum();
        lock(&self.calls).push((what, nr_pages));
    }
}

impl Subscriber for Book {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        self.was_called("revoke", runs);
        let mood = *lock(&self.mood);
        if matches!(mood, Mood::LetGo | Mood::Keep) {
            let mut has = lock(&self.has);
            for (page, what) in pages_of(runs) {
                assert_eq!(has.remove(&page), Some(what), "{page:#x} was taken");
            }
        }
        match mood {
            Mood::LetGo => assert_eq!(ack.let_go(), Heard::InTime),
            Mood::Refuse => assert_eq!(ack.refuse(Errno::EBUSY), Heard::InTime),
            Mood::Keep => lock(&self.acks).push(ack),
            Mood::Lose => drop(ack),
            Mood::Panic => panic!("a subscriber is broken"),
        }
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.was_called("grant", runs);
        let is_strict = matches!(*lock(&self.mood), Mood::LetGo | Mood::Keep);
        let mut has = lock(&self.has);
        for (page, what) in pages_of(runs) {
            let before = has.insert(page, what);
            assert!(before.is_none() || !is_strict, "{page:#x} was given twice");
        }
    }

    fn fence(&self) -> Result<(), Errno> {
        self.was_called("fence", &[]);
        lock(&self.has).clear();
        lock(&self.fence).map_or(Ok(()), Err)
    }
}

fn object(nr_pages: u64) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(nr_pages)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_pages(nr_pages)).initial(SHARED);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    (pool, memfd)
}

fn options() -> SubscribeOptions {
    SubscribeOptions::default().name("vfio0")
}

/// The pages that somebody on this side is to have.
fn on_side(memfd: &GuestMemfd, side: Visibility) -> Vec<u64> {
    let infos = memfd.snapshot(memfd.pages()).unwrap();
    infos
        .filter(|(_, info)| info.visibility == side && info.residency == Residency::Resident)
        .flat_map(|(pages, _)| pages.iter().map(Pgoff::get).collect::<Vec<_>>())
        .collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

#[test]
fn whatever_happens_each_side_has_exactly_its_pages_that_are_there() {
    let megabytes = ByteSize::from_mib;
    let pool = FolioPool::builder()
        .part(PartSpec::new([ArenaBacking::Heap], megabytes(8)), Zone::Normal)
        .part(PartSpec::new([ArenaBacking::Heap], megabytes(8)), Zone::Movable)
        .create()
        .unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_pages(2 * 512 + 16))
        .zones(&[Zone::Movable, Zone::Normal])
        .initial(SHARED)
        .create(&pool)
        .unwrap();
    let books = [Book::new(), Book::new()];
    let _one = memfd.subscribe_with(Arc::clone(&books[0]) as _, options()).unwrap();
    let private = options().side(PRIVATE);
    let _other = memfd.subscribe_with(Arc::clone(&books[1]) as _, private).unwrap();
    let mut random = Random(0x5eed);
    let mut nr_done = [0; 6];
    for _ in 0..600 {
        let start = random.below(2 * 512 + 15);
        let pages = range(start, 1 + random.below((2 * 512 + 16 - start).min(600)));
        let what = random.below(6) as usize;
        let done = match what {
            0 => memfd.convert(pages, PRIVATE, PRESERVE).map(|_| ()),
            1 => memfd.convert(pages, SHARED, ContentPolicy::Zero).map(|_| ()),
            2 => memfd.punch_hole(pages).map(|_| ()),
            3 => memfd.allocate(range(start, 1)),
            4 => memfd.write(pages.start_offset(), &[1]),
            _ => {
                let to = [Zone::Normal, Zone::Movable][random.below(2) as usize];
                memfd.migrate(pages, to).map(|_| ())
            }
        };
        nr_done[what] += u32::from(done.is_ok());
        for (book, side) in books.iter().zip([SHARED, PRIVATE]) {
            assert_eq!(book.pages(), on_side(&memfd, side), "{side} after {what} of {pages}");
        }
    }
    assert!(nr_done.iter().all(|&nr| nr > 0), "{nr_done:?}");
    let frames: Vec<_> = books.iter().flat_map(|book| lock(&book.has).clone()).collect();
    let mut distinct: Vec<_> = frames.iter().map(|(_, (frame, _))| *frame).collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), frames.len(), "a frame is handed out for two pages");
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

#[test]
fn whole_folios_come_as_one_run_and_cut_into_leaves_of_2_mib() {
    let (_pool, memfd) = object(4 * 512 + 3);
    let book = Book::new();
    let _it = memfd.subscribe(Arc::clone(&book) as _).unwrap();
    let frames: Vec<Pfn> = lock(&book.has).values().map(|(frame, _)| *frame).collect();
    let run = |start: u64, nr_pages: u64| HandOutRun {
        pages: range(start, nr_pages),
        frames: gmem::range::PfnRange::new(frames[start as usize], nr_pages).unwrap(),
        guest: None,
    };
    // Aligned alike: a page, a folio, the rest.
    let whole = run(511, 514);
    let at = |page: u64| Gfn::new(frames[0].get() + page);
    let sizes: Vec<u64> = whole.leaves(at(511)).map(|(_, leaf)| leaf.pages.nr_pages()).collect();
    assert_eq!(sizes, [1, 512, 1]);
    let askew: Vec<_> = whole.leaves(at(512)).collect();
    assert_eq!(askew.len(), 514, "a device that finds it askew has no larger leaf");
    assert_eq!(askew[513].1, run(511 + 513, 1));
    let joined: u64 = book.calls().iter().map(|(_, nr_pages)| nr_pages).sum();
    assert_eq!(joined, 4 * 512 + 3);
}

#[cfg(feature = "oracle")]
#[test]
fn without_memory_nobody_is_asked() {
    use gmem::failpoint::{FailPoint, arm};

    let (_pool, memfd) = object(16);
    let books = [Book::new(), Book::new()];
    let subscribe = |book: &Arc<Book>| memfd.subscribe(Arc::clone(book) as _).unwrap();
    let _all: Vec<_> = books.iter().map(subscribe).collect();
    let mut nr_refused = 0;
    loop {
        books.iter().for_each(|book| drop(book.calls()));
        let armed = arm(FailPoint::Memory, nr_refused);
        let outcome = memfd.convert(range(0, 4), PRIVATE, PRESERVE);
        if !armed.has_fired() {
            assert!(outcome.is_ok());
            break;
        }
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Exhausted);
        assert!(books.iter().all(|book| book.calls().is_empty() && book.pages().len() == 16));
        nr_refused += 1;
    }
    assert!(nr_refused >= 3, "{nr_refused}");
    for point in [FailPoint::Barrier, FailPoint::Memory] {
        let _armed = arm(point, 0);
        assert!(memfd.punch_hole(range(8, 1)).is_err());
        assert!(books.iter().all(|book| book.pages().len() == 12));
    }
}

/// A newcomer misses nothing and is told nothing twice, whatever is under way.
#[test]
fn registration_falls_between_conversions() {
    let (_pool, memfd) = object(256);
    let over = AtomicBool::new(false);
    let nr_converted = thread::scope(|scope| {
        let converters: Vec<_> = (0..2)
            .map(|seed| {
                let (memfd, over) = (&memfd, &over);
                scope.spawn(move || {
                    let mut random = Random(seed + 77);
                    let mut nr_done = 0;
                    while !over.load(Ordering::Relaxed) {
                        let start = random.below(250);
                        let pages = range(start, 1 + random.below(6));
                        let to = [SHARED, PRIVATE][random.below(2) as usize];
                        let done = match random.below(8) {
                            0 => memfd.punch_hole(pages).is_ok(),
                            1 => memfd.allocate(pages).is_ok(),
                            _ => memfd.convert(pages, to, PRESERVE).is_ok(),
                        };
                        nr_done += u32::from(done);
                    }
                    nr_done
                })
            })
            .collect();
        for round in 0..300 {
            let side = [SHARED, PRIVATE][round % 2];
            let book = Book::new();
            let it = memfd.subscribe_with(Arc::clone(&book) as _, options().side(side)).unwrap();
            if round % 3 == 0 {
                thread::yield_now();
            }
            // The book breaks if it is told twice; what it is left with is known when all is still.
            drop(it);
            assert!(book.pages().is_empty(), "a page came without being taken");
        }
        let last = [Book::new(), Book::new()];
        let subscribe = |(book, side): (&Arc<Book>, Visibility)| {
            memfd.subscribe_with(Arc::clone(book) as _, options().side(side)).unwrap()
        };
        let _all: Vec<_> = last.iter().zip([SHARED, PRIVATE]).map(subscribe).collect();
        thread::sleep(SHORT);
        over.store(true, Ordering::Relaxed);
        let done = converters.into_iter().map(|it| it.join().unwrap()).sum::<u32>();
        for (book, side) in last.iter().zip([SHARED, PRIVATE]) {
            assert_eq!(book.pages(), on_side(&memfd, side));
        }
        done
    });
    assert!(nr_converted > 100, "{nr_converted}");
}

#[test]
fn runs_say_where_the_guest_sees_them_also_when_memslots_come_and_go() {
    let models = Model::ALL.into_iter().filter(|model| !model.fixes_sides());
    models.for_each(runs_say_where_the_guest_sees_them);
}

fn runs_say_where_the_guest_sees_them(model: Model) {
    let (pool, memfd) = object(16);
    let book = Book::new();
    let _it = memfd.subscribe(Arc::clone(&book) as _).unwrap();
    let vm = Hypervisor::with(&pool, model).unwrap().create_vm().unwrap();
    let seen_at = |page: u64| lock(&book.has).get(&page).unwrap().1;
    assert_eq!(seen_at(4), None);
    let first = vm.bind(Gfn::new(0x100), &memfd, range(4, 4)).unwrap();
    vm.bind(Gfn::new(0x900), &memfd, range(8, 2)).unwrap();
    assert_eq!(
        [3, 4, 7, 8, 9, 10].map(seen_at).map(|gfn| gfn.map_or(0, Gfn::get)),
        [0, 0x100, 0x103, 0x900, 0x901, 0]
    );
    let _ = memfd.convert(range(6, 4), PRIVATE, PRESERVE).unwrap();
    assert_eq!(seen_at(5), Some(Gfn::new(0x101)));
    book.is(Mood::Refuse);
    let error = vm.bind(Gfn::new(0x1000), &memfd, range(12, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SubscriberRefused);
    book.is(Mood::LetGo);
    let last = vm.bind(Gfn::new(0x1000), &memfd, range(12, 2)).unwrap();
    assert_eq!(seen_at(12), Some(Gfn::new(0x1000)));
    // While the guest runs, either of the two may keep a memslot.
    if !model.takes_back() {
        assert_eq!(vm.unbind(first).unwrap_err().kind(), ErrorKind::HypervisorRefused);
        assert_eq!(seen_at(5), Some(Gfn::new(0x101)));
    }
    book.is(Mood::Refuse);
    assert_eq!(vm.unbind(last).unwrap_err().kind(), ErrorKind::SubscriberRefused);
    assert_eq!(seen_at(12), Some(Gfn::new(0x1000)));
    book.is(Mood::LetGo);
    vm.unbind(last).unwrap();
    assert_eq!([12, 13].map(seen_at), [None; 2]);
    vm.bind(Gfn::new(0x1000), &memfd, range(12, 2)).unwrap();
    drop(vm);
    assert!((0..4).chain(10..16).all(|page| seen_at(page).is_none()));
}

#[test]
fn pins_for_good_are_for_memory_whose_sides_are_fixed() {
    let (pool, memfd) = object(16);
    let owner = memfd.register_owner("vfio0").unwrap();
    let error = memfd.pin(range(0, 1), owner, PinMode::LongTerm).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Convertible, Errno::EOPNOTSUPP));
    assert!(error.to_string().contains("handed out"), "{error}");
    drop(memfd);
    let builder = GuestMemfd::builder(ByteSize::from_pages(16)).initial(SHARED);
    let memfd = builder.sides(Sides::Fixed).create(&pool).unwrap();
    let owner = memfd.register_owner("vfio0").unwrap();
    let pin = memfd.pin(memfd.pages(), owner, PinMode::LongTerm).unwrap();
    assert_eq!(pin.mode(), PinMode::LongTerm);
    assert_eq!(memfd.stat().pinned, ByteSize::from_pages(16));
    let error = memfd.convert(range(0, 1), PRIVATE, PRESERVE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    drop(pin);
    assert_eq!(memfd.stat().pinned, ByteSize::default());
}
