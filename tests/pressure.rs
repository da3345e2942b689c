//! Bad input and pressure: typed errors, nothing leaked, and the audit is clean.

mod common;
#[path = "common/setting.rs"]
mod setting;

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pfn, Pgoff};
use gmem::audit;
use gmem::error::{Error, ErrorKind};
use gmem::geometry::{FolioSize, NumaNode};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, Commitment, ContentPolicy, FolioPool, GuestMemfd, PartSpec, PinMode, PoolStat,
    Visibility, Zone,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};
use rustix::io::Errno;
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

const FOLIO: u64 = 512;
const BACKINGS: [ArenaBacking; 2] = [ArenaBacking::Heap, ArenaBacking::Memfd];
const SIZES: [FolioSize; 2] = [FolioSize::Huge2M, FolioSize::Base];

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn pages(nr_pages: u64) -> ByteSize {
    ByteSize::from_pages(nr_pages)
}

fn pool(backing: ArenaBacking, nr_folios: u64) -> FolioPool {
    FolioPool::new(backing, pages(nr_folios * FOLIO)).unwrap()
}

fn object(
    pool: &FolioPool,
    nr_pages: u64,
    size: FolioSize,
    commitment: Commitment,
) -> Result<GuestMemfd, Error> {
    GuestMemfd::builder(pages(nr_pages))
        .initial(Visibility::Shared)
        .folio_size(size)
        .commitment(commitment)
        .create(pool)
}

/// What a failure may not change. (Records that were made may take their memory for the next ones.)
fn counted(pool: &FolioPool) -> PoolStat {
    let mut stat = pool.stat();
    stat.metadata = ByteSize::default();
    stat
}

fn assert_clean(pool: &FolioPool, objects: &[&GuestMemfd]) {
    assert_eq!(audit::check(pool, objects).to_string(), "clean");
}

#[test]
fn a_range_that_does_not_fit_is_allocated_not_at_all() {
    for backing in BACKINGS {
        for size in SIZES {
            let pool = pool(backing, 4);
            let greedy = object(&pool, 8 * FOLIO, size, Commitment::Overcommitted).unwrap();
            greedy.write(Offset::new(0), &[1]).unwrap();
            let (before, stat) = (counted(&pool), greedy.stat());
            for range in [range(0, 8 * FOLIO), range(100, 7 * FOLIO), range(FOLIO, 4 * FOLIO)] {
                let error = greedy.allocate(range).unwrap_err();
                assert_eq!((error.kind(), error.range()), (ErrorKind::Exhausted, Some(range)));
                assert_eq!((counted(&pool), greedy.stat()), (before, stat));
                assert_clean(&pool, &[&greedy]);
            }
            // A write across the end of what is there does nothing either.
            let mut left = pool.stat().free.whole_pages();
            greedy.allocate(range(FOLIO, left)).unwrap();
            let place = Offset::new((FOLIO + left - 1) << 12);
            let error = greedy.write(place, &[7; 8192]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exhausted);
            let mut byte = [1];
            greedy.read(place, &mut byte).unwrap();
            assert_eq!(byte, [0]);
            // What it gives back is there for others at once.
            greedy.punch_hole(range(0, 3 * FOLIO)).unwrap();
            left = pool.stat().free.whole_pages();
            let other = object(&pool, left, size, Commitment::Reserved).unwrap();
            other.allocate(other.pages()).unwrap();
            assert_clean(&pool, &[&greedy, &other]);
            drop((greedy, other));
            assert_eq!(pool.stat().free, pool.stat().capacity);
            assert_clean(&pool, &[]);
        }
    }
}

