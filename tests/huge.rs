//! Folios of 1 GiB, and huge pages on demand.

#[path = "common/arenas.rs"]
mod arenas;
mod common;
#[path = "common/setting.rs"]
mod setting;

use std::fs;
use std::os::fd::OwnedFd;

use common::Capability;
use common::probe::NR_GIANT_PAGES;
use gmem::addr::{Access, ByteSize, Offset, Pfn, Pgoff};
use gmem::audit;
use gmem::error::ErrorKind;
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, Commitment, ContentPolicy, FolioPool, GuestMemfd, HostView, PinMode,
    SigbusHandler, Touch, Visibility, Zone,
};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const FOLIO: u64 = 512;
const GIANT: u64 = 512 * 512;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn at(page: u64) -> Offset {
    Offset::new(page << 12)
}

fn is_readable(view: &HostView, page: u64) -> bool {
    let handler = SigbusHandler::install().unwrap();
    matches!(view.touch(handler, at(page), Access::Read).unwrap(), Touch::Byte(_))
}

fn shared(pool: &FolioPool, nr_pages: u64, size: FolioSize) -> GuestMemfd {
    let builder = GuestMemfd::builder(ByteSize::from_pages(nr_pages)).folio_size(size);
    builder.initial(Visibility::Shared).create(pool).unwrap()
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
}

/// Writes a byte here and there.
fn mark(memfd: &GuestMemfd, pages: impl Iterator<Item = u64>) {
    pages.for_each(|page| memfd.write(at(page), &[page as u8 | 1]).unwrap());
}

fn is_marked(memfd: &GuestMemfd, page: u64) -> bool {
    let mut byte = [0];
    memfd.read(at(page), &mut byte).unwrap();
    byte == [page as u8 | 1]
}

/// What a folio of 1 GiB has to stand, on pages of 4 KiB or of 1 GiB.
fn live_in_a_gib(pool: &FolioPool, has_view: bool) {
    let is_hugetlb = pool.backing() == ArenaBacking::MemfdHugetlb1G;
    let memfd = shared(pool, GIANT, FolioSize::Huge1G);
    let here = || [0, 3, 777, GIANT - 1].into_iter();
    mark(&memfd, here());
    assert_eq!(memfd.stat().resident, FolioSize::Huge1G.bytes(), "one touch, one folio");
    let view = has_view.then(|| memfd.map_view().unwrap());
    for page in [3, 100_000] {
        let _ = memfd.convert(range(page, 1), Visibility::Private, PRESERVE).unwrap();
    }
    if let Some(view) = &view {
        assert!(!is_readable(view, 3));
        assert_eq!(is_readable(view, 4), !is_hugetlb, "views go by what the pages are");
        assert_eq!(is_readable(view, GIANT - 1), !is_hugetlb);
    }
    assert!(is_marked(&memfd, 777) && is_marked(&memfd, GIANT - 1));
    assert_eq!(memfd.read(at(3), &mut [0]).unwrap_err().kind(), ErrorKind::NotShared);
    assert_clean(pool, &memfd);
    for page in [3, 100_000] {
        let _ = memfd.convert(range(page, 1), Visibility::Shared, PRESERVE).unwrap();
    }
    assert!(here().all(|page| is_marked(&memfd, page)));
    assert!(view.iter().all(|view| is_readable(view, 3) && is_readable(view, 4)));

    let punched = memfd.punch_hole(range(1, GIANT - 1)).unwrap();
    assert_eq!(punched.returned(), ByteSize::default());
    assert!(is_marked(&memfd, 0) && !is_marked(&memfd, 3));
    assert_eq!(memfd.stat().holes, ByteSize::from_pages(GIANT - 1));
    memfd.write(at(777), &[1]).unwrap();
    assert_clean(pool, &memfd);
    let punched = memfd.punch_hole(memfd.pages()).unwrap();
    assert_eq!(punched.returned(), FolioSize::Huge1G.bytes(), "with its last page it goes");
    mark(&memfd, here());
    assert!(view.iter().all(|view| is_readable(view, 4)));
    drop((view, memfd));
    assert_eq!(pool.stat().free, pool.stat().capacity);
    assert_eq!(pool.stat().largest_free, FolioSize::Huge1G.bytes());
    assert_eq!(audit::check(pool, &[]).to_string(), "clean");
}

