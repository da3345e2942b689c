//! Migrations with hypervisors that cannot move pages, can, or say that they did.

use std::sync::Mutex;

use super::*;
use crate::addr::{Gfn, Offset};
use crate::backing::{ArenaBacking, PartSpec};
use crate::folio::{Commitment, FolioPool};
use crate::geometry::FolioSize;
use crate::gmem::ContentPolicy;
use crate::stage2::Stage2;

/// Gives the guest everything. What it does about moves is for the type.
#[derive(Debug)]
struct Without;

impl Stage2 for Without {
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        runs.iter().copied().for_each(prepare);
        Ok(())
    }
    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        runs.iter().copied().for_each(prepare);
        Ok(())
    }
    fn invalidate_range(&self, _: &[GuestRun]) {}
    fn reclaim(&self, _: &[GuestRun]) -> Result<(), Errno> {
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Hook {
    Moves,
    Refuses,
    /// Says that it has moved, and has not.
    Lies,
}

/// Has the hook, and writes down what it is asked.
#[derive(Debug)]
struct With {
    hook: Mutex<Hook>,
    asked: Mutex<Vec<GuestMove>>,
}

impl Stage2 for With {
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        Without.make_private(runs, prepare)
    }
    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        Without.make_shared(runs, prepare)
    }
    fn invalidate_range(&self, _: &[GuestRun]) {}
    fn reclaim(&self, _: &[GuestRun]) -> Result<(), Errno> {
        Ok(())
    }
    fn migrate(&self, moves: &[GuestMove], copy: &mut dyn FnMut()) -> Result<(), Errno> {
        self.asked.lock().unwrap().extend_from_slice(moves);
        match *self.hook.lock().unwrap() {
            Hook::Moves => copy(),
            Hook::Refuses => return Err(Errno::EBUSY),
            Hook::Lies => {}
        }
        Ok(())
    }
}

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn frame(memfd: &GuestMemfd, page: u64) -> Pfn {
    memfd.0.frames.frame(Pgoff::new(page)).unwrap()
}

/// Two folios in zone normal and room for two more: the first is shared; pages 600 to 699 of the second are
/// private and have holes.
fn object() -> (FolioPool, GuestMemfd) {
    let part = |mib| PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(mib));
    let builder = FolioPool::builder().part(part(10), Zone::Normal).part(part(4), Zone::Movable);
    let pool = builder.create().unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
    let memfd = builder.zones(&[Zone::Normal, Zone::Movable]).create(&pool).unwrap();
    memfd.0.populate(Op::Allocate, &mut memfd.0.layout.write(), memfd.pages()).unwrap();
    // Where it is at first is not the point here.
    let _ = memfd.migrate(memfd.pages(), Zone::Normal).unwrap();
    for page in 0..1024_u64 {
        memfd.write(Offset::new(page << 12), &page.to_le_bytes()).unwrap();
    }
    let _ = memfd.convert(range(600, 100), Visibility::Private, ContentPolicy::Preserve).unwrap();
    memfd.punch_hole(range(610, 2)).unwrap();
    (pool, memfd)
}

fn assert_clean(pool: &FolioPool, memfd: &GuestMemfd) {
    let mut findings = Vec::new();
    memfd.check_invariants(&mut findings);
    assert!(findings.is_empty(), "{findings:?}");
    assert!(memfd.frames().iter().all(|&(pfn, _)| !pool.is_free(pfn)));
    assert!(pool.verify_scrubbed().is_ok());
}

fn assert_bytes(memfd: &GuestMemfd) {
    let _ = memfd.convert(memfd.pages(), Visibility::Shared, ContentPolicy::Preserve).unwrap();
    for page in (0..1024_u64).filter(|page| ![610, 611].contains(page)) {
        assert_eq!(memfd.load_u64(Offset::new(page << 12)).unwrap(), page);
    }
    assert_eq!(memfd.load_u64(Offset::new(610 << 12)).unwrap(), 0);
}

/// Moves the folio of a page inside of its zone.
fn move_away(memfd: &GuestMemfd, page: u64) -> Result<Moved, Error> {
    memfd.0.move_away(Pgoff::new(page / 512 * 512), frame(memfd, page / 512 * 512))
}

