//! The same of every path by which a view can be made, and of both kinds of mapping.

// UNSAFETY: one read(2) into a raw pointer, to see what the kernel makes of it.
#![expect(unsafe_code, reason = "a system call on a raw pointer is what is tested")]

#[path = "common/arenas.rs"]
mod arenas;
mod common;
#[path = "common/setting.rs"]
mod setting;

use std::os::fd::AsRawFd;

use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{ErrorKind, Found};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FaultCause, FolioPool, GuestMemfd, HostView,
    PartSpec, PinMode, SigbusHandler, Touch, ViewMapping, ViewOptions, ViewPath, Visibility, Zone,
};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;
const SIZE: ByteSize = ByteSize::from_mib(8);

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn touch(view: &HostView, page: u64, access: Access) -> Touch {
    let handler = SigbusHandler::install().unwrap();
    view.touch(handler, Offset::new((page << 12) + 0x123), access).unwrap()
}

fn is_there(view: &HostView, page: u64) -> bool {
    let touches = [Access::Read, Access::Write].map(|access| touch(view, page, access));
    assert_eq!(matches!(touches[0], Touch::Byte(_)), matches!(touches[1], Touch::Byte(_)));
    matches!(touches[0], Touch::Byte(_))
}

fn convert(memfd: &GuestMemfd, range: PgoffRange, to: Visibility) {
    let _ = memfd.convert(range, to, PRESERVE).unwrap();
}

fn shared_object(backing: ArenaBacking) -> (FolioPool, GuestMemfd) {
    let pool = FolioPool::new(backing, SIZE).unwrap();
    let memfd = GuestMemfd::builder(SIZE).initial(Visibility::Shared).create(&pool).unwrap();
    (pool, memfd)
}

/// Runs the body for every path that this host offers, with both kinds of mapping.
fn on_every_path(backing: ArenaBacking, body: impl Fn(&FolioPool, &GuestMemfd, &ViewOptions)) {
    for path in [ViewPath::UserfaultfdSyscall, ViewPath::UserfaultfdDevice, ViewPath::Fixed] {
        for mapping in [ViewMapping::Eager, ViewMapping::Lazy] {
            let (pool, memfd) = shared_object(backing);
            let options = ViewOptions::default().path(path).mapping(mapping);
            match memfd.map_view_with(&options) {
                Ok(view) => assert_eq!((view.path(), view.passed_over()), (path, &[][..])),
                Err(error) if error.kind() == ErrorKind::MissingCapability => {
                    println!("SKIP {path}: {error}");
                    continue;
                }
                Err(error) => panic!("{path}: {error}"),
            }
            println!("{path}, {mapping:?}");
            body(&pool, &memfd, &options);
            assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean", "{path} {mapping:?}");
        }
    }
}

#[test]
fn what_is_private_faults_and_what_is_shared_does_not() {
    on_every_path(ArenaBacking::Memfd, |pool, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        let clean = || assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
        memfd.write(Offset::new(0x5123), b"x").unwrap();
        assert_eq!(touch(&view, 5, Access::Read), Touch::Byte(b'x'));
        clean();

        convert(memfd, range(5, 1), Visibility::Private);
        let Touch::Fault(fault) = touch(&view, 5, Access::Read) else { panic!("it was read") };
        assert_eq!(Some(fault.hva), view.hva_of(Offset::new(0x5123)));
        assert_eq!((fault.offset, fault.cause), (Offset::new(0x5123), FaultCause::NotMapped));
        assert!(is_there(&view, 4) && !is_there(&view, 5) && is_there(&view, 6));
        clean();

        convert(memfd, range(5, 1), Visibility::Shared);
        assert_eq!(touch(&view, 5, Access::Read), Touch::Byte(b'x'));
        clean();
        convert(memfd, range(500, 1100), Visibility::Private);
        assert!(is_there(&view, 499) && !is_there(&view, 500) && !is_there(&view, 1100));
        assert!(!is_there(&view, 1599) && is_there(&view, 1600));
        clean();
        convert(memfd, range(300, 1600), Visibility::Shared);
        assert!((0..2048).step_by(100).all(|page| is_there(&view, page)));
        assert_eq!(memfd.stat().mapped, SIZE);
        clean();
        memfd.punch_hole(range(520, 3)).unwrap();
        assert!(is_there(&view, 519) && !is_there(&view, 521) && is_there(&view, 523));
        clean();
        memfd.punch_hole(range(512, 512)).unwrap();
        assert!(is_there(&view, 511) && !is_there(&view, 700) && is_there(&view, 1024));
        clean();
        memfd.allocate(memfd.pages()).unwrap();
        assert_eq!(touch(&view, 700, Access::Read), Touch::Byte(0));
        assert_eq!(touch(&view, 5, Access::Read), Touch::Byte(b'x'));
    });
}

