//! A subscriber that is cut off reaches nothing from then on, whatever else was about to be given to it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Pgoff};
use gmem::error::Errno;
use gmem::hyp::iommu::{Domain, Places};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd, HandOutRun, Heard,
    OnSilence, Standing, SubscribeOptions, Subscriber, Visibility,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;
/// As many runs as take four batches.
const NR_SCATTERED: u64 = 200;
const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < LONG, "{what} never comes");
        thread::yield_now();
    }
}

/// Every second page is private.
fn scattered() -> (FolioPool, GuestMemfd, Vec<PgoffRange>) {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(4)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(SHARED);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    let scattered: Vec<_> = (0..NR_SCATTERED).map(|at| range(2 * at, 1)).collect();
    let _ = memfd.convert_ranges(&scattered, PRIVATE, &ConvertOptions::default()).unwrap();
    (pool, memfd, scattered)
}

/// A domain behind a wire that hangs when it is told to.
#[derive(Debug)]
struct Wire {
    domain: Domain,
    /// Grants stop in here until it is opened.
    is_shut: AtomicBool,
    is_granting: AtomicBool,
    is_mute: AtomicBool,
    nr_behind_the_fence: AtomicU64,
    is_fenced: AtomicBool,
}

impl Wire {
    fn new(pool: &FolioPool) -> Arc<Self> {
        Arc::new(Self {
            domain: Domain::new(pool, Places::Object).unwrap(),
            is_shut: AtomicBool::new(false),
            is_granting: AtomicBool::new(false),
            is_mute: AtomicBool::new(false),
            nr_behind_the_fence: AtomicU64::new(0),
            is_fenced: AtomicBool::new(false),
        })
    }
}

impl Subscriber for Wire {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        match self.is_mute.load(Ordering::SeqCst) {
            true => drop(ack),
            false => self.domain.revoke(runs, ack),
        }
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.is_granting.store(true, Ordering::SeqCst);
        until("the end of the hitch", || !self.is_shut.load(Ordering::SeqCst));
        if self.is_fenced.load(Ordering::SeqCst) {
            self.nr_behind_the_fence.fetch_add(1, Ordering::SeqCst);
        }
        self.domain.grant(runs);
    }

    fn fence(&self) -> Result<(), Errno> {
        self.domain.fence()?;
        self.is_fenced.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn grants_of_another_conversion_end_at_the_fence() {
    let (pool, memfd, scattered) = scattered();
    let wire = Wire::new(&pool);
    let terms = SubscribeOptions::default().answer_within(SHORT).on_silence(OnSilence::FenceOff);
    let it = memfd.subscribe_with(Arc::clone(&wire) as _, terms).unwrap();
    wire.is_granting.store(false, Ordering::SeqCst);
    wire.is_shut.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        let gives = scope.spawn(|| {
            memfd.convert_ranges(&scattered, SHARED, &ConvertOptions::default()).unwrap()
        });
        until("a grant", || wire.is_granting.load(Ordering::SeqCst));
        wire.is_mute.store(true, Ordering::SeqCst);
        let cuts = scope.spawn(|| memfd.convert(range(801, 1), PRIVATE, PRESERVE).unwrap());
        // It waits for the grant that is under way. Somebody who did not would be done soon.
        let begin = Instant::now();
        while !cuts.is_finished() && begin.elapsed() < 10 * SHORT {
            thread::yield_now();
        }
        if cuts.is_finished() {
            wire.domain.reattach().unwrap();
        }
        wire.is_shut.store(false, Ordering::SeqCst);
        let _ = cuts.join().unwrap();
        // Before the old subscription is dropped.
        wire.domain.reattach().unwrap();
        let _ = gives.join().unwrap();
    });
    assert_eq!(it.standing(), Standing::FencedOff);
    assert_eq!(wire.nr_behind_the_fence.load(Ordering::SeqCst), 0);
    assert_eq!(wire.domain.leaves(), [], "nobody will ask for this any more");
    let _ = memfd.convert(memfd.pages(), PRIVATE, PRESERVE).unwrap();
}

/// Lets go at once, but for those whose answer the test has.
#[derive(Debug, Default)]
struct Slow {
    keeps: AtomicBool,
    acks: Mutex<Vec<Ack>>,
    has: Mutex<BTreeSet<u64>>,
    is_fenced: AtomicBool,
}

impl Subscriber for Slow {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        let mut has = lock(&self.has);
        runs.iter().flat_map(|run| run.pages.iter()).for_each(|page| {
            has.remove(&page.get());
        });
        match self.keeps.load(Ordering::SeqCst) {
            true => lock(&self.acks).push(ack),
            false => drop(ack.let_go()),
        }
    }

    fn grant(&self, runs: &[HandOutRun]) {
        assert!(!self.is_fenced.load(Ordering::SeqCst), "a grant behind the fence");
        let pages = runs.iter().flat_map(|run| run.pages.iter());
        lock(&self.has).extend(pages.map(Pgoff::get));
    }

    fn fence(&self) -> Result<(), Errno> {
        self.is_fenced.store(true, Ordering::SeqCst);
        lock(&self.has).clear();
        Ok(())
    }
}

#[test]
fn what_a_refused_conversion_gives_back_ends_at_the_fence() {
    let (_pool, memfd, _) = scattered();
    let (slow, stubborn) = (Arc::new(Slow::default()), Arc::new(Slow::default()));
    let terms = |time| SubscribeOptions::default().answer_within(time);
    let cut = terms(SHORT).on_silence(OnSilence::FenceOff);
    let it = memfd.subscribe_with(Arc::clone(&slow) as _, cut).unwrap();
    let _other = memfd.subscribe_with(Arc::clone(&stubborn) as _, terms(LONG)).unwrap();
    stubborn.keeps.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        let refused = scope.spawn(|| memfd.convert(range(801, 1), PRIVATE, PRESERVE).unwrap_err());
        until("its question", || lock(&stubborn.acks).len() == 1);
        // It has let go for the first conversion, and is cut off by the second.
        slow.keeps.store(true, Ordering::SeqCst);
        let done = scope.spawn(|| memfd.convert(range(901, 1), PRIVATE, PRESERVE));
        until("the other question", || lock(&stubborn.acks).len() == 2);
        let (second, first) = {
            let mut acks = lock(&stubborn.acks);
            (acks.pop().unwrap(), acks.pop().unwrap())
        };
        assert_eq!(second.let_go(), Heard::InTime);
        let _ = done.join().unwrap().unwrap();
        assert_eq!(first.refuse(Errno::EBUSY), Heard::InTime);
        assert_eq!(refused.join().unwrap().errno(), Errno::EBUSY);
    });
    assert_eq!(it.standing(), Standing::FencedOff);
    assert!(lock(&slow.has).is_empty());
    stubborn.keeps.store(false, Ordering::SeqCst);
    lock(&stubborn.acks).clear();
}
