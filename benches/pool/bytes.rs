//! The rows about memory that is there: first touches, scrubbing, migration, what is resident.

use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Offset};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PartSpec, Scrubber, Visibility, Zone,
};

use crate::harness::{Bench, Goal, Random, print_row, time};
use crate::kernel::{Mapped, Pages};
use crate::setting::{NR_HUGEPAGES, SHMEM_ENABLED, Setting};
use crate::{Outcome, kib_of_status};

const HUGE: usize = 2 << 20;
const BASE: usize = 4 << 10;

/// How many pages of 2 MiB the rows on hugetlb need: ours and the peer's.
const NR_HUGEPAGES_WANTED: &str = "96";

fn shared(pool: &FolioPool, bytes: usize, folio: FolioSize) -> Outcome<GuestMemfd> {
    let size = ByteSize::from_bytes(bytes as u64);
    let builder = GuestMemfd::builder(size).folio_size(folio).initial(Visibility::Shared);
    Ok(builder.create(pool)?)
}

fn touch(memfd: &GuestMemfd, at: usize) {
    memfd.write(Offset::new(at as u64), &[1]).expect("shared memory");
}

/// Sets a host setting as long as the rows run; says aloud if it cannot.
fn with_setting(
    names: &str,
    path: &'static str,
    value: &str,
    rows: impl FnOnce() -> Outcome<()>,
) -> Outcome<()> {
    if let Err(error) = std::fs::OpenOptions::new().write(true).open(path) {
        println!("# {names}: NOT MEASURED, {path}: {error}");
        return Ok(());
    }
    let _setting = Setting::set(path, value);
    let has = std::fs::read_to_string(path)?;
    if has.trim() != value && !has.contains(&format!("[{value}]")) {
        println!("# {names}: NOT MEASURED, {path} says {} where {value} was asked", has.trim());
        return Ok(());
    }
    rows()
}

pub(crate) fn rows(bench: Bench) -> Outcome<()> {
    if bench.wants_any(&["first_touch_4k_clean", "first_touch_4k_clean_alone"]) {
        first_touches(bench, "4k", FolioSize::Base, Goal::AtMost(0.5))?;
    }
    if bench.wants_any(&["first_touch_4k_view", "first_touch_4k_view_alone"]) {
        first_touches_in_view(bench, "4k", FolioSize::Base, Goal::None)?;
    }
    let clean = ["first_touch_2m_clean", "first_touch_2m_clean_alone"];
    let in_view = ["first_touch_2m_view", "first_touch_2m_view_alone"];
    if bench.wants_any(&clean) || bench.wants_any(&in_view) || bench.wants("migrate_2m") {
        with_setting("rows on hugetlb", NR_HUGEPAGES, NR_HUGEPAGES_WANTED, || {
            if bench.wants_any(&clean) {
                first_touches(bench, "2m", FolioSize::Huge2M, Goal::AtMost(0.05))?;
            }
            if bench.wants_any(&in_view) {
                first_touches_in_view(bench, "2m", FolioSize::Huge2M, Goal::AtMost(0.1))?;
            }
            migrate(bench, "migrate_2m", ArenaBacking::MemfdHugetlb2M)
        })?;
    }
    scrub(bench)?;
    if bench.wants("migrate_2m_thp") {
        with_setting("migrate_2m_thp", SHMEM_ENABLED, "advise", || {
            migrate(bench, "migrate_2m_thp", ArenaBacking::MemfdThp)
        })?;
    }
    migrate(bench, "migrate_2m_in_4k_pages", ArenaBacking::Memfd)?;
    rss(bench)
}

/// What first touches are of.
struct Warm {
    pool: FolioPool,
    pages: Pages,
    /// How large a folio is, and what as many of them as there are calls take.
    bytes: usize,
    all: usize,
    bench: Bench,
}

fn warm(bench: Bench, folio: FolioSize) -> Outcome<Warm> {
    let (backing, pages, bytes, bench) = match folio {
        FolioSize::Base => (ArenaBacking::Memfd, Pages::Plain, BASE, bench.slower(20)),
        _ => {
            // As many as there are pages for; fewer would count the first, for which nothing is in a cache.
            let bench = bench.slower(bench.calls_per_run() / 20);
            (ArenaBacking::MemfdHugetlb2M, Pages::Huge2M, HUGE, bench)
        }
    };
    let all = bench.calls_per_run() as usize * bytes;
    let pool = FolioPool::new(backing, ByteSize::from_bytes(all as u64))?;
    // Its pages are in this process's page tables from now on, as they are in a VMM that has run a while.
    let warm = shared(&pool, all, folio)?;
    (0..all).step_by(bytes).for_each(|at| touch(&warm, at));
    drop(warm);
    Ok(Warm { pool, pages, bytes, all, bench })
}

