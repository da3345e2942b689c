//! Real threads on one object, for a while. Bytes are the judge: from the moment in which a page is taken
//! away until it is given again it holds a secret, and no checked access may ever read one.
//!
//! `GMEM_STRESS_SECONDS` asks for more time.

// UNSAFETY: secrets are written through a raw pointer, as a guest would write them.
#![expect(unsafe_code, reason = "the checked doors are closed while there is a secret")]

mod common;

use std::env;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::error::ErrorKind;
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, CancelToken, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd,
    HandOutRun, Heard, HostView, PinMode, Subscriber, Visibility, Wait,
};

const SECRET: u8 = 0x5e;
const NR_PAGES: u64 = 2 * 512;

/// Tells of pages by what it writes there; where it can, it is told with the words frozen.
#[derive(Debug)]
struct Guest {
    base: usize,
    granted: Vec<AtomicBool>,
}

impl Guest {
    fn write(&self, page: Pgoff, byte: u8) {
        let at = (self.base + page.offset().get() as usize + 77) as *mut u8;
        // SAFETY: inside of the view, which outlives the subscription, and mapped: pages are taken from
        // subscribers before they leave the views, and given after they are back.
        unsafe { at.write_volatile(byte) };
    }
}

impl Subscriber for Guest {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        for page in runs.iter().flat_map(|run| run.pages.iter()) {
            assert!(self.granted[page.get() as usize].swap(false, Ordering::Relaxed));
            self.write(page, SECRET);
        }
        assert_eq!(ack.let_go(), Heard::InTime);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        for page in runs.iter().flat_map(|run| run.pages.iter()) {
            self.write(page, 0);
            assert!(!self.granted[page.get() as usize].swap(true, Ordering::Relaxed));
        }
    }
}

struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// Mostly around the border of two blocks, where all meet.
    fn range(&mut self) -> PgoffRange {
        let (start, nr_pages) = match self.below(8) {
            0 => (self.below(2) * 512, 512),
            1 => (self.below(NR_PAGES), 1 + self.below(40)),
            _ => (504 + self.below(12), 1 + self.below(5)),
        };
        PgoffRange::new(Pgoff::new(start), nr_pages.min(NR_PAGES - start)).unwrap()
    }

    fn wait(&mut self, tokens: &Mutex<Vec<CancelToken>>) -> Wait {
        match self.below(3) {
            0 => Wait::never(),
            1 => Wait::at_most(Duration::from_micros(self.below(1500))),
            _ => {
                let token = CancelToken::new();
                tokens.lock().unwrap().push(token.clone());
                Wait::until_cancelled(&token)
            }
        }
    }
}

struct World<'a> {
    memfd: &'a GuestMemfd,
    until: Instant,
    tokens: Mutex<Vec<CancelToken>>,
    done: [AtomicU64; 5],
}

impl World<'_> {
    fn each(&self, what: usize, mut work: impl FnMut() -> bool) {
        while Instant::now() < self.until {
            self.done[what].fetch_add(u64::from(work()), Ordering::Relaxed);
        }
    }

    fn pins(&self, seed: u64) {
        let mut random = Random::new(seed);
        let owner = self.memfd.register_owner(&format!("pinner {seed}")).unwrap();
        self.each(0, || {
            let range = random.range();
            let mode = if random.below(4) == 0 { PinMode::Exclusive } else { PinMode::Counted };
            let Ok(pin) = self.memfd.pin_waiting(range, owner, mode, &random.wait(&self.tokens))
            else {
                return false;
            };
            for _ in 0..3 {
                let sides: Vec<_> = self.memfd.visibility(range).unwrap().collect();
                assert_eq!(sides, [(range, Visibility::Shared)], "pinned, and yet");
                thread::yield_now();
            }
            drop(pin);
            true
        });
    }

    fn accesses(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut bytes = [0; 3 * 4096];
        self.each(1, || {
            let start = random.range().start_offset().get().min((NR_PAGES - 3) << 12);
            bytes.fill(0);
            match self.memfd.read(Offset::new(start), &mut bytes) {
                Ok(()) => {
                    assert!(bytes.iter().all(|&byte| byte != SECRET), "a secret was read");
                    true
                }
                Err(error) => {
                    let kinds = [ErrorKind::NotShared, ErrorKind::Busy];
                    assert!(kinds.contains(&error.kind()), "{error}");
                    false
                }
            }
        });
    }

    fn converts(&self, seed: u64, to: Visibility, what: usize) {
        let mut random = Random::new(seed);
        self.each(what, || {
            let ranges: Vec<_> = (0..=random.below(3)).map(|_| random.range()).collect();
            let options = ConvertOptions::default().wait(random.wait(&self.tokens));
            match self.memfd.convert_ranges(&ranges, to, &options) {
                Ok(done) => done.changed_pages() > 0,
                Err(error) => {
                    let kinds = [ErrorKind::Busy, ErrorKind::TimedOut, ErrorKind::Cancelled];
                    assert!(kinds.contains(&error.kind()), "{error}");
                    false
                }
            }
        });
    }

    fn trims(&self) {
        self.each(4, || {
            thread::sleep(Duration::from_micros(300));
            self.memfd.trim().unwrap().get() > 0
        });
    }

    fn cancels(&self) {
        let everybody = || std::mem::take(&mut *self.tokens.lock().unwrap());
        // Others may begin to wait in the last moment.
        while Instant::now() < self.until + Duration::from_millis(500) {
            thread::sleep(Duration::from_micros(200));
            everybody().iter().for_each(CancelToken::cancel);
        }
    }
}

