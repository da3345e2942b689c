//! The whole life of a guest in a process that may make only the system calls that the library says it makes.

// UNSAFETY: installs a seccomp filter, and a handler for what it traps.
#![expect(unsafe_code, reason = "a seccomp filter is installed by a raw system call")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;
use std::{env, mem, ptr, thread};

use common::Capability;
use gmem::addr::{Access, ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::geometry::{FolioSize, NumaNode};
use gmem::hyp::{Exit, HvcResult, Hypercall, Hypervisor};
use gmem::range::PgoffRange;
use gmem::requirements::{IOCTLS, RUNTIME_SYSCALLS, SYSCALLS};
use gmem::vm_memory::{AddressSpace, Slot};
use gmem::{
    Ack, ArenaBacking, ContentPolicy, ConvertOptions, FilePlace, FolioPool, GuestMemfd, HandOutRun,
    Heard, PartSpec, PinMode, SigbusHandler, Subscriber, Touch, Visibility, Wait, Zone, audit,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const CHILD: &str = "GMEM_TEST_SECCOMP_CHILD";
const TRAPPED: i32 = 99;
/// What the child says when nothing is left but to die.
const OVER: &str = "the life is over";

extern "C" fn on_trap(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // `si_syscall` stands behind the address.
    // SAFETY: the kernel has filled it for a SIGSYS, whose fields these are.
    let number = unsafe { info.cast::<i32>().wrapping_add(6).read() };
    let mut text = *b"trapped: system call 0000\n";
    let mut left = number.unsigned_abs();
    for digit in text[21..25].iter_mut().rev() {
        *digit = b'0' + (left % 10) as u8;
        left /= 10;
    }
    // SAFETY: async-signal-safe; the buffer is ours.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(TRAPPED) };
}

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Goes on with the next instruction but one if the word is another.
const fn unless(k: u32) -> libc::sock_filter {
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    libc::sock_filter { code: code as u16, jt: 0, jf: 1, k }
}

/// From here on no thread of this process makes another system call than these, and not that one.
fn confine(without: &str) {
    let load = |place| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, place);
    let ret = |k| statement(libc::BPF_RET | libc::BPF_K, k);
    let mut program = Vec::new();
    // The low half of ioctl's second argument: all requests fit in it.
    program.push(load(16 + 8));
    let mut requests = Vec::new();
    for ioctl in IOCTLS {
        requests.extend([unless(ioctl.request), ret(libc::SECCOMP_RET_ALLOW)]);
    }
    requests.push(ret(libc::SECCOMP_RET_TRAP));
    program[0] = load(0);
    let ioctl = match without {
        "ioctl" => u32::MAX,
        _ => u32::try_from(libc::SYS_ioctl).unwrap(),
    };
    // Past the requests unless it is an ioctl.
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let skip = u8::try_from(requests.len() + 1).unwrap();
    program.push(libc::sock_filter { code: code as u16, jt: 0, jf: skip, k: ioctl });
    program.push(load(16 + 8));
    program.extend(requests);
    let calls = SYSCALLS.iter().chain(RUNTIME_SYSCALLS);
    for call in calls.filter(|call| !["ioctl", without].contains(&call.name)) {
        let number = u32::try_from(call.number).unwrap();
        program.extend([unless(number), ret(libc::SECCOMP_RET_ALLOW)]);
    }
    program.push(ret(libc::SECCOMP_RET_TRAP));

    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_trap;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is async-signal-safe.
    unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    let len = u16::try_from(program.len()).unwrap();
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: takes no pointers.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC);
    // SAFETY: the filter and its program outlive the call, which copies them.
    let installed = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const filter) };
    assert_eq!((privileges, installed), (0, 0), "{}", std::io::Error::last_os_error());
}

#[derive(Debug)]
struct Follower;

impl Subscriber for Follower {
    fn revoke(&self, _: &[HandOutRun], ack: Ack) {
        assert_eq!(ack.let_go(), Heard::InTime);
    }

    fn grant(&self, _: &[HandOutRun]) {}
}

