//! Every step of a migration, a compaction or a move before a conversion that may fail is made to, and
//! then nothing has happened.

mod common;
#[path = "common/zoned.rs"]
mod zoned;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Error, ErrorKind};
use gmem::failpoint::{FailPoint, arm};
use gmem::geometry::FolioSize;
use gmem::hyp::{Hypervisor, Vm};
use gmem::range::PgoffRange;
use gmem::{
    AccountStat, Ack, ArenaBacking, Commitment, ContentPolicy, FolioPool, GuestMemfd, HandOutRun,
    Heard, HostView, ObjectStat, PageInfo, SigbusHandler, Subscriber, Subscription, Touch,
    Visibility, Zone,
};
use zoned::{FOLIO, contents, counters, is_all_in, pages, pool, range, write_all, zones_of};

/// One folio of 2 MiB and a tail.
const PAGES: u64 = FOLIO + 2;

/// Writes down what it has been given.
#[derive(Debug, Default)]
struct Recorder {
    granted: Mutex<BTreeSet<Pgoff>>,
    panics: Mutex<Option<&'static str>>,
}

impl Recorder {
    fn panics_in(&self, call: &'static str) {
        let broken = *self.panics.lock().unwrap();
        assert_ne!(broken, Some(call), "a subscriber is broken");
    }
}

impl Subscriber for Recorder {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        self.panics_in("revoke");
        let mut granted = self.granted.lock().unwrap();
        let pages = runs.iter().flat_map(|run| run.pages.iter());
        pages.for_each(|page| assert!(granted.remove(&page)));
        assert_eq!(ack.let_go(), Heard::InTime);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        self.panics_in("grant");
        let mut granted = self.granted.lock().unwrap();
        let pages = runs.iter().flat_map(|run| run.pages.iter());
        pages.for_each(|page| assert!(granted.insert(page)));
    }
}

/// An object in `Movable`, with holes, views, a subscriber, an account and a guest that has touched nothing.
struct World {
    pool: FolioPool,
    memfd: GuestMemfd,
    hyp: Hypervisor,
    views: Vec<HostView>,
    recorder: Arc<Recorder>,
    account: gmem::Account,
    _subscription: Subscription,
    _vm: Vm,
}

/// What can be seen of that.
#[derive(Debug, PartialEq)]
struct Seen {
    pages: Vec<(PgoffRange, PageInfo)>,
    bytes: Vec<(Pgoff, Box<[u8]>)>,
    touches: Vec<Touch>,
    granted: BTreeSet<Pgoff>,
    stat: ObjectStat,
    zones: Vec<Zone>,
    counters: [[ByteSize; 5]; 2],
    account: AccountStat,
}

impl World {
    fn new(backing: ArenaBacking) -> Self {
        let pool = pool(backing, &[(Zone::Normal, 2 * FOLIO), (Zone::Movable, 2 * FOLIO)]);
        let account = pool.open_account(None);
        let builder = GuestMemfd::builder(pages(PAGES)).initial(Visibility::Shared);
        let builder = builder.zones(&[Zone::Movable]).account(&account);
        let memfd = builder.create(&pool).unwrap();
        write_all(&memfd);
        let nr_views = if backing == ArenaBacking::Heap { 0 } else { 2 };
        let views = (0..nr_views).map(|_| memfd.map_view().unwrap()).collect();
        memfd.punch_hole(range(40, 3)).unwrap();
        memfd.punch_hole(range(50, 1)).unwrap();
        let hyp = Hypervisor::new(&pool).unwrap();
        let vm = hyp.create_vm().unwrap();
        vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
        let recorder = Arc::new(Recorder::default());
        let subscription = memfd.subscribe(Arc::clone(&recorder) as _).unwrap();
        Self { pool, memfd, hyp, views, recorder, account, _subscription: subscription, _vm: vm }
    }

    fn seen(&self) -> Seen {
        let handler = SigbusHandler::install().unwrap();
        let report = audit::check_under(&self.pool, &[&self.memfd], &self.hyp);
        assert!(report.is_clean(), "{report}");
        let touch = |view: &HostView, page: u64| {
            view.touch(handler, Offset::new((page << 12) + 9), Access::Read).unwrap()
        };
        let touches = |view| (0..PAGES).map(move |page| touch(view, page));
        let mut stat = self.memfd.stat();
        // Blocks that were split on the way may stay so.
        stat.metadata = ByteSize::default();
        Seen {
            pages: self.memfd.snapshot(self.memfd.pages()).unwrap().collect(),
            bytes: self.memfd.bytes_behind(),
            touches: self.views.iter().flat_map(touches).collect(),
            granted: self.recorder.granted.lock().unwrap().clone(),
            stat,
            zones: zones_of(&self.memfd),
            counters: [Zone::Normal, Zone::Movable].map(|zone| counters(&self.pool, zone)),
            account: self.account.stat(),
        }
    }

