//! No lock is held by how much memory an operation is about.

use super::*;
use crate::hyp::el2::{Look, stretch};
use crate::stage2::Stage2;

/// Of one object: some pieces, and a bit.
const MANY: u64 = 3 * PIECE + 100;

fn object(pool: &FolioPool, nr_pages: u64, initial: Visibility) -> GuestMemfd {
    let size = ByteSize::from_pages(nr_pages);
    let memfd = GuestMemfd::builder(size).initial(initial).create(pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    memfd
}

/// Does something, and says over how many pages it held a lock.
fn longest<T>(act: impl FnOnce() -> T) -> (T, u64) {
    stretch::longest();
    let done = act();
    (done, stretch::longest())
}

/// What is about many pages holds locks for a piece, and for all of one: else nobody would have counted.
#[track_caller]
fn for_a_piece<T>(act: impl FnOnce() -> T) -> T {
    let (done, nr_pages) = longest(act);
    assert_eq!(nr_pages, PIECE);
    done
}

fn run_of(memfd: &GuestMemfd) -> Vec<GuestRun> {
    let frames = memfd.frames().into_iter().zip(BASE..);
    frames.map(|((pfn, _), gfn)| GuestRun { gfn: Gfn::new(gfn), pfn, nr_pages: 1 }).collect()
}

#[test]
fn locks_are_held_for_a_piece() {
    for profile in [Profile::Mainline72, Profile::HugeProtected] {
        let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(2 * MANY)).unwrap();
        let hyp = Hypervisor::with(&pool, profile).unwrap();
        let memfd = object(&pool, MANY, Visibility::Shared);
        let vm = hyp.create_vm().unwrap();
        vm.bind(Gfn::new(BASE), &memfd, memfd.pages()).unwrap();
        let zero = ContentPolicy::Zero;
        for_a_piece(|| memfd.convert(memfd.pages(), Visibility::Private, zero).unwrap());
        assert_eq!(for_a_piece(|| vm.stat()).owned, ByteSize::from_pages(MANY));
        assert_eq!(for_a_piece(|| hyp.stat()).donated, ByteSize::from_pages(MANY));
        // The guest has all of it, so it stands still where the bytes change: for a piece.
        let (runs, core) = (run_of(&memfd), core_of(&vm));
        let whole = [GuestRun { nr_pages: MANY, ..runs[0] }];
        let is_one = runs.windows(2).all(|two| two[0].pfn.checked_add(1) == Some(two[1].pfn));
        assert!(is_one, "this pool gives consecutive frames");
        let mut prepared = Vec::new();
        for_a_piece(|| core.make_private(&whole, &mut |run| prepared.push(run)).unwrap());
        let sizes: Vec<_> = prepared.iter().map(|run| run.nr_pages).collect();
        assert_eq!(sizes, [PIECE, PIECE, PIECE, 100]);
        assert!(prepared.iter().all(|run| runs.contains(&GuestRun { nr_pages: 1, ..*run })));
        // Nothing changes for a page that is refused, be it the last.
        let eperm = core.make_shared(&whole, &mut |_| panic!("refused"));
        assert_eq!(eperm, Err(Errno::EPERM));
        assert_eq!(
            longest(|| memfd.punch_hole(memfd.pages())).0.unwrap_err().errno(),
            Errno::EBUSY
        );
        let ((), nr_pages) = longest(|| vm.teardown().unwrap());
        // As many leaves as there is room for, or a block's pages.
        assert!((64..=PIECE).contains(&nr_pages), "{nr_pages}");
        assert_eq!(hyp.stat(), HostStat::default());
        assert_eq!(hyp.check_invariants(Vec::new()), Vec::<String>::new());
    }
}

#[test]
fn what_is_shown_is_hidden_in_pieces() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(2 * MANY)).unwrap();
    let hyp = Hypervisor::new(&pool).unwrap();
    let memfd = object(&pool, MANY, Visibility::Shared);
    let vm = hyp.create_non_protected_vm().unwrap();
    vm.bind(Gfn::new(BASE), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    for page in 0..MANY {
        vcpu.store(ipa(page), &[1]).unwrap();
    }
    assert_eq!(vm.stat().borrowed, ByteSize::from_pages(MANY));
    let (punched, nr_pages) = longest(|| memfd.punch_hole(memfd.pages()).unwrap());
    assert_eq!(punched.returned().whole_pages(), MANY);
    assert!((64..=PIECE).contains(&nr_pages), "{nr_pages}");
    assert_eq!(vm.stat().borrowed, ByteSize::from_pages(0));
}

