//! Limits of the process: each is met with an error, in a process of its own.

// UNSAFETY: maps until the kernel refuses.
#![expect(unsafe_code, reason = "the limit of mappings is reached by raw system calls")]

use std::os::fd::{AsFd, AsRawFd};

#[path = "common/child.rs"]
mod child;
mod common;
#[expect(dead_code, reason = "other tests change the other setting")]
#[path = "common/setting.rs"]
mod setting;

use child::alone;
use common::Capability;
use gmem::addr::{Access, ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::error::{Error, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd, PartSpec, SigbusHandler,
    Touch, ViewMapping, ViewOptions, ViewPath, Visibility, Zone,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use setting::{SHMEM_ENABLED, Setting};

/// Runs `body` in a copy of this process under the limit. `test` is the caller's name.
fn under(test: &str, resource: Resource, limit: u64, body: impl FnOnce()) {
    alone(test, || {
        let hard = getrlimit(resource).maximum;
        let limit = hard.map_or(limit, |hard| hard.min(limit));
        setrlimit(resource, Rlimit { current: Some(limit), maximum: hard }).unwrap();
        body();
    });
}

fn pool() -> Result<FolioPool, Error> {
    FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(64))
}

#[test]
fn a_file_size_limit_is_an_error_and_no_signal() {
    under("a_file_size_limit_is_an_error_and_no_signal", Resource::Fsize, 1 << 20, || {
        let error = pool().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(error.to_string().contains("RLIMIT_FSIZE is 1048576"), "{error}");
        let small = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_kib(64));
        assert!(small.is_ok(), "what is below the limit still works");
    });
}

#[test]
fn an_address_space_limit_is_an_error() {
    under("an_address_space_limit_is_an_error", Resource::As, 256 << 20, || {
        let big = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(512)).unwrap_err();
        assert_eq!(big.kind(), ErrorKind::Exhausted, "{big}");
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(16)).unwrap();
        assert_eq!(pool.stat().free, ByteSize::from_mib(16));
    });
}

/// The table of folios grows with what is touched, and that can fail.
#[test]
fn without_memory_for_records_a_first_touch_is_an_error() {
    alone("without_memory_for_records_a_first_touch_is_an_error", || {
        const STEP: u64 = 256;
        let size = ByteSize::from_mib(128);
        let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
        let builder = GuestMemfd::builder(size).folio_size(FolioSize::Base);
        let memfd = builder.create(&pool).unwrap();
        let touch = |page| memfd.allocate(PgoffRange::new(Pgoff::new(page), STEP)?);
        touch(0).unwrap();
        let before = getrlimit(Resource::As);
        setrlimit(Resource::As, Rlimit { current: Some(0), ..before }).unwrap();
        // What the allocator has still: all but what is small.
        let mut all: Vec<Vec<u8>> = Vec::with_capacity(4096);
        loop {
            let mut some = Vec::new();
            if all.len() == 4096 || some.try_reserve_exact(1 << 20).is_err() {
                break;
            }
            all.push(some);
        }
        let mut pages = (STEP..size.whole_pages()).step_by(STEP as usize);
        let (page, error) = pages.find_map(|page| Some((page, touch(page).err()?))).unwrap();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
        assert_eq!(pool.stat().used, ByteSize::from_pages(page));
        setrlimit(Resource::As, before).unwrap();
        drop(all);
        memfd.allocate(memfd.pages()).unwrap();
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    });
}

/// The kernel maps so many pieces and no more. A folio that cannot be mapped is not allocated, and not
/// lost either.
#[test]
fn the_limit_of_mappings_costs_no_folio() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let test = "the_limit_of_mappings_costs_no_folio";
    under(test, Resource::Core, 0, || {
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
        let memfd = GuestMemfd::builder(ByteSize::from_mib(8)).create(&pool).unwrap();
        let view = memfd.map_view().unwrap();
        let folio = PgoffRange::new(Pgoff::new(512), 512).unwrap();
        // Neighbours of different protection do not merge, so each page is a mapping of its own.
        let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .map(|text| text.trim().parse().unwrap())
            .unwrap();
        let filler = Filler::new(limit);
        for _ in 0..8 {
            let error = memfd.allocate(folio).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
        }
        assert_eq!(pool.stat().reserved, pool.stat().capacity, "nothing is lost");
        assert_eq!(pool.stat().quarantined, ByteSize::default());
        drop(filler);
        memfd.allocate(folio).unwrap();
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(view);
    });
}

