//! The machine: built, and run until the guest powers off.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::scope;
use std::time::Instant;

use gmem::addr::ByteSize;
use gmem::geometry::FolioSize;
use gmem::hyp::{Hypervisor, VmKind};
use gmem::vm_memory::{AddressSpace, Slot};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, HostView, SigbusHandler, Visibility};

use crate::Fallible;
use crate::aftermath::{Guest, take_apart};
use crate::args::{Args, Backing, name_of};
use crate::board::Board;
use crate::console::Console;
use crate::cpu::Cpu;
use crate::device::{Device, DeviceStat, OWNER};
use crate::disk::Disk;
use crate::firmware::{preload, share_areas};
use crate::guest;
use crate::hazard::{self, Hazard, HazardStat};
use crate::intruder::{self, Attempt, IntruderStat, Intrusion, Snapshot};
use crate::layout::{self, PAYLOAD_BYTES, RAM_BYTES, SECTOR};
use crate::outcome::Outcome;
use crate::run::Run;
use crate::threads::{join, spawn};
use crate::transport::{Command, Transport};

/// Boots a guest, lets it read the disk, and takes everything apart again. Also returns what the
/// guest's memory looked like while a request was in flight.
pub(crate) fn run(
    args: &Args,
    disk: &Disk,
    console: &Arc<Console>,
    run: &Arc<Run>,
) -> Fallible<(Outcome, Snapshot)> {
    let kind = args.guest;
    let pool = make_pool(args.backing, console)?;
    let hypervisor = Hypervisor::with(&pool, args.hypervisor)?;
    let (vm, initial) = match kind {
        VmKind::Protected => (hypervisor.create_vm()?, Visibility::Private),
        VmKind::NonProtected => (hypervisor.create_non_protected_vm()?, Visibility::Shared),
    };
    let memfd = GuestMemfd::builder(ByteSize::from_bytes(RAM_BYTES))
        .name("guest")
        .initial(initial)
        .create(&pool)?;
    let at = layout::ram()?.start();
    let stays_shared = args.hypervisor.fixes_sides() && kind == VmKind::Protected;
    let preload = || preload(&memfd, kind, disk.len_bytes(), share_unit(&pool), stays_shared);
    let (mut conversions, mut for_good) = (0, ByteSize::default());
    match stays_shared {
        // What is bound stays as it is.
        true => {
            conversions += preload()? + share_areas(&memfd, share_unit(&pool))?;
            for_good = memfd.stat().shared;
            vm.bind(at, &memfd, memfd.pages())?;
        }
        false => {
            vm.bind(at, &memfd, memfd.pages())?;
            conversions += preload()?;
        }
    }
    console.say(
        "vmm",
        &format!(
            "a {} guest of {} MiB under {}; payload of {PAYLOAD_BYTES} bytes loaded, and {initial} from here on",
            name_of(kind),
            RAM_BYTES >> 20,
            args.hypervisor
        ),
    );

    let guest = Guest { vm, memfd, for_good };
    let machine = Machine::new(&guest, disk, console, run)?;
    let board = machine.board.clone();
    console.expect_bytes(disk.len_bytes());
    let started = Instant::now();
    let ran = machine.run(disk);
    let serving = started.elapsed();
    console.end_of_bytes();
    // The first thing that went wrong, rather than what it led to.
    run.verdict()?;
    let Ran { device, intruder, snapshot, host_sha256, hazard } = ran?;
    disk.check_unchanged()?;
    conversions += board.conversions();
    let report = board.report();
    drop(board);

    let (hazard, small_guest) = hazard.unzip();
    let guests = [Some(guest), small_guest].into_iter().flatten().collect();
    let outcome = Outcome {
        kind,
        hypervisor: args.hypervisor,
        backing: pool.backing().to_string(),
        disk_bytes: disk.len_bytes(),
        guest: report,
        host_sha256,
        device,
        intruder,
        hazard,
        conversions,
        serving,
        aftermath: take_apart(&pool, &hypervisor, guests)?,
    };
    Ok((outcome, snapshot))
}

fn make_pool(backing: Backing, console: &Console) -> Fallible<FolioPool> {
    let size = ByteSize::from_bytes(RAM_BYTES + hazard::RAM_BYTES);
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

/// Everything that runs while the guest does.
struct Machine {
    board: Arc<Board>,
    boot_cpu: Cpu,
    hash_cpu: Cpu,
    device: Device,
    commands: Receiver<Command>,
    intrusion: Intrusion,
    attempts: (Receiver<Attempt>, Sender<()>),
    /// Where there is private memory to lose.
    hazard: Option<Hazard>,
    run: Arc<Run>,
}

/// What the threads came to.
struct Ran {
    device: DeviceStat,
    intruder: IntruderStat,
    snapshot: Snapshot,
    host_sha256: [u8; 32],
    /// What was seen on the small guest, where there is one, and that guest.
    hazard: Option<(HazardStat, Guest)>,
}

impl Machine {
    fn new(guest: &Guest, disk: &Disk, console: &Arc<Console>, run: &Arc<Run>) -> Fallible<Self> {
        let Guest { vm, memfd, .. } = guest;
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
                kind: vm.kind(),
                memfd: memfd.clone(),
                view,
                sigbus,
                console: console.clone(),
                run: run.clone(),
                unit: share_unit(memfd.pool()),
            },
            attempts,
            hazard: (vm.kind() == VmKind::Protected).then(|| Hazard {
                pool: memfd.pool().clone(),
                hypervisor: vm.hypervisor(),
                console: console.clone(),
            }),
            run: run.clone(),
        })
    }

    /// Runs until the guest powers off, or something fails.
    fn run(self, disk: &Disk) -> Fallible<Ran> {
        let Self { board, mut boot_cpu, mut hash_cpu, device, commands, .. } = self;
        let Self { intrusion, attempts, hazard, .. } = self;
        let run = &*self.run;
        scope(|s| {
            let device = spawn(s, run, "disk", move || device.serve(&commands))?;
            let intruder =
                spawn(s, run, "intruder", move || intrusion.serve(&attempts.0, &attempts.1));
            let hazard = hazard.map(|hazard| spawn(s, run, "hazard", move || hazard.play()));
            let host_hash = spawn(s, run, "host hash", || disk.hash(run));
            let hash_cpu = spawn(s, run, "vCPU 1", move || guest::hash(&mut hash_cpu));
            let boot_cpu = spawn(s, run, "vCPU 0", move || guest::boot(&mut boot_cpu));
            // In any case, or the device would wait for more.
            let vcpus = boot_cpu.and_then(join).and(hash_cpu.and_then(join));
            board.transport.quit();
            let device = join(device);
            let intruder = intruder.and_then(join);
            let hazard = hazard.map(|thread| thread.and_then(join));
            let host_sha256 = host_hash.and_then(join);
            vcpus?;
            let (intruder, snapshot) = intruder?;
            Ok(Ran {
                device: device?,
                intruder,
                snapshot,
                host_sha256: host_sha256?,
                hazard: hazard.transpose()?,
            })
        })
    }
}
