//! Back to the host: from a guest that dies, or by force from one that lives.

use super::super::guest_mmu::GuestMmu;
use super::super::host_mmu::{HostMmu, Owner};
use super::super::profile::Profile;
use super::super::spec::SpecPage;
use super::super::{GuestPage, Pages, State};
use super::touched;
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Entry, Level, PageState};

/// What was the guest's alone is cleared; what the host could see is not.
///
/// # Errors
/// In this order: `ERANGE`; none for a destroyed page, which is the host's already; `ENOENT`; `E2BIG` in a
/// block, or, in profiles with blocks, not at its start; `EPERM` for what is not the guest's; `EIO` if the
/// memory is gone, and then the host does not get it.
pub(crate) fn reclaim_dying(
    profile: Profile,
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    gfn: Gfn,
) -> Result<(), Errno> {
    let (found, pfn, state, nr_pages) = match guest.page(gfn) {
        Err(Errno::EHWPOISON) => return Ok(()),
        Err(Errno::E2BIG) if profile.splits() && gfn.get() % HUGE_PAGES == 0 => {
            let found = guest.tree.find_in(GuestMmu::SHAPE, gfn)?;
            let (_, leaf) = guest.tree.leaf(gfn).ok_or(Errno::E2BIG)?;
            (found, leaf.pfn, leaf.state, HUGE_PAGES)
        }
        other => other.map(|(found, pfn, state)| (found, pfn, state, 1))?,
    };
    let pages = Pages::new(pfn, nr_pages);
    match state {
        PageState::Owned => host.check_state(pages, State::NoPage)?,
        PageState::SharedOwned if profile.is_android() => {
            host.check_state(pages, State::SharedBorrowed).map_err(|_| Errno::EBUSY)?;
        }
        PageState::SharedOwned => host.check_state(pages, State::SharedBorrowed)?,
        PageState::SharedBorrowed => return Err(Errno::EPERM),
    }

    guest.clear(gfn, found);
    if state == PageState::Owned {
        host.clear(pages)?;
        match pages.nr() {
            1 => host.take_page_back(pfn, State::Owned)?,
            _ => host.take_back(pages, State::Owned)?,
        }
    } else {
        // Mapped already, or not yet: it was the host's to see.
        host.pages.set_host(pages, State::Owned);
    }
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Host));
    touched(host, pages);
    Ok(())
}

/// Whom to force, if the host wants a page back.
///
/// # Errors
/// In this order: `EFAULT` for what is no memory; `EAGAIN` if the host has it; `EPERM` if it is not a guest's.
pub(crate) fn force_reclaim_target(host: &HostMmu, pfn: Pfn) -> Result<GuestPage, Errno> {
    if !host.machine().is_memory(pfn) {
        return Err(Errno::EFAULT);
    }
    if host.page(pfn).host() != State::NoPage {
        return Err(Errno::EAGAIN);
    }
    match host.owner(pfn)? {
        Some(Owner::Guest(page)) => Ok(page),
        _ => Err(Errno::EPERM),
    }
}

/// Takes a page from a living guest. What was in it is lost, and the guest will fault where it was.
///
/// # Errors
/// `EPERM` unless it is the guest's alone, at the frame that the host's table tells of.
pub(crate) fn force_reclaim(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    gfn: Gfn,
    pfn: Pfn,
) -> Result<(), Errno> {
    let found = guest.tree.leaf(gfn).ok_or(Errno::EPERM)?;
    let (to, leaf) = guest.tree.translate(gfn).ok_or(Errno::EPERM)?;
    if to != pfn || State::from(leaf.state) != State::Owned {
        return Err(Errno::EPERM);
    }
    // A block goes as one: what is known of it is known in one entry.
    let (gfn, pages) = match found.0 {
        Level::PAGE => (gfn, Pages::one(pfn)),
        Level::BLOCK_2M => {
            let gfn = Gfn::new(gfn.get() - gfn.get() % HUGE_PAGES);
            (gfn, Pages::new(leaf.pfn, HUGE_PAGES))
        }
        _ => return Err(Errno::EPERM),
    };
    host.check_state(pages, State::NoPage)?;

    if pages.nr() == 1 {
        guest.poison(gfn)?;
    } else {
        guest.poison_block(gfn)?;
    }
    host.clear(pages)?;
    host.take_back(pages, State::Owned)?;
    pages.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Host));
    touched(host, pages);
    Ok(())
}

/// Whether a vCPU's fault is because of a page that was destroyed.
///
/// # Errors
/// `ERANGE`; `EINVAL` if the walk did not end at a page (in profiles with blocks, or at a destroyed block).
pub(crate) fn is_poison_fault(profile: Profile, guest: &GuestMmu, gfn: Gfn) -> Result<bool, Errno> {
    let (level, pte) = guest.tree.get(gfn)?;
    let poisoned = matches!(pte.decode(level), Entry::Annotated(..));
    match level {
        Level::PAGE => Ok(poisoned),
        Level::BLOCK_2M if profile.annotates_blocks() && poisoned => Ok(true),
        _ => Err(Errno::EINVAL),
    }
}
