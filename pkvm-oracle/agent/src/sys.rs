//! System calls, with errnos in place of -1.

// UNSAFETY: system calls that have no safe wrapper in std, on memory that a guest shares.
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{Ordering, fence};

use pkvm_oracle::Errno;

/// The errno of the call that has just failed.
pub(crate) fn last() -> Errno {
    Errno(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// What a system call returned, unless -1.
pub(crate) fn checked<T: PartialEq + From<i8>>(result: T) -> Result<T, Errno> {
    if result == T::from(-1) { Err(last()) } else { Ok(result) }
}

fn owned(fd: RawFd) -> Result<OwnedFd, Errno> {
    let fd = checked(fd)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An ioctl whose argument is a number.
pub(crate) fn ioctl_number(fd: &impl AsRawFd, request: u64, number: u64) -> Result<i32, Errno> {
    // SAFETY: the requests that come here take a number, and reach no memory of ours but the run
    // structure, which only kvm.rs reads, through volatile accesses.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, number) })
}

/// An ioctl that reads or writes one structure.
pub(crate) fn ioctl_struct<T>(
    fd: &impl AsRawFd,
    request: u64,
    value: &mut T,
) -> Result<i32, Errno> {
    // SAFETY: the caller's `T` is the structure of the request, alive and ours alone.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, ptr::from_mut(value)) })
}

/// As `ioctl_number`, for those that make a descriptor.
pub(crate) fn ioctl_fd(fd: &impl AsRawFd, request: u64, number: u64) -> Result<OwnedFd, Errno> {
    owned(ioctl_number(fd, request, number)?)
}

/// As `ioctl_struct`, for those that make a descriptor.
pub(crate) fn ioctl_struct_fd<T>(
    fd: &impl AsRawFd,
    request: u64,
    value: &mut T,
) -> Result<OwnedFd, Errno> {
    owned(ioctl_struct(fd, request, value)?)
}

/// `flags` choose the size of its pages.
pub(crate) fn memfd(name: &CStr, bytes: u64, flags: libc::c_uint) -> Result<OwnedFd, Errno> {
    // SAFETY: reads a string that ends.
    let fd = owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) })?;
    let bytes = i64::try_from(bytes).map_err(|_| Errno(libc::EFBIG))?;
    // SAFETY: takes numbers.
    checked(unsafe { libc::ftruncate(fd.as_raw_fd(), bytes) })?;
    Ok(fd)
}

/// Both ends of a pipe: to read, to write.
pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut fds = [0; 2];
    // SAFETY: writes two numbers.
    checked(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok((owned(fds[0])?, owned(fds[1])?))
}

/// Maps anew, where the kernel likes; nothing that is mapped already is touched.
pub(crate) fn map(
    bytes: usize,
    flags: libc::c_int,
    fd: Option<&OwnedFd>,
) -> Result<*mut u8, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let fd = fd.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: no fixed address, so nothing that exists is replaced.
    let at = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(last()) } else { Ok(at.cast()) }
}

/// Maps a part of what is no memory of ours: registers.
pub(crate) fn map_at(bytes: usize, fd: &OwnedFd, at: i64) -> Result<*mut u8, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: no fixed address, so nothing that exists is replaced.
    let at = unsafe {
        libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd.as_raw_fd(), at)
    };
    if at == libc::MAP_FAILED { Err(last()) } else { Ok(at.cast()) }
}

/// Stores to a register that `map_at` gave. Stores to memory that came before are there before it.
pub(crate) fn store_register(registers: *mut u8, at: usize, value: u32) {
    // SeqCst: the device reads what was stored before; it is its own partner.
    fence(Ordering::SeqCst);
    // SAFETY: within the page that was mapped, aligned, and nobody has a reference to it.
    unsafe { registers.wrapping_add(at).cast::<u32>().write_volatile(value) };
    // SeqCst: and what it has written by then is read after.
    fence(Ordering::SeqCst);
}

/// Unmaps what `map` gave, or a part of it.
pub(crate) fn unmap(at: *mut u8, bytes: usize) -> Result<(), Errno> {
    // SAFETY: no reference into what `map` gives is ever made, only single accesses that may fail.
    checked(unsafe { libc::munmap(at.cast(), bytes) }).map(drop)
}

pub(crate) fn advise(at: *mut u8, bytes: usize, advice: libc::c_int) -> Result<(), Errno> {
    // SAFETY: as for `unmap`: nobody has a reference to these bytes.
    checked(unsafe { libc::madvise(at.cast(), bytes, advice) }).map(drop)
}

pub(crate) fn protect(at: *mut u8, bytes: usize, protection: libc::c_int) -> Result<(), Errno> {
    // SAFETY: as for `unmap`.
    checked(unsafe { libc::mprotect(at.cast(), bytes, protection) }).map(drop)
}

pub(crate) fn lock(at: *mut u8, bytes: usize) -> Result<(), Errno> {
    // SAFETY: changes no byte and no mapping.
    checked(unsafe { libc::mlock(at.cast(), bytes) }).map(drop)
}

pub(crate) fn unlock(at: *mut u8, bytes: usize) -> Result<(), Errno> {
    // SAFETY: changes no byte and no mapping.
    checked(unsafe { libc::munlock(at.cast(), bytes) }).map(drop)
}

pub(crate) fn punch(fd: &OwnedFd, at: u64, bytes: u64) -> Result<(), Errno> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (at, bytes) = match (i64::try_from(at), i64::try_from(bytes)) {
        (Ok(at), Ok(bytes)) => (at, bytes),
        _ => return Err(Errno(libc::EFBIG)),
    };
    // SAFETY: takes numbers; the pages that go are nobody's references.
    checked(unsafe { libc::fallocate(fd.as_raw_fd(), mode, at, bytes) }).map(drop)
}

