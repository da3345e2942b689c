//! Pages punched out of folios that stay: what is seen of them, and what fills them.

#[path = "common/arena_files.rs"]
mod arena_files;
#[path = "common/child.rs"]
mod child;
mod common;
#[path = "holes/failures.rs"]
mod failures;
#[path = "holes/memory.rs"]
mod memory;
#[path = "common/setting.rs"]
mod setting;

use common::Capability;
use gmem::addr::{Access, ByteSize, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::ErrorKind;
use gmem::hyp::{Hypervisor, Model, SharedMemory};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, PinMode, Residency,
    SigbusHandler, Touch, Visibility, WhyKept,
};

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
    // The others give a folio at once, and never take a page of it back.
    let models = [Model::default(), SharedMemory::Dynamic.into(), SharedMemory::Static.into()];
    for (backing, model) in BACKINGS.into_iter().flat_map(|it| models.map(|model| (it, model))) {
        let pool = FolioPool::new(backing, pages(2 * FOLIO)).unwrap();
        let hyp = Hypervisor::with(&pool, model).unwrap();
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
        let kept = match (model.takes_back(), memfd.punch_hole(range(6, 2))) {
            (true, punched) => {
                punched.unwrap();
                0
            }
            (false, refused) => {
                assert_eq!(refused.unwrap_err().kind(), ErrorKind::HypervisorRefused);
                77
            }
        };
        sound();
        assert_eq!(vcpu.load_u64(ipa(8)).unwrap(), 0);
        vcpu.store_u64(ipa(300), 3).unwrap();
        assert_eq!([vcpu.load_u64(ipa(300)), vcpu.load_u64(ipa(7))].map(Result::unwrap), [3, kept]);
        // A folio without pages is gone, and the next touch brings a whole one.
        assert_eq!(memfd.stat().holes, pages(if kept == 77 { 509 } else { 0 }));
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
