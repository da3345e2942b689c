//! Accesses, pins and raw pointers while the folios below them move back and forth.

// UNSAFETY: system calls on raw pointers, which may fail with EFAULT and must not see or lose bytes.
#![expect(unsafe_code, reason = "a system call on a raw pointer is what is tested")]

mod common;
#[path = "common/zoned.rs"]
mod zoned;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Hva, Offset};
use gmem::audit;
use gmem::error::{ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::vm_memory::{AddressSpace, Slot};
use gmem::{
    ArenaBacking, Commitment, FaultCause, FolioPool, GuestMemfd, PinMode, SigbusHandler, Touch,
    Visibility, Zone,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use zoned::{
    FOLIO, assert_all_back, contents, counters, is_all_in, pages, pool, range, read_page, write_all,
};

fn object(backing: ArenaBacking, nr_pages: u64, size: FolioSize) -> (FolioPool, GuestMemfd) {
    let pool = pool(backing, &[(Zone::Normal, nr_pages), (Zone::Movable, nr_pages)]);
    let builder = GuestMemfd::builder(pages(nr_pages)).initial(Visibility::Shared);
    let memfd = builder.zones(&[Zone::Movable]).folio_size(size).create(&pool).unwrap();
    write_all(&memfd);
    (pool, memfd)
}

/// Moves everything back and forth. What is pinned may stay; says how many folios did not.
fn move_about(memfd: &GuestMemfd, rounds: u32) -> u64 {
    let mut moved = 0;
    for round in 0..rounds {
        let to = [Zone::Normal, Zone::Movable][round as usize % 2];
        let migration = memfd.migrate(memfd.pages(), to).unwrap();
        moved += migration.moved.get();
        for (_, error) in migration.refused {
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            let found = &error.culprit().unwrap().found;
            assert!(matches!(found, Found::Pinned { .. } | Found::ExclusivelyPinned { .. }));
        }
    }
    moved
}

/// Runs the others until `mover` is done.
fn during(mover: impl FnOnce(), others: &[&(dyn Fn(u64) + Sync)]) {
    let stop = AtomicBool::new(false);
    let begun = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for other in others {
            scope.spawn(|| {
                let mut round = 0;
                loop {
                    other(round);
                    if round == 0 {
                        begun.fetch_add(1, Ordering::Release);
                    }
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    round += 1;
                }
            });
        }
        while begun.load(Ordering::Acquire) < others.len() as u64 {
            std::thread::yield_now();
        }
        mover();
        stop.store(true, Ordering::Release);
    });
}

#[test]
fn checked_accesses_and_pins_wait_for_a_move_and_lose_nothing() {
    for (size, nr_pages, rounds) in [(FolioSize::Base, 4, 2_000), (FolioSize::Huge2M, FOLIO, 30)] {
        let (pool, memfd) = object(ArenaBacking::Heap, nr_pages, size);
        let last = nr_pages - 1;
        let owner = memfd.register_owner("virtio-blk").unwrap();
        let moved = AtomicU64::new(0);
        // Each has bytes of its own. Words are stored once and found again, whole.
        let words = |round: u64| {
            let value = round.wrapping_mul(0x0101_0101_0101_0101) | 1;
            for page in [0, last] {
                let at = Offset::new((page << 12) + 256);
                memfd.store_u64(at, value).unwrap();
                assert_eq!(memfd.load_u64(at).unwrap(), value, "lost or torn");
            }
        };
        // One word, by plain writes and reads of eight bytes: either value, and never a mixture.
        let shared_word = Offset::new((last << 12) + 512);
        memfd.write(shared_word, &[0xff; 8]).unwrap();
        let writes = |round: u64| {
            memfd.write(shared_word, &[[0; 8], [0xff; 8]][round as usize % 2]).unwrap();
        };
        let reads = |_| {
            let mut word = [7; 8];
            memfd.read(shared_word, &mut word).unwrap();
            assert!(matches!(u64::from_le_bytes(word), 0 | u64::MAX), "{word:x?}");
        };
        // Across pages, and so across folios of 4 KiB.
        let long = |round: u64| {
            let bytes = [round as u8; 4096];
            let at = Offset::new((1 << 12) + 2048);
            memfd.write(at, &bytes).unwrap();
            let mut found = [0; 4096];
            memfd.read(at, &mut found).unwrap();
            assert!(found == bytes, "a write is lost");
        };
        let pins = |round: u64| {
            // Both ways of pinning, and pauses so that folios do move.
            let (mode, nr_pages) = match round % 3 {
                0 => (PinMode::Exclusive, 2),
                1 => (PinMode::Counted, 2),
                _ => (PinMode::Counted, 1),
            };
            let pin = memfd.pin(range(0, nr_pages), owner, mode).unwrap();
            let before = memfd.frames_of(range(0, 1)).unwrap().next();
            std::hint::spin_loop();
            assert_eq!(memfd.frames_of(range(0, 1)).unwrap().next(), before, "moved while pinned");
            drop(pin);
            std::thread::yield_now();
        };
        let mover = || moved.store(move_about(&memfd, rounds), Ordering::Relaxed);
        during(mover, &[&words, &writes, &reads, &long, &pins]);
        assert!(moved.load(Ordering::Relaxed) > 0);
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(memfd);
        assert_all_back(&pool);
    }
}

