//! What state costs: `cargo bench --bench state -- [--quick] [PART OF A ROW'S NAME]`.
//!
//! Each row measures ours and a peer in the same process, turn by turn, and prints medians:
//! `row NAME ours=NS peer=PEERNAME peer_ns=NS ratio=R`. Everything is measured from outside, through the
//! public interface. design/benchmarks.md says what the rows mean and has figures.

#[path = "../common/mod.rs"]
mod harness;
mod state_only;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, mpsc};
use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::error::Error;
use gmem::range::PgoffRange;
use gmem::{
    ArenaBacking, ContentPolicy, ConvertOptions, FolioPool, GuestMemfd, PinMode, Visibility,
};
use harness::{Bench, Goal, Random, median, print_row};
use state_only::StateOnly;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const GIB_PAGES: u64 = 1 << 18;

fn main() -> Outcome<()> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    // cargo adds `--bench`.
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let bench = Bench::new(quick, filter.unwrap_or_default().leak());

    pins(bench)?;
    accesses(bench)?;
    uniform_conversions(bench)?;
    scattered_conversions(bench)?;
    threads(bench)
}

/// Shared memory that nobody has touched, on the heap.
fn shared(nr_pages: u64) -> Result<GuestMemfd, Error> {
    let size = ByteSize::from_pages(nr_pages);
    let pool = FolioPool::new(ArenaBacking::Heap, size)?;
    GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)
}

fn page(at: u64) -> Result<PgoffRange, Error> {
    PgoffRange::single(Pgoff::new(at))
}

fn both_ways(memfd: &GuestMemfd, range: PgoffRange) -> Result<u64, Error> {
    let there = memfd.convert(range, Visibility::Private, ContentPolicy::Preserve)?;
    let back = memfd.convert(range, Visibility::Shared, ContentPolicy::Preserve)?;
    Ok(there.changed_pages() + back.changed_pages())
}

/// One exchange of a word of the peer's.
fn bare_cas(word: &AtomicU64, from: u64, to: u64) -> bool {
    // Relaxed: the peer is the bare instruction.
    word.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

fn bare_words(nr_words: u64) -> Vec<AtomicU64> {
    (0..nr_words).map(|_| AtomicU64::new(0)).collect()
}

fn pins(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["pin_unpin_4k", "pin_unpin_2m_uniform", "pin_unpin_2m_split"]) {
        return Ok(());
    }
    let memfd = shared(2048)?;
    let owner = memfd.register_owner("bench")?;
    // Something else is pinned in the same block, so that the page has a word of its own.
    let _other = memfd.pin(page(8)?, owner, PinMode::Counted)?;
    let range = page(7)?;
    let word = AtomicU64::new(0);
    bench.row(
        "pin_unpin_4k",
        "two_bare_rmw",
        Goal::AtMost(1.3),
        || drop(memfd.pin(range, owner, PinMode::Counted).expect("a pin")),
        // Relaxed: the peer is the bare instruction.
        || word.fetch_add(1, Ordering::Relaxed) + word.fetch_sub(1, Ordering::Relaxed),
    );
    let whole = PgoffRange::new(Pgoff::new(1024), 512)?;
    bench.row(
        "pin_unpin_2m_uniform",
        "two_bare_rmw",
        Goal::None,
        || drop(memfd.pin(whole, owner, PinMode::Counted).expect("a pin")),
        // Relaxed: the peer is the bare instruction.
        || word.fetch_add(1, Ordering::Relaxed) + word.fetch_sub(1, Ordering::Relaxed),
    );
    let split = PgoffRange::new(Pgoff::new(0), 512)?;
    bench.slower(100).row(
        "pin_unpin_2m_split",
        "1024_bare_rmw",
        Goal::None,
        || drop(memfd.pin(split, owner, PinMode::Counted).expect("a pin")),
        || {
            for _ in 0..512 {
                // Relaxed: the peer is the bare instruction.
                word.fetch_add(1, Ordering::Relaxed);
                word.fetch_sub(1, Ordering::Relaxed);
            }
        },
    );
    Ok(())
}

