//! Pages punched out of folios that stay: what is seen of them, what fills them, and where their memory is.

#[path = "common/arena_files.rs"]
mod arena_files;
#[path = "common/child.rs"]
mod child;
mod common;
#[path = "common/setting.rs"]
mod setting;

use std::fs;

use arena_files::on_host;
use child::alone;
use common::Capability;
use gmem::addr::{Access, ByteSize, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::ErrorKind;
use gmem::failpoint::{FailPoint, arm};
use gmem::hyp::pkvm::Hypervisor;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, PinMode, Residency,
    SigbusHandler, Touch, Visibility, WhyKept,
};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const FOLIO: u64 = 512;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn pages(nr_pages: u64) -> ByteSize {
    ByteSize::from_pages(nr_pages)
}

fn object(backing: ArenaBacking, nr_pages: u64) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(backing, pages(nr_pages)).unwrap();
    let builder = GuestMemfd::builder(pages(nr_pages)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    (pool, memfd)
}

/// Every page gets bytes of its own.
fn write_all(memfd: &GuestMemfd) {
    for page in 0..memfd.size().whole_pages() {
        memfd.write(Offset::new(page << 12), &[tag(page); 4096]).unwrap();
    }
}

fn tag(page: u64) -> u8 {
    page as u8 | 1
}

fn first_byte(memfd: &GuestMemfd, page: u64) -> u8 {
    let mut byte = [0xee];
    memfd.read(Offset::new((page << 12) + 17), &mut byte).unwrap();
    byte[0]
}

fn touch(view: &HostView, page: u64) -> Option<u8> {
    let handler = SigbusHandler::install().unwrap();
    match view.touch(handler, Offset::new((page << 12) + 17), Access::Read).unwrap() {
        Touch::Byte(byte) => Some(byte),
        Touch::Fault(_) => None,
    }
}

fn is_resident(memfd: &GuestMemfd, page: u64) -> bool {
    let (_, info) = memfd.snapshot(range(page, 1)).unwrap().next().unwrap();
    info.residency == Residency::Resident
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
}

/// The numbers below `below`, each once, in no order.
fn shuffled(below: u64, seed: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (0..below).collect();
    let mut state = seed | 1;
    for at in (1..all.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.swap(at, (state % (at as u64 + 1)) as usize);
    }
    all
}

const BACKINGS: [ArenaBacking; 2] = [ArenaBacking::Heap, ArenaBacking::Memfd];

#[test]
fn a_folio_comes_back_with_its_last_page_whatever_the_order() {
    for backing in BACKINGS {
        let (pool, memfd) = object(backing, 2 * FOLIO + 7);
        write_all(&memfd);
        let order = shuffled(FOLIO, 0x5eed);
        for (nr_holes, &page) in (0..).zip(&order) {
            let punched = memfd.punch_hole(range(FOLIO + page, 1)).unwrap();
            assert_eq!(first_byte(&memfd, FOLIO + page), 0);
            if nr_holes + 1 == FOLIO {
                assert_eq!(punched.returned(), pages(FOLIO));
                assert_eq!((punched.released(), punched.kept()), Default::default());
                assert_eq!(punched.to_string(), "2097152 bytes to the pool, 0 to the host, 0 kept");
                continue;
            }
            let [released, kept] = match backing {
                ArenaBacking::Heap => [pages(0), pages(1)],
                _ => [pages(1), pages(0)],
            };
            assert_eq!(punched.returned(), pages(0));
            assert_eq!([punched.released(), punched.kept()], [released, kept]);
            let why = (backing == ArenaBacking::Heap).then_some(WhyKept::Heap);
            assert_eq!(punched.why_kept(), why);
            assert_eq!(memfd.stat().holes, pages(nr_holes + 1));
            assert!(!is_resident(&memfd, FOLIO + page));
            if let Some(&next) = order.get(nr_holes as usize + 1) {
                assert_eq!(
                    first_byte(&memfd, FOLIO + next),
                    tag(FOLIO + next),
                    "its neighbours stay"
                );
            }
        }
        let stat = memfd.stat();
        assert_eq!(
            (stat.resident, stat.holes, stat.released),
            (pages(FOLIO + 7), pages(0), pages(0))
        );
        assert_eq!(pool.stat().used, pages(FOLIO + 7));
        assert_eq!(pool.stat().reserved, pages(FOLIO), "it stays promised");
        assert_clean(&pool, &memfd);
        memfd.write(Offset::new((FOLIO + 3) << 12), &[9; 4096]).unwrap();
        assert_eq!([first_byte(&memfd, FOLIO + 3), first_byte(&memfd, FOLIO + 4)], [9, 0]);
        drop(memfd);
        assert_eq!(pool.verify_scrubbed(), Ok(pages(2 * FOLIO + 7)));
    }
}