/// By MAP_FIXED, each page that differs from its neighbours is a mapping. Beyond what the kernel allows a
/// conversion is refused, and all is as before; userfaultfd needs no mapping for it where no block is open.
#[test]
fn beyond_the_limit_of_mappings_a_fixed_view_refuses_and_another_does_not() {
    let test = "beyond_the_limit_of_mappings_a_fixed_view_refuses_and_another_does_not";
    under(test, Resource::Core, 0, || {
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(8)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let page = |at| PgoffRange::new(Pgoff::new(at), 1).unwrap();
        let pages: Vec<_> = (0..2048).step_by(2).map(page).collect();
        let private =
            || memfd.convert_ranges(&pages, Visibility::Private, &ConvertOptions::default());
        let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .map(|text| text.trim().parse().unwrap())
            .unwrap();
        let view = memfd.map_view_with(&ViewOptions::default().path(ViewPath::Fixed)).unwrap();
        let filler = Filler::leaving(limit, 500);
        let error = private().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
        assert_eq!(memfd.stat().private, ByteSize::default());
        assert_eq!(memfd.stat().mapped, ByteSize::from_mib(8), "all is there again");
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(view);
        if common::require(Capability::Uffd) {
            let view = memfd.map_view().unwrap();
            assert!(private().is_ok());
            assert_eq!(memfd.stat().mapped, ByteSize::from_mib(4));
            assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
            drop(view);
        }
        drop(filler);
    });
}

/// An open block is a mapping of its own, or the middle of one. Where no mapping can be split any more it is closed together
/// with those beside it.
#[test]
fn beyond_the_limit_of_mappings_open_blocks_turn_private() {
    if !common::require(Capability::Uffd) || !common::require(Capability::Thp) {
        return;
    }
    let test = "beyond_the_limit_of_mappings_open_blocks_turn_private";
    under(test, Resource::Core, 0, || {
        let _setting = Setting::set(SHMEM_ENABLED, "advise");
        let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .map(|text| text.trim().parse().unwrap())
            .unwrap();
        let lazy = ViewOptions::default().mapping(ViewMapping::Lazy);
        for (backing, options) in
            [(ArenaBacking::MemfdThp, ViewOptions::default()), (ArenaBacking::Memfd, lazy)]
        {
            let size = ByteSize::from_mib(16);
            let pool = FolioPool::new(backing, size).unwrap();
            let builder = GuestMemfd::builder(size).initial(Visibility::Shared);
            let memfd = builder.create(&pool).unwrap();
            let view = memfd.map_view_with(&options).unwrap();
            let handler = SigbusHandler::install().unwrap();
            memfd.write(Offset::new(0), &[7; 16 << 20]).unwrap();
            let range = |start, nr| PgoffRange::new(Pgoff::new(start), nr).unwrap();
            // Two runs of open blocks: the page between them has closed its own.
            let turn = |range, to| memfd.convert(range, to, ContentPolicy::Preserve).map(drop);
            turn(range(4 * 512 + 3, 1), Visibility::Private).unwrap();
            let filler = Filler::new(limit);
            for (private, hidden) in [(range(512 + 7, 1), 2), (range(6 * 512, 512), 514)] {
                turn(private, Visibility::Private).unwrap();
                let is_hidden = |page: u64| {
                    let at = Offset::new(page << 12);
                    match view.touch(handler, at, Access::Read).unwrap() {
                        Touch::Byte(byte) => byte != 7,
                        Touch::Fault(_) => true,
                    }
                };
                assert_eq!((0..4096).filter(|&page| is_hidden(page)).count(), hidden);
                assert_eq!(memfd.stat().mapped, ByteSize::from_pages(4096 - hidden as u64));
            }
            turn(memfd.pages(), Visibility::Private).unwrap();
            turn(memfd.pages(), Visibility::Shared).unwrap();
            assert_eq!(memfd.stat().mapped, size);
            drop(filler);
            assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        }
    });
}

/// As many mappings as the kernel gives.
struct Filler {
    base: *mut libc::c_void,
    len: usize,
}

impl Filler {
    fn new(most: usize) -> Self {
        Self::leaving(most, 0)
    }

