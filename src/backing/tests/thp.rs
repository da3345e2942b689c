//! Transparent huge pages: coverage by the kernel's account, and collapse on demand.

use super::setting::{SHMEM_ENABLED, Setting};
use super::*;

const THP: [ArenaBacking; 1] = [ArenaBacking::MemfdThp];
const MIB: u64 = 256;

/// Whether collapsing is forbidden at an address (`nh` of VmFlags, proc(5)).
fn forbids_collapse(at: Hva) -> bool {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{:x}-", at.get());
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    lines.find(|line| line.starts_with("VmFlags:")).is_some_and(|line| line.contains(" nh"))
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn what_somebody_split_is_seen_and_collapsed_again() {
    if !common::require(Capability::Thp) {
        return;
    }
    let setting = Setting::set(SHMEM_ENABLED, "advise");
    let (arena, _) = Arena::obtain(&[part(&MEMFD, 512), part(&THP, 8 * MIB)]).unwrap();
    let huge = &arena.parts()[1];
    let start = huge.frames().start();
    let all = ByteSize::from_mib(8);
    assert_eq!(arena.huge_bytes_of(huge), all, "the kernel found no huge page");
    assert_eq!(arena.huge_bytes(), all);
    for page in [0, 511, 512, 700] {
        arena.write(start.checked_add(page).unwrap().pa(), &[page as u8, 1]).unwrap();
    }

    punch_from_outside(&arena, frames(start.get() + 3, 1));
    assert_eq!(arena.huge_bytes(), ByteSize::from_mib(6));
    assert_eq!(arena.committed().get(), (10 << 20) - 4096);
    // What is a hole is one page of zeroes afterwards.
    arena.collapse(frames(start.get(), 1024)).unwrap();
    assert_eq!((arena.huge_bytes(), arena.committed()), (all, ByteSize::from_mib(10)));
    assert_eq!(byte_at(&arena, start.get() + 3), 0);
    for page in [0, 511, 512, 700] {
        assert_eq!(byte_at(&arena, start.get() + page), page as u8);
    }
    assert!(forbids_collapse(hva_of(&arena, start)));

    let kind = |frames| arena.collapse(frames).unwrap_err().kind();
    assert_eq!(kind(frames(0, 512)), ErrorKind::Unsupported);
    assert_eq!(kind(frames(start.get() + 1, 512)), ErrorKind::Unaligned);
    assert_eq!(kind(frames(start.get(), 100)), ErrorKind::Unaligned);
    assert_eq!(kind(frames(start.get() + 7 * MIB, 512)), ErrorKind::OutOfRange);
    assert_eq!(kind(frames(600, 512)), ErrorKind::OutOfRange);

    // Where the host does not allow it any more, the ban stands all the same.
    punch_from_outside(&arena, frames(start.get() + 3, 1));
    fs::write(SHMEM_ENABLED, "deny").unwrap();
    let error = arena.collapse(frames(start.get(), 512)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingCapability, "{error}");
    assert!(forbids_collapse(hva_of(&arena, start)));
    drop(setting);
}

#[test]
#[cfg_attr(miri, ignore = "changes the host")]
fn the_setting_decides_what_is_offered_and_what_is_passed_over() {
    if !common::require(Capability::Thp) {
        return;
    }
    let setting = Setting::set(SHMEM_ENABLED, "never");
    let error = probe().available(ArenaBacking::MemfdThp).unwrap_err().clone();
    assert_eq!(error.kind(), ErrorKind::MissingCapability);
    assert!(error.to_string().contains("shmem_enabled says `never`"), "{error}");

    let preference = [ArenaBacking::MemfdHugetlb1G, ArenaBacking::MemfdThp, ArenaBacking::Memfd];
    let parts = [part(&preference, 512), part(&MEMFD, 1)];
    let (arena, reports) = Arena::obtain(&parts).unwrap();
    let why: Vec<_> =
        reports[0].passed_over.iter().map(|(backing, why)| (*backing, why.kind())).collect();
    let unaligned = (ArenaBacking::MemfdHugetlb1G, ErrorKind::Unaligned);
    assert_eq!(why, [unaligned, (ArenaBacking::MemfdThp, ErrorKind::MissingCapability)]);
    assert_eq!((reports[0].backing, reports[1].passed_over.len()), (ArenaBacking::Memfd, 0));
    assert!(reports[0].to_string().contains("; not memfd, transparent huge pages: "));
    assert_eq!(arena.committed(), ByteSize::from_pages(513));
    fs::write(SHMEM_ENABLED, "advise").unwrap();
    assert!(probe().available(ArenaBacking::MemfdThp).is_ok());
    drop(setting);
}
