//! What the host's side costs: `cargo bench --bench host -- [--quick] [PART OF A ROW'S NAME]`.
//!
//! As the state bench: `row NAME ours=NS peer=PEERNAME peer_ns=NS ratio=R`, ours and a peer in one
//! process, turn by turn, medians, of the time that the thread has had of a processor. The peers are bare system calls that end in the same. Ends with 1 if a
//! row is not as it must be. A row that this host cannot run says so.

// UNSAFETY: the peers are bare system calls on mappings of their own.
#![expect(unsafe_code, reason = "peers of what the library does are raw system calls")]

mod bare;
mod harness;
mod report;
#[path = "../../tests/common/setting.rs"]
mod setting;

use std::fs::File;
use std::ops::Range;
use std::process::ExitCode;

use bare::{BareView, HUGE, Map, PAGE, Pages};
use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::error::Error;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FilePlace, FolioPool, GuestMemfd, HostView,
    PinMode, Visibility,
};
use harness::{Bench, Row, median};
use setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Measures some rows.
type Part = fn(&mut Bench) -> Outcome<()>;

const MIB: usize = 1 << 20;

fn main() -> ExitCode {
    let quick = std::env::args().any(|arg| arg == "--quick");
    // cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let mut bench = Bench::new(quick, filter.unwrap_or_default());
    let parts: &[(&[&str], Part)] = &[
        (&["convert_4k_view"], convert_4k),
        (&["convert_2m_memfd_view"], |bench| convert_2m(bench, Pages::Small)),
        (&["convert_2m_thp_view"], |bench| convert_2m(bench, Pages::Transparent)),
        (&["convert_2m_hugetlb_view"], |bench| convert_2m(bench, Pages::Hugetlb)),
        (&["convert_scattered_view"], scattered),
        (&["vs_double_backing_2m"], double_backing),
        (&["vs_mprotect_4k"], mprotect),
        (&["vs_guest_memfd_touch"], guest_memfd_touch),
        (&["read_4k", "write_4k"], checked_copies),
        (&["file_to_guest"], file_to_guest),
        (&["report_fixed_4k"], report::fixed),
        (&["report_close_and_regain"], report::close),
        (&["report_lazy_2m_untouched", "report_lazy_2m_touched"], report::lazy),
        (&["report_read_64", "report_read_256", "report_read_1024"], report::short_reads),
    ];
    for (names, part) in parts {
        if !bench.wants_any(names) {
            continue;
        }
        if let Err(error) = part(&mut bench) {
            println!("# {} IS NOT MEASURED: {error}", names.join(", "));
        }
    }
    ExitCode::from(u8::from(bench.missed()))
}

/// The host's setting for this kind of page, put back when it is dropped.
fn allow(pages: Pages, nr_hugetlb: usize) -> Option<Setting> {
    match pages {
        Pages::Small => None,
        Pages::Transparent => Some(Setting::set(SHMEM_ENABLED, "advise")),
        Pages::Hugetlb => Some(Setting::set(NR_HUGEPAGES, &nr_hugetlb.to_string())),
    }
}

fn backing(pages: Pages) -> ArenaBacking {
    match pages {
        Pages::Small => ArenaBacking::Memfd,
        Pages::Transparent => ArenaBacking::MemfdThp,
        Pages::Hugetlb => ArenaBacking::MemfdHugetlb2M,
    }
}

/// Shared memory with a view. All of it has been written to, as the peers' has: what is mapped nowhere else is
/// counted as mapped by the kernel each time that a view gets it.
fn viewed(len: usize, pages: Pages) -> Result<(GuestMemfd, HostView), Error> {
    let size = ByteSize::from_bytes(len as u64);
    let pool = FolioPool::new(backing(pages), size)?;
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?;
    let view = memfd.map_view()?;
    let loaded = [0x5A; PAGE];
    for at in (0..size.get()).step_by(PAGE) {
        memfd.write(Offset::new(at), &loaded)?;
    }
    Ok((memfd, view))
}

fn range(at: usize, len: usize) -> PgoffRange {
    let (at, len) = (Offset::new(at as u64), ByteSize::from_bytes(len as u64));
    PgoffRange::from_bytes(at, len).expect("whole pages")
}

