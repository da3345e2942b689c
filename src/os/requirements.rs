//! What the library asks of a process: system calls, for those who put it under a seccomp filter.
//!
//! [`SYSCALLS`] and [`IOCTLS`] are what the library makes, [`RUNTIME_SYSCALLS`] what std, the C library and its
//! allocator make on its behalf in a process with threads. tests/seccomp.rs runs a whole life under exactly these.
//! design/host.md has capabilities and sysctls.

use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_REGISTER};

/// A system call that has to be allowed.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Syscall {
    /// Its number on this architecture.
    pub number: libc::c_long,
    /// Its name.
    pub name: &'static str,
    /// What fails without it.
    pub purpose: &'static str,
}

/// A request of `ioctl` that has to be allowed. It is the low half of the second argument, whose high half is zero.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Ioctl {
    /// The request.
    pub request: u32,
    /// Its name.
    pub name: &'static str,
}

macro_rules! syscalls {
    ($($name:ident: $number:ident, $purpose:literal;)*) => {
        &[$(Syscall { number: libc::$number, name: stringify!($name), purpose: $purpose },)*]
    };
}

/// The system calls of the library itself.
pub const SYSCALLS: &[Syscall] = syscalls! {
    memfd_create: SYS_memfd_create, "pools, objects";
    ftruncate: SYS_ftruncate, "pools";
    fallocate: SYS_fallocate, "pools, holes";
    fcntl: SYS_fcntl, "seals of pools and objects, duplicates of descriptors";
    fstat: SYS_fstat, "the count of huge memory, of pools on hugetlb; the audit";
    mmap: SYS_mmap, "pools, objects, views";
    munmap: SYS_munmap, "pools, objects, views";
    mprotect: SYS_mprotect, "views, as a folio comes";
    madvise: SYS_madvise, "pools, views";
    process_madvise: SYS_process_madvise, "conversions of several ranges to private, with views";
    mbind: SYS_mbind, "parts of pools on a NUMA node";
    prlimit64: SYS_prlimit64, "the limit of a file's size, at the creation of a pool";
    close: SYS_close, "everything";
    userfaultfd: SYS_userfaultfd, "views";
    ioctl: SYS_ioctl, "views; see IOCTLS";
    membarrier: SYS_membarrier, "conversions to private, hole punches";
    rt_sigaction: SYS_rt_sigaction, "the handler of SIGBUS and SIGSEGV, at the first pool on files";
    rt_sigprocmask: SYS_rt_sigprocmask, "a thread's first access, accesses with SIGBUS blocked, touches of a view";
    rt_sigpending: SYS_rt_sigpending, "accesses with SIGBUS blocked, touches of a view";
    tgkill: SYS_tgkill, "a SIGBUS or SIGSEGV that somebody sends and nobody handles: the process dies of it";
    getpid: SYS_getpid, "as tgkill";
    readv: SYS_readv, "read_from_file at the file's position";
    preadv: SYS_preadv, "read_from_file";
    writev: SYS_writev, "write_to_file at the file's position";
    pwritev: SYS_pwritev, "write_to_file";
    openat: SYS_openat, "what the host offers, read from /proc and /sys; /dev/userfaultfd; counts of huge memory; the audit";
    read: SYS_read, "as openat";
    pread64: SYS_pread64, "the audit: /proc/self/pagemap";
    statx: SYS_statx, "as openat";
};

/// The requests of `ioctl`, all on a userfaultfd but the first, which is on `/dev/userfaultfd`.
pub const IOCTLS: &[Ioctl] = &[
    Ioctl { request: 0xAA00, name: "USERFAULTFD_IOC_NEW" },
    Ioctl { request: UFFDIO_API, name: "UFFDIO_API" },
    Ioctl { request: UFFDIO_REGISTER, name: "UFFDIO_REGISTER" },
    Ioctl { request: UFFDIO_CONTINUE, name: "UFFDIO_CONTINUE" },
];

/// What std, the C library and its allocator need besides.
pub const RUNTIME_SYSCALLS: &[Syscall] = syscalls! {
    futex: SYS_futex, "locks, waits";
    brk: SYS_brk, "the allocator";
    mremap: SYS_mremap, "the allocator";
    sched_yield: SYS_sched_yield, "short waits";
    clock_nanosleep: SYS_clock_nanosleep, "longer waits";
    clock_gettime: SYS_clock_gettime, "deadlines, where there is no vDSO";
    getrandom: SYS_getrandom, "the allocator, hash maps";
    clone3: SYS_clone3, "threads";
    clone: SYS_clone, "threads, before Linux 5.3";
    rseq: SYS_rseq, "threads";
    set_robust_list: SYS_set_robust_list, "threads";
    sigaltstack: SYS_sigaltstack, "threads";
    sched_getaffinity: SYS_sched_getaffinity, "threads";
    gettid: SYS_gettid, "threads, panics; as tgkill";
    prctl: SYS_prctl, "names of threads";
    rt_sigreturn: SYS_rt_sigreturn, "the end of any signal handler";
    write: SYS_write, "panics";
    exit: SYS_exit, "threads";
    exit_group: SYS_exit_group, "the end";
};
