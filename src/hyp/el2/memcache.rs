//! Pages that the host gives for a guest's tables. It lists them in the vCPU's structure that EL2 has pinned; EL2
//! takes them from there before it needs them, one by one, and each must be the host's to give.

use super::host_mmu::HostMmu;
use super::hyp_space::HypSpace;
use super::transition::{donate_host, donate_hyp};
use super::vm::Vcpu;
use super::{El2, Pages};
use crate::addr::{Pa, Pfn};
use crate::error::Errno;

impl El2 {
    /// Takes pages until the vCPU has as many as the host says that its list has.
    ///
    /// # Errors
    /// `ENOMEM` if the list ends early or has a page that is not the host's to give. What was taken until then
    /// stays taken.
    #[inline]
    pub(crate) fn refill(&self, vcpu: &mut Vcpu) -> Result<(), Errno> {
        // Read once: the host may change it meanwhile.
        let wanted = vcpu.host.nr_memcache();
        match vcpu.memcache.len() as u64 >= wanted {
            true => Ok(()),
            false => self.take_from_list(vcpu, wanted),
        }
    }

    /// However long the host says that its list is, locks are held for one page at a time.
    #[cold]
    fn take_from_list(&self, vcpu: &mut Vcpu, wanted: u64) -> Result<(), Errno> {
        while (vcpu.memcache.len() as u64) < wanted {
            self.host.give_way();
            let page = self.take_first(vcpu)?;
            // It is EL2's, and nobody else reaches it.
            if self.machine.zero(page.start()).is_err() {
                self.put_first(vcpu, page)?;
                return Err(Errno::ENOMEM);
            }
            vcpu.memcache.push(page.start());
        }
        Ok(())
    }

    fn take_first(&self, vcpu: &Vcpu) -> Result<Pages, Errno> {
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let mut list = vcpu.host.lock();
        let (nr, head) = (list.nr_memcache, list.memcache.last().copied());
        // A list that is shorter than it says ends in a null pointer, to which EL2 goes.
        let page = Pages::one(Pa::new(head.unwrap_or(0)).pfn());
        if nr == 0 || donate_hyp(&mut host, &mut hyp, page).is_err() {
            return Err(Errno::ENOMEM);
        }
        list.nr_memcache -= 1;
        list.memcache.pop();
        Ok(page)
    }

    /// Broken memory is no table: the host has it again, where it was.
    fn put_first(&self, vcpu: &Vcpu, page: Pages) -> Result<(), Errno> {
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        donate_host(&mut host, &mut hyp, page)?;
        let mut list = vcpu.host.lock();
        list.memcache.push(page.start().pa().get());
        list.nr_memcache = list.nr_memcache.saturating_add(1);
        Ok(())
    }
}

/// Gives a page of EL2's back, cleared. One whose memory is broken stays EL2's for good, and then this is false.
pub(crate) fn give_back(host: &mut HostMmu, hyp: &mut HypSpace, pfn: Pfn) -> bool {
    let page = Pages::one(pfn);
    let is_back = host.machine().zero(pfn).is_ok() && donate_host(host, hyp, page).is_ok();
    if !is_back {
        host.pages.orphan(page);
    }
    is_back
}
