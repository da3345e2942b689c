//! What state costs: `cargo bench --bench state -- [--quick]`.
//!
//! Each row measures ours and a peer in the same process, turn by turn, and prints medians:
//! `row NAME ours=NS peer=PEERNAME peer_ns=NS ratio=R`.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::error::Error;
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PinMode, Visibility};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

struct Bench {
    runs: usize,
    calls_per_run: u32,
}

impl Bench {
    /// Runs both in turn and prints the row. The bodies are what one call is; their results are
    /// kept from the optimiser.
    fn row<A, B>(
        &self,
        name: &str,
        peer: &str,
        mut ours: impl FnMut() -> A,
        mut theirs: impl FnMut() -> B,
    ) {
        let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            our_times.push(self.time(&mut ours));
            peer_times.push(self.time(&mut theirs));
        }
        let (ours, theirs) = (median(our_times), median(peer_times));
        let ratio = ours / theirs;
        println!("row {name} ours={ours:.1} peer={peer} peer_ns={theirs:.1} ratio={ratio:.3}");
    }

    fn time<R>(&self, call: &mut impl FnMut() -> R) -> f64 {
        let start = Instant::now();
        for _ in 0..self.calls_per_run {
            black_box(call());
        }
        start.elapsed().as_nanos() as f64 / f64::from(self.calls_per_run)
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn convert(memfd: &GuestMemfd, range: PgoffRange) -> Result<u64, Error> {
    let there = memfd.convert(range, Visibility::Private, ContentPolicy::Preserve)?;
    let back = memfd.convert(range, Visibility::Shared, ContentPolicy::Preserve)?;
    Ok(there.changed_pages() + back.changed_pages())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (runs, calls_per_run) = if quick { (5, 2_000) } else { (31, 20_000) };
    let bench = Bench { runs, calls_per_run };

    let size = ByteSize::from_mib(8);
    let pool = FolioPool::new(ArenaBacking::Memfd, size)?;
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?;
    memfd.allocate(memfd.pages())?;
    let plain: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size.get() as usize)])?;
    plain.write_obj(0u64, GuestAddress(4096))?;

    let mut buf = [0; 8];
    bench.row(
        "access_8b",
        "vm_memory_read_obj",
        || memfd.read(Offset::new(4096), &mut buf),
        || plain.read_obj::<u64>(GuestAddress(4096)),
    );

    let owner = memfd.register_owner("bench")?;
    let page = PgoffRange::single(Pgoff::new(7))?;
    let word = AtomicU64::new(0);
    bench.row(
        "pin_unpin_4k",
        "two_bare_rmw",
        || memfd.pin(page, owner, PinMode::Counted).map(drop),
        // Relaxed: the peer is the bare instruction.
        || word.fetch_add(1, Ordering::Relaxed) + word.fetch_sub(1, Ordering::Relaxed),
    );

    let words: Vec<AtomicU64> = (0..512).map(|_| AtomicU64::new(0)).collect();
    let slow = Bench { runs, calls_per_run: calls_per_run / 100 };
    let huge = PgoffRange::new(Pgoff::new(512), 512)?;
    slow.row(
        "convert_2m",
        "1024_bare_cas",
        || convert(&memfd, huge),
        || {
            for (from, to) in [(0, 1), (1, 0)] {
                for word in &words {
                    // Relaxed: the peer is the bare instruction.
                    let _ = word.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
                }
            }
        },
    );
    Ok(())
}
