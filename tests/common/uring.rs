//! As much of io_uring as it takes to read into a registered buffer.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

const ENTRIES: u32 = 4;
const REGISTER_BUFFERS: libc::c_uint = 0;
const GETEVENTS: libc::c_uint = 1;
const SQ_RING: libc::off_t = 0;
const CQ_RING: libc::off_t = 0x800_0000;
const SQES: libc::off_t = 0x1000_0000;
const READ_FIXED: u8 = 4;
const RING_BYTES: usize = 4096;

/// `struct io_uring_params`, the parts that are read: the offsets of the two rings.
#[repr(C)]
#[derive(Default)]
struct Params {
    head: [u32; 10],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, ...
    sq: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes, ...
    cq: [u32; 10],
}

/// `struct io_uring_sqe`, the fields of a read.
#[repr(C)]
#[derive(Default)]
struct Sqe {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    rw_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd_in: i32,
    pad: [u64; 2],
}

/// A ring of a few entries.
pub(crate) struct Uring {
    fd: OwnedFd,
    params: Params,
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

impl Uring {
    /// The errno, if this kernel has no io_uring or does not let us at it.
    pub(crate) fn new() -> Result<Self, i32> {
        let mut params = Params::default();
        // SAFETY: reads and writes one `io_uring_params`.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut params) };
        match RawFd::try_from(fd) {
            // SAFETY: just made for us.
            Ok(fd) if fd >= 0 => Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, params }),
            _ => Err(errno()),
        }
    }

    /// Registers one buffer: the kernel takes a long-term pin on its pages.
    pub(crate) fn register(&self, at: *mut u8, len: usize) -> Result<(), i32> {
        let buffer = libc::iovec { iov_base: at.cast(), iov_len: len };
        let fd = self.fd.as_raw_fd();
        // SAFETY: reads one `iovec`. The memory it names stays mapped: the caller's promise.
        let done = unsafe {
            libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_BUFFERS, &raw const buffer, 1)
        };
        if done == 0 { Ok(()) } else { Err(errno()) }
    }

    /// Reads from the beginning of `file` into the registered buffer; what the completion says.
    pub(crate) fn read_fixed(&self, file: RawFd, at: *mut u8, len: u32) -> i32 {
        let [sq, cq, sqes] = [SQ_RING, CQ_RING, SQES].map(|which| self.map(which));
        let word = |ring: *mut u8, offset: u32| ring.wrapping_add(offset as usize).cast::<u32>();
        let sqe = Sqe {
            opcode: READ_FIXED,
            fd: file,
            addr: at.addr() as u64,
            len,
            user_data: 7,
            ..Sqe::default()
        };
        // SAFETY: the first entry of the submission queue, which is empty.
        unsafe { sqes.cast::<Sqe>().write_volatile(sqe) };
        // SAFETY: the first place in the array of that queue.
        unsafe { word(sq, self.params.sq[6]).write_volatile(0) };
        // SAFETY: its tail: there is one entry. The system call below orders it.
        unsafe { word(sq, self.params.sq[1]).write_volatile(1) };
        let fd = self.fd.as_raw_fd();
        let none = ptr::null::<u8>();
        // SAFETY: takes numbers, and no signal mask.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, 1, 1, GETEVENTS, none, 0) };
        assert_eq!(done, 1, "io_uring_enter: {}", io::Error::last_os_error());
        // The result stands behind the eight bytes of user data.
        let result = word(cq, self.params.cq[5] + 8).cast::<i32>();
        // SAFETY: the first completion, which has come.
        let result = unsafe { result.read_volatile() };
        for ring in [sq, cq, sqes] {
            // SAFETY: mapped above, used no more.
            unsafe { libc::munmap(ring.cast(), RING_BYTES) };
        }
        result
    }

    fn map(&self, which: libc::off_t) -> *mut u8 {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let fd = self.fd.as_raw_fd();
        // SAFETY: no address is asked for, so nothing is replaced.
        let at = unsafe { libc::mmap(ptr::null_mut(), RING_BYTES, prot, flags, fd, which) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        at.cast()
    }
}
