//! Bindings of files to VMs, and what a VM's fault becomes.

use super::Process;
use super::memory::{Folio, Kind, MemoryId};
use crate::addr::{Gfn, Ipa};
use crate::error::Errno;
use crate::hyp::gunyah::host::{Contents, Side};
use crate::hyp::gunyah::rm::vm::VmState;
use crate::hyp::gunyah::touch::{Abort, Bytes};
use crate::stage2::GuestRun;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct VmId(pub(super) usize);

/// Pages of a VM's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) gfn: Gfn,
    pub(crate) nr: u64,
}

/// What a file is bound as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) memory: MemoryId,
    pub(crate) first: u64,
    pub(crate) side: Side,
    pub(crate) writes: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Binding {
    gfn: u64,
    nr: u64,
    what: Bind,
}

/// How a VM's access ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    Done,
    /// The process gets an exit, with the reason why the fault was not resolved.
    PageFault(Errno),
    /// The VM does not run.
    NotRunning,
    /// It faults again and again.
    Spins,
}

impl Binding {
    fn has(&self, gfn: u64) -> bool {
        (self.gfn..self.gfn + self.nr).contains(&gfn)
    }

    /// Where the VM has a folio, if all of it is bound.
    fn place_of(&self, memory: MemoryId, folio: Folio) -> Option<GuestRun> {
        let skip = folio.page.checked_sub(self.what.first)?;
        let is_all = self.what.memory == memory && skip + folio.nr <= self.nr;
        is_all.then(|| GuestRun {
            gfn: Gfn::new(self.gfn + skip),
            pfn: folio.pfn,
            nr_pages: folio.nr,
        })
    }
}

impl Process {
    /// Binds pages of a file.
    ///
    /// # Errors
    /// `EINVAL` for what is no such file, or more than it has; `EEXIST` where something is bound.
    pub(crate) fn bind(&mut self, vm: VmId, at: Span, what: Bind) -> Result<(), Errno> {
        let file = &self.memories[what.memory.0];
        if file.kind == Kind::Plain || what.first + at.nr > file.nr_pages {
            return Err(Errno::EINVAL);
        }
        let new = Binding { gfn: at.gfn.get(), nr: at.nr, what };
        let bindings = &mut self.vms[vm.0].bindings;
        if bindings.iter().any(|old| old.gfn < new.gfn + new.nr && new.gfn < old.gfn + old.nr) {
            return Err(Errno::EEXIST);
        }
        bindings.push(new);
        Ok(())
    }

    /// Takes away the whole of a binding, its beginning or its end.
    ///
    /// # Errors
    /// `ENOENT` where nothing is bound; `EINVAL` out of the middle, or beyond it; what taking back says.
    pub(crate) fn unbind(&mut self, vm: VmId, at: Span) -> Result<(), Errno> {
        let (start, end) = (at.gfn.get(), at.gfn.get() + at.nr);
        let nth = self.vms[vm.0].bindings.iter().position(|binding| binding.has(start));
        let nth = nth.ok_or(Errno::ENOENT)?;
        let old = self.vms[vm.0].bindings[nth];
        let old_end = old.gfn + old.nr;
        if end > old_end || (start > old.gfn && end < old_end) {
            return Err(Errno::EINVAL);
        }
        self.reclaim(vm, at)?;
        let bindings = &mut self.vms[vm.0].bindings;
        if at.nr == old.nr {
            bindings.remove(nth);
        } else if start == old.gfn {
            let what = Bind { first: old.what.first + at.nr, ..old.what };
            bindings[nth] = Binding { gfn: end, nr: old.nr - at.nr, what };
        } else {
            bindings[nth].nr -= at.nr;
        }
        Ok(())
    }

