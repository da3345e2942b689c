//! Where the folios of an object are, and that private memory is in zone normal or is not at all.

mod common;
#[path = "common/zoned.rs"]
mod zoned;

use std::time::Duration;

use common::Capability;
use gmem::addr::{ByteSize, Gfn, Ipa, Offset};
use gmem::audit;
use gmem::error::ErrorKind;
use gmem::geometry::{FolioSize, NumaNode};
use gmem::hyp::Hypervisor;
use gmem::{
    ArenaBacking, Commitment, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd,
    GuestMemfdBuilder, PartSpec, PinMode, PrivatePlacement, Visibility, Wait, Zone,
};
use zoned::{
    FOLIO, assert_all_back, contents, counters, is_all_in, pages, pool, range, read_page,
    write_all, zones_of,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const OTHERS: [Zone; 2] = [Zone::Movable, Zone::Cma];

/// Three folios of each zone, and the description of an object of two that is shared at first.
fn two_folios_in(zone: Zone) -> (FolioPool, GuestMemfdBuilder) {
    let zones = [Zone::Normal, Zone::Movable, Zone::Cma];
    let pool = pool(ArenaBacking::Heap, &zones.map(|zone| (zone, 3 * FOLIO)));
    let builder = GuestMemfd::builder(pages(2 * FOLIO)).initial(Visibility::Shared).zones(&[zone]);
    (pool, builder)
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
}

fn to_private(memfd: &GuestMemfd, start: u64, nr_pages: u64) -> Result<(), ErrorKind> {
    let converted = memfd.convert(range(start, nr_pages), Visibility::Private, PRESERVE);
    converted.map(drop).map_err(|error| error.kind())
}

#[test]
fn what_turns_private_moves_to_normal_first_with_all_of_its_folio() {
    for zone in OTHERS {
        let (pool, builder) = two_folios_in(zone);
        let memfd = builder.create(&pool).unwrap();
        assert_eq!(
            pool.zone_stat(Zone::Normal).reserved,
            pages(2 * FOLIO),
            "where it may have to go"
        );
        assert_eq!(pool.zone_stat(zone).reserved, pages(0));
        let promised = [Zone::Normal, zone].map(|zone| counters(&pool, zone));
        write_all(&memfd);
        assert!(is_all_in(&memfd, zone));
        assert_eq!(pool.zone_stat(zone).used, pages(2 * FOLIO));

        to_private(&memfd, 7, 2).unwrap();
        assert_eq!(zones_of(&memfd), [Zone::Normal, zone]);
        assert_eq!(pool.zone_stat(Zone::Normal).used, pages(FOLIO));
        assert_eq!(pool.zone_stat(zone).used, pages(FOLIO));
        for page in (0..2 * FOLIO).filter(|page| ![7, 8].contains(page)) {
            assert!(read_page(&memfd, page) == contents(page), "{page}");
        }
        // More of the same folio, and across to the other.
        to_private(&memfd, 9, 1).unwrap();
        to_private(&memfd, FOLIO - 1, 2).unwrap();
        assert!(is_all_in(&memfd, Zone::Normal));
        assert_clean(&pool, &memfd);
        // Mixed folios stay there; what is all shared may go.
        let _ = memfd.convert(range(0, FOLIO), Visibility::Shared, PRESERVE).unwrap();
        let migration = memfd.migrate(memfd.pages(), zone).unwrap();
        assert_eq!((migration.moved, migration.refused.len()), (pages(FOLIO), 1));
        let (stayed, error) = &migration.refused[0];
        assert_eq!((*stayed, error.kind()), (range(FOLIO, FOLIO), ErrorKind::Unsupported));
        let _ = memfd.convert(memfd.pages(), Visibility::Shared, PRESERVE).unwrap();
        assert!((0..2 * FOLIO).all(|page| read_page(&memfd, page) == contents(page)));
        memfd.punch_hole(memfd.pages()).unwrap();
        assert_eq!([Zone::Normal, zone].map(|zone| counters(&pool, zone)), promised);
        drop(memfd);
        assert_all_back(&pool);
    }
}

#[test]
fn private_memory_is_in_normal_from_its_first_touch() {
    for zone in OTHERS {
        let (pool, builder) = two_folios_in(zone);
        let memfd = builder.initial(Visibility::Private).create(&pool).unwrap();
        memfd.allocate(range(0, 1)).unwrap();
        let host = Hypervisor::new(&pool).unwrap();
        let vm = host.create_vm().unwrap();
        vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
        vm.create_vcpu().unwrap().store(Ipa::new(FOLIO << 12), &[1]).unwrap();
        assert!(is_all_in(&memfd, Zone::Normal));
        assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
        drop(vm);
        memfd.punch_hole(memfd.pages()).unwrap();
        // One private page is enough, wherever it is in the folio.
        let _ = memfd.convert(range(0, FOLIO - 1), Visibility::Shared, PRESERVE).unwrap();
        memfd.write(Offset::new(0), &[1]).unwrap();
        assert!(is_all_in(&memfd, Zone::Normal));
        memfd.punch_hole(memfd.pages()).unwrap();
        let _ = memfd.convert(range(FOLIO - 1, 1), Visibility::Shared, PRESERVE).unwrap();
        memfd.write(Offset::new(0), &[1]).unwrap();
        assert!(is_all_in(&memfd, zone));
        // With nothing there, there is nothing to be moved.
        memfd.punch_hole(memfd.pages()).unwrap();
        to_private(&memfd, 0, 2 * FOLIO).unwrap();
        assert_eq!(zones_of(&memfd), []);
        assert_clean(&pool, &memfd);
    }
}

#[test]
fn who_refuses_has_nothing_private_outside_of_normal() {
    for zone in OTHERS {
        let (pool, builder) = two_folios_in(zone);
        let builder = builder.private_placement(PrivatePlacement::Refuse);
        let memfd = builder.clone().create(&pool).unwrap();
        assert_eq!(pool.zone_stat(zone).reserved, pages(2 * FOLIO));
        assert_eq!(pool.zone_stat(Zone::Normal).reserved, pages(0));
        memfd.write(Offset::new(0), &contents(0)).unwrap();
        let error = memfd.convert(range(0, 1), Visibility::Private, PRESERVE).unwrap_err();
        assert_eq!((error.kind(), error.range()), (ErrorKind::Unsupported, Some(range(0, FOLIO))));
        assert!(error.to_string().contains("outside of zone normal"), "{error}");
        assert!(is_all_in(&memfd, zone) && read_page(&memfd, 0) == contents(0));
        // What is not there yet may turn private, and then is not touched.
        to_private(&memfd, FOLIO, 1).unwrap();
        for error in [
            memfd.allocate(range(FOLIO, 1)).unwrap_err(),
            memfd.write(Offset::new((FOLIO + 1) << 12), &[1]).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
        let host = Hypervisor::new(&pool).unwrap();
        let vm = host.create_vm().unwrap();
        vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
        assert!(vm.create_vcpu().unwrap().store(Ipa::new(FOLIO << 12), &[1]).is_err());
        drop((vm, host));
        assert_clean(&pool, &memfd);
        // By hand it can be moved, and is private then.
        assert_eq!(memfd.migrate(memfd.pages(), Zone::Normal).unwrap().moved, pages(FOLIO));
        to_private(&memfd, 0, 1).unwrap();
        drop(memfd);
        assert_all_back(&pool);

        let both = builder.zones(&[zone, Zone::Normal, zone]).create(&pool).unwrap();
        to_private(&both, 3, 1).unwrap();
        let stat = pool.zone_stat(Zone::Normal);
        assert_eq!((stat.used, stat.reserved), (pages(0), pages(0)), "all was promised elsewhere");
        drop(both);
        assert_all_back(&pool);
    }
}

#[test]
fn a_refused_conversion_has_changed_no_page() {
    let (pool, builder) = two_folios_in(Zone::Movable);
    let memfd = builder.create(&pool).unwrap();
    write_all(&memfd);
    let owner = memfd.register_owner("vfio").unwrap();
    // Beside the range, and in its folio.
    let pin = memfd.pin(range(FOLIO + 100, 1), owner, PinMode::Counted).unwrap();
    let error = memfd.convert(range(0, FOLIO + 3), Visibility::Private, PRESERVE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.culprit().unwrap().offset, Offset::new((FOLIO + 100) << 12));
    assert_eq!(memfd.stat().private, pages(0));
    assert!((0..2 * FOLIO).all(|page| read_page(&memfd, page) == contents(page)));
    assert_clean(&pool, &memfd);
    drop(pin);
    to_private(&memfd, 0, FOLIO + 3).unwrap();
    assert!(is_all_in(&memfd, Zone::Normal));
    assert_clean(&pool, &memfd);
}

#[test]
fn with_time_to_wait_a_conversion_waits_for_pins_that_keep_a_folio_in_its_zone() {
    let (pool, builder) = two_folios_in(Zone::Movable);
    let memfd = builder.create(&pool).unwrap();
    write_all(&memfd);
    let owner = memfd.register_owner("vfio").unwrap();
    let convert = |wait| {
        let options = ConvertOptions::default().wait(wait);
        memfd.convert_ranges(&[range(0, 3)], Visibility::Private, &options)
    };
    let pin = memfd.pin(range(100, 1), owner, PinMode::Counted).unwrap();
    let late = convert(Wait::at_most(Duration::from_millis(5))).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut, "{late}");
    assert!(is_all_in(&memfd, Zone::Movable) && memfd.stat().private == pages(0));
    assert_clean(&pool, &memfd);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| convert(Wait::at_most(Duration::from_secs(60))));
        std::thread::sleep(Duration::from_millis(20));
        drop(pin);
        assert_eq!(waiter.join().unwrap().unwrap().changed_pages(), 3);
    });
    assert_eq!(zones_of(&memfd), [Zone::Normal, Zone::Movable]);
    assert_clean(&pool, &memfd);
}