fn convert(memfd: &GuestMemfd, range: PgoffRange, to: Visibility) {
    let done = memfd.convert(range, to, ContentPolicy::Preserve);
    assert_eq!(done.map(|done| done.changed_pages()), Ok(range.nr_pages()));
}

fn both_ways(memfd: &GuestMemfd, range: PgoffRange) {
    convert(memfd, range, Visibility::Private);
    convert(memfd, range, Visibility::Shared);
}

fn convert_4k(bench: &mut Bench) -> Outcome<()> {
    let (memfd, _view) = viewed(8 * MIB, Pages::Small)?;
    let peer = BareView::new(8 * MIB, Pages::Small)?;
    let page = range(HUGE + 7 * PAGE, PAGE);
    bench.row(
        Row::new("convert_4k_view", "dontneed_and_continue", 2_000).at_most(1.3),
        || both_ways(&memfd, page),
        || peer.both_ways(HUGE + 7 * PAGE, PAGE),
    );
    Ok(())
}

fn convert_2m(bench: &mut Bench, pages: Pages) -> Outcome<()> {
    let (name, limit) = match pages {
        Pages::Small => ("convert_2m_memfd_view", None),
        Pages::Transparent => ("convert_2m_thp_view", Some(1.15)),
        Pages::Hugetlb => ("convert_2m_hugetlb_view", Some(1.3)),
    };
    let len = 8 * MIB;
    let _setting = allow(pages, 2 * len / HUGE);
    let (memfd, _view) = viewed(len, pages)?;
    if pages == Pages::Transparent && memfd.pool().stat().huge.get() < len as u64 {
        return Err("the kernel found too few huge pages".into());
    }
    let peer = BareView::new(len, pages)?;
    let row = Row::new(name, "dontneed_and_continue", 100);
    bench.row(
        Row { at_most: limit, ..row },
        || both_ways(&memfd, range(HUGE, HUGE)),
        || peer.both_ways(HUGE, HUGE),
    );
    Ok(())
}

/// Pages far from each other, in one conversion each way.
fn scattered(bench: &mut Bench) -> Outcome<()> {
    const NR_PAGES: usize = 1_024;
    const STRIDE: usize = 11 * PAGE;
    let len = (NR_PAGES * STRIDE).next_multiple_of(HUGE);
    let (memfd, _view) = viewed(len, Pages::Small)?;
    let peer = BareView::new(len, Pages::Small)?;
    let pages: Vec<_> = (0..NR_PAGES).map(|at| range(at * STRIDE, PAGE)).collect();
    let options = ConvertOptions::default();
    let row = Row::new("convert_scattered_view", "single_dontneed_and_continue", 8);
    bench.row(
        row.at_most(0.8).per_call(NR_PAGES as u32),
        || {
            for to in [Visibility::Private, Visibility::Shared] {
                let done = memfd.convert_ranges(&pages, to, &options);
                assert_eq!(done.map(|done| done.changed_pages()), Ok(NR_PAGES as u64));
            }
        },
        || {
            for at in 0..NR_PAGES {
                let gone = peer.map.advise(at * STRIDE, PAGE, libc::MADV_DONTNEED);
                gone.expect("it was mapped");
            }
            for at in 0..NR_PAGES {
                peer.uffd.map_pages(&peer.map, at * STRIDE, PAGE).expect("it was not");
            }
        },
    );
    Ok(())
}

