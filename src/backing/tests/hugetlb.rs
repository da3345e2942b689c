//! Huge pages that are the host's to give: how many there are, and who takes them.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::common::probe::NR_GIANT_PAGES;
use super::setting::{NR_HUGEPAGES, Setting};
use super::*;

const HUGETLB: [ArenaBacking; 1] = [ArenaBacking::MemfdHugetlb2M];
const GIANT: [ArenaBacking; 1] = [ArenaBacking::MemfdHugetlb1G];

fn nr_free(kib: u64) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Somebody else who takes huge pages.
fn thief(nr_huge: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let fd = memfd_create("thief", flags).unwrap();
    fallocate(&fd, FallocateFlags::empty(), 0, nr_huge << 21).unwrap();
    fd
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn several_parts_are_of_huge_pages_and_give_them_back() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let parts = [part(&HUGETLB, 512), part(&MEMFD, 1), part(&HUGETLB, 1024)];
    let (arena, reports) = Arena::obtain(&parts).unwrap();
    assert_eq!(nr_free(2048), 1);
    assert_eq!(reports[2].frames, frames(1024, 1024));
    assert_eq!(
        (arena.huge_bytes(), arena.view_granule()),
        (ByteSize::from_mib(6), FolioSize::Huge2M)
    );
    assert_eq!(arena.committed().get(), (6 << 20) + 4096);
    for page in [0, 511, 513, 1024, 2047] {
        arena.write(Pfn::new(page).pa(), &[page as u8 | 1]).unwrap();
        assert_eq!(byte_at(&arena, page), page as u8 | 1);
    }
    // A hole that somebody punched is missing from every count.
    punch_from_outside(&arena, frames(1536, 512));
    assert_eq!(arena.huge_bytes(), ByteSize::from_mib(4));
    assert_eq!(arena.huge_bytes_of(&arena.parts()[2]), ByteSize::from_mib(2));
    assert_eq!((byte_at(&arena, 2047), nr_free(2048)), (0, 1), "the host had another");
    drop(arena);
    assert_eq!(nr_free(2048), 4);
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn pages_that_are_stolen_after_the_probe_are_an_error_and_no_loss() {
    if !common::require(Capability::Hugetlb) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let all = ByteSize::from_mib(8);
    assert_eq!(probe().available(ArenaBacking::MemfdHugetlb2M), Ok(all));
    let stolen = thief(2);
    assert_eq!(probe().available(ArenaBacking::MemfdHugetlb2M), Ok(ByteSize::from_mib(4)));
    let error = refusal(&[PartSpec::new(HUGETLB, all)]);
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("nr_hugepages"), "{error}");
    assert_eq!(nr_free(2048), 2);

    // The first part is there already when the second cannot be had.
    let parts = [part(&HUGETLB, 512), part(&HUGETLB, 1024)];
    assert_eq!(refusal(&parts).kind(), ErrorKind::Exhausted);
    assert_eq!(nr_free(2048), 2);

    let preference = [ArenaBacking::MemfdHugetlb2M, ArenaBacking::Memfd];
    let parts = [part(&preference, 512), part(&preference, 1024), part(&preference, 513)];
    let (arena, reports) = Arena::obtain(&parts).unwrap();
    let backings: Vec<_> = reports.iter().map(|report| report.backing).collect();
    let [hugetlb, memfd] = preference;
    assert_eq!(backings, [hugetlb, memfd, memfd]);
    assert_eq!(reports[1].passed_over[0].1.kind(), ErrorKind::Exhausted);
    assert_eq!(reports[2].passed_over[0].1.kind(), ErrorKind::Unaligned);
    assert_eq!((nr_free(2048), arena.huge_bytes()), (1, ByteSize::from_mib(2)));
    drop((arena, stolen));
    assert_eq!(nr_free(2048), 4);

    let everything = thief(4);
    let none = probe().available(ArenaBacking::MemfdHugetlb2M).unwrap_err().kind();
    assert_eq!(none, ErrorKind::Exhausted);
    drop(everything);
    let most = refusal(&[PartSpec::new(HUGETLB, ByteSize::from_mib(1 << 26))]);
    assert_eq!((most.kind(), nr_free(2048)), (ErrorKind::Exhausted, 4));
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn hugetlb_of_a_node_is_of_that_node() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Numa)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "2");
    let node = probe().nodes()[0];
    let arena = obtain(&[part(&HUGETLB, 1024).on_node(node)]);
    assert_eq!(arena.is_zero(frames(0, 1024)), Ok(true), "and mapped now");
    let policy = numa_maps(hva_of(&arena, Pfn::new(0)));
    assert!(policy.contains(&format!(" bind:{node} ")), "{policy}");
    assert!(policy.contains(&format!(" N{node}=2 ")), "{policy}");
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn a_part_can_be_of_one_page_of_a_gib() {
    if !common::require(Capability::Hugetlb1G) {
        return;
    }
    let giant = FolioSize::Huge1G.nr_pages();
    let _setting = Setting::set(NR_GIANT_PAGES, "1");
    assert_eq!(probe().available(ArenaBacking::MemfdHugetlb1G), Ok(FolioSize::Huge1G.bytes()));
    let (arena, reports) = Arena::obtain(&[part(&MEMFD, 1), part(&GIANT, giant)]).unwrap();
    assert_eq!(reports[1].frames, frames(giant, giant));
    assert_eq!(arena.huge_bytes_of(&arena.parts()[1]), FolioSize::Huge1G.bytes());
    assert_eq!(hva_of(&arena, Pfn::new(giant)).get() % (1 << 30), 0);
    assert_eq!((arena.view_granule(), nr_free(1 << 20)), (FolioSize::Huge1G, 0));
    arena.write(Pfn::new(2 * giant - 1).pa(), &[5]).unwrap();
    assert_eq!(byte_at(&arena, 2 * giant - 1), 5);
    assert_eq!(arena.collapse(frames(giant, 512)).unwrap_err().kind(), ErrorKind::Unsupported);

    let error = refusal(&[part(&GIANT, giant)]);
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("hugepages-1048576kB"), "{error}");
    assert_eq!(refusal(&[part(&GIANT, 512)]).kind(), ErrorKind::Unaligned);
    drop(arena);
    assert_eq!(nr_free(1 << 20), 1);
}
