//! The host and a protected guest; and what the guest does with what it was given.

use super::super::guest_mmu::GuestMmu;
use super::super::host_mmu::{HostMmu, Owner};
use super::super::profile::Profile;
use super::super::spec::SpecPage;
use super::super::{Pages, State};
use super::np::NpRange;
use super::{check_given, touched};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Leaf, Level, PageState, Prot};

/// The host gives pages to a guest, with what is in them. It cannot reach them any more before the guest can.
///
/// # Errors
/// In this order: `EINVAL` for a number that the profile does not give at once, or misaligned; `EINVAL` or `EPERM`
/// for what is no memory; `EPERM` unless they are the host's alone; `EINVAL` while a device uses them;
/// `ERANGE` or `EPERM` unless the guest has nothing there, not even a destroyed page; `ENOMEM` for a
/// memcache with less than a page may need; `EINVAL` for a firmware that begins within a page; `ENOMEM` or
/// `ENOMEMHOSTS2` without tables for the host; `EIO` if memory that its firmware is in or goes to is broken: then all but
/// what is broken is the host's again.
pub(crate) fn donate_guest(
    profile: Profile,
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    memcache: &mut Vec<Pfn>,
    (pfn, gfn): (Pfn, Gfn),
    nr_pages: u64,
) -> Result<(), Errno> {
    if !profile.donates(nr_pages) || (pfn.get() | gfn.get()) % nr_pages != 0 {
        return Err(Errno::EINVAL);
    }
    let pages = Pages::new(pfn, nr_pages);
    check_given(profile, host, pages)?;
    let level = if nr_pages == HUGE_PAGES { Level::BLOCK_2M } else { Level::PAGE };
    let vacancy = guest.vacancy(gfn, level)?;
    guest.reserve(vacancy.nr_missing(level), memcache)?;
    let load = host.firmware_for(guest.firmware_at, gfn, pages)?;

    let given = if nr_pages == 1 {
        host.give_page(pfn, guest.at(gfn))
    } else {
        let annotated = if profile.annotates_blocks() { level } else { Level::PAGE };
        host.give(pages, Owner::Guest(guest.at(gfn)), annotated)
    };
    given.map_err(|errno| profile.host_tables_short(errno))?;
    if let Err(errno) = host.load(load) {
        host.ungive(guest.at(gfn), pages, load);
        return Err(errno);
    }
    for (pfn, nth) in pages.iter().zip(0..) {
        host.spec.step(pfn, SpecPage::Guest(guest.at(gfn).after(nth)));
    }
    let leaf = Leaf { pfn, prot: Prot::RWX, state: PageState::Owned };
    guest.fill(gfn, vacancy, level, leaf, memcache)?;
    touched(host, pages);
    Ok(())
}

/// A guest shows a page of its own to the host.
///
/// # Errors
/// In this order: `ERANGE`; `EHWPOISON` for a destroyed page; `ENOENT` if nothing is there; `E2BIG` in a
/// block; `EPERM` unless it is the guest's alone.
pub(crate) fn guest_share_host(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    gfn: Gfn,
) -> Result<(), Errno> {
    let (found, pfn, state) = guest.page(gfn)?;
    let page = Pages::one(pfn);
    if state != PageState::Owned {
        return Err(Errno::EPERM);
    }
    host.check_state(page, State::NoPage)?;

    guest.set_state(gfn, (found, pfn), PageState::SharedOwned)?;
    host.take_page_back(pfn, State::SharedBorrowed)?;
    host.spec.step(pfn, SpecPage::GuestAndHost(guest.at(gfn)));
    touched(host, page);
    Ok(())
}

/// And hides it again. What the host wrote to it stays.
///
/// # Errors
/// As for [`guest_share_host`]; `EPERM` unless it is shown to the host.
pub(crate) fn guest_unshare_host(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    gfn: Gfn,
) -> Result<(), Errno> {
    let (found, pfn, state) = guest.page(gfn)?;
    let page = Pages::one(pfn);
    if state != PageState::SharedOwned {
        return Err(Errno::EPERM);
    }
    host.check_state(page, State::SharedBorrowed)?;

    host.give_page(pfn, guest.at(gfn))?;
    guest.set_state(gfn, (found, pfn), PageState::Owned)?;
    host.spec.step(pfn, SpecPage::Guest(guest.at(gfn)));
    touched(host, page);
    Ok(())
}

/// What becomes of the bytes of a page that a guest gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relinquished {
    Cleared,
    /// The guest has asked for that: `NO_POISON`.
    AsTheyAre,
}

/// A guest gives a page up, and it is the host's.
///
/// # Errors
/// In this order: `ERANGE`, `EHWPOISON`, `E2BIG` in a block; `EBUSY` while a device uses it; `EPERM` for a page that
/// is not the guest's alone; `EIO` if the memory is gone, and then nobody has it. Nothing there is no error.
pub(crate) fn relinquish(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    gfn: Gfn,
    bytes: Relinquished,
) -> Result<(), Errno> {
    let (found, pfn, state) = match guest.page(gfn) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    let page = Pages::one(pfn);
    if host.page(pfn).nr_pins > 0 {
        return Err(Errno::EBUSY);
    }
    if state != PageState::Owned {
        return Err(Errno::EPERM);
    }
    let had_firmware = host.firmware_for(guest.firmware_at, gfn, page)?.is_some();
    guest.clear(gfn, found);
    if bytes == Relinquished::Cleared {
        host.clear(page)?;
    }
    host.take_page_back(pfn, State::Owned)?;
    if had_firmware {
        // What comes there next is the host's to say.
        guest.firmware_at = None;
    }
    host.spec.step(pfn, SpecPage::Host);
    touched(host, page);
    Ok(())
}

/// A block of a guest becomes pages, in its table and in what the host's says. All stay where they are.
///
/// # Errors
/// In this order: `ERANGE`; `EHWPOISON`; `ENOENT`; `EINVAL` if it is no block; `ENOMEM`.
pub(crate) fn split_guest(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    memcache: &mut Vec<Pfn>,
    range: NpRange,
) -> Result<(), Errno> {
    let gfn = range.gfn;
    match guest.page(gfn) {
        Err(Errno::E2BIG) => {}
        Err(errno) => return Err(errno),
        Ok(_) => return Err(Errno::EINVAL),
    }
    let Some((Level::BLOCK_2M, leaf)) = guest.tree.leaf(gfn) else { return Err(Errno::EINVAL) };
    let pages = Pages::new(leaf.pfn, HUGE_PAGES);
    if gfn.get() % HUGE_PAGES != 0 {
        return Err(Errno::EINVAL);
    }
    let is_shown = leaf.state == PageState::SharedOwned;
    host.check_state(pages, if is_shown { State::SharedBorrowed } else { State::NoPage })?;
    // A table, for what was an entry.
    guest.reserve(1, memcache)?;

    // All under the guest's lock: no vCPU sees the block gone and the pages not there yet.
    if !is_shown {
        host.give(pages, Owner::Guest(guest.at(gfn)), Level::PAGE)?;
    }
    guest.unmap(gfn, HUGE_PAGES)?;
    for (pfn, nth) in pages.iter().zip(0..) {
        let gfn = guest.at(gfn).after(nth).gfn;
        guest.map(gfn, Level::PAGE, Leaf { pfn, ..leaf }, memcache)?;
    }
    touched(host, pages);
    Ok(())
}