#[test]
fn a_punch_of_holes_takes_nothing_and_a_punch_across_folios_says_all() {
    let (pool, memfd) = object(ArenaBacking::Memfd, 4 * FOLIO);
    memfd.write(Offset::new(0), &[1]).unwrap();
    memfd.allocate(range(FOLIO, 2 * FOLIO)).unwrap();
    let punched = memfd.punch_hole(range(10, 20)).unwrap();
    assert_eq!(punched.released(), pages(20));
    let again = memfd.punch_hole(range(5, 20)).unwrap();
    assert_eq!((again.released(), again.returned()), (pages(5), pages(0)), "15 are holes already");
    // The end of one folio, a whole one, the start of a third, and in the fourth nothing at all.
    let across = memfd.punch_hole(range(500, 1000)).unwrap();
    assert_eq!((across.returned(), across.released()), (pages(FOLIO), pages(12 + 476)));
    assert_eq!((across.kept(), across.why_kept()), (pages(0), None));
    let rest = memfd.punch_hole(memfd.pages()).unwrap();
    assert_eq!((rest.returned(), rest.released()), (pages(2 * FOLIO), pages(0)));
    assert_eq!(pool.stat().used, pages(0));
    assert_clean(&pool, &memfd);
}

#[test]
fn each_kind_of_touch_fills_a_hole_and_a_read_does_not() {
    for backing in BACKINGS {
        let (pool, memfd) = object(backing, FOLIO);
        write_all(&memfd);
        memfd.punch_hole(range(8, 64)).unwrap();
        let filled = |page: u64| {
            assert!(is_resident(&memfd, page) && !is_resident(&memfd, page + 1), "{page}");
        };
        let mut buf = [0xee; 3 * 4096];
        memfd.read(Offset::new(7 << 12), &mut buf).unwrap();
        assert!(buf[..4096].iter().all(|&byte| byte == tag(7)));
        assert!(buf[4096..].iter().all(|&byte| byte == 0));
        assert_eq!(memfd.stat().holes, pages(64), "a read fills nothing");

        memfd.write(Offset::new((8 << 12) + 5), &[3]).unwrap();
        filled(8);
        memfd.store_u64(Offset::new(10 << 12), 7).unwrap();
        filled(10);
        assert_eq!(memfd.load_u64(Offset::new(12 << 12)).unwrap(), 0);
        filled(12);
        memfd.allocate(range(14, 1)).unwrap();
        filled(14);
        // A pin has no bytes of its own to touch.
        let owner = memfd.register_owner("test").unwrap();
        drop(memfd.pin(range(16, 1), owner, PinMode::Counted).unwrap());
        assert_eq!(memfd.stat().holes, pages(60));
        let mut page = [0xee; 4096];
        memfd.read(Offset::new(8 << 12), &mut page).unwrap();
        assert!(page.iter().enumerate().all(|(at, &byte)| byte == if at == 5 { 3 } else { 0 }));
        memfd.allocate(memfd.pages()).unwrap();
        assert_eq!(memfd.stat().holes, pages(0));
        assert_eq!((first_byte(&memfd, 16), first_byte(&memfd, 72)), (0, tag(72)));
        assert_clean(&pool, &memfd);
    }
}

