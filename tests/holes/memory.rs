//! Where the memory of holes is: what the host has back, and what huge pages keep.

use std::fs;

use gmem::addr::{ByteSize, Offset};
use gmem::{ArenaBacking, Visibility, WhyKept};

use super::arena_files::on_host;
use super::child::alone;
use super::common::{self, Capability};
use super::setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use super::{
    FOLIO, PRESERVE, assert_clean, first_byte, object, pages, range, shuffled, tag, touch,
    write_all,
};

#[test]
fn the_host_has_exactly_what_was_released() {
    // A size that no other test has.
    let size = pages(4 * FOLIO + 3);
    let (pool, memfd) = object(ArenaBacking::Memfd, 4 * FOLIO + 3);
    assert_eq!(on_host(size), size, "all of a pool is committed");
    memfd.allocate(memfd.pages()).unwrap();
    let less = |nr_pages: u64| ByteSize::from_bytes(size.get() - pages(nr_pages).get());
    memfd.punch_hole(range(1, 3)).unwrap();
    memfd.punch_hole(range(500, 20)).unwrap();
    assert_eq!((on_host(size), memfd.stat().resident), (less(23), less(23)));
    let mut buf = vec![1; 30 << 12];
    memfd.read(Offset::new(495 << 12), &mut buf).unwrap();
    assert_eq!(on_host(size), less(23), "a read has nothing committed");
    memfd.write(Offset::new(505 << 12), &[1; 4096 * 2]).unwrap();
    assert_eq!(on_host(size), less(21));
    // The pool keeps what comes back to it, and so it is committed again.
    memfd.punch_hole(range(0, FOLIO)).unwrap();
    assert_eq!(memfd.stat().released, pages(8));
    assert_eq!(on_host(size), less(8));
    assert_clean(&pool, &memfd);
    drop(memfd);
    assert_eq!(on_host(size), size);
    assert_eq!(pool.verify_scrubbed(), Ok(size));
}

/// What of this process is in memory, by `VmRSS` of `/proc/self/status`.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn punching_a_random_half_of_256_mib_gives_half_of_it_back() {
    alone("memory::punching_a_random_half_of_256_mib_gives_half_of_it_back", || {
        const PAGES: u64 = 256 << 8;
        let (pool, memfd) = object(ArenaBacking::Memfd, PAGES);
        write_all(&memfd);
        let before = resident();
        let half: Vec<u64> = shuffled(PAGES, 0xba11).into_iter().take(PAGES as usize / 2).collect();
        for &page in &half {
            memfd.punch_hole(range(page, 1)).unwrap();
        }
        let punched = resident();
        let stat = memfd.stat();
        println!("before {before}, half of it punched {punched}, metadata {}", stat.metadata);
        assert_eq!(stat.released, pages(PAGES / 2));
        assert_eq!(on_host(pages(PAGES)), pages(PAGES / 2));
        let wanted = before - stat.released.get();
        assert!(punched <= wanted + before / 100, "{before} {punched}");

        // A conversion of any pattern of it has nothing filled.
        let other = shuffled(PAGES, 0x5eed).into_iter().take(PAGES as usize / 2);
        let ranges: Vec<_> = other.map(|page| range(page, 1)).collect();
        for to in [Visibility::Private, Visibility::Shared] {
            let _ = memfd.convert_ranges(&ranges, to, &gmem::ConvertOptions::default()).unwrap();
            let converted = resident();
            println!("a random half {to}: {converted}");
            // The list of ranges is counted as well.
            assert!(converted <= punched + before / 100, "{punched} {converted}");
        }
        for &page in &half {
            memfd.write(Offset::new(page << 12), &[1]).unwrap();
        }
        assert_eq!(memfd.stat().holes, pages(0));
        assert_eq!(on_host(pages(PAGES)), pages(PAGES));
        drop(memfd);
        assert_eq!(pool.stat().free, pages(PAGES));
    });
}

