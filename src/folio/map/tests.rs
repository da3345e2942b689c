use super::*;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

#[test]
fn the_tail_is_made_of_base_folios() {
    let shape = Shape::new(512 + 3, FolioSize::Huge2M);
    assert_eq!(shape.blocks(), Blocks { giant: 0, huge: 1, base: 3 });
    let pages: Vec<_> = shape.slots(range(500, 15)).map(|slot| slot.pages()).collect();
    assert_eq!(pages, [range(0, 512), range(512, 1), range(513, 1), range(514, 1)]);
    assert!(shape.slot(Pgoff::new(515)).is_none());
}

#[test]
fn resident_runs_join_where_pages_and_frames_follow_each_other() {
    let map = FolioMap::new(Shape::new(3 * 512 + 1, FolioSize::Huge2M)).unwrap();
    let slots: Vec<_> = map.shape().slots(range(0, 3 * 512 + 1)).collect();
    map.set(&slots[0], Some(Pfn::new(1024)));
    map.set(&slots[1], Some(Pfn::new(1536)));
    map.set(&slots[3], Some(Pfn::new(7)));
    let runs: Vec<_> = map
        .resident(range(10, 3 * 512 - 9))
        .map(|(pages, frames)| (pages, frames.start().get()))
        .collect();
    assert_eq!(runs, [(range(10, 1014), 1034), (range(1536, 1), 7)]);
    assert_eq!(map.frame(Pgoff::new(513)), Some(Pfn::new(1537)));
    assert_eq!(map.frame(Pgoff::new(1024)), None);
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes when interpreted")]
fn what_is_taken_is_found_wherever_it_is() {
    let gib = 1 << GIANT_ORDER;
    for (nr_pages, size) in [
        (3 * gib + 5 * 512 + 7, FolioSize::Huge1G),
        (600 * 512 + 7, FolioSize::Huge2M),
        (40_000, FolioSize::Base),
    ] {
        let map = FolioMap::new(Shape::new(nr_pages, size)).unwrap();
        let found =
            || -> Vec<_> { map.taken().map(|(slot, pfn)| (slot.pages(), pfn.get())).collect() };
        assert_eq!(found(), []);
        let slots: Vec<_> = map.shape().slots(range(0, nr_pages)).collect();
        let behind = slots.len() - 1;
        let places = [0, 2, 3, behind / 2, behind - 6, behind];
        let mut wanted = Vec::new();
        for (nr, place) in places.into_iter().enumerate() {
            map.set(&slots[place], Some(Pfn::new(nr as u64)));
            wanted.push((slots[place].pages(), nr as u64));
        }
        assert_eq!(found(), wanted, "{size:?}");
        map.make_room_for_holes().unwrap();
        map.punch(&slots[2], slots[2].pages());
        assert_eq!(found(), wanted, "all of it holes, {size:?}");
        map.set(&slots[2], None);
        wanted.remove(1);
        assert_eq!(found(), wanted, "{size:?}");
    }
}

#[test]
fn holes_have_no_frame_until_they_are_filled() {
    let map = FolioMap::new(Shape::new(2 * 512, FolioSize::Huge2M)).unwrap();
    let slots: Vec<_> = map.shape().slots(range(0, 1024)).collect();
    map.set(&slots[0], Some(Pfn::new(512)));
    map.set(&slots[1], Some(Pfn::new(1024)));
    map.make_room_for_holes().unwrap();
    map.punch(&slots[0], range(100, 5));
    map.punch(&slots[1], range(512, 512));
    let frames: Vec<_> = [99, 100, 104, 105, 512, 1023].map(|at| map.frame(Pgoff::new(at))).into();
    let wanted = [Some(611), None, None, Some(617), None, None];
    assert_eq!(frames, wanted.map(|at: Option<u64>| at.map(Pfn::new)));
    assert!(map.is_hollow(range(512, 512)) && !map.is_hollow(range(511, 2)));
    assert!(map.is_resident(range(105, 407)) && !map.is_resident(range(104, 1)));
    let runs = |it: &mut dyn Iterator<Item = (PgoffRange, PfnRange)>| -> Vec<_> {
        it.map(|(pages, frames)| (pages, frames.start().get())).collect()
    };
    let all = range(0, 1024);
    assert_eq!(runs(&mut map.resident(all)), [(range(0, 100), 512), (range(105, 407), 617)]);
    assert_eq!(runs(&mut map.holes(all)), [(range(100, 5), 612), (range(512, 512), 1024)]);
    assert_eq!(runs(&mut map.folios(all)), [(all, 512)]);

    map.fill(range(98, 4));
    assert_eq!(runs(&mut map.holes(range(0, 512))), [(range(102, 3), 614)]);
    map.fill(range(0, 512));
    assert_eq!(map.frame(Pgoff::new(104)), Some(Pfn::new(616)));
    assert_eq!(map.contradiction(), None);
    map.set_entry(1, Entry::of(Pfn::new(1024)));
    assert_eq!(map.contradiction(), Some(Pgoff::new(512)), "holes that nobody sees");
    map.set_entry(1, Entry::of(Pfn::new(1024)).marked(true));
    map.set(&slots[1], None);
    assert_eq!((map.holes(all).count(), map.contradiction()), (0, None));
    map.set(&slots[1], Some(Pfn::new(1024)));
    assert!(map.is_resident(all), "nothing is left of the holes of the folio before");
}

/// 256 GiB in folios of 4 KiB of which three were ever touched.
#[test]
#[cfg_attr(miri, ignore = "half a GiB of entries")]
fn what_never_had_a_folio_is_passed_over() {
    let nr_pages = 64 << 20;
    let map = FolioMap::new(Shape::new(nr_pages, FolioSize::Base)).unwrap();
    let all = range(0, nr_pages);
    assert_eq!(map.places(all).count(), 0);
    assert_eq!(map.parts(all).map(|(pages, _)| pages).collect::<Vec<_>>(), [all]);
    let touched = [700, 40 << 20, nr_pages - 1];
    for page in touched {
        let slot = map.shape().slot(Pgoff::new(page)).unwrap();
        map.set(&slot, Some(Pfn::new(page)));
    }
    let found: Vec<_> =
        map.places(all).filter(|slot| map.get(slot).is_some()).map(|slot| slot.pages()).collect();
    assert_eq!(found, touched.map(|page| range(page, 1)));
    assert_eq!(map.places(all).count(), 3 * 512, "a page of entries for each");
    assert_eq!(map.places(range(5, 507)).count(), 0);
    assert_eq!(map.places(range(5, 508)).count(), 1);
    assert_eq!(map.resident(all).count(), 3);
    let mut next = 0;
    for (pages, _) in map.parts(all) {
        assert_eq!(pages.start(), Pgoff::new(next));
        next = pages.end().get();
    }
    assert_eq!(next, nr_pages);
    assert!(map.parts(all).count() <= 3 * 512 + 4);
}
