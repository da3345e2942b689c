//! Memory that fails: fenced off, counted, and nobody's ever again; the rest of its folio is.

mod common;
#[path = "common/setting.rs"]
mod setting;
#[path = "common/taint.rs"]
mod taint;

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset, Pfn};
use gmem::audit;
use gmem::error::{Errno, Error, ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::hyp::Hypervisor;
use gmem::{
    Ack, ArenaBacking, CancelToken, Commitment, ContentPolicy, ConvertOptions, FolioPool,
    GuestMemfd, HandOutRun, Heard, HostView, PageStatus, PartSpec, PinGuard, PinMode,
    SigbusHandler, SubscribeOptions, Subscriber, Touch, Visibility, Wait, Zone,
};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use taint::{assert_nobodys, assert_owners, at, range, write};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const FOLIO: u64 = 512;
const BACKINGS: [ArenaBacking; 2] = [ArenaBacking::Heap, ArenaBacking::Memfd];

fn pool(backing: ArenaBacking, nr_folios: u64) -> FolioPool {
    FolioPool::new(backing, ByteSize::from_pages(nr_folios * FOLIO)).unwrap()
}

fn shared(pool: &FolioPool, nr_pages: u64, size: FolioSize) -> Result<GuestMemfd, Error> {
    let builder = GuestMemfd::builder(ByteSize::from_pages(nr_pages)).folio_size(size);
    builder.initial(Visibility::Shared).create(pool)
}

fn counted(pool: &FolioPool) -> [u64; 4] {
    let stat = pool.stat();
    [stat.free, stat.used, stat.quarantined, stat.poisoned].map(ByteSize::whole_pages)
}

fn assert_clean(pool: &FolioPool, objects: &[&GuestMemfd]) {
    assert_eq!(audit::check(pool, objects).to_string(), "clean");
}

/// All that is free can be taken in folios of 4 KiB, and no more; nothing is in there.
fn assert_rest_is_usable(pool: &FolioPool, nr_pages: u64) {
    assert_eq!(pool.stat().free.whole_pages(), nr_pages);
    let all = shared(pool, nr_pages, FolioSize::Base).unwrap();
    assert_nobodys(&all, all.pages(), "beside failed frames");
    write(&all, all.pages(), 99);
    assert_eq!(shared(pool, 1, FolioSize::Base).unwrap_err().kind(), ErrorKind::Exhausted);
    assert_clean(pool, &[&all]);
}

/// Every access to the page has an error that says why.
fn assert_fenced(memfd: &GuestMemfd, page: u64, view: Option<&HostView>) {
    let owner = memfd.register_owner("late").unwrap();
    let (one, here) = (range(page, 1), at(page));
    for refused in [
        memfd.read(here, &mut [0]).unwrap_err(),
        memfd.write(here, &[0]).unwrap_err(),
        memfd.load_u64(here).unwrap_err(),
        memfd.convert(one, Visibility::Private, ContentPolicy::Zero).unwrap_err(),
        memfd.punch_hole(one).unwrap_err(),
        memfd.pin(one, owner, PinMode::Counted).unwrap_err(),
    ] {
        assert_eq!(refused.kind(), ErrorKind::Quarantined, "{refused}");
        assert_eq!(refused.errno(), Errno::EHWPOISON);
        assert_eq!(refused.culprit().unwrap().found, Found::Quarantined);
    }
    let status = memfd.snapshot(one).unwrap().next().unwrap().1.status;
    assert_eq!(status, PageStatus::Quarantined);
    if let Some(view) = view {
        let handler = SigbusHandler::install().unwrap();
        for access in [Access::Read, Access::Write] {
            let touch = view.touch(handler, here, access).unwrap();
            assert!(matches!(touch, Touch::Fault(fault) if fault.offset == here), "{touch:?}");
        }
    }
}

/// The kernel splits a transparent huge page when a frame of it fails: the others are as good as before.
#[test]
fn of_transparent_huge_pages_one_frame_is_gone() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let pool = pool(ArenaBacking::MemfdThp, 2);
    let memfd = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap();
    write(&memfd, memfd.pages(), 1);
    memfd.report_memory_failure(at(8)).unwrap();
    assert_fenced(&memfd, 8, None);
    assert_owners(&memfd, range(9, 100), 1, "beside it");
    drop(memfd);
    assert_eq!(counted(&pool), [2 * FOLIO - 1, 0, 0, 1]);
    assert_rest_is_usable(&pool, 2 * FOLIO - 1);
}

