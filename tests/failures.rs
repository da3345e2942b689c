//! Every step of a conversion that may fail is made to, and then nothing has happened: states, bytes,
//! views, subscribers and the hypervisor are as before. What panics leaves exactly its pages
//! quarantined.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::Capability;
use gmem::addr::{Access, ByteSize, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, Error, ErrorKind, Found};
use gmem::failpoint::{FailPoint, arm};
use gmem::hyp::{Exit, HostStat, Hypercall, Hypervisor, Vcpu, Vm};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd, HandOutRun, Heard,
    HostView, ObjectStat, PageInfo, PageStatus, PinMode, Residency, SigbusHandler, Subscriber,
    Subscription, Touch, Visibility,
};

const BASE: u64 = 0x8000_0000;
/// What the object has: two folios of 2 MiB, and a tail.
const PAGES: u64 = 2 * 512 + 16;
/// The page that the guest has, and asks for. The others it has never touched.
const GUESTS: u64 = 5;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// In no order, with an overlap, in three folios of which one is there from the start, with holes in it.
fn scattered() -> [PgoffRange; 6] {
    [range(1030, 2), range(GUESTS, 3), range(602, 4), range(42, 1), range(600, 4), range(40, 1)]
}

fn scattered_pages() -> BTreeSet<u64> {
    scattered().iter().flat_map(|range| range.iter()).map(Pgoff::get).collect()
}

/// Every page.
fn watched() -> impl Iterator<Item = u64> {
    0..PAGES
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mood {
    #[default]
    Agree,
    Refuse,
    Panic,
}

/// Writes down what it has been given.
#[derive(Debug, Default)]
struct Recorder {
    granted: Mutex<BTreeSet<u64>>,
    mood: Mutex<Mood>,
}

impl Recorder {
    fn granted(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn become_(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }
}

impl Subscriber for Recorder {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Agree => {}
            Mood::Refuse => {
                assert_eq!(ack.refuse(Errno::ETIMEDOUT), Heard::InTime);
                return;
            }
            Mood::Panic => panic!("a subscriber is broken"),
        }
        for page in runs.iter().flat_map(|run| run.pages.iter()) {
            assert!(self.granted().remove(&page.get()), "{page} is taken twice");
        }
        assert_eq!(ack.let_go(), Heard::InTime);
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let mood = *self.mood.lock().unwrap();
        assert_ne!(mood, Mood::Panic, "a subscriber is broken");
        for page in runs.iter().flat_map(|run| run.pages.iter()) {
            assert!(self.granted().insert(page.get()), "{page} is given twice");
        }
    }
}

/// A guest that has asked for a conversion, and waits.
struct World {
    pool: FolioPool,
    hyp: Hypervisor,
    memfd: GuestMemfd,
    views: Vec<HostView>,
    recorders: [Arc<Recorder>; 2],
    subscriptions: Vec<Subscription>,
    vcpu: Vcpu,
    vm: Vm,
    to: Visibility,
}

/// What can be seen of all that.
#[derive(Debug, PartialEq)]
struct Seen {
    pages: Vec<(PgoffRange, PageInfo)>,
    stat: ObjectStat,
    shared_bytes: Vec<Result<Vec<u8>, ErrorKind>>,
    /// Private ones too, as far as there are folios; what a failure has added holds zeroes.
    bytes: BTreeMap<u64, Box<[u8]>>,
    touches: Vec<Touch>,
    granted: [BTreeSet<u64>; 2],
    host: HostStat,
    of_guest: u64,
}

