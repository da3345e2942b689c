//! Nothing that an owner wrote is there for the next one, whatever way the memory went from one to the other.

mod common;
#[path = "common/taint.rs"]
mod taint;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::Capability;
use gmem::addr::ByteSize;
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::failpoint::{FailPoint, arm};
use gmem::geometry::FolioSize;
use gmem::{
    Ack, ArenaBacking, Commitment, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, PartSpec,
    Scrubber, Subscriber, Visibility, Zone,
};
use taint::{assert_nobodys, assert_owners, at, range, write};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const FOLIO: u64 = 512;
/// Two zones, as many folios in each.
const NR_FOLIOS: u64 = 3;
const BACKINGS: [ArenaBacking; 2] = [ArenaBacking::Heap, ArenaBacking::Memfd];

/// A pool, and who cleans it.
struct Host {
    pool: FolioPool,
    _scrubber: Option<Scrubber>,
    what: String,
}

/// Every backing, without a scrubber, with one that leaves everything to others, and with one that cleans all.
fn hosts() -> impl Iterator<Item = Host> {
    let keeps = [None, Some(0), Some(2), Some(64)];
    BACKINGS.into_iter().flat_map(move |backing| keeps.map(|keep| host(backing, keep)))
}

fn host(backing: ArenaBacking, keep: Option<u64>) -> Host {
    let part = || PartSpec::new([backing], ByteSize::from_pages(NR_FOLIOS * FOLIO));
    let builder = FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable);
    let pool = builder.create().unwrap();
    let scrubber = keep.map(|mib| pool.start_scrubber(ByteSize::from_mib(mib)).unwrap());
    Host { pool, _scrubber: scrubber, what: format!("{backing}, scrubber that keeps {keep:?}") }
}

fn object(pool: &FolioPool, nr_pages: u64, size: FolioSize) -> GuestMemfd {
    GuestMemfd::builder(ByteSize::from_pages(nr_pages))
        .initial(Visibility::Shared)
        .folio_size(size)
        .zones(&[Zone::Normal, Zone::Movable])
        .private_placement(gmem::PrivatePlacement::Refuse)
        .commitment(Commitment::Overcommitted)
        .create(pool)
        .unwrap()
}

/// A tainted object of several folios and a tail.
fn owner(pool: &FolioPool, size: FolioSize, owner: u64) -> GuestMemfd {
    let memfd = object(pool, 2 * FOLIO + 7, size);
    write(&memfd, memfd.pages(), owner);
    memfd
}

/// Folios of both sizes look at everything, in both zones: what one leaves behind is what the next one finds.
fn assert_swept(host: &Host, what: &str) {
    let Host { pool, what: on, .. } = host;
    let what = format!("{what} on {on}");
    for size in [FolioSize::Huge2M, FolioSize::Base] {
        let memfd = object(pool, 2 * NR_FOLIOS * FOLIO, size);
        for folio in 0..2 * NR_FOLIOS {
            let pages = range(folio * FOLIO, FOLIO);
            // As much as is to be had.
            if memfd.allocate(pages).is_ok() {
                assert_nobodys(&memfd, pages, &what);
                if size == FolioSize::Huge2M {
                    write(&memfd, pages, 0x900);
                }
            }
        }
    }
    assert_eq!(audit::check(pool, &[]).to_string(), "clean", "{what}");
}

/// Writes a word of this owner's to a place that may not be there, as a device would that has kept a pointer.
fn scribble(memory: &File, at: u64, owner: u64) -> bool {
    memory.write_at(&[owner as u8; 64], at).is_ok()
}

fn all_free(host: &Host) {
    assert_eq!(host.pool.stat().free, host.pool.stat().capacity, "{}", host.what);
}

#[test]
fn after_a_drop() {
    for host in hosts() {
        for (nr, size) in [(1, FolioSize::Huge2M), (2, FolioSize::Base)] {
            drop(owner(&host.pool, size, nr));
            assert_swept(&host, "drop");
        }
        all_free(&host);
    }
}

#[test]
fn after_holes_whole_and_in_part() {
    for host in hosts() {
        let memfd = owner(&host.pool, FolioSize::Huge2M, 1);
        let other = object(&host.pool, 2 * FOLIO, FolioSize::Huge2M);
        // A whole folio, half of the next one, and a page of the tail.
        memfd.punch_hole(range(0, FOLIO + 256)).unwrap();
        memfd.punch_hole(range(2 * FOLIO + 3, 1)).unwrap();
        assert_nobodys(&other, other.pages(), &format!("a punched folio on {}", host.what));
        write(&other, other.pages(), 2);
        assert_owners(&memfd, range(FOLIO + 256, 256), 1, "what was not punched");
        // Filled again, it is the same owner's, and forgotten all the same.
        for pages in [range(FOLIO, 256), range(2 * FOLIO + 3, 1)] {
            assert_nobodys(&memfd, pages, &format!("a filled hole on {}", host.what));
            write(&memfd, pages, 3);
        }
        memfd.punch_hole(range(FOLIO + 100, 300)).unwrap();
        drop((memfd, other));
        assert_swept(&host, "drop with holes");
        all_free(&host);
    }
}

