//! Pages that the host gives for a guest's tables. It lists them in the vCPU's structure that EL2 has pinned; EL2
//! takes them from there before it needs them, one by one, and each must be the host's to give.

use super::host_mmu::HostMmu;
use super::hyp_space::HypSpace;
use super::transition::{donate_host, donate_hyp};
use super::vm::Vcpu;
use super::{El2, PIECE, Pages, stretch};
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

    #[cold]
    fn take_from_list(&self, vcpu: &mut Vcpu, wanted: u64) -> Result<(), Errno> {
        while (vcpu.memcache.len() as u64) < wanted {
            self.host.give_way();
            self.take_some_from_list(vcpu, wanted.min(vcpu.memcache.len() as u64 + PIECE))?;
        }
        Ok(())
    }

    /// With the host's lock held.
    fn take_some_from_list(&self, vcpu: &mut Vcpu, wanted: u64) -> Result<(), Errno> {
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let mut list = vcpu.host.lock();
        stretch::held_over(wanted - vcpu.memcache.len() as u64);
        while (vcpu.memcache.len() as u64) < wanted {
            let (nr, head) = (list.nr_memcache, list.memcache.last().copied());
            // A list that is shorter than it says ends in a null pointer, to which EL2 goes.
            let page = Pages::one(Pa::new(head.unwrap_or(0)).pfn());
            if nr == 0 || donate_hyp(&mut host, &mut hyp, page).is_err() {
                return Err(Errno::ENOMEM);
            }
            if self.machine.zero(page.start()).is_err() {
                // Broken memory is no table.
                donate_host(&mut host, &mut hyp, page)?;
                return Err(Errno::ENOMEM);
            }
            list.nr_memcache -= 1;
            list.memcache.pop();
            vcpu.memcache.push(page.start());
        }
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
