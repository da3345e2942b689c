//! Room for huge folios: what moves for it, and what stops it.

mod common;
#[path = "common/zoned.rs"]
mod zoned;

use common::Capability;
use gmem::addr::{Access, Gfn, Ipa, Offset};
use gmem::audit;
use gmem::error::{ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::hyp::Hypervisor;
use gmem::range::PfnRange;
use gmem::{
    ArenaBacking, Commitment, Compaction, ContentPolicy, FolioPool, GuestMemfd, HostView, PinMode,
    SigbusHandler, Touch, Visibility, Zone,
};
use zoned::{
    FOLIO, assert_all_back, contents, counters, is_all_in, pages, pool, range, read_page, write_all,
};

const HUGE: FolioSize = FolioSize::Huge2M;
const NORMAL: Zone = Zone::Normal;

/// An object of folios of 4 KiB that promises itself nothing, so that what it leaves is anybody's.
fn small(pool: &FolioPool, nr_pages: u64, initial: Visibility) -> GuestMemfd {
    let builder = GuestMemfd::builder(pages(nr_pages)).initial(initial);
    let builder = builder.folio_size(FolioSize::Base).commitment(Commitment::Overcommitted);
    builder.create(pool).unwrap()
}

/// Every page whose number `stays` accepts is in use; the others were and are free again.
fn fragmented(
    backing: ArenaBacking,
    nr_pages: u64,
    stays: impl Fn(u64) -> bool,
) -> (FolioPool, GuestMemfd) {
    let pool = pool(backing, &[(NORMAL, nr_pages)]);
    let memfd = small(&pool, nr_pages, Visibility::Shared);
    write_all(&memfd);
    for page in (0..nr_pages).filter(|&page| !stays(page)) {
        memfd.punch_hole(range(page, 1)).unwrap();
    }
    (pool, memfd)
}

fn checkerboard(backing: ArenaBacking, nr_pages: u64) -> (FolioPool, GuestMemfd) {
    fragmented(backing, nr_pages, |page| page % 2 == 0)
}

fn assert_even_pages_are_there(memfd: &GuestMemfd) {
    for page in 0..memfd.size().whole_pages() {
        let wanted = if page % 2 == 0 { contents(page) } else { [0; 4096] };
        assert!(read_page(memfd, page) == wanted, "{page}");
    }
}

/// Makes room, and makes sure that it is room.
fn make(pool: &FolioPool) -> Compaction {
    let compaction = pool.compact(HUGE, NORMAL).unwrap();
    let made = compaction.made.unwrap();
    assert_eq!((made.start().get() % FOLIO, made.nr_pages()), (0, FOLIO));
    let whole = GuestMemfd::builder(pages(FOLIO)).initial(Visibility::Shared);
    let whole = whole.create(pool).unwrap();
    whole.allocate(whole.pages()).unwrap();
    compaction
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
}

#[test]
fn a_checkerboard_becomes_room_with_half_a_block_moved() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        let (pool, memfd) = checkerboard(backing, 4 * FOLIO);
        let before = pool.stat();
        assert_eq!(before.largest_free, pages(1));
        let refused = GuestMemfd::builder(pages(FOLIO)).create(&pool).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Exhausted);
        let compaction = make(&pool);
        assert_eq!((compaction.moved, compaction.obstacles.len()), (pages(FOLIO / 2), 0));
        assert_eq!(pool.stat().used, before.used);
        assert_eq!(pool.stat().free, before.free);
        assert_even_pages_are_there(&memfd);
        assert_clean(&pool, &memfd);
        // There is room already: nothing moves for it.
        let again = make(&pool);
        assert_eq!((again.moved, again.made), (pages(0), compaction.made));
        drop(memfd);
        assert_all_back(&pool);
    }
}

#[test]
fn as_much_room_is_made_as_there_is_memory() {
    let (pool, memfd) = checkerboard(ArenaBacking::Heap, 4 * FOLIO);
    let mut guests = Vec::new();
    for _ in 0..2 {
        let compaction = pool.compact(HUGE, NORMAL).unwrap();
        assert!(compaction.made.is_some(), "{compaction:?}");
        let guest = GuestMemfd::builder(pages(FOLIO)).create(&pool).unwrap();
        guests.push(guest);
    }
    assert_eq!(pool.stat().free, pages(0));
    let none = pool.compact(HUGE, NORMAL).unwrap();
    assert_eq!((none.made, none.moved), (None, pages(0)), "what is free is promised");
    assert_even_pages_are_there(&memfd);
    assert_clean(&pool, &memfd);
    guests.iter().for_each(|guest| guest.allocate(guest.pages()).unwrap());
    drop((guests, memfd));
    assert_all_back(&pool);
}