impl World {
    fn bytes(&self) -> BTreeMap<u64, Box<[u8]>> {
        let all = self.memfd.bytes_behind().into_iter();
        all.map(|(page, bytes)| (page.get(), bytes))
            .filter(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))
            .collect()
    }

    fn new(backing: ArenaBacking, to: Visibility) -> Self {
        let pool = FolioPool::new(backing, ByteSize::from_mib(16)).unwrap();
        let hyp = Hypervisor::new(&pool).unwrap();
        let memfd = GuestMemfd::builder(ByteSize::from_pages(PAGES)).create(&pool).unwrap();
        let vm = hyp.create_vm().unwrap();
        // What lies between is not the guest's, so the host may do with it as it likes.
        for pages in [range(0, GUESTS + 1), range(1028, 8)] {
            let at = Ipa::new(BASE + pages.start_offset().get());
            vm.bind(at.gfn(), &memfd, pages).unwrap();
        }
        let mut vcpu = vm.create_vcpu().unwrap();
        vcpu.store_u64(Self::ipa(), 0xfeed).unwrap();
        let _ = memfd.convert(range(6, 20), Visibility::Shared, ContentPolicy::Preserve).unwrap();
        memfd.write(Offset::new(6 << 12), &[7; 20 << 12]).unwrap();
        let _ = memfd.convert(range(6, 10), Visibility::Private, ContentPolicy::Preserve).unwrap();
        if to == Visibility::Shared {
            for page in [40, 42] {
                memfd.punch_hole(range(page, 1)).unwrap();
            }
        }
        let nr_views = if backing == ArenaBacking::Heap { 0 } else { 2 };
        let views = (0..nr_views).map(|_| memfd.map_view().unwrap()).collect();
        let recorders = [(); 2].map(|()| Arc::new(Recorder::default()));
        let subscribe = |it: &Arc<Recorder>| memfd.subscribe(Arc::clone(it) as _).unwrap();
        let subscriptions = recorders.iter().map(subscribe).collect();
        let mut world = Self { pool, hyp, memfd, views, recorders, subscriptions, vcpu, vm, to };
        world.ask(Hypercall::MemShare(Self::ipa()));
        if to == Visibility::Private {
            let _ = world.convert_to(Visibility::Shared, ContentPolicy::Preserve).unwrap();
            world.vcpu.answer().unwrap();
            for page in scattered_pages() {
                world.memfd.write(Offset::new(page << 12), &[page as u8 | 1; 4096]).unwrap();
            }
            world.ask(Hypercall::MemUnshare(Self::ipa()));
        }
        world
    }

    fn ipa() -> Ipa {
        Ipa::new(BASE + (GUESTS << 12))
    }

    fn ask(&mut self, call: Hypercall) {
        let asked = self.vcpu.hvc(call);
        assert!(matches!(asked, Err(Exit::Conversion(_))), "{asked:?}");
    }

    fn convert(&self, content: ContentPolicy) -> Result<gmem::Conversion, Error> {
        self.convert_to(self.to, content)
    }

    fn convert_to(
        &self,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<gmem::Conversion, Error> {
        let options = ConvertOptions::default().content(content);
        self.memfd.convert_ranges(&scattered(), to, &options)
    }

    fn seen(&self) -> Seen {
        let handler = SigbusHandler::install().unwrap();
        let memfd = &self.memfd;
        let read = |page: u64| {
            let mut bytes = vec![0; 4096];
            memfd.read(Offset::new(page << 12), &mut bytes).map_err(|error| error.kind())?;
            Ok(bytes)
        };
        let touch = |view: &HostView, page: u64| {
            view.touch(handler, Offset::new((page << 12) + 9), Access::Read).unwrap()
        };
        let mut stat = memfd.stat();
        // Blocks that were split on the way may stay so.
        stat.metadata = ByteSize::default();
        let mut pages: Vec<_> = memfd.snapshot(memfd.pages()).unwrap().collect();
        if self.to == Visibility::Shared && !self.views.is_empty() {
            // What views are to show gets folios early, and keeps them.
            (stat.resident, stat.holes, stat.released) = Default::default();
            pages.iter_mut().for_each(|(_, info)| info.residency = Residency::Resident);
            pages.dedup_by(|(next, info), (last, before)| {
                let joins = info == before;
                if joins {
                    *last = range(last.start().get(), last.nr_pages() + next.nr_pages());
                }
                joins
            });
        }
        // By a vCPU of its own: the other waits for its answer.
        let of_guest = self.vm.create_vcpu().unwrap().load_u64(Self::ipa()).unwrap();
        let report = audit::check_under(&self.pool, &[memfd], &self.hyp);
        assert!(report.is_clean(), "{report}");
        Seen {
            pages,
            stat,
            shared_bytes: watched().map(read).collect(),
            bytes: self.bytes(),
            touches: self
                .views
                .iter()
                .flat_map(|view| watched().map(move |page| touch(view, page)))
                .collect(),
            granted: [0, 1].map(|it: usize| self.recorders[it].granted().clone()),
            host: self.hyp.stat(),
            of_guest,
        }
    }

    /// The bytes that only show when they are shared are there as well.
    fn assert_bytes_are_kept(&self) {
        let _ = self.convert(ContentPolicy::Preserve).unwrap();
        if self.to == Visibility::Shared {
            let mut byte = [0];
            self.memfd.read(Offset::new((GUESTS << 12) + 1), &mut byte).unwrap();
            assert_eq!(byte, [0xfe]);
            self.memfd.read(Offset::new((GUESTS + 1) << 12), &mut byte).unwrap();
            assert_eq!(byte, [7]);
        }
        assert!(audit::check_under(&self.pool, &[&self.memfd], &self.hyp).is_clean());
    }
}

