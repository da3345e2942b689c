//! Arenas of several parts: on the heap, and on the real host.

mod hugetlb;
mod thp;

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../../../tests/common/setting.rs"]
mod setting;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};

use self::common::Capability;
use super::*;
use crate::addr::{Hva, Pa};
use crate::error::{Error, ErrorKind};
use crate::geometry::NumaNode;

const HEAP: [ArenaBacking; 1] = [ArenaBacking::Heap];
const MEMFD: [ArenaBacking; 1] = [ArenaBacking::Memfd];

fn part(preference: &[ArenaBacking], nr_pages: u64) -> PartSpec {
    PartSpec::new(preference, ByteSize::from_pages(nr_pages))
}

fn frames(start: u64, nr_pages: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start), nr_pages).unwrap()
}

fn obtain(parts: &[PartSpec]) -> std::sync::Arc<Arena> {
    Arena::obtain(parts).unwrap().0
}

fn refusal(parts: &[PartSpec]) -> Error {
    Arena::obtain(parts).unwrap_err()
}

fn byte_at(arena: &Arena, page: u64) -> u8 {
    let mut byte = [0];
    arena.read(Pfn::new(page).pa(), &mut byte).unwrap();
    byte[0]
}

fn hva_of(arena: &Arena, pfn: Pfn) -> Hva {
    Hva::new(arena.base().addr().get() + usize::try_from(pfn.pa().get()).unwrap())
}

/// Another way to the same file, as a process with the right to look into this one has.
fn opened_from_outside(fd: BorrowedFd<'_>) -> File {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    File::options().read(true).write(true).open(path).unwrap()
}

fn punch_from_outside(arena: &Arena, frames: PfnRange) {
    let (fd, at) = arena.file_of(frames).unwrap();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(opened_from_outside(fd), flags, at, frames.len_bytes().get()).unwrap();
}