/// write(2) of one byte that lies at `from`.
pub(crate) fn write_from(fd: &OwnedFd, from: *const u8) -> Result<isize, Errno> {
    // SAFETY: the kernel reads the byte, or fails with EFAULT.
    checked(unsafe { libc::write(fd.as_raw_fd(), from.cast(), 1) })
}

/// read(2) of one byte to `to`.
pub(crate) fn read_to(fd: &OwnedFd, to: *mut u8) -> Result<isize, Errno> {
    // SAFETY: the kernel writes the byte, to which nobody has a reference, or fails with EFAULT.
    checked(unsafe { libc::read(fd.as_raw_fd(), to.cast(), 1) })
}

/// vmsplice(2) of one byte that lies at `from`.
pub(crate) fn splice_from(fd: &OwnedFd, from: *mut u8) -> Result<isize, Errno> {
    let vector = libc::iovec { iov_base: from.cast(), iov_len: 1 };
    // SAFETY: reads one vector; the page behind it is only lent to the pipe.
    checked(unsafe { libc::vmsplice(fd.as_raw_fd(), &raw const vector, 1, 0) })
}

/// sendfile(2) of one byte of a file.
pub(crate) fn send_from(to: &OwnedFd, file: &OwnedFd, at: u64) -> Result<isize, Errno> {
    let mut at = i64::try_from(at).map_err(|_| Errno(libc::EFBIG))?;
    // SAFETY: reads and writes one number; the page behind it is only lent to the pipe.
    checked(unsafe { libc::sendfile(to.as_raw_fd(), file.as_raw_fd(), &raw mut at, 1) })
}

/// process_vm_readv of one byte of this process.
pub(crate) fn vm_read(from: *mut u8, byte: &mut u8) -> Result<isize, Errno> {
    let here = libc::iovec { iov_base: ptr::from_mut(byte).cast(), iov_len: 1 };
    let there = libc::iovec { iov_base: from.cast(), iov_len: 1 };
    // SAFETY: takes numbers.
    let me = unsafe { libc::getpid() };
    // SAFETY: writes our byte, reads the other, or fails.
    checked(unsafe { libc::process_vm_readv(me, &raw const here, 1, &raw const there, 1, 0) })
}

/// process_vm_writev of one byte of this process.
pub(crate) fn vm_write(to: *mut u8, mut byte: u8) -> Result<isize, Errno> {
    let here = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let there = libc::iovec { iov_base: to.cast(), iov_len: 1 };
    // SAFETY: takes numbers.
    let me = unsafe { libc::getpid() };
    // SAFETY: reads our byte, writes the other, to which nobody has a reference, or fails.
    checked(unsafe { libc::process_vm_writev(me, &raw const here, 1, &raw const there, 1, 0) })
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    Child,
    Parent(libc::pid_t),
}

/// The agent has one thread, so that a child may do anything.
pub(crate) fn fork() -> Result<Fork, Errno> {
    // SAFETY: there is one thread: no lock is held by another that the child would not have. In
    // tests there are more, and there children make system calls and nothing else.
    match checked(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Ends this process, without anything that its parent would do as well.
pub(crate) fn leave(status: i32) -> ! {
    // SAFETY: takes a number, does not return.
    unsafe { libc::_exit(status) }
}

/// A child's status, if it has ended; for the child's end itself if `wait`.
pub(crate) fn reap(pid: libc::pid_t, wait: bool) -> Result<Option<i32>, Errno> {
    let mut status = 0;
    let flags = if wait { 0 } else { libc::WNOHANG };
    // SAFETY: writes one number.
    match checked(unsafe { libc::waitpid(pid, &raw mut status, flags) })? {
        0 => Ok(None),
        _ => Ok(Some(status)),
    }
}

pub(crate) fn kill(pid: libc::pid_t) {
    // SAFETY: takes numbers; the process is a child of ours that was not reaped yet, or this one.
    let _: libc::c_int = unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// RLIMIT_MEMLOCK, soft and hard.
pub(crate) fn limit_locked(bytes: u64) -> Result<(), Errno> {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: reads one structure.
    checked(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }).map(drop)
}

/// linux/capability.h.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;
const CAP_IPC_LOCK: u32 = 14;

/// Gives up CAP_IPC_LOCK, to which no limit applies.
pub(crate) fn drop_ipc_lock() -> Result<(), Errno> {
    let header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 reads the header and writes two structures.
    checked(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    data[0].effective &= !(1 << CAP_IPC_LOCK);
    data[0].permitted &= !(1 << CAP_IPC_LOCK);
    // SAFETY: version 3 reads the header and two structures.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

pub(crate) fn mount(kind: &CStr, at: &CStr) -> Result<(), Errno> {
    if let Ok(path) = at.to_str() {
        // It may be there already; if it cannot be made, the mount says so.
        let _: io::Result<()> = fs::create_dir_all(path);
    }
    // SAFETY: reads strings that end; no data.
    let mounted = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, ptr::null()) };
    checked(mounted).map(drop)
}

/// Switches the machine off; only init may.
pub(crate) fn power_off() {
    // SAFETY: takes nothing.
    unsafe { libc::sync() };
    // SAFETY: takes a number. Nothing is mounted that could be lost.
    let _: libc::c_int = unsafe { libc::reboot(libc::RB_POWER_OFF) };
}