#[test]
fn an_account_at_its_limit_stops_a_range_half_way_and_takes_nothing() {
    for size in SIZES {
        let pool = pool(ArenaBacking::Heap, 8);
        let account = pool.open_account(Some(pages(2 * FOLIO + 100)));
        let create = |nr_pages, commitment| {
            let builder = GuestMemfd::builder(pages(nr_pages)).account(&account);
            let builder = builder.folio_size(size).initial(Visibility::Shared);
            builder.commitment(commitment).create(&pool)
        };
        let over = create(3 * FOLIO, Commitment::Reserved).unwrap_err();
        assert_eq!(over.kind(), ErrorKind::LimitReached);
        let greedy = create(6 * FOLIO, Commitment::Overcommitted).unwrap();
        let (before, charged) = (counted(&pool), account.stat());
        assert_eq!((charged.charged, charged.used), (pages(0), pages(0)));
        let error = greedy.allocate(range(0, 4 * FOLIO)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitReached, "{error}");
        let after = account.stat();
        assert_eq!((after.charged, after.used), (pages(0), pages(0)));
        assert_eq!(counted(&pool), before);
        greedy.allocate(range(0, 2 * FOLIO)).unwrap();
        assert_eq!(account.stat().charged, pages(2 * FOLIO));
        account.set_limit(Some(pages(FOLIO)));
        let error = greedy.write(Offset::new(5 << 21), &[1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitReached);
        assert_clean(&pool, &[&greedy]);
        drop(greedy);
        let end = account.stat();
        assert_eq!((end.charged, end.used), (pages(0), pages(0)));
        assert_eq!(counted(&pool), before);
    }
}

#[test]
fn what_is_quarantined_is_at_no_accounts_expense() {
    use gmem::failpoint::{FailPoint, arm};
    for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
        let pool = pool(ArenaBacking::Heap, 2);
        let account = pool.open_account(None);
        let builder = GuestMemfd::builder(pages(2 * FOLIO)).initial(Visibility::Shared);
        let memfd = builder.account(&account).commitment(commitment).create(&pool).unwrap();
        memfd.write(Offset::new(0), &[1]).unwrap();
        let armed = arm(FailPoint::Scrub, 0);
        drop(memfd);
        assert!(armed.has_fired());
        assert_eq!(pool.stat().quarantined, pages(FOLIO));
        let stat = account.stat();
        assert_eq!((stat.charged, stat.used), (pages(0), pages(0)), "{commitment:?}");
        assert_clean(&pool, &[]);
    }
}

#[test]
fn an_account_follows_folios_that_move() {
    let part = |mib| PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(mib));
    let builder = FolioPool::builder().part(part(8), Zone::Normal).part(part(8), Zone::Movable);
    let pool = builder.create().unwrap();
    let account = pool.open_account(None);
    for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
        let memfd = GuestMemfd::builder(ByteSize::from_mib(4))
            .initial(Visibility::Shared)
            .zones(&[Zone::Movable, Zone::Normal])
            .account(&account)
            .commitment(commitment)
            .create(&pool)
            .unwrap();
        memfd.allocate(memfd.pages()).unwrap();
        let before = account.stat();
        assert_eq!(before.used, ByteSize::from_mib(4));
        for zone in [Zone::Normal, Zone::Movable, Zone::Normal, Zone::Movable] {
            let migration = memfd.migrate(memfd.pages(), zone).unwrap();
            assert!(migration.refused.is_empty(), "{migration:?}");
            assert_eq!(account.stat(), before, "{commitment:?} to {zone}");
            assert_clean(&pool, &[&memfd]);
        }
        drop(memfd);
        let stat = account.stat();
        assert_eq!((stat.charged, stat.used), (pages(0), pages(0)));
        assert_eq!(pool.stat().free, pool.stat().capacity);
    }
}

#[test]
fn a_fragmented_arena_says_so_and_can_be_mended() {
    for backing in BACKINGS {
        let pool = pool(backing, 4);
        // Every other page of all of it is somebody's, for good until he is asked to move.
        let comb = object(&pool, 4 * FOLIO, FolioSize::Base, Commitment::Overcommitted).unwrap();
        comb.allocate(comb.pages()).unwrap();
        for page in 0..2 * FOLIO {
            comb.punch_hole(range(2 * page, 1)).unwrap();
        }
        for page in 0..2 * FOLIO {
            comb.write(Offset::new((2 * page + 1) << 12), &[page as u8 | 1]).unwrap();
        }
        let before = counted(&pool);
        assert_eq!((before.free, before.largest_free), (pages(2 * FOLIO), pages(1)));
        let error = object(&pool, FOLIO, FolioSize::Huge2M, Commitment::Reserved).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(error.to_string().contains("can still promise 0, 0 or 1024"), "{error}");
        let late = object(&pool, FOLIO, FolioSize::Huge2M, Commitment::Overcommitted).unwrap();
        assert_eq!(late.allocate(late.pages()).unwrap_err().kind(), ErrorKind::Exhausted);
        assert_eq!(counted(&pool), before);
        let small = object(&pool, 2 * FOLIO, FolioSize::Base, Commitment::Reserved).unwrap();
        small.allocate(small.pages()).unwrap();
        drop(small);
        let compaction = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap();
        assert!(compaction.made.is_some(), "{compaction:?}");
        late.allocate(late.pages()).unwrap();
        for page in 0..2 * FOLIO {
            let mut byte = [0];
            comb.read(Offset::new((2 * page + 1) << 12), &mut byte).unwrap();
            assert_eq!(byte, [page as u8 | 1]);
        }
        assert_clean(&pool, &[&comb, &late]);
        drop((comb, late));
        assert_eq!(pool.stat().largest_free, pages(4 * FOLIO));
    }
}

