//! Files and plain memory, and the folios behind their pages.

use std::collections::{BTreeMap, BTreeSet};

use super::Process;
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::{HUGE_PAGES, PAGE_BYTES};
use crate::hyp::gunyah::host::Contents;
use crate::hyp::gunyah::touch::{Bytes, KernelOutcome};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MemoryId(pub(super) usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The kernel's guest_memfd; with folios of 2 MiB, where that may be and they fit.
    GuestMemfd { huge: bool },
    /// Anonymous memory that the process has touched.
    Plain,
}

/// A byte of a memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) memory: MemoryId,
    pub(crate) page: u64,
    pub(crate) offset: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Folio {
    /// Its first page in the file.
    pub(super) page: u64,
    pub(super) pfn: Pfn,
    pub(super) nr: u64,
}

impl Folio {
    pub(super) fn pfn_of(self, page: u64) -> Pfn {
        Pfn::new(self.pfn.get() + (page - self.page))
    }
}

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) kind: Kind,
    pub(super) nr_pages: u64,
    folios: BTreeMap<u64, Folio>,
    /// Pages that the process has an entry for.
    pub(super) mapped: BTreeSet<u64>,
}

impl Process {
    /// `GH_CREATE_GUEST_MEM` and `mmap`, or `mmap` alone.
    ///
    /// # Errors
    /// `EINVAL` for none, `ENOMEM`.
    pub(crate) fn memory(&mut self, kind: Kind, nr_pages: u64) -> Result<MemoryId, Errno> {
        if nr_pages == 0 {
            return Err(Errno::EINVAL);
        }
        let (folios, mapped) = (BTreeMap::new(), BTreeSet::new());
        self.memories.push(Memory { kind, nr_pages, folios, mapped });
        let id = MemoryId(self.memories.len() - 1);
        if kind == Kind::Plain {
            for page in 0..nr_pages {
                let folio = self.folio(id, page)?;
                self.note_mapped(id, page, folio.pfn);
            }
        }
        Ok(id)
    }

    /// `mmap` of the file for the process alone.
    ///
    /// # Errors
    /// `EINVAL`, always: what is in it is not copied.
    pub(crate) fn map_private(&self, memory: MemoryId) -> Result<(), Errno> {
        match self.memories[memory.0].kind {
            Kind::GuestMemfd { .. } => Err(Errno::EINVAL),
            Kind::Plain => Ok(()),
        }
    }

    pub(super) fn find(&self, memory: MemoryId, page: u64) -> Option<Folio> {
        let (_, &folio) = self.memories[memory.0].folios.range(..=page).next_back()?;
        (page < folio.page + folio.nr).then_some(folio)
    }

    /// The folio behind a page. A new one is all zeroes.
    ///
    /// # Errors
    /// `EINVAL` behind the end, `ENOMEM`.
    pub(super) fn folio(&mut self, memory: MemoryId, page: u64) -> Result<Folio, Errno> {
        if let Some(folio) = self.find(memory, page) {
            return Ok(folio);
        }
        let file = &self.memories[memory.0];
        if page >= file.nr_pages {
            return Err(Errno::EINVAL);
        }
        let block = page - page % HUGE_PAGES;
        let fits = file.kind == (Kind::GuestMemfd { huge: true })
            && block + HUGE_PAGES <= file.nr_pages
            && file.folios.range(block..block + HUGE_PAGES).next().is_none();
        let huge = fits.then(|| self.blocks.pop()).flatten();
        let folio = match huge {
            Some(pfn) => Folio { page: block, pfn, nr: HUGE_PAGES },
            None => Folio { page, pfn: self.pages.pop().ok_or(Errno::ENOMEM)?, nr: 1 },
        };
        for nth in 0..folio.nr {
            self.clear(folio.pfn_of(folio.page + nth))?;
        }
        self.memories[memory.0].folios.insert(folio.page, folio);
        Ok(folio)
    }

    /// By the kernel's own pointer.
    fn clear(&self, pfn: Pfn) -> Result<(), Errno> {
        let zeroes = Bytes::Store(&[0; PAGE_BYTES]);
        match self.gunyah.kernel_alias(Gfn::new(pfn.get()).ipa(), zeroes) {
            KernelOutcome::Done => Ok(()),
            KernelOutcome::Fatal => Err(Errno::EIO),
        }
    }

    pub(super) fn note_mapped(&mut self, memory: MemoryId, page: u64, pfn: Pfn) {
        if self.memories[memory.0].mapped.insert(page) {
            self.gunyah.with(|world| world.kernel.note_use(pfn, |uses| uses.nr_mapped += 1));
        }
    }

    /// The process has an entry for the page no more.
    pub(crate) fn discard(&mut self, place: Place) {
        let Some(folio) = self.find(place.memory, place.page) else { return };
        if self.memories[place.memory.0].mapped.remove(&place.page) {
            let pfn = folio.pfn_of(place.page);
            self.gunyah.with(|world| world.kernel.note_use(pfn, |uses| uses.nr_mapped -= 1));
        }
    }

    /// `fallocate(FALLOC_FL_PUNCH_HOLE)` of one page: VMs lose it, then the process, then the file. Of a larger folio
    /// nothing goes but the bytes.
    ///
    /// # Errors
    /// `EBADF` for what is no file; what taking it back says.
    pub(crate) fn punch(&mut self, place: Place) -> Result<(), Errno> {
        if self.memories[place.memory.0].kind == Kind::Plain {
            return Err(Errno::EBADF);
        }
        let Some(folio) = self.find(place.memory, place.page) else { return Ok(()) };
        self.reclaim_folio(place.memory, folio)?;
        if folio.nr > 1 {
            return self.clear(folio.pfn_of(place.page));
        }
        self.discard(place);
        self.memories[place.memory.0].folios.remove(&folio.page);
        let uses = self.gunyah.with(|world| world.kernel.uses(folio.pfn));
        // Who has it pinned keeps it.
        if uses.nr_pinned == 0 {
            self.pages.push(folio.pfn);
        }
        Ok(())
    }

    /// Takes a folio back from all VMs.
    pub(super) fn reclaim_folio(&mut self, memory: MemoryId, folio: Folio) -> Result<(), Errno> {
        for (vm, run) in self.places(memory, folio) {
            self.vms[vm.0].guest.reclaim(&[run], Contents::Clear)?;
        }
        Ok(())
    }
}
