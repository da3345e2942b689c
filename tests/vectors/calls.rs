//! The system calls of the table, on a descriptor or on mapped memory, whoever they belong to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr;

use crate::subject::{Answer, FdCall, MemoryCall, PAGE};
use crate::uring::Uring;

const LEN: usize = 16;
const PAGE_BYTES: usize = PAGE as usize;
/// What files are filled with that are read from.
const FILL: u8 = 0x5a;

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

/// Zero is done, -1 an errno, anything else a number.
fn answer(result: i64) -> Answer {
    match result {
        0 => Answer::Done,
        -1 => Answer::Errno(errno()),
        number => Answer::Number(number),
    }
}

/// The answer of a call that counts bytes.
fn counted(result: isize) -> Answer {
    match result {
        -1 => Answer::Errno(errno()),
        nr => Answer::Number(nr as i64),
    }
}

fn stat(fd: RawFd) -> libc::stat {
    // SAFETY: a structure of numbers.
    let mut stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes one such structure.
    assert_eq!(unsafe { libc::fstat(fd, &raw mut stat) }, 0);
    stat
}

pub(crate) fn on_fd(fd: RawFd, call: FdCall) -> Answer {
    let mut buf = [0_u8; LEN];
    let buf = buf.as_mut_ptr();
    match call {
        // SAFETY: a buffer of that length; so are the next three.
        FdCall::Read => counted(unsafe { libc::read(fd, buf.cast(), LEN) }),
        // SAFETY: as above.
        FdCall::Write => counted(unsafe { libc::write(fd, buf.cast(), LEN) }),
        // SAFETY: as above.
        FdCall::Pread => counted(unsafe { libc::pread(fd, buf.cast(), LEN, 0) }),
        // SAFETY: as above.
        FdCall::Pwrite => counted(unsafe { libc::pwrite(fd, buf.cast(), LEN, 0) }),
        // SAFETY: takes numbers; so do the next ones.
        FdCall::Lseek(whence) => answer(unsafe { libc::lseek(fd, 0, whence) }),
        // SAFETY: as above.
        FdCall::Truncate(size) => answer(unsafe { libc::ftruncate(fd, size) }.into()),
        // SAFETY: as above.
        FdCall::Chmod => answer(unsafe { libc::fchmod(fd, 0o640) }.into()),
        // SAFETY: as above.
        FdCall::Chown => answer(unsafe { libc::fchown(fd, u32::MAX, u32::MAX) }.into()),
        // SAFETY: no times are given: those of now.
        FdCall::SetTimes => answer(unsafe { libc::futimens(fd, ptr::null()) }.into()),
        // SAFETY: takes numbers; so do the next ones.
        FdCall::Sync => answer(unsafe { libc::fsync(fd) }.into()),
        // SAFETY: as above.
        FdCall::DataSync => answer(unsafe { libc::fdatasync(fd) }.into()),
        // SAFETY: as above.
        FdCall::SyncRange => answer(unsafe { libc::sync_file_range(fd, 0, 4096, 0) }.into()),
        // posix_fadvise returns the errno itself.
        // SAFETY: as above.
        FdCall::Advise => match unsafe { libc::posix_fadvise(fd, 0, 4096, 0) } {
            0 => Answer::Done,
            errno => Answer::Errno(errno),
        },
        // SAFETY: as above.
        FdCall::GetSeals => answer(unsafe { libc::fcntl(fd, libc::F_GET_SEALS) }.into()),
        FdCall::AddSeals => {
            // SAFETY: as above.
            answer(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE) }.into())
        }
        // SAFETY: as above.
        FdCall::Lock => answer(unsafe { libc::flock(fd, libc::LOCK_EX) }.into()),
        FdCall::Reopen => {
            let path = format!("/proc/self/fd/{fd}");
            match OpenOptions::new().read(true).write(true).open(path) {
                Ok(_) => Answer::Done,
                Err(error) => Answer::Errno(error.raw_os_error().unwrap()),
            }
        }
        // SAFETY: a number that no file knows, and no argument.
        FdCall::Ioctl => answer(unsafe { libc::ioctl(fd, 0x1234_5678) }.into()),
        FdCall::CopyRange => {
            let to = file(&[]);
            let none = ptr::null_mut();
            // SAFETY: no offsets are given.
            counted(unsafe { libc::copy_file_range(fd, none, to.as_raw_fd(), none, LEN, 0) })
        }
        FdCall::Splice => {
            let (_read, write) = pipe();
            let none = ptr::null_mut();
            // SAFETY: no offsets are given.
            counted(unsafe { libc::splice(fd, none, write.as_raw_fd(), none, LEN, 0) })
        }
        FdCall::Size => Answer::Number(stat(fd).st_size),
        FdCall::Blocks => Answer::Number(stat(fd).st_blocks),
        FdCall::BlockSize => Answer::Number(stat(fd).st_blksize as _),
        FdCall::Mode => Answer::Number(stat(fd).st_mode.into()),
        // SAFETY: takes numbers.
        FdCall::IsCloseOnExec => Answer::Number(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into()),
        FdCall::Duplicate => {
            // SAFETY: takes a number.
            let other = unsafe { libc::dup(fd) };
            let answer = on_fd(other, FdCall::BlockSize);
            // SAFETY: made above, used no more.
            unsafe { libc::close(other) };
            answer
        }
    }
}