fn accesses(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["access_8b", "access_8b_uniform"]) {
        return Ok(());
    }
    let size = ByteSize::from_mib(8);
    let pool = FolioPool::new(ArenaBacking::Memfd, size)?;
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?;
    memfd.allocate(memfd.pages())?;
    // The page has been pinned, so it has a word of its own.
    let owner = memfd.register_owner("bench")?;
    drop(memfd.pin(page(1)?, owner, PinMode::Counted)?);
    let size = size.get() as usize;
    let plain: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)])?;
    plain.write_obj(0u64, GuestAddress(4096))?;
    let view = match memfd.map_view() {
        Ok(view) => view,
        Err(error) => {
            println!("# access_8b is NOT MEASURED: no view, {error}");
            return Ok(());
        }
    };
    let mut buf = [0; 8];
    // A page with a word of its own, and one in a block that has one word.
    for (name, at) in [("access_8b", 4096), ("access_8b_uniform", 6 << 20)] {
        bench.row(
            name,
            "vm_memory_read_obj",
            Goal::AtMost(1.0),
            || view.read(Offset::new(at), &mut buf).expect("shared memory"),
            || plain.read_obj::<u64>(GuestAddress(at)).expect("memory"),
        );
    }
    Ok(())
}

/// The rows of state alone, and the same through the object's own calls.
fn uniform_conversions(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["convert_1g_uniform", "convert_2m_uniform", "convert_2m_uniform_object"])
    {
        return Ok(());
    }
    let words = bare_words(GIB_PAGES);
    let all = PgoffRange::new(Pgoff::new(0), GIB_PAGES)?;
    let state = StateOnly::new(all)?;
    bench.slower(4_000).ours_per_peer(4_000).row(
        "convert_1g_uniform",
        "524288_bare_cas",
        Goal::AtMost(0.0002),
        || state.both_ways(&[all]),
        || cas_both_ways(&words),
    );
    // A part of it differs, so that the rest is made of blocks of 2 MiB.
    state.convert(&[page(0)?], Visibility::Private);
    let huge = PgoffRange::new(Pgoff::new(512), 512)?;
    bench.slower(10).row(
        "convert_2m_uniform",
        "1024_bare_cas",
        Goal::AtMost(0.05),
        || state.both_ways(&[huge]),
        || cas_both_ways(&words[..512]),
    );

    let memfd = shared(2048)?;
    let _ = memfd.convert(page(0)?, Visibility::Private, ContentPolicy::Preserve)?;
    for (name, suffix) in
        [("convert_2m_uniform_object", ""), ("convert_2m_uniform_object", "_beside_a_reader")]
    {
        let name = format!("{name}{suffix}");
        let row = || {
            bench.slower(10).row(
                &name,
                "1024_bare_cas",
                Goal::None,
                || both_ways(&memfd, huge).expect("nobody is in the way"),
                || cas_both_ways(&words[..512]),
            );
            Ok(())
        };
        if suffix.is_empty() { row()? } else { beside_a_reader(row)? }
    }
    Ok(())
}

fn cas_both_ways(words: &[AtomicU64]) -> bool {
    let turned = |from, to| words.iter().all(|word| bare_cas(word, from, to));
    turned(0, 1) && turned(1, 0)
}

fn metadata(bench: Bench, memfd: &GuestMemfd) -> Outcome<()> {
    let struct_pages = (GIB_PAGES * 64) as f64;
    let nr_gib = memfd.pages().nr_pages() as f64 / GIB_PAGES as f64;
    let row = |name, bytes: ByteSize, goal: f64| {
        let (bytes, goal) = (bytes.get() as f64 / nr_gib, Goal::AtMost(goal / struct_pages));
        if bench.wants(name) {
            let ratio = bytes / struct_pages;
            print_row(name, bytes, "struct_page_bytes", struct_pages, ratio, goal);
        }
    };
    row("metadata_uniform", memfd.stat().metadata, 64.0);
    let rss_before = anonymous_memory()?;
    for at in (0..memfd.pages().nr_pages()).step_by(2) {
        let _ = memfd.convert(page(at)?, Visibility::Private, ContentPolicy::Preserve)?;
    }
    row("metadata_all_different", memfd.stat().metadata, 2.2 * 1024.0 * 1024.0);
    let grown = anonymous_memory()?.saturating_sub(rss_before);
    println!(
        "# metadata_all_different: the kernel says that the process has grown by {grown} bytes"
    );
    Ok(())
}

