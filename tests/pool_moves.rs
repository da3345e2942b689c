//! What moving folios does to accounts, and to the room that is made by it.

use gmem::addr::ByteSize;
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, Commitment, FolioPool, GuestMemfd, PartSpec, Visibility, Zone, addr::Pgoff, audit,
};

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// What moves out of a block leaves frames there that are no place for the next one.
#[test]
fn folios_do_not_move_within_the_block_that_they_are_to_leave() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(1024)).unwrap();
    let object = GuestMemfd::builder(ByteSize::from_pages(600))
        .folio_size(FolioSize::Base)
        .commitment(Commitment::Overcommitted)
        .initial(Visibility::Shared)
        .create(&pool)
        .unwrap();
    object.allocate(range(0, 600)).unwrap();
    object.punch_hole(range(0, 100)).unwrap();
    let compaction = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap();
    assert!(compaction.made.is_some(), "{compaction:?}");
    assert_eq!(compaction.moved, ByteSize::from_pages(88));
    let report = audit::check(&pool, &[&object]);
    assert!(report.is_clean(), "{report}");
}

/// A folio that moves is used before and behind the move, whichever zone keeps its promise.
#[test]
fn accounts_do_not_notice_moves() {
    let part = |nr_pages| PartSpec::new([ArenaBacking::Heap], ByteSize::from_pages(nr_pages));
    let builder = FolioPool::builder().part(part(8), Zone::Normal);
    let pool = builder.part(part(8), Zone::Movable).create().unwrap();
    let account = pool.open_account(None);
    let object = GuestMemfd::builder(ByteSize::from_pages(4))
        .folio_size(FolioSize::Base)
        .initial(Visibility::Shared)
        .zones(&[Zone::Movable, Zone::Normal])
        .account(&account)
        .create(&pool)
        .unwrap();
    object.allocate(range(0, 4)).unwrap();
    for zone in [Zone::Normal, Zone::Movable, Zone::Normal] {
        assert_eq!(object.migrate(range(0, 4), zone).unwrap().moved, ByteSize::from_pages(4));
        let stat = account.stat();
        assert_eq!([stat.used, stat.charged].map(ByteSize::whole_pages), [4, 4], "{zone}");
    }
    drop(object);
    let stat = account.stat();
    assert_eq!((stat.used.get(), stat.charged.get(), pool.stat().used.get()), (0, 0, 0));
}