#[test]
fn scattered_pages_go_and_come_in_one_call() {
    on_every_path(ArenaBacking::Memfd, |_, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        let pages: Vec<_> = (0..2048).step_by(3).map(|page| range(page, 1)).collect();
        for to in [Visibility::Private, Visibility::Shared, Visibility::Private] {
            let done = memfd.convert_ranges(&pages, to, &ConvertOptions::default()).unwrap();
            assert_eq!(done.changed_pages(), pages.len() as u64);
            let seen = (0..2048).map(|page| is_there(&view, page));
            let wanted = (0..2048).map(|page| page % 3 != 0 || to == Visibility::Shared);
            assert!(seen.eq(wanted));
        }
    });
}

#[test]
fn system_calls_get_efault() {
    on_every_path(ArenaBacking::Memfd, |_, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        convert(memfd, range(1, 1), Visibility::Private);
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let read_into = |page: u64| {
            let at = view.pointer(Offset::new(page << 12), ByteSize::from_pages(1)).unwrap();
            // SAFETY: nobody has a reference to the memory, and the kernel checks the address itself.
            let got = unsafe { libc::read(zero.as_raw_fd(), at.as_ptr().cast(), 16) };
            (got, std::io::Error::last_os_error().raw_os_error())
        };
        // Of a block that is shared as a whole, of one that is not, and of a private page.
        assert_eq!([read_into(512).0, read_into(0).0], [16, 16]);
        assert_eq!(read_into(1), (-1, Some(libc::EFAULT)));
    });
}

#[test]
fn a_refused_conversion_leaves_every_view_as_it_was() {
    on_every_path(ArenaBacking::Memfd, |_, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        convert(memfd, range(9, 1), Visibility::Private);
        let owner = memfd.register_owner("virtio-blk").unwrap();
        let _pin = memfd.pin(range(7, 1), owner, PinMode::Counted).unwrap();
        let refused = memfd.convert(range(0, 1024), Visibility::Private, PRESERVE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!((0..1024).all(|page| is_there(&view, page) == (page != 9)));
    });
}

#[test]
fn three_views_of_different_paths_show_the_same() {
    let paths = [ViewPath::UserfaultfdSyscall, ViewPath::UserfaultfdDevice, ViewPath::Fixed];
    let (pool, memfd) = shared_object(ArenaBacking::Memfd);
    let map = |path| {
        let mapping = match path {
            ViewPath::UserfaultfdDevice => ViewMapping::Lazy,
            _ => ViewMapping::Eager,
        };
        memfd.map_view_with(&ViewOptions::default().path(path).mapping(mapping)).ok()
    };
    let mut views: Vec<_> = paths.into_iter().filter_map(map).collect();
    assert!(!views.is_empty());
    let same = |views: &[HostView]| {
        for (pages, visibility) in memfd.visibility(memfd.pages()).unwrap() {
            for page in [pages.start().get(), pages.end().get() - 1] {
                let shared = visibility == Visibility::Shared;
                assert!(views.iter().all(|view| is_there(view, page) == shared), "{page:#x}");
            }
        }
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    };
    same(&views);
    for (start, nr_pages) in [(3, 1), (512, 512), (1000, 600), (0, 2048)] {
        convert(&memfd, range(start, nr_pages), Visibility::Private);
        same(&views);
    }
    for (start, nr_pages) in [(100, 1), (512, 512), (1, 2000)] {
        convert(&memfd, range(start, nr_pages), Visibility::Shared);
        same(&views);
    }
    drop(views.pop());
    convert(&memfd, range(5, 1200), Visibility::Private);
    same(&views);
}