fn pages(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

/// Everything that the library does to a host, once.
/// The files were opened before: that is not the library's to do.
fn life(mut file: File, (read, write): (OwnedFd, OwnedFd)) {
    let offer = FolioPool::probe();
    assert!(!format!("{offer:?}").is_empty());
    let mib = ByteSize::from_mib;
    let preference =
        [ArenaBacking::MemfdHugetlb1G, ArenaBacking::MemfdHugetlb2M, ArenaBacking::Memfd];
    drop(FolioPool::with_preference(&preference, mib(4)));
    drop(FolioPool::with_preference(&[ArenaBacking::MemfdThp, ArenaBacking::Heap], mib(4)));
    drop(FolioPool::new(ArenaBacking::Memfd, ByteSize::from_mib(1 << 30)).unwrap_err());

    let part = |mib| PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(mib));
    let near = part(8).on_node(NumaNode::new(0));
    let builder = FolioPool::builder().part(part(16), Zone::Normal);
    let pool = match builder.clone().part(near, Zone::Movable).dedicated().create() {
        Ok(pool) => pool,
        Err(error) => {
            println!("without NUMA: {error}");
            builder.part(part(8), Zone::Movable).dedicated().create().unwrap()
        }
    };
    let scrubber = pool.start_scrubber(mib(2)).unwrap();
    let memfd = GuestMemfd::builder(mib(12))
        .zones(&[Zone::Normal, Zone::Movable])
        .initial(Visibility::Shared)
        .create(&pool)
        .unwrap();
    let hypervisor = Hypervisor::new(&pool).unwrap();
    let vm = hypervisor.create_vm().unwrap();
    vm.bind(Gfn::new(0), &memfd, memfd.pages()).unwrap();
    let follower = memfd.subscribe(Arc::new(Follower)).unwrap();
    let view = Arc::new(memfd.map_view().unwrap());
    let device = memfd.register_owner("device").unwrap();
    let handler = SigbusHandler::install().unwrap();

    let start = FilePlace::At(ByteSize::from_bytes(0));
    for place in [start, FilePlace::Position] {
        let done = memfd.read_from_file(&file, place, Offset::new(0), mib(3), device).unwrap();
        assert!(done.is_complete());
    }
    let few = ByteSize::from_bytes(4096);
    let done =
        view.write_to_file(&write, FilePlace::Position, Offset::new(0), few, device).unwrap();
    assert!(done.is_complete());
    let refused = memfd.write_to_file(&mut file, start, Offset::new(0), few, device).unwrap();
    assert!(refused.stopped().is_some(), "opened for reading");
    drop((read, write));

    let (private, preserve) = (Visibility::Private, ContentPolicy::Preserve);
    let _ = memfd.convert(pages(0, 700), private, preserve).unwrap();
    let scattered = [pages(702, 1), pages(704, 1)];
    let _ = memfd.convert_ranges(&scattered, private, &ConvertOptions::default()).unwrap();
    let touch = view.touch(handler, Offset::new(5), Access::Read).unwrap();
    assert!(matches!(touch, Touch::Fault(_)));
    let touch = view.touch(handler, Offset::new(8 << 20), Access::Write).unwrap();
    assert_eq!(touch, Touch::Byte(0));

    let mut vcpu = vm.create_vcpu().unwrap();
    vcpu.store(Ipa::new(0x3000), b"hello").unwrap();
    match vcpu.hvc(Hypercall::MemShare(Ipa::new(0x3000))) {
        Err(Exit::Conversion(request)) => drop(request.convert().unwrap()),
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.answer().unwrap(), HvcResult::SUCCESS);

    // Threads that wait for each other, and one that waits in vain.
    let pin = memfd.pin(pages(800, 4), device, PinMode::Counted).unwrap().into_owned();
    thread::scope(|scope| {
        scope.spawn(|| {
            let wait = ConvertOptions::default().wait(Wait::at_most(Duration::from_secs(20)));
            memfd.convert_ranges(&[pages(800, 1)], private, &wait).unwrap();
        });
        let wait = ConvertOptions::default().wait(Wait::at_most(Duration::from_millis(5)));
        drop(memfd.convert_ranges(&[pages(801, 1)], private, &wait).unwrap_err());
        thread::sleep(Duration::from_millis(20));
        drop(pin);
    });
    let slot = Slot { gfn: Gfn::new(0), view: view.clone(), pages: memfd.pages() };
    let space = AddressSpace::new("virtio", [slot]).unwrap().with_dirty_log().unwrap();
    space.memory().write_slice(&[1; 5000], GuestAddress(9 << 20)).unwrap();
    assert!(!space.take_dirty().is_empty());
    drop(space);

    memfd.punch_hole(pages(2048, 700)).unwrap();
    memfd.write(Offset::new((8 << 20) + 5), &[3; 9000]).unwrap();
    let _ = memfd.migrate(pages(2048, 1024), Zone::Movable).unwrap();
    let _ = pool.compact(FolioSize::Huge2M, Zone::Normal);
    let _ = memfd.trim().unwrap();
    let export = memfd.export(pages(1536, 512), device).unwrap();
    assert!(export.regions().next().is_some_and(|region| region.file.try_clone_to_owned().is_ok()));
    assert!(memfd.as_fd().try_clone_to_owned().is_ok());
    println!("{:?} {:?}", memfd.stat(), pool.stat());
    assert_eq!(audit::check(&pool, &[&memfd]).to_string(), "clean");
    drop(export);
    drop(vcpu);
    vm.teardown().unwrap();
    drop((vm, follower, view, memfd));
    drop((scrubber, hypervisor));
    assert_eq!(pool.stat().used, ByteSize::default());
}