fn object() -> (FolioPool, GuestMemfd, HostView) {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_pages(NR_PAGES));
    let memfd = builder.initial(Visibility::Shared).create(&pool).unwrap();
    let view = memfd.map_view().unwrap();
    // A subscriber is told of what is there.
    memfd.allocate(memfd.pages()).unwrap();
    (pool, memfd, view)
}

#[test]
fn many_threads_on_one_object_never_read_a_secret() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let seconds = env::var("GMEM_STRESS_SECONDS").map_or(2, |it| it.parse().unwrap());
    let (pool, memfd, view) = object();
    let base = view.pointer(Offset::new(0), view.size()).unwrap().as_ptr() as usize;
    let granted = (0..NR_PAGES).map(|_| AtomicBool::new(false)).collect();
    let guest = Arc::new(Guest { base, granted });
    let subscription = memfd.subscribe(Arc::clone(&guest) as _).unwrap();
    let until = Instant::now() + Duration::from_secs(seconds);
    let world = World { memfd: &memfd, until, tokens: Mutex::default(), done: Default::default() };
    thread::scope(|scope| {
        for seed in 0..2 {
            let world = &world;
            scope.spawn(move || world.pins(seed));
            scope.spawn(move || world.accesses(10 + seed));
            scope.spawn(move || world.converts(20 + seed, Visibility::Private, 2));
            scope.spawn(move || world.converts(30 + seed, Visibility::Shared, 3));
        }
        scope.spawn(|| world.trims());
        scope.spawn(|| world.cancels());
    });
    println!("pins, reads, to private, to shared, trims: {:?}", world.done);
    assert!(world.done.iter().all(|done| done.load(Ordering::Relaxed) > 0), "{:?}", world.done);

    assert_eq!(memfd.stat().pinned, ByteSize::default());
    assert!(memfd.owners(memfd.pages()).is_empty());
    for (range, side) in memfd.visibility(memfd.pages()).unwrap() {
        for page in range.iter() {
            let granted = guest.granted[page.get() as usize].load(Ordering::Relaxed);
            assert_eq!(granted, side == Visibility::Shared, "page {page}");
        }
    }
    let everything = [memfd.pages()];
    let _ =
        memfd.convert_ranges(&everything, Visibility::Shared, &ConvertOptions::default()).unwrap();
    let report = gmem::audit::check(&pool, &[&memfd]);
    assert!(report.is_clean(), "{report}");
    memfd.trim().unwrap();
    assert_eq!(memfd.stat().metadata, ByteSize::from_bytes(8));
    drop((subscription, view, memfd));
    assert_eq!(pool.stat().free, pool.stat().capacity);
}

/// Each thread registers with the grace periods, enters a section and goes.
#[test]
fn two_thousand_threads_come_and_go_while_pages_change_sides() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(4)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(4));
    let memfd = builder.initial(Visibility::Shared).create(&pool).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let converter = scope.spawn(|| {
            let pages = [PgoffRange::new(Pgoff::new(3), 2).unwrap()];
            let options = ConvertOptions::default().wait(Wait::at_most(Duration::from_secs(20)));
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds == 0 {
                for to in [Visibility::Private, Visibility::Shared] {
                    assert_eq!(
                        memfd.convert_ranges(&pages, to, &options).unwrap().changed_pages(),
                        2
                    );
                }
                rounds += 1;
            }
        });
        for batch in 0..40 {
            let threads: Vec<_> = (0..50)
                .map(|nr| {
                    let memfd = &memfd;
                    scope.spawn(move || {
                        let owner = memfd.register_owner("short-lived").unwrap();
                        let _ = memfd.read(Offset::new(3 << 12), &mut [0; 16]);
                        let page = PgoffRange::new(Pgoff::new(2 + (batch + nr) % 3), 1).unwrap();
                        drop(memfd.pin(page, owner, PinMode::Counted));
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
        over.store(true, Ordering::Relaxed);
        converter.join().unwrap();
    });
    let report = gmem::audit::check(&pool, &[&memfd]);
    assert!(report.is_clean(), "{report}");
}

/// A grace period looks at the slot of each thread there is.
#[test]
fn two_thousand_threads_at_once_are_waited_for() {
    const NR_THREADS: usize = 2_000;
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(2));
    let memfd = builder.initial(Visibility::Shared).create(&pool).unwrap();
    let (entered, over) = (Barrier::new(NR_THREADS + 1), Barrier::new(NR_THREADS + 1));
    thread::scope(|scope| {
        for _ in 0..NR_THREADS {
            let spawned = thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, || {
                memfd.read(Offset::new(0), &mut [0; 8]).unwrap();
                entered.wait();
                over.wait();
            });
            spawned.unwrap();
        }
        entered.wait();
        for _ in 0..20 {
            for to in [Visibility::Private, Visibility::Shared] {
                let all = memfd.pages();
                let done = memfd.convert(all, to, ContentPolicy::Preserve).unwrap();
                assert_eq!(done.changed_pages(), 512);
            }
        }
        over.wait();
    });
}