#[test]
fn views_stay_where_they_are_while_folios_move_below_them() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = checkerboard(ArenaBacking::Memfd, 2 * FOLIO);
    let other = memfd.clone();
    let handler = SigbusHandler::install().unwrap();
    let _ = memfd.convert(range(1, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    for page in (3..2 * FOLIO).step_by(2) {
        let _ =
            memfd.convert(range(page, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    }
    let view = memfd.map_view().unwrap();
    let seen = |view: &HostView| -> Vec<_> {
        let touch = |page: u64| view.touch(handler, Offset::new((page << 12) + 17), Access::Read);
        (0..2 * FOLIO).map(|page| touch(page).unwrap()).collect()
    };
    let before = seen(&view);
    let faults = before.iter().filter(|touch| matches!(touch, Touch::Fault(_))).count();
    assert_eq!(faults as u64, FOLIO);
    assert_eq!(make(&pool).moved, pages(FOLIO / 2));
    assert!(seen(&view) == before);
    assert_clean(&pool, &other);
}

#[test]
fn a_pin_in_every_block_stops_it_and_the_report_says_who() {
    let (pool, memfd) = checkerboard(ArenaBacking::Heap, 8 * FOLIO);
    let owner = memfd.register_owner("virtio-net").unwrap();
    // The first folio of each block, so that nothing is moved in vain.
    let blocks: Vec<_> = (0..8).map(|block| block * FOLIO).collect();
    let pin = |&page: &u64| memfd.pin(range(page, 1), owner, PinMode::Counted).unwrap();
    let mut pins: Vec<_> = blocks.iter().map(pin).collect();
    let compaction = pool.compact(HUGE, NORMAL).unwrap();
    assert_eq!((compaction.made, compaction.moved), (None, pages(0)));
    assert_eq!(compaction.obstacles.len(), 8, "no block goes untried");
    for (obstacle, &page) in compaction.obstacles.iter().zip(&blocks) {
        assert_eq!(obstacle.frames, frame_of(&memfd, page));
        let culprit = obstacle.error.culprit().unwrap();
        assert_eq!(
            (obstacle.error.kind(), culprit.offset),
            (ErrorKind::Busy, Offset::new(page << 12))
        );
        assert_eq!(culprit.found, Found::Pinned { pins: 1, owners: vec!["virtio-net".into()] });
    }
    assert_eq!(
        compaction.obstacles[1].to_string(),
        "1 frames from 0x200 on: compact 0x200000..0x201000: part of the range is in use: subpage \
         0x200000 has 1 pin (virtio-net)"
    );
    assert_even_pages_are_there(&memfd);
    assert_clean(&pool, &memfd);
    // One block is enough, and it is the last.
    drop(pins.pop());
    let compaction = make(&pool);
    assert_eq!((compaction.moved, compaction.obstacles.len()), (pages(FOLIO / 2), 7));
    assert_even_pages_are_there(&memfd);
    assert_clean(&pool, &memfd);
    drop(pins);
    drop(memfd);
    assert_all_back(&pool);
}

fn frame_of(memfd: &GuestMemfd, page: u64) -> PfnRange {
    memfd.frames_of(range(page, 1)).unwrap().next().unwrap().1
}

#[test]
fn what_was_moved_in_vain_is_limited_and_stays_right() {
    let (pool, memfd) = checkerboard(ArenaBacking::Heap, 8 * FOLIO);
    let owner = memfd.register_owner("virtio-net").unwrap();
    // The last folio of each block.
    let last = |block: u64| range((block + 1) * FOLIO - 2, 1);
    let pin = |block| memfd.pin(last(block), owner, PinMode::Counted).unwrap();
    let pins: Vec<_> = (0..8).map(pin).collect();
    let compaction = pool.compact(HUGE, NORMAL).unwrap();
    assert_eq!((compaction.made, compaction.obstacles.len()), (None, 4));
    // What left one block may have gone to the next.
    let moved = compaction.moved.whole_pages();
    assert!((4 * (FOLIO / 2 - 1)..4 * FOLIO).contains(&moved), "{moved}");
    assert_even_pages_are_there(&memfd);
    assert_clean(&pool, &memfd);
    drop(pins);
    drop(memfd);
    assert_all_back(&pool);
}

#[test]
fn the_block_with_least_in_it_is_emptied() {
    // The third has four folios, the others half of theirs.
    let stays = |page: u64| if page / FOLIO == 2 { page % 128 == 0 } else { page % 2 == 0 };
    let (pool, memfd) = fragmented(ArenaBacking::Heap, 4 * FOLIO, stays);
    let compaction = make(&pool);
    assert_eq!(compaction.made.unwrap().start().get(), 2 * FOLIO);
    assert_eq!(compaction.moved, pages(4));
    for page in 0..4 * FOLIO {
        let wanted = if stays(page) { contents(page) } else { [0; 4096] };
        assert!(read_page(&memfd, page) == wanted, "{page}");
    }
    assert_clean(&pool, &memfd);
}

#[test]
fn a_block_that_is_full_of_small_folios_is_emptied_if_no_other_can_be() {
    let (pool, memfd) =
        fragmented(ArenaBacking::Heap, 3 * FOLIO, |page| page >= 2 * FOLIO || page % 2 == 0);
    let owner = memfd.register_owner("vfio").unwrap();
    let pins = [0, FOLIO].map(|page| memfd.pin(range(page, 1), owner, PinMode::Counted).unwrap());
    let compaction = make(&pool);
    assert_eq!(compaction.made.unwrap().start().get(), 2 * FOLIO);
    assert_eq!((compaction.moved, compaction.obstacles.len()), (pages(FOLIO), 2));
    assert!((2 * FOLIO..3 * FOLIO).all(|page| read_page(&memfd, page) == contents(page)));
    assert_clean(&pool, &memfd);
    drop(pins);
}

#[test]
fn objects_that_were_promised_all_move_too() {
    for zones in [&[NORMAL][..], &[Zone::Movable]] {
        let parts = [(NORMAL, 2 * FOLIO), (Zone::Movable, 2 * FOLIO)];
        let pool = pool(ArenaBacking::Heap, &parts);
        // Two objects take turns, and one of them goes.
        let object = || {
            let builder = GuestMemfd::builder(pages(FOLIO)).folio_size(FolioSize::Base);
            builder.zones(zones).create(&pool).unwrap()
        };
        let (stays, goes) = (object(), object());
        let fill = |page| {
            stays.allocate(range(page, 1)).unwrap();
            goes.allocate(range(page, 1)).unwrap();
        };
        (0..FOLIO).for_each(fill);
        assert!(is_all_in(&stays, NORMAL), "private memory");
        let _ = stays.convert(stays.pages(), Visibility::Shared, ContentPolicy::Zero).unwrap();
        write_all(&stays);
        drop(goes);
        let before = counters(&pool, NORMAL);
        make(&pool);
        assert_eq!(counters(&pool, NORMAL), before);
        assert!((0..FOLIO).all(|page| read_page(&stays, page) == contents(page)));
        assert_clean(&pool, &stays);
        drop(stays);
        assert_all_back(&pool);
    }
}

#[test]
fn private_memory_moves_unless_the_guest_has_it() {
    let pool = pool(ArenaBacking::Heap, &[(NORMAL, 2 * FOLIO)]);
    let memfd = small(&pool, 2 * FOLIO, Visibility::Shared);
    write_all(&memfd);
    let _ = memfd.convert(memfd.pages(), Visibility::Private, ContentPolicy::Preserve).unwrap();
    for page in (1..2 * FOLIO).step_by(2) {
        memfd.punch_hole(range(page, 1)).unwrap();
    }
    let host = Hypervisor::new(&pool).unwrap();
    let vm = host.create_vm().unwrap();
    vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    let mut found = [0; 4096];
    for page in [2, FOLIO + 2] {
        vcpu.load(Ipa::new(page << 12), &mut found).unwrap();
        assert!(found == contents(page));
    }
    let compaction = pool.compact(HUGE, NORMAL).unwrap();
    assert_eq!(compaction.made, None);
    assert_eq!(compaction.obstacles.len(), 2);
    for (obstacle, page) in compaction.obstacles.iter().zip([2, FOLIO + 2]) {
        assert_eq!(obstacle.frames, frame_of(&memfd, page));
        assert_eq!(obstacle.error.kind(), ErrorKind::HypervisorRefused);
    }
    assert_eq!(audit::check_under(&pool, &[&memfd], &host).to_string(), "clean");
    drop((vcpu, vm));
    // A guest that is gone has nothing any more, and what it had is zeroed.
    assert!(make(&pool).moved.get() > 0);
    let _ = memfd.convert(memfd.pages(), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    for page in (0..2 * FOLIO).step_by(2) {
        let wanted = if page % FOLIO == 2 { [0; 4096] } else { contents(page) };
        assert!(read_page(&memfd, page) == wanted, "{page}");
    }
    assert_clean(&pool, &memfd);
}

#[test]
fn quarantined_and_failed_memory_stops_a_block_and_is_named() {
    let (pool, memfd) = checkerboard(ArenaBacking::Heap, 2 * FOLIO);
    // A pin that is forgotten is in use for good: its folio is quarantined when the object goes.
    let leaky = small(&pool, 1, Visibility::Shared);
    leaky.allocate(leaky.pages()).unwrap();
    let frames = frame_of(&leaky, 0);
    let owner = leaky.register_owner("leaky").unwrap();
    std::mem::forget(leaky.pin(range(0, 1), owner, PinMode::Counted).unwrap());
    drop(leaky);
    assert_eq!(pool.stat().quarantined, pages(1));
    let failed = frame_of(&memfd, memfd.size().whole_pages() - 2);
    pool.report_memory_failure(failed.start()).unwrap();
    assert!(frames.start().get() < FOLIO && failed.start().get() >= FOLIO);
    let compaction = pool.compact(HUGE, NORMAL).unwrap();
    assert_eq!(compaction.made, None);
    let [obstacle] = compaction.obstacles.as_slice() else { panic!("{compaction:?}") };
    assert_eq!((obstacle.frames, obstacle.error.kind()), (frames, ErrorKind::Quarantined));
    assert_clean(&pool, &memfd);
}

/// A GiB of room, where folios of both smaller sizes lie around.
#[test]
fn room_of_a_gib_is_made_of_folios_of_both_sizes() {
    let giant = FolioSize::Huge1G.bytes().whole_pages();
    // What is in the GiB goes behind it.
    let pool = pool(ArenaBacking::Heap, &[(NORMAL, giant + 8 * FOLIO)]);
    let object = |nr_pages, size| {
        let builder = GuestMemfd::builder(pages(nr_pages)).initial(Visibility::Shared);
        let builder = builder.folio_size(size).commitment(Commitment::Overcommitted);
        builder.create(&pool).unwrap()
    };
    let (huge, base) = (object(giant, HUGE), object(4, FolioSize::Base));
    let touched = [0, giant / 2, giant - FOLIO, giant - 1];
    for page in touched {
        huge.write(Offset::new(page << 12), &contents(page)).unwrap();
    }
    write_all(&base);
    assert!(pool.stat().largest_free < FolioSize::Huge1G.bytes());
    let used = pool.stat().used;
    let compaction = pool.compact(FolioSize::Huge1G, NORMAL).unwrap();
    let made = compaction.made.unwrap();
    assert_eq!((made.start().get(), made.nr_pages()), (0, giant), "{compaction:?}");
    assert!(compaction.moved >= pages(3 * FOLIO), "{compaction:?}");
    assert_eq!(pool.stat().largest_free, FolioSize::Huge1G.bytes());
    assert_eq!((pool.stat().used, compaction.obstacles.len()), (used, 0));
    assert!(touched.iter().all(|&page| read_page(&huge, page) == contents(page)));
    assert!((0..4).all(|page| read_page(&base, page) == contents(page)));
}

#[test]
fn it_keeps_to_its_zone_and_base_folios_need_no_room() {
    let parts = [(NORMAL, FOLIO), (Zone::Movable, 2 * FOLIO)];
    let pool = pool(ArenaBacking::Heap, &parts);
    let builder = GuestMemfd::builder(pages(2 * FOLIO)).initial(Visibility::Shared);
    let builder = builder.zones(&[Zone::Movable]).folio_size(FolioSize::Base);
    let memfd = builder.commitment(Commitment::Overcommitted).create(&pool).unwrap();
    write_all(&memfd);
    for page in (1..2 * FOLIO).step_by(2) {
        memfd.punch_hole(range(page, 1)).unwrap();
    }
    assert!(is_all_in(&memfd, Zone::Movable));
    assert_eq!(pool.zone_stat(Zone::Movable).largest_free, pages(1));
    let compaction = pool.compact(HUGE, Zone::Movable).unwrap();
    assert!(compaction.made.is_some() && compaction.moved == pages(FOLIO / 2), "{compaction:?}");
    assert!(is_all_in(&memfd, Zone::Movable));
    assert_even_pages_are_there(&memfd);
    assert_clean(&pool, &memfd);
    let none = pool.compact(HUGE, Zone::Cma).unwrap();
    assert_eq!((none.made, none.obstacles.len()), (None, 0));
    assert_eq!(pool.compact(FolioSize::Base, NORMAL).unwrap_err().kind(), ErrorKind::Unsupported);
}
