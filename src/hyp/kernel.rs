//! What any kernel on a pKVM host does to have VMs: structures that EL2 reads, pages that it is given, and how
//! they come back. Where the pages come from is the kernel's own affair.

use super::el2::{El2, HostCall, nr_pgd_pages, nr_vcpu_pages, nr_vm_pages, stretch};
use crate::addr::Pa;
use crate::error::Errno;
use crate::geometry::{PAGE_BYTES, index};

/// A kernel's own memory.
pub(super) trait KernelPages {
    /// Consecutive pages, by address.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn take(&mut self, nr: u64) -> Result<u64, Errno>;

    /// Has a page back.
    fn give(&mut self, at: u64);
}

/// A VM that EL2 knows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub(super) handle: u64,
    /// The kernel's structure.
    kvm: u64,
}

impl Made {
    /// Where the kernel's structure is.
    pub(super) fn kvm(self) -> u64 {
        self.kvm
    }
}

/// The pages that come back with a structure of a VM that is no more: those that EL2 has returned, and those on a list that
/// it has not taken.
pub(super) fn come_back(el2: &El2, at: u64) -> Vec<u64> {
    let said = el2.host_struct(at);
    let mut said = said.lock();
    let mut pages = std::mem::take(&mut said.returned);
    pages.append(&mut said.memcache);
    pages
}

/// Calls that a kernel makes on a CPU.
#[derive(Debug)]
pub(super) struct Calls<'a, P> {
    pub(super) el2: &'a El2,
    pub(super) cpu: usize,
    pub(super) pages: &'a mut P,
}

impl<P: KernelPages> Calls<'_, P> {
    fn call(&self, call: HostCall, x: [u64; 4]) -> Result<u64, Errno> {
        self.el2.call(self.cpu, call, x)
    }

    /// A page that EL2 may read.
    fn shared_page(&mut self) -> Result<u64, Errno> {
        let at = self.pages.take(1)?;
        let shared = self.call(HostCall::ShareHyp, [Pa::new(at).pfn().get(), 0, 0, 0]);
        shared.map(|_| at).inspect_err(|_| self.pages.give(at))
    }

    /// Has pages back.
    pub(super) fn give_all(&mut self, pages: &[u64]) {
        stretch::held_over(pages.len() as u64);
        pages.iter().for_each(|&at| self.pages.give(at));
    }

    /// EL2 has no more to read there.
    pub(super) fn free_shared_page(&mut self, at: u64) {
        if self.call(HostCall::UnshareHyp, [Pa::new(at).pfn().get(), 0, 0, 0]).is_ok() {
            self.pages.give(at);
        }
    }

    fn free_run(&mut self, at: u64, nr: u64) {
        (0..nr).for_each(|nth| self.pages.give(at + nth * PAGE_BYTES as u64));
    }

    /// Has EL2 make a VM.
    ///
    /// # Errors
    /// `ENOMEM`; EL2's. Everything is as before then.
    pub(super) fn make_vm(&mut self, nr_vcpus: u64, protected: bool) -> Result<Made, Errno> {
        let handle = self.call(HostCall::ReserveVm, [0; 4])?;
        let made = self.shared_page().and_then(|kvm| {
            let made = self.init_vm(handle, kvm, nr_vcpus, protected);
            made.inspect_err(|_| self.free_shared_page(kvm))
        });
        if made.is_err() {
            let _ = self.call(HostCall::UnreserveVm, [handle, 0, 0, 0]);
        }
        made
    }

    fn init_vm(
        &mut self,
        handle: u64,
        kvm: u64,
        nr_vcpus: u64,
        protected: bool,
    ) -> Result<Made, Errno> {
        {
            let said = self.el2.host_struct(kvm);
            let mut said = said.lock();
            *said = Default::default();
            (said.handle, said.nr_vcpus, said.protected) = (handle, nr_vcpus, protected);
        }
        let (nr_vm, nr_pgd) = (nr_vm_pages(nr_vcpus), nr_pgd_pages());
        let vm_at = self.pages.take(nr_vm)?;
        let pgd_at = self.pages.take(nr_pgd).inspect_err(|_| self.free_run(vm_at, nr_vm))?;
        let made = self.call(HostCall::InitVm, [kvm, vm_at, pgd_at, 0]);
        if let Err(errno) = made {
            self.free_run(vm_at, nr_vm);
            self.free_run(pgd_at, nr_pgd);
            return Err(errno);
        }
        Ok(Made { handle, kvm })
    }

    /// Has EL2 make a vCPU. Returns where the kernel's structure is.
    ///
    /// # Errors
    /// `ENOMEM`; EL2's. Everything is as before then.
    pub(super) fn make_vcpu(&mut self, made: Made, idx: u64) -> Result<u64, Errno> {
        let at = self.shared_page()?;
        {
            let said = self.el2.host_struct(at);
            let mut said = said.lock();
            *said = Default::default();
            said.vcpu_idx = idx;
        }
        let nr = nr_vcpu_pages();
        let made = self.pages.take(nr).and_then(|vcpu_at| {
            let init = self.call(HostCall::InitVcpu, [made.handle, at, vcpu_at, 0]);
            init.inspect_err(|_| self.free_run(vcpu_at, nr))
        });
        made.map(|_| at).inspect_err(|_| self.free_shared_page(at))
    }

    /// Pages for tables, on a vCPU's list: so many. EL2 takes as many for itself before it needs one.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(super) fn top_up(&mut self, host_at: u64, nr: u64) -> Result<(), Errno> {
        let said = self.el2.host_struct(host_at);
        // Pages and room for them are found before the structure is locked, which spins.
        let mut pages = Vec::new();
        let taken = (said.nr_memcache()..nr).try_for_each(|_| {
            pages.push(self.pages.take(1)?);
            Ok(())
        });
        if pages.is_empty() {
            return taken;
        }
        let mut list = Vec::new();
        if list.try_reserve(index(nr)).is_err() {
            pages.iter().for_each(|&at| self.pages.give(at));
            return Err(Errno::ENOMEM);
        }
        let mut said = said.lock();
        said.nr_memcache += pages.len() as u64;
        list.append(&mut said.memcache);
        list.append(&mut pages);
        std::mem::swap(&mut said.memcache, &mut list);
        // The old list is let go of after that.
        drop(said);
        taken
    }

    /// Ends a VM that is being torn down, and has everything back that it was made of. `vcpus` are the kernel's
    /// structures.
    ///
    /// # Errors
    /// EL2's: then it keeps what it has.
    pub(super) fn finish(
        &mut self,
        made: Made,
        vcpus: impl Iterator<Item = u64>,
    ) -> Result<(), Errno> {
        self.call(HostCall::FinalizeTeardownVm, [made.handle, 0, 0, 0])?;
        for at in vcpus.chain([made.kvm]) {
            self.give_all(&come_back(self.el2, at));
            self.free_shared_page(at);
        }
        Ok(())
    }
}
