//! The kernel's guest_memfd carries the table out.

use std::io::Read;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use crate::calls;
use crate::kvm::{self, KernelVm};
use crate::subject::{Access, Answer, Map, Op, PAGE, SIZE, Side, Subject};

pub(crate) struct Kernel {
    vm: KernelVm,
    fd: Option<OwnedFd>,
    at: Option<*mut u8>,
}

impl Kernel {
    pub(crate) fn new(side: Side) -> Self {
        let vm = KernelVm::new();
        let flags = match side {
            Side::Shared => kvm::MMAP | kvm::INIT_SHARED,
            Side::Private => kvm::MMAP,
        };
        let fd = vm.create_guest_memfd(SIZE, flags).unwrap();
        Self { vm, fd: Some(fd), at: None }
    }

    fn fd(&self) -> i32 {
        self.fd.as_ref().unwrap().as_raw_fd()
    }

    fn pointer(&self, at: u64) -> *mut u8 {
        self.at.unwrap().wrapping_add(at as usize)
    }

    fn map(&mut self, map: Map) -> Answer {
        let (read, write) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
        let (shared, all) = (libc::MAP_SHARED, SIZE as usize);
        let (prot, flags, len, offset) = match map {
            Map::Whole => (write, shared, all, 0),
            Map::Private => (write, libc::MAP_PRIVATE, all, 0),
            Map::Executable => (read | libc::PROT_EXEC, shared, all, 0),
            Map::ReadOnly => (read, shared, all, 0),
            Map::Unaligned => (write, shared, all, 1),
            Map::BeyondTheEnd => (write, shared, all + PAGE as usize, 0),
            Map::Huge => (write, shared | libc::MAP_HUGETLB, 2 << 20, 0),
        };
        // SAFETY: no address is asked for, so nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, self.fd(), offset) };
        if at == libc::MAP_FAILED {
            return Answer::Errno(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        self.at = Some(at.cast());
        Answer::Done
    }
}

impl Subject for Kernel {
    fn apply(&mut self, op: &Op) -> Answer {
        match *op {
            Op::Create(size, flags) => match self.vm.create_guest_memfd(size, flags) {
                Ok(_) => Answer::Done,
                Err(errno) => Answer::Errno(errno),
            },
            Op::Fd(call) => calls::on_fd(self.fd(), call),
            Op::Fallocate(mode, offset, len) => {
                // SAFETY: takes numbers.
                let call = || match unsafe { libc::fallocate(self.fd(), mode, offset, len) } {
                    0 => Answer::Done,
                    _ => Answer::Errno(std::io::Error::last_os_error().raw_os_error().unwrap()),
                };
                loop {
                    // The kernel may have had something else for this thread to do, and wants to be asked again.
                    match call() {
                        Answer::Errno(libc::EINTR) => {}
                        answer => break answer,
                    }
                }
            }
            Op::Map(map) => self.map(map),
            Op::Touch(at, access) => touch(self.pointer(0), at, access),
            Op::Poke(at, byte) => {
                // SAFETY: shared memory, mapped for good.
                unsafe { self.pointer(at).write_volatile(byte) };
                Answer::Done
            }
            Op::Memory(at, call) => calls::on_memory(self.pointer(at), call),
            Op::Advise(advice, at, len) => calls::advise(self.pointer(at), len, advice),
            Op::Close => {
                self.fd = None;
                Answer::Done
            }
        }
    }
}

/// Where the copy of the process says what it met: once written, never read but by this process.
static REPORT: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel has filled it.
    let info = unsafe { &*info };
    // SAFETY: a fault, which has an address.
    let address = unsafe { info.si_addr() }.addr() as u64;
    let words = [1, info.si_code as u64, address];
    report(words);
}

fn report(words: [u64; 3]) -> ! {
    let size = mem::size_of_val(&words);
    let to = REPORT.load(Ordering::Relaxed);
    // SAFETY: async-signal-safe, and a buffer of that size.
    unsafe { libc::write(to, words.as_ptr().cast(), size) };
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(0) }
}

/// Touches a byte in a copy of this process, since the fault cannot be survived otherwise.
pub(crate) fn touch(base: *mut u8, at: u64, access: Access) -> Answer {
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the copy does nothing but system calls that a signal handler may make, and the touch.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        touch_and_exit(base.wrapping_add(at as usize), access, write.as_raw_fd());
    }
    drop(write);
    let mut status = 0;
    // SAFETY: writes one number.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    let mut words = [0_u8; 24];
    let mut from = std::fs::File::from(read);
    if from.read_exact(&mut words).is_err() {
        return Answer::Died(status);
    }
    let word = |at: usize| u64::from_ne_bytes(words[8 * at..8 * at + 8].try_into().unwrap());
    match (word(0), word(1)) {
        (0, byte) => Answer::Byte(byte as u8),
        (1, code) if code == libc::BUS_ADRERR as u64 => Answer::Bus(word(2) - base.addr() as u64),
        (_, code) => panic!("SIGBUS with code {code}"),
    }
}

fn touch_and_exit(at: *mut u8, access: Access, to: i32) -> ! {
    REPORT.store(to, Ordering::Relaxed);
    // SAFETY: a structure of numbers and pointers, all of which may be zero.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is async-signal-safe.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    let byte = match access {
        // SAFETY: an address of ours; the fault is what is asked for.
        Access::Load => unsafe { at.read_volatile() },
        Access::Store => {
            // SAFETY: as above, and aligned as any byte is. A store of what is there.
            let atomic = unsafe { AtomicU8::from_ptr(at) };
            atomic.fetch_or(0, Ordering::SeqCst)
        }
    };
    report([0, byte.into(), 0])
}
