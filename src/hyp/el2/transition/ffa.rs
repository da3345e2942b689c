//! The host and the secure world, by way of EL2, which stands between them.

use std::collections::BTreeMap;

use super::super::host_mmu::HostMmu;
use super::super::spec::SpecPage;
use super::super::{El2, Pages, State};
use super::{no_dma, touched};
use crate::error::Errno;

/// What the secure world has: runs of pages, by the handle that it gave for them.
///
/// EL2's own check says only that the host shows the page to somebody. That it is to the secure world is known
/// because the secure world has agreed to give the handle up.
#[derive(Debug, Default)]
pub(crate) struct Ffa {
    held: BTreeMap<u64, Pages>,
    next: u64,
}

impl Ffa {
    pub(crate) fn holds(&self, pfn: crate::addr::Pfn) -> bool {
        self.held.values().any(|pages| pages.contains(pfn))
    }
}

fn share(host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    host.check_state(pages, State::Owned)?;
    no_dma(host, pages)?;
    host.pages.set_host(pages, State::SharedOwned);
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::HostAndFfa));
    touched(host, pages);
    Ok(())
}

fn unshare(host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    host.check_state(pages, State::SharedOwned)?;
    host.pages.set_host(pages, State::Owned);
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Host));
    touched(host, pages);
    Ok(())
}

impl El2 {
    /// The host shows pages to the secure world, which answers with a handle.
    ///
    /// # Errors
    /// `EINVAL` for frames that no address reaches or none at all; as for shares with EL2.
    pub(crate) fn ffa_share(&self, pfn: u64, nr_pages: u64) -> Result<u64, Errno> {
        let pages = Pages::checked(pfn, nr_pages)?;
        if nr_pages == 0 {
            return Err(Errno::EINVAL);
        }
        let mut ffa = self.ffa.lock();
        share(&mut self.host.lock(), pages)?;
        let handle = ffa.next;
        ffa.next += 1;
        ffa.held.insert(handle, pages);
        Ok(handle)
    }

    /// The secure world gives them up.
    ///
    /// # Errors
    /// `EINVAL` for a handle that it does not know.
    pub(crate) fn ffa_reclaim(&self, handle: u64) -> Result<(), Errno> {
        let mut ffa = self.ffa.lock();
        let pages = *ffa.held.get(&handle).ok_or(Errno::EINVAL)?;
        unshare(&mut self.host.lock(), pages)?;
        ffa.held.remove(&handle);
        Ok(())
    }
}
