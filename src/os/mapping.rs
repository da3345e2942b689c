//! Mappings: the pool's own alias of its arena, and the address range that a host view is built in.

// UNSAFETY: mmap, munmap and madvise on address ranges that this file alone owns.
#![expect(unsafe_code, reason = "the only file that maps memory")]

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};

use crate::addr::{ByteSize, Hva};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::os::failed;
use crate::sync::relax;

/// `MADV_COLLAPSE` of linux/mman.h.
const MADV_COLLAPSE: libc::c_int = 25;

/// `PIDFD_SELF_THREAD_GROUP` of linux/pidfd.h: this process, without a descriptor.
const PIDFD_SELF: libc::c_int = -10_001;

/// How many ranges one call takes: what is quick to put together on the stack, and pays for the call.
const MOST_AT_ONCE: usize = 128;

/// What views and arenas are mapped for.
const ACCESSIBLE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// How often a call that asks to be repeated is.
const MOST_ATTEMPTS: u32 = 1_000;
/// The same for a collapse, which copies 2 MiB each time.
const MOST_COLLAPSES: u32 = 70;

/// Of a mapping with nothing behind it.
const EMPTY: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// A range of addresses that stays ours, whatever is mapped into it, until it is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    op: Op,
}

// SAFETY: the pointer is an address range, not a reference; all access goes through system calls
// here or through the raw copies in backing/copies.rs, which are safe to run from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of addresses at a multiple of `align`, which must not be touched.
    pub(crate) fn reserve(op: Op, len: ByteSize, align: ByteSize) -> Result<Self, Error> {
        let (len, align) = (to_usize(op, len)?, to_usize(op, align)?);
        let total = len.checked_add(align).ok_or_else(|| Error::new(op, ErrorKind::Overflow))?;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), EMPTY) }
            .map_err(|e| failed(op, "mmap", e))?;
        let whole = Self::adopt(op, base.cast(), total)?;
        let start = whole.base.as_ptr().align_offset(align);
        Ok(whole.keep_only(start, len))
    }

    /// Reserves `len` bytes of addresses at a multiple of `align`, then covers them with `empty`, a
    /// file of no bytes: every touch is a `SIGBUS`.
    pub(crate) fn of_nothing(
        op: Op,
        empty: BorrowedFd<'_>,
        len: ByteSize,
        align: ByteSize,
    ) -> Result<Self, Error> {
        let mapping = Self::reserve(op, len, align)?;
        mapping.map_over(0, mapping.len, empty, 0)?;
        mapping.keep_private(0, mapping.len)?;
        Ok(mapping)
    }

    /// Maps zeroes that take memory only where they are written, and page by page.
    #[cfg(not(any(miri, all(loom, feature = "loom"))))]
    pub(crate) fn of_zeroes(op: Op, len: ByteSize) -> Result<Self, Error> {
        let len = to_usize(op, len)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // Since Linux 6.7 a stack has no huge pages, and what is forbidden below is so already: a mapping that
        // is split off its neighbour for that takes twice as long.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::STACK;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), len, prot, flags) }
            .map_err(|e| failed(op, "mmap", e))?;
        let mapping = Self::adopt(op, base.cast(), len)?;
        // One huge page would be 512 tables at once.
        mapping.forbid_collapse(0, len)?;
        Ok(mapping)
    }

    fn adopt(op: Op, base: *mut u8, len: usize) -> Result<Self, Error> {
        let base = NonNull::new(base).ok_or_else(|| Error::new(op, ErrorKind::Os))?;
        Ok(Self { base, len, op })
    }

    /// Gives back all but `start..start + len`.
    fn keep_only(self, start: usize, len: usize) -> Self {
        let whole = std::mem::ManuallyDrop::new(self);
        let base = whole.base.as_ptr().wrapping_add(start);
        let behind = start + len;
        release(whole.base.as_ptr(), start);
        release(whole.base.as_ptr().wrapping_add(behind), whole.len - behind);
        // `start <= align` and the reservation is `align` longer than `len`: still inside.
        Self { base: NonNull::new(base).unwrap_or(whole.base), len, op: whole.op }
    }

    pub(crate) fn hva(&self) -> Hva {
        Hva::new(self.base.as_ptr().addr())
    }

    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Replaces what is mapped at `at..at + len` by the file's bytes from `file_at` on. If it fails, what was
    /// there is there still, or every touch is a `SIGSEGV`.
    pub(crate) fn map_over(
        &self,
        at: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        file_at: u64,
    ) -> Result<(), Error> {
        self.map_shared(at, len, fd, file_at, ACCESSIBLE)
    }

    /// The same, but every touch of it is a `SIGSEGV` until [`make_accessible`](Self::make_accessible).
    pub(crate) fn map_inaccessible(
        &self,
        at: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        file_at: u64,
    ) -> Result<(), Error> {
        self.map_shared(at, len, fd, file_at, ProtFlags::empty())
    }

    /// Replaces what is mapped at `at..at + len` by the first bytes of a file that is about to get
    /// its memory.
    pub(crate) fn map_uncommitted(
        &self,
        at: usize,
        len: usize,
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        self.map_shared(at, len, fd, 0, ACCESSIBLE)
    }

    fn map_shared(
        &self,
        at: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        file_at: u64,
        prot: ProtFlags,
    ) -> Result<(), Error> {
        let target = self.at(at, len)?;
        // On hugetlb a mapping would otherwise claim pages for all that the file has no memory for: a second
        // time while it is to get it, and in vain if somebody has taken it.
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `at` has checked that the target lies in our own reservation, to which nobody has
        // a reference (bytes are only copied through raw pointers).
        unsafe { mmap(target.cast(), len, prot, flags, fd, file_at) }.map_err(|e| {
            Self::close_gap(target, len);
            failed(self.op, "mmap", e)
        })?;
        Ok(())
    }

    /// Where a mapping fails late, the kernel has unmapped already what was there. The addresses stay ours, or
    /// the next mapping that anybody makes may come to lie there.
    fn close_gap(target: *mut u8, len: usize) {
        let flags = EMPTY | MapFlags::FIXED_NOREPLACE;
        // SAFETY: replaces nothing: it fails if anything is mapped there, as is well.
        let _ = unsafe { mmap_anonymous(target.cast(), len, ProtFlags::empty(), flags) };
    }

    /// Lets the process at what is mapped inaccessible.
    pub(crate) fn make_accessible(&self, at: usize, len: usize) -> Result<(), Error> {
        let target = self.at(at, len)?;
        let flags = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: 1. the range lies in our own mapping. 2. it becomes accessible, so no reference
        // into it goes bad.
        unsafe { mprotect(target.cast(), len, flags) }.map_err(|e| failed(self.op, "mprotect", e))
    }

    /// Takes away what is mapped at `at..at + len`; the addresses stay reserved.
    pub(crate) fn unmap(&self, at: usize, len: usize) -> Result<(), Error> {
        let target = self.at(at, len)?;
        let flags = EMPTY.union(MapFlags::FIXED);
        // SAFETY: as in map_shared.
        unsafe { mmap_anonymous(target.cast(), len, ProtFlags::empty(), flags) }
            .map_err(|e| failed(self.op, "mmap", e))?;
        Ok(())
    }

    /// Makes the pages of a mapping vanish from it: what a file holds stays there, zeroes are zeroes
    /// again.
    #[inline]
    pub(crate) fn discard(&self, at: usize, len: usize) -> Result<(), Error> {
        // The plain one refuses memory that somebody has locked with mlockall.
        self.advise(at, len, Advice::LinuxDontneedLocked, "madvise(MADV_DONTNEED_LOCKED)")
    }

    /// [`discard`](Self::discard) for many ranges, with one system call for as many as it takes.
    #[inline]
    pub(crate) fn discard_each(
        &self,
        mut ranges: impl ExactSizeIterator<Item = (usize, usize)>,
    ) -> Result<(), Error> {
        if ranges.len() == 1 {
            return ranges.next().map_or(Ok(()), |(at, len)| self.discard(at, len));
        }
        let mut vector = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MOST_AT_ONCE];
        while ranges.len() > 0 {
            let mut nr_taken = 0;
            for (entry, (at, len)) in vector.iter_mut().zip(&mut ranges) {
                *entry = libc::iovec { iov_base: self.at(at, len)?.cast(), iov_len: len };
                nr_taken += 1;
            }
            let taken = vector.get(..nr_taken).unwrap_or_default();
            let mut done = if nr_taken == 1 { 0 } else { discard_vector(taken) };
            for entry in taken {
                match done.checked_sub(entry.iov_len) {
                    Some(rest) => done = rest,
                    None => {
                        self.discard(entry.iov_base.addr() - self.hva().get(), entry.iov_len)?
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks for huge pages.
    pub(crate) fn want_huge(&self, at: usize, len: usize) -> Result<(), Error> {
        self.advise(at, len, Advice::LinuxHugepage, "madvise(MADV_HUGEPAGE)")
    }

    /// Makes every page present and writable now.
    pub(crate) fn populate(&self, at: usize, len: usize) -> Result<(), Error> {
        self.advise(at, len, Advice::LinuxPopulateWrite, "madvise(MADV_POPULATE_WRITE)")
    }

    /// Gives every page that the file has its entry now, without touching its bytes.
    pub(crate) fn populate_shared(&self, at: usize, len: usize) -> Result<(), Error> {
        self.advise(at, len, Advice::LinuxPopulateRead, "madvise(MADV_POPULATE_READ)")
    }

    /// Makes huge pages of what is there, and of holes, now, where collapsing is forbidden otherwise.
    /// Whole blocks of 2 MiB. If one cannot be made, others may have been.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] if the host has no huge page left; [`ErrorKind::Busy`] if somebody
    /// holds one of the small ones; [`ErrorKind::MissingCapability`] before Linux 6.1, and where the host
    /// denies it.
    pub(crate) fn collapse(&self, at: usize, len: usize) -> Result<(), Error> {
        let collapsed = self
            .want_huge(at, len)
            // The kernel does not fill a hole for which a userfaultfd of another mapping waits.
            .and_then(|()| self.populate(at, len))
            .and_then(|()| self.collapse_allowed(at, len));
        // Whatever came of it: a collapse that nobody asked for would empty views.
        self.forbid_collapse(at, len)?;
        collapsed
    }

    fn collapse_allowed(&self, at: usize, len: usize) -> Result<(), Error> {
        use rustix::io::Errno as Raw;

        let target = self.at(at, len)?;
        let mut last = Raw::AGAIN;
        for attempt in 0..MOST_COLLAPSES {
            // SAFETY: 1. the range lies in our own mapping. 2. the call changes which pages hold the
            // bytes, and no byte.
            if unsafe { libc::madvise(target.cast(), len, MADV_COLLAPSE) } == 0 {
                return Ok(());
            }
            let os_error = std::io::Error::last_os_error();
            last = Raw::from_io_error(&os_error).unwrap_or(Raw::IO);
            match last {
                Raw::INTR | Raw::AGAIN | Raw::BUSY => relax(attempt),
                _ => break,
            }
        }
        let kind = match last {
            Raw::INTR | Raw::AGAIN | Raw::BUSY => ErrorKind::Busy,
            Raw::NOMEM => ErrorKind::Exhausted,
            Raw::INVAL => ErrorKind::MissingCapability,
            _ => ErrorKind::Os,
        };
        Err(Error::new(self.op, kind).errno_is(last.into()).because("madvise(MADV_COLLAPSE)"))
    }

    /// Keeps the kernel from collapsing pages of the mapping into a huge one: that takes entries out
    /// of other mappings of the same pages, and would put entries for hidden pages into a view.
    pub(crate) fn forbid_collapse(&self, at: usize, len: usize) -> Result<(), Error> {
        let advice = Advice::LinuxNoHugepage;
        match self.advise(at, len, advice, "madvise(MADV_NOHUGEPAGE)") {
            // A kernel without transparent huge pages does not know the advice.
            Err(error) if error.errno() == Errno::EINVAL => Ok(()),
            outcome => outcome,
        }
    }

    /// Keeps the range out of children and core dumps.
    pub(crate) fn keep_private(&self, at: usize, len: usize) -> Result<(), Error> {
        self.advise(at, len, Advice::LinuxDontFork, "madvise(MADV_DONTFORK)")?;
        self.advise(at, len, Advice::LinuxDontDump, "madvise(MADV_DONTDUMP)")
    }

    #[inline]
    fn advise(
        &self,
        at: usize,
        len: usize,
        advice: Advice,
        call: &'static str,
    ) -> Result<(), Error> {
        let target = self.at(at, len)?;
        // SAFETY: 1. the range lies in our own mapping. 2. nobody has a reference into it, so
        // pages may come and go.
        match unsafe { madvise(target.cast(), len, advice) } {
            Ok(()) => Ok(()),
            Err(e) => self.advise_again(target, len, advice, call, e),
        }
    }

    #[cold]
    fn advise_again(
        &self,
        target: *mut u8,
        len: usize,
        advice: Advice,
        call: &'static str,
        mut errno: rustix::io::Errno,
    ) -> Result<(), Error> {
        for attempt in 0..MOST_ATTEMPTS {
            match errno {
                rustix::io::Errno::INTR | rustix::io::Errno::AGAIN => relax(attempt),
                e => return Err(failed(self.op, call, e)),
            }
            // SAFETY: as in `advise`, which has found out where the range lies.
            match unsafe { madvise(target.cast(), len, advice) } {
                Ok(()) => return Ok(()),
                Err(e) => errno = e,
            }
        }
        // EAGAIN for ever is how madvise says that it cannot split a mapping for want of memory.
        Err(Error::new(self.op, ErrorKind::Exhausted).errno_is(Errno::EAGAIN).because(call))
    }

    #[inline]
    pub(super) fn at(&self, at: usize, len: usize) -> Result<*mut u8, Error> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.base.as_ptr().wrapping_add(at)),
            _ => Err(Error::new(self.op, ErrorKind::OutOfRange)),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        release(self.base.as_ptr(), self.len);
    }
}

/// `MADV_DONTNEED_LOCKED` for all the ranges; says how many bytes of them, from the first on, it was done
/// for. Nothing on a kernel that does not do this for the process itself (before Linux 6.14).
fn discard_vector(ranges: &[libc::iovec]) -> usize {
    let advice = Advice::LinuxDontneedLocked as libc::c_int;
    let (vector, len) = (ranges.as_ptr(), ranges.len());
    // SAFETY: 1. the vector outlives the call. 2. its ranges lie in our own mapping: `Mapping::at` has
    // checked each. 3. nobody has a reference into them, so pages may go.
    let done =
        unsafe { libc::syscall(libc::SYS_process_madvise, PIDFD_SELF, vector, len, advice, 0) };
    usize::try_from(done).unwrap_or(0)
}

/// Unmaps addresses that the caller owns and gives up.
fn release(base: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: both callers own the range and drop their claim to it with this call. An error
        // (more mappings than allowed after a split) leaves an inaccessible range behind, no more.
        let _ = unsafe { munmap(base.cast(), len) };
    }
}

fn to_usize(op: Op, size: ByteSize) -> Result<usize, Error> {
    usize::try_from(size.get()).map_err(|_| Error::new(op, ErrorKind::Overflow))
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;

    /// What a mapping that fails late leaves behind is nobody else's.
    #[test]
    fn a_gap_is_closed() {
        let page = ByteSize::from_pages(1);
        let mapping = Mapping::reserve(Op::MapView, ByteSize::from_pages(3), page).unwrap();
        let mapped = || {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let at = |text: &str| usize::from_str_radix(text, 16).unwrap();
            let ranges = maps.lines().map(|line| line.split([' ', '-']).collect::<Vec<_>>());
            let middle = mapping.hva().get() + 4096;
            ranges.into_iter().any(|it| (at(it[0])..at(it[1])).contains(&middle))
        };
        release(mapping.base().as_ptr().wrapping_add(4096), 4096);
        assert!(!mapped());
        // Not open for writing.
        let file = File::open("/proc/self/exe").unwrap();
        assert!(mapping.map_over(4096, 4096, file.as_fd(), 0).is_err());
        assert!(mapped());
    }
}