    /// All but some of them.
    fn leaving(most: usize, nr_left: usize) -> Self {
        let (len, none) = (most * 2 * 4096, libc::PROT_NONE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for, so nothing is replaced.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, none, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        // What the process has already is not counted, so it is tried until it fails; then some go again.
        let mut reached = 0;
        for page in (0..2 * most).step_by(2) {
            reached = page;
            let at = base.wrapping_byte_add(page * 4096);
            // SAFETY: a page of the mapping above.
            if unsafe { libc::mprotect(at, 4096, libc::PROT_READ) } != 0 {
                break;
            }
        }
        for page in (0..reached).step_by(2).rev().take(nr_left / 2) {
            let at = base.wrapping_byte_add(page * 4096);
            // SAFETY: a page of the mapping above.
            assert_eq!(unsafe { libc::mprotect(at, 4096, none) }, 0);
        }
        Self { base, len }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and goes as a whole.
        assert_eq!(unsafe { libc::munmap(self.base, self.len) }, 0);
    }
}

/// A VMM may lock its memory. Then the kernel maps every page of a mapping at once, and refuses to
/// let go of it by a plain `MADV_DONTNEED`.
#[test]
fn locked_memory_is_hidden_all_the_same() {
    if !(common::require(Capability::Uffd) && common::require(Capability::Mlock)) {
        return;
    }
    let unlimited = u64::MAX;
    under("locked_memory_is_hidden_all_the_same", Resource::Memlock, unlimited, || {
        use rustix::mm::{MlockAllFlags, mlockall};
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).unwrap();
        let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let view = memfd.map_view().unwrap();
        let half = PgoffRange::new(Pgoff::new(0), 512).unwrap();
        let private = Visibility::Private;
        let _ = memfd.convert(half, private, ContentPolicy::Preserve).unwrap();
        assert_eq!(memfd.stat().mapped, ByteSize::from_mib(2));
        // Which asks the kernel's page tables.
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(view);
    });
}

#[test]
fn locked_memory_moves_and_shows_what_it_showed() {
    if !(common::require(Capability::Uffd) && common::require(Capability::Mlock)) {
        return;
    }
    let unlimited = u64::MAX;
    under("locked_memory_moves_and_shows_what_it_showed", Resource::Memlock, unlimited, || {
        use rustix::mm::{MlockAllFlags, mlockall};
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).unwrap();
        let part = || PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(4));
        let builder = FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable);
        let pool = builder.create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
        let memfd = builder.zones(&[Zone::Movable]).create(&pool).unwrap();
        let view = memfd.map_view().unwrap();
        let half = PgoffRange::new(Pgoff::new(256), 512).unwrap();
        let holes = PgoffRange::new(Pgoff::new(3), 5).unwrap();
        memfd.punch_hole(holes).unwrap();
        for to in [Zone::Normal, Zone::Movable] {
            assert_eq!(memfd.migrate(memfd.pages(), to).unwrap().moved, memfd.size());
            assert_eq!(memfd.stat().mapped.get(), memfd.size().get() - (5 << 12));
            assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        }
        let private = Visibility::Private;
        let _ = memfd.convert(half, private, ContentPolicy::Preserve).unwrap();
        assert_eq!(memfd.stat().mapped.get(), memfd.size().get() - (517 << 12));
        assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
        drop(view);
    });
}

#[test]
fn without_descriptors_nothing_is_left_behind() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let body = || {
        let pool = pool().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(64)).initial(Visibility::Shared);
        let memfd = builder.clone().create(&pool).unwrap();
        // Descriptors are given out lowest first, so there is none left below the newest.
        let current = Some(u64::try_from(memfd.as_fd().as_raw_fd()).unwrap() + 1);
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
        for error in [memfd.map_view().map(drop), self::pool().map(drop)].map(Result::unwrap_err) {
            assert_eq!(error.kind(), ErrorKind::Os, "{error}");
        }
        assert_eq!(memfd.stat().resident, ByteSize::default(), "the view left nothing behind");
        drop(memfd);
        assert_eq!(pool.stat().reserved, ByteSize::default());
        assert!(builder.create(&pool).is_ok(), "the descriptor is free again");
    };
    under("without_descriptors_nothing_is_left_behind", Resource::Nofile, 64, body);
}
