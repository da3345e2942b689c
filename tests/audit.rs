//! The audit finds what others have done to a view.

// UNSAFETY: mappings over a view that nobody touches, as a VMM that miscounts would make them.
#![expect(unsafe_code, reason = "what is mapped at the wrong place is what is tested")]

mod common;

use std::os::fd::AsRawFd;

use common::Capability;
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::audit;
use gmem::failpoint::{FailPoint, arm};
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, Export, FolioPool, GuestMemfd, HostView, PartSpec, ViewOptions, ViewPath,
    Visibility, Zone,
};

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// Maps a page of the view anew: what the file of the export has for page `of`.
fn map_over(
    view: &HostView,
    page: u64,
    export: &Export,
    of: u64,
    rights: libc::c_int,
    how: libc::c_int,
) {
    let region = export.regions().find(|region| region.pages.contains(Pgoff::new(of))).unwrap();
    let skip = (of - region.pages.start().get()) << 12;
    let file_at = libc::off_t::try_from(region.file_start.get() + skip).unwrap();
    let at = view.pointer(Offset::new(page << 12), ByteSize::from_pages(1)).unwrap();
    let flags = how | libc::MAP_FIXED | libc::MAP_POPULATE;
    let file = region.file.as_raw_fd();
    // SAFETY: one page of the view, which outlives what is mapped there, and nobody has a reference into it.
    let mapped = unsafe { libc::mmap(at.as_ptr().cast(), 4096, rights, flags, file, file_at) };
    assert_eq!(mapped, at.as_ptr().cast(), "{}", std::io::Error::last_os_error());
}

/// What the host could not fill again when its object ended is quarantined, and no more is wrong.
#[test]
fn a_folio_that_ended_with_holes_is_no_finding() {
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(8)).unwrap();
    let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
    let memfd = builder.create(&pool).unwrap();
    memfd.allocate(memfd.pages()).unwrap();
    memfd.punch_hole(range(7, 1)).unwrap();
    let armed = arm(FailPoint::Commit, 0);
    drop(memfd);
    assert!(armed.has_fired());
    assert_eq!(pool.stat().quarantined, ByteSize::from_mib(2));
    assert_eq!(audit::check(&pool, &[]).to_string(), "clean");
}

#[test]
fn a_frame_at_the_wrong_place_in_a_view_is_found() {
    for path in [ViewPath::Fixed, ViewPath::UserfaultfdSyscall] {
        if path != ViewPath::Fixed && !common::require(Capability::Uffd) {
            continue;
        }
        let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(4));
        let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(4)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let views =
            [(); 2].map(|()| memfd.map_view_with(&ViewOptions::default().path(path)).unwrap());
        let owner = memfd.register_owner("vhost-user").unwrap();
        let export = memfd.export(memfd.pages(), owner).unwrap();
        let found = || audit::check(&pool, &[&memfd]).to_string();
        assert_eq!(found(), "clean", "{path:?}");

        // What belongs there, mapped once more, is no fault.
        map_over(&views[1], 700, &export, 700, READ_WRITE, libc::MAP_SHARED);
        assert_eq!(found(), "clean", "{path:?}");
        // Another page of the same object, all zeroes as this one.
        map_over(&views[1], 700, &export, 701, READ_WRITE, libc::MAP_SHARED);
        assert_eq!(found(), "guest page 0x2bc: a view maps something else there", "{path:?}");
        map_over(&views[1], 700, &export, 700, READ_WRITE, libc::MAP_PRIVATE);
        assert_eq!(
            found(),
            "guest page 0x2bc: a view maps something else there",
            "a copy, {path:?}"
        );
        map_over(&views[1], 700, &export, 700, libc::PROT_READ, libc::MAP_SHARED);
        assert_eq!(
            found(),
            "guest page 0x2bc: a view maps something else there",
            "read-only, {path:?}"
        );
        map_over(&views[1], 700, &export, 700, READ_WRITE, libc::MAP_SHARED);
        map_over(&views[0], 1023, &export, 0, READ_WRITE, libc::MAP_SHARED);
        assert_eq!(found(), "guest page 0x3ff: a view maps something else there", "{path:?}");
        map_over(&views[0], 1023, &export, 1023, READ_WRITE, libc::MAP_SHARED);
        assert_eq!(found(), "clean", "{path:?}");

        // Pages that nobody can touch may have anything behind them.
        drop(export);
        let page = range(3, 1);
        let _ = memfd.convert(page, Visibility::Private, gmem::ContentPolicy::Preserve).unwrap();
        assert_eq!(found(), "clean", "{path:?}");
    }
}
