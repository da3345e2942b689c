//! Folios that move from zone to zone: who sees what of it, and what makes them stay.

#[path = "common/arena_files.rs"]
mod arena_files;
mod common;
#[path = "common/setting.rs"]
mod setting;
#[path = "common/zoned.rs"]
mod zoned;

use std::sync::{Arc, Mutex};

use arena_files::on_host;
use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset};
use gmem::audit;
use gmem::error::{Errno, ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::hyp::Hypervisor;
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HandOutRun, Heard, HostView, PartSpec,
    PinMode, PrivatePlacement, Residency, SigbusHandler, Subscriber, Touch, Visibility, Zone,
};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use zoned::{
    FOLIO, assert_all_back, contents, counters, is_all_in, pages, pool, range, read_page,
    write_all, zones_of,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const BACKINGS: [ArenaBacking; 2] = [ArenaBacking::Heap, ArenaBacking::Memfd];

/// As many pages of each zone as the object has, which begins in `Movable`.
fn object(backing: ArenaBacking, nr_pages: u64, size: FolioSize) -> (FolioPool, GuestMemfd) {
    let pool = pool(backing, &[(Zone::Normal, nr_pages), (Zone::Movable, nr_pages)]);
    let builder = GuestMemfd::builder(pages(nr_pages)).initial(Visibility::Shared);
    let builder = builder.zones(&[Zone::Movable]).folio_size(size);
    let memfd = builder.create(&pool).unwrap();
    (pool, memfd)
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
}

fn touch(view: &HostView, page: u64) -> Option<u8> {
    let handler = SigbusHandler::install().unwrap();
    match view.touch(handler, Offset::new((page << 12) + 17), Access::Read).unwrap() {
        Touch::Byte(byte) => Some(byte),
        Touch::Fault(_) => None,
    }
}

#[test]
fn bytes_and_state_are_equal_whatever_the_backing_and_the_size() {
    for backing in BACKINGS {
        for (size, nr_pages) in [(FolioSize::Huge2M, 2 * FOLIO + 3), (FolioSize::Base, 40)] {
            let (pool, memfd) = object(backing, nr_pages, size);
            write_all(&memfd);
            assert!(is_all_in(&memfd, Zone::Movable));
            let before: Vec<_> = memfd.snapshot(memfd.pages()).unwrap().collect();
            let zones = [Zone::Normal, Zone::Movable].map(|zone| counters(&pool, zone));
            for to in [Zone::Normal, Zone::Movable, Zone::Normal] {
                let migration = memfd.migrate(memfd.pages(), to).unwrap();
                assert_eq!((migration.moved, migration.refused.len()), (pages(nr_pages), 0));
                assert!(is_all_in(&memfd, to));
                for page in 0..nr_pages {
                    assert!(read_page(&memfd, page) == contents(page), "{page} in {to}");
                }
                let after: Vec<_> = memfd.snapshot(memfd.pages()).unwrap().collect();
                assert_eq!(after, before);
                assert_clean(&pool, &memfd);
                let again = memfd.migrate(memfd.pages(), to).unwrap();
                assert_eq!((again.moved, again.refused.len()), (pages(0), 0), "it is there");
                if to == Zone::Movable {
                    assert_eq!([Zone::Normal, to].map(|zone| counters(&pool, zone)), zones);
                }
            }
            drop(memfd);
            assert_all_back(&pool);
        }
    }
}

#[test]
fn a_range_moves_the_folios_that_it_touches_and_absent_ones_are_nothing() {
    let (pool, memfd) = object(ArenaBacking::Heap, 4 * FOLIO, FolioSize::Huge2M);
    memfd.allocate(range(0, 3 * FOLIO)).unwrap();
    let migration = memfd.migrate(range(FOLIO + 7, 3 * FOLIO - 7), Zone::Normal).unwrap();
    assert_eq!(migration.moved, pages(2 * FOLIO));
    assert_eq!(memfd.stat().resident, pages(3 * FOLIO), "nothing is allocated for it");
    assert_eq!(zones_of(&memfd), [Zone::Movable, Zone::Normal]);
    assert_clean(&pool, &memfd);
}

#[test]
fn holes_stay_holes_and_take_no_memory() {
    for backing in BACKINGS {
        // No other test has files of this size.
        let (pool, memfd) = object(backing, 2 * FOLIO + 5, FolioSize::Huge2M);
        write_all(&memfd);
        memfd.punch_hole(range(2 * FOLIO, 5)).unwrap();
        memfd.punch_hole(range(3, 100)).unwrap();
        memfd.punch_hole(range(FOLIO, FOLIO - 1)).unwrap();
        let (before, of_host) = (memfd.stat(), on_host(memfd.size()));
        for to in [Zone::Normal, Zone::Movable] {
            let migration = memfd.migrate(memfd.pages(), to).unwrap();
            assert_eq!(migration.moved, pages(2 * FOLIO), "{migration:?}");
            assert_eq!(memfd.stat(), before);
            assert_eq!(on_host(memfd.size()), of_host, "in {to}");
            for page in 0..2 * FOLIO {
                let (_, info) = memfd.snapshot(range(page, 1)).unwrap().next().unwrap();
                let is_hole = (3..103).contains(&page) || (FOLIO..2 * FOLIO - 1).contains(&page);
                assert_eq!(info.residency == Residency::Absent, is_hole, "{page}");
                let wanted = if is_hole { [0; 4096] } else { contents(page) };
                assert!(read_page(&memfd, page) == wanted, "{page} in {to}");
            }
            // Which looks at free frames: what was released is committed and zero again.
            assert_clean(&pool, &memfd);
        }
        memfd.write(Offset::new((50 << 12) + 9), &[9]).unwrap();
        assert_eq!(memfd.stat().holes, pages(100 - 1 + FOLIO - 1));
        assert_eq!([read_page(&memfd, 50)[8], read_page(&memfd, 50)[9]], [0, 9]);
        let size = memfd.size();
        drop(memfd);
        assert_all_back(&pool);
        if backing == ArenaBacking::Memfd {
            assert_eq!(on_host(size).get(), 2 * size.get(), "all of it is committed");
        }
    }
}

#[test]
fn views_show_the_same_bytes_at_the_same_addresses() {
    if !common::require(Capability::Uffd) {
        return;
    }
    for nr_views in [1, 2] {
        let (pool, memfd) = object(ArenaBacking::Memfd, 2 * FOLIO + 3, FolioSize::Huge2M);
        write_all(&memfd);
        let views: Vec<_> = (0..nr_views).map(|_| memfd.map_view().unwrap()).collect();
        memfd.punch_hole(range(9, 2)).unwrap();
        let places: Vec<_> = views.iter().map(HostView::hva).collect();
        let seen = || -> Vec<_> {
            let of_view = |view| (0..2 * FOLIO + 3).map(move |page| touch(view, page));
            views.iter().flat_map(of_view).collect()
        };
        let (before, mapped) = (seen(), memfd.stat().mapped);
        assert_eq!(before.iter().filter(|byte| byte.is_none()).count(), 2 * nr_views);
        for to in [Zone::Normal, Zone::Movable] {
            let migration = memfd.migrate(memfd.pages(), to).unwrap();
            assert_eq!(migration.moved, memfd.size(), "{migration:?}");
            assert!(seen() == before, "in {to}");
            assert_eq!(memfd.stat().mapped, mapped);
            // Views and checked accesses mean the same memory.
            memfd.write(Offset::new((5 << 12) + 17), &[0x55]).unwrap();
            assert!(views.iter().all(|view| touch(view, 5) == Some(0x55)));
            memfd.write(Offset::new(5 << 12), &contents(5)).unwrap();
            assert_clean(&pool, &memfd);
        }
        assert!(places == views.iter().map(HostView::hva).collect::<Vec<_>>());
        drop((views, memfd));
        assert_all_back(&pool);
    }
}

#[test]
fn transparent_huge_pages_move_as_they_are() {
    if !(common::require(Capability::Uffd) && common::require(Capability::Thp)) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let (pool, memfd) = object(ArenaBacking::MemfdThp, 2 * FOLIO, FolioSize::Huge2M);
    write_all(&memfd);
    let view = memfd.map_view().unwrap();
    memfd.punch_hole(range(3, 2)).unwrap();
    let huge = pool.stat().huge;
    for to in [Zone::Normal, Zone::Movable] {
        assert_eq!(memfd.migrate(memfd.pages(), to).unwrap().moved, pages(2 * FOLIO));
        assert_eq!((memfd.stat().holes, memfd.stat().released), (pages(2), pages(0)));
        assert_eq!((touch(&view, 2), touch(&view, 3)), (Some(contents(2)[17]), None));
        assert_eq!(pool.stat().huge, huge, "a move split a huge page");
        assert_clean(&pool, &memfd);
    }
    memfd.allocate(range(3, 1)).unwrap();
    assert_eq!((touch(&view, 3), touch(&view, 4)), (Some(0), None));
    drop((view, memfd));
    assert_all_back(&pool);
}

/// Huge pages of the kernel in one zone, and small ones in the other: holes are memory there, and none here.
#[test]
fn folios_move_between_kinds_of_memory() {
    if !(common::require(Capability::Uffd) && common::require(Capability::Hugetlb)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "8");
    let part = |backing| PartSpec::new([backing], pages(2 * FOLIO));
    for backings in [
        [ArenaBacking::Memfd, ArenaBacking::MemfdHugetlb2M],
        [ArenaBacking::MemfdHugetlb2M, ArenaBacking::Memfd],
        [ArenaBacking::MemfdHugetlb2M, ArenaBacking::MemfdHugetlb2M],
    ] {
        let [normal, movable] = backings;
        let builder = FolioPool::builder().part(part(normal), Zone::Normal);
        let pool = builder.part(part(movable), Zone::Movable).create().unwrap();
        let builder = GuestMemfd::builder(pages(2 * FOLIO)).initial(Visibility::Shared);
        let memfd = builder.zones(&[Zone::Movable]).create(&pool).unwrap();
        write_all(&memfd);
        let view = memfd.map_view().unwrap();
        memfd.punch_hole(range(3, 2)).unwrap();
        for to in [Zone::Normal, Zone::Movable, Zone::Normal] {
            let migration = memfd.migrate(memfd.pages(), to).unwrap();
            assert_eq!(migration.moved, pages(2 * FOLIO), "{migration:?}");
            let backing = if to == Zone::Normal { normal } else { movable };
            let released = if backing == ArenaBacking::Memfd { pages(2) } else { pages(0) };
            assert_eq!((memfd.stat().holes, memfd.stat().released), (pages(2), released));
            for page in 0..2 * FOLIO {
                let wanted = if [3, 4].contains(&page) { [0; 4096] } else { contents(page) };
                assert!(read_page(&memfd, page) == wanted, "{page} in {to}");
            }
            // On hugetlb a view shows a folio without holes, or nothing of it; so with any part on it.
            assert_eq!((touch(&view, 2), touch(&view, FOLIO)), (None, Some(contents(FOLIO)[17])));
            assert_clean(&pool, &memfd);
        }
        drop((view, memfd));
        assert_all_back(&pool);
    }
}

#[test]
fn a_pinned_page_keeps_its_folio_where_it_is_and_is_named() {
    let (pool, memfd) = object(ArenaBacking::Heap, 3 * FOLIO, FolioSize::Huge2M);
    write_all(&memfd);
    let owner = memfd.register_owner("vfio").unwrap();
    let pin = memfd.pin(range(FOLIO + 7, 1), owner, PinMode::Counted).unwrap();
    let migration = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert_eq!(migration.moved, pages(2 * FOLIO));
    let [(stayed, error)] = migration.refused.as_slice() else { panic!("{migration:?}") };
    assert_eq!((*stayed, error.kind()), (range(FOLIO, FOLIO), ErrorKind::Busy));
    let culprit = error.culprit().unwrap();
    assert_eq!(culprit.offset, Offset::new((FOLIO + 7) << 12));
    assert_eq!(culprit.found, Found::Pinned { pins: 1, owners: vec!["vfio".into()] });
    assert_eq!(
        error.to_string(),
        "migrate 0x200000..0x400000: part of the range is in use: subpage 0x207000 has 1 pin (vfio)"
    );
    assert_eq!(zones_of(&memfd), [Zone::Normal, Zone::Movable, Zone::Normal]);
    assert_clean(&pool, &memfd);
    drop(pin);
    assert_eq!(memfd.migrate(memfd.pages(), Zone::Normal).unwrap().moved, pages(FOLIO));
    assert!(is_all_in(&memfd, Zone::Normal));
    assert!((0..3 * FOLIO).all(|page| read_page(&memfd, page) == contents(page)));
}

/// The pages of runs, wherever their frames are.
fn joined(runs: &[HandOutRun]) -> Vec<PgoffRange> {
    let mut pages: Vec<PgoffRange> = Vec::new();
    for run in runs {
        match pages.last_mut().filter(|last| last.end() == run.pages.start()) {
            Some(last) => *last = range(last.start().get(), last.nr_pages() + run.pages.nr_pages()),
            None => pages.push(run.pages),
        }
    }
    pages
}

#[derive(Debug, Default)]
struct Recorder {
    told: Mutex<Vec<(&'static str, Vec<PgoffRange>)>>,
    refuses: Mutex<Option<Errno>>,
}

impl Subscriber for Recorder {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        self.told.lock().unwrap().push(("revoke", joined(runs)));
        let heard = match *self.refuses.lock().unwrap() {
            Some(errno) => ack.refuse(errno),
            None => ack.let_go(),
        };
        assert_eq!(heard, Heard::InTime);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.told.lock().unwrap().push(("grant", joined(runs)));
    }
}

#[test]
fn subscribers_are_told_of_what_is_shared_and_may_refuse() {
    let nr_pages = 2 * FOLIO;
    let (pool, memfd) = object(ArenaBacking::Heap, nr_pages, FolioSize::Huge2M);
    write_all(&memfd);
    let _ = memfd.convert(range(4, 2), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(zones_of(&memfd), [Zone::Normal, Zone::Movable]);
    let recorders = [(); 2].map(|()| Arc::new(Recorder::default()));
    let subscribe = |it: &Arc<Recorder>| memfd.subscribe(Arc::clone(it) as _).unwrap();
    let _subscriptions = [subscribe(&recorders[0]), subscribe(&recorders[1])];
    let told = |which: usize| std::mem::take(&mut *recorders[which].told.lock().unwrap());
    let second = vec![range(FOLIO, FOLIO)];
    let shared = vec![range(0, 4), range(6, nr_pages - 6)];
    assert_eq!([told(0), told(1)], [vec![("grant", shared.clone())], vec![("grant", shared)]]);

    // The second refuses: the first gets back what it has given up, and nothing has moved.
    *recorders[1].refuses.lock().unwrap() = Some(Errno::ETIMEDOUT);
    let migration = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert_eq!(migration.moved, pages(0));
    let (stayed, error) = &migration.refused[0];
    assert_eq!((*stayed, migration.refused.len()), (range(FOLIO, FOLIO), 1));
    assert_eq!((error.kind(), error.errno()), (ErrorKind::SubscriberRefused, Errno::ETIMEDOUT));
    assert_eq!(told(0), [("revoke", second.clone()), ("grant", second.clone())]);
    assert_eq!(told(1), [("revoke", second.clone())]);
    assert_eq!(zones_of(&memfd), [Zone::Normal, Zone::Movable]);
    assert_clean(&pool, &memfd);

    *recorders[1].refuses.lock().unwrap() = None;
    assert_eq!(memfd.migrate(memfd.pages(), Zone::Normal).unwrap().moved, pages(FOLIO));
    for which in 0..2 {
        assert_eq!(told(which), [("revoke", second.clone()), ("grant", second.clone())]);
    }
    // Private pages are nothing that anybody is told about.
    let _ = memfd.convert(range(FOLIO, FOLIO), Visibility::Private, PRESERVE).unwrap();
    let _ = memfd.convert(range(0, FOLIO), Visibility::Shared, PRESERVE).unwrap();
    let _ = [told(0), told(1)];
    assert_eq!(memfd.migrate(range(0, FOLIO), Zone::Movable).unwrap().moved, pages(FOLIO));
    assert_eq!(told(0), [("revoke", vec![range(0, FOLIO)]), ("grant", vec![range(0, FOLIO)])]);
    let refused = memfd.migrate(range(FOLIO, FOLIO), Zone::Movable).unwrap();
    assert_eq!(refused.refused[0].1.kind(), ErrorKind::Unsupported);
    assert_eq!(told(0), []);
    assert_clean(&pool, &memfd);
}

#[test]
fn a_guest_keeps_what_it_has_under_pkvm_and_what_it_never_had_moves() {
    let nr_pages = 2 * FOLIO;
    let (pool, memfd) = object(ArenaBacking::Heap, nr_pages, FolioSize::Huge2M);
    write_all(&memfd);
    let host = Hypervisor::new(&pool).unwrap();
    let vm = host.create_vm().unwrap();
    vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
    let migration = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert_eq!(migration.moved, pages(nr_pages), "the guest has touched nothing: {migration:?}");
    let back = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
    assert_eq!(back.moved, pages(nr_pages));

    // It moves to turn private, and is the guest's from then on.
    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    assert_eq!(zones_of(&memfd), [Zone::Normal, Zone::Movable]);
    let mut vcpu = vm.create_vcpu().unwrap();
    let mut found = [0; 4096];
    vcpu.load(Ipa::new(3 << 12), &mut found).unwrap();
    assert!(found == contents(3));
    let refused = memfd.convert(range(3, 1), Visibility::Shared, PRESERVE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::HypervisorRefused, "the guest has not asked");
    let stays = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
    assert_eq!(stays.refused.len(), 1);
    assert_eq!(stays.refused[0].1.kind(), ErrorKind::Unsupported, "{stays:?}");
    assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
}

#[test]
fn a_zone_that_the_object_was_not_created_for_is_no_target() {
    let parts = [(Zone::Normal, FOLIO), (Zone::Movable, FOLIO), (Zone::Cma, FOLIO)];
    let pool = pool(ArenaBacking::Heap, &parts);
    let builder = GuestMemfd::builder(pages(FOLIO)).initial(Visibility::Shared);
    let memfd = builder.clone().zones(&[Zone::Movable]).create(&pool).unwrap();
    write_all(&memfd);
    let error = memfd.migrate(memfd.pages(), Zone::Cma).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("not created for zone cma"), "{error}");
    let past = memfd.migrate(range(FOLIO - 1, 2), Zone::Normal).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::OutOfRange);
    assert!(is_all_in(&memfd, Zone::Movable));
    drop(memfd);

    let both = builder.clone().zones(&[Zone::Movable, Zone::Cma]).create(&pool).unwrap();
    write_all(&both);
    for to in [Zone::Cma, Zone::Normal, Zone::Cma, Zone::Movable] {
        assert_eq!(both.migrate(both.pages(), to).unwrap().moved, pages(FOLIO));
        assert!(is_all_in(&both, to));
        assert_clean(&pool, &both);
    }
    drop(both);
    let normal = builder.create(&pool).unwrap();
    normal.allocate(normal.pages()).unwrap();
    assert_eq!(normal.migrate(normal.pages(), Zone::Normal).unwrap().moved, pages(0));
    drop(normal);
    assert_all_back(&pool);
}

