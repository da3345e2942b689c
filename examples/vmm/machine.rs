//! The machine: built, run, and taken apart.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, Scope, ScopedJoinHandle, scope};
use std::time::Instant;

use gmem::addr::ByteSize;
use gmem::geometry::FolioSize;
use gmem::hyp::pkvm::{Hypervisor, Vm};
use gmem::vm_memory::{AddressSpace, Slot};
use gmem::{
    ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, HostView, SigbusHandler, Visibility, audit,
};
use sha2::{Digest, Sha256};

use crate::Fallible;
use crate::args::Backing;
use crate::board::Board;
use crate::console::Console;
use crate::cpu::Cpu;
use crate::device::{Device, DeviceStat, OWNER};
use crate::disk::Disk;
use crate::guest;
use crate::intruder::{self, Attempt, IntruderStat, Intrusion, Snapshot};
use crate::layout::{self, PAYLOAD, PAYLOAD_BYTES, RAM_BYTES, SECTOR, params};
use crate::report::Outcome;
use crate::run::Run;
use crate::transport::{Command, Transport};

/// Boots a guest, lets it read the disk, and takes everything apart again. Also returns what the
/// guest's memory looked like while a request was in flight.
pub(crate) fn run(
    backing: Backing,
    disk: &Disk,
    console: &Arc<Console>,
    run: &Arc<Run>,
) -> Fallible<(Outcome, Snapshot)> {
    let pool = make_pool(backing, console)?;
    let hypervisor = Hypervisor::new(&pool)?;
    let memfd = GuestMemfd::builder(ByteSize::from_bytes(RAM_BYTES)).name("guest").create(&pool)?;
    let vm = hypervisor.create_vm()?;
    vm.bind(layout::ram()?.start(), &memfd, memfd.pages())?;
    let share_unit = share_unit(&pool);
    let mut conversions = preload(&memfd, disk.len_bytes(), share_unit)?;
    console.say(
        "vmm",
        &format!(
            "a protected guest of {} MiB; payload of {PAYLOAD_BYTES} bytes loaded, then made private",
            RAM_BYTES >> 20
        ),
    );

    let machine = Machine::new(&memfd, &vm, disk, console, run)?;
    let board = machine.board.clone();
    console.expect_bytes(disk.len_bytes());
    let started = Instant::now();
    let ran = machine.run(disk);
    let serving = started.elapsed();
    console.end_of_bytes();
    // The first thing that went wrong, rather than what it led to.
    run.verdict()?;
    let Ran { device, intruder, snapshot, host_sha256 } = ran?;
    disk.check_unchanged()?;
    conversions += board.conversions();
    let guest = board.report();
    drop(board);

    let mut findings = Vec::new();
    let mut left_behind = Vec::new();
    findings.extend_from_slice(audit::check(&pool, &[&memfd]).findings());
    let stat = memfd.stat();
    let nothing = ByteSize::default();
    for (what, amount) in
        [("shared", stat.shared), ("pinned", stat.pinned), ("quarantined", stat.quarantined)]
    {
        if amount != nothing {
            left_behind.push(format!("{amount} bytes are still {what}"));
        }
    }
    vm.teardown()?;
    drop((vm, memfd));
    findings.extend_from_slice(audit::check(&pool, &[]).findings());
    let hyp = hypervisor.stat();
    if hyp.nr_vms != 0 || hyp.donated != nothing || hyp.borrowed != nothing {
        left_behind.push(format!("the hypervisor still counts {hyp:?}"));
    }
    let stat = pool.stat();
    if stat.used != nothing || stat.reserved != nothing || stat.quarantined != nothing {
        left_behind.push(format!("the pool still counts {stat:?}"));
    }
    let scrubbed_bytes = match pool.verify_scrubbed() {
        Ok(size) => size.get(),
        Err(unscrubbed) => {
            left_behind.push(unscrubbed.to_string());
            0
        }
    };
    let outcome = Outcome {
        backing: pool.backing().to_string(),
        disk_bytes: disk.len_bytes(),
        guest,
        host_sha256,
        device,
        intruder,
        conversions,
        serving,
        findings,
        left_behind,
        leaked_frames: stat.used.whole_pages(),
        scrubbed_bytes,
    };
    Ok((outcome, snapshot))
}

fn make_pool(backing: Backing, console: &Console) -> Fallible<FolioPool> {
    let size = ByteSize::from_bytes(RAM_BYTES);
    let pool = FolioPool::with_preference(&backing.order(), size)?;
    for (backing, why) in pool.parts().iter().flat_map(|part| &part.passed_over) {
        console.say("vmm", &format!("no {backing}: {why}"));
    }
    let stat = pool.stat();
    console.say(
        "vmm",
        &format!(
            "a pool of {} MiB in folios of 2 MiB: {}; the kernel backs {} MiB by huge pages",
            stat.capacity.get() >> 20,
            pool.backing(),
            stat.huge.get() >> 20
        ),
    );
    Ok(pool)
}

/// In which units a device can be let at memory: on hugetlb, host views show whole folios.
fn share_unit(pool: &FolioPool) -> ByteSize {
    match pool.backing() {
        ArenaBacking::MemfdHugetlb2M => FolioSize::Huge2M.bytes(),
        _ => FolioSize::Base.bytes(),
    }
}