#[test]
fn requests_larger_than_the_pool_and_absurd_ones() {
    for backing in BACKINGS {
        let pool = pool(backing, 4);
        let before = counted(&pool);
        let all = [FolioSize::Base, FolioSize::Huge2M, FolioSize::Huge1G];
        for size in all {
            for nr_pages in [4 * FOLIO + 1, 1 << 18, 1 << 30, (1 << 51) - 1] {
                let error = object(&pool, nr_pages, size, Commitment::Reserved).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
            }
            for bytes in [0, 1, 4097, 1 << 63, u64::MAX] {
                let builder = GuestMemfd::builder(ByteSize::from_bytes(bytes)).folio_size(size);
                assert_eq!(builder.create(&pool).unwrap_err().kind(), ErrorKind::InvalidSize);
            }
            // Nothing is promised to who overcommits, but words and folios must be written down.
            match object(&pool, (1 << 51) - 1, size, Commitment::Overcommitted) {
                Ok(_) => panic!("the host has no memory for that"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}"),
            }
        }
        // An order that the pool cannot have: nothing is taken in its place.
        let giant = object(&pool, 1 << 18, FolioSize::Huge1G, Commitment::Overcommitted).unwrap();
        assert_eq!(giant.write(Offset::new(0), &[1]).unwrap_err().kind(), ErrorKind::Exhausted);
        assert_eq!(giant.stat().resident, pages(0));
        let made = pool.compact(FolioSize::Huge1G, Zone::Normal).unwrap().made;
        assert_eq!(made, None);
        let nothing = pool.compact(FolioSize::Huge2M, Zone::Cma).unwrap().made;
        assert_eq!(nothing, None);
        for pfn in [4 * FOLIO, u64::MAX >> 12, u64::MAX >> 1, u64::MAX] {
            let error = pool.report_memory_failure(Pfn::new(pfn)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        }
        let memfd = object(&pool, FOLIO + 3, FolioSize::Huge2M, Commitment::Reserved).unwrap();
        for (start, nr_pages) in [(FOLIO + 3, 1), (0, FOLIO + 4), (1 << 50, 1), (3, 1 << 50)] {
            let range = range(start, nr_pages);
            let out = |error: Error| assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
            out(memfd.allocate(range).unwrap_err());
            out(memfd.migrate(range, Zone::Normal).unwrap_err());
            out(memfd.collapse(range).unwrap_err());
            let policy = ContentPolicy::Zero;
            out(memfd.convert(range, Visibility::Private, policy).unwrap_err());
        }
        memfd.punch_hole(range(FOLIO + 3, 1 << 50)).unwrap();
        let scrubber = pool.start_scrubber(ByteSize::from_bytes(u64::MAX)).unwrap();
        memfd.write(Offset::new(0), &[1]).unwrap();
        assert_clean(&pool, &[&memfd, &giant]);
        drop((memfd, giant, scrubber));
        pool.scrub();
        assert_eq!(counted(&pool), before);
        let absurd = PartSpec::new([backing], pages(1)).on_node(NumaNode::new(u32::MAX));
        let error = FolioPool::builder().part(absurd, Zone::Normal).create().unwrap_err();
        let named = [ErrorKind::MissingCapability, ErrorKind::Unsupported];
        assert!(named.contains(&error.kind()), "{error}");
    }
}

/// Whatever gives a folio back, and as often as it likes: it comes back once.
#[test]
fn nothing_comes_back_twice() {
    for backing in BACKINGS {
        for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
            let pool = pool(backing, 4);
            let scrubber = pool.start_scrubber(ByteSize::from_mib(4)).unwrap();
            let memfd = object(&pool, 2 * FOLIO, FolioSize::Huge2M, commitment).unwrap();
            for _ in 0..20 {
                memfd.write(Offset::new(0), &[1; 8192]).unwrap();
                std::thread::scope(|scope| {
                    for _ in 0..4 {
                        let memfd = memfd.clone();
                        scope.spawn(move || memfd.punch_hole(memfd.pages()).map(drop));
                    }
                });
                memfd.punch_hole(memfd.pages()).unwrap();
                memfd.punch_hole(memfd.pages()).unwrap();
                assert_eq!(pool.stat().used, pages(0));
            }
            memfd.allocate(memfd.pages()).unwrap();
            let owner = memfd.register_owner("late").unwrap();
            let pin = memfd.clone().pin(range(0, 1), owner, PinMode::Counted).unwrap().into_owned();
            let clones = [memfd.clone(), memfd.clone()];
            drop((memfd, clones));
            assert_eq!(pool.stat().used, pages(2 * FOLIO), "the pin has it still");
            for _ in 0..2 {
                pool.report_memory_failure(Pfn::new(1)).unwrap();
            }
            drop(pin);
            drop(scrubber);
            pool.scrub();
            pool.scrub();
            assert_eq!(pool.stat().poisoned, pages(1));
            assert_eq!(pool.stat().free, pages(4 * FOLIO - 1));
            assert_clean(&pool, &[]);
        }
    }
}

