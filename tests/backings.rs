//! Pools on every kind of memory, and what happens where the host has none of it.

mod common;
#[path = "common/setting.rs"]
mod setting;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Offset, Pgoff};
use gmem::audit;
use gmem::error::ErrorKind;
use gmem::range::PgoffRange;
use gmem::vm_memory::{AddressSpace, Slot, refusal};
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, SigbusHandler, Touch, Visibility,
};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

const PRESERVE: ContentPolicy = ContentPolicy::Preserve;

fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

fn is_readable(view: &HostView, page: u64) -> bool {
    let handler = SigbusHandler::install().unwrap();
    let touch = view.touch(handler, Offset::new(page << 12), Access::Read).unwrap();
    matches!(touch, Touch::Byte(_))
}

fn shared_object(pool: &FolioPool, mib: u64) -> GuestMemfd {
    GuestMemfd::builder(ByteSize::from_mib(mib)).initial(Visibility::Shared).create(pool).unwrap()
}

#[test]
fn transparent_huge_pages_stay_whole_while_their_pages_change_sides() {
    if !(common::require(Capability::Thp) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let pool = FolioPool::new(ArenaBacking::MemfdThp, ByteSize::from_mib(16)).unwrap();
    let huge = pool.stat().huge;
    assert!(huge.get() > 0, "the kernel found no huge page at all");
    let memfd = shared_object(&pool, 16);
    let view = memfd.map_view().unwrap();
    for page in (0..4096).step_by(3) {
        let _ = memfd.convert(range(page, 1), Visibility::Private, PRESERVE).unwrap();
    }
    assert!(!is_readable(&view, 0) && is_readable(&view, 1) && is_readable(&view, 2));
    assert_eq!(pool.stat().huge, huge, "a conversion split a huge page");
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
}

#[test]
fn without_transparent_huge_pages_the_setting_is_named() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "never");
    let error = FolioPool::new(ArenaBacking::MemfdThp, ByteSize::from_mib(2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingCapability);
    assert!(error.to_string().contains("shmem_enabled says `never`"), "{error}");

    let preference = [ArenaBacking::MemfdThp, ArenaBacking::Memfd];
    let pool = FolioPool::with_preference(&preference, ByteSize::from_mib(2)).unwrap();
    let passed_over = &pool.parts()[0].passed_over;
    assert_eq!(pool.backing(), ArenaBacking::Memfd);
    assert_eq!(passed_over.len(), 1);
    assert_eq!(passed_over[0].0, ArenaBacking::MemfdThp);
}

#[test]
fn hugetlb_views_change_sides_by_whole_folios_and_accesses_by_pages() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "8");
    let pool = FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(8)).unwrap();
    assert_eq!(pool.stat().huge, ByteSize::from_mib(8));
    let memfd = shared_object(&pool, 8);
    let view = memfd.map_view().unwrap();
    memfd.write(Offset::new(0), &[5; 8192]).unwrap();
    assert!(is_readable(&view, 0));

    let _ = memfd.convert(range(3, 1), Visibility::Private, PRESERVE).unwrap();
    // The view goes by 2 MiB ...
    assert!(!is_readable(&view, 0) && !is_readable(&view, 3) && is_readable(&view, 512));
    // ... and a checked access by 4 KiB.
    let mut byte = [0];
    memfd.read(Offset::new(4096), &mut byte).unwrap();
    assert_eq!(byte, [5]);
    assert_eq!(
        memfd.read(Offset::new(3 << 12), &mut byte).unwrap_err().kind(),
        ErrorKind::NotShared
    );
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");

    let _ = memfd.convert(range(3, 1), Visibility::Shared, PRESERVE).unwrap();
    assert!(is_readable(&view, 0) && is_readable(&view, 3));
    assert_eq!(memfd.stat().mapped, ByteSize::from_mib(8));

    let odd = GuestMemfd::builder(ByteSize::from_pages(1)).create(&pool).unwrap_err();
    assert_eq!(odd.kind(), ErrorKind::InvalidSize);
    drop((view, memfd));
    assert_eq!(pool.verify_scrubbed(), Ok(ByteSize::from_mib(8)));
}

#[test]
fn too_few_hugetlb_pages_are_an_error_at_creation() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "1");
    let error = FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(8)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("nr_hugepages"), "{error}");
}

#[test]
fn a_pool_larger_than_the_host_is_refused() {
    for backing in [ArenaBacking::Memfd, ArenaBacking::Heap] {
        let error = FolioPool::new(backing, ByteSize::from_mib(1 << 40)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    }
}

#[test]
fn a_heap_pool_has_no_views() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2)).unwrap();
    let error = shared_object(&pool, 2).map_view().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn views_leave_nothing_behind() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let count = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
    let maps = || fs::read_to_string("/proc/self/maps").unwrap().matches("gmem").count();
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(4)).unwrap();
    let memfd = shared_object(&pool, 4);
    let fds = Path::new("/proc/self/fd");
    let before = (count(fds.to_str().unwrap()), maps());
    for _ in 0..50 {
        let view = memfd.map_view().unwrap();
        assert!(is_readable(&view, 0));
    }
    // Other tests of this process open descriptors meanwhile, so a few more are no leak.
    assert!(count(fds.to_str().unwrap()) < before.0 + 25);
    assert!(maps() < before.1 + 25);
    assert_eq!(memfd.stat().mapped, ByteSize::default());
}

#[test]
fn on_hugetlb_a_device_slice_pins_the_whole_folio() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let pool = FolioPool::new(ArenaBacking::MemfdHugetlb2M, ByteSize::from_mib(8)).unwrap();
    let memfd = shared_object(&pool, 4);
    let view = Arc::new(memfd.map_view().unwrap());
    let slot = Slot { gfn: Gfn::new(0), view, pages: memfd.pages() };
    let space = AddressSpace::new("virtio-blk", [slot]).unwrap();

    let memory = space.memory();
    assert_eq!(memory.iter().next().unwrap().is_hugetlbfs(), Some(true));
    let slice = memory.get_slice(GuestAddress(0x1000), 16).unwrap();
    assert_eq!(memory.pinned(), ByteSize::from_mib(2));
    // A neighbour that turned private would take the page out of the view with it.
    let refused = memfd.convert(range(7, 1), Visibility::Private, PRESERVE).unwrap_err();
    assert_eq!(refused.culprit().unwrap().offset, Offset::new(0x7000));
    slice.copy_from(b"still here");
    drop(memory);
    let _ = memfd.convert(range(7, 1), Visibility::Private, PRESERVE).unwrap();
    // Shared, but not in the view any more: refused, where a raw access would fault.
    let error = space.memory().get_slice(GuestAddress(0x1000), 16).unwrap_err();
    let why = refusal(&error).unwrap();
    assert_eq!(why.culprit().unwrap().offset, Offset::new(0x7000));
}
