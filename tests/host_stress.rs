//! Everything at once on the host's side: checked accesses of all sizes, pins, conversions, raw touches through
//! every kind of view, in a storm of signals, with children that come and go, and a thief who takes memory out
//! of the arena's file. Every byte of the object is known, so that none may be wrong: but for those that the
//! thief took, which may be zero.
//!
//! `GMEM_HOST_STRESS_SECONDS` says how long, ten unless it is set; on huge pages, a third of that.

#[path = "common/child.rs"]
mod child;
mod common;
#[path = "common/setting.rs"]
mod setting;
#[path = "host_stress/storm.rs"]
mod storm;
#[path = "host_stress/thief.rs"]
mod thief;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Error, ErrorKind};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FaultCause, FolioPool, GuestMemfd, HostView,
    PinMode, SigbusHandler, Touch, ViewMapping, ViewOptions, ViewPath, Visibility, Wait,
};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use storm::{Secrets, Storm};
use thief::{Taken, Thief};

const PAGE: u64 = 4096;
const NR_PAGES: u64 = 3 * 512;

/// What a byte of the object is, always; never zero.
fn byte_at(at: u64) -> u8 {
    let word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((word ^ word >> 29) >> (at % 8 * 8)) as u8 | 1
}

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// Mostly around the border of two folios, where all meet.
    fn page(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(NR_PAGES),
            _ => 500 + self.below(24),
        }
    }

    fn range(&mut self, most: u64) -> PgoffRange {
        let start = self.page();
        let nr_pages = (1 + self.below(most)).min(NR_PAGES - start);
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }
}

const WHAT: [&str; 11] = [
    "reads",
    "writes",
    "atomics",
    "refused accesses",
    "shared pins",
    "exclusive pins",
    "to private",
    "to shared",
    "raw touches",
    "faults",
    "children",
];

struct World<'a> {
    memfd: &'a GuestMemfd,
    views: &'a [HostView],
    handler: SigbusHandler,
    backing: ArenaBacking,
    /// The whole object.
    bytes: Vec<u8>,
    taken: Taken,
    until: Instant,
    wrong: Mutex<Vec<String>>,
    done: [AtomicU64; WHAT.len()],
}