/// Two memories for one guest, as VMMs have them today: what changes sides is copied from one to the
/// other, and punched where it was. The host is at every page while it is shared, the guest while it is private: by a
/// mapping of its own, which stands for its stage 2 and knows nothing of conversions.
fn double_backing(bench: &mut Bench) -> Outcome<()> {
    let len = 8 * MIB;
    let pages = Pages::Transparent;
    let _setting = allow(pages, 0);
    let (memfd, view) = viewed(len, pages)?;
    let pointer = view.pointer(Offset::new(HUGE as u64), ByteSize::from_mib(2));
    let pointer = pointer.ok_or("no pointer")?.as_ptr();
    let files = (bare::memfd(len, pages)?, bare::memfd(len, pages)?);
    let (private, shared) = (Map::new(&files.0, len)?, Map::new(&files.1, len)?);
    for map in [&private, &shared] {
        map.populate(pages)?;
    }
    // The object is the pool's only one, so page n of it is page n of the arena.
    let guest = Map::new(&bare::arena_file(len)?, len)?;
    guest.touch(0, len);
    let host_sees = |place: usize| bare::touch(pointer.wrapping_add(place), PAGE);
    assert_eq!(guest.touch(HUGE, PAGE) + 1, host_sees(0), "one memory");
    convert(&memfd, range(HUGE, HUGE), Visibility::Private);
    bench.row(
        Row::new("vs_double_backing_2m", "punch_fault_and_copy", 40).at_most(0.1),
        || {
            convert(&memfd, range(HUGE, HUGE), Visibility::Shared);
            let sum = bare::touch(pointer, HUGE);
            convert(&memfd, range(HUGE, HUGE), Visibility::Private);
            sum + guest.touch(HUGE, HUGE)
        },
        || {
            bare::copy(&private, &shared, HUGE, HUGE);
            bare::punch(&files.0, HUGE, HUGE).expect("it can be punched");
            let sum = shared.touch(HUGE, HUGE);
            bare::copy(&shared, &private, HUGE, HUGE);
            bare::punch(&files.1, HUGE, HUGE).expect("it can be punched");
            sum + private.touch(HUGE, HUGE)
        },
    );
    Ok(())
}

/// One of many pages, each other of which is private, as far as the kernel lets the peer.
fn mprotect(bench: &mut Bench) -> Outcome<()> {
    let len = 16 * MIB;
    let (memfd, view) = viewed(len, Pages::Small)?;
    let file = bare::memfd(len, Pages::Small)?;
    let peer = Map::new(&file, len)?;
    peer.populate(Pages::Small)?;
    for at in (0..len).step_by(4 * PAGE) {
        convert(&memfd, range(at, PAGE), Visibility::Private);
        peer.protect(at, PAGE, libc::PROT_NONE)?;
    }
    let at = HUGE + 2 * PAGE;
    let pointer = view.pointer(Offset::new(at as u64), ByteSize::from_pages(1));
    let pointer = pointer.ok_or("no pointer")?.as_ptr();
    bench.row(
        Row::new("vs_mprotect_4k", "mprotect_none_and_back", 2_000).at_most(0.8),
        || {
            both_ways(&memfd, range(at, PAGE));
            bare::touch(pointer, PAGE)
        },
        || {
            peer.protect(at, PAGE, libc::PROT_NONE).expect("there is room");
            peer.protect(at, PAGE, libc::PROT_READ | libc::PROT_WRITE).expect("as before");
            peer.touch(at, PAGE)
        },
    );
    beyond_the_limit()
}

/// How far each of the two gets with alternating pages.
fn beyond_the_limit() -> Outcome<()> {
    let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count")?.trim().parse()?;
    let len = ((limit + 2_000) * PAGE).next_multiple_of(HUGE);
    let peer = Map::new(&bare::memfd(len, Pages::Small)?, len)?;
    let pages = (0..len).step_by(2 * PAGE);
    let nr_protected =
        pages.clone().take_while(|&at| peer.protect(at, PAGE, libc::PROT_NONE).is_ok()).count();
    drop(peer);
    let (memfd, _view) = viewed(len, Pages::Small)?;
    let ranges: Vec<_> = pages.map(|at| range(at, PAGE)).collect();
    let done = memfd.convert_ranges(&ranges, Visibility::Private, &ConvertOptions::default())?;
    println!(
        "# vs_mprotect_4k: of {} alternating pages mprotect hides {nr_protected}, we {}",
        ranges.len(),
        done.changed_pages()
    );
    Ok(())
}