/// What the process has of anonymous memory, and of page tables for it, in bytes.
fn anonymous_memory() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
            .ok_or("no such line")
    };
    Ok((kib("RssAnon:")? + kib("VmPTE:")?) * 1024)
}

fn scattered_conversions(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&[
        "metadata_uniform",
        "metadata_all_different",
        "convert_4k_random",
        "convert_scattered",
        "convert_4k_random_object_beside_a_reader",
        "convert_scattered_beside_a_reader",
    ]) {
        return Ok(());
    }
    let memfd = shared(4 * GIB_PAGES)?;
    metadata(bench, &memfd)?;
    random_pages(bench)?;
    scattered(bench, &memfd, "")?;
    beside_a_reader(|| scattered(bench, &memfd, "_beside_a_reader"))
}

/// State alone, where every page has a word of its own.
fn random_pages(bench: Bench) -> Outcome<()> {
    if !bench.wants("convert_4k_random") {
        return Ok(());
    }
    let all = PgoffRange::new(Pgoff::new(0), 4 * GIB_PAGES)?;
    let state = StateOnly::new(all)?;
    for at in (0..all.nr_pages()).step_by(2) {
        state.convert(&[page(at)?], Visibility::Private);
    }
    let words = bare_words(all.nr_pages());
    let (mut ours, mut theirs) = (Random::new(), Random::new());
    bench.row(
        "convert_4k_random",
        "two_bare_cas",
        Goal::AtMost(4.0),
        || state.both_ways(&[page(ours.below(all.nr_pages()) | 1).expect("a page")]),
        || {
            // A word for each way. Most are one by now; an exchange that fails costs the same.
            let [there, back] = [(); 2].map(|()| &words[theirs.below(all.nr_pages()) as usize | 1]);
            bare_cas(there, 0, 1) | bare_cas(back, 0, 1)
        },
    );
    // The same when each call has to wait for the one before: how long one takes, where the row above
    // says how many a core gets done, for the peer's next exchange begins before the last one ends.
    let (mut our_last, mut their_last) = (0, 0);
    bench.row(
        "convert_4k_random_in_turn",
        "two_bare_cas_in_turn",
        Goal::None,
        || {
            let at = (ours.below(all.nr_pages() - 2) + our_last) | 1;
            page(at).map(|at| our_last = state.both_ways(&[at]) & 2)
        },
        || {
            for _ in 0..2 {
                let at = (theirs.below(all.nr_pages() - 2) + their_last) | 1;
                their_last = u64::from(bare_cas(&words[at as usize], 0, 1)) * 2;
            }
        },
    );
    Ok(())
}

/// The object's pages have words of their own, all of them.
fn scattered(bench: Bench, memfd: &GuestMemfd, suffix: &str) -> Outcome<()> {
    let nr_pages = memfd.pages().nr_pages();
    let words = bare_words(nr_pages);
    let (mut ours, mut theirs) = (Random::new(), Random::new());
    bench.row(
        &format!("convert_4k_random_object{suffix}"),
        "two_bare_cas",
        Goal::None,
        || {
            // Each other page is private.
            let at = page(ours.below(nr_pages) | 1).expect("a page");
            both_ways(memfd, at).expect("nobody is in the way")
        },
        || {
            // A word for each way. From one to zero would fail on most, and cost the same.
            let [there, back] = [(); 2].map(|()| &words[(theirs.below(nr_pages) | 1) as usize]);
            bare_cas(there, 0, 1) | bare_cas(back, 0, 1)
        },
    );

    let mut random = Random::new();
    let pages: Result<Vec<_>, _> = (0..1024).map(|_| page(random.below(nr_pages) | 1)).collect();
    let mut pages = pages?;
    pages.sort_by_key(PgoffRange::start);
    pages.dedup();
    let mut shuffled = pages.clone();
    for at in (1..shuffled.len()).rev() {
        shuffled.swap(at, random.below(at as u64 + 1) as usize);
    }
    let options = ConvertOptions::default();
    bench.slower(400).row(
        &format!("convert_scattered{suffix}"),
        "single_calls",
        if suffix.is_empty() { Goal::AtMost(0.7) } else { Goal::None },
        || {
            for to in [Visibility::Private, Visibility::Shared] {
                let done = memfd.convert_ranges(&shuffled, to, &options);
                assert_eq!(done.map(|done| done.changed_pages()), Ok(shuffled.len() as u64));
            }
        },
        || {
            for to in [Visibility::Private, Visibility::Shared] {
                for &page in &shuffled {
                    let done = memfd.convert(page, to, ContentPolicy::Preserve);
                    assert_eq!(done.map(|done| done.changed_pages()), Ok(1));
                }
            }
        },
    );
    Ok(())
}

