//! Punches and touches of holes that fail have changed nothing.

use gmem::ArenaBacking;
use gmem::addr::{ByteSize, Offset};
use gmem::error::ErrorKind;
use gmem::failpoint::{FailPoint, arm};

use super::arena_files::on_host;
use super::common::{self, Capability};
use super::{BACKINGS, FOLIO, assert_clean, object, pages, range, touch, write_all};

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
