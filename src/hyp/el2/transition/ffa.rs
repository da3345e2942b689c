//! The host and the secure world, by way of EL2, which stands between them.

#![cfg_attr(
    not(any(test, feature = "oracle")),
    expect(dead_code, reason = "only tests and the oracle have a secure world")
)]

use std::collections::BTreeMap;

use super::super::host_mmu::{HostMmu, Owner};
use super::super::profile::Profile;
use super::super::spec::SpecPage;
use super::super::{El2, Pages, State};
use super::{check_given, no_dma, touched};
use crate::addr::Pfn;
use crate::error::Errno;
use crate::stage2::Level;

/// A run of pages that the secure world has.
#[derive(Clone, Copy, Debug)]
struct Held {
    pages: Pages,
    /// Given, and not only shown.
    is_owned: bool,
}

/// What the secure world has: nothing, but in tests and for the oracle. Runs of pages, by the handle that it gave for them.
///
/// EL2's own check says only that the host shows the page to somebody. That it is to the secure world is known
/// because the secure world has agreed to give the handle up.
#[derive(Debug, Default)]
pub(crate) struct Ffa {
    held: BTreeMap<u64, Held>,
    next: u64,
}

impl Ffa {
    fn has(&self, pfn: Pfn, is_owned: bool) -> bool {
        self.held.values().any(|held| held.is_owned == is_owned && held.pages.contains(pfn))
    }

    /// Whether the host shows a page to it.
    pub(crate) fn sees(&self, pfn: Pfn) -> bool {
        self.has(pfn, false)
    }

    /// Whether a page is its own.
    pub(crate) fn owns(&self, pfn: Pfn) -> bool {
        self.has(pfn, true)
    }

    fn hold(&mut self, held: Held) -> u64 {
        let handle = self.next;
        self.next += 1;
        self.held.insert(handle, held);
        handle
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

fn donate(profile: Profile, host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    check_given(profile, host, pages)?;
    let given = host.give(pages, Owner::Ffa, Level::PAGE);
    given.map_err(|errno| profile.host_tables_short(errno))?;
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Ffa));
    touched(host, pages);
    Ok(())
}

/// The bytes stay: what the secure world leaves in them is its own affair.
fn reclaim(host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    host.check_state(pages, State::NoPage)?;
    for pfn in pages.iter() {
        host.take_back(Pages::one(pfn), State::Owned)?;
        host.spec.step(pfn, SpecPage::Host);
    }
    touched(host, pages);
    Ok(())
}

impl El2 {
    fn ffa_pages(pfn: u64, nr_pages: u64) -> Result<Pages, Errno> {
        match nr_pages {
            0 => Err(Errno::EINVAL),
            _ => Pages::checked(pfn, nr_pages),
        }
    }

    /// The host shows pages to the secure world, which answers with a handle.
    ///
    /// # Errors
    /// `EINVAL` for frames that no address reaches or none at all; as for shares with EL2.
    pub(crate) fn ffa_share(&self, pfn: u64, nr_pages: u64) -> Result<u64, Errno> {
        let pages = Self::ffa_pages(pfn, nr_pages)?;
        let mut ffa = self.ffa.lock();
        share(&mut self.host.lock(), pages)?;
        Ok(ffa.hold(Held { pages, is_owned: false }))
    }

    /// The host gives pages to the secure world, which answers with a handle.
    ///
    /// # Errors
    /// `ENOSYS` in profiles that do not know that; `EINVAL` as for shares; as for donations to guests.
    pub(crate) fn ffa_donate(&self, pfn: u64, nr_pages: u64) -> Result<u64, Errno> {
        if !self.profile.is_android() {
            return Err(Errno::ENOSYS);
        }
        let pages = Self::ffa_pages(pfn, nr_pages)?;
        let mut ffa = self.ffa.lock();
        donate(self.profile, &mut self.host.lock(), pages)?;
        Ok(ffa.hold(Held { pages, is_owned: true }))
    }

    /// The secure world gives up what it was shown or given.
    ///
    /// # Errors
    /// `EINVAL` for a handle that it does not know.
    pub(crate) fn ffa_reclaim(&self, handle: u64) -> Result<(), Errno> {
        let mut ffa = self.ffa.lock();
        let Held { pages, is_owned } = *ffa.held.get(&handle).ok_or(Errno::EINVAL)?;
        let mut host = self.host.lock();
        match is_owned {
            true => reclaim(&mut host, pages)?,
            false => unshare(&mut host, pages)?,
        }
        ffa.held.remove(&handle);
        Ok(())
    }
}