/// Runs `rows` while another thread reads guest memory all the time, as vCPU and device threads do: then
/// a grace period is a system call that interrupts the other core.
fn beside_a_reader(rows: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let memfd = shared(512)?;
    memfd.allocate(memfd.pages())?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (entered, ready) = mpsc::channel();
        let (memfd, stop) = (&memfd, &stop);
        scope.spawn(move || {
            let mut buf = [0; 8];
            let mut outcome = memfd.read(Offset::new(0), &mut buf);
            let _ = entered.send(());
            // Relaxed: pairs with nothing; it ends a loop.
            while outcome.is_ok() && !stop.load(Ordering::Relaxed) {
                outcome = memfd.read(Offset::new(0), &mut buf);
            }
            outcome.expect("shared memory can be read");
        });
        let outcome = ready.recv().map_err(Into::into).and_then(|()| rows());
        // Relaxed: as above.
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

/// How much more two threads do than one.
fn threads(bench: Bench) -> Outcome<()> {
    if !bench.wants_any(&["threads_2", "threads_2_bare_rmw"]) {
        return Ok(());
    }
    let memfd = shared(2048)?;
    let owner = memfd.register_owner("bench")?;
    let others: Result<Vec<_>, Error> =
        [8, 520].into_iter().map(|at| memfd.pin(page(at)?, owner, PinMode::Counted)).collect();
    let _others = others?;
    let words: Vec<_> = bare_words(64);
    speedup(bench, "threads_2", "one_thread", Goal::AtLeast(1.8), |thread, nr_calls| {
        let range = page(7 + 512 * thread).expect("a page");
        for _ in 0..nr_calls {
            drop(memfd.pin(range, owner, PinMode::Counted).expect("a pin"));
        }
    });
    // What the machine has to give: nothing is shared but the caches' wires.
    speedup(bench, "threads_2_bare_rmw", "one_thread", Goal::None, |thread, nr_calls| {
        let word = &words[32 * thread as usize];
        for _ in 0..nr_calls {
            // Relaxed: the peer is the bare instruction.
            word.fetch_add(1, Ordering::Relaxed);
            word.fetch_sub(1, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Prints how long a call takes with two threads at it and with one, and how many times as fast two are.
fn speedup(bench: Bench, name: &str, peer: &str, goal: Goal, work: impl Fn(u64, u32) + Sync) {
    if !bench.wants(name) {
        return;
    }
    let nr_calls = bench.calls_per_run() * 50;
    let time = |nr_threads: u64| {
        let barrier = Barrier::new(nr_threads as usize);
        let run = |thread| {
            barrier.wait();
            let start = Instant::now();
            work(thread, nr_calls);
            start.elapsed()
        };
        let longest: Duration = std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> =
                (0..nr_threads).map(|thread| scope.spawn(move || run(thread))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .max()
                .unwrap_or_default()
        });
        longest.as_nanos() as f64 / (f64::from(nr_calls) * nr_threads as f64)
    };
    let (mut two, mut one) = (Vec::new(), Vec::new());
    for _ in 0..bench.runs() {
        two.push(time(2));
        one.push(time(1));
    }
    let (two, one) = (median(two), median(one));
    print_row(name, two, peer, one, one / two, goal);
}