#[test]
fn a_folio_of_a_gib_on_small_pages() {
    let has_view = common::require(Capability::Uffd);
    let pool = FolioPool::new(ArenaBacking::Memfd, FolioSize::Huge1G.bytes()).unwrap();
    live_in_a_gib(&pool, has_view);
}

#[test]
fn a_folio_of_a_gib_on_a_page_of_a_gib() {
    if !(common::require(Capability::Hugetlb1G) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_GIANT_PAGES, "1");
    let pool = match FolioPool::new(ArenaBacking::MemfdHugetlb1G, FolioSize::Huge1G.bytes()) {
        Ok(pool) => pool,
        Err(error) => {
            let _ = common::settle(Capability::Hugetlb1G, Err(error.to_string()));
            return;
        }
    };
    for (nr_pages, size) in [(GIANT, FolioSize::Huge2M), (FOLIO, FolioSize::Huge1G)] {
        let builder = GuestMemfd::builder(ByteSize::from_pages(nr_pages)).folio_size(size);
        let error = builder.create(&pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidSize);
        assert!(error.to_string().contains("1024 MiB"), "{error}");
    }
    live_in_a_gib(&pool, true);
}

/// Views go by what the pages are, and not by what the folios are.
#[test]
fn a_folio_of_a_gib_on_pages_of_2_mib() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "512");
    let pool = match FolioPool::new(ArenaBacking::MemfdHugetlb2M, FolioSize::Huge1G.bytes()) {
        Ok(pool) => pool,
        Err(error) => {
            let _ = common::settle(Capability::Hugetlb, Err(error.to_string()));
            return;
        }
    };
    let memfd = shared(&pool, GIANT, FolioSize::Huge1G);
    let view = memfd.map_view().unwrap();
    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    memfd.punch_hole(range(5 * FOLIO, 7)).unwrap();
    for (page, is_shown) in [(0, false), (3, false), (FOLIO, true), (5 * FOLIO + 9, false)] {
        assert_eq!(is_readable(&view, page), is_shown, "{page}");
    }
    assert_eq!(memfd.stat().mapped, ByteSize::from_pages(GIANT - 2 * FOLIO));
    let _ = memfd.convert(range(3, 1), Visibility::Shared, PRESERVE).unwrap();
    mark(&memfd, 5 * FOLIO..5 * FOLIO + 7);
    assert!(is_readable(&view, 3) && is_readable(&view, 5 * FOLIO));
    assert_clean(&pool, &memfd);
    drop((view, memfd));
    assert_eq!(pool.stat().largest_free, FolioSize::Huge1G.bytes());
}

/// What is left behind the last whole GiB is smaller folios, and a scrubber cleans all sizes.
#[test]
fn a_gib_with_a_tail_and_a_scrubber() {
    let tail = 3 * FOLIO + 5;
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_pages(GIANT + tail)).unwrap();
    let scrubber = pool.start_scrubber(pool.stat().capacity).unwrap();
    let memfd = shared(&pool, GIANT + tail, FolioSize::Huge1G);
    mark(&memfd, [5, GIANT, GIANT + FOLIO, GIANT + tail - 1].into_iter());
    assert_eq!(memfd.stat().resident.whole_pages(), GIANT + 2 * FOLIO + 1);
    drop(memfd);
    while pool.stat().dirty != ByteSize::default() {
        assert!(scrubber.is_alive());
        std::thread::yield_now();
    }
    assert_eq!(pool.verify_scrubbed(), Ok(pool.stat().capacity));
    // A failed frame costs the GiB, but not what is left of it.
    pool.report_memory_failure(gmem::addr::Pfn::new(4)).unwrap();
    let builder = GuestMemfd::builder(FolioSize::Huge1G.bytes()).folio_size(FolioSize::Huge1G);
    assert_eq!(builder.create(&pool).unwrap_err().kind(), ErrorKind::Exhausted);
    let rest = shared(&pool, GIANT - FOLIO, FolioSize::Huge2M);
    mark(&rest, [0, GIANT - FOLIO - 1].into_iter());
    drop((rest, scrubber));
    assert_eq!(pool.stat().free.whole_pages(), GIANT + tail - 1);
}

/// Splits a huge page of the process's arenas from outside: a hole in it, which is filled again.
fn split_from_outside(page: u64) {
    use rustix::fs::{FallocateFlags, fallocate};
    for entry in fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok) {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if !target.to_string_lossy().contains("gmem-arena") {
            continue;
        }
        let file = fs::File::options().read(true).write(true).open(entry.path()).unwrap();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, hole, page << 12, 4096).unwrap();
        fallocate(&file, FallocateFlags::KEEP_SIZE, page << 12, 4096).unwrap();
    }
}