/// System calls on mapped memory, of [`LEN`] bytes, or of the page where it takes one.
pub(crate) fn on_memory(at: *mut u8, call: MemoryCall) -> Answer {
    let mut buf = [FILL; LEN];
    let ours = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: LEN };
    let theirs = libc::iovec { iov_base: at.cast(), iov_len: LEN };
    // SAFETY: takes nothing.
    let pid = unsafe { libc::getpid() };
    let page = [FILL; PAGE_BYTES];
    match call {
        MemoryCall::Read => {
            let file = File::open("/dev/zero").unwrap();
            // SAFETY: nobody has a reference to the memory, and the kernel checks the address; so in all below.
            counted(unsafe { libc::read(file.as_raw_fd(), at.cast(), LEN) })
        }
        MemoryCall::Write => {
            let (_read, write) = pipe();
            // SAFETY: as above.
            counted(unsafe { libc::write(write.as_raw_fd(), at.cast(), LEN) })
        }
        // SAFETY: as above, and a buffer of our own.
        MemoryCall::ProcessVmRead => counted(unsafe {
            libc::process_vm_readv(pid, &raw const ours, 1, &raw const theirs, 1, 0)
        }),
        // SAFETY: as above.
        MemoryCall::ProcessVmWrite => counted(unsafe {
            libc::process_vm_writev(pid, &raw const ours, 1, &raw const theirs, 1, 0)
        }),
        MemoryCall::ProcMemRead => {
            let file = File::open("/proc/self/mem").unwrap();
            let to = at.addr() as libc::off_t;
            // SAFETY: a buffer of our own.
            counted(unsafe { libc::pread(file.as_raw_fd(), buf.as_mut_ptr().cast(), LEN, to) })
        }
        MemoryCall::DirectRead => {
            let file = direct(&page);
            // SAFETY: as above.
            counted(unsafe { libc::pread(file.as_raw_fd(), at.cast(), PAGE_BYTES, 0) })
        }
        MemoryCall::DirectWrite => {
            let file = direct(&page);
            // SAFETY: as above.
            counted(unsafe { libc::pwrite(file.as_raw_fd(), at.cast(), PAGE_BYTES, 0) })
        }
        MemoryCall::VmSplice => {
            let (_read, write) = pipe();
            // SAFETY: as above.
            counted(unsafe { libc::vmsplice(write.as_raw_fd(), &raw const theirs, 1, 0) })
        }
        MemoryCall::RegisterBuffer => {
            match Uring::new().and_then(|ring| ring.register(at, PAGE_BYTES)) {
                Ok(()) => Answer::Done,
                Err(errno) => Answer::Errno(errno),
            }
        }
        MemoryCall::FixedRead => {
            let ring = Uring::new().unwrap();
            match ring.register(at, PAGE_BYTES) {
                Ok(()) => Answer::Number(ring.read_fixed(file(&page).as_raw_fd(), at, 4096).into()),
                Err(errno) => Answer::Errno(errno),
            }
        }
        MemoryCall::Lock => {
            // SAFETY: as above.
            let locked = answer(unsafe { libc::mlock(at.cast(), PAGE_BYTES) }.into());
            // SAFETY: as above.
            unsafe { libc::munlock(at.cast(), PAGE_BYTES) };
            locked
        }
        MemoryCall::LockOnFault => {
            let flags = libc::MLOCK_ONFAULT;
            // SAFETY: as above.
            let locked = answer(unsafe { libc::syscall(libc::SYS_mlock2, at, PAGE_BYTES, flags) });
            // SAFETY: as above.
            unsafe { libc::munlock(at.cast(), PAGE_BYTES) };
            locked
        }
        MemoryCall::ProtectExecute => {
            let prot = libc::PROT_READ | libc::PROT_EXEC;
            // SAFETY: nobody has a reference into it.
            let done = answer(unsafe { libc::mprotect(at.cast(), PAGE_BYTES, prot) }.into());
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: as above.
            unsafe { libc::mprotect(at.cast(), PAGE_BYTES, prot) };
            done
        }
        MemoryCall::RegisterUserfault => register_userfault(at),
    }
}

/// Registers a page with another userfaultfd, for missing faults.
fn register_userfault(at: *mut u8) -> Answer {
    use linux_raw_sys::general::{
        UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range,
        uffdio_register,
    };
    use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
    // SAFETY: takes flags.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_USER_MODE_ONLY) } as RawFd;
    let mut api = uffdio_api { api: 0xaa, features: 0, ioctls: 0 };
    // SAFETY: reads and writes one such structure.
    assert_eq!(unsafe { libc::ioctl(fd, UFFDIO_API as _, &raw mut api) }, 0);
    let mode = u64::from(UFFDIO_REGISTER_MODE_MISSING);
    let range = uffdio_range { start: at.addr() as u64, len: PAGE };
    let mut register = uffdio_register { range, mode, ioctls: 0 };
    // SAFETY: as above; the page is ours, and nobody touches it meanwhile.
    let answer = answer(unsafe { libc::ioctl(fd, UFFDIO_REGISTER as _, &raw mut register) }.into());
    // SAFETY: made above; ends the registration.
    unsafe { libc::close(fd) };
    answer
}

pub(crate) fn advise(at: *mut u8, len: u64, advice: i32) -> Answer {
    // SAFETY: nobody has a reference into it.
    answer(unsafe { libc::madvise(at.cast(), len as usize, advice) }.into())
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

/// A file without a name that holds these bytes, read from the beginning.
fn file(bytes: &[u8]) -> File {
    let path = path();
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(bytes).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// The same, but past the page cache.
fn direct(bytes: &[u8]) -> File {
    let path = path();
    std::fs::write(&path, bytes).unwrap();
    let flags = libc::O_DIRECT;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    std::fs::remove_file(path).unwrap();
    file.expect("the build directory is on a file system that has O_DIRECT")
}

/// Beside the test's own executable: `/tmp` may be a file system without O_DIRECT.
fn path() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let nr = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut path = std::env::current_exe().unwrap();
    path.set_file_name(format!("gmem-vectors-{}-{nr}", std::process::id()));
    path
}