/// What the first touch of a page costs, from an object without memory. Ours comes with the view, which has to have
/// what raw pointers may touch: it is counted.
fn guest_memfd_touch(bench: &mut Bench) -> Outcome<()> {
    let row = Row::new("vs_guest_memfd_touch", "guest_memfd_first_touch", 1).at_most(0.5);
    let len = 16 * MIB;
    let per_page = |time: f64| time / (len / PAGE) as f64;
    let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        let size = ByteSize::from_bytes(len as u64);
        let pool = FolioPool::new(ArenaBacking::Memfd, size)?;
        let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?;
        let mut view = None;
        our_times.push(per_page(timed(|| {
            let view = view.insert(memfd.map_view().expect("a view"));
            let pointer = view.pointer(Offset::new(0), size).expect("all of it");
            bare::touch(pointer.as_ptr(), len)
        })));
        let peer = Map::new(&bare::guest_memfd(len)?, len)?;
        peer_times.push(per_page(timed(|| peer.touch(0, len))));
    }
    bench.print(row, median(our_times), median(peer_times));
    Ok(())
}

fn timed<R>(call: impl FnOnce() -> R) -> f64 {
    let start = bare::cpu_time();
    std::hint::black_box(call());
    bare::cpu_time() - start
}

fn checked_copies(bench: &mut Bench) -> Outcome<()> {
    let (memfd, view) = viewed(8 * MIB, Pages::Small)?;
    // The page has been pinned, so it has a word of its own.
    let owner = memfd.register_owner("bench")?;
    drop(memfd.pin(PgoffRange::single(Pgoff::new(1))?, owner, PinMode::Counted)?);
    let plain: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 * MIB)])?;
    let (mut ours, mut theirs) = (vec![0; 3 * PAGE], vec![0; 3 * PAGE]);
    plain.write_slice(&theirs[..PAGE], GuestAddress(PAGE as u64))?;
    let at = Offset::new(PAGE as u64);
    let (mut our_place, mut their_place) = (Places::of(&ours), Places::of(&theirs));
    let row = Row::new("read_4k", "vm_memory_read_slice", 20_000).at_most(1.1);
    bench.row(
        row,
        || view.read(at, &mut ours[our_place.next()]).expect("shared memory"),
        || {
            let buffer = &mut theirs[their_place.next()];
            plain.read_slice(buffer, GuestAddress(PAGE as u64)).expect("memory");
        },
    );
    bench.row(
        Row { name: "write_4k", peer: "vm_memory_write_slice", ..row },
        || view.write(at, &ours[our_place.next()]).expect("shared memory"),
        || {
            let buffer = &theirs[their_place.next()];
            plain.write_slice(buffer, GuestAddress(PAGE as u64)).expect("memory");
        },
    );
    Ok(())
}

/// Where the 4 KiB of a copy lie on the caller's side, one place after the other: a copy of the peer's takes
/// 40 ns or 150 by how far the two sides are apart, modulo 4 KiB, and on a stack that is chance.
struct Places {
    page: usize,
    nr_taken: usize,
}

impl Places {
    const IN_PAGE: [usize; 8] = [0, 64, 256, 512, 1024, 2048, 3072, 4032];

    fn of(buffer: &[u8]) -> Self {
        Self { page: buffer.as_ptr().align_offset(PAGE), nr_taken: 0 }
    }

    fn next(&mut self) -> Range<usize> {
        let start = self.page + Self::IN_PAGE[self.nr_taken % Self::IN_PAGE.len()];
        self.nr_taken += 1;
        start..start + PAGE
    }
}

/// The way that is documented for it.
fn file_to_guest(bench: &mut Bench) -> Outcome<()> {
    let len = 256 * MIB;
    let source: File = bare::memfd(len, Pages::Small)?;
    Map::new(&source, len)?.populate(Pages::Small)?;
    let (memfd, _view) = viewed(len, Pages::Small)?;
    let owner = memfd.register_owner("loader")?;
    let size = ByteSize::from_bytes(len as u64);
    let start = FilePlace::At(ByteSize::from_bytes(0));
    let peer = Map::new(&bare::memfd(len, Pages::Small)?, len)?;
    peer.populate(Pages::Small)?;
    bench.row(
        Row::new("file_to_guest", "read_into_a_memfd", 1).at_most(1.1),
        || {
            let done = memfd.read_from_file(&source, start, Offset::new(0), size, owner);
            assert!(done.expect("shared memory").is_complete());
        },
        || bare::read_into(&source, peer.at(0), len).expect("a file"),
    );
    Ok(())
}
