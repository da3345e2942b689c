//! Conversions with a hypervisor that refuses, panics or is hasty.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::*;
use crate::addr::{ByteSize, Gfn, Offset, Pgoff};
use crate::backing::Arena;
use crate::backing::ArenaBacking;
use crate::error::Found;
use crate::folio::FolioPool;
use crate::gmem::PinMode;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Agree,
    Refuse,
    Panic,
}

/// A hypervisor that writes down what it is asked.
#[derive(Debug)]
struct Fake {
    mood: Mutex<Mood>,
    /// It has this many of its runs prepared, and forgets about the rest.
    nr_prepared: Mutex<usize>,
    /// A guest that stores a byte as soon as it can get to its pages.
    hasty: Mutex<Option<Arc<Arena>>>,
    asked: Mutex<Vec<(&'static str, Vec<GuestRun>)>>,
}

impl Fake {
    fn answer(&self, what: &'static str, runs: &[GuestRun]) -> Result<(), Errno> {
        self.asked.lock().unwrap().push((what, runs.to_vec()));
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Agree => Ok(()),
            Mood::Refuse => Err(Errno::EPERM),
            Mood::Panic => panic!("the hypervisor is broken"),
        }
    }
}

impl Stage2 for Fake {
    fn make_private(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        self.answer("make_private", runs)?;
        let nr_prepared = *self.nr_prepared.lock().unwrap();
        runs.iter().copied().take(nr_prepared).for_each(prepare);
        let hasty = self.hasty.lock().unwrap();
        for (arena, run) in hasty.iter().flat_map(|arena| runs.iter().map(move |r| (arena, r))) {
            arena.write(run.pfn.pa(), &[1]).unwrap();
        }
        Ok(())
    }
    fn make_shared(
        &self,
        runs: &[GuestRun],
        prepare: &mut dyn FnMut(GuestRun),
    ) -> Result<(), Errno> {
        self.answer("make_shared", runs).inspect(|()| runs.iter().copied().for_each(prepare))
    }
    fn invalidate_range(&self, runs: &[GuestRun]) {
        self.asked.lock().unwrap().push(("invalidate_range", runs.to_vec()));
    }
    fn reclaim(&self, runs: &[GuestRun]) -> Result<(), Errno> {
        self.answer("reclaim", runs)
    }
}

/// Eight pages, of which 2 to 5 are bound at guest frame 0x100, and a hypervisor.
fn bound() -> (GuestMemfd, Arc<Fake>) {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(8)).unwrap();
    let memfd = GuestMemfd::builder(ByteSize::from_pages(8))
        .initial(Visibility::Shared)
        .create(&pool)
        .unwrap();
    let fake = Arc::new(Fake {
        mood: Mutex::new(Mood::Agree),
        nr_prepared: Mutex::new(usize::MAX),
        hasty: Mutex::default(),
        asked: Mutex::default(),
    });
    let vm = Arc::downgrade(&fake);
    memfd.bind(vm, Gfn::new(0x100), range(2, 4)).unwrap();
    (memfd, fake)
}

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn visible(memfd: &GuestMemfd) -> Vec<(PgoffRange, crate::gmem::PageInfo)> {
    memfd.snapshot(memfd.pages()).unwrap().collect()
}

