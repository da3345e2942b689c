//! The host and EL2.

use super::super::host_mmu::{HostMmu, Owner};
use super::super::hyp_space::HypSpace;
use super::super::spec::SpecPage;
use super::super::{Pages, State};
use super::{no_dma, touched};
use crate::addr::Pfn;
use crate::error::Errno;
use crate::stage2::Level;

/// The host shows a page to EL2. EL2 maps it when it is first pinned.
///
/// # Errors
/// `EINVAL` or `EPERM` for what is no memory; `EPERM` unless it is the host's alone; `EINVAL` while a device uses it.
pub(crate) fn share_hyp(host: &mut HostMmu, pfn: Pfn) -> Result<(), Errno> {
    let page = Pages::one(pfn);
    host.check_state(page, State::Owned)?;
    no_dma(host, page)?;
    host.check_hyp_state(page, State::NoPage)?;
    host.pages.set_hyp(page, State::SharedBorrowed);
    host.pages.set_host(page, State::SharedOwned);
    host.spec.step(pfn, SpecPage::HostAndHyp);
    touched(host, page);
    Ok(())
}

/// And hides it again.
///
/// # Errors
/// `EINVAL` or `EPERM` for what is no memory; `EPERM` unless it is shown to EL2; `EBUSY` while EL2 has it pinned.
pub(crate) fn unshare_hyp(host: &mut HostMmu, pfn: Pfn) -> Result<(), Errno> {
    let page = Pages::one(pfn);
    host.check_state(page, State::SharedOwned)?;
    host.check_hyp_state(page, State::SharedBorrowed)?;
    if host.page(pfn).nr_pins > 0 {
        return Err(Errno::EBUSY);
    }
    host.pages.set_hyp(page, State::NoPage);
    host.pages.set_host(page, State::Owned);
    // EL2 reads nothing there any more.
    host.machine().structs.forget(page);
    host.spec.step(pfn, SpecPage::Host);
    touched(host, page);
    Ok(())
}

/// The IOMMU will let devices at pages that the host has. Until they are done, the pages go to nobody but guests that
/// are not protected, with whom the host shares them.
///
/// # Errors
/// `EINVAL` or `EPERM` for what is no memory; `EPERM` for what is not the host's alone; `EBUSY` for too many devices.
pub(crate) fn use_dma(host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    host.check_state(pages, State::Owned)?;
    if pages.iter().any(|pfn| host.page(pfn).nr_pins == u16::MAX) {
        return Err(Errno::EBUSY);
    }
    pages.iter().for_each(|pfn| host.pages.update(pfn, |page| page.nr_pins += 1));
    Ok(())
}

/// A device is done.
///
/// # Errors
/// `EINVAL` or `EPERM` for what is no memory; `EINVAL` if no device used one of them.
pub(crate) fn unuse_dma(host: &mut HostMmu, pages: Pages) -> Result<(), Errno> {
    host.machine().check_allowed(pages.start(), pages.nr())?;
    if pages.iter().any(|pfn| !host.page(pfn).is_for_dma()) {
        return Err(Errno::EINVAL);
    }
    pages.iter().for_each(|pfn| host.pages.update(pfn, |page| page.nr_pins -= 1));
    Ok(())
}

/// EL2 will read pages that the host shows to it, and needs them to stay.
///
/// # Errors
/// As for [`share_hyp`]; `EPERM` unless they are shown to EL2; `EBUSY` if they are pinned too often already.
pub(crate) fn pin(host: &mut HostMmu, hyp: &mut HypSpace, pages: Pages) -> Result<(), Errno> {
    host.check_state(pages, State::SharedOwned)?;
    host.check_hyp_state(pages, State::SharedBorrowed)?;
    if pages.iter().any(|pfn| host.page(pfn).nr_pins == u16::MAX) {
        return Err(Errno::EBUSY);
    }
    for pfn in pages.iter() {
        if host.page(pfn).nr_pins == 0 {
            hyp.map(Pages::one(pfn));
        }
        host.pages.update(pfn, |page| page.nr_pins += 1);
    }
    Ok(())
}

/// EL2 has read them. Every unpin has its pin.
pub(crate) fn unpin(host: &mut HostMmu, hyp: &mut HypSpace, pages: Pages) {
    for pfn in pages.iter() {
        host.pages.update(pfn, |page| page.nr_pins = page.nr_pins.saturating_sub(1));
        if host.page(pfn).nr_pins == 0 {
            hyp.unmap(Pages::one(pfn));
        }
    }
}

/// The host gives pages to EL2.
///
/// # Errors
/// As for [`share_hyp`]; `ENOMEM` if the host's tables have no room to say so.
pub(crate) fn donate_hyp(
    host: &mut HostMmu,
    hyp: &mut HypSpace,
    pages: Pages,
) -> Result<(), Errno> {
    host.check_state(pages, State::Owned)?;
    no_dma(host, pages)?;
    host.check_hyp_state(pages, State::NoPage)?;
    host.give(pages, Owner::Hyp, Level::PAGE)?;
    host.pages.set_hyp(pages, State::Owned);
    hyp.map(pages);
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Hyp));
    touched(host, pages);
    Ok(())
}

/// EL2 gives pages back. It has cleared them before, if they need it.
///
/// # Errors
/// `EPERM` unless they are EL2's.
pub(crate) fn donate_host(
    host: &mut HostMmu,
    hyp: &mut HypSpace,
    pages: Pages,
) -> Result<(), Errno> {
    host.check_hyp_state(pages, State::Owned)?;
    host.check_state(pages, State::NoPage)?;
    if pages.iter().any(|pfn| host.page(pfn).nr_pins > 0) {
        return Err(Errno::EBUSY);
    }
    hyp.unmap(pages);
    host.pages.set_hyp(pages, State::NoPage);
    for pfn in pages.iter() {
        host.take_back(Pages::one(pfn), State::Owned)?;
        host.spec.step(pfn, SpecPage::Host);
    }
    touched(host, pages);
    Ok(())
}