#[test]
fn a_free_frame() {
    for backing in BACKINGS {
        let pool = pool(backing, 2);
        for pfn in [0, 700, 1023] {
            pool.report_memory_failure(Pfn::new(pfn)).unwrap();
            pool.report_memory_failure(Pfn::new(pfn)).unwrap();
        }
        assert_eq!(counted(&pool), [1021, 0, 0, 3]);
        assert_eq!(pool.stat().largest_free, ByteSize::from_pages(256));
        let none = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::Exhausted);
        assert_rest_is_usable(&pool, 1021);
        assert_clean(&pool, &[]);
    }
}

#[test]
fn a_dirty_frame_and_what_is_around_it() {
    for backing in BACKINGS {
        let pool = pool(backing, 3);
        let memfd = shared(&pool, 3 * FOLIO, FolioSize::Huge2M).unwrap();
        write(&memfd, memfd.pages(), 1);
        // It leaves everything dirty.
        let lazy = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
        drop(memfd);
        drop(lazy);
        assert_eq!(pool.stat().dirty, pool.stat().capacity);
        pool.report_memory_failure(Pfn::new(600)).unwrap();
        let stat = pool.stat();
        assert_eq!(stat.dirty, ByteSize::from_mib(4), "the rest of its block is clean");
        assert_eq!(counted(&pool), [3 * FOLIO - 1, 0, 0, 1]);
        assert_rest_is_usable(&pool, 3 * FOLIO - 1);
    }
}

#[test]
fn frames_that_fail_while_scrubbers_are_at_work() {
    for backing in BACKINGS {
        let pool = pool(backing, 4);
        let scrubbers = [(); 2].map(|()| pool.start_scrubber(ByteSize::from_mib(64)).unwrap());
        let mut failed = Vec::new();
        for round in 0..12_u64 {
            let memfd = shared(&pool, FOLIO, FolioSize::Huge2M);
            let Ok(memfd) = memfd else { break };
            // What was promised may have been in the hands of a scrubber, and failed there.
            match memfd.allocate(memfd.pages()) {
                Ok(_) => write(&memfd, range(0, FOLIO), round + 1),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}"),
            }
            drop(memfd);
            // Wherever that block is by now: dirty, in hands, or clean.
            failed.push(round * 173 % (4 * FOLIO));
            pool.report_memory_failure(Pfn::new(*failed.last().unwrap())).unwrap();
        }
        while pool.stat().dirty != ByteSize::default() {
            std::thread::yield_now();
        }
        assert!(scrubbers.iter().all(gmem::Scrubber::is_alive));
        let nr = failed.len() as u64;
        assert!(nr >= 4, "{failed:?}");
        assert_eq!(counted(&pool), [4 * FOLIO - nr, 0, 0, nr]);
        assert_rest_is_usable(&pool, 4 * FOLIO - nr);
        drop(scrubbers);
    }
}