#[test]
fn after_a_conversion_that_zeroes() {
    for host in hosts() {
        let builder = GuestMemfd::builder(ByteSize::from_pages(2 * FOLIO));
        let memfd = builder.initial(Visibility::Shared).create(&host.pool).unwrap();
        for (to, back) in [(ContentPolicy::Zero, PRESERVE), (PRESERVE, ContentPolicy::Zero)] {
            write(&memfd, memfd.pages(), 1);
            let pages = range(100, 700);
            let _ = memfd.convert(pages, Visibility::Private, to).unwrap();
            let _ = memfd.convert(pages, Visibility::Shared, back).unwrap();
            assert_nobodys(&memfd, pages, &format!("{to:?}, {back:?} on {}", host.what));
            assert_owners(&memfd, range(0, 100), 1, "what was not converted");
        }
        write(&memfd, memfd.pages(), 1);
        let _ = memfd.convert(memfd.pages(), Visibility::Private, PRESERVE).unwrap();
        drop(memfd);
        assert_swept(&host, "drop of private memory");
        all_free(&host);
    }
}

#[test]
fn where_a_folio_moved_away() {
    for host in hosts() {
        let memfd = owner(&host.pool, FolioSize::Huge2M, 1);
        for to in [Zone::Movable, Zone::Normal, Zone::Movable] {
            let migration = memfd.migrate(memfd.pages(), to).unwrap();
            assert!(migration.refused.is_empty(), "{:?} on {}", migration.refused, host.what);
            assert_owners(&memfd, memfd.pages(), 1, "moved");
            assert_swept(&host, "migration");
        }
        drop(memfd);
        assert_swept(&host, "migration and drop");
        all_free(&host);
    }
}

#[test]
fn where_folios_made_room() {
    for host in hosts() {
        let mut small: Vec<_> =
            (0..6).map(|nr| owner(&host.pool, FolioSize::Base, nr % 3 + 1)).take(2).collect();
        drop(small.remove(0));
        for zone in [Zone::Normal, Zone::Movable] {
            let _ = host.pool.compact(FolioSize::Huge2M, zone).unwrap();
        }
        assert_owners(&small[0], small[0].pages(), 2, "moved");
        assert_swept(&host, "compaction");
        drop(small);
        all_free(&host);
    }
}

/// Raw pointers that somebody kept may write while a folio is put behind them.
#[test]
fn after_an_allocation_that_failed_half_way_with_a_writer_at_the_view() {
    const PAGES: u64 = 4;
    if !common::require(Capability::Uffd) {
        return;
    }
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_pages(PAGES)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_pages(PAGES)).folio_size(FolioSize::Base);
    let memfd = builder.commitment(Commitment::Overcommitted).create(&pool).unwrap();
    let view = memfd.map_view().unwrap();
    let base = view.hva().get() as u64;
    let (stop, hits) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = File::options().write(true).open("/proc/self/mem").unwrap();
            // Not for ever, should the others panic.
            let since = Instant::now();
            while !stop.load(Ordering::Relaxed) && since.elapsed() < Duration::from_secs(20) {
                let hit = scribble(&memory, base, 5);
                hits.fetch_add(u64::from(hit), Ordering::Relaxed);
            }
        });
        // The page is private, so whatever the writer hits was there for a moment.
        let since = Instant::now();
        for round in 0..u64::MAX {
            if since.elapsed() > Duration::from_secs(3) {
                break;
            }
            let point = if round % 4 == 0 { FailPoint::Memory } else { FailPoint::Folio };
            let armed = (round % 2 == 0).then(|| arm(point, PAGES as u32 - 1));
            let outcome = memfd.allocate(memfd.pages());
            assert_eq!(outcome.is_err(), armed.is_some());
            drop(armed);
            for (page, bytes) in memfd.bytes_behind() {
                assert!(bytes.iter().all(|&byte| byte == 0), "page {page} in round {round}");
            }
            memfd.punch_hole(memfd.pages()).unwrap();
            let next = GuestMemfd::builder(ByteSize::from_pages(PAGES)).folio_size(FolioSize::Base);
            let next = next.initial(Visibility::Shared).create(&pool).unwrap();
            assert_nobodys(&next, next.pages(), "the next owner");
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("the writer has hit {} times", hits.into_inner());
    drop((view, memfd));
    assert_eq!(pool.stat().free, pool.stat().capacity);
    assert_eq!(audit::check(&pool, &[]).to_string(), "clean");
}