fn first_touches(bench: Bench, name: &str, folio: FolioSize, goal: Goal) -> Outcome<()> {
    let Warm { pool, pages, bytes, all, bench } = warm(bench, folio)?;
    bench.timed_row(
        &format!("first_touch_{name}_clean"),
        "new_memfd_mapped_and_faulted",
        goal,
        |nr_calls| {
            time_and_keep(nr_calls, &mut || {
                let memfd = shared(&pool, bytes, folio).expect("the pool has room");
                touch(&memfd, 0);
                memfd
            })
        },
        |nr_calls| {
            time_and_keep(nr_calls, &mut || {
                let mapped = Mapped::new(pages, bytes).expect("the host has room");
                mapped.touch(0);
                mapped
            })
        },
    );
    bench.timed_row(
        &format!("first_touch_{name}_clean_alone"),
        "fault",
        goal,
        |nr_calls| {
            let memfd = shared(&pool, all, folio).expect("the pool has room");
            let mut at = 0;
            time(nr_calls, &mut || {
                touch(&memfd, at);
                at += bytes;
            })
        },
        |nr_calls| {
            let mapped = Mapped::new(pages, all).expect("the host has room");
            let mut at = 0;
            time(nr_calls, &mut || {
                mapped.touch(at);
                at += bytes;
            })
        },
    );
    Ok(())
}

/// The same where a view has the object mapped: what comes is out of the reach of raw pointers until it is
/// registered.
fn first_touches_in_view(bench: Bench, name: &str, folio: FolioSize, goal: Goal) -> Outcome<()> {
    let Warm { pool, pages, bytes, all, bench } = warm(bench, folio)?;
    if let Err(error) = shared(&pool, bytes, folio)?.map_view() {
        println!("# first_touch_{name}_view: NOT MEASURED, no view: {error}");
        return Ok(());
    }
    let private = GuestMemfd::builder(ByteSize::from_bytes(bytes as u64)).folio_size(folio);
    bench.timed_row(
        &format!("first_touch_{name}_view"),
        "new_memfd_mapped_and_faulted",
        Goal::None,
        |nr_calls| {
            time_and_keep(nr_calls, &mut || {
                let memfd = private.clone().create(&pool).expect("the pool has room");
                let view = memfd.map_view().expect("the host has room");
                let done =
                    memfd.convert(memfd.pages(), Visibility::Shared, ContentPolicy::Preserve);
                done.map(drop).expect("nobody has it");
                touch(&memfd, 0);
                view
            })
        },
        |nr_calls| {
            time_and_keep(nr_calls, &mut || {
                let mapped = Mapped::new(pages, bytes).expect("the host has room");
                mapped.touch(0);
                mapped
            })
        },
    );
    bench.timed_row(
        &format!("first_touch_{name}_view_alone"),
        "fault",
        goal,
        |nr_calls| {
            let memfd = shared(&pool, all, folio).expect("the pool has room");
            let _view = memfd.map_view().expect("the host has room");
            // It has all of its folios since it was mapped.
            memfd.punch_hole(memfd.pages()).expect("nobody has it");
            let mut at = 0;
            time(nr_calls, &mut || {
                touch(&memfd, at);
                at += bytes;
            })
        },
        |nr_calls| {
            let mapped = Mapped::new(pages, all).expect("the host has room");
            let mut at = 0;
            time(nr_calls, &mut || {
                mapped.touch(at);
                at += bytes;
            })
        },
    );
    Ok(())
}

/// How many nanoseconds one of so many calls takes, without what it takes to drop their results.
fn time_and_keep<R>(nr_calls: u32, call: &mut impl FnMut() -> R) -> f64 {
    let mut kept = Vec::with_capacity(nr_calls as usize);
    let start = Instant::now();
    for _ in 0..nr_calls {
        kept.push(call());
    }
    start.elapsed().as_nanos() as f64 / f64::from(nr_calls)
}

/// A thread that leaves everything dirty: somebody else is to scrub.
fn idle_scrubber(pool: &FolioPool) -> Outcome<Scrubber> {
    Ok(pool.start_scrubber(ByteSize::from_bytes(0))?)
}

fn scrub(bench: Bench) -> Outcome<()> {
    if !bench.wants("scrub") {
        return Ok(());
    }
    let bytes = 32 * HUGE;
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_bytes(bytes as u64))?;
    let _scrubber = idle_scrubber(&pool)?;
    let resident = Mapped::resident(Pages::Plain, bytes)?;
    let per_folio = |start: Instant| start.elapsed().as_nanos() as f64 / 32.0;
    bench.timed_row(
        "scrub",
        "memset",
        Goal::AtMost(1.1),
        |_| {
            let memfd = shared(&pool, bytes, FolioSize::Huge2M).expect("the pool has room");
            (0..bytes).step_by(BASE).for_each(|at| touch(&memfd, at));
            drop(memfd);
            let start = Instant::now();
            let scrubbed = pool.scrub();
            let time = per_folio(start);
            assert_eq!(scrubbed, ByteSize::from_bytes(bytes as u64));
            time
        },
        |_| {
            (0..bytes).step_by(BASE).for_each(|at| resident.touch(at));
            let start = Instant::now();
            resident.fill(0);
            per_folio(start)
        },
    );
    Ok(())
}