fn assert_same(what: &str, before: &Seen, after: &Seen) {
    assert_eq!(before.pages, after.pages, "{what}");
    assert_eq!(before.stat, after.stat, "{what}");
    assert!(before.shared_bytes == after.shared_bytes, "{what}: bytes differ");
    assert!(before.touches == after.touches, "{what}: views differ");
    assert_eq!(before.granted, after.granted, "{what}");
    assert_eq!((before.host, before.of_guest), (after.host, after.of_guest), "{what}");
}

fn every_step_fails(backing: ArenaBacking) {
    const BOTH: [Visibility; 2] = [Visibility::Private, Visibility::Shared];
    let points = [
        (FailPoint::Memory, &BOTH[..]),
        (FailPoint::Folio, if backing == ArenaBacking::Heap { &[] } else { &BOTH[1..] }),
        (FailPoint::Commit, if backing == ArenaBacking::Heap { &[] } else { &BOTH[1..] }),
        (FailPoint::Barrier, &BOTH[..1]),
        (FailPoint::View, if backing == ArenaBacking::Heap { &[] } else { &BOTH[..1] }),
        (FailPoint::Hypervisor, &BOTH[..]),
    ];
    for to in BOTH {
        for content in [ContentPolicy::Preserve, ContentPolicy::Zero] {
            for (point, applies) in points {
                let mut failures = 0;
                loop {
                    let what = format!("{point:?} {failures} of {content:?} to {to} on {backing}");
                    let world = World::new(backing, to);
                    let before = world.seen();
                    let armed = arm(point, failures);
                    let outcome = world.convert(content);
                    assert_eq!(armed.has_fired(), outcome.is_err(), "{what}: {outcome:?}");
                    drop(armed);
                    if outcome.is_ok() {
                        break;
                    }
                    assert_same(&what, &before, &world.seen());
                    world.assert_bytes_are_kept();
                    failures += 1;
                }
                assert_eq!(failures > 0, applies.contains(&to), "{point:?} to {to} on {backing}");
            }
        }
    }
}

#[test]
fn whatever_fails_on_the_heap_nothing_has_happened() {
    every_step_fails(ArenaBacking::Heap);
}

#[test]
fn whatever_fails_with_two_views_nothing_has_happened() {
    if common::require(Capability::Uffd) {
        every_step_fails(ArenaBacking::Memfd);
    }
}