/// Devices that are written against vm-memory, and conversions that nobody gave time to wait.
#[test]
fn slices_and_conversions_wait_for_a_move_as_well() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(ArenaBacking::Memfd, 4, FolioSize::Base);
    let view = Arc::new(memfd.map_view().unwrap());
    let slot = Slot { gfn: Gfn::new(0), view, pages: memfd.pages() };
    let space = AddressSpace::new("virtio-blk", [slot]).unwrap();
    let slices = |round: u64| {
        let memory = space.memory();
        let slice = memory.get_slice(GuestAddress(0x1ff0), 32).unwrap();
        slice.copy_from(&[round as u8; 32]);
        let mut found = [0_u8; 32];
        slice.copy_to(&mut found);
        assert_eq!(found, [round as u8; 32]);
        drop(memory);
        std::thread::yield_now();
    };
    let accesses = |round: u64| {
        let memory = space.memory();
        memory.write_slice(&round.to_le_bytes(), GuestAddress(64)).unwrap();
        let mut found = [0; 8];
        memory.read_slice(&mut found, GuestAddress(64)).unwrap();
        assert_eq!(u64::from_le_bytes(found), round);
        drop(memory);
        std::thread::yield_now();
    };
    let converts = |_| {
        for to in [Visibility::Private, Visibility::Shared] {
            let _ = memfd.convert(range(3, 1), to, gmem::ContentPolicy::Preserve).unwrap();
        }
    };
    let mover = || {
        let mut moved = 0;
        for round in 0..3_000 {
            let to = [Zone::Normal, Zone::Movable][round % 2];
            let migration = memfd.migrate(memfd.pages(), to).unwrap();
            moved += migration.moved.get();
            for (_, error) in migration.refused {
                let fine = [ErrorKind::Busy, ErrorKind::Unsupported];
                assert!(fine.contains(&error.kind()), "{error}");
            }
        }
        assert!(moved > 0);
    };
    during(mover, &[&slices, &accesses, &converts]);
    assert!(read_page(&memfd, 3) == contents(3));
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

/// What is stored through a raw pointer, by a system call that fails where a store would fault.
fn poke(at: Hva, value: u64) -> bool {
    let (out, into) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&into, &value.to_le_bytes()).unwrap();
    let to = std::ptr::with_exposed_provenance_mut::<libc::c_void>(at.get());
    // SAFETY: the kernel checks the address itself; nobody has a reference to the memory.
    let read = unsafe { libc::read(out.as_raw_fd(), to, 8) };
    assert!(read == 8 || read == -1, "{read}");
    read == 8
}

