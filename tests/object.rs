//! The object without an operating system behind it: creation, counters, accesses, holes.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Errno, ErrorKind, Found};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PageStatus, PinMode, Residency, Visibility,
};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn pages(nr_pages: u64) -> ByteSize {
    ByteSize::from_pages(nr_pages)
}

fn pool(nr_pages: u64) -> FolioPool {
    FolioPool::new(ArenaBacking::Heap, pages(nr_pages)).unwrap()
}

fn shared(pool: &FolioPool, nr_pages: u64) -> GuestMemfd {
    GuestMemfd::builder(pages(nr_pages)).initial(Visibility::Shared).create(pool).unwrap()
}

#[test]
fn creation_follows_the_kernels_rules() {
    let pool = pool(1024);
    let create = |bytes| {
        GuestMemfd::builder(ByteSize::from_bytes(bytes))
            .create(&pool)
            .map(|_| ())
            .map_err(|error| (error.kind(), error.errno()))
    };
    // guest_memfd: size 0, not page aligned, or negative when signed is EINVAL.
    for bytes in [0, 1, 4095, 4097, 1 << 63, u64::MAX, u64::MAX - 4095] {
        assert_eq!(create(bytes), Err((ErrorKind::InvalidSize, Errno::EINVAL)), "{bytes:#x}");
    }
    // 1 << 62 is a size that the kernel accepts, for it reserves nothing; we do.
    assert_eq!(create(1 << 62), Err((ErrorKind::Exhausted, Errno::ENOMEM)));
    assert_eq!(create(1025 << 12), Err((ErrorKind::Exhausted, Errno::ENOMEM)));
    assert_eq!(create(1024 << 12), Ok(()));
    assert_eq!(pool.stat().reserved, ByteSize::default());
}

#[test]
fn a_refusal_says_how_much_is_missing() {
    let pool = pool(1024);
    let _first = shared(&pool, 600);
    let error = GuestMemfd::builder(pages(512)).create(&pool).unwrap_err();
    assert_eq!(
        error.to_string(),
        "create an object: out of memory: wanted are 0 folios of 1 GiB, 1 of 2 MiB and 0 of 4 KiB; of \
         one size alone the pool can still promise 0, 0 or 424; 360448 bytes are missing"
    );
}