#[test]
fn a_zone_without_room_refuses_and_nothing_is_lost() {
    let parts = [(Zone::Normal, 3 * FOLIO), (Zone::Movable, 2 * FOLIO)];
    let pool = pool(ArenaBacking::Heap, &parts);
    let builder = GuestMemfd::builder(pages(2 * FOLIO)).initial(Visibility::Shared);
    // Nothing is promised in Normal to those who may not be private outside of it.
    let builder = builder.zones(&[Zone::Movable, Zone::Normal]);
    let memfd = builder.private_placement(PrivatePlacement::Refuse).create(&pool).unwrap();
    write_all(&memfd);
    assert!(is_all_in(&memfd, Zone::Movable));
    let other = GuestMemfd::builder(pages(2 * FOLIO)).create(&pool).unwrap();
    let before = [Zone::Normal, Zone::Movable].map(|zone| counters(&pool, zone));
    let migration = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    assert_eq!(migration.moved, pages(FOLIO), "one is nobody's");
    let [(stayed, error)] = migration.refused.as_slice() else { panic!("{migration:?}") };
    assert_eq!((*stayed, error.kind()), (range(FOLIO, FOLIO), ErrorKind::Exhausted));
    assert!(error.to_string().contains("nothing in zone normal that nobody was promised"));
    assert!((0..2 * FOLIO).all(|page| read_page(&memfd, page) == contents(page)));
    assert_clean(&pool, &memfd);
    other.allocate(other.pages()).unwrap();
    assert_eq!(memfd.migrate(range(0, FOLIO), Zone::Movable).unwrap().moved, pages(FOLIO));
    drop(other);
    let other = GuestMemfd::builder(pages(2 * FOLIO)).create(&pool).unwrap();
    assert_eq!([Zone::Normal, Zone::Movable].map(|zone| counters(&pool, zone)), before);
    drop((memfd, other));
    assert_all_back(&pool);
    assert_eq!(pool.stat().capacity, ByteSize::from_mib(10));
}
