//! The ways in which the host reaches for a byte of a memory.

use super::Process;
use super::memory::{Kind, Place};
use crate::addr::{Gfn, Ipa, Pfn};
use crate::hyp::gunyah::touch::{Bytes, KernelOutcome};

/// Whose pointer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pointer {
    /// User space's own, in user space.
    User,
    /// User space's, in the kernel: `read(2)`, `write(2)`.
    Uaccess,
    /// The kernel's own, to a page that user space has mapped: `process_vm_readv(2)`.
    Alias,
    /// The kernel's own, whoever has the page.
    Kernel,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    Done,
    /// `SIGBUS`, with `si_code`: 2 if the kernel finds no page for it, 3 if the access itself is answered with an abort.
    Sigbus(i32),
    Efault,
    /// The kernel has died.
    Dead,
}

fn ipa(pfn: Pfn, place: Place) -> Ipa {
    Ipa::new(Gfn::new(pfn.get()).ipa().get() + place.offset)
}

impl Process {
    /// The frame that user space's entry leads to, made if there is none: a file's page that is lent is taken back for
    /// that, unless its VM still uses it.
    fn fault(&mut self, place: Place) -> Option<Pfn> {
        let folio = self.folio(place.memory, place.page).ok()?;
        let pfn = folio.pfn_of(place.page);
        let is_mapped = self.memories[place.memory.0].mapped.contains(&place.page);
        if !is_mapped && matches!(self.memories[place.memory.0].kind, Kind::GuestMemfd { .. }) {
            let is_hidden = !self.gunyah.with(|world| world.kernel.sees(pfn));
            if is_hidden {
                if self.is_used(place.memory, folio) {
                    return None;
                }
                self.reclaim_folio(place.memory, folio).ok()?;
            }
        }
        self.note_mapped(place.memory, place.page, pfn);
        Some(pfn)
    }

    pub(crate) fn touch(&mut self, by: Pointer, place: Place, bytes: Bytes<'_>) -> Touched {
        match by {
            Pointer::User => {
                let Some(pfn) = self.fault(place) else { return Touched::Sigbus(2) };
                let touched = self.gunyah.user(ipa(pfn, place), bytes);
                touched.map_or(Touched::Sigbus(3), |()| Touched::Done)
            }
            Pointer::Uaccess => {
                let Some(pfn) = self.fault(place) else { return Touched::Efault };
                let touched = self.gunyah.uaccess(ipa(pfn, place), bytes);
                touched.map_or(Touched::Efault, |()| Touched::Done)
            }
            Pointer::Alias => match self.fault(place) {
                Some(pfn) => self.kernel(ipa(pfn, place), bytes),
                None => Touched::Efault,
            },
            Pointer::Kernel => match self.folio(place.memory, place.page) {
                Ok(folio) => self.kernel(ipa(folio.pfn_of(place.page), place), bytes),
                Err(_) => Touched::Efault,
            },
        }
    }

    /// A pointer into the direct map.
    fn kernel(&self, at: Ipa, bytes: Bytes<'_>) -> Touched {
        let sees = self.gunyah.with(|world| world.kernel.sees(Pfn::new(at.gfn().get())));
        match sees.then(|| self.gunyah.kernel_alias(at, bytes)) {
            Some(KernelOutcome::Done) => Touched::Done,
            Some(KernelOutcome::Fatal) | None => Touched::Dead,
        }
    }

    /// Pins a page, as for a device, or lets go of it. It is mapped for that.
    pub(crate) fn pin(&mut self, place: Place, pin: bool) -> Touched {
        let folio = self.find(place.memory, place.page).map(|folio| folio.pfn_of(place.page));
        let pfn = if pin { self.fault(place) } else { folio };
        let Some(pfn) = pfn else { return Touched::Efault };
        self.gunyah.with(|world| {
            world.kernel.note_use(pfn, |uses| match pin {
                true => uses.nr_pinned += 1,
                false => uses.nr_pinned = uses.nr_pinned.saturating_sub(1),
            });
        });
        Touched::Done
    }

    /// The frames behind pages of a memory, each with its address as the host has it.
    pub(crate) fn frames(&mut self, memory: super::MemoryId, first: u64, end: u64) -> Vec<Pfn> {
        let folios = (first..end).map(|page| self.folio(memory, page).map(|it| it.pfn_of(page)));
        folios.filter_map(Result::ok).collect()
    }
}