#[test]
fn what_is_pinned_stays_and_so_does_a_folio_of_holes_with_a_pin() {
    for backing in BACKINGS {
        let (pool, memfd) = object(backing, FOLIO);
        write_all(&memfd);
        let owner = memfd.register_owner("vfio").unwrap();
        let pin = memfd.pin(range(40, 2), owner, PinMode::Counted).unwrap();
        memfd.punch_hole(range(0, 40)).unwrap();
        memfd.punch_hole(range(42, 470)).unwrap();
        assert_eq!(memfd.punch_hole(range(0, FOLIO)).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!((first_byte(&memfd, 40), first_byte(&memfd, 41)), (tag(40), tag(41)));
        drop(pin);
        // Pins of holes: nobody works on them, but the folio is where whoever fills them expects it.
        for held in [0, 511] {
            let pin = memfd.pin(range(held, 1), owner, PinMode::Exclusive).unwrap();
            let punched = memfd.punch_hole(range(40, 2)).unwrap();
            assert_eq!(punched.returned(), pages(0));
            assert_eq!(memfd.stat().holes, pages(FOLIO));
            assert_eq!(pool.stat().used, pages(FOLIO));
            assert_clean(&pool, &memfd);
            drop(pin);
            memfd.allocate(range(40, 2)).unwrap();
        }
        memfd.punch_hole(range(40, 2)).unwrap();
        assert_eq!(pool.stat().used, pages(0));
        assert_clean(&pool, &memfd);
    }
}

#[test]
fn a_folio_that_stayed_for_a_pin_goes_with_the_next_punch_of_any_page() {
    let (pool, memfd) = object(ArenaBacking::Memfd, FOLIO);
    write_all(&memfd);
    let owner = memfd.register_owner("vfio").unwrap();
    memfd.punch_hole(range(0, 100)).unwrap();
    let pin = memfd.pin(range(3, 1), owner, PinMode::Counted).unwrap();
    memfd.punch_hole(range(100, 412)).unwrap();
    assert_eq!(memfd.stat().released, pages(FOLIO));
    drop(pin);
    let punched = memfd.punch_hole(range(200, 1)).unwrap();
    assert_eq!(punched.returned(), pages(FOLIO));
    assert_eq!(pool.stat().used, pages(0));
    assert_eq!(pool.verify_scrubbed(), Ok(pages(FOLIO)));
}

#[test]
fn a_pin_at_one_end_of_a_punch_keeps_the_folio_there_alone() {
    for held in [3, 2 * FOLIO - 3] {
        let (pool, memfd) = object(ArenaBacking::Heap, 2 * FOLIO);
        write_all(&memfd);
        memfd.punch_hole(range(0, 10)).unwrap();
        memfd.punch_hole(range(2 * FOLIO - 10, 10)).unwrap();
        let owner = memfd.register_owner("vfio").unwrap();
        let pin = memfd.pin(range(held, 1), owner, PinMode::Counted).unwrap();
        let punched = memfd.punch_hole(range(10, 2 * FOLIO - 20)).unwrap();
        assert_eq!((punched.returned(), punched.kept()), (pages(FOLIO), pages(FOLIO - 10)));
        assert!(!is_resident(&memfd, held));
        assert_clean(&pool, &memfd);
        drop(pin);
        assert_eq!(memfd.punch_hole(range(held, 1)).unwrap().returned(), pages(FOLIO));
        assert_eq!(pool.stat().used, pages(0));
    }
}

#[test]
fn views_do_not_show_holes_and_pins_keep_their_pointers() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(ArenaBacking::Memfd, 2 * FOLIO);
    write_all(&memfd);
    let view = memfd.map_view().unwrap();
    let owner = memfd.register_owner("virtio-blk").unwrap();
    let _pin = memfd.pin(range(101, 1), owner, PinMode::Counted).unwrap();
    memfd.punch_hole(range(100, 1)).unwrap();
    memfd.punch_hole(range(102, FOLIO)).unwrap();
    let seen: Vec<_> = [99, 100, 101, 102, 511, 512, 613, 614].map(|at| touch(&view, at)).into();
    let kept = |page| Some(tag(page));
    assert_eq!(seen, [kept(99), None, kept(101), None, None, None, None, kept(614)]);
    assert_eq!(memfd.stat().mapped, pages(2 * FOLIO - 1 - FOLIO));
    assert_clean(&pool, &memfd);

    memfd.write(Offset::new(102 << 12), &[5; 4096]).unwrap();
    assert_eq!([touch(&view, 102), touch(&view, 103)], [Some(5), None]);

    // Holes of private memory stay holes when another view is mapped; both show what is shared later.
    let _ = memfd.convert(range(200, 40), Visibility::Private, PRESERVE).unwrap();
    let second = memfd.map_view().unwrap();
    assert_eq!(
        [touch(&view, 103), touch(&second, 103)],
        [Some(0); 2],
        "it is shared, so it is shown"
    );
    assert_eq!([touch(&view, 200), touch(&second, 239)], [None; 2]);
    assert_eq!(memfd.stat().holes, pages(40));
    let _ = memfd.convert(range(210, 10), Visibility::Shared, PRESERVE).unwrap();
    for view in [&view, &second] {
        assert_eq!([209, 210, 219, 220].map(|at| touch(view, at)), [None, Some(0), Some(0), None]);
    }
    assert_eq!(memfd.stat().holes, pages(30));
    assert_clean(&pool, &memfd);
}