#[test]
fn parts_on_the_heap_have_gaps_between_them() {
    let parts = [part(&HEAP, 1), part(&HEAP, 1), part(&HEAP, 3)];
    let (arena, reports) = Arena::obtain(&parts).unwrap();
    let of: Vec<_> = reports.iter().map(|report| (report.frames, report.backing)).collect();
    let heap = ArenaBacking::Heap;
    assert_eq!(of, [(frames(0, 1), heap), (frames(1, 1), heap), (frames(4, 3), heap)]);
    assert_eq!(arena.nr_pages(), 7);
    assert_eq!((arena.capacity(), arena.committed()), (ByteSize::from_pages(5), arena.capacity()));

    for page in [0, 1, 4, 6] {
        arena.write(Pfn::new(page).pa(), &[7]).unwrap();
        assert_eq!(byte_at(&arena, page), 7);
        let part = arena.part_of(Pfn::new(page)).unwrap();
        assert!(part.frames().contains(Pfn::new(page)) && part.backing() == heap);
    }
    for page in [2, 3, 7, u64::MAX] {
        assert!(arena.part_of(Pfn::new(page)).is_none(), "{page}");
    }
    // Two parts without a gap between them are as good as one, and a gap is nobody's.
    arena.zero(frames(0, 2)).unwrap();
    assert_eq!((byte_at(&arena, 1), byte_at(&arena, 4)), (0, 7));
    for gap in [frames(1, 2), frames(2, 1), frames(3, 2), frames(6, 2), frames(1, 4)] {
        assert_eq!(arena.zero(gap).unwrap_err().kind(), ErrorKind::OutOfRange, "{gap}");
        assert_eq!(arena.scrub(gap).unwrap_err().kind(), ErrorKind::OutOfRange, "{gap}");
    }
    assert!(arena.file_of(frames(0, 1)).is_none() && !arena.has_files());
    let error = arena.collapse(frames(4, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().starts_with("collapse into huge pages"), "{error}");
}

#[test]
fn what_cannot_be_a_pool_is_refused() {
    let kind = |parts: &[PartSpec]| refusal(parts).kind();
    assert_eq!(kind(&[]), ErrorKind::InvalidSize);
    assert_eq!(kind(&[part(&HEAP, 0)]), ErrorKind::InvalidSize);
    assert_eq!(kind(&[part(&HEAP, 1), part(&[], 1)]), ErrorKind::Unsupported);
    assert_eq!(kind(&[part(&HEAP, 1).on_node(NumaNode::new(0))]), ErrorKind::Unsupported);
    let mixed = [part(&HEAP, 1), part(&MEMFD, 1)];
    assert!(refusal(&mixed).to_string().contains("as a whole or not at all"));
    assert_eq!(kind(&[part(&[HEAP, MEMFD].concat(), 1), part(&HEAP, 1)]), ErrorKind::Unsupported);
    // A pool of one part is on one backing, whichever that is.
    assert!(!obtain(&[part(&[HEAP, MEMFD].concat(), 1)]).has_files());
}

#[test]
#[cfg_attr(miri, ignore = "Miri stops where an allocator fails")]
fn more_than_there_can_be_is_refused() {
    let most = ByteSize::from_mib(1 << 42);
    for (preference, word) in [(HEAP, "available"), (MEMFD, "mmap")] {
        let error = refusal(&[PartSpec::new(preference, most)]);
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(error.to_string().contains(word), "{error}: not even asked");
    }
    let error = refusal(&[PartSpec::new(MEMFD, ByteSize::from_mib(1 << 26))]);
    assert!(error.to_string().contains("available"), "{error}: not even asked");
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn parts_on_files_are_found_in_them() {
    let (arena, reports) = Arena::obtain(&[part(&MEMFD, 600), part(&MEMFD, 8)]).unwrap();
    assert_eq!(reports[1].frames, frames(608, 8));
    assert_eq!(reports[0].to_string(), "0x0..0x258000: memfd, 4 KiB pages");
    // 600 pages have a folio of 2 MiB in them.
    assert_eq!(hva_of(&arena, Pfn::new(0)).get() % (2 << 20), 0);

    arena.write(Pfn::new(599).pa(), b"end").unwrap();
    arena.write(Pfn::new(610).pa(), b"there").unwrap();
    let (fd, at) = arena.file_of(frames(610, 2)).unwrap();
    assert_eq!(at, 2 << 12);
    let mut bytes = [0; 5];
    opened_from_outside(fd).read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(&bytes, b"there");
    for of_none in [frames(599, 2), frames(600, 1), frames(599, 10), frames(615, 2)] {
        assert!(arena.file_of(of_none).is_none(), "{of_none}");
    }
    assert_eq!((arena.view_granule(), arena.parts().len()), (FolioSize::Base, 2));
    assert_eq!(arena.committed(), arena.capacity());
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn nobody_can_cut_a_file_short_or_seal_it_and_a_hole_from_outside_reads_as_zeroes() {
    let arena = obtain(&[part(&MEMFD, 8)]);
    arena.write(Pa::new(0), &[9; 8 * 4096]).unwrap();
    let (fd, _) = arena.file_of(frames(0, 1)).unwrap();
    let outside = opened_from_outside(fd);
    for size in [0, 4096, 9 * 4096] {
        assert_eq!(ftruncate(&outside, size), Err(rustix::io::Errno::PERM));
    }
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE, SealFlags::SHRINK] {
        assert_eq!(fcntl_add_seals(&outside, seal), Err(rustix::io::Errno::PERM));
    }
    punch_from_outside(&arena, frames(2, 3));
    assert_eq!(arena.committed(), ByteSize::from_pages(5));
    assert_eq!((1..6).map(|page| byte_at(&arena, page)).collect::<Vec<_>>(), [9, 0, 0, 0, 9]);
    arena.write(Pfn::new(3).pa(), &[1]).unwrap();
    assert_eq!(byte_at(&arena, 3), 1);
    assert_eq!(arena.committed(), arena.capacity(), "the host gave what was touched");
}

/// What the kernel says of the mapping at an address: its policy, and pages by node.
fn numa_maps(at: Hva) -> String {
    let head = format!("{:x} ", at.get());
    let all = fs::read_to_string("/proc/self/numa_maps").unwrap();
    all.lines().find(|line| line.starts_with(&head)).unwrap_or_default().to_owned()
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn memory_of_a_node_is_of_that_node() {
    if !common::require(Capability::Numa) {
        return;
    }
    let node = probe().nodes()[0];
    let parts = [part(&MEMFD, 8), part(&MEMFD, 512).on_node(node)];
    let (arena, reports) = Arena::obtain(&parts).unwrap();
    assert_eq!((reports[0].node, reports[1].node), (None, Some(node)));
    assert_eq!(arena.part_of(Pfn::new(512)).unwrap().node(), Some(node));
    assert_eq!(arena.is_zero(reports[1].frames), Ok(true), "and mapped now");
    let policy = numa_maps(hva_of(&arena, reports[1].frames.start()));
    assert!(policy.contains(&format!(" bind:{node} ")), "{policy}");
    assert!(policy.contains(&format!(" N{node}=512 ")), "{policy}");
    let policy = numa_maps(hva_of(&arena, Pfn::new(0)));
    assert!(policy.contains(" default "), "{policy}");
}

#[test]
#[cfg_attr(miri, ignore = "maps files")]
fn a_node_that_is_not_there_is_named_and_costs_nothing() {
    let nowhere = NumaNode::new(1 << 20);
    let count = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
    let maps = || fs::read_to_string("/proc/self/maps").unwrap().matches("gmem-arena").count();
    let before = (count("/proc/self/fd"), maps());
    for _ in 0..50 {
        let error = refusal(&[part(&MEMFD, 8), part(&MEMFD, 8).on_node(nowhere)]);
        assert_eq!(error.kind(), ErrorKind::MissingCapability);
        assert!(error.to_string().contains("NUMA node 1048576"), "{error}");
    }
    // Other tests of this process open descriptors meanwhile, so a few more are no leak.
    assert!(count("/proc/self/fd") < before.0 + 25);
    assert!(maps() < before.1 + 25);
}

#[test]
#[cfg_attr(miri, ignore = "asks the host")]
fn the_host_says_what_it_offers() {
    let offer = probe();
    assert_eq!(offer.offers().len(), 5);
    for backing in [ArenaBacking::Heap, ArenaBacking::Memfd] {
        assert!(offer.available(backing).unwrap() >= ByteSize::from_mib(1), "{offer}");
    }
    let text = offer.to_string();
    assert!(text.contains("memfd, 4 KiB pages: ") && text.contains("NUMA nodes: "), "{text}");
}
