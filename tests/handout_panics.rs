//! Hand-outs whose subscriber breaks, or goes with more than it was given: nothing stays locked, shown or in a
//! device's reach.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use gmem::addr::{Access, ByteSize, Gfn, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind};
use gmem::hyp::{Hypervisor, MemslotId, Vm};
use gmem::range::PgoffRange;
use gmem::{
    Ack, ArenaBacking, ContentPolicy, ConvertOptions, Export, FolioPool, GuestMemfd, HandOutRun,
    HostView, PartSpec, SigbusHandler, Standing, Subscriber, Subscription, Touch, Visibility, Zone,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// What a subscriber that maps addresses or hands memory on has of its own.
#[derive(Debug)]
struct Owner {
    _view: HostView,
    _export: Mutex<Option<Export>>,
}

impl Subscriber for Owner {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        let _ = ack.let_go();
    }

    fn grant(&self, _: &[HandOutRun]) {}
}

#[test]
fn a_subscriber_may_own_views_and_exports_of_the_object() {
    let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(4));
    let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    let peer = memfd.register_owner("peer").unwrap();
    let export = memfd.export(range(0, 4), peer).unwrap();
    let owner = Owner { _view: memfd.map_view().unwrap(), _export: Mutex::new(Some(export)) };
    let it = memfd.subscribe(Arc::new(owner)).unwrap();
    let (ended, ends) = channel();
    thread::spawn(move || {
        drop(it);
        ended.send(()).unwrap();
    });
    ends.recv_timeout(Duration::from_secs(20)).expect("the drop does not end");
    assert_eq!(memfd.stat().mapped, ByteSize::default());
    assert_eq!(memfd.stat().pinned, ByteSize::default());
}

fn object() -> (FolioPool, GuestMemfd) {
    let size = ByteSize::from_mib(4);
    let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(SHARED).create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    (pool, memfd)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Breaks when it is told to, having done what it was asked for.
#[derive(Debug, Default)]
struct Fragile {
    has: Mutex<BTreeSet<u64>>,
    /// How many grants it stands, if any is too many.
    grants: AtomicU64,
    breaks_in_revoke: AtomicBool,
    cannot_let_go: AtomicBool,
}

impl Fragile {
    fn new(grants: u64) -> Arc<Self> {
        Arc::new(Self { grants: AtomicU64::new(grants), ..Self::default() })
    }
}

impl Subscriber for Fragile {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        assert!(!self.breaks_in_revoke.load(Ordering::SeqCst), "it breaks");
        if self.cannot_let_go.load(Ordering::SeqCst) {
            let _ = ack.refuse(Errno::EBUSY);
            return;
        }
        let mut has = lock(&self.has);
        runs.iter().flat_map(|run| run.pages.iter()).for_each(|page| {
            has.remove(&page.get());
        });
        let _ = ack.let_go();
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let pages = runs.iter().flat_map(|run| run.pages.iter());
        lock(&self.has).extend(pages.map(Pgoff::get));
        let left = self.grants.load(Ordering::SeqCst);
        assert!(left > 0, "it breaks");
        self.grants.store(left - 1, Ordering::SeqCst);
    }
}

fn breaks<T>(it: impl FnOnce() -> T) -> bool {
    catch_unwind(AssertUnwindSafe(it)).is_err()
}

#[test]
fn a_newcomer_that_breaks_is_left_with_nothing() {
    let (_pool, memfd) = object();
    // Two batches, of which it stands one.
    let odd: Vec<_> = (0..100).map(|at| range(2 * at, 1)).collect();
    let _ = memfd.convert_ranges(&odd, PRIVATE, &ConvertOptions::default()).unwrap();
    let fragile = Fragile::new(1);
    assert!(breaks(|| memfd.subscribe(Arc::clone(&fragile) as _)));
    assert!(lock(&fragile.has).is_empty(), "it was asked for everything");
    let _ = memfd.convert(memfd.pages(), PRIVATE, PRESERVE).unwrap();

    // One that keeps what it was given by then.
    let (_pool, memfd) = object();
    let fragile = Fragile::new(0);
    fragile.cannot_let_go.store(true, Ordering::SeqCst);
    assert!(breaks(|| memfd.subscribe(Arc::clone(&fragile) as _)));
    assert_eq!(lock(&fragile.has).len(), 1024);
    let error = memfd.convert(range(1, 1), PRIVATE, PRESERVE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SubscriberRefused);
}