/// A folio may be punched and touched again between its move and the freeze.
#[test]
fn conversions_and_first_touches_that_race_end_in_normal() {
    let (pool, builder) = two_folios_in(Zone::Movable);
    let memfd = builder.folio_size(FolioSize::Base).create(&pool).unwrap();
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            for round in 0..20_000_u64 {
                let page = range(round % 2, 1);
                let touched = memfd.allocate(page).and_then(|()| memfd.punch_hole(page).map(drop));
                let fine = |kind| matches!(kind, ErrorKind::Busy);
                touched.unwrap_or_else(|error| assert!(fine(error.kind()), "{error}"));
            }
        });
        while !toucher.is_finished() {
            for to in [Visibility::Private, Visibility::Shared] {
                match memfd.convert(range(0, 2), to, PRESERVE) {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
                }
            }
        }
        toucher.join().unwrap();
    });
    to_private(&memfd, 0, 2).unwrap();
    memfd.allocate(range(0, 2)).unwrap();
    assert!(is_all_in(&memfd, Zone::Normal));
    assert_clean(&pool, &memfd);
    drop(memfd);
    assert_all_back(&pool);
}

#[test]
fn zones_fill_up_in_the_order_wanted_and_then_normal() {
    let parts = [(Zone::Normal, 4 * FOLIO), (Zone::Movable, FOLIO), (Zone::Cma, FOLIO)];
    let pool = pool(ArenaBacking::Heap, &parts);
    let builder = GuestMemfd::builder(pages(3 * FOLIO)).initial(Visibility::Shared);
    let memfd = builder.zones(&[Zone::Cma, Zone::Movable]).create(&pool).unwrap();
    write_all(&memfd);
    assert_eq!(zones_of(&memfd), [Zone::Cma, Zone::Movable, Zone::Normal]);
    // Out of the way: all of it was promised in Normal.
    assert_eq!(memfd.migrate(memfd.pages(), Zone::Normal).unwrap().moved, pages(2 * FOLIO));
    assert_eq!(counters(&pool, Zone::Normal), [FOLIO, 0, 3 * FOLIO, 0, 0].map(pages));
    let back = memfd.migrate(memfd.pages(), Zone::Cma).unwrap();
    assert_eq!((back.moved, back.refused.len()), (pages(FOLIO), 2), "one fits");
    assert_eq!(counters(&pool, Zone::Normal), [FOLIO, FOLIO, 2 * FOLIO, 0, 0].map(pages));
    assert_clean(&pool, &memfd);
    drop(memfd);
    assert_all_back(&pool);
}