#[test]
fn the_hypervisor_is_asked_for_what_is_bound_resident_and_changes() {
    let (memfd, fake) = bound();
    memfd.allocate(range(0, 5)).unwrap();
    let _ = memfd.convert(range(4, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
    fake.asked.lock().unwrap().clear();
    let _ = memfd.convert(range(0, 8), Visibility::Private, ContentPolicy::Preserve).unwrap();
    let asked = fake.asked.lock().unwrap();
    let [("make_private", runs)] = asked.as_slice() else { panic!("asked {asked:?}") };
    let frame = |page| memfd.0.frames.frame(Pgoff::new(page)).unwrap();
    // Page 4 is private already, and page 5 has no folio.
    assert_eq!(*runs, [GuestRun { gfn: Gfn::new(0x100), pfn: frame(2), nr_pages: 2 }]);
}

#[test]
fn a_refusal_by_the_hypervisor_undoes_everything() {
    for to in [Visibility::Private, Visibility::Shared] {
        let (memfd, fake) = bound();
        memfd.write(Offset::new(0), &[7; 8 << 12]).unwrap();
        if to == Visibility::Shared {
            let all = memfd.pages();
            let _ = memfd.convert(all, Visibility::Private, ContentPolicy::Preserve).unwrap();
        }
        let before = visible(&memfd);
        *fake.mood.lock().unwrap() = Mood::Refuse;
        let error = memfd.convert(range(0, 8), to, ContentPolicy::Zero).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HypervisorRefused);
        assert_eq!((error.errno(), error.range()), (Errno::EPERM, Some(range(0, 8))));
        assert_eq!(visible(&memfd), before);
        let frames = memfd.0.frames.resident(memfd.pages()).map(|(_, frames)| frames);
        for pfn in frames.flat_map(|frames| frames.iter().collect::<Vec<_>>()) {
            let mut byte = [0];
            memfd.0.arena.read(pfn.pa(), &mut byte).unwrap();
            assert_eq!(byte, [7], "nothing was zeroed");
        }
    }
}

/// What guests see of the object is zeroed as the hypervisor says, what lies between and around that as well.
#[test]
fn all_of_it_is_zeroed_whoever_sees_it() {
    for nr_prepared in [usize::MAX, 2, 1, 0] {
        let (memfd, fake) = bound();
        memfd.bind(Arc::downgrade(&fake) as _, Gfn::new(0x200), range(7, 1)).unwrap();
        *fake.nr_prepared.lock().unwrap() = nr_prepared;
        memfd.write(Offset::new(0), &[7; 8 << 12]).unwrap();
        let all = memfd.pages();
        let _ = memfd.convert(range(3, 1), Visibility::Private, ContentPolicy::Preserve).unwrap();
        let _ = memfd.convert(all, Visibility::Private, ContentPolicy::Zero).unwrap();
        let first_bytes = all.iter().map(|page| {
            let mut byte = [0];
            let pfn = memfd.0.frames.frame(page).unwrap();
            memfd.0.arena.read(pfn.pa(), &mut byte).unwrap();
            byte[0]
        });
        // Page 3 was private before.
        assert_eq!(first_bytes.collect::<Vec<_>>(), [0, 0, 0, 7, 0, 0, 0, 0], "{nr_prepared}");
    }
}

#[test]
fn a_panic_of_the_hypervisor_quarantines_what_it_was_asked_for() {
    let (memfd, fake) = bound();
    let pool = memfd.pool().clone();
    memfd.write(Offset::new(0), &[7; 8 << 12]).unwrap();
    *fake.mood.lock().unwrap() = Mood::Panic;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        memfd.convert(range(3, 2), Visibility::Private, ContentPolicy::Preserve)
    }));
    assert!(outcome.is_err());
    assert_eq!(memfd.stat().quarantined, ByteSize::from_pages(2));
    for refused in [
        memfd.convert(memfd.pages(), Visibility::Private, ContentPolicy::Preserve).unwrap_err(),
        memfd.read(Offset::new(3 << 12), &mut [0]).unwrap_err(),
        memfd.punch_hole(memfd.pages()).unwrap_err(),
    ] {
        assert_eq!(refused.kind(), ErrorKind::Quarantined);
        assert_eq!(refused.culprit().unwrap().found, Found::Quarantined);
    }
    // A pin is in nobody's way where a page is on the right side already.
    let owner = memfd.register_owner("device").unwrap();
    let pinned = memfd.pin(range(0, 1), owner, PinMode::Counted).unwrap();
    let all = ConvertOptions::default().most_culprits(NonZeroU32::MAX);
    let error = memfd.convert_ranges(&[memfd.pages()], Visibility::Shared, &all).unwrap_err();
    let culprits: Vec<_> = error.culprits().iter().map(|culprit| culprit.offset.pgoff()).collect();
    assert_eq!(culprits, [Pgoff::new(3), Pgoff::new(4)]);
    drop(pinned);
    drop(memfd);
    // Eight folios of one page: two are lost, and nothing else.
    assert_eq!(pool.stat().quarantined, ByteSize::from_pages(2));
    assert_eq!(pool.stat().free, ByteSize::from_pages(6));
}

#[test]
fn a_hole_is_only_punched_if_the_hypervisor_gives_the_memory_back() {
    let (memfd, fake) = bound();
    memfd.write(Offset::new(0), &[7; 8 << 12]).unwrap();
    let before = visible(&memfd);
    *fake.mood.lock().unwrap() = Mood::Refuse;
    let error = memfd.punch_hole(range(0, 8)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HypervisorRefused);
    assert_eq!(visible(&memfd), before);
    let mut byte = [0];
    memfd.read(Offset::new(2 << 12), &mut byte).unwrap();
    assert_eq!(byte, [7]);
    *fake.mood.lock().unwrap() = Mood::Agree;
    memfd.punch_hole(range(0, 8)).unwrap();
    assert_eq!(memfd.stat().resident, ByteSize::default());
}

/// Zeroing comes with the hypervisor's step: what the guest stores after it stays.
#[test]
fn zeroing_is_over_when_the_guest_can_store() {
    let (memfd, fake) = bound();
    memfd.write(Offset::new(0), &[7; 8 << 12]).unwrap();
    *fake.hasty.lock().unwrap() = Some(Arc::clone(&memfd.0.arena));
    let all = memfd.pages();
    let _ = memfd.convert(all, Visibility::Private, ContentPolicy::Zero).unwrap();
    let first_bytes = |page| {
        let mut bytes = [9; 2];
        let frame = memfd.0.frames.frame(Pgoff::new(page)).unwrap();
        memfd.0.arena.read(frame.pa(), &mut bytes).unwrap();
        bytes
    };
    // Page 2 begins the run that is bound; page 0 is not bound, and zeroed all the same.
    assert_eq!([first_bytes(0), first_bytes(2), first_bytes(3)], [[0, 0], [1, 0], [0, 0]]);
}

#[test]
fn pages_are_bound_once_and_to_one_machine() {
    let (memfd, fake) = bound();
    let bind = |vm: &Arc<Fake>, pages| {
        memfd.bind(Arc::downgrade(vm) as _, Gfn::new(0), pages).map_err(|error| error.kind())
    };
    assert_eq!(bind(&fake, range(5, 2)), Err(ErrorKind::Exists));
    assert_eq!(bind(&fake, range(7, 2)), Err(ErrorKind::OutOfRange));
    let other = Arc::new(Fake {
        mood: Mutex::new(Mood::Agree),
        nr_prepared: Mutex::new(usize::MAX),
        hasty: Mutex::default(),
        asked: Mutex::default(),
    });
    assert_eq!(bind(&other, range(6, 1)), Err(ErrorKind::Exists));
    let id = bind(&fake, range(6, 2)).unwrap();
    memfd.unbind(id);
    assert!(bind(&fake, range(6, 2)).is_ok());
}