/// Keeps account of where it has what, and breaks if it is told nonsense.
#[derive(Debug, Default)]
struct Follower(Mutex<BTreeMap<u64, Option<Gfn>>>);

fn places(runs: &[HandOutRun]) -> impl Iterator<Item = (u64, Option<Gfn>)> {
    runs.iter().flat_map(|run| {
        (0..run.pages.nr_pages()).map(|nth| {
            let place = run.guest.map(|gfn| gfn.checked_add(nth).unwrap());
            (run.pages.start().get() + nth, place)
        })
    })
}

impl Subscriber for Follower {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        let mut has = lock(&self.0);
        for (page, place) in places(runs) {
            assert_eq!(has.remove(&page), Some(place), "{page:#x} was taken");
        }
        let _ = ack.let_go();
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let mut has = lock(&self.0);
        for (page, place) in places(runs) {
            assert_eq!(has.insert(page, place), None, "{page:#x} was given twice");
        }
    }
}

/// One that breaks between two that do not.
struct Three {
    memfd: GuestMemfd,
    vms: [Vm; 2],
    fragile: Arc<Fragile>,
    followers: [Arc<Follower>; 2],
    all: [Subscription; 3],
}

impl Three {
    fn new() -> Self {
        let (pool, memfd) = object();
        let hypervisor = Hypervisor::new(&pool).unwrap();
        let vms = [(); 2].map(|()| hypervisor.create_vm().unwrap());
        let (fragile, followers) = (Fragile::new(u64::MAX), [(); 2].map(|()| Arc::default()));
        let [one, other]: &[Arc<Follower>; 2] = &followers;
        let subscribe = |it: Arc<dyn Subscriber>| memfd.subscribe(it).unwrap();
        let all = [
            subscribe(Arc::clone(one) as _),
            subscribe(Arc::clone(&fragile) as _),
            subscribe(Arc::clone(other) as _),
        ];
        Self { memfd, vms, fragile, followers, all }
    }

    /// That everybody who is sound has all pages, those of the memslot at its place if there is one.
    fn is_known_to_be_at(&self, place: Option<Gfn>) {
        for follower in &self.followers {
            let has = lock(&follower.0);
            assert_eq!(has.len(), 1024);
            assert_eq!((has.get(&0), has.get(&600)), (Some(&place), Some(&None)));
        }
        assert!(self.all.iter().all(|it| it.standing() == Standing::Told));
    }
}

const PLACE: Gfn = Gfn::new(0x4000);

#[test]
fn a_memslot_that_a_subscriber_broke_at_can_be_made_again() {
    for breaks_in_revoke in [false, true] {
        let three = Three::new();
        let (slot, [vm, other_vm]) = (MemslotId::from_u16(0).unwrap(), &three.vms);
        let bind = |vm: &Vm| vm.bind_slot(slot, PLACE, &three.memfd, range(0, 512));
        three.fragile.breaks_in_revoke.store(breaks_in_revoke, Ordering::SeqCst);
        three.fragile.grants.store(if breaks_in_revoke { u64::MAX } else { 0 }, Ordering::SeqCst);
        assert!(breaks(|| bind(vm)));
        three.fragile.breaks_in_revoke.store(false, Ordering::SeqCst);
        three.fragile.grants.store(u64::MAX, Ordering::SeqCst);
        three.is_known_to_be_at(None);
        assert_eq!(vm.unbind(slot).unwrap_err().kind(), ErrorKind::NotFound);
        // By either machine: the object is not bound to the first.
        bind(other_vm).unwrap();
        three.is_known_to_be_at(Some(PLACE));
        other_vm.unbind(slot).unwrap();
        bind(vm).unwrap();
        three.is_known_to_be_at(Some(PLACE));
    }
}

