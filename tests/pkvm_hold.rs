//! A machine waits for no other that is large: what is about much memory is done in pieces.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gmem::addr::{ByteSize, Gfn};
use gmem::hyp::{Hypervisor, Vm};
use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, Visibility};

type Outcome = Result<(), Box<dyn Error>>;

/// With all of it under one lock, each of these takes some hundred milliseconds as tests are built.
const LARGE: ByteSize = ByteSize::from_mib(512);
/// What the other machine touches for the first time: for each page it needs locks that are everybody's.
const SMALL: ByteSize = ByteSize::from_mib(64);
/// A thread that is held up by the system is held up in this round, and not in all.
const NR_ROUNDS: usize = 4;
/// What a piece may take on a host that others use as well, and then the same as often as the quiet machine shows.
const FLOOR: Duration = Duration::from_millis(25);
const MOST_TIMES_QUIET: u32 = 10;

/// The longest that one touch of fresh memory took while something went on, and how many there were.
fn touches_during(
    hypervisor: &Hypervisor,
    pool: &FolioPool,
    work: impl FnOnce() -> Outcome,
) -> Result<(Duration, u64), Box<dyn Error>> {
    let memfd = GuestMemfd::builder(SMALL).initial(Visibility::Private).create(pool)?;
    memfd.allocate(memfd.pages())?;
    let vm = hypervisor.create_vm()?;
    vm.bind(Gfn::new(0), &memfd, memfd.pages())?;
    let mut vcpu = vm.create_vcpu()?;
    let has_ended = AtomicBool::new(false);
    let (touched, worked) = std::thread::scope(|scope| {
        let touching = scope.spawn(|| {
            let (mut longest, mut nr) = (Duration::ZERO, 0);
            for page in memfd.pages().iter() {
                // Relaxed: pairs with nothing, it is to be seen some time.
                if has_ended.load(Ordering::Relaxed) {
                    break;
                }
                let began = Instant::now();
                vcpu.store(Gfn::new(page.get()).ipa(), &[1]).map_err(|exit| format!("{exit:?}"))?;
                longest = longest.max(began.elapsed());
                nr += 1;
            }
            Ok::<_, String>((longest, nr))
        });
        let worked = work();
        has_ended.store(true, Ordering::Relaxed);
        (touching.join(), worked)
    });
    worked?;
    Ok(touched.map_err(|_| "it has panicked")??)
}

/// A large machine: what it does, in this order.
struct Large {
    memfd: GuestMemfd,
    vm: Vm,
}

impl Large {
    fn new(hypervisor: &Hypervisor, pool: &FolioPool) -> Result<Self, Box<dyn Error>> {
        let memfd = GuestMemfd::builder(LARGE).initial(Visibility::Shared).create(pool)?;
        memfd.allocate(memfd.pages())?;
        let vm = hypervisor.create_vm()?;
        vm.bind(Gfn::new(0), &memfd, memfd.pages())?;
        Ok(Self { memfd, vm })
    }
}

#[test]
fn nobody_is_held_up_by_a_large_machine() -> Outcome {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_bytes(LARGE.get() + SMALL.get()))?;
    let hypervisor = Hypervisor::new(&pool)?;
    let names = ["quiet", "convert", "stat", "host's stat", "teardown"];
    let mut least = [Duration::MAX; 5];
    for _ in 0..NR_ROUNDS {
        let Large { memfd, vm } = &Large::new(&hypervisor, &pool)?;
        let convert = || {
            memfd.convert(memfd.pages(), Visibility::Private, ContentPolicy::Zero)?;
            Ok(())
        };
        let quiet = || {
            std::thread::sleep(Duration::from_millis(50));
            Ok(())
        };
        let stat = || {
            (0..3).try_for_each(|_| match vm.stat().owned == LARGE {
                true => Ok(()),
                false => Err("lost".into()),
            })
        };
        let host_stat = || {
            (0..3).try_for_each(|_| match hypervisor.stat().donated >= LARGE {
                true => Ok(()),
                false => Err("lost".into()),
            })
        };
        let teardown = || Ok(vm.teardown()?);
        let works: [&dyn Fn() -> Outcome; 5] = [&quiet, &convert, &stat, &host_stat, &teardown];
        for (least, work) in least.iter_mut().zip(works) {
            let (longest, nr) = touches_during(&hypervisor, &pool, work)?;
            assert!(nr > 0, "nothing was touched meanwhile");
            *least = longest.min(*least);
        }
    }
    let most = FLOOR.max(least[0] * MOST_TIMES_QUIET);
    for (name, held_up) in names.iter().zip(least) {
        println!("{name}: {held_up:?} of {most:?}");
        assert!(held_up <= most, "{name}: a touch took {held_up:?}, and {:?} when quiet", least[0]);
    }
    Ok(())
}