#[test]
fn a_guest_finds_zeroes_where_its_memory_was_punched() {
    const BASE: u64 = 0x8000_0000;
    for backing in BACKINGS {
        let pool = FolioPool::new(backing, pages(2 * FOLIO)).unwrap();
        let hyp = Hypervisor::new(&pool).unwrap();
        let memfd = GuestMemfd::builder(pages(FOLIO)).create(&pool).unwrap();
        let vm = hyp.create_vm().unwrap();
        vm.bind(Ipa::new(BASE).gfn(), &memfd, memfd.pages()).unwrap();
        let mut vcpu = vm.create_vcpu().unwrap();
        let ipa = |page: u64| Ipa::new(BASE + (page << 12));
        let sound = || {
            let report = audit::check_under(&pool, &[&memfd], &hyp);
            assert!(report.is_clean(), "{report}");
        };
        vcpu.store_u64(ipa(7), 77).unwrap();
        // What the guest has not touched yet is the host's to take.
        memfd.punch_hole(range(8, 504)).unwrap();
        memfd.punch_hole(range(0, 7)).unwrap();
        assert_eq!(memfd.stat().holes, pages(511));
        let refused = memfd.punch_hole(range(6, 2)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::HypervisorRefused);
        sound();
        assert_eq!(vcpu.load_u64(ipa(8)).unwrap(), 0);
        vcpu.store_u64(ipa(300), 3).unwrap();
        assert_eq!([vcpu.load_u64(ipa(300)), vcpu.load_u64(ipa(7))].map(Result::unwrap), [3, 77]);
        assert_eq!(memfd.stat().holes, pages(509));
        sound();
        drop(vcpu);
        vm.teardown().unwrap();
        let punched = memfd.punch_hole(memfd.pages()).unwrap();
        assert_eq!(punched.returned(), pages(FOLIO));
        sound();
    }
}

#[test]
fn many_threads_at_the_pages_of_one_folio_keep_to_their_own() {
    const THREADS: u64 = 4;
    for backing in BACKINGS {
        let (pool, memfd) = object(backing, FOLIO);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let memfd = &memfd;
                scope.spawn(move || {
                    // Neighbours in every word of bits.
                    let mine: Vec<u64> =
                        (0..FOLIO).filter(|page| page % THREADS == thread).collect();
                    for round in 0..60 {
                        for &page in &mine {
                            memfd
                                .store_u64(Offset::new(page << 12), (round << 32) | (page + 1))
                                .unwrap();
                        }
                        for &page in &mine {
                            let found = memfd.load_u64(Offset::new(page << 12)).unwrap();
                            assert_eq!(found, (round << 32) | (page + 1));
                        }
                        for &page in &mine {
                            memfd.punch_hole(range(page, 1)).unwrap();
                            let mut word = [1; 8];
                            memfd.read(Offset::new(page << 12), &mut word).unwrap();
                            assert_eq!(word, [0; 8]);
                        }
                    }
                });
            }
        });
        assert_clean(&pool, &memfd);
        // Who comes to a folio first has all of it, so some were had again behind the others' backs.
        (0..FOLIO).for_each(|page| assert_eq!(first_byte(&memfd, page), 0));
        let returned = |page| memfd.punch_hole(range(page, 1)).unwrap().returned();
        assert!((0..FOLIO).map(returned).max() <= Some(pages(FOLIO)));
        assert_eq!(pool.stat().used, pages(0));
        assert_clean(&pool, &memfd);
        drop(memfd);
        assert_eq!(pool.verify_scrubbed(), Ok(pages(FOLIO)));
    }
}