#[test]
fn a_subscriber_that_refuses_a_pin_and_a_hypervisor_undo_everything() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        if backing == ArenaBacking::Memfd && !common::require(Capability::Uffd) {
            continue;
        }
        for which in 0..2 {
            let world = World::new(backing, Visibility::Private);
            let before = world.seen();
            world.recorders[which].become_(Mood::Refuse);
            let error = world.convert(ContentPolicy::Zero).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::SubscriberRefused);
            assert_eq!(error.errno(), Errno::ETIMEDOUT);
            assert_same("a subscriber", &before, &world.seen());
            world.recorders[which].become_(Mood::Agree);
            world.assert_bytes_are_kept();
        }
        let world = World::new(backing, Visibility::Private);
        let owner = world.memfd.register_owner("vfio").unwrap();
        let pin = world.memfd.pin(range(1031, 1), owner, PinMode::Counted).unwrap();
        let before = world.seen();
        let error = world.convert(ContentPolicy::Zero).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(error.culprit().unwrap().offset, Offset::new(1031 << 12));
        assert_same("a pin", &before, &world.seen());
        drop(pin);
        world.assert_bytes_are_kept();

        for to in [Visibility::Private, Visibility::Shared] {
            let mut world = World::new(backing, to);
            // Answered already, so the guest does not wait for it any more.
            let _ = world.convert(ContentPolicy::Preserve).unwrap();
            world.vcpu.answer().unwrap();
            world.to = match to {
                Visibility::Private => Visibility::Shared,
                Visibility::Shared => Visibility::Private,
            };
            let before = world.seen();
            let error = world.convert(ContentPolicy::Zero).unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::HypervisorRefused, Errno::EPERM));
            assert_same("the hypervisor", &before, &world.seen());
        }
    }
}

#[test]
fn a_panic_of_a_subscriber_quarantines_what_was_to_change() {
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        if backing == ArenaBacking::Memfd && !common::require(Capability::Uffd) {
            continue;
        }
        for to in [Visibility::Private, Visibility::Shared] {
            let world = World::new(backing, to);
            world.recorders[1].become_(Mood::Panic);
            let outcome = catch_unwind(AssertUnwindSafe(|| world.convert(ContentPolicy::Preserve)));
            assert!(outcome.is_err());
            let memfd = &world.memfd;
            let status = |wanted| move |(_, info): &(_, PageInfo)| info.status == wanted;
            let snapshot = memfd.snapshot(memfd.pages()).unwrap();
            let quarantined: BTreeSet<u64> = snapshot
                .filter(status(PageStatus::Quarantined))
                .flat_map(|(pages, _)| pages.iter().map(Pgoff::get).collect::<Vec<_>>())
                .collect();
            assert_eq!(quarantined, scattered_pages());
            assert_eq!(
                memfd.stat().quarantined,
                ByteSize::from_pages(scattered_pages().len() as u64)
            );
            let report = audit::check(&world.pool, &[memfd]);
            let wrong = |finding: &&String| !finding.contains("not settled: ");
            let others: Vec<_> = report.findings().iter().filter(wrong).collect();
            assert!(others.is_empty(), "to {to} on {backing}: {others:?}");
            let at = Offset::new(601 << 12);
            let owner = memfd.register_owner("late").unwrap();
            for refused in [
                world.convert(ContentPolicy::Preserve).unwrap_err(),
                memfd.read(at, &mut [0]).unwrap_err(),
                memfd.write(at, &[0]).unwrap_err(),
                memfd.punch_hole(range(601, 1)).unwrap_err(),
                memfd.pin(range(601, 1), owner, PinMode::Counted).unwrap_err(),
            ] {
                assert_eq!(refused.kind(), ErrorKind::Quarantined, "{refused}");
                assert_eq!(refused.culprit().unwrap().found, Found::Quarantined);
            }
            let handler = SigbusHandler::install().unwrap();
            for view in &world.views {
                let touch = view.touch(handler, at, Access::Read).unwrap();
                assert!(matches!(touch, Touch::Fault(_)), "{touch:?}");
            }
            let World { pool, memfd, views, subscriptions, vcpu, vm, hyp, .. } = world;
            drop((vcpu, vm, views, subscriptions, memfd, hyp));
            assert!(pool.stat().quarantined.get() > 0);
            let stat = pool.stat();
            let free_bytes = stat.free.get() + stat.reserved.get();
            assert_eq!(pool.verify_scrubbed().unwrap().get(), free_bytes);
        }
    }
}