#[test]
fn a_page_of_a_living_object() {
    for backing in BACKINGS {
        let has_view = backing == ArenaBacking::Memfd && common::require(Capability::Uffd);
        for scrubs in [false, true] {
            let pool = pool(backing, 3);
            let _scrubber = scrubs.then(|| pool.start_scrubber(ByteSize::from_mib(64)).unwrap());
            let memfd = shared(&pool, 2 * FOLIO, FolioSize::Huge2M).unwrap();
            write(&memfd, memfd.pages(), 1);
            let views = has_view.then(|| [memfd.map_view().unwrap(), memfd.map_view().unwrap()]);
            let byte = Offset::new((700 << 12) + 77);
            for _ in 0..2 {
                memfd.report_memory_failure(byte).unwrap();
            }
            assert_eq!(pool.stat().poisoned, ByteSize::from_pages(1));
            assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(1));
            for view in views.iter().flatten() {
                assert_fenced(&memfd, 700, Some(view));
            }
            assert_fenced(&memfd, 700, None);
            assert_clean(&pool, &[&memfd]);
            // Its neighbours are as they were, also while they change sides.
            for page in [0, 699, 701, 1023] {
                assert_owners(&memfd, range(page, 1), 1, "a neighbour");
            }
            let neighbours = [range(0, 700), range(701, 323)];
            for content in [PRESERVE, ContentPolicy::Zero] {
                for to in [Visibility::Private, Visibility::Shared] {
                    for pages in neighbours {
                        let _ = memfd.convert(pages, to, content).unwrap();
                    }
                }
            }
            let handler = SigbusHandler::install().unwrap();
            for view in views.iter().flatten() {
                for page in [699, 701] {
                    let touch = view.touch(handler, at(page), Access::Read).unwrap();
                    assert_eq!(touch, Touch::Byte(0));
                }
            }
            write(&memfd, range(701, 323), 2);
            // Whole folios and parts beside it can be punched, this page cannot.
            memfd.punch_hole(range(0, FOLIO)).unwrap();
            memfd.punch_hole(range(FOLIO, 100)).unwrap();
            let error = memfd.punch_hole(range(FOLIO, FOLIO)).unwrap_err();
            assert_eq!(error.culprit().unwrap().offset, at(700));
            assert_clean(&pool, &[&memfd]);
            drop((views, memfd));
            pool.scrub();
            assert_eq!(counted(&pool), [3 * FOLIO - 1, 0, 0, 1], "the rest of the folio came back");
            assert_rest_is_usable(&pool, 3 * FOLIO - 1);
        }
    }
}

#[test]
fn by_frame_number_it_is_the_same() {
    let pool = pool(ArenaBacking::Heap, 1);
    let memfd = shared(&pool, 4, FolioSize::Base).unwrap();
    write(&memfd, memfd.pages(), 1);
    let nr = (0..FOLIO).find(|&pfn| {
        pool.report_memory_failure(Pfn::new(pfn)).unwrap();
        memfd.stat().quarantined != ByteSize::default()
    });
    assert_eq!(pool.stat().poisoned, ByteSize::from_pages(nr.unwrap() + 1));
    let is_out = |page: &(_, gmem::PageInfo)| page.1.status == PageStatus::Quarantined;
    let (pages, _) = memfd.snapshot(memfd.pages()).unwrap().find(is_out).unwrap();
    assert_eq!(pages.nr_pages(), 1);
    assert_fenced(&memfd, pages.start().get(), None);
    assert_clean(&pool, &[&memfd]);
    drop(memfd);
    assert_rest_is_usable(&pool, FOLIO - nr.unwrap() - 1);
}

#[test]
fn what_is_not_there_cannot_fail() {
    for backing in BACKINGS {
        let pool = pool(backing, 1);
        let memfd = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap();
        let kind = |page| memfd.report_memory_failure(at(page)).map_err(|error| error.kind());
        assert_eq!(kind(3), Err(ErrorKind::NotFound));
        assert_eq!(kind(FOLIO), Err(ErrorKind::OutOfRange));
        assert_eq!(kind(u64::MAX >> 12), Err(ErrorKind::OutOfRange));
        write(&memfd, memfd.pages(), 1);
        let punched = memfd.punch_hole(range(3, 1)).unwrap();
        let is_kept = punched.kept() != ByteSize::default();
        assert_eq!(kind(3), if is_kept { Ok(()) } else { Err(ErrorKind::NotFound) });
        assert_eq!(pool.stat().poisoned.whole_pages(), u64::from(is_kept));
        assert_clean(&pool, &[&memfd]);
        drop(memfd);
        assert_rest_is_usable(&pool, FOLIO - u64::from(is_kept));
    }
}