#[test]
fn the_host_has_exactly_what_was_released() {
    // A size that no other test has.
    let size = pages(4 * FOLIO + 3);
    let (pool, memfd) = object(ArenaBacking::Memfd, 4 * FOLIO + 3);
    assert_eq!(on_host(size), size, "all of a pool is committed");
    memfd.allocate(memfd.pages()).unwrap();
    let less = |nr_pages: u64| ByteSize::from_bytes(size.get() - pages(nr_pages).get());
    memfd.punch_hole(range(1, 3)).unwrap();
    memfd.punch_hole(range(500, 20)).unwrap();
    assert_eq!((on_host(size), memfd.stat().resident), (less(23), less(23)));
    let mut buf = vec![1; 30 << 12];
    memfd.read(Offset::new(495 << 12), &mut buf).unwrap();
    assert_eq!(on_host(size), less(23), "a read has nothing committed");
    memfd.write(Offset::new(505 << 12), &[1; 4096 * 2]).unwrap();
    assert_eq!(on_host(size), less(21));
    // The pool keeps what comes back to it, and so it is committed again.
    memfd.punch_hole(range(0, FOLIO)).unwrap();
    assert_eq!(memfd.stat().released, pages(8));
    assert_eq!(on_host(size), less(8));
    assert_clean(&pool, &memfd);
    drop(memfd);
    assert_eq!(on_host(size), size);
    assert_eq!(pool.verify_scrubbed(), Ok(size));
}