#[test]
fn raw_pointers_fault_or_mean_the_folio_of_the_moment() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let handler = SigbusHandler::install().unwrap();
    for (size, nr_pages, rounds) in [(FolioSize::Base, 3, 2_000), (FolioSize::Huge2M, FOLIO, 100)] {
        let (pool, memfd) = object(ArenaBacking::Memfd, nr_pages, size);
        let views = [memfd.map_view().unwrap(), memfd.map_view().unwrap()];
        let word = Offset::new((1 << 12) + 8);
        let place = views[0].pointer(word, ByteSize::from_bytes(8)).unwrap();
        let place = Hva::new(place.as_ptr().expose_provenance());
        let (bytes, faults, stores) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let touches = |round: u64| {
            let view = &views[round as usize % 2];
            let access = [Access::Read, Access::Write][round as usize / 2 % 2];
            match view.touch(handler, Offset::new(17), access).unwrap() {
                Touch::Byte(byte) => {
                    assert_eq!(byte, contents(0)[17], "not what is there");
                    bytes.fetch_add(1, Ordering::Relaxed);
                }
                Touch::Fault(fault) => {
                    let may_be = [FaultCause::NotMapped, FaultCause::Inaccessible];
                    assert!(may_be.contains(&fault.cause) && fault.offset == Offset::new(17));
                    faults.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        let pokes = |round: u64| {
            if poke(place, round) {
                assert_eq!(memfd.load_u64(word).unwrap(), round, "a raw store is lost");
                stores.fetch_add(1, Ordering::Relaxed);
            }
        };
        let peeks = |_| assert!(read_page(&memfd, 0) == contents(0));
        let mover = || assert!(move_about(&memfd, rounds) > 0);
        during(mover, &[&touches, &touches, &pokes, &peeks]);
        let nr = [&bytes, &faults, &stores].map(|it| it.load(Ordering::Relaxed));
        assert!(nr[0] > 0 && nr[2] > 0, "{nr:?}");
        assert_eq!(memfd.stat().mapped, memfd.size());
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop((views, memfd));
        assert_all_back(&pool);
    }
}

/// Holes have no bytes, so a store in the moment of the move would be one that nobody ever allowed.
#[test]
fn raw_stores_do_not_get_into_holes() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let (pool, memfd) = object(ArenaBacking::Memfd, FOLIO, FolioSize::Huge2M);
    let view = memfd.map_view().unwrap();
    memfd.punch_hole(range(7, 1)).unwrap();
    let place = view.pointer(Offset::new(7 << 12), ByteSize::from_bytes(8)).unwrap();
    let place = Hva::new(place.as_ptr().expose_provenance());
    let pokes = |_| assert!(!poke(place, 0x5ec2e7), "a store into a hole went through");
    during(|| assert!(move_about(&memfd, 200) > 0), &[&pokes, &pokes]);
    assert_eq!(memfd.stat().holes, pages(1));
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    memfd.allocate(range(7, 1)).unwrap();
    assert!(read_page(&memfd, 7) == [0; 4096]);
}

#[test]
fn conversions_compactions_punches_and_moves_at_once_leave_all_right() {
    let parts = [(Zone::Normal, 2 * FOLIO), (Zone::Movable, 2 * FOLIO)];
    let pool = pool(ArenaBacking::Heap, &parts);
    let builder = GuestMemfd::builder(pages(FOLIO)).initial(Visibility::Shared);
    let builder = builder.zones(&[Zone::Movable]).folio_size(FolioSize::Base);
    let promised = builder.clone().create(&pool).unwrap();
    let over = builder.commitment(Commitment::Overcommitted).create(&pool).unwrap();
    write_all(&promised);
    assert!(is_all_in(&promised, Zone::Movable));
    let busy = |outcome: Result<(), gmem::error::Error>| {
        if let Err(error) = outcome {
            let fine = [ErrorKind::Busy, ErrorKind::NotShared, ErrorKind::Exhausted];
            assert!(fine.contains(&error.kind()), "{error}");
        }
    };
    let converts = |round: u64| {
        let to = [Visibility::Private, Visibility::Shared][round as usize % 2];
        let content = gmem::ContentPolicy::Preserve;
        busy(promised.convert(range(round / 2 * 8 % 504, 4), to, content).map(drop));
    };
    let writes = |round: u64| {
        let page = round * 37 % FOLIO;
        busy(promised.write(Offset::new(page << 12), &contents(page)));
        busy(over.write(Offset::new(page << 12), &contents(page)));
    };
    let punches = |round: u64| {
        busy(over.punch_hole(range(round * 13 % 500, 5)).map(drop));
    };
    let compacts = |round: u64| {
        let zone = [Zone::Normal, Zone::Movable][round as usize % 2];
        let compaction = pool.compact(FolioSize::Huge2M, zone).unwrap();
        compaction.obstacles.into_iter().for_each(|obstacle| busy(Err(obstacle.error)));
    };
    let mover = || {
        for round in 0..40 {
            let to = [Zone::Normal, Zone::Movable][round % 2];
            for memfd in [&promised, &over] {
                // One folio outside of normal that is partly private, or on its way, is refused.
                let migration = memfd.migrate(memfd.pages(), to).unwrap();
                for (_, error) in migration.refused {
                    let fine = [ErrorKind::Busy, ErrorKind::Unsupported, ErrorKind::Exhausted];
                    assert!(fine.contains(&error.kind()), "{error}");
                }
            }
        }
    };
    during(mover, &[&converts, &writes, &punches, &compacts]);
    let all = promised.pages();
    let _ = promised.convert(all, Visibility::Shared, gmem::ContentPolicy::Preserve).unwrap();
    assert!((0..FOLIO).all(|page| read_page(&promised, page) == contents(page)));
    for page in 0..FOLIO {
        let found = read_page(&over, page);
        assert!(found == contents(page) || found == [0; 4096], "{page}");
    }
    assert_eq!(audit::check(&pool, &[&promised, &over]).to_string(), "clean");
    drop(over);
    let [normal, movable] = [Zone::Normal, Zone::Movable].map(|zone| counters(&pool, zone));
    let [_, reserved, used, ..] = normal;
    assert_eq!(
        reserved.get() + used.get(),
        pages(FOLIO).get(),
        "all of it is promised: {normal:?}"
    );
    assert_eq!(movable[1], pages(0));
    drop(promised);
    assert_all_back(&pool);
}