/// A folio goes from one zone to the other and back, in sight of a host view.
fn migrate(bench: Bench, name: &str, backing: ArenaBacking) -> Outcome<()> {
    let alone = format!("{name}_without_scrubber");
    let one_after_another = format!("{name}_one_after_another");
    if !bench.wants_any(&[name, &alone, &one_after_another]) {
        return Ok(());
    }
    let part = || PartSpec::new([backing], ByteSize::from_bytes(8 * HUGE as u64));
    let pool =
        FolioPool::builder().part(part(), Zone::Normal).part(part(), Zone::Movable).create()?;
    let memfd = GuestMemfd::builder(ByteSize::from_bytes(HUGE as u64))
        .folio_size(FolioSize::Huge2M)
        .initial(Visibility::Shared)
        .zones(&[Zone::Movable, Zone::Normal])
        .create(&pool)?;
    let _view = match memfd.map_view() {
        Ok(view) => view,
        Err(error) => {
            println!("# {name}: NOT MEASURED, no view: {error}");
            return Ok(());
        }
    };
    (0..HUGE).step_by(BASE).for_each(|at| touch(&memfd, at));
    let pages = match backing {
        ArenaBacking::MemfdHugetlb2M => Pages::Huge2M,
        _ => Pages::Plain,
    };
    if backing == ArenaBacking::MemfdThp {
        let (huge, all) = (pool.stat().huge.get() >> 20, pool.stat().capacity.get() >> 20);
        println!("# {name}: {huge} of {all} MiB in huge pages");
    }
    let (one, two) = (Mapped::resident(pages, HUGE)?, Mapped::resident(pages, HUGE)?);
    let mut to = [Zone::Normal, Zone::Movable].into_iter().cycle();
    let mut move_it = || {
        let to = to.next().expect("one of two");
        let done = memfd.migrate(memfd.pages(), to).expect("a zone of the object's");
        assert_eq!(done.moved.get(), HUGE as u64, "{:?}", done.refused);
    };
    let mut buffers = [(&one, &two), (&two, &one)].into_iter().cycle();
    let mut copy = || {
        let (from, to) = buffers.next().expect("one of two");
        to.copy_from(from);
    };
    let bench = bench.slower(200);
    // What it leaves it scrubs before it returns.
    bench.row(&alone, "memcpy", Goal::None, &mut move_it, &mut copy);
    let _scrubber = pool.start_scrubber(pool.stat().capacity)?;
    // Beside the scrubber, which is busy with what the one before left.
    bench.row(&one_after_another, "memcpy", Goal::None, &mut move_it, &mut copy);
    bench.timed_row(
        name,
        "memcpy",
        Goal::AtMost(1.5),
        |nr_calls| time_apart(nr_calls, &mut move_it),
        |nr_calls| time_apart(nr_calls, &mut copy),
    );
    Ok(())
}

/// How many nanoseconds one call takes when the scrubber is done with what the one before left.
fn time_apart(nr_calls: u32, call: &mut impl FnMut()) -> f64 {
    let mut sum = Duration::ZERO;
    for _ in 0..nr_calls {
        std::thread::sleep(Duration::from_micros(500));
        let start = Instant::now();
        call();
        sum += start.elapsed();
    }
    sum.as_nanos() as f64 / f64::from(nr_calls)
}

fn rss(bench: Bench) -> Outcome<()> {
    if !bench.wants("rss_mixed") {
        return Ok(());
    }
    let bytes = 128 * HUGE;
    let pool = FolioPool::new(ArenaBacking::Memfd, ByteSize::from_bytes(bytes as u64))?;
    let memfd = shared(&pool, bytes, FolioSize::Huge2M)?;
    (0..bytes).step_by(BASE).for_each(|at| touch(&memfd, at));
    let resident = || kib_of_status("VmRSS:").map(|kib| kib as f64 * 1024.0);
    let before = resident()?;
    let mut random = Random::new();
    let mut changed = 0;
    for page in memfd.pages().iter().filter(|_| random.below(2) == 0) {
        let page = PgoffRange::single(page)?;
        let done = memfd.convert(page, Visibility::Private, ContentPolicy::Preserve)?;
        changed += done.changed_pages();
    }
    let after = resident()?;
    print_row("rss_mixed", after, "bytes_before", before, after / before, Goal::AtMost(1.01));
    println!(
        "# rss_mixed: {changed} of {} pages converted; {} MiB of the pool used before and after",
        memfd.pages().nr_pages(),
        pool.stat().used.get() >> 20
    );
    Ok(())
}