#[test]
fn without_memory_for_a_hole_nothing_has_happened() {
    for backing in BACKINGS {
        // A size that no other test has.
        let (pool, memfd) = object(backing, 3 * FOLIO);
        memfd.allocate(range(0, FOLIO)).unwrap();
        memfd.punch_hole(range(10, 5)).unwrap();
        memfd.punch_hole(range(20, 5)).unwrap();
        let on_host = || on_host(pages(3 * FOLIO));
        let seen = || (memfd.stat(), pool.stat(), memfd.bytes_behind(), on_host());
        let before = seen();
        // The second run fails after the first was had, and a folio was taken for what lies behind.
        for spared in 0..2 {
            let armed = arm(FailPoint::Commit, spared);
            let error = memfd.allocate(range(12, FOLIO)).unwrap_err();
            assert!(armed.has_fired());
            assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
            assert_eq!(error.range(), Some(range(12, FOLIO)));
            assert!(seen() == before);
        }
        let armed = arm(FailPoint::Commit, 0);
        let error = memfd.write(Offset::new(10 << 12), &[1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(armed.has_fired() && seen() == before);
        drop(armed);
        memfd.write(Offset::new(10 << 12), &[1]).unwrap();
        assert_clean(&pool, &memfd);

        // A folio that the host does not complete again stays, all of it holes, until it can go.
        let armed = arm(FailPoint::Commit, 0);
        let punched = memfd.punch_hole(range(0, FOLIO)).unwrap();
        assert!(armed.has_fired());
        drop(armed);
        assert_eq!(punched.returned(), pages(0));
        assert_eq!(punched.released().get() + punched.kept().get(), pages(FOLIO - 9).get());
        assert_eq!((memfd.stat().holes, pool.stat().used), (pages(FOLIO), pages(FOLIO)));
        assert_clean(&pool, &memfd);
        assert_eq!(memfd.punch_hole(range(30, 1)).unwrap().returned(), pages(FOLIO));
        assert_clean(&pool, &memfd);

        // When the object goes there is no later; the pool does without what it cannot rely on.
        memfd.allocate(memfd.pages()).unwrap();
        memfd.punch_hole(range(FOLIO, 1)).unwrap();
        let armed = arm(FailPoint::Commit, 0);
        drop(memfd);
        assert!(armed.has_fired());
        let stat = pool.stat();
        assert_eq!((stat.quarantined, stat.free), (pages(FOLIO), pages(2 * FOLIO)));
        assert_eq!(pool.verify_scrubbed(), Ok(pages(2 * FOLIO)));
    }
}

#[test]
fn a_punch_that_fails_has_changed_nothing() {
    for backing in BACKINGS {
        if backing == ArenaBacking::Memfd && !common::require(Capability::Uffd) {
            continue;
        }
        let (pool, memfd) = object(backing, 3 * FOLIO + 9);
        write_all(&memfd);
        let nr_views = if backing == ArenaBacking::Heap { 0 } else { 2 };
        let views: Vec<_> = (0..nr_views).map(|_| memfd.map_view().unwrap()).collect();
        memfd.punch_hole(range(0, 100)).unwrap();
        let seen = || {
            let mut stat = memfd.stat();
            // Blocks that were split on the way may stay so.
            stat.metadata = ByteSize::default();
            let shown = |view| [0, 99, 100, 512, 1029, 1030].map(|page| touch(view, page));
            let shown: Vec<_> = views.iter().map(shown).collect();
            (stat, pool.stat(), memfd.bytes_behind(), shown)
        };
        let before = seen();
        let points = [(FailPoint::Memory, 1), (FailPoint::Barrier, 1), (FailPoint::View, nr_views)];
        for (point, nr_times) in points {
            for spared in 0..nr_times as u32 {
                let armed = arm(point, spared);
                // The rest of a folio with holes, a whole one, and a part.
                let outcome = memfd.punch_hole(range(100, 930));
                assert!(armed.has_fired(), "{point:?}");
                assert_eq!(outcome.unwrap_err().range(), Some(range(100, 930)));
                assert!(seen() == before, "{point:?} {spared} on {backing}");
                assert_clean(&pool, &memfd);
            }
        }
        let punched = memfd.punch_hole(range(100, 930)).unwrap();
        assert_eq!(punched.returned(), pages(2 * FOLIO));
        assert_clean(&pool, &memfd);
    }
}

/// What of this process is in memory, by `VmRSS` of `/proc/self/status`.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn punching_a_random_half_of_256_mib_gives_half_of_it_back() {
    alone("punching_a_random_half_of_256_mib_gives_half_of_it_back", || {
        const PAGES: u64 = 256 << 8;
        let (pool, memfd) = object(ArenaBacking::Memfd, PAGES);
        write_all(&memfd);
        let before = resident();
        let half: Vec<u64> = shuffled(PAGES, 0xba11).into_iter().take(PAGES as usize / 2).collect();
        for &page in &half {
            memfd.punch_hole(range(page, 1)).unwrap();
        }
        let punched = resident();
        let stat = memfd.stat();
        println!("before {before}, half of it punched {punched}, metadata {}", stat.metadata);
        assert_eq!(stat.released, pages(PAGES / 2));
        assert_eq!(on_host(pages(PAGES)), pages(PAGES / 2));
        let wanted = before - stat.released.get();
        assert!(punched <= wanted + before / 100, "{before} {punched}");

        // A conversion of any pattern of it has nothing filled.
        let other = shuffled(PAGES, 0x5eed).into_iter().take(PAGES as usize / 2);
        let ranges: Vec<_> = other.map(|page| range(page, 1)).collect();
        for to in [Visibility::Private, Visibility::Shared] {
            let _ = memfd.convert_ranges(&ranges, to, &gmem::ConvertOptions::default()).unwrap();
            let converted = resident();
            println!("a random half {to}: {converted}");
            // The list of ranges is counted as well.
            assert!(converted <= punched + before / 100, "{punched} {converted}");
        }
        for &page in &half {
            memfd.write(Offset::new(page << 12), &[1]).unwrap();
        }
        assert_eq!(memfd.stat().holes, pages(0));
        assert_eq!(on_host(pages(PAGES)), pages(PAGES));
        drop(memfd);
        assert_eq!(pool.stat().free, pages(PAGES));
    });
}

#[test]
fn converting_a_random_half_takes_metadata_only() {
    alone("converting_a_random_half_takes_metadata_only", || {
        const PAGES: u64 = 256 << 8;
        let (_pool, memfd) = object(ArenaBacking::Memfd, PAGES);
        write_all(&memfd);
        let before = resident();
        for &page in shuffled(PAGES, 0xc0de).iter().take(PAGES as usize / 2) {
            let _ = memfd.convert(range(page, 1), Visibility::Private, PRESERVE).unwrap();
        }
        let after = resident();
        println!("before {before}, after {after}: {:.4}", after as f64 / before as f64);
        assert!(after <= before + before / 100, "{before} {after}");
        assert_eq!(on_host(pages(PAGES)), pages(PAGES));
    });
}

/// Of this process, by the kernel's own account of its mappings.
fn hugetlb() -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = smaps.lines().filter(|line| line.contains("_Hugetlb:"));
    lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10).sum()
}