#[test]
fn a_memslot_that_a_subscriber_broke_at_is_deleted_or_stays() {
    for breaks_in_revoke in [false, true] {
        let three = Three::new();
        let (slot, [vm, other_vm]) = (MemslotId::from_u16(0).unwrap(), &three.vms);
        vm.bind_slot(slot, PLACE, &three.memfd, range(0, 512)).unwrap();
        three.fragile.breaks_in_revoke.store(breaks_in_revoke, Ordering::SeqCst);
        three.fragile.grants.store(if breaks_in_revoke { u64::MAX } else { 0 }, Ordering::SeqCst);
        assert!(breaks(|| vm.unbind(slot)));
        three.fragile.breaks_in_revoke.store(false, Ordering::SeqCst);
        three.fragile.grants.store(u64::MAX, Ordering::SeqCst);
        if breaks_in_revoke {
            three.is_known_to_be_at(Some(PLACE));
            vm.unbind(slot).unwrap();
        }
        three.is_known_to_be_at(None);
        assert_eq!(vm.unbind(slot).unwrap_err().kind(), ErrorKind::NotFound);
        other_vm.bind_slot(slot, PLACE, &three.memfd, range(0, 512)).unwrap();
        three.is_known_to_be_at(Some(PLACE));
    }
}

#[test]
fn memory_comes_to_all_others_though_a_subscriber_breaks_at_it() {
    let three = Three::new();
    // Folios, and holes in one that stays.
    three.memfd.punch_hole(range(512, 512)).unwrap();
    three.memfd.punch_hole(range(3, 5)).unwrap();
    three.fragile.grants.store(0, Ordering::SeqCst);
    assert!(breaks(|| three.memfd.allocate(three.memfd.pages())));
    three.fragile.grants.store(u64::MAX, Ordering::SeqCst);
    three.is_known_to_be_at(None);
    three.memfd.allocate(three.memfd.pages()).unwrap();
    three.is_known_to_be_at(None);
}

fn touch(view: &HostView, page: u64) -> Touch {
    let handler = SigbusHandler::install().unwrap();
    view.touch(handler, Offset::new(page << 12), Access::Read).unwrap()
}

/// Breaks when it is asked for pages while something is done to them, and is then asked no more.
fn quarantined_by(act: impl Fn(&GuestMemfd)) -> Option<(FolioPool, GuestMemfd, HostView)> {
    if !common::require(common::Capability::Uffd) {
        return None;
    }
    let (pool, memfd) = object();
    let view = memfd.map_view().unwrap();
    let fragile = Fragile::new(u64::MAX);
    let it = memfd.subscribe(Arc::clone(&fragile) as _).unwrap();
    fragile.breaks_in_revoke.store(true, Ordering::SeqCst);
    assert!(breaks(|| act(&memfd)));
    fragile.breaks_in_revoke.store(false, Ordering::SeqCst);
    drop(it);
    Some((pool, memfd, view))
}

fn about_views(pool: &FolioPool, memfd: &GuestMemfd) -> Vec<String> {
    let findings = audit::check(pool, &[memfd]).findings().to_vec();
    findings.into_iter().filter(|found| found.contains("view")).collect()
}

#[test]
fn a_collapse_in_which_somebody_breaks_leaves_nothing_in_the_views() {
    let Some((pool, memfd, view)) = quarantined_by(|memfd| drop(memfd.collapse(range(0, 512))))
    else {
        return;
    };
    assert_eq!(memfd.stat().quarantined, ByteSize::from_mib(2));
    assert!([0, 3, 511].iter().all(|&page| matches!(touch(&view, page), Touch::Fault(_))));
    assert!(!matches!(touch(&view, 512), Touch::Fault(_)), "the other folio is as it was");
    assert_eq!(about_views(&pool, &memfd), [] as [String; 0]);
}

#[test]
fn a_report_of_a_failure_in_which_somebody_breaks_leaves_nothing_in_the_views() {
    let report = |memfd: &GuestMemfd| {
        let _ = memfd.report_memory_failure(Offset::new(600 << 12));
    };
    let Some((pool, memfd, view)) = quarantined_by(report) else { return };
    assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(1));
    assert!(matches!(touch(&view, 600), Touch::Fault(_)), "the page that failed");
    assert!(!matches!(touch(&view, 601), Touch::Fault(_)));
    assert_eq!(about_views(&pool, &memfd), [] as [String; 0]);
}