/// As many tables as pages: they are taken and come back a piece at a time, at EL2 and in the kernel.
#[test]
fn tables_come_and_go_in_pieces() {
    const NR_TABLES: u64 = PIECE + 100;
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(NR_TABLES)).unwrap();
    let (machine, hyp) = boot(&pool);
    let memfd = object(&pool, NR_TABLES, Visibility::Shared);
    let nr_free = machine.kernel.lock().nr();
    let vm = hyp.create_vm().unwrap();
    for page in 0..NR_TABLES {
        let pages = PgoffRange::single(Pgoff::new(page)).unwrap();
        vm.bind(Gfn::new(page * PIECE), &memfd, pages).unwrap();
    }
    for_a_piece(|| memfd.convert(memfd.pages(), Visibility::Private, PRESERVE).unwrap());
    // Above them, one for each GiB; and the two that make the root.
    let nr_above = NR_TABLES.div_ceil(PIECE);
    assert_eq!(vm.stat().nr_tables as u64, NR_TABLES + nr_above + 2);
    for_a_piece(|| vm.teardown().unwrap());
    assert_eq!(machine.kernel.lock().nr(), nr_free);
    assert_eq!(hyp.check_invariants(Vec::new()), Vec::<String>::new());
}

/// What is found piece by piece is what is found in one go.
#[test]
fn frames_of_guests_are_all_found() {
    let nr_pages = 5 * PIECE + 17;
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(nr_pages)).unwrap();
    let (machine, _hyp) = boot(&pool);
    let found = || {
        let mut found = Vec::new();
        machine.each_state_of_guests(|pfn, state| found.push((pfn, state)));
        assert_eq!(found, machine.el2.all_frames_of_guests(Pfn::new(nr_pages)));
        found
    };
    assert_eq!(found(), []);
    let state = |pages: &mut dyn Iterator<Item = u64>, state| {
        pages.for_each(|pfn| machine.el2.mistake(Pfn::new(pfn), state));
    };
    // The last frame alone: all before it was never touched.
    state(&mut (nr_pages - 1..nr_pages), State::NoPage);
    assert_eq!(found(), [(Pfn::new(nr_pages - 1), State::NoPage)]);
    // To both sides of where pieces meet.
    state(&mut (3 * PIECE - 2..3 * PIECE + 1), State::SharedOwned);
    assert_eq!(found().len(), 4);
    state(&mut (0..nr_pages).step_by(7), State::SharedBorrowed);
    state(&mut (PIECE..2 * PIECE), State::NoPage);
    assert!(found().len() as u64 > PIECE + (nr_pages - PIECE) / 7);
    // What lies behind the pool is the kernel's.
    state(&mut (nr_pages..nr_pages + 1), State::SharedOwned);
    assert_eq!(found().last().unwrap().0, Pfn::new(nr_pages - 1));
}

/// Leaves are found whole, in order, by any start and end.
#[test]
fn leaves_are_all_found() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_pages(MANY)).unwrap();
    let hyp = Hypervisor::new(&pool).unwrap();
    let memfd = object(&pool, MANY, Visibility::Private);
    let vm = hyp.create_vm().unwrap();
    vm.bind(Gfn::new(BASE), &memfd, memfd.pages()).unwrap();
    let mut vcpu = vm.create_vcpu().unwrap();
    let touched: Vec<u64> = (0..MANY).filter(|page| page % 3 == 0 || *page > 1000).collect();
    touched.iter().for_each(|&page| vcpu.store(ipa(page), &[1]).unwrap());
    for (start, nr) in
        [(0, 1 << 28), (BASE, 1), (BASE + 1, 1), (BASE + 999, 70), (BASE, MANY), (9, 0)]
    {
        let mut found = Vec::new();
        let add = |leaves: &[crate::hyp::el2::Mapped]| {
            found.extend(leaves.iter().map(|leaf| leaf.start.get()));
            Ok(())
        };
        core_of(&vm).each_leaf(Gfn::new(start), nr, add).unwrap();
        let wanted = touched.iter().map(|page| BASE + page);
        let wanted: Vec<u64> = wanted.filter(|gfn| (start..start + nr).contains(gfn)).collect();
        assert_eq!(found, wanted, "{start:#x} {nr}");
    }
    let stops = core_of(&vm).each_leaf(Gfn::new(BASE), MANY, |_| Err(Errno::EBUSY));
    assert_eq!(stops, Err(Errno::EBUSY));
}

/// The counter itself.
#[test]
fn a_look_counts_its_pages() {
    let world = World::new();
    let look_at = |look: Look<'_>, nr: u64| {
        (0..nr).for_each(|nth| assert_eq!(look.guest(Gfn::new(nth)), Err(Errno::ENOENT)));
    };
    let core = core_of(&world.vm);
    let ((), nr_pages) = longest(|| {
        look_at(core.look(), 5);
        look_at(core.look(), 3);
    });
    assert_eq!(nr_pages, 5);
}