impl World<'_> {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until || !self.wrong.lock().unwrap().is_empty()
    }

    fn count(&self, what: &str) {
        let at = WHAT.iter().position(|&it| it == what).unwrap();
        self.done[at].fetch_add(1, Ordering::Relaxed);
    }

    fn complain(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    fn any_taken(&self, at: u64, len: u64) -> bool {
        (at / PAGE..(at + len).div_ceil(PAGE)).any(|page| self.taken.is(page))
    }

    /// Whether these are the bytes from there on.
    fn check(&self, who: &str, at: u64, found: &[u8]) {
        let wanted = &self.bytes[at as usize..at as usize + found.len()];
        if wanted == found {
            return;
        }
        for (place, (&byte, &wanted)) in (at..).zip(found.iter().zip(wanted)) {
            if byte != wanted && !(byte == 0 && self.taken.is(place / PAGE)) {
                return self
                    .complain(format!("{who}: byte {place:#x} is {byte:#x}, not {wanted:#x}"));
            }
        }
    }

    /// An access may be refused for what is private or being changed, and what was taken may have no memory.
    fn refused(&self, error: &Error, at: u64, len: u64) {
        let is_fine = match error.kind() {
            ErrorKind::NotShared | ErrorKind::Busy => true,
            ErrorKind::MemoryFailure => {
                self.backing == ArenaBacking::MemfdHugetlb2M && self.any_taken(at, len)
            }
            _ => false,
        };
        self.count("refused accesses");
        if !is_fine {
            self.complain(format!("an access of {len} bytes at {at:#x}: {error}"));
        }
    }

    fn accesses(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut buf = vec![0; 3 * PAGE as usize];
        while !self.is_over() {
            let at = random.page() * PAGE + random.below(PAGE);
            let len = match random.below(4) {
                0 => 1 + random.below(16),
                1 => 1 + random.below(600),
                2 => PAGE - 8 + random.below(16),
                _ => 1 + random.below(3 * PAGE),
            };
            let len = len.min(NR_PAGES * PAGE - at);
            let bytes = &self.bytes[at as usize..(at + len) as usize];
            let start = Offset::new(at);
            let word = Offset::new(at & !7);
            let view = &self.views[random.below(self.views.len() as u64) as usize];
            let outcome = match random.below(6) {
                0 => self.memfd.write(start, bytes).map(|()| "writes"),
                1 => view.write(start, bytes).map(|()| "writes"),
                2 => {
                    let value = u64::from_ne_bytes(self.word(word.get()));
                    self.memfd.store_u64(word, value).map(|()| "atomics")
                }
                3 => self.memfd.load_u64(word).map(|found| {
                    self.check("an atomic", word.get(), &found.to_ne_bytes());
                    "atomics"
                }),
                _ => {
                    let buf = &mut buf[..len as usize];
                    self.memfd.read(start, buf).map(|()| {
                        self.check("a read", at, buf);
                        "reads"
                    })
                }
            };
            match outcome {
                Ok(what) => self.count(what),
                Err(error) => self.refused(&error, at & !7, len + 8),
            }
        }
    }

    fn word(&self, at: u64) -> [u8; 8] {
        self.bytes[at as usize..at as usize + 8].try_into().unwrap()
    }

    /// Touches a byte; whether it was there.
    fn touch(&self, view: &HostView, at: u64, access: Access) -> bool {
        match view.touch(self.handler, Offset::new(at), access) {
            Ok(Touch::Byte(byte)) => {
                self.check("a raw touch", at, &[byte]);
                true
            }
            Ok(Touch::Fault(fault)) => {
                if fault.cause != FaultCause::NotMapped && !self.taken.is(at / PAGE) {
                    self.complain(format!("a raw touch at {at:#x}: {fault:?}"));
                }
                false
            }
            Err(error) => {
                self.complain(format!("a raw touch at {at:#x}: {error}"));
                false
            }
        }
    }

    fn touches(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.is_over() {
            let view = &self.views[random.below(self.views.len() as u64) as usize];
            let at = random.page() * PAGE + random.below(PAGE);
            // A store puts back what a load has found: by then the thief may have taken that.
            let access = if random.below(2) == 0 { Access::Read } else { Access::Write };
            let what = if self.touch(view, at, access) { "raw touches" } else { "faults" };
            self.count(what);
        }
    }

    fn pins(&self, seed: u64) {
        let mut random = Random::new(seed);
        let owner = self.memfd.register_owner(&format!("pinner {seed}")).unwrap();
        while !self.is_over() {
            let range = random.range(6);
            let mode = match random.below(4) {
                0 => PinMode::Exclusive,
                _ => PinMode::Counted,
            };
            let pin = match self.memfd.pin(range, owner, mode) {
                Ok(pin) => pin,
                Err(error) => {
                    if !matches!(error.kind(), ErrorKind::NotShared | ErrorKind::Busy) {
                        self.complain(format!("a pin: {error}"));
                    }
                    continue;
                }
            };
            for page in range.iter().map(Pgoff::get) {
                for (nth, view) in self.views.iter().enumerate() {
                    let is_there = self.touch(view, page * PAGE + random.below(PAGE), Access::Read);
                    // Where views go by 2 MiB a neighbour may be private.
                    let may_fault = view.granule() != gmem::geometry::FolioSize::Base;
                    if !is_there && !may_fault && !self.taken.may_fault(page) {
                        self.complain(format!("page {page:#x} is pinned, and not in view {nth}"));
                    }
                }
            }
            match self.memfd.convert(range, Visibility::Private, ContentPolicy::Preserve) {
                Err(error) if error.kind() == ErrorKind::Busy => {}
                outcome => self.complain(format!("a pinned range was converted: {outcome:?}")),
            }
            drop(pin);
            self.count(if mode == PinMode::Exclusive { "exclusive pins" } else { "shared pins" });
        }
    }

    fn converts(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.is_over() {
            let ranges: Vec<PgoffRange> = match random.below(4) {
                0 => {
                    let folio = random.below(NR_PAGES / 512) * 512;
                    vec![PgoffRange::new(Pgoff::new(folio), 512).unwrap()]
                }
                1 => (0..2 + random.below(60)).map(|_| random.range(1)).collect(),
                _ => vec![random.range(40)],
            };
            let to = [Visibility::Private, Visibility::Shared][random.below(2) as usize];
            let wait = match random.below(3) {
                0 => Wait::at_most(Duration::from_micros(random.below(800))),
                _ => Wait::never(),
            };
            let options = ConvertOptions::default().wait(wait);
            match self.memfd.convert_ranges(&ranges, to, &options) {
                Ok(done) if done.changed_pages() == 0 => {}
                Ok(_) if to == Visibility::Private => self.count("to private"),
                Ok(_) => self.count("to shared"),
                Err(error) if matches!(error.kind(), ErrorKind::Busy | ErrorKind::TimedOut) => {}
                Err(error) => self.complain(format!("a conversion of {ranges:?}: {error}")),
            }
        }
    }

    fn forks(&self, secrets: &Secrets) {
        while !self.is_over() {
            match secrets.fork_one() {
                true => self.count("children"),
                false => self.complain(String::from("a child has memory of the guest")),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn run(&self, storm: &Storm, thief: &Thief, secrets: &Secrets) {
        let is_over = || self.is_over();
        thread::scope(|scope| {
            for seed in 0..2 {
                scope.spawn(move || storm.exposed(|| self.accesses(seed)));
                scope.spawn(move || storm.exposed(|| self.touches(10 + seed)));
                scope.spawn(move || storm.exposed(|| self.pins(20 + seed)));
                scope.spawn(move || storm.exposed(|| self.converts(30 + seed)));
            }
            scope.spawn(|| storm.exposed(|| self.forks(secrets)));
            scope.spawn(|| thief.steals(&self.taken, is_over));
            scope.spawn(|| storm.rages(is_over));
        });
    }

    /// What there is to say of the thief, and nothing else.
    fn assert_only_thefts(&self, pool: &FolioPool) {
        let report = audit::check(pool, &[self.memfd]);
        println!("the audit has {} findings", report.findings().len());
        for finding in report.findings() {
            let of_page = finding.split("page ").nth(1).and_then(|rest| rest.split(':').next());
            let is_taken = of_page.is_some_and(|page| self.taken.may_fault(number(page)));
            let is_lost = finding.contains("have no memory behind them");
            assert!(is_taken || is_lost, "{finding}");
        }
    }
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
}

fn object(backing: ArenaBacking) -> (FolioPool, GuestMemfd) {
    let size = ByteSize::from_pages(NR_PAGES);
    let pool = FolioPool::new(backing, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
    (pool, memfd)
}

fn stress(backing: ArenaBacking) {
    let seconds = std::env::var("GMEM_HOST_STRESS_SECONDS").map_or(10, |it| it.parse().unwrap());
    let time = match backing {
        ArenaBacking::Memfd => Duration::from_secs(seconds),
        _ => Duration::from_secs(seconds) / 3,
    };
    let (pool, memfd) = object(backing);
    let bytes: Vec<u8> = (0..NR_PAGES * PAGE).map(byte_at).collect();
    memfd.write(Offset::new(0), &bytes).unwrap();
    let kinds = [
        (ViewPath::Best, ViewMapping::Eager),
        (ViewPath::Best, ViewMapping::Lazy),
        (ViewPath::Fixed, ViewMapping::Eager),
        (ViewPath::Fixed, ViewMapping::Lazy),
    ];
    let options = kinds.map(|(path, mapping)| ViewOptions::default().path(path).mapping(mapping));
    let views = options.map(|options| memfd.map_view_with(&options).unwrap());
    let [eager, others @ ..] = &views;
    let others: Vec<_> = others.iter().collect();
    let secrets = match backing {
        ArenaBacking::MemfdThp => Secrets::new(&[], &views.iter().collect::<Vec<_>>()),
        _ => Secrets::new(&[eager], &others),
    };
    let taken = Taken::new(backing);
    let thief = Thief::new(&taken);
    let storm = Storm::begin();
    let world = World {
        memfd: &memfd,
        views: &views,
        handler: SigbusHandler::install().unwrap(),
        backing,
        bytes,
        taken,
        until: Instant::now() + time,
        wrong: Mutex::default(),
        done: Default::default(),
    };
    world.run(&storm, &thief, &secrets);
    for (what, done) in WHAT.iter().zip(&world.done) {
        println!("{what}: {}", done.load(Ordering::Relaxed));
    }
    let nr_thefts = world.taken.nr_thefts.load(Ordering::Relaxed);
    println!("signals: {}, thefts: {nr_thefts}", storm::nr_signals());
    assert_eq!(*world.wrong.lock().unwrap(), [] as [String; 0]);
    assert!(world.done.iter().all(|done| done.load(Ordering::Relaxed) > 0));
    assert!(nr_thefts > 0 && storm::nr_signals() > 100);

    // What the thief did is seen, and can be made good.
    world.assert_only_thefts(&pool);
    let all = memfd.pages();
    let to = |side| memfd.convert(all, side, ContentPolicy::Preserve).unwrap();
    let _ = to(Visibility::Shared);
    memfd.write(Offset::new(0), &world.bytes).unwrap();
    let _ = to(Visibility::Private);
    let _ = to(Visibility::Shared);
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    let mut found = vec![0; world.bytes.len()];
    memfd.read(Offset::new(0), &mut found).unwrap();
    assert!(found == world.bytes);
    for (nth, view) in views.iter().enumerate() {
        for page in 0..NR_PAGES {
            let found = view.touch(world.handler, Offset::new(page * PAGE), Access::Read).unwrap();
            assert_eq!(found, Touch::Byte(byte_at(page * PAGE)), "page {page:#x} in view {nth}");
        }
    }
    drop((views, memfd));
    assert_eq!(pool.stat().free, pool.stat().capacity);
}

/// The setting, put back by the process that has the copy.
fn setting(path: &'static str, value: &str) -> Option<Setting> {
    std::env::var_os(child::CHILD).is_none().then(|| Setting::set(path, value))
}

#[test]
fn a_memory_file_under_stress_has_no_wrong_byte() {
    if common::require(Capability::Uffd) {
        child::alone("a_memory_file_under_stress_has_no_wrong_byte", || {
            stress(ArenaBacking::Memfd);
        });
    }
}

#[test]
fn transparent_huge_pages_under_stress_have_no_wrong_byte() {
    if common::require(Capability::Uffd) && common::require(Capability::Thp) {
        let _setting = setting(SHMEM_ENABLED, "advise");
        child::alone("transparent_huge_pages_under_stress_have_no_wrong_byte", || {
            stress(ArenaBacking::MemfdThp);
        });
    }
}

/// Here memory can be taken for good: who touches it then has a fault, and an error.
#[test]
fn hugetlb_under_stress_has_no_wrong_byte() {
    if common::require(Capability::Uffd) && common::require(Capability::Hugetlb) {
        let _setting = setting(NR_HUGEPAGES, "3");
        child::alone("hugetlb_under_stress_has_no_wrong_byte", || {
            stress(ArenaBacking::MemfdHugetlb2M);
        });
    }
}

/// A view that has to map what somebody has taken keeps its addresses, and a touch there is a `SIGBUS`.
#[test]
fn a_view_of_memory_that_was_taken_faults_as_ever() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = setting(NR_HUGEPAGES, "3");
    child::alone("a_view_of_memory_that_was_taken_faults_as_ever", || {
        let (pool, memfd) = object(ArenaBacking::MemfdHugetlb2M);
        let bytes: Vec<u8> = (0..NR_PAGES * PAGE).map(byte_at).collect();
        memfd.write(Offset::new(0), &bytes).unwrap();
        let taken = Taken::new(ArenaBacking::MemfdHugetlb2M);
        let thief = Thief::new(&taken);
        let view = memfd.map_view_with(&ViewOptions::default().path(ViewPath::Fixed)).unwrap();
        let handler = SigbusHandler::install().unwrap();
        let (kept, gone) = (NR_PAGES - 513, NR_PAGES - 512);
        let touch =
            |page: u64| view.touch(handler, Offset::new(page * PAGE), Access::Read).unwrap();
        let folio = PgoffRange::new(Pgoff::new(gone), 512).unwrap();
        let to = |side| memfd.convert(folio, side, ContentPolicy::Preserve).unwrap();
        let _ = to(Visibility::Private);
        let kept_back = thief.takes_for_good(&taken);
        let _ = to(Visibility::Shared);
        assert_eq!(touch(kept), Touch::Byte(byte_at(kept * PAGE)));
        for page in [gone, gone + 511] {
            assert!(
                matches!(touch(page), Touch::Fault(fault) if fault.cause == FaultCause::NotMapped)
            );
        }
        drop(kept_back);
        assert_eq!(touch(gone), Touch::Byte(0));
        drop((view, memfd));
        assert_eq!(pool.stat().free, pool.stat().capacity);
    });
}