#[test]
fn transparent_huge_pages_are_not_split_by_holes() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let size = pages(8 * FOLIO);
    let (pool, memfd) = object(ArenaBacking::MemfdThp, 8 * FOLIO);
    write_all(&memfd);
    let (huge, taken) = (pool.stat().huge, on_host(size));
    assert!(huge.get() > 0, "the kernel found no huge page at all");
    for page in (0..8 * FOLIO).step_by(3) {
        let punched = memfd.punch_hole(range(page, 1)).unwrap();
        assert_eq!((punched.kept(), punched.released()), (pages(1), pages(0)));
        assert_eq!(punched.why_kept(), Some(WhyKept::TransparentHuge));
    }
    assert_eq!((pool.stat().huge, on_host(size)), (huge, taken));
    let stat = memfd.stat();
    assert_eq!((stat.resident, stat.released), (size, pages(0)));
    assert_eq!([first_byte(&memfd, 0), first_byte(&memfd, 1)], [0, tag(1)]);
    memfd.write(Offset::new(0), &[2; 4096]).unwrap();
    assert_eq!(first_byte(&memfd, 0), 2);
    assert_clean(&pool, &memfd);
    let rest = memfd.punch_hole(memfd.pages()).unwrap();
    assert_eq!(rest.returned(), size);
    assert_eq!(pool.stat().huge, huge);
}

#[test]
fn hugetlb_pages_are_kept_and_their_views_go_by_2_mib() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let (pool, memfd) = object(ArenaBacking::MemfdHugetlb2M, 4 * FOLIO);
    write_all(&memfd);
    let view = memfd.map_view().unwrap();
    let huge = hugetlb();
    assert!(huge >= pages(4 * FOLIO).get());
    for page in [3, 600, 601] {
        let punched = memfd.punch_hole(range(page, 1)).unwrap();
        assert_eq!((punched.kept(), punched.why_kept()), (pages(1), Some(WhyKept::Hugetlb)));
    }
    assert_eq!(pool.stat().huge, pages(4 * FOLIO));
    assert_eq!([first_byte(&memfd, 3), first_byte(&memfd, 4)], [0, tag(4)]);
    assert_eq!([4, 512, 1024].map(|at| touch(&view, at)), [None, None, Some(tag(1024))]);
    assert_clean(&pool, &memfd);
    memfd.write(Offset::new(3 << 12), &[1; 4096]).unwrap();
    memfd.write(Offset::new(600 << 12), &[1; 4096]).unwrap();
    // One of two holes of the second is still there.
    assert_eq!([3, 4, 600].map(|at| touch(&view, at)), [Some(1), Some(tag(4)), None]);
    memfd.allocate(range(601, 1)).unwrap();
    assert_eq!([600, 601, 602].map(|at| touch(&view, at)), [Some(1), Some(0), Some(tag(602))]);
    assert_eq!(hugetlb(), huge, "all is mapped again, and by huge pages");
    let order = shuffled(FOLIO, 1);
    let returned = order.iter().map(|&page| memfd.punch_hole(range(page, 1)).unwrap().returned());
    assert_eq!(returned.max(), Some(pages(FOLIO)));
    assert_clean(&pool, &memfd);
}