/// Writes boot parameters and payload through the checked way while they are shared, then gives all
/// of it to the guest. Returns how many conversions that took.
fn preload(memfd: &GuestMemfd, disk_bytes: u64, share_unit: ByteSize) -> Fallible<u64> {
    let payload = make_payload();
    let mut raw = [0; params::BYTES];
    raw[params::AT_MAGIC..][..8].copy_from_slice(&params::MAGIC.to_le_bytes());
    let payload_bytes = payload.len() as u64;
    raw[params::AT_PAYLOAD_BYTES..][..8].copy_from_slice(&payload_bytes.to_le_bytes());
    raw[params::AT_DISK_BYTES..][..8].copy_from_slice(&disk_bytes.to_le_bytes());
    raw[params::AT_SHARE_UNIT..][..8].copy_from_slice(&share_unit.get().to_le_bytes());
    raw[params::AT_PAYLOAD_SHA256..][..32].copy_from_slice(&Sha256::digest(&payload));

    let mut conversions = 0;
    for (start, data) in [(params::BASE, &raw[..]), (PAYLOAD, &payload[..])] {
        let nr_pages = (data.len() as u64).div_ceil(4096);
        let pages = layout::pages_of(layout::frames(start, nr_pages)?)?;
        let shared = memfd.convert(pages, Visibility::Shared, ContentPolicy::Preserve)?;
        memfd.write(pages.start_offset(), data)?;
        let private = memfd.convert(pages, Visibility::Private, ContentPolicy::Preserve)?;
        if [shared, private].iter().any(|done| done.changed_pages() != nr_pages) {
            return Err(format!("preloading {pages} did not convert each page twice").into());
        }
        conversions += 2;
    }
    Ok(conversions)
}

/// Stands for a kernel image: bytes without a pattern, the same in every run.
fn make_payload() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[7]
    };
    (0..PAYLOAD_BYTES).map(step).collect()
}

/// Everything that runs while the guest does.
struct Machine {
    board: Arc<Board>,
    boot_cpu: Cpu,
    hash_cpu: Cpu,
    device: Device,
    commands: Receiver<Command>,
    intrusion: Intrusion,
    attempts: (Receiver<Attempt>, Sender<()>),
    run: Arc<Run>,
}

/// What the threads came to.
struct Ran {
    device: DeviceStat,
    intruder: IntruderStat,
    snapshot: Snapshot,
    host_sha256: [u8; 32],
}

impl Machine {
    fn new(
        memfd: &GuestMemfd,
        vm: &Vm,
        disk: &Disk,
        console: &Arc<Console>,
        run: &Arc<Run>,
    ) -> Fallible<Self> {
        let sigbus = SigbusHandler::install()?;
        let view: Arc<HostView> = Arc::new(memfd.map_view()?);
        let slot = Slot { gfn: layout::ram()?.start(), view: view.clone(), pages: memfd.pages() };
        let memory = AddressSpace::new(OWNER, [slot])?;
        let (to_device, commands) = channel();
        let sectors = disk.len_bytes().div_ceil(SECTOR);
        let transport = Arc::new(Transport::new(sectors, to_device));
        let (intruder, attempts) = intruder::line();
        let board =
            Arc::new(Board::new(memfd.clone(), transport.clone(), console.clone(), run.clone()));
        Ok(Self {
            boot_cpu: Cpu::new(vm.create_vcpu()?, board.clone()),
            hash_cpu: Cpu::new(vm.create_vcpu()?, board.clone()),
            board,
            device: Device {
                memory,
                file: disk.for_device()?,
                disk_bytes: disk.len_bytes(),
                transport,
                intruder,
                console: console.clone(),
                run: run.clone(),
                stat: DeviceStat::default(),
            },
            commands,
            intrusion: Intrusion {
                memfd: memfd.clone(),
                view,
                sigbus,
                console: console.clone(),
                run: run.clone(),
                unit: share_unit(memfd.pool()),
            },
            attempts,
            run: run.clone(),
        })
    }

    /// Runs until the guest powers off, or something fails.
    fn run(self, disk: &Disk) -> Fallible<Ran> {
        let Self { board, mut boot_cpu, mut hash_cpu, device, commands, intrusion, attempts, run } =
            self;
        let run = &*run;
        scope(|s| {
            let device = spawn(s, run, "disk", move || device.serve(&commands))?;
            let intruder =
                spawn(s, run, "intruder", move || intrusion.serve(&attempts.0, &attempts.1));
            let host_hash = spawn(s, run, "host hash", || disk.hash(run));
            let hash_cpu = spawn(s, run, "vCPU 1", move || guest::hash(&mut hash_cpu));
            let boot_cpu = spawn(s, run, "vCPU 0", move || guest::boot(&mut boot_cpu));
            // In any case, or the device would wait for more.
            let vcpus = boot_cpu.and_then(join).and(hash_cpu.and_then(join));
            board.transport.quit();
            let device = join(device);
            let intruder = intruder.and_then(join);
            let host_sha256 = host_hash.and_then(join);
            vcpus?;
            let (intruder, snapshot) = intruder?;
            Ok(Ran { device: device?, intruder, snapshot, host_sha256: host_sha256? })
        })
    }
}

type Thread<'scope, T> = ScopedJoinHandle<'scope, Fallible<T>>;

/// Starts a thread whose failure, or panic, ends the run.
fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: &'scope Run,
    name: &'static str,
    body: impl FnOnce() -> Fallible<T> + Send + 'scope,
) -> Fallible<Thread<'scope, T>> {
    let thread = move || {
        let _alarm = Alarm { run, name };
        let outcome = body();
        if let Err(error) = &outcome {
            run.fail(format!("{name}: {error}"));
        }
        outcome
    };
    Builder::new().name(name.into()).spawn_scoped(scope, thread).map_err(|error| {
        run.fail(format!("cannot start a thread for the {name}: {error}"));
        error.into()
    })
}

fn join<T>(thread: Thread<'_, T>) -> Fallible<T> {
    thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))
}

/// Ends the run when its thread panics.
struct Alarm<'a> {
    run: &'a Run,
    name: &'static str,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.run.fail(format!("{} panicked", self.name));
        }
    }
}