#[test]
fn converting_a_random_half_takes_metadata_only() {
    alone("memory::converting_a_random_half_takes_metadata_only", || {
        const PAGES: u64 = 256 << 8;
        let (_pool, memfd) = object(ArenaBacking::Memfd, PAGES);
        write_all(&memfd);
        let before = resident();
        for &page in shuffled(PAGES, 0xc0de).iter().take(PAGES as usize / 2) {
            let _ = memfd.convert(range(page, 1), Visibility::Private, PRESERVE).unwrap();
        }
        let after = resident();
        println!("before {before}, after {after}: {:.4}", after as f64 / before as f64);
        assert!(after <= before + before / 100, "{before} {after}");
        assert_eq!(on_host(pages(PAGES)), pages(PAGES));
    });
}

/// Of this process, by the kernel's own account of its mappings.
fn hugetlb() -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = smaps.lines().filter(|line| line.contains("_Hugetlb:"));
    lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10).sum()
}

#[test]
fn transparent_huge_pages_are_not_split_by_holes() {
    if !common::require(Capability::Thp) {
        return;
    }
    let _setting = Setting::set(SHMEM_ENABLED, "advise");
    let size = pages(8 * FOLIO);
    let (pool, memfd) = object(ArenaBacking::MemfdThp, 8 * FOLIO);
    write_all(&memfd);
    let (huge, taken) = (pool.stat().huge, on_host(size));
    assert!(huge.get() > 0, "the kernel found no huge page at all");
    for page in (0..8 * FOLIO).step_by(3) {
        let punched = memfd.punch_hole(range(page, 1)).unwrap();
        assert_eq!((punched.kept(), punched.released()), (pages(1), pages(0)));
        assert_eq!(punched.why_kept(), Some(WhyKept::TransparentHuge));
    }
    assert_eq!((pool.stat().huge, on_host(size)), (huge, taken));
    let stat = memfd.stat();
    assert_eq!((stat.resident, stat.released), (size, pages(0)));
    assert_eq!([first_byte(&memfd, 0), first_byte(&memfd, 1)], [0, tag(1)]);
    memfd.write(Offset::new(0), &[2; 4096]).unwrap();
    assert_eq!(first_byte(&memfd, 0), 2);
    assert_clean(&pool, &memfd);
    let rest = memfd.punch_hole(memfd.pages()).unwrap();
    assert_eq!(rest.returned(), size);
    assert_eq!(pool.stat().huge, huge);
}

#[test]
fn hugetlb_pages_are_kept_and_their_views_go_by_2_mib() {
    if !(common::require(Capability::Hugetlb) && common::require(Capability::Uffd)) {
        return;
    }
    let _setting = Setting::set(NR_HUGEPAGES, "4");
    let (pool, memfd) = object(ArenaBacking::MemfdHugetlb2M, 4 * FOLIO);
    write_all(&memfd);
    let view = memfd.map_view().unwrap();
    let huge = hugetlb();
    assert!(huge >= pages(4 * FOLIO).get());
    for page in [3, 600, 601] {
        let punched = memfd.punch_hole(range(page, 1)).unwrap();
        assert_eq!((punched.kept(), punched.why_kept()), (pages(1), Some(WhyKept::Hugetlb)));
    }
    assert_eq!(pool.stat().huge, pages(4 * FOLIO));
    assert_eq!([first_byte(&memfd, 3), first_byte(&memfd, 4)], [0, tag(4)]);
    assert_eq!([4, 512, 1024].map(|at| touch(&view, at)), [None, None, Some(tag(1024))]);
    assert_clean(&pool, &memfd);
    memfd.write(Offset::new(3 << 12), &[1; 4096]).unwrap();
    memfd.write(Offset::new(600 << 12), &[1; 4096]).unwrap();
    // One of two holes of the second is still there.
    assert_eq!([3, 4, 600].map(|at| touch(&view, at)), [Some(1), Some(tag(4)), None]);
    memfd.allocate(range(601, 1)).unwrap();
    assert_eq!([600, 601, 602].map(|at| touch(&view, at)), [Some(1), Some(0), Some(tag(602))]);
    assert_eq!(hugetlb(), huge, "all is mapped again, and by huge pages");
    let order = shuffled(FOLIO, 1);
    let returned = order.iter().map(|&page| memfd.punch_hole(range(page, 1)).unwrap().returned());
    assert_eq!(returned.max(), Some(pages(FOLIO)));
    assert_clean(&pool, &memfd);
}