/// The arenas of this process, opened as somebody with the right to look into it would.
fn arenas() -> Vec<File> {
    let entries = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let is_arena = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("gmem-arena"))
    };
    let paths = entries.map(|entry| entry.path()).filter(is_arena);
    paths.map(|path| File::options().read(true).write(true).open(path).unwrap()).collect()
}

fn refused(outcome: rustix::io::Result<()>) {
    assert_eq!(outcome, Err(Errno::PERM));
}

#[test]
fn nobody_cuts_or_seals_the_files_from_outside_and_holes_are_zeroes() {
    let pool = pool(ArenaBacking::Memfd, 4);
    let memfd = object(&pool, 2 * FOLIO, FolioSize::Huge2M, Commitment::Reserved).unwrap();
    memfd.write(Offset::new(0), &[7; 4 << 12]).unwrap();
    let named = format!("/proc/self/fd/{}", memfd.as_fd().as_raw_fd());
    let identity = File::options().read(true).write(true).open(named).unwrap();
    let files = arenas();
    assert!(!files.is_empty());
    for file in files.iter().chain([&identity]) {
        for size in [4096, 1 << 40] {
            refused(ftruncate(file, size));
        }
        let seals = [SealFlags::WRITE, SealFlags::FUTURE_WRITE, SealFlags::SHRINK, SealFlags::GROW];
        for seal in seals {
            refused(fcntl_add_seals(file, seal));
        }
        let grow = fallocate(file, FallocateFlags::empty(), 1 << 40, 4096);
        assert!(grow.is_err(), "{grow:?}");
    }
    // Everything of every pool of this process: in nextest that is this one.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for file in &files {
        refused(ftruncate(file, 0));
        fallocate(file, hole, 4096, file.metadata().unwrap().len() - 4096).unwrap();
    }
    let found = audit::check(&pool, &[&memfd]);
    assert!(found.to_string().contains("have no memory behind them"), "{found}");
    let mut bytes = [1; 4 << 12];
    memfd.read(Offset::new(0), &mut bytes).unwrap();
    assert_eq!(bytes.iter().filter(|&&byte| byte == 7).count(), 4096);
    assert!(bytes[4096..].iter().all(|&byte| byte == 0));
    memfd.write(Offset::new(8192), &[1; 4096]).unwrap();
    drop(memfd);
    // A look at it brings it back.
    assert_eq!(pool.verify_scrubbed(), Ok(pool.stat().capacity));
    assert_clean(&pool, &[]);
}

