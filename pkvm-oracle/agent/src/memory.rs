//! Memories, and the ways in which the host reaches for them.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use pkvm_oracle::{Backing, Errno, HostAct, Observation, PAGE_SIZE, Signal, Size};

use crate::sys::{self, Fork};
use crate::{device, fault, kvm};

const HUGE: usize = 2 << 20;

#[derive(Debug)]
pub(crate) struct Memory {
    at: *mut u8,
    file: Option<File>,
    pub(crate) guest_memfd: Option<OwnedFd>,
    nr_pages: u64,
}

impl Memory {
    /// `vm` is whose guest_memfd it is, if it is one.
    pub(crate) fn new(
        backing: &Backing,
        nr_pages: u64,
        size: Size,
        vm: Option<&kvm::Vm>,
    ) -> Result<Self, Errno> {
        let bytes = nr_pages * PAGE_SIZE;
        let (file, guest_memfd, flags) = match backing {
            Backing::Anon => (None, None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            Backing::Shared => (None, None, libc::MAP_SHARED | libc::MAP_ANONYMOUS),
            Backing::Memfd => (Some(sys::memfd(c"memory", bytes, 0)?), None, libc::MAP_SHARED),
            Backing::Hugetlb => {
                let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
                (Some(sys::memfd(c"memory", bytes, flags)?), None, libc::MAP_SHARED)
            }
            Backing::GuestMemfd(_) => {
                let vm = vm.ok_or(Errno(libc::EBADF))?;
                (None, Some(vm.guest_memfd(bytes)?), libc::MAP_SHARED)
            }
        };
        let len = usize::try_from(bytes).map_err(|_| Errno(libc::ENOMEM))?;
        let fd = file.as_ref().or(guest_memfd.as_ref());
        let at = match size {
            Size::Small => sys::map(len, flags, fd)?,
            Size::Huge => {
                let at = sys::map(len + HUGE, flags, fd)?;
                at.wrapping_add(at.align_offset(HUGE))
            }
        };
        let memory = Self { at, file: file.map(File::from), guest_memfd, nr_pages };
        match size {
            // Memory that knows no huge pages refuses; then they are small anyway.
            Size::Small => {
                let _: Result<(), Errno> = sys::advise(at, len, libc::MADV_NOHUGEPAGE);
            }
            Size::Huge => {
                sys::advise(at, len, libc::MADV_HUGEPAGE)?;
                (0..len).step_by(PAGE_SIZE as usize).for_each(|offset| {
                    fault::store(at.wrapping_add(offset), 0);
                });
            }
        }
        Ok(memory)
    }

    /// Where a page is mapped, if there is such a page.
    pub(crate) fn page(&self, page: u64) -> Option<*mut u8> {
        let offset = usize::try_from(page * PAGE_SIZE).ok()?;
        (page < self.nr_pages).then(|| self.at.wrapping_add(offset))
    }

    pub(crate) fn has_pages(&self, end: u64) -> bool {
        end <= self.nr_pages
    }

    /// Does it to a byte of a page, or to the page.
    pub(crate) fn act(&self, act: HostAct, page: u64, offset: u64) -> Observation {
        let (Some(start), Ok(in_page)) = (self.page(page), usize::try_from(offset)) else {
            return Observation::Nothing;
        };
        let at = start.wrapping_add(in_page);
        let len = PAGE_SIZE as usize;
        let in_file = page * PAGE_SIZE + offset;
        match act {
            HostAct::Load => fault::load(at),
            HostAct::Store(byte) => fault::store(at, byte),
            HostAct::Write => seen(through_pipe(|to| sys::write_from(to, at))),
            HostAct::Read(byte) => done(read_from_pipe(at, byte)),
            HostAct::VmRead => {
                let mut byte = 0;
                let nr_read = sys::vm_read(at, &mut byte);
                seen(nr_read.map(|nr_read| (nr_read == 1).then_some(byte)))
            }
            HostAct::VmWrite(byte) => done(sys::vm_write(at, byte)),
            HostAct::MemRead => seen(read_file(own_memory(), at.addr() as u64)),
            HostAct::MemWrite(byte) => done(write_file(own_memory(), at.addr() as u64, byte)),
            HostAct::Splice => seen(through_pipe(|to| sys::splice_from(to, at))),
            HostAct::Pin => done(sys::pipe().and_then(|(_from, to)| sys::splice_from(&to, at))),
            HostAct::FileRead => seen(read_file(self.file(), in_file)),
            HostAct::FileWrite(byte) => done(write_file(self.file(), in_file, byte)),
            HostAct::SendFile => seen(self.send_file(in_file)),
            HostAct::DmaLoad => seen(device::load(at).map(Some)),
            HostAct::DmaStore(byte) => good(device::store(at, byte)),
            HostAct::Discard => good(sys::advise(start, len, libc::MADV_DONTNEED)),
            HostAct::Punch => good(self.punch(page)),
            HostAct::ForkLoad => load_in_child(at).unwrap_or_else(Observation::Failed),
            HostAct::Unmap => good(sys::unmap(start, len)),
            HostAct::Protect => good(sys::protect(start, len, libc::PROT_READ)),
            HostAct::Lock => good(sys::lock(start, len)),
            HostAct::Unlock => good(sys::unlock(start, len)),
        }
    }

    fn file(&self) -> Result<File, Errno> {
        let file = self.file.as_ref().ok_or(Errno(libc::EBADF))?;
        file.try_clone().map_err(|error| sys::errno_of(&error))
    }

    fn send_file(&self, at: u64) -> Result<Option<u8>, Errno> {
        let file = OwnedFd::from(self.file()?);
        through_pipe(|to| sys::send_from(to, &file, at))
    }

    fn punch(&self, page: u64) -> Result<(), Errno> {
        let file = self.file()?;
        sys::punch(&OwnedFd::from(file), page * PAGE_SIZE, PAGE_SIZE)
    }
}

fn good(result: Result<(), Errno>) -> Observation {
    result.map_or_else(Observation::Failed, |()| Observation::Ok)
}

/// One byte was to be written.
fn done(result: Result<isize, Errno>) -> Observation {
    match result {
        Ok(1) => Observation::Ok,
        Ok(_) => Observation::Short,
        Err(errno) => Observation::Failed(errno),
    }
}

/// One byte was to be seen.
fn seen(result: Result<Option<u8>, Errno>) -> Observation {
    match result {
        Ok(Some(byte)) => Observation::Byte(byte),
        Ok(None) => Observation::Short,
        Err(errno) => Observation::Failed(errno),
    }
}

/// Puts a byte into a pipe, and says what came out.
fn through_pipe(put: impl FnOnce(&OwnedFd) -> Result<isize, Errno>) -> Result<Option<u8>, Errno> {
    let (from, to) = sys::pipe()?;
    if put(&to)? != 1 {
        return Ok(None);
    }
    let mut byte = 0;
    let nr_read = sys::read_to(&from, &raw mut byte)?;
    Ok((nr_read == 1).then_some(byte))
}

fn read_from_pipe(at: *mut u8, byte: u8) -> Result<isize, Errno> {
    let (from, to) = sys::pipe()?;
    if sys::write_from(&to, &raw const byte)? != 1 {
        return Err(Errno(libc::EPIPE));
    }
    sys::read_to(&from, at)
}

fn own_memory() -> Result<File, Errno> {
    let file = OpenOptions::new().read(true).write(true).open("/proc/self/mem");
    file.map_err(|error| sys::errno_of(&error))
}

fn read_file(file: Result<File, Errno>, at: u64) -> Result<Option<u8>, Errno> {
    let mut byte = [0];
    let nr_read = file?.read_at(&mut byte, at).map_err(|error| sys::errno_of(&error))?;
    Ok((nr_read == 1).then_some(byte[0]))
}

fn write_file(file: Result<File, Errno>, at: u64, byte: u8) -> Result<isize, Errno> {
    let nr_written = file?.write_at(&[byte], at).map_err(|error| sys::errno_of(&error))?;
    Ok(if nr_written == 1 { 1 } else { 0 })
}

/// What a child's load shows, carried over a pipe: what, and its number.
fn load_in_child(at: *mut u8) -> Result<Observation, Errno> {
    let (from, to) = sys::pipe()?;
    match sys::fork()? {
        Fork::Child => {
            let told = match fault::load(at) {
                Observation::Byte(byte) => [0, byte],
                Observation::Signal(Signal::Segv, code) => [1, code as u8],
                Observation::Signal(Signal::Bus, code) => [2, code as u8],
                _ => [3, 0],
            };
            for byte in told {
                // The parent notices what does not arrive.
                let _: Result<isize, Errno> = sys::write_from(&to, &raw const byte);
            }
            sys::leave(0)
        }
        Fork::Parent(pid) => {
            drop(to);
            let mut told = [3, 0];
            for byte in &mut told {
                sys::read_to(&from, byte)?;
            }
            sys::reap(pid, true)?;
            Ok(match told {
                [0, byte] => Observation::Byte(byte),
                [1, code] => Observation::Signal(Signal::Segv, i32::from(code)),
                [2, code] => Observation::Signal(Signal::Bus, i32::from(code)),
                _ => Observation::Short,
            })
        }
    }
}