#[test]
fn without_the_hook_what_is_bound_stays_and_the_refusal_says_so() {
    let (pool, memfd) = object();
    let hypervisor = std::sync::Arc::new(Without);
    let vm = std::sync::Arc::downgrade(&hypervisor);
    memfd.bind(vm, Gfn::new(0x100), range(600, 100)).unwrap();
    let (first, second) = (frame(&memfd, 0), frame(&memfd, 512));
    let error = move_away(&memfd, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HypervisorRefused);
    assert_eq!((error.errno(), error.range()), (Errno::EOPNOTSUPP, Some(range(512, 512))));
    assert_eq!(
        error.to_string(),
        "migrate 0x200000..0x400000: the hypervisor refused (EOPNOTSUPP)"
    );
    assert_eq!(frame(&memfd, 512), second);
    move_away(&memfd, 0).unwrap();
    assert_ne!(frame(&memfd, 0), first, "the guest has nothing to do with it");
    assert_clean(&pool, &memfd);
    // Without the guest nobody is left to be asked.
    drop(hypervisor);
    move_away(&memfd, 512).unwrap();
    assert_ne!(frame(&memfd, 512), second);
    assert_clean(&pool, &memfd);
    assert_bytes(&memfd);
}

#[test]
fn the_hook_is_asked_for_what_is_bound_and_resident_and_moves_it() {
    let (pool, memfd) = object();
    let hook = With { hook: Mutex::new(Hook::Refuses), asked: Mutex::default() };
    let hypervisor = std::sync::Arc::new(hook);
    let vm = std::sync::Arc::downgrade(&hypervisor);
    memfd.bind(vm, Gfn::new(0x100), range(600, 100)).unwrap();
    let old = frame(&memfd, 512);
    for (hook, errno) in [(Hook::Refuses, Errno::EBUSY), (Hook::Lies, Errno::EPERM)] {
        *hypervisor.hook.lock().unwrap() = hook;
        let before = pool.stat();
        let error = move_away(&memfd, 512).unwrap_err();
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::HypervisorRefused, errno),
            "{hook:?}"
        );
        assert_eq!((frame(&memfd, 512), pool.stat()), (old, before));
        assert_clean(&pool, &memfd);
    }
    *hypervisor.hook.lock().unwrap() = Hook::Moves;
    hypervisor.asked.lock().unwrap().clear();
    move_away(&memfd, 512).unwrap();
    let new = frame(&memfd, 512);
    assert_ne!(new, old);
    let run = |gfn, page: u64, nr_pages| {
        let pfn = old.checked_add(page - 512).unwrap();
        let from = GuestRun { gfn: Gfn::new(gfn), pfn, nr_pages };
        GuestMove { from, to: new.checked_add(page - 512).unwrap() }
    };
    let asked = hypervisor.asked.lock().unwrap().clone();
    assert_eq!(asked, [run(0x100, 600, 10), run(0x10c, 612, 88)]);
    assert_clean(&pool, &memfd);
    assert_bytes(&memfd);
}

#[test]
fn a_folio_that_is_elsewhere_by_now_is_left_alone() {
    let (_pool, memfd) = object();
    let before = frame(&memfd, 0);
    let moved = memfd.0.move_away(Pgoff::new(0), Pfn::new(before.get() + 512));
    assert_eq!((moved, frame(&memfd, 0)), (Ok(Moved::No), before));
    assert_eq!(move_away(&memfd, 0), Ok(Moved::Yes));
    let past = memfd.0.move_away(Pgoff::new(1024), before).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::OutOfRange);
}

fn normal(pool: &FolioPool) -> [ByteSize; 3] {
    let stat = pool.zone_stat(Zone::Normal);
    [stat.free, stat.reserved, stat.used]
}

/// All of an object's promise is used up when it is full, and it moves all the same.
#[test]
fn a_full_object_moves_inside_of_normal_and_its_promise_stays_what_it_is() {
    for commitment in [Commitment::Reserved, Commitment::Overcommitted] {
        let part = |mib| PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(mib));
        let builder = FolioPool::builder().part(part(6), Zone::Normal).part(part(2), Zone::Movable);
        let pool = builder.create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(2)).folio_size(FolioSize::Huge2M);
        let builder = builder.zones(&[Zone::Movable]).commitment(commitment);
        let memfd = builder.create(&pool).unwrap();
        let promised = normal(&pool);
        memfd.0.populate(Op::Allocate, &mut memfd.0.layout.write(), memfd.pages()).unwrap();
        let full = normal(&pool);
        assert_eq!(full[2], ByteSize::from_mib(2), "private memory");
        for _ in 0..3 {
            let before = frame(&memfd, 0);
            move_away(&memfd, 0).unwrap();
            assert_ne!(frame(&memfd, 0), before);
            assert_eq!(normal(&pool), full);
        }
        memfd.punch_hole(memfd.pages()).unwrap();
        assert_eq!(normal(&pool), promised);
        drop(memfd);
        assert_eq!(pool.stat().free, ByteSize::from_mib(8));
    }
}