#[test]
fn a_whole_life_needs_no_other_system_calls() {
    if !common::require(Capability::Uffd) {
        return;
    }
    if let Some(how) = env::var_os(CHILD) {
        let file = env::current_exe().and_then(File::open).unwrap();
        let pipe = rustix::pipe::pipe().unwrap();
        match how.to_str().unwrap() {
            "free" => {}
            "confined" => confine(""),
            without => confine(without),
        }
        // Rust's runtime, which would take the first signal that is sent for one of its own.
        // SAFETY: the default action takes no handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        life(file, pipe);
        println!("{OVER}");
        std::io::stdout().flush().unwrap();
        thread::sleep(Duration::from_secs(20));
        std::process::exit(0);
    }
    for how in ["free", "confined"] {
        let output = live(how);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(is_whole(&output), "{how}: {}: {said}", output.status);
    }
}

/// A life in another process, the test above as a child. It ends by a signal that nobody handles.
fn live(how: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    let args = ["--exact", "a_whole_life_needs_no_other_system_calls", "--test-threads=1"];
    command.args(args).arg("--nocapture").env(CHILD, how);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    if lines.map_while(Result::ok).any(|line| line == OVER) {
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: takes no pointers; a child that nobody has waited for.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGBUS) }, 0);
    }
    child.wait_with_output().unwrap()
}

fn is_whole(life: &Output) -> bool {
    life.status.signal() == Some(libc::SIGBUS)
}

/// Nothing is on the list for nothing.
#[test]
fn a_life_without_one_of_them_is_none() {
    // What only some hosts see: a pool on hugetlb is asked how much it has; NUMA may be missing.
    const ELSEWHERE: &[&str] = &["fstat", "mbind"];
    if !common::require(Capability::Uffd) {
        return;
    }
    let mut idle = Vec::new();
    for call in SYSCALLS.iter().filter(|call| !ELSEWHERE.contains(&call.name)) {
        if is_whole(&live(call.name)) {
            idle.push(call.name);
        }
    }
    assert!(idle.is_empty(), "a life goes on without {idle:?}");
}

/// The filter is one: what is not on the list does not happen.
#[test]
fn other_system_calls_are_trapped() {
    if env::var_os(CHILD).is_some() {
        confine("");
        // SAFETY: takes nothing.
        unsafe { libc::syscall(libc::SYS_getppid) };
        std::process::exit(0);
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "other_system_calls_are_trapped", "--test-threads=1", "--nocapture"])
        .env(CHILD, "confined")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(TRAPPED));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("system call {:04}", libc::SYS_getppid)), "{said}");
}