#[test]
fn lazily_mapped_pages_come_when_they_are_touched() {
    on_every_path(ArenaBacking::Memfd, |_, memfd, options| {
        let is_lazy = format!("{options:?}").contains("Lazy");
        convert(memfd, memfd.pages(), Visibility::Private);
        let view = memfd.map_view_with(options).unwrap();
        convert(memfd, memfd.pages(), Visibility::Shared);
        let present = |page: u64| {
            use std::os::unix::fs::FileExt;
            let mut entry = [0; 8];
            let at = view.hva_of(Offset::new(page << 12)).unwrap().get() as u64 / 4096 * 8;
            let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
            pagemap.read_exact_at(&mut entry, at).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        assert_eq!(present(700), !is_lazy);
        assert!(is_there(&view, 700));
        assert!(present(700));
        assert_eq!(memfd.stat().mapped, SIZE, "what can be touched counts");
        assert_eq!(view.check_mapped(memfd.pages()), Ok(()));
        convert(memfd, range(1030, 1), Visibility::Private);
        let refused = view.check_mapped(range(1024, 10)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotShared);
        assert_eq!(refused.culprit().unwrap().offset, Offset::new(1030 << 12));
        assert!(!is_there(&view, 1030) && is_there(&view, 1031));
    });
}

#[test]
fn blocks_that_are_shared_as_a_whole_are_mapped_by_huge_entries() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    on_every_path(ArenaBacking::MemfdThp, |pool, memfd, options| {
        let huge = pool.stat().huge;
        if huge != SIZE {
            println!("SKIP: the kernel found {huge} of huge pages only");
            return;
        }
        let view = memfd.map_view_with(options).unwrap();
        let seen = || (0..4).filter(|block| is_there(&view, block * 512 + 1)).count();
        assert_eq!((seen(), view.huge()), (4, SIZE));
        convert(memfd, range(600, 1), Visibility::Private);
        assert_eq!(view.huge(), ByteSize::from_mib(6));
        assert!((512..1024).all(|page| is_there(&view, page) == (page != 600)));
        assert_eq!(view.regain_huge(memfd.pages()).map(|_| view.huge()), Ok(ByteSize::from_mib(6)));

        convert(memfd, range(600, 1), Visibility::Shared);
        assert_eq!(view.huge(), ByteSize::from_mib(6), "not before somebody asks");
        let _ = view.regain_huge(memfd.pages()).unwrap();
        assert_eq!((seen(), view.huge()), (4, SIZE));
        assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");

        convert(memfd, range(512, 1024), Visibility::Private);
        assert_eq!((seen(), view.huge()), (2, ByteSize::from_mib(4)));
        convert(memfd, range(512, 1024), Visibility::Shared);
        assert_eq!((seen(), view.huge()), (4, SIZE));
        assert_eq!(pool.stat().huge, huge, "nothing was split");
    });
}

/// While a block stops being huge, its other pages are there all the time.
#[test]
fn neighbours_of_a_page_that_turns_private_never_fault() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    on_every_path(ArenaBacking::MemfdThp, |_, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut nr_touches = 0_u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert!(is_there(&view, 3) && is_there(&view, 511));
                    nr_touches += 1;
                }
                nr_touches
            });
            for _ in 0..200 {
                convert(memfd, range(7, 1), Visibility::Private);
                assert!(!is_there(&view, 7));
                convert(memfd, range(7, 1), Visibility::Shared);
                let _ = view.regain_huge(memfd.pages()).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(reader.join().unwrap() > 0);
        });
    });
}

