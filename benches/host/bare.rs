//! The peers: mappings and descriptors by bare system calls.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use linux_raw_sys::general::{
    UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_HUGETLBFS,
    UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_continue,
    uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_REGISTER};

pub(crate) const PAGE: usize = 4096;
pub(crate) const HUGE: usize = 2 << 20;

/// What a memory file is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    Small,
    Transparent,
    Hugetlb,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// How many nanoseconds this thread has run, in the kernel and out of it.
pub(crate) fn cpu_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "every Linux has this clock");
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

pub(crate) fn memfd(len: usize, pages: Pages) -> io::Result<File> {
    let flags = match pages {
        Pages::Hugetlb => libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        Pages::Small | Pages::Transparent => libc::MFD_CLOEXEC,
    };
    // SAFETY: the name is a string that ends.
    let fd = check(unsafe { libc::memfd_create(c"bench".as_ptr(), flags) }.into())?;
    // SAFETY: the descriptor is new, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    file.set_len(len as u64)?;
    Ok(file)
}

/// The file of the only arena of this size, opened once more.
pub(crate) fn arena_file(len: usize) -> io::Result<File> {
    for fd in fs::read_dir("/proc/self/fd")?.flatten() {
        let is_arena = fs::read_link(fd.path())
            .is_ok_and(|name| name.to_string_lossy().contains("gmem-arena"));
        if is_arena && fs::metadata(fd.path())?.len() == len as u64 {
            return File::options().read(true).write(true).open(fd.path());
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A file mapped, at a multiple of 2 MiB.
pub(crate) struct Map {
    whole: *mut libc::c_void,
    base: *mut u8,
    len: usize,
}

impl Map {
    pub(crate) fn new(file: &impl AsRawFd, len: usize) -> io::Result<Self> {
        let (none, reserve) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: no address is asked for, so nothing is replaced.
        let whole = unsafe { libc::mmap(ptr::null_mut(), len + HUGE, none, reserve, -1, 0) };
        if whole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = whole.cast::<u8>();
        let base = base.wrapping_add(base.align_offset(HUGE));
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
        let fd = file.as_raw_fd();
        // SAFETY: the target lies in what was just reserved.
        if unsafe { libc::mmap(base.cast(), len, rw, fixed, fd, 0) } == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { whole, base, len })
    }

    pub(crate) fn at(&self, at: usize) -> *mut u8 {
        self.base.wrapping_add(at)
    }

    pub(crate) fn advise(&self, at: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range lies in our mapping, and nobody has a reference into it.
        check(unsafe { libc::madvise(self.at(at).cast(), len, advice) }.into()).map(drop)
    }

    pub(crate) fn protect(&self, at: usize, len: usize, prot: libc::c_int) -> io::Result<()> {
        // SAFETY: as above.
        check(unsafe { libc::mprotect(self.at(at).cast(), len, prot) }.into()).map(drop)
    }

    /// All of it present.
    pub(crate) fn populate(&self, pages: Pages) -> io::Result<()> {
        if pages == Pages::Transparent {
            self.advise(0, self.len, libc::MADV_HUGEPAGE)?;
        }
        self.advise(0, self.len, libc::MADV_POPULATE_WRITE)
    }

    /// A word of each page.
    pub(crate) fn touch(&self, at: usize, len: usize) -> u64 {
        touch(self.at(at), len)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: it is ours, and goes as a whole.
        unsafe { libc::munmap(self.whole, self.len + HUGE) };
    }
}

/// Stores to each page of `len` bytes that are mapped, and adds up what was there.
pub(crate) fn touch(at: *mut u8, len: usize) -> u64 {
    let mut sum = 0;
    for page in (0..len).step_by(PAGE) {
        let word = at.wrapping_add(page).cast::<u64>();
        // SAFETY: mapped and aligned; nobody else is there.
        let value = unsafe { word.read_volatile() };
        sum += value;
        // SAFETY: as above.
        unsafe { word.write_volatile(value + 1) };
    }
    sum
}

/// A userfaultfd as a view has it.
pub(crate) struct Userfault(OwnedFd);

impl Userfault {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY as i32;
        // SAFETY: takes no pointers.
        let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        // SAFETY: the descriptor is new, and nobody else's.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let features = UFFD_FEATURE_SIGBUS
            | UFFD_FEATURE_MISSING_SHMEM
            | UFFD_FEATURE_MINOR_SHMEM
            | UFFD_FEATURE_MISSING_HUGETLBFS
            | UFFD_FEATURE_MINOR_HUGETLBFS;
        let mut api = uffdio_api { api: 0xAA, features: features.into(), ioctls: 0 };
        this.call(UFFDIO_API, &mut api)?;
        Ok(this)
    }

    pub(crate) fn register(&self, map: &Map) -> io::Result<()> {
        let mode = u64::from(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
        let range = uffdio_range { start: map.at(0).addr() as u64, len: map.len as u64 };
        self.call(UFFDIO_REGISTER, &mut uffdio_register { range, mode, ioctls: 0 })?;
        map.advise(0, map.len, libc::MADV_DONTNEED)
    }

    /// One `UFFDIO_CONTINUE`.
    pub(crate) fn map_pages(&self, map: &Map, at: usize, len: usize) -> io::Result<()> {
        let range = uffdio_range { start: map.at(at).addr() as u64, len: len as u64 };
        self.call(UFFDIO_CONTINUE, &mut uffdio_continue { range, mode: 0, mapped: 0 })
    }

    fn call<T>(&self, opcode: u32, arg: &mut T) -> io::Result<()> {
        let opcode = opcode as libc::Ioctl;
        // SAFETY: each caller pairs the opcode with its structure, which outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), opcode, ptr::from_mut(arg)) };
        check(result.into()).map(drop)
    }
}

/// A view by bare calls: all of a populated file, registered, and nothing shown.
pub(crate) struct BareView {
    pub(crate) map: Map,
    pub(crate) uffd: Userfault,
    _alias: Map,
}

impl BareView {
    pub(crate) fn new(len: usize, pages: Pages) -> io::Result<Self> {
        let file = memfd(len, pages)?;
        let alias = Map::new(&file, len)?;
        alias.populate(pages)?;
        let map = Map::new(&file, len)?;
        map.advise(0, len, libc::MADV_NOHUGEPAGE)?;
        let uffd = Userfault::open()?;
        uffd.register(&map)?;
        uffd.map_pages(&map, 0, len)?;
        Ok(Self { map, uffd, _alias: alias })
    }

    /// Private and back.
    pub(crate) fn both_ways(&self, at: usize, len: usize) {
        self.map.advise(at, len, libc::MADV_DONTNEED).expect("it was mapped");
        self.uffd.map_pages(&self.map, at, len).expect("it was not");
    }
}

/// `fallocate(FALLOC_FL_PUNCH_HOLE)`.
pub(crate) fn punch(file: &File, at: usize, len: usize) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (at, len) = (at as libc::off_t, len as libc::off_t);
    // SAFETY: takes no pointers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) }.into()).map(drop)
}

pub(crate) fn copy(from: &Map, to: &Map, at: usize, len: usize) {
    // SAFETY: both are mapped so far, are not the same, and nobody else is there.
    unsafe { ptr::copy_nonoverlapping(from.at(at), to.at(at), len) };
}

/// `read(2)` until `len` bytes have come.
pub(crate) fn read_into(file: &File, to: *mut u8, len: usize) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let target = to.wrapping_add(at).cast();
        let from = at as libc::off_t;
        // SAFETY: the target is mapped, and nobody has a reference into it.
        let got = unsafe { libc::pread(file.as_raw_fd(), target, len - at, from) };
        match check(got as libc::c_long)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            got => at += got as usize,
        }
    }
    Ok(())
}

/// The kernel's own guest memory, shared from the start and mapped.
pub(crate) fn guest_memfd(len: usize) -> io::Result<File> {
    #[repr(C)]
    struct CreateGuestMemfd {
        size: u64,
        flags: u64,
        reserved: [u64; 6],
    }
    const KVM_CREATE_VM: libc::Ioctl = 0xAE01;
    // _IOWR(0xAE, 0xd4, struct kvm_create_guest_memfd)
    const KVM_CREATE_GUEST_MEMFD: libc::Ioctl = 0xC040_AED4_u32 as libc::Ioctl;
    const MMAP_AND_INIT_SHARED: u64 = 3;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: takes a number.
    let vm = check(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) }.into())?;
    // SAFETY: the descriptor is new, and nobody else's.
    let vm = unsafe { OwnedFd::from_raw_fd(vm as i32) };
    let mut arg =
        CreateGuestMemfd { size: len as u64, flags: MMAP_AND_INIT_SHARED, reserved: [0; 6] };
    let arg = ptr::from_mut(&mut arg);
    // SAFETY: the structure is the one that the call reads.
    let fd = check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_GUEST_MEMFD, arg) }.into())?;
    // SAFETY: as above.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}