    fn migrate(&self) -> Result<(), Error> {
        let migration = self.memfd.migrate(range(0, FOLIO), Zone::Normal)?;
        migration.refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    fn convert(&self) -> Result<(), Error> {
        let to = Visibility::Private;
        self.memfd.convert(range(5, 2), to, ContentPolicy::Preserve).map(drop)
    }
}

const POINTS: [FailPoint; 6] = [
    FailPoint::Memory,
    FailPoint::Folio,
    FailPoint::Commit,
    FailPoint::Barrier,
    FailPoint::View,
    FailPoint::Hypervisor,
];

fn applies(point: FailPoint, backing: ArenaBacking) -> bool {
    backing != ArenaBacking::Heap || point != FailPoint::View
}

/// Fails each occurrence of each step in turn, and `act` with it; then does it undisturbed.
fn every_step_fails(backing: ArenaBacking, act: impl Fn(&World) -> Result<(), Error>) {
    for point in POINTS {
        let world = World::new(backing);
        let before = world.seen();
        let mut failures = 0;
        loop {
            let what = format!("{point:?} {failures} on {backing}");
            let armed = arm(point, failures);
            let outcome = act(&world);
            assert_eq!(armed.has_fired(), outcome.is_err(), "{what}: {outcome:?}");
            drop(armed);
            let Err(error) = outcome else { break };
            let kinds = [
                ErrorKind::Exhausted,
                ErrorKind::MissingCapability,
                ErrorKind::Os,
                ErrorKind::HypervisorRefused,
            ];
            assert!(kinds.contains(&error.kind()), "{what}: {error}");
            let mut after = world.seen();
            // What moved before the conversion failed may stay where it is: its bytes and pages are as before.
            if after.zones != before.zones {
                let back = world.memfd.migrate(world.memfd.pages(), Zone::Movable).unwrap();
                assert!(back.refused.is_empty(), "{what}: {back:?}");
                after = world.seen();
            }
            assert_same(&what, &before, &after);
            failures += 1;
        }
        assert_eq!(failures > 0, applies(point, backing), "{point:?} on {backing}");
        assert_eq!(zones_of(&world.memfd)[0], Zone::Normal);
        let after = world.seen();
        assert!(before.bytes == after.bytes, "{point:?} on {backing}: bytes differ");
    }
}

fn assert_same(what: &str, before: &Seen, after: &Seen) {
    assert_eq!(before.pages, after.pages, "{what}");
    assert_eq!(before.stat, after.stat, "{what}");
    assert!(before.bytes == after.bytes, "{what}: bytes differ");
    assert!(before.touches == after.touches, "{what}: views differ");
    assert_eq!(before.granted, after.granted, "{what}");
    assert_eq!((&before.zones, before.counters), (&after.zones, after.counters), "{what}");
    assert_eq!(before.account, after.account, "{what}");
}

#[test]
fn whatever_fails_of_a_migration_nothing_has_happened() {
    every_step_fails(ArenaBacking::Heap, World::migrate);
    if common::require(Capability::Uffd) {
        every_step_fails(ArenaBacking::Memfd, World::migrate);
    }
}

#[test]
fn whatever_fails_of_a_conversion_that_moves_first_no_page_has_changed() {
    every_step_fails(ArenaBacking::Heap, World::convert);
    if common::require(Capability::Uffd) {
        every_step_fails(ArenaBacking::Memfd, World::convert);
    }
}

/// Two blocks, each with two folios of 4 KiB, where the object has its home. The others are private, so
/// that no view wants memory for them.
fn fragmented(backing: ArenaBacking) -> (FolioPool, GuestMemfd, Option<HostView>) {
    let pool = pool(backing, &[(Zone::Normal, 2 * FOLIO)]);
    let builder = GuestMemfd::builder(pages(2 * FOLIO)).folio_size(FolioSize::Base);
    let memfd = builder.commitment(Commitment::Overcommitted).create(&pool).unwrap();
    for page in (0..2 * FOLIO).step_by(256) {
        let to = Visibility::Shared;
        let _ = memfd.convert(range(page, 1), to, ContentPolicy::Preserve).unwrap();
        memfd.write(Offset::new(page << 12), &contents(page)).unwrap();
    }
    let view = (backing == ArenaBacking::Memfd).then(|| memfd.map_view().unwrap());
    (pool, memfd, view)
}

#[test]
fn whatever_fails_of_a_compaction_is_reported_and_the_next_block_is_tried() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        if backing == ArenaBacking::Memfd && !common::require(Capability::Uffd) {
            continue;
        }
        for point in POINTS {
            let mut failures = 0;
            loop {
                let (pool, memfd, view) = fragmented(backing);
                let host = Hypervisor::new(&pool).unwrap();
                let vm = host.create_vm().unwrap();
                vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
                let used = pool.stat().used;
                let armed = arm(point, failures);
                let compaction = pool.compact(FolioSize::Huge2M, Zone::Normal).unwrap();
                let fired = armed.has_fired();
                drop(armed);
                let what = format!("{point:?} {failures} on {backing}: {compaction:?}");
                let made = compaction.made.map(|made| made.start().get());
                assert_eq!(made, Some(if fired { FOLIO } else { 0 }), "{what}");
                assert_eq!(compaction.obstacles.len(), usize::from(fired), "{what}");
                assert_eq!(pool.stat().used, used, "{what}");
                for page in (0..2 * FOLIO).step_by(256) {
                    assert!(zoned::read_page(&memfd, page) == contents(page), "{what}");
                }
                let report = audit::check_under(&pool, &[&memfd], &host);
                assert!(report.is_clean(), "{what}: {report}");
                drop((vm, host, view, memfd));
                zoned::assert_all_back(&pool);
                if !fired {
                    break;
                }
                failures += 1;
            }
            // No folio of 4 KiB stays with a hole in it.
            let has_it = applies(point, backing) && point != FailPoint::Commit;
            assert_eq!(failures > 0, has_it, "{point:?} on {backing}");
        }
    }
}