#[test]
fn collapse_on_demand() {
    if !(common::require(Capability::Thp) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let pool = FolioPool::new(ArenaBacking::MemfdThp, ByteSize::from_mib(8)).unwrap();
    let all = pool.stat().huge;
    if all != ByteSize::from_mib(8) {
        let _ = common::settle(Capability::Thp, Err(format!("only {all:?} of 8 MiB were huge")));
        return;
    }
    let memfd = shared(&pool, 3 * FOLIO + 9, FolioSize::Huge2M);
    memfd.allocate(memfd.pages()).unwrap();
    // Which takes their entries out of views: there is none yet.
    for folio in 0..4 {
        split_from_outside(folio * FOLIO + 100);
    }
    assert_eq!(pool.stat().huge, ByteSize::default());
    let view = memfd.map_view().unwrap();
    mark(&memfd, 0..3 * FOLIO + 9);
    for page in [5, 700] {
        let _ = memfd.convert(range(page, 1), Visibility::Private, PRESERVE).unwrap();
    }
    memfd.punch_hole(range(50, 3)).unwrap();
    let owner = memfd.register_owner("vfio").unwrap();
    let pin = memfd.pin(range(2 * FOLIO + 1, 1), owner, PinMode::Counted).unwrap();
    let seen =
        || -> Vec<bool> { (0..3 * FOLIO + 9).map(|page| is_readable(&view, page)).collect() };
    let (before, stat) = (seen(), memfd.stat());
    assert!(!before[5] && !before[50] && !before[700] && before[6]);

    let small = pool.stat().huge;
    let collapse = memfd.collapse(memfd.pages()).unwrap();
    println!("{collapse:?}: {small:?} -> {:?}", pool.stat().huge);
    assert_eq!(collapse.collapsed, ByteSize::from_mib(4));
    let [(pages, error)] = collapse.refused.as_slice() else { panic!("{collapse:?}") };
    assert_eq!((*pages, error.kind()), (range(2 * FOLIO, FOLIO), ErrorKind::Busy));
    assert_eq!(pool.stat().huge.get(), small.get() + (4 << 20), "by the kernel's account");
    assert_eq!((seen(), memfd.stat()), (before.clone(), stat));
    assert_clean(&pool, &memfd);

    drop(pin);
    let collapse = memfd.collapse(range(2 * FOLIO + 7, 2)).unwrap();
    assert_eq!(collapse.collapsed, ByteSize::from_mib(2));
    assert!(collapse.refused.is_empty(), "{collapse:?}");
    assert_eq!(seen(), before);
    for page in [5, 700] {
        let _ = memfd.convert(range(page, 1), Visibility::Shared, PRESERVE).unwrap();
    }
    let is_punched = |page: &u64| (50..53).contains(page);
    assert!(
        (0..3 * FOLIO + 9).filter(|page| !is_punched(page)).all(|page| is_marked(&memfd, page))
    );
    assert!((50..53).all(|page| !is_marked(&memfd, page)));
    assert_clean(&pool, &memfd);
    assert_eq!(memfd.collapse(range(0, 4 * FOLIO)).unwrap_err().kind(), ErrorKind::OutOfRange);

    // Where the host does not allow it, or has failed memory there.
    memfd.report_memory_failure(at(3)).unwrap();
    let refused = memfd.collapse(range(0, 1)).unwrap().refused;
    assert_eq!(refused[0].1.kind(), ErrorKind::Quarantined);
    fs::write(SHMEM_ENABLED, "deny").unwrap();
    let refused = memfd.collapse(range(FOLIO, 1)).unwrap().refused;
    assert_eq!(refused[0].1.kind(), ErrorKind::MissingCapability, "{refused:?}");
    assert!(is_readable(&view, FOLIO) && is_marked(&memfd, FOLIO));
}

#[test]
fn other_backings_do_not_collapse() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        let pool = FolioPool::new(backing, ByteSize::from_mib(6)).unwrap();
        let memfd = shared(&pool, 2 * FOLIO + 3, FolioSize::Huge2M);
        mark(&memfd, [0, 2 * FOLIO].into_iter());
        let collapse = memfd.collapse(memfd.pages()).unwrap();
        assert_eq!(collapse.collapsed, ByteSize::default());
        let [(pages, error)] = collapse.refused.as_slice() else { panic!("{collapse:?}") };
        assert_eq!((*pages, error.kind()), (range(0, FOLIO), ErrorKind::Unsupported));
        assert!(is_marked(&memfd, 0));
        assert_clean(&pool, &memfd);
    }
}