#[test]
fn on_hugetlb_what_cannot_be_mapped_is_told_and_can_be_read() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "8");
    on_every_path(ArenaBacking::MemfdHugetlb2M, |pool, memfd, options| {
        let view = memfd.map_view_with(options).unwrap();
        memfd.write(Offset::new(4096), b"x").unwrap();
        convert(memfd, range(3, 1), Visibility::Private);
        assert!(!is_there(&view, 1) && !is_there(&view, 3) && is_there(&view, 512));
        let refused = view.check_mapped(range(1, 1)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        let culprit = refused.culprit().unwrap();
        assert_eq!((culprit.offset, &culprit.found), (Offset::new(3 << 12), &Found::Private));
        assert_eq!(view.check_mapped(range(3, 1)).unwrap_err().kind(), ErrorKind::NotShared);
        let mut byte = [0];
        view.read(Offset::new(4096), &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert_eq!(audit::check(pool, &[memfd]).to_string(), "clean");
        convert(memfd, range(3, 1), Visibility::Shared);
        assert!(is_there(&view, 1) && is_there(&view, 3));
        assert_eq!(view.check_mapped(memfd.pages()), Ok(()));
        // A pin holds up what is pinned, and a view wants more than that.
        let device = memfd.register_owner("device").unwrap();
        let few = memfd.pin(range(1, 1), device, PinMode::Counted).unwrap();
        assert_eq!(view.check_mapped(range(1, 1)), Ok(()));
        convert(memfd, range(3, 1), Visibility::Private);
        assert_eq!(view.check_mapped(range(1, 1)).unwrap_err().kind(), ErrorKind::Unsupported);
        convert(memfd, range(3, 1), Visibility::Shared);
        drop(few);
        let _all = memfd.pin(range(0, 512), device, PinMode::Counted).unwrap();
        let refused = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
        assert!(is_there(&view, 1));
    });
}

/// Folios move, and memory fails, under views of every path.
#[test]
fn what_moves_is_seen_where_it_was_and_what_fails_is_not() {
    let moves = |backing: ArenaBacking| {
        on_every_path(backing, |_, _, options| {
            let part = || PartSpec::new([backing], ByteSize::from_mib(4));
            let builder = FolioPool::builder().part(part(), Zone::Normal);
            let pool = builder.part(part(), Zone::Movable).create().unwrap();
            let builder = GuestMemfd::builder(ByteSize::from_mib(4));
            let zones = builder.zones(&[Zone::Normal, Zone::Movable]);
            let memfd = zones.initial(Visibility::Shared).create(&pool).unwrap();
            for page in 0..1024 {
                memfd.write(Offset::new((page << 12) + 0x123), &[page as u8]).unwrap();
            }
            let view = memfd.map_view_with(options).unwrap();
            let clean = || assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
            let is_whole = |but: &dyn Fn(u64) -> bool| {
                for page in 0..1024 {
                    match touch(&view, page, Access::Write) {
                        Touch::Byte(byte) => {
                            assert_eq!((byte, but(page)), (page as u8, false), "page {page}");
                        }
                        Touch::Fault(fault) => assert!(but(page), "page {page}: {fault:?}"),
                    }
                }
            };
            for (which, to) in [Zone::Movable, Zone::Normal].into_iter().cycle().take(4).enumerate()
            {
                let migration = memfd.migrate(memfd.pages(), to).unwrap();
                assert!(migration.refused.is_empty(), "{migration:?}");
                assert_eq!(memfd.stat().mapped, memfd.size(), "{which}");
                clean();
                is_whole(&|_| false);
            }
            assert!(memfd.collapse(memfd.pages()).is_ok());
            clean();
            is_whole(&|_| false);
            memfd.report_memory_failure(Offset::new(7 << 12)).unwrap();
            is_whole(&|page| page == 7);
            clean();
            let _ = view.regain_huge(memfd.pages()).unwrap();
            is_whole(&|page| page == 7);
            clean();
        });
    };
    moves(ArenaBacking::Memfd);
    if common::require(Capability::Thp) {
        let _setting = Setting::set(SHMEM_ENABLED, "advise");
        moves(ArenaBacking::MemfdThp);
    }
}

const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Who has been lent an arena's file can punch holes into it. What is gone reads as zeroes, and nothing else is gone.
#[test]
fn a_page_that_somebody_has_taken_takes_no_other_with_it() {
    on_every_path(ArenaBacking::Memfd, |_, _, options| {
        // A size of its own: that is how the file is found.
        let size = ByteSize::from_mib(6);
        let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
        let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
        memfd.write(Offset::new(0), &[7; 6 << 20]).unwrap();
        let [arena] = &arenas::of_size(6 << 20)[..] else { panic!("one pool, one file") };
        let take = |page: &u64| fallocate(arena, HOLE, page << 12, 4096).unwrap();
        let all_but = |view: &HostView, taken: &[u64]| {
            assert_eq!(view.check_mapped(memfd.pages()), Ok(()));
            for page in 0..memfd.pages().nr_pages() {
                let byte = if taken.contains(&page) { 0 } else { 7 };
                assert_eq!(touch(view, page, Access::Read), Touch::Byte(byte), "{page}");
            }
            assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        };
        [5, 6, 511, 600].iter().for_each(take);
        let view = memfd.map_view_with(options).unwrap();
        all_but(&view, &[5, 6, 511, 600]);
        [0, 9, 1535].iter().for_each(take);
        convert(&memfd, range(1, 1533), Visibility::Private);
        convert(&memfd, range(1, 1533), Visibility::Shared);
        for page in [0, 1535] {
            convert(&memfd, range(page, 1), Visibility::Private);
        }
        convert(&memfd, memfd.pages(), Visibility::Shared);
        all_but(&view, &[0, 5, 6, 9, 511, 600, 1535]);
    });
}

/// Where there is no other memory, a huge page that was taken stays out of reach, and it alone.
#[test]
fn a_huge_page_that_somebody_has_taken_takes_no_other_with_it() {
    if !common::require(Capability::Hugetlb) || !common::require(Capability::Uffd) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "5");
    let size = ByteSize::from_mib(10);
    let pool = FolioPool::new(ArenaBacking::MemfdHugetlb2M, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
    memfd.write(Offset::new(0), &[7; 10 << 20]).unwrap();
    let view = memfd.map_view().unwrap();
    let [arena] = &arenas::of_size(10 << 20)[..] else { panic!("one pool, one file") };
    fallocate(arena, HOLE, 2 << 21, 1 << 21).unwrap();
    let thief = memfd_create("thief", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    ftruncate(&thief, 1 << 21).unwrap();
    fallocate(&thief, FallocateFlags::KEEP_SIZE, 0, 1 << 21).unwrap();
    let there_and_back = || {
        convert(&memfd, memfd.pages(), Visibility::Private);
        convert(&memfd, memfd.pages(), Visibility::Shared);
        [0, 1, 2, 3, 4].map(|huge| is_there(&view, huge * 512 + 17))
    };
    assert_eq!(there_and_back(), [true, true, false, true, true]);
    assert_eq!(view.check_mapped(memfd.pages()).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(memfd.stat().mapped, ByteSize::from_mib(8));
    drop(thief);
    assert_eq!(there_and_back(), [true; 5]);
}