/// Who has it pinned keeps it, and nobody else comes to it. When the pin is gone, so is the page.
#[test]
fn a_pinned_page_is_left_to_whoever_has_it() {
    let handler = SigbusHandler::install().unwrap();
    for backing in BACKINGS {
        // Counted in the word of the page, in that of 2 MiB which is split then, and exclusively.
        for (pinned, mode) in [
            (range(9, 1), PinMode::Counted),
            (range(0, FOLIO), PinMode::Counted),
            (range(8, 4), PinMode::Exclusive),
        ] {
            let pool = pool(backing, 2);
            let memfd = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap();
            write(&memfd, memfd.pages(), 1);
            let has_view = backing == ArenaBacking::Memfd && common::require(Capability::Uffd);
            let view = has_view.then(|| memfd.map_view().unwrap());
            let owner = memfd.register_owner("vfio").unwrap();
            let pin = || memfd.pin(pinned, owner, mode).ok().map(PinGuard::into_owned);
            let pins = [pin(), pin()];
            assert_eq!(pins[1].is_some(), mode == PinMode::Counted);
            for _ in 0..2 {
                memfd.report_memory_failure(at(9)).unwrap();
            }
            assert_eq!(pool.stat().poisoned, ByteSize::from_pages(1));
            assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(1));
            let is_shown = || {
                let touch = view.as_ref()?.touch(handler, at(9), Access::Read).unwrap();
                Some(matches!(touch, Touch::Byte(_)))
            };
            // A hole punch and a conversion that fail are no reason.
            assert_fenced(&memfd, 9, None);
            assert_eq!(is_shown(), has_view.then_some(true), "{mode:?}");
            let info = memfd.snapshot(range(9, 1)).unwrap().next().unwrap().1;
            let nr_pins = if mode == PinMode::Counted { 2 } else { 0 };
            assert_eq!((info.status, info.pins), (PageStatus::Quarantined, nr_pins));
            assert_eq!(memfd.owners(range(9, 1)), ["vfio".into()]);
            assert_owners(&memfd, range(100, 100), 1, "beside it");
            assert_clean(&pool, &[&memfd]);
            let compaction = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap();
            assert_eq!(compaction.moved, ByteSize::default());

            let [first, second] = pins;
            drop(first);
            assert_fenced(&memfd, 9, None);
            assert_eq!(is_shown(), has_view.then_some(second.is_some()), "{mode:?}");
            drop(second);
            // Whatever finds it in its way, or another report, takes it out of views as well.
            match mode {
                PinMode::Exclusive => memfd.report_memory_failure(at(9)).unwrap(),
                _ => assert!(memfd.convert(range(0, 64), Visibility::Private, PRESERVE).is_err()),
            }
            assert_eq!(is_shown(), has_view.then_some(false), "{mode:?}");
            assert_fenced(&memfd, 9, view.as_ref());
            assert_eq!(memfd.stat().pinned, ByteSize::default());
            assert_clean(&pool, &[&memfd]);
            let _ = memfd.convert(range(10, 100), Visibility::Private, PRESERVE).unwrap();
            drop((view, memfd));
            assert_rest_is_usable(&pool, 2 * FOLIO - 1);
        }
    }
}

/// A conversion that waits for a pin finds out before it touches the frame.
#[test]
fn a_page_that_fails_while_a_conversion_waits_for_it() {
    let to = Visibility::Private;
    // What is elsewhere would have to move first.
    for (zone, gives_up) in [(Zone::Normal, false), (Zone::Normal, true), (Zone::Movable, false)] {
        let part = || PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(2));
        let builder = FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable);
        let pool = builder.create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(2)).zones(&[zone]);
        let memfd = builder.initial(Visibility::Shared).create(&pool).unwrap();
        write(&memfd, memfd.pages(), 1);
        let before = memfd.bytes_behind();
        let owner = memfd.register_owner("vfio").unwrap();
        let pin = memfd.pin(range(9, 1), owner, PinMode::Counted).unwrap();
        let token = CancelToken::default();
        let error = std::thread::scope(|scope| {
            let converter = scope.spawn(|| {
                let wait = Wait::at_most(std::time::Duration::from_secs(600)).or_cancelled(&token);
                let options = ConvertOptions::default().content(ContentPolicy::Zero).wait(wait);
                memfd.convert_ranges(&[range(8, 8)], to, &options).unwrap_err()
            });
            while memfd.snapshot(range(9, 1)).unwrap().next().unwrap().1.status
                != PageStatus::Converting
            {
                std::thread::yield_now();
            }
            let busy = memfd.report_memory_failure(at(9)).unwrap_err();
            assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
            assert_eq!(pool.stat().poisoned, ByteSize::from_pages(1));
            if gives_up {
                token.cancel();
                let error = converter.join().unwrap();
                drop(pin);
                return error;
            }
            drop(pin);
            converter.join().unwrap()
        });
        let kind = if gives_up { ErrorKind::Cancelled } else { ErrorKind::MemoryFailure };
        assert_eq!((error.kind(), error.culprit().unwrap().offset), (kind, at(9)), "{error}");
        assert!(memfd.bytes_behind() == before, "nothing was zeroed");
        assert_fenced(&memfd, 9, None);
        assert_clean(&pool, &[&memfd]);
        if zone == Zone::Normal {
            let _ = memfd.convert(range(10, 6), to, ContentPolicy::Zero).unwrap();
        }
        drop(memfd);
        assert_eq!(counted(&pool), [2 * FOLIO - 1, 0, 0, 1]);
        assert_clean(&pool, &[]);
    }
}