#[test]
fn huge_pages_stolen_between_probe_and_use() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let backing = ArenaBacking::MemfdHugetlb2M;
    let offered = FolioPool::probe().available(backing).unwrap_or_default();
    if offered != ByteSize::from_mib(8) {
        let why = format!("{offered:?} of 8 MiB could be had");
        let _ = common::settle(Capability::Hugetlb, Err(why));
        return;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let thief = rustix::fs::memfd_create("thief", flags).unwrap();
    let steal = |nr: u64| fallocate(&thief, FallocateFlags::empty(), 0, nr << 21);
    steal(2).unwrap();
    let error = FolioPool::new(backing, offered).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    let preference = [backing, ArenaBacking::Memfd];
    let pool = FolioPool::with_preference(&preference, offered).unwrap();
    let report = &pool.parts()[0];
    assert_eq!(pool.backing(), ArenaBacking::Memfd);
    assert_eq!((report.passed_over[0].0, report.passed_over[0].1.kind()), (backing, error.kind()));
    assert!(report.to_string().contains("nr_hugepages"), "{report}");
    assert_eq!(FolioPool::probe().available(backing), Ok(ByteSize::from_mib(4)), "none is leaked");
    drop(pool);

    // And from a pool that has them already: by a hole from outside, in memory that is nobody's just now.
    let pool = FolioPool::new(backing, ByteSize::from_mib(4)).unwrap();
    let memfd = object(&pool, 2 * FOLIO, FolioSize::Huge2M, Commitment::Reserved).unwrap();
    memfd.write(Offset::new(0), &[1; 4096]).unwrap();
    let used = arenas().pop().unwrap();
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&used, hole, 2 << 20, 2 << 20).unwrap();
    steal(3).unwrap();
    assert_eq!(pool.stat().huge, ByteSize::from_mib(2));
    let error = memfd.write(Offset::new(2 << 20), &[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    let found = audit::check(&pool, &[&memfd]).to_string();
    assert!(found.contains("have no memory behind them"), "{found}");
    let mut byte = [0];
    memfd.read(Offset::new(0), &mut byte).unwrap();
    assert_eq!(byte, [1]);
    // It is lost to the pool, which had no other; a thief who gives it back is too late.
    let stat = pool.stat();
    assert_eq!([stat.quarantined, stat.over_promised], [ByteSize::from_mib(2); 2]);
    fallocate(&thief, hole, 0, 6 << 20).unwrap();
    let error = memfd.write(Offset::new(2 << 20), &[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    // The same in dirty memory: what cannot be scrubbed is nobody's any more.
    let lazy = pool.start_scrubber(ByteSize::default()).unwrap();
    drop(memfd);
    drop(lazy);
    fallocate(&used, hole, 0, 4 << 20).unwrap();
    steal(4).unwrap();
    assert_eq!(pool.scrub(), ByteSize::default());
    let stat = pool.stat();
    assert_eq!((stat.quarantined, stat.dirty), (stat.capacity, ByteSize::default()));
    let error = object(&pool, FOLIO, FolioSize::Huge2M, Commitment::Reserved).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    drop(thief);
    assert_eq!(pool.scrub(), ByteSize::default());
    assert_eq!(pool.stat().quarantined, stat.capacity, "for good");
}

#[test]
fn what_the_host_does_not_have_is_reported_in_order() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Thp)) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "never");
    let preference = [
        ArenaBacking::MemfdHugetlb1G,
        ArenaBacking::MemfdHugetlb2M,
        ArenaBacking::MemfdThp,
        ArenaBacking::Memfd,
    ];
    // More than anybody has reserved of huge pages, and no multiple of a GiB.
    let size = ByteSize::from_mib(64);
    let pool = FolioPool::with_preference(&preference, size).unwrap();
    let why: Vec<_> =
        pool.parts()[0].passed_over.iter().map(|(it, why)| (*it, why.kind())).collect();
    if why.len() == 3 {
        assert_eq!(
            why,
            [
                (preference[0], ErrorKind::Unaligned),
                (preference[1], ErrorKind::Exhausted),
                (preference[2], ErrorKind::MissingCapability)
            ]
        );
        assert_eq!((pool.backing(), pool.stat().huge), (ArenaBacking::Memfd, ByteSize::default()));
    } else {
        // Somebody else has reserved huge pages just now.
        assert_eq!(pool.backing(), ArenaBacking::MemfdHugetlb2M);
        assert_eq!(pool.stat().huge, size);
    }
}

/// What an object may hold costs memory where it holds something.
#[test]
fn an_object_of_absurd_size_takes_little() {
    let resident = || -> u64 {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let pool = pool(ArenaBacking::Heap, 2);
    let before = resident();
    let memfd = GuestMemfd::builder(ByteSize::from_mib(32 << 10))
        .folio_size(FolioSize::Base)
        .initial(Visibility::Shared)
        .commitment(Commitment::Overcommitted)
        .create(&pool)
        .unwrap();
    memfd.write(Offset::new(20 << 30), &[1]).unwrap();
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for 32 GiB of which a page is there");
}
