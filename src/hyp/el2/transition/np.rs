//! The host and a guest that is not protected: shares only, of pages that stay the host's.

use super::super::guest_mmu::GuestMmu;
use super::super::host_mmu::HostMmu;
use super::super::{Pages, State};
use super::touched;
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::geometry::HUGE_PAGES;
use crate::stage2::{Entry, Leaf, Level, PageState, Prot, TableError};

/// KVM's bits for rights.
const PROT_X: u64 = 1 << 0;
const PROT_W: u64 = 1 << 1;
const PROT_R: u64 = 1 << 2;

fn rights(raw: u64) -> Result<Prot, Errno> {
    match raw & !(PROT_R | PROT_W | PROT_X) {
        0 => Ok(Prot::of(raw & PROT_R != 0, raw & PROT_W != 0, raw & PROT_X != 0)),
        _ => Err(Errno::EINVAL),
    }
}

/// A page, or an aligned block, of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NpRange {
    pub(crate) gfn: Gfn,
    level: Level,
}

impl NpRange {
    /// # Errors
    /// `EINVAL` unless it is one page, or 512 that begin where a block can.
    pub(crate) fn new(gfn: Gfn, nr_pages: u64) -> Result<Self, Errno> {
        match nr_pages {
            1 => Ok(Self { gfn, level: Level::PAGE }),
            HUGE_PAGES if gfn.get() % HUGE_PAGES == 0 => Ok(Self { gfn, level: Level::BLOCK_2M }),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(crate) const fn level(self) -> Level {
        self.level
    }

    fn nr_pages(self) -> u64 {
        GuestMmu::SHAPE.pages_at(self.level)
    }
}

/// The host shows a page or a block to a guest. It may show the same to several, and in several places.
///
/// # Errors
/// In this order: `EINVAL` for rights that are none, for frames that no address reaches, for a number that is
/// neither 1 nor 512, and for a block that is misaligned; `EINVAL` or `EPERM` for what is no memory; `ERANGE`
/// or `EPERM` unless the guest has nothing there; `EBUSY` if it is shown too often; `EPERM` unless the
/// host's alone, or shown to guests; `ENOMEM` for a memcache with less than a page may need.
pub(crate) fn share_guest(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    memcache: &mut Vec<Pfn>,
    (pfn, gfn): (Pfn, Gfn),
    nr_pages: u64,
    prot: u64,
) -> Result<(), Errno> {
    let prot = rights(prot)?;
    let pages = Pages::checked(pfn.get(), nr_pages)?;
    let range = NpRange::new(gfn, nr_pages)?;
    if pfn.get() % nr_pages != 0 {
        return Err(Errno::EINVAL);
    }
    host.machine().check_allowed(pfn, nr_pages)?;
    let vacancy = guest.vacancy(gfn, range.level)?;
    for pfn in pages.iter() {
        let page = host.page(pfn);
        match page.host() {
            State::Owned => {}
            State::SharedOwned if page.nr_guests == u32::MAX => return Err(Errno::EBUSY),
            State::SharedOwned if page.nr_guests > 0 => {}
            _ => return Err(Errno::EPERM),
        }
    }
    guest.reserve(vacancy.nr_missing(range.level), memcache)?;

    for (pfn, nth) in pages.iter().zip(0..) {
        host.pages.update(pfn, |page| {
            page.set_host(State::SharedOwned);
            page.nr_guests += 1;
        });
        host.spec.lend(pfn, guest.at(gfn).after(nth));
    }
    let leaf = Leaf { pfn, prot, state: PageState::SharedBorrowed };
    guest.fill(gfn, vacancy, range.level, leaf, memcache)?;
    touched(host, pages);
    Ok(())
}

/// And hides it again, which must name it in the size in which it was shown. Nothing is cleared.
///
/// # Errors
/// In this order: `ERANGE`; `ENOENT` if nothing is there; `E2BIG` for another size; `EPERM` if it is not the
/// host's.
pub(crate) fn unshare_guest(
    host: &mut HostMmu,
    guest: &mut GuestMmu,
    range: NpRange,
) -> Result<(), Errno> {
    let found = guest.tree.find(range.gfn)?;
    let Entry::Leaf(leaf) = found.pte.decode(found.level) else { return Err(Errno::ENOENT) };
    if found.level != range.level {
        return Err(Errno::E2BIG);
    }
    if leaf.state != PageState::SharedBorrowed {
        return Err(Errno::EPERM);
    }
    let pages = Pages::new(leaf.pfn, range.nr_pages());
    host.check_state(pages, State::SharedOwned)?;
    if pages.iter().any(|pfn| host.page(pfn).nr_guests == 0) {
        return Err(Errno::EINVAL);
    }

    guest.clear(range.gfn, found);
    for (pfn, nth) in pages.iter().zip(0..) {
        host.pages.update(pfn, |page| {
            page.nr_guests -= 1;
            if page.nr_guests == 0 {
                page.set_host(State::Owned);
            }
        });
        host.spec.unlend(pfn, guest.at(range.gfn).after(nth));
    }
    touched(host, pages);
    Ok(())
}

/// Gives a guest more rights to what it has.
///
/// # Errors
/// `EINVAL` for rights that are none, `ERANGE`, `EAGAIN` if nothing is there.
pub(crate) fn relax(guest: &mut GuestMmu, gfn: Gfn, prot: u64) -> Result<(), Errno> {
    let more = rights(prot)?;
    let (level, pte) = guest.tree.get(gfn)?;
    let Entry::Leaf(leaf) = pte.decode(level) else { return Err(Errno::EAGAIN) };
    guest.tree.adjust(gfn, |pte| pte.with_prot(leaf.prot.and(more)))?;
    let span = GuestMmu::SHAPE.pages_at(level);
    guest.tlbs.invalidate(Gfn::new(gfn.get() & !(span - 1)), span);
    Ok(())
}

/// Visits the leaves of a range.
fn each_leaf(
    guest: &mut GuestMmu,
    range: NpRange,
    mut see: impl FnMut(&mut GuestMmu, Gfn) -> Result<(), TableError>,
) -> Result<(), Errno> {
    let end = range.gfn.get() + range.nr_pages();
    let mut at = range.gfn.get();
    while at < end {
        let (level, pte) = guest.tree.get(Gfn::new(at))?;
        if pte.is_valid() {
            see(guest, Gfn::new(at))?;
        }
        let span = GuestMmu::SHAPE.pages_at(level);
        at = (at & !(span - 1)) + span;
    }
    Ok(())
}

/// Takes the right to write away, of a block all of it. Who remembers the translation may still write: the
/// host asks for that to be forgotten, when it has protected all that it wants to.
///
/// # Errors
/// `ERANGE`.
pub(crate) fn wrprotect(guest: &mut GuestMmu, range: NpRange) -> Result<(), Errno> {
    each_leaf(guest, range, |guest, gfn| {
        let (level, pte) = guest.tree.get(gfn)?;
        let Entry::Leaf(leaf) = pte.decode(level) else { return Err(TableError::Absent) };
        guest.tree.adjust(gfn, |pte| pte.with_prot(leaf.prot.without_write()))?;
        Ok(())
    })
}

/// Whether any page of the range was used; makes them old if `age` says so. Upstream stops EL2 for an address
/// beyond the guest's; here that is nobody's page, and was not used.
pub(crate) fn test_young(guest: &mut GuestMmu, range: NpRange, age: Age) -> bool {
    let mut young = false;
    let visited = each_leaf(guest, range, |guest, gfn| {
        let was = guest.tree.adjust(gfn, |pte| match age {
            Age::Test => pte,
            Age::Clear => pte.aged(false),
        })?;
        young |= was.is_young();
        Ok(())
    });
    visited.is_ok() && young
}

/// What becomes of the mark that a page was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Test,
    Clear,
}

/// Marks a page as used, if it is there.
pub(crate) fn make_young(guest: &mut GuestMmu, gfn: Gfn) {
    // Absent is fine: there is nothing to mark.
    guest.tree.adjust(gfn, |pte| pte.aged(true)).ok();
}
