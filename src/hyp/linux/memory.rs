//! What the process has mapped, and the frame behind a page of it.

use super::Linux;
use super::kvm::VmId;
use crate::addr::Pfn;
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, PAGE_BYTES, index};

/// A mapping of the process, made by one `mmap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryId(pub(super) usize);

/// What a memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous.
    Anonymous,
    /// Shared anonymous.
    Shared,
    /// A memfd, mapped shared.
    Memfd,
    /// A memfd of hugetlb pages of 2 MiB, mapped shared.
    Hugetlb,
    /// KVM's guest_memfd of this VM, whose pages the host may map.
    GuestMemfd(VmId),
}

/// Which pages are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// Of 4 KiB.
    Base,
    /// Of 2 MiB, all touched at once.
    Huge,
}

/// A byte of a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which memory.
    pub memory: MemoryId,
    /// Its page.
    pub page: u64,
    /// Bytes from the start of that page.
    pub offset: u64,
}

/// A mapping of more is more than the machine has, many times over.
const MOST_PAGES: u64 = 1 << 20;

/// What an access wants of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Read,
    Write,
}

/// Why there is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoFrame {
    Unmapped,
    Denied,
    /// The kernel is out of memory.
    Exhausted,
}

/// A page of the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vma {
    pub(super) is_writable: bool,
    pub(super) is_locked: bool,
}

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) backing: Backing,
    /// `None` where it was unmapped.
    pub(super) vmas: Vec<Option<Vma>>,
    /// The process's own frames if it is private, else the file's.
    pub(super) frames: Vec<Option<Pfn>>,
    /// Which 2 MiB are mapped by one entry.
    pub(super) huge: Vec<bool>,
}

impl Memory {
    pub(super) fn is_private(&self) -> bool {
        self.backing == Backing::Anonymous
    }

    pub(super) fn has_file(&self) -> bool {
        matches!(self.backing, Backing::Memfd | Backing::Hugetlb)
    }

    /// Whether a hypervisor may keep a page of it for a guest of its own.
    pub(super) fn is_swap_backed(&self) -> bool {
        matches!(self.backing, Backing::Anonymous | Backing::Shared | Backing::Memfd)
    }

    pub(super) fn vma(&self, page: u64) -> Option<Vma> {
        self.vmas.get(index(page)).copied().flatten()
    }

    pub(super) fn is_huge(&self, page: u64) -> bool {
        self.huge.get(index(page / HUGE_PAGES)).is_some_and(|&huge| huge)
    }

    /// Only part of a huge page is treated so: it is mapped by small entries from now on.
    pub(super) fn split(&mut self, page: u64) {
        if self.backing == Backing::Hugetlb {
            return;
        }
        if let Some(huge) = self.huge.get_mut(index(page / HUGE_PAGES)) {
            *huge = false;
        }
    }
}

impl Linux {
    /// `mmap`.
    ///
    /// # Errors
    /// `EBADF` for the guest_memfd of a VM whose descriptor is closed; `EINVAL` for no pages, or a part of a huge one;
    /// `ENOMEM`.
    pub fn map(
        &mut self,
        backing: Backing,
        nr_pages: u64,
        kind: PageKind,
    ) -> Result<MemoryId, Errno> {
        if nr_pages > MOST_PAGES {
            return Err(Errno::ENOMEM);
        }
        let is_huge = kind == PageKind::Huge || backing == Backing::Hugetlb;
        if nr_pages == 0 || backing == Backing::Hugetlb && nr_pages % HUGE_PAGES != 0 {
            return Err(Errno::EINVAL);
        }
        if let Backing::GuestMemfd(vm) = backing {
            self.open_vm(vm).ok_or(Errno::EBADF)?.nr_holders += 1;
        }
        let mut frames = vec![None; index(nr_pages)];
        let mut huge = vec![false; index(nr_pages.div_ceil(HUGE_PAGES))];
        if is_huge {
            for start in (0..nr_pages / HUGE_PAGES).map(|nr| nr * HUGE_PAGES) {
                let first = self.frames.user_pages(&self.el2, HUGE_PAGES)?;
                for nth in 0..HUGE_PAGES {
                    frames[index(start + nth)] = first.checked_add(nth);
                }
                huge[index(start / HUGE_PAGES)] = true;
            }
        }
        let vma = Vma { is_writable: true, is_locked: false };
        let vmas = vec![Some(vma); index(nr_pages)];
        Ok(MemoryId(self.memories.insert(Memory { backing, vmas, frames, huge })))
    }

    /// The frame behind a page, brought there if it must be. `None` is the frame of zeroes: nobody has written there.
    pub(super) fn frame_of(
        &mut self,
        memory: MemoryId,
        page: u64,
        want: Want,
    ) -> Result<Option<Pfn>, NoFrame> {
        let found = self.memories.get(memory.0).ok_or(NoFrame::Unmapped)?;
        let vma = found.vma(page).ok_or(NoFrame::Unmapped)?;
        if want == Want::Write && !vma.is_writable {
            return Err(NoFrame::Denied);
        }
        match found.frames[index(page)] {
            Some(pfn) => Ok(Some(pfn)),
            None if found.is_private() && want == Want::Read => Ok(None),
            None => self.bring(memory, page).map(Some),
        }
    }

    /// A new frame for a page that has none. Guests that were shown zeroes there lose that.
    pub(super) fn bring(&mut self, memory: MemoryId, page: u64) -> Result<Pfn, NoFrame> {
        let pfn = self.frames.user_pages(&self.el2, 1).map_err(|_| NoFrame::Exhausted)?;
        self.dropped_by_host(memory, page);
        self.memories[memory.0].frames[index(page)] = Some(pfn);
        Ok(pfn)
    }

    /// A page of a memory that has it.
    pub(super) fn has_page(&self, place: Place) -> bool {
        let memory = self.memories.get(place.memory.0);
        memory.is_some_and(|memory| place.page < memory.vmas.len() as u64)
            && place.offset < PAGE_BYTES as u64
    }
}
