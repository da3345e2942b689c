//! The ways in which the host reaches for a byte of a memory, or does something to its page.

use super::memory::{NoFrame, Place, Want};
use super::{CPU, Linux, MemoryId};
use crate::addr::{Pa, Pfn};
use crate::error::Errno;
use crate::geometry::index;
use crate::hyp::el2::{Bytes, KernelOutcome, Signal};

/// A signal that user space gets, with its `si_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UserSignal {
    /// `SIGSEGV`.
    Segv,
    /// `SIGBUS`.
    Bus,
}

/// Why a load or a store did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Raised {
    /// The signal.
    pub signal: UserSignal,
    /// `si_code`: for `SIGSEGV`, 1 if nothing is mapped and 2 if it is denied.
    pub code: i32,
}

impl Raised {
    const UNMAPPED: Self = Self { signal: UserSignal::Segv, code: 1 };
    const DENIED: Self = Self { signal: UserSignal::Segv, code: 2 };
    const BROKEN: Self = Self { signal: UserSignal::Bus, code: 2 };
}

/// How the kernel comes by a page that it then touches through a mapping of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alias {
    /// `process_vm_readv` and `process_vm_writev`.
    ProcessVm,
    /// `/proc/self/mem`.
    ProcMem,
    /// `vmsplice` into a pipe, and a read of that. There is no way to write.
    Splice,
    /// The memory's file, by `pread` and `pwrite`; or by `sendfile` into a pipe, and a read of that.
    File,
}

fn at(pfn: Pfn, place: Place) -> Pa {
    Pa::new(pfn.pa().get() + place.offset)
}

impl Linux {
    /// A load instruction of the VMM's.
    ///
    /// # Errors
    /// The signal.
    pub fn load_u8(&mut self, place: Place) -> Result<u8, Raised> {
        let frame = self.user_frame(place, Want::Read)?;
        let Some(pfn) = frame else { return Ok(0) };
        let mut byte = [0];
        self.el2.user(CPU, at(pfn, place), Bytes::Load(&mut byte)).map_err(raised)?;
        Ok(byte[0])
    }

    /// A store instruction of the VMM's.
    ///
    /// # Errors
    /// The signal.
    pub fn store_u8(&mut self, place: Place, byte: u8) -> Result<(), Raised> {
        let Some(pfn) = self.user_frame(place, Want::Write)? else { return Ok(()) };
        self.el2.user(CPU, at(pfn, place), Bytes::Store(&[byte])).map_err(raised)
    }

    /// The frame behind a place, if there is such a place.
    fn frame_at(&mut self, place: Place, want: Want) -> Result<Option<Pfn>, NoFrame> {
        match self.has_page(place) {
            true => self.frame_of(place.memory, place.page, want),
            false => Err(NoFrame::Unmapped),
        }
    }

    fn user_frame(&mut self, place: Place, want: Want) -> Result<Option<Pfn>, Raised> {
        self.frame_at(place, want).map_err(|why| match why {
            NoFrame::Unmapped => Raised::UNMAPPED,
            NoFrame::Denied => Raised::DENIED,
            NoFrame::Exhausted => Raised::BROKEN,
        })
    }