#[test]
fn an_account_does_not_notice_where_folios_are() {
    for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
        let (pool, builder) = two_folios_in(Zone::Movable);
        let account = pool.open_account(Some(pages(2 * FOLIO)));
        let memfd = builder.account(&account).commitment(commitment).create(&pool).unwrap();
        write_all(&memfd);
        let full = account.stat();
        assert_eq!((full.charged, full.used), (pages(2 * FOLIO), pages(2 * FOLIO)));
        for to in [Zone::Normal, Zone::Movable, Zone::Normal] {
            assert_eq!(memfd.migrate(memfd.pages(), to).unwrap().moved, pages(2 * FOLIO));
            assert_eq!(account.stat(), full, "{commitment:?} in {to}");
        }
        let more = GuestMemfd::builder(pages(1)).account(&account).create(&pool);
        assert_eq!(more.unwrap_err().kind(), ErrorKind::LimitReached);
        memfd.punch_hole(range(0, FOLIO)).unwrap();
        assert_eq!(account.stat().used, pages(FOLIO));
        drop(memfd);
        let stat = account.stat();
        assert_eq!((stat.charged, stat.used, stat.peak), (pages(0), pages(0), pages(2 * FOLIO)));
        assert_all_back(&pool);
    }
}

#[test]
fn a_refused_move_costs_an_account_nothing() {
    let (pool, builder) = two_folios_in(Zone::Movable);
    let account = pool.open_account(None);
    let memfd = builder.account(&account).create(&pool).unwrap();
    write_all(&memfd);
    let (before, zones) =
        (account.stat(), [Zone::Normal, Zone::Movable].map(|it| counters(&pool, it)));
    for spared in 0..2 {
        let armed = gmem::failpoint::arm(gmem::failpoint::FailPoint::Folio, spared);
        let migration = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
        assert!(armed.has_fired());
        assert_eq!(migration.refused.len(), 1);
        assert_eq!(account.stat(), before);
        drop(armed);
        let _ = memfd.migrate(memfd.pages(), Zone::Movable).unwrap();
        assert_eq!([Zone::Normal, Zone::Movable].map(|it| counters(&pool, it)), zones);
    }
}