/// A collapse takes pages out of views for its time. Whoever pins one right afterwards finds it there.
#[test]
fn a_pin_beside_collapses_finds_its_page() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
    let memfd = shared(&pool, 2 * FOLIO, FolioSize::Huge2M);
    memfd.allocate(memfd.pages()).unwrap();
    let view = memfd.map_view().unwrap();
    let owner = memfd.register_owner("device").unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let mut nr_pins = 0;
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Relaxed: it ends soon enough, and orders nothing.
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                memfd.collapse(memfd.pages()).unwrap();
            }
        });
        for _ in 0..200_000 {
            if let Ok(_pin) = memfd.pin(range(FOLIO - 1, 1), owner, PinMode::Counted) {
                nr_pins += 1;
                if !is_readable(&view, FOLIO - 1) {
                    // Relaxed: as above.
                    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("pin {nr_pins} finds nothing in the view");
                }
            }
        }
        // Relaxed: as above.
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(nr_pins > 1000, "{nr_pins}");
}

/// Takes the first so many folios of 2 MiB out of a pool of 10 MiB, which has all of the host's, and returns who has
/// them now.
fn steal(nr: u64) -> OwnedFd {
    let arena = arenas::of_size(10 << 20).pop().unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&arena, punch, 0, nr << 21).unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let thief = memfd_create("thief", flags).unwrap();
    fallocate(&thief, FallocateFlags::empty(), 0, nr << 21).unwrap();
    thief
}

/// A folio that somebody has stolen while it was free and clean is in nobody's way, at home or not.
#[test]
fn a_stolen_folio_is_passed_over() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "5");
    for (nr_pages, commitment) in [(512, Commitment::Reserved), (9 << 9, Commitment::Overcommitted)]
    {
        let pool = FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(10)).unwrap();
        let thief = steal(2);
        let builder = GuestMemfd::builder(ByteSize::from_pages(nr_pages));
        let builder = builder.initial(Visibility::Shared).commitment(commitment);
        let memfd = builder.create(&pool).unwrap();
        memfd.write(at(3), &[7]).unwrap();
        let (_, frames) = memfd.frames_of(range(0, 512)).unwrap().next().unwrap();
        assert!(frames.start() >= Pfn::new(1024), "{frames:?}");
        let [used, over] = [pool.stat().used, pool.stat().over_promised];
        assert_eq!([used, over].map(ByteSize::whole_pages), [512, 0], "{commitment:?}");
        // Who looks finds out, and others take what is there.
        pool.scrub();
        assert_eq!(pool.stat().quarantined.whole_pages() % 512, 0);
        assert_eq!(nr_left(&pool), 2, "{commitment:?}");
        drop((memfd, thief));
        pool.scrub();
        let stat = pool.stat();
        assert_eq!(stat.free.get() + stat.quarantined.get(), stat.capacity.get());
        assert!(stat.quarantined.whole_pages() <= 1024, "{stat:?}");
    }
}

/// How many folios of 2 MiB can still be taken.
fn nr_left(pool: &FolioPool) -> u64 {
    let builder = GuestMemfd::builder(ByteSize::from_mib(10)).initial(Visibility::Shared);
    let memfd = builder.commitment(Commitment::Overcommitted).create(pool).unwrap();
    (0..5).filter(|nr| memfd.write(at(nr * 512), &[1]).is_ok()).count() as u64
}

/// Compaction finds the block that is there, and none if there is none.
#[test]
fn compaction_answers_no_block_that_was_stolen() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "5");
    let pool = FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(10)).unwrap();
    // What is free is one block then, and the first of it is answered first.
    let memfd = GuestMemfd::builder(ByteSize::from_mib(10)).initial(Visibility::Shared);
    let memfd = memfd.commitment(Commitment::Overcommitted).create(&pool).unwrap();
    memfd.write(at(4 * 512), &[1]).unwrap();
    assert_eq!(pool.stat().largest_free, ByteSize::from_mib(8));
    for (nr, found) in [(2, Some(Pfn::new(1024))), (4, None)] {
        let thief = steal(nr);
        let made = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap().made;
        assert_eq!(made.map(|frames| frames.start()), found);
        assert_eq!(pool.stat().quarantined.whole_pages(), nr * 512);
        drop(thief);
    }
}