#[test]
fn a_folio_with_a_failed_frame_does_not_move() {
    for pinned in [false, true] {
        let part = || PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(2));
        let builder = FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable);
        let pool = builder.create().unwrap();
        let memfd = GuestMemfd::builder(ByteSize::from_mib(2))
            .initial(Visibility::Shared)
            .zones(&[Zone::Normal, Zone::Movable])
            .private_placement(gmem::PrivatePlacement::Refuse)
            .commitment(Commitment::Overcommitted)
            .create(&pool)
            .unwrap();
        write(&memfd, memfd.pages(), 1);
        let owner = memfd.register_owner("vfio").unwrap();
        let pin = pinned.then(|| memfd.pin(range(7, 1), owner, PinMode::Counted).unwrap());
        memfd.report_memory_failure(at(7)).unwrap();
        drop(pin);
        let migration = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
        assert_eq!(migration.moved, ByteSize::default());
        let (_, error) = &migration.refused[0];
        assert_eq!(error.kind(), ErrorKind::Quarantined, "{error}");
        assert_eq!(error.culprit().unwrap().offset, at(7));
        assert_eq!(counted(&pool), [FOLIO, FOLIO - 1, 0, 1], "nothing was left behind");
        drop(memfd);
        assert_eq!(counted(&pool), [2 * FOLIO - 1, 0, 0, 1]);
        assert_clean(&pool, &[]);
    }
}

/// The kernel gives up a hugetlb page as a whole, whichever of its frames failed.
#[test]
fn on_hugetlb_the_whole_page_is_gone() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "3");
    let pool = match FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(6)) {
        Ok(pool) => pool,
        Err(error) => {
            let _ = common::settle(Capability::Hugetlb, Err(error.to_string()));
            return;
        }
    };
    let memfd = shared(&pool, 2 * FOLIO, FolioSize::Huge2M).unwrap();
    write(&memfd, memfd.pages(), 1);
    let view = memfd.map_view().unwrap();
    let owner = memfd.register_owner("vfio").unwrap();
    let pin = memfd.pin(range(900, 1), owner, PinMode::Counted).unwrap();
    for page in [700, 700, 513] {
        memfd.report_memory_failure(at(page)).unwrap();
    }
    let handler = SigbusHandler::install().unwrap();
    assert_fenced(&memfd, 700, None);
    for page in [700, 900] {
        let touch = view.touch(handler, at(page), Access::Read).unwrap();
        assert!(matches!(touch, Touch::Byte(_)), "the view goes by huge pages, and one is pinned");
    }
    assert_clean(&pool, &[&memfd]);
    drop(pin);
    memfd.report_memory_failure(at(3 + 700)).unwrap();
    assert_eq!(memfd.stat().quarantined, ByteSize::from_mib(2));
    for page in [512, 700, 1023] {
        assert_fenced(&memfd, page, Some(&view));
    }
    assert_owners(&memfd, range(0, FOLIO), 1, "the other folio");
    let handler = SigbusHandler::install().unwrap();
    assert!(matches!(view.touch(handler, at(3), Access::Read).unwrap(), Touch::Byte(_)));
    assert_eq!(counted(&pool), [FOLIO, FOLIO, 0, FOLIO]);
    assert_clean(&pool, &[&memfd]);
    drop((view, memfd));
    assert_eq!(counted(&pool), [2 * FOLIO, 0, 0, FOLIO]);
    let rest = shared(&pool, 2 * FOLIO, FolioSize::Huge2M).unwrap();
    assert_nobodys(&rest, rest.pages(), "beside a failed page");
    assert_clean(&pool, &[&rest]);
}