#[test]
fn bad_names_are_refused() {
    let pool = pool(1);
    for name in ["a\0b", &"x".repeat(241)] {
        let error = GuestMemfd::builder(pages(1)).name(name).create(&pool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    let longest = "x".repeat(240);
    let memfd = GuestMemfd::builder(pages(1)).name(&longest).create(&pool).unwrap();
    assert_eq!(memfd.name(), longest);
}

#[test]
fn the_descriptor_names_the_object_and_opens_nothing() {
    let pool = pool(2);
    let memfd = shared(&pool, 2);
    memfd.write(Offset::new(0), b"secret").unwrap();
    let mut buf = [0u8; 16];
    assert_eq!(rustix::io::pread(memfd.as_fd(), &mut buf, 0), Ok(0));
    assert_eq!(rustix::io::pwrite(memfd.as_fd(), b"x", 0), Err(rustix::io::Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(memfd.as_fd(), 4096), Err(rustix::io::Errno::PERM));
    let flags = rustix::io::fcntl_getfd(memfd.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn counters_follow_what_happens() {
    let pool = pool(1024 + 3);
    let memfd = shared(&pool, 512 + 3);
    assert_eq!(memfd.stat().size, pages(515));
    assert_eq!(memfd.stat().resident, pages(0));
    memfd.allocate(range(511, 2)).unwrap();
    assert_eq!(memfd.stat().resident, pages(512 + 1));
    let _ = memfd.convert(range(0, 10), Visibility::Private, PRESERVE).unwrap();
    let owner = memfd.register_owner("test").unwrap();
    let pin = memfd.pin(range(20, 4), owner, PinMode::Counted).unwrap();
    let stat = memfd.stat();
    assert_eq!((stat.private, stat.shared), (pages(10), pages(505)));
    assert_eq!((stat.pinned, stat.mapped, stat.quarantined), (pages(4), pages(0), pages(0)));
    let stat = pool.stat();
    assert_eq!((stat.used, stat.reserved), (pages(513), pages(2)));
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    drop(pin);
    drop(memfd);
    assert_eq!(pool.stat().free, pages(1024 + 3));
    assert_eq!(pool.verify_scrubbed(), Ok(pages(1024 + 3)));
}

#[test]
fn visibility_and_snapshot_come_in_runs() {
    let pool = pool(1024);
    let memfd = shared(&pool, 600);
    let _ = memfd.convert(range(3, 2), Visibility::Private, PRESERVE).unwrap();
    let runs: Vec<_> = memfd.visibility(range(0, 600)).unwrap().collect();
    assert_eq!(
        runs,
        [
            (range(0, 3), Visibility::Shared),
            (range(3, 2), Visibility::Private),
            (range(5, 595), Visibility::Shared),
        ]
    );
    let owner = memfd.register_owner("test").unwrap();
    let _pin = memfd.pin(range(5, 1), owner, PinMode::Exclusive).unwrap();
    memfd.allocate(range(0, 1)).unwrap();
    let infos: Vec<_> = memfd.snapshot(range(4, 509)).unwrap().collect();
    assert_eq!(infos.len(), 4);
    assert_eq!(infos[0].1.visibility, Visibility::Private);
    assert_eq!((infos[1].0, infos[1].1.status), (range(5, 1), PageStatus::ExclusivelyPinned));
    assert_eq!((infos[2].0, infos[2].1.residency), (range(6, 506), Residency::Resident));
    assert_eq!((infos[3].0, infos[3].1.residency), (range(512, 1), Residency::Absent));
    assert!(memfd.visibility(range(599, 2)).is_err());
    assert!(memfd.snapshot(range(600, 1)).is_err());
}

#[test]
fn ranges_past_the_end_are_refused_everywhere_and_ignored_by_punch() {
    let pool = pool(8);
    let memfd = shared(&pool, 8);
    let owner = memfd.register_owner("test").unwrap();
    for bad in [range(8, 1), range(7, 2), range(0, 9), range(1 << 40, 1)] {
        let kinds = [
            memfd.allocate(bad).unwrap_err().kind(),
            memfd.pin(bad, owner, PinMode::Counted).unwrap_err().kind(),
            memfd.convert(bad, Visibility::Private, PRESERVE).unwrap_err().kind(),
        ];
        assert_eq!(kinds, [ErrorKind::OutOfRange; 3]);
    }
    assert!(memfd.punch_hole(range(8, 100)).is_ok());
    let end = pages(8).get();
    for (at, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 8)] {
        let mut buf = vec![0; len];
        let read = memfd.read(Offset::new(at), &mut buf).unwrap_err();
        let write = memfd.write(Offset::new(at), &buf).unwrap_err();
        assert_eq!([read.kind(), write.kind()], [ErrorKind::OutOfRange; 2], "{at:#x}");
    }
    assert!(memfd.read(Offset::new(end), &mut []).is_ok());
    assert_eq!(memfd.load_u64(Offset::new(end)).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(memfd.load_u64(Offset::new(end - 8)).unwrap(), 0);
    assert_eq!(memfd.load_u64(Offset::new(4)).unwrap_err().kind(), ErrorKind::Unaligned);
}

#[test]
fn an_access_that_touches_private_memory_fails_whole() {
    let pool = pool(64);
    let memfd = shared(&pool, 64);
    let _ = memfd.convert(range(40, 1), Visibility::Private, PRESERVE).unwrap();
    let before = vec![0; 64 << 12];
    let error = memfd.write(Offset::new(0), &vec![1; 64 << 12]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NotShared, Errno::EFAULT));
    let culprit = error.culprit().unwrap();
    assert_eq!((culprit.offset, &culprit.found), (Offset::new(40 << 12), &Found::Private));
    let _ = memfd.convert(range(40, 1), Visibility::Shared, PRESERVE).unwrap();
    let mut after = vec![0xff; 64 << 12];
    memfd.read(Offset::new(0), &mut after).unwrap();
    assert!(after == before, "nothing was written");
}

#[test]
fn conversion_skips_what_is_there_already_even_if_it_is_pinned() {
    let pool = pool(8);
    let memfd = shared(&pool, 8);
    memfd.write(Offset::new(0), &[9; 8 << 12]).unwrap();
    let owner = memfd.register_owner("test").unwrap();
    let _pin = memfd.pin(range(2, 1), owner, PinMode::Counted).unwrap();
    let _ = memfd.convert(range(4, 2), Visibility::Private, PRESERVE).unwrap();
    let done = memfd.convert(range(0, 8), Visibility::Shared, ContentPolicy::Zero).unwrap();
    assert_eq!(done.changed_pages(), 2);
    let byte = |page: u64| {
        let mut buf = [0];
        memfd.read(Offset::new(page << 12), &mut buf).unwrap();
        buf[0]
    };
    assert_eq!((0..8).map(byte).collect::<Vec<_>>(), [9, 9, 9, 9, 0, 0, 9, 9]);
    let nothing = memfd.convert(range(0, 8), Visibility::Shared, PRESERVE).unwrap();
    assert_eq!(nothing.changed_pages(), 0);
}

#[test]
fn an_exclusive_pin_ends_all_pins() {
    let pool = pool(8);
    let memfd = shared(&pool, 8);
    let blk = memfd.register_owner("virtio-blk").unwrap();
    let net = memfd.register_owner("virtio-net").unwrap();
    let exclusive = memfd.pin(range(2, 2), blk, PinMode::Exclusive).unwrap();
    for mode in [PinMode::Counted, PinMode::Exclusive] {
        let error = memfd.pin(range(0, 4), net, mode).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let owners = vec!["virtio-blk".into()];
        assert_eq!(error.culprit().unwrap().found, Found::ExclusivelyPinned { owners });
    }
    assert_eq!(memfd.owners(memfd.pages()), ["virtio-blk".into()]);
    drop(exclusive);
    let _one = memfd.pin(range(3, 1), net, PinMode::Counted).unwrap();
    let _two = memfd.pin(range(3, 1), blk, PinMode::Counted).unwrap();
    let error = memfd.pin(range(0, 8), blk, PinMode::Exclusive).unwrap_err();
    assert_eq!(
        error.to_string(),
        "pin exclusively 0x0..0x8000: part of the range is in use: subpage 0x3000 has 2 pins \
         (virtio-blk, virtio-net)"
    );
    assert_eq!(memfd.stat().pinned, pages(1));
}

#[test]
fn private_memory_cannot_be_pinned_nor_pinned_memory_punched() {
    let pool = pool(1024);
    let memfd = shared(&pool, 512);
    let owner = memfd.register_owner("test").unwrap();
    let pin = memfd.pin(range(5, 1), owner, PinMode::Counted).unwrap();
    let error = memfd.punch_hole(memfd.pages()).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Busy, Errno::EAGAIN));
    drop(pin);
    let _ = memfd.convert(range(5, 1), Visibility::Private, PRESERVE).unwrap();
    let error = memfd.pin(range(0, 8), owner, PinMode::Counted).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotShared);
    assert_eq!(error.culprit().unwrap().offset, Offset::new(5 << 12));
    memfd.punch_hole(memfd.pages()).unwrap();
    let word = memfd.snapshot(range(5, 1)).unwrap().next().unwrap().1;
    assert_eq!(word.visibility, Visibility::Private, "a punch does not change sides");
}

#[test]
fn owner_tags_belong_to_one_object() {
    let pool = pool(4);
    let (a, b) = (shared(&pool, 2), shared(&pool, 2));
    let tag = a.register_owner("x").unwrap();
    assert_eq!(a.register_owner("x").unwrap(), tag, "the same name is the same owner");
    let _ = b.register_owner("y").unwrap();
    let error = b.pin(range(0, 1), tag, PinMode::Counted).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn holes_read_as_zeroes_and_take_nothing() {
    let pool = pool(1024);
    let memfd = shared(&pool, 1024);
    let mut buf = [1; 4096];
    memfd.read(Offset::new(5000), &mut buf).unwrap();
    assert_eq!(buf, [0; 4096]);
    assert_eq!(memfd.stat().resident, pages(0));
    memfd.write(Offset::new(5000), &[7; 4096]).unwrap();
    assert_eq!(memfd.stat().resident, pages(512));
    memfd.punch_hole(range(2, 1)).unwrap();
    assert_eq!(memfd.stat().resident, pages(512), "a folio punched in part keeps its memory");
    memfd.read(Offset::new(2 << 12), &mut buf).unwrap();
    assert_eq!(buf, [0; 4096]);
    memfd.punch_hole(range(0, 512)).unwrap();
    assert_eq!(memfd.stat().resident, pages(0));
    assert_eq!(pool.stat().reserved, pages(1024), "what was punched stays promised");
}

#[test]
fn a_forgotten_pin_holds_for_good_and_its_folio_is_not_recycled() {
    let pool = pool(4);
    let memfd = shared(&pool, 4);
    memfd.allocate(range(0, 4)).unwrap();
    let owner = memfd.register_owner("leaky").unwrap();
    std::mem::forget(memfd.pin(range(0, 1), owner, PinMode::Counted).unwrap());
    let error = memfd.convert(memfd.pages(), Visibility::Private, PRESERVE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    drop(memfd);
    assert_eq!(pool.stat().quarantined, pages(1), "memory that somebody may use is not recycled");
    assert_eq!(pool.stat().free, pages(3));
}

#[test]
fn folios_of_base_size_come_and_go_one_by_one() {
    let pool = pool(16);
    let memfd = GuestMemfd::builder(pages(16))
        .folio_size(FolioSize::Base)
        .initial(Visibility::Shared)
        .create(&pool)
        .unwrap();
    memfd.write(Offset::new(3 << 12), &[1]).unwrap();
    assert_eq!(memfd.stat().resident, pages(1));
    memfd.punch_hole(range(3, 1)).unwrap();
    assert_eq!(memfd.stat().resident, pages(0));
}

/// Promise 5: an access is either done before the memory turns private, or refused.
#[test]
fn accesses_and_conversions_from_many_threads_never_mix() {
    let pool = pool(16);
    let memfd = shared(&pool, 16);
    let stop = AtomicBool::new(false);
    let (mut refused, mut done) = (0u32, 0u32);
    std::thread::scope(|scope| {
        let converter = scope.spawn(|| {
            for round in 0..2_000u32 {
                let (to, content) = match round % 2 {
                    0 => (Visibility::Private, PRESERVE),
                    // What the "guest" has is not for the host: it comes back as zeroes.
                    _ => (Visibility::Shared, ContentPolicy::Zero),
                };
                let _ = memfd.convert(range(0, 16), to, content).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        let writer = scope.spawn(|| {
            let pattern = [0xaa; 3 * 4096];
            while !stop.load(Ordering::Relaxed) {
                if let Err(error) = memfd.write(Offset::new(100), &pattern) {
                    assert!(matches!(error.kind(), ErrorKind::NotShared | ErrorKind::Busy));
                }
            }
        });
        let mut buf = [0; 3 * 4096];
        while !stop.load(Ordering::Relaxed) {
            match memfd.read(Offset::new(100), &mut buf) {
                Ok(()) => {
                    done += 1;
                    assert!(buf.iter().all(|&byte| byte == 0 || byte == 0xaa));
                }
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error.kind(), ErrorKind::NotShared | ErrorKind::Busy));
                }
            }
        }
        converter.join().unwrap();
        writer.join().unwrap();
    });
    assert!(done + refused > 0);
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}