#[test]
fn a_zone_listed_twice_is_promised_once() {
    let pool = pool(ArenaBacking::Heap, &[(Zone::Normal, 4 * FOLIO)]);
    let builder = GuestMemfd::builder(pages(FOLIO)).initial(Visibility::Shared);
    let memfd = builder.clone().zones(&[Zone::Normal, Zone::Normal]).create(&pool).unwrap();
    let other = builder.create(&pool).unwrap();
    let promised = counters(&pool, Zone::Normal);
    for _ in 0..3 {
        memfd.allocate(memfd.pages()).unwrap();
        memfd.punch_hole(memfd.pages()).unwrap();
        assert_eq!(counters(&pool, Zone::Normal), promised);
    }
    drop(memfd);
    assert_eq!(pool.stat().reserved, pages(FOLIO), "the other's promise stands");
    drop(other);
    assert_all_back(&pool);
}

#[test]
fn a_part_is_of_the_node_that_it_was_asked_from() {
    if !common::require(Capability::Numa) {
        return;
    }
    let part =
        |node| PartSpec::new([ArenaBacking::Memfd], pages(FOLIO)).on_node(NumaNode::new(node));
    let anywhere = PartSpec::new([ArenaBacking::Memfd], pages(FOLIO));
    let pool = FolioPool::builder().part(part(0), Zone::Normal).part(anywhere, Zone::Movable);
    let pool = pool.create().unwrap();
    let [on_node, anywhere] = pool.parts() else { panic!("{:?}", pool.parts()) };
    assert_eq!((on_node.node, anywhere.node), (Some(NumaNode::new(0)), None));
    assert_eq!(on_node.to_string(), "0x0..0x200000: memfd, 4 KiB pages, NUMA node 0");
    let builder = GuestMemfd::builder(pages(FOLIO)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    write_all(&memfd);
    let (_, frames) = memfd.frames_of(memfd.pages()).unwrap().next().unwrap();
    assert!(on_node.frames.covers(&frames));
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
    let bound =
        maps.lines().filter(|line| line.contains("gmem-arena") && line.contains(" bind:0 "));
    assert!(bound.count() >= 1, "{maps}");

    let missing = |parts: [PartSpec; 2]| {
        let [first, second] = parts;
        let builder = FolioPool::builder().part(first, Zone::Normal).part(second, Zone::Movable);
        builder.create().unwrap_err()
    };
    for error in [missing([part(0), part(1000)]), missing([part(1000), part(0)])] {
        assert_eq!(error.kind(), ErrorKind::MissingCapability);
        assert!(error.to_string().contains("NUMA node 1000"), "{error}");
    }
    let on_heap =
        PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(2)).on_node(NumaNode::new(0));
    let error = FolioPool::builder().part(on_heap, Zone::Normal).create().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// Where an object lives first it is one run too, whatever comes between, and when it moves.
#[test]
fn who_floats_is_one_run_on_either_side() {
    let zones = [Zone::Movable, Zone::Normal];
    let pool = pool(ArenaBacking::Heap, &zones.map(|zone| (zone, 16 * FOLIO)));
    let builder = || GuestMemfd::builder(pages(4 * FOLIO)).initial(Visibility::Shared);
    let [one, two] = [(); 2].map(|()| builder().zones(&zones).create(&pool).unwrap());
    for nr in [2, 0, 3, 1] {
        for memfd in [&one, &two] {
            memfd.write(Offset::new((nr * FOLIO) << 12), &[1]).unwrap();
        }
    }
    for memfd in [&one, &two] {
        assert_eq!(zones_of(memfd), [Zone::Movable]);
        for zone in [Zone::Normal, Zone::Movable] {
            let _ = memfd.migrate(memfd.pages(), zone).unwrap();
            assert_eq!(zones_of(memfd), [zone]);
        }
        memfd.punch_hole(range(FOLIO, FOLIO)).unwrap();
    }
    for memfd in [&two, &one] {
        memfd.allocate(memfd.pages()).unwrap();
        assert_eq!(zones_of(memfd), [Zone::Movable], "home again");
    }
    assert_eq!(audit::check(&pool, &[&one, &two]).to_string(), "clean");
    drop((one, two));
    let all = builder().zones(&zones).create(&pool).unwrap();
    all.allocate(all.pages()).unwrap();
    assert_eq!(zones_of(&all), [Zone::Movable]);
    drop(all);
    assert_all_back(&pool);
}