#[test]
fn a_panic_of_a_subscriber_quarantines_the_folio_and_hides_it() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        if backing == ArenaBacking::Memfd && !common::require(Capability::Uffd) {
            continue;
        }
        for call in ["revoke", "grant"] {
            let world = World::new(backing);
            *world.recorder.panics.lock().unwrap() = Some(call);
            assert!(catch_unwind(AssertUnwindSafe(|| world.migrate())).is_err());
            assert_eq!(world.memfd.stat().quarantined, pages(FOLIO), "{call} on {backing}");
            let handler = SigbusHandler::install().unwrap();
            for view in &world.views {
                let touch =
                    |page: u64| view.touch(handler, Offset::new(page << 12), Access::Read).unwrap();
                assert!((0..FOLIO).all(|page| matches!(touch(page), Touch::Fault(_))));
                assert!(matches!(touch(FOLIO), Touch::Byte(_)), "the tail is as before");
            }
            // Whichever side of the move the panic was on: it does not move again.
            let (is_in, other) = match call {
                "revoke" => (Zone::Movable, Zone::Normal),
                _ => (Zone::Normal, Zone::Movable),
            };
            assert_eq!(zones_of(&world.memfd)[0], is_in);
            let again = world.memfd.migrate(range(0, FOLIO), other).unwrap();
            assert_eq!(again.refused[0].1.kind(), ErrorKind::Quarantined);
            let report = audit::check_under(&world.pool, &[&world.memfd], &world.hyp);
            let others = report.findings().iter().filter(|it| !it.contains("not settled: "));
            assert_eq!(others.count(), 0, "{report}");
            *world.recorder.panics.lock().unwrap() = None;
            let World { pool, memfd, views, _subscription, _vm, hyp, account, .. } = world;
            drop((_vm, views, _subscription, hyp, memfd));
            assert_eq!(pool.stat().quarantined, pages(FOLIO));
            assert_eq!(account.stat().charged, pages(0));
            let stat = pool.stat();
            assert_eq!(
                pool.verify_scrubbed().unwrap().get(),
                stat.free.get() + stat.reserved.get()
            );
        }
    }
}

#[test]
fn a_punch_whose_subscriber_panics_is_hidden_as_well() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let world = World::new(ArenaBacking::Memfd);
    *world.recorder.panics.lock().unwrap() = Some("revoke");
    let punched = catch_unwind(AssertUnwindSafe(|| world.memfd.punch_hole(range(7, 2))));
    assert!(punched.is_err());
    let handler = SigbusHandler::install().unwrap();
    for view in &world.views {
        let touch = |page: u64| view.touch(handler, Offset::new(page << 12), Access::Read).unwrap();
        assert!(matches!(touch(7), Touch::Fault(_)) && matches!(touch(8), Touch::Fault(_)));
        assert!(matches!(touch(6), Touch::Byte(_)) && matches!(touch(9), Touch::Byte(_)));
    }
    assert!(is_all_in(&world.memfd, Zone::Movable));
    *world.recorder.panics.lock().unwrap() = None;
}