#[test]
fn after_other_operations_that_failed() {
    for host in hosts() {
        let points = [FailPoint::Memory, FailPoint::Folio, FailPoint::Barrier];
        for point in points {
            let memfd = owner(&host.pool, FolioSize::Huge2M, 1);
            let spared = arm(point, 0);
            let failed = [
                memfd.punch_hole(range(0, FOLIO)).is_err(),
                memfd.migrate(memfd.pages(), Zone::Movable).unwrap().refused.is_empty(),
                memfd.convert(range(FOLIO, 5), Visibility::Private, ContentPolicy::Zero).is_err(),
            ];
            drop(spared);
            assert!(failed.contains(&true) || point == FailPoint::Folio, "{point:?}");
            memfd.punch_hole(range(0, FOLIO)).unwrap();
            let armed = arm(FailPoint::Folio, 0);
            assert!(memfd.allocate(range(0, FOLIO)).is_err() && armed.has_fired());
            drop(armed);
            assert_nobodys(&memfd, range(0, FOLIO), "an allocation after one that failed");
            drop(memfd);
            assert_swept(&host, &format!("{point:?}"));
        }
        all_free(&host);
    }
}

/// What could not be scrubbed is nobody's any more, and nobody reads it.
#[test]
fn after_a_scrub_that_failed() {
    for backing in BACKINGS {
        let host = host(backing, None);
        let memfd = owner(&host.pool, FolioSize::Huge2M, 1);
        let armed = arm(FailPoint::Scrub, 1);
        drop(memfd);
        assert!(armed.has_fired());
        let stat = host.pool.stat();
        assert_eq!(stat.quarantined, ByteSize::from_mib(2));
        assert_eq!(stat.free.get() + stat.quarantined.get(), stat.capacity.get());
        assert_swept(&host, "a failed scrub");
        let after = host.pool.stat();
        assert_eq!((after.free, after.quarantined), (stat.free, stat.quarantined), "for good");
    }
}

#[test]
fn after_a_scrubber_died_at_work() {
    for backing in BACKINGS {
        for dies_after in [0, 2] {
            let mut host = host(backing, None);
            let armed = arm(FailPoint::ScrubPanic, dies_after);
            let mortal = host.pool.start_scrubber(ByteSize::from_mib(64)).unwrap();
            drop(armed);
            // It may die before or after the next owner comes.
            drop(owner(&host.pool, FolioSize::Huge2M, 1));
            let next = object(&host.pool, 3 * FOLIO, FolioSize::Huge2M);
            assert_nobodys(&next, next.pages(), "a scrubber that dies");
            drop(next);
            drop(owner(&host.pool, FolioSize::Huge2M, 3));
            while mortal.is_alive() {
                drop(owner(&host.pool, FolioSize::Huge2M, 4));
            }
            assert_swept(&host, "a scrubber that died");
            host._scrubber = Some(host.pool.start_scrubber(ByteSize::from_mib(64)).unwrap());
            assert_swept(&host, "a scrubber that took its place");
            host._scrubber = None;
            host.pool.scrub();
            drop(mortal);
            all_free(&host);
        }
    }
}

#[derive(Debug)]
struct Panics;

impl Subscriber for Panics {
    fn revoke(&self, _: &[HandOutRun], _: Ack) {
        panic!("a subscriber is broken");
    }

    fn grant(&self, _: &[HandOutRun]) {}

    fn fence(&self) -> Result<(), Errno> {
        Ok(())
    }
}

#[test]
fn after_a_quarantine() {
    for host in hosts() {
        let memfd = owner(&host.pool, FolioSize::Huge2M, 1);
        let subscription = memfd.subscribe(std::sync::Arc::new(Panics)).unwrap();
        let convert = || memfd.convert(range(5, 1), Visibility::Private, PRESERVE);
        assert!(catch_unwind(AssertUnwindSafe(convert)).is_err());
        drop(subscription);
        let error = memfd.read(at(5), &mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Quarantined);
        assert_owners(&memfd, range(6, 100), 1, "beside it");
        drop(memfd);
        let stat = host.pool.stat();
        assert_eq!(stat.quarantined, ByteSize::from_mib(2), "{}", host.what);
        assert_swept(&host, "quarantine");
        assert_eq!(host.pool.stat().quarantined, stat.quarantined);
        assert_eq!(host.pool.stat().free, stat.free);
    }
}