    /// Provides the folio behind an address.
    ///
    /// # Errors
    /// `ENOENT` where nothing is bound; `EPERM` to write to what is bound for reading only; `EINVAL` for a folio that is not
    /// bound as a whole; what providing says, above all `EAGAIN` for what the VM has, and `EPERM`.
    pub(crate) fn demand(&mut self, vm: VmId, gfn: Gfn, write: bool) -> Result<(), Errno> {
        let found = self.vms[vm.0].bindings.iter().find(|binding| binding.has(gfn.get()));
        let binding = *found.ok_or(Errno::ENOENT)?;
        let Bind { memory, first, side, writes } = binding.what;
        if write && !writes {
            return Err(Errno::EPERM);
        }
        let folio = self.folio(memory, first + (gfn.get() - binding.gfn))?;
        let run = binding.place_of(memory, folio).ok_or(Errno::EINVAL)?;
        self.vms[vm.0].guest.provide(&[run], side, writes, &mut || ())
    }

    /// Where VMs have a folio.
    pub(super) fn places(&self, memory: MemoryId, folio: Folio) -> Vec<(VmId, GuestRun)> {
        let mut places = Vec::new();
        for (nth, vm) in self.vms.iter().enumerate() {
            let runs = vm.bindings.iter().filter_map(|binding| binding.place_of(memory, folio));
            places.extend(runs.map(|run| (VmId(nth), run)));
        }
        places
    }

    /// Takes back what a VM has there, by whole folios.
    ///
    /// # Errors
    /// What taking back says.
    pub(crate) fn reclaim(&mut self, vm: VmId, at: Span) -> Result<(), Errno> {
        for gfn in at.gfn.get()..at.gfn.get() + at.nr {
            let found = self.vms[vm.0].bindings.iter().find(|binding| binding.has(gfn));
            let Some(&binding) = found else { continue };
            let page = binding.what.first + (gfn - binding.gfn);
            let Some(folio) = self.find(binding.what.memory, page) else { continue };
            let Some(run) = binding.place_of(binding.what.memory, folio) else { continue };
            self.vms[vm.0].guest.reclaim(&[run], Contents::Clear)?;
        }
        Ok(())
    }

    /// Turns what a VM has from one side to the other, as it asks.
    ///
    /// # Errors
    /// What turning says.
    pub(crate) fn turn(&mut self, vm: VmId, at: Span, to: Side) -> Result<(), Errno> {
        let guest = &mut self.vms[vm.0].guest;
        let mut runs = Vec::new();
        let mut nr_done = 0;
        while nr_done < at.nr {
            let gfn = Gfn::new(at.gfn.get() + nr_done);
            let (given, nr) = guest.given(gfn, at.nr - nr_done);
            runs.push(given.ok_or(Errno::EAGAIN)?.run);
            nr_done += nr;
        }
        guest.turn(&runs, to, &mut || ())
    }

    /// Whether any VM that is not stopped has a folio.
    pub(super) fn is_used(&self, memory: MemoryId, folio: Folio) -> bool {
        self.places(memory, folio).into_iter().any(|(vm, run)| {
            let guest = &self.vms[vm.0].guest;
            let is_alive = matches!(guest.state(), Some(VmState::Running | VmState::Paused));
            is_alive && guest.given(run.gfn, 1).0.is_some_and(|given| given.side == Side::Lent)
        })
    }

    /// An access of a VM's. What it has not got is provided.
    pub(crate) fn run(&mut self, vm: VmId, at: Ipa, load: Option<&mut u8>, store: u8) -> Ran {
        let Some(vmid) = self.vmid(vm) else { return Ran::NotRunning };
        let write = load.is_none();
        let mut byte = [store];
        for _ in 0..3 {
            let bytes = if write { Bytes::Store(&[store]) } else { Bytes::Load(&mut byte) };
            match self.gunyah.vcpu(vmid, at, bytes) {
                Ok(()) => {
                    if let Some(load) = load {
                        *load = byte[0];
                    }
                    return Ran::Done;
                }
                Err(Abort::NotRunning) => return Ran::NotRunning,
                Err(_) => match self.demand(vm, at.gfn(), write) {
                    // Somebody else was faster: it tries again.
                    Ok(()) | Err(Errno::EAGAIN) => {}
                    Err(errno) => return Ran::PageFault(errno),
                },
            }
        }
        Ran::Spins
    }
}
