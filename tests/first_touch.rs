//! Many threads touch one huge folio first: it is allocated once.

use std::sync::Barrier;
use std::thread;

use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, FolioPool, GuestMemfd, Visibility};

const NR_THREADS: u64 = 16;
const ROUNDS: u64 = 40;
const HUGE: u64 = 512;

fn used(pool: &FolioPool) -> u64 {
    let stat = pool.stat();
    let parts = [stat.free, stat.reserved, stat.used, stat.quarantined, stat.poisoned];
    assert_eq!(parts.iter().map(|part| part.get()).sum::<u64>(), stat.capacity.get());
    stat.used.whole_pages()
}

/// Every second thread writes, the others allocate.
fn touch_together(pool: &FolioPool, object: &GuestMemfd) {
    let before = used(pool);
    let barrier = Barrier::new(NR_THREADS as usize);
    thread::scope(|scope| {
        for nr in 0..NR_THREADS {
            let barrier = &barrier;
            scope.spawn(move || {
                let page = nr * (HUGE / NR_THREADS);
                barrier.wait();
                if nr % 2 == 0 {
                    object.write(Offset::new(page << 12), &[1 + nr as u8; 8]).unwrap();
                } else {
                    let range = PgoffRange::new(Pgoff::new(page), 1).unwrap();
                    object.allocate(range).unwrap();
                }
            });
        }
    });
    assert_eq!(used(pool), before + HUGE, "one folio, allocated once");
    for nr in 0..NR_THREADS {
        let mut bytes = [9; 8];
        object.read(Offset::new((nr * (HUGE / NR_THREADS)) << 12), &mut bytes).unwrap();
        let wanted = if nr % 2 == 0 { 1 + nr as u8 } else { 0 };
        assert_eq!(bytes, [wanted; 8], "what thread {nr} wrote is there still");
    }
}

#[test]
fn one_huge_folio_is_allocated_once_however_many_touch_it_first() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(4 * HUGE)).unwrap();
    let account = pool.open_account(None);
    // It cleans nothing by itself: each folio that was taken comes back dirty, and is counted so.
    let _scrubber = pool.start_scrubber(ByteSize::from_bytes(0)).unwrap();
    let object = GuestMemfd::builder(ByteSize::from_pages(HUGE))
        .initial(Visibility::Shared)
        .account(&account)
        .create(&pool)
        .unwrap();
    for _ in 0..ROUNDS {
        touch_together(&pool, &object);
        assert_eq!(account.stat().used.whole_pages(), HUGE);
        let report = audit::check(&pool, &[&object]);
        assert!(report.is_clean(), "{report}");
        object.punch_hole(object.pages()).unwrap();
        assert_eq!((used(&pool), account.stat().used.get()), (0, 0));
        assert_eq!(pool.scrub().whole_pages(), HUGE, "one folio was taken, and came back");
    }
}

/// The same where nothing is promised, so that each allocation in vain would be charged.
#[test]
fn one_huge_folio_is_charged_once_however_many_touch_it_first() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(4 * HUGE)).unwrap();
    let account = pool.open_account(Some(ByteSize::from_pages(HUGE)));
    let object = GuestMemfd::builder(ByteSize::from_pages(HUGE))
        .initial(Visibility::Shared)
        .commitment(gmem::Commitment::Overcommitted)
        .account(&account)
        .create(&pool)
        .unwrap();
    for _ in 0..ROUNDS {
        touch_together(&pool, &object);
        let stat = account.stat();
        assert_eq!([stat.charged, stat.peak, stat.used].map(ByteSize::whole_pages), [HUGE; 3]);
        object.punch_hole(object.pages()).unwrap();
    }
    assert_eq!(account.stat().charged.get(), 0);
}