#[derive(Debug)]
struct Refuses;

impl Subscriber for Refuses {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        assert_eq!(ack.refuse(Errno::EBUSY), Heard::InTime);
    }

    fn grant(&self, _: &[HandOutRun]) {}

    fn fence(&self) -> Result<(), Errno> {
        Ok(())
    }
}

/// Has what it was given.
#[derive(Debug, Default)]
struct Has(std::sync::Mutex<std::collections::BTreeSet<u64>>);

impl Subscriber for Has {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        let mut has = self.0.lock().unwrap();
        runs.iter().flat_map(|run| run.pages.iter()).for_each(|it| assert!(has.remove(&it.get())));
        assert_eq!(ack.let_go(), Heard::InTime);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let mut has = self.0.lock().unwrap();
        runs.iter().flat_map(|run| run.pages.iter()).for_each(|it| assert!(has.insert(it.get())));
    }
}

#[test]
fn subscribers_of_both_sides_lose_it_and_nothing_beside() {
    for backing in BACKINGS {
        let pool = pool(backing, 1);
        let memfd = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap();
        write(&memfd, memfd.pages(), 1);
        let _ = memfd.convert(range(8, 8), Visibility::Private, PRESERVE).unwrap();
        let has = [(); 2].map(|()| std::sync::Arc::new(Has::default()));
        let subscriptions = [Visibility::Shared, Visibility::Private].map(|side| {
            let who = std::sync::Arc::clone(&has[usize::from(side == Visibility::Private)]);
            memfd.subscribe_with(who as _, SubscribeOptions::default().side(side)).unwrap()
        });
        [4, 9].into_iter().for_each(|page| memfd.report_memory_failure(at(page)).unwrap());
        let [shared, private] = has.each_ref().map(|has| has.0.lock().unwrap().clone());
        let all_but =
            |of: std::ops::Range<u64>, less: u64| of.filter(|&it| it != less).collect::<Vec<_>>();
        assert!(private.into_iter().eq(all_but(8..16, 9)), "{backing}");
        let mut left = all_but(0..FOLIO, 4);
        left.retain(|page| !(8..16).contains(page));
        assert!(shared.into_iter().eq(left), "{backing}");
        assert_clean(&pool, &[&memfd]);
        drop(subscriptions);
        assert!(has.iter().all(|has| has.0.lock().unwrap().is_empty()));
    }
}

#[test]
fn a_subscriber_that_keeps_it_is_named_and_the_frame_is_out() {
    let pool = pool(ArenaBacking::Heap, 1);
    let memfd = shared(&pool, FOLIO, FolioSize::Huge2M).unwrap();
    write(&memfd, memfd.pages(), 1);
    let subscription = memfd.subscribe(std::sync::Arc::new(Refuses)).unwrap();
    let error = memfd.report_memory_failure(at(4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SubscriberRefused);
    assert_eq!(pool.stat().poisoned, ByteSize::from_pages(1));
    assert_clean(&pool, &[&memfd]);
    drop(subscription);
    memfd.report_memory_failure(at(4)).unwrap();
    assert_fenced(&memfd, 4, None);
    drop(memfd);
    assert_rest_is_usable(&pool, FOLIO - 1);
}

#[test]
fn a_guest_does_not_get_it_back() {
    let pool = pool(ArenaBacking::Heap, 2);
    let hyp = Hypervisor::new(&pool).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_pages(FOLIO)).create(&pool).unwrap();
    let vm = hyp.create_vm().unwrap();
    vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store_u64(Ipa::new(5 << 12), 7).unwrap();
    // It is behind the guest's page 6, which the guest has not touched yet.
    memfd.report_memory_failure(at(6)).unwrap();
    assert!(vcpu.load_u64(Ipa::new(6 << 12)).is_err());
    assert_eq!(vcpu.load_u64(Ipa::new(5 << 12)).unwrap(), 7);
    // Its own page it still has: that is between the guest and its hypervisor.
    memfd.report_memory_failure(at(5)).unwrap();
    assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(2));
    assert_eq!(audit::check_under(&pool, &[&memfd], &hyp).to_string(), "clean");
    drop((vcpu, vm, memfd, hyp));
    assert_rest_is_usable(&pool, 2 * FOLIO - 2);
}