    /// `write(2)`: the kernel copies from it by the VMM's address.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn copy_out_u8(&mut self, place: Place) -> Result<u8, Errno> {
        let frame = self.frame_at(place, Want::Read);
        let Some(pfn) = frame.map_err(|_| Errno::EFAULT)? else { return Ok(0) };
        let mut byte = [0];
        self.el2.uaccess(CPU, at(pfn, place), Bytes::Load(&mut byte))?;
        Ok(byte[0])
    }

    /// `read(2)`: the kernel copies into it by the VMM's address.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn copy_in_u8(&mut self, place: Place, byte: u8) -> Result<(), Errno> {
        let frame = self.frame_at(place, Want::Write);
        let Some(pfn) = frame.map_err(|_| Errno::EFAULT)? else { return Ok(()) };
        self.el2.uaccess(CPU, at(pfn, place), Bytes::Store(&[byte]))
    }

    /// The kernel loads by a mapping of its own. A guest's page does not survive that.
    ///
    /// # Errors
    /// `EBADF` without a file, `EFAULT` (`EIO` by `/proc`) where nothing is mapped. `EIO` where a real kernel would
    /// have stopped.
    pub fn alias_load_u8(&mut self, place: Place, alias: Alias) -> Result<u8, Errno> {
        let frame = match alias {
            Alias::File => self.file_frame(place)?,
            _ => self.frame_at(place, Want::Read).map_err(|_| refused(alias))?,
        };
        let Some(pfn) = frame else { return Ok(0) };
        self.kernel_load(at(pfn, place))
    }

    /// The same for a store.
    ///
    /// # Errors
    /// As [`Self::alias_load_u8`], and where the mapping denies it: `EFAULT`, or `EIO` by `/proc`, where a kernel may be built
    /// to let only debuggers write there.
    pub fn alias_store_u8(&mut self, place: Place, alias: Alias, byte: u8) -> Result<(), Errno> {
        let frame = match alias {
            Alias::File => match self.file_frame(place)? {
                Some(pfn) => Some(pfn),
                None => {
                    let brought = self.bring(place.memory, place.page);
                    Some(brought.map_err(|_| Errno::ENOMEM)?)
                }
            },
            _ => self.frame_at(place, Want::Write).map_err(|_| refused(alias))?,
        };
        let Some(pfn) = frame else { return Ok(()) };
        match self.el2.kernel_alias(CPU, at(pfn, place), Bytes::Store(&[byte])) {
            KernelOutcome::Done | KernelOutcome::DoneAfterReclaim => Ok(()),
            KernelOutcome::Oops | KernelOutcome::Stuck => Err(Errno::EIO),
        }
    }

    /// The kernel holds a page for a while and does not touch it, as for a pipe that nobody reads.
    ///
    /// # Errors
    /// `EFAULT` where nothing is mapped.
    pub fn hold(&mut self, place: Place) -> Result<(), Errno> {
        let frame = self.frame_at(place, Want::Read);
        frame.map(drop).map_err(|_| Errno::EFAULT)
    }

    fn kernel_load(&self, at: Pa) -> Result<u8, Errno> {
        let mut byte = [0];
        match self.el2.kernel_alias(CPU, at, Bytes::Load(&mut byte)) {
            KernelOutcome::Done | KernelOutcome::DoneAfterReclaim => Ok(byte[0]),
            KernelOutcome::Oops | KernelOutcome::Stuck => Err(Errno::EIO),
        }
    }

    fn file_frame(&self, place: Place) -> Result<Option<Pfn>, Errno> {
        if !self.has_page(place) {
            return Err(Errno::EFAULT);
        }
        let memory = self.memories.get(place.memory.0).filter(|memory| memory.has_file());
        let memory = memory.ok_or(Errno::EBADF)?;
        Ok(memory.frames.get(index(place.page)).copied().flatten())
    }

    /// The frame that the process has mapped there, for a device that is told its physical address.
    fn frame_for_device(&self, place: Place) -> Result<Pa, Errno> {
        let memory = self.memories.get(place.memory.0).filter(|_| self.has_page(place));
        let memory = memory.filter(|memory| memory.vma(place.page).is_some());
        let frame = memory.and_then(|memory| memory.frames[index(place.page)]);
        frame.map(|pfn| at(pfn, place)).ok_or(Errno::EFAULT)
    }

    /// A device reads a byte, and asks nobody.
    ///
    /// # Errors
    /// `EFAULT` where the process has no frame.
    pub fn device_load_u8(&self, place: Place) -> Result<u8, Errno> {
        let mut byte = [0];
        self.el2.dma(self.frame_for_device(place)?, Bytes::Load(&mut byte))?;
        Ok(byte[0])
    }

    /// The same for a store.
    ///
    /// # Errors
    /// As for [`Self::device_load_u8`].
    pub fn device_store_u8(&self, place: Place, byte: u8) -> Result<(), Errno> {
        self.el2.dma(self.frame_for_device(place)?, Bytes::Store(&[byte]))
    }

    /// `fork`, and a load of the child. What is the process's alone and pinned is copied for the child at once, by the
    /// kernel.
    ///
    /// # Errors
    /// The child's signal.
    pub fn fork_load_u8(&mut self, place: Place) -> Result<u8, Raised> {
        // What the process has alone is write-protected for the copy: whoever is shown it loses it, and faults anew.
        let private: Vec<_> = self
            .memories
            .iter()
            .filter(|(_, memory)| memory.is_private())
            .map(|(id, memory)| (MemoryId(id), memory.frames.len() as u64))
            .collect();
        for (memory, nr_pages) in private {
            (0..nr_pages).for_each(|page| self.dropped_by_host(memory, page));
        }
        let mut copied = Vec::new();
        for (_, memory) in self.memories.iter_mut().filter(|(_, memory)| memory.is_private()) {
            for page in 0..memory.frames.len() {
                let Some(pfn) = memory.frames[page].filter(|_| memory.vmas[page].is_some()) else {
                    continue;
                };
                if self.frames.is_pinned(pfn) {
                    memory.split(page as u64);
                    copied.push(pfn);
                }
            }
        }
        for pfn in copied {
            self.kernel_load(pfn.pa()).map_err(|_| Raised::BROKEN)?;
        }
        self.load_u8(place)
    }

    /// `madvise(MADV_DONTNEED)`.
    ///
    /// # Errors
    /// `ENOMEM` where nothing is mapped, `EINVAL` where it is locked.
    pub fn discard(&mut self, place: Place) -> Result<(), Errno> {
        let vma = self.memories.get(place.memory.0).and_then(|memory| memory.vma(place.page));
        if vma.ok_or(Errno::ENOMEM)?.is_locked {
            return Err(Errno::EINVAL);
        }
        self.dropped_by_host(place.memory, place.page);
        self.forget_private(place.memory, place.page);
        Ok(())
    }

    /// `fallocate(FALLOC_FL_PUNCH_HOLE)` of the file. Of a huge page of hugetlb nothing goes; the part is zeroed.
    ///
    /// # Errors
    /// `EBADF` without a file.
    pub fn punch(&mut self, place: Place) -> Result<(), Errno> {
        let frame = self.file_frame(place)?;
        self.dropped_by_host(place.memory, place.page);
        let memory = &mut self.memories[place.memory.0];
        if memory.backing == super::Backing::Hugetlb {
            let Some(pfn) = frame else { return Ok(()) };
            let zeroed = self.el2.kernel_alias(CPU, pfn.pa(), Bytes::Store(&[0; 4096]));
            return match zeroed {
                KernelOutcome::Done | KernelOutcome::DoneAfterReclaim => Ok(()),
                KernelOutcome::Oops | KernelOutcome::Stuck => Err(Errno::EIO),
            };
        }
        memory.split(place.page);
        if let Some(pfn) = memory.frames[index(place.page)].take() {
            self.frames.put(pfn);
        }
        Ok(())
    }

    /// `munmap`.
    pub fn unmap(&mut self, place: Place) {
        if !self.has_page(place) {
            return;
        }
        self.dropped_by_host(place.memory, place.page);
        self.forget_private(place.memory, place.page);
        let vma = self.memories[place.memory.0].vmas[index(place.page)].take();
        if vma.is_some_and(|vma| vma.is_locked) {
            self.locked.uncharge();
        }
    }

    /// The process lets go of a frame of its own; a file keeps its.
    fn forget_private(&mut self, memory: MemoryId, page: u64) {
        let memory = &mut self.memories[memory.0];
        memory.split(page);
        if memory.is_private() {
            if let Some(pfn) = memory.frames[index(page)].take() {
                self.frames.put(pfn);
            }
        }
    }

    /// `mprotect(PROT_READ)`.
    ///
    /// # Errors
    /// `ENOMEM` where nothing is mapped.
    pub fn protect(&mut self, place: Place) -> Result<(), Errno> {
        self.vma_mut(place).ok_or(Errno::ENOMEM)?.is_writable = false;
        self.memories[place.memory.0].split(place.page);
        self.dropped_by_host(place.memory, place.page);
        Ok(())
    }

    /// `mlock`.
    ///
    /// # Errors
    /// `ENOMEM` where nothing is mapped, and beyond the limit.
    pub fn lock(&mut self, place: Place) -> Result<(), Errno> {
        let vma = self.vma_mut(place).ok_or(Errno::ENOMEM)?;
        if vma.is_locked {
            return Ok(());
        }
        self.locked.charge()?;
        if let Some(vma) = self.vma_mut(place) {
            vma.is_locked = true;
        }
        let is_private = self.memories[place.memory.0].is_private();
        let want = if is_private { Want::Write } else { Want::Read };
        // Where the mapping denies writes there is nothing to bring.
        let _ = self.frame_at(place, want);
        Ok(())
    }

    /// `munlock`.
    ///
    /// # Errors
    /// `ENOMEM` where nothing is mapped.
    pub fn unlock(&mut self, place: Place) -> Result<(), Errno> {
        let vma = self.vma_mut(place).ok_or(Errno::ENOMEM)?;
        if std::mem::take(&mut vma.is_locked) {
            self.locked.uncharge();
        }
        Ok(())
    }

    fn vma_mut(&mut self, place: Place) -> Option<&mut super::memory::Vma> {
        self.memories.get_mut(place.memory.0)?.vmas.get_mut(index(place.page))?.as_mut()
    }
}

fn raised(signal: Signal) -> Raised {
    match signal {
        Signal::SegvAccerr => Raised::DENIED,
        Signal::Bus => Raised::BROKEN,
    }
}

fn refused(alias: Alias) -> Errno {
    if alias == Alias::ProcMem { Errno::EIO } else { Errno::EFAULT }
}
