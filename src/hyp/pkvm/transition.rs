//! Where a page changes hands: the five transitions, and the hooks that are made of them.
//!
//! Each transition looks at all parties first, in the order in which pKVM looks, because the order
//! decides which errno a caller gets. Then memory for tables is taken. Only then does anything
//! change, and from there on nothing can fail. Both parties are locked all the while.

use super::page::{GuestPages, HostPage, HostPages, Life};
use super::spec::SpecPage;
use crate::addr::{Gfn, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::range::PfnRange;
use crate::stage2::{Entry, GuestRun, Leaf, Level, PageState, TableError};

/// Host and guest, both locked: the host first.
#[derive(Debug)]
pub(super) struct Parties<'a> {
    pub(super) host: &'a mut HostPages,
    pub(super) guest: &'a mut GuestPages,
}

/// What a hook has to do for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Donate,
    Share,
    Unshare,
}

impl Step {
    /// Whether only the guest may ask for it.
    fn is_the_guests_wish(self) -> bool {
        matches!(self, Self::Share | Self::Unshare)
    }
}

/// The pages of a run, as far as they can be numbered.
fn pages(run: GuestRun) -> impl Iterator<Item = (Gfn, Pfn)> {
    (0..run.nr_pages).map_while(move |i| Some((run.gfn.checked_add(i)?, run.pfn.checked_add(i)?)))
}

/// Refuses runs that name a guest frame or a frame twice: each would be checked as if the other had
/// not happened.
fn check_disjoint(runs: &[GuestRun]) -> Result<(), Errno> {
    if runs.len() < 2 {
        return Ok(());
    }
    let mut sorted: Vec<GuestRun> = Vec::new();
    sorted.try_reserve_exact(runs.len()).map_err(|_| Errno::ENOMEM)?;
    let starts: [fn(&GuestRun) -> u64; 2] = [|run| run.gfn.get(), |run| run.pfn.get()];
    for start in starts {
        sorted.clear();
        sorted.extend(runs.iter().filter(|run| run.nr_pages > 0));
        sorted.sort_unstable_by_key(start);
        let overlap =
            |pair: &[GuestRun]| start(&pair[0]).saturating_add(pair[0].nr_pages) > start(&pair[1]);
        if sorted.windows(2).any(overlap) {
            return Err(Errno::EINVAL);
        }
    }
    Ok(())
}

impl Parties<'_> {
    /// Gives pages of the host to the guest, contents preserved.
    ///
    /// # Errors
    /// In this order: `EINVAL` if the guest is dying or only some of the frames are memory; `EPERM`
    /// if a frame is no memory or not the host's alone; `ERANGE` beyond the guest's address space;
    /// `EPERM` if the guest has a page there, or had one that was destroyed; `ENOMEM`.
    pub(super) fn host_donate_guest(&mut self, run: GuestRun) -> Result<(), Errno> {
        self.check_donate_run(run)?;
        self.reserve(&[run])?;
        pages(run).try_for_each(|(gfn, pfn)| self.donate(gfn, pfn))
    }

    fn check_donate_run(&self, run: GuestRun) -> Result<(), Errno> {
        if self.guest.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        self.host.check_memory(run.pfn, run.nr_pages)?;
        pages(run).try_for_each(|(gfn, pfn)| self.check_donate(gfn, pfn))
    }

    fn check_donate(&self, gfn: Gfn, pfn: Pfn) -> Result<(), Errno> {
        if self.host.state(pfn) != HostPage::Owned {
            return Err(Errno::EPERM);
        }
        match self.guest.table.lookup(gfn)? {
            (_, Entry::Empty) => Ok(()),
            _ => Err(Errno::EPERM),
        }
    }

    fn donate(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Errno> {
        // The host loses its translation before the guest gets one.
        let owner = self.guest.owner_of(gfn);
        self.host.set_donated(pfn, owner)?;
        self.guest.set(gfn, pfn, PageState::Owned)?;
        self.stepped(gfn, pfn, SpecPage::Guest(owner));
        Ok(())
    }

    /// Lets the host see a page of the guest, at the guest's request.
    ///
    /// # Errors
    /// In this order: `EHWPOISON`, `ENOENT`, `E2BIG` for what the guest's table has instead of a
    /// page (`ERANGE` beyond it); `EPERM` if the guest shares the page already; `EPERM` if
    /// the host does not have it down as the guest's.
    pub(super) fn guest_share_host(&mut self, gfn: Gfn) -> Result<(), Errno> {
        let pfn = self.check_share(gfn)?;
        self.share(gfn, pfn)
    }

    fn check_share(&self, gfn: Gfn) -> Result<Pfn, Errno> {
        let leaf = self.guest.table.page(gfn)?;
        if leaf.state != PageState::Owned {
            return Err(Errno::EPERM);
        }
        match self.host.state(leaf.pfn) {
            HostPage::NoPage(owner) if owner == self.guest.owner_of(gfn) => Ok(leaf.pfn),
            _ => Err(Errno::EPERM),
        }
    }

    fn share(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Errno> {
        self.guest.set(gfn, pfn, PageState::SharedOwned)?;
        self.host.set_borrowed(pfn)?;
        self.stepped(gfn, pfn, SpecPage::SharedByGuest(self.guest.owner_of(gfn)));
        Ok(())
    }

    /// Takes the host's sight of a page away again, at the guest's request.
    ///
    /// # Errors
    /// As [`Self::guest_share_host`]: first the guest's table, then `EPERM` if the guest does not
    /// share the page, then `EPERM` if the host has not borrowed it.
    pub(super) fn guest_unshare_host(&mut self, gfn: Gfn) -> Result<(), Errno> {
        let pfn = self.check_unshare(gfn)?;
        self.unshare(gfn, pfn)
    }

    fn check_unshare(&self, gfn: Gfn) -> Result<Pfn, Errno> {
        let leaf = self.guest.table.page(gfn)?;
        if leaf.state != PageState::SharedOwned {
            return Err(Errno::EPERM);
        }
        match self.host.state(leaf.pfn) {
            HostPage::SharedBorrowed => Ok(leaf.pfn),
            _ => Err(Errno::EPERM),
        }
    }

    fn unshare(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Errno> {
        // The host has lost the page before the guest may believe that it is alone with it.
        let owner = self.guest.owner_of(gfn);
        self.host.set_donated(pfn, owner)?;
        self.guest.set(gfn, pfn, PageState::Owned)?;
        self.stepped(gfn, pfn, SpecPage::Guest(owner));
        Ok(())
    }

    /// Takes a page of a dying guest back. A page that it had to itself is zeroed; one that the host
    /// could see anyway keeps its bytes. A page that was destroyed is back already.
    ///
    /// # Errors
    /// In this order: `EINVAL` if the guest is not dying; `ENOENT`, `E2BIG` (`ERANGE`); `EPERM` if it
    /// is not the guest's own.
    pub(super) fn reclaim_dying_guest_page(
        &mut self,
        gfn: Gfn,
        arena: &Arena,
    ) -> Result<(), Errno> {
        if self.guest.life != Life::Dying {
            return Err(Errno::EINVAL);
        }
        let leaf = match self.guest.table.page(gfn) {
            Err(TableError::Poisoned) => return Ok(()),
            found => found?,
        };
        self.take_back(gfn, leaf, arena)
    }

    /// Takes a page from the guest that gives it up. What it had to itself is zeroed first.
    ///
    /// # Errors
    /// In this order: `EINVAL` if the guest is torn down; `EHWPOISON`, `ENOENT`, `E2BIG` (`ERANGE`); `EPERM`
    /// if it is not the guest's own.
    pub(super) fn guest_relinquish_page(&mut self, gfn: Gfn, arena: &Arena) -> Result<(), Errno> {
        if self.guest.life != Life::Alive {
            return Err(Errno::EINVAL);
        }
        let leaf = self.guest.table.page(gfn)?;
        self.take_back(gfn, leaf, arena)
    }

    fn take_back(&mut self, gfn: Gfn, leaf: Leaf, arena: &Arena) -> Result<(), Errno> {
        let is_private = match leaf.state {
            PageState::Owned => true,
            PageState::SharedOwned => false,
            PageState::SharedBorrowed => return Err(Errno::EPERM),
        };
        // Unmapped, then zeroed, then the host's: nobody sees the page half zeroed. If it cannot be
        // zeroed it stays annotated, and never becomes the host's.
        self.guest.table.clear(gfn, Level::PAGE)?;
        if is_private {
            let frame = PfnRange::single(leaf.pfn).map_err(|_| Errno::EIO)?;
            arena.zero(frame).map_err(|_| Errno::EIO)?;
        }
        self.host.set_owned(leaf.pfn)?;
        self.stepped(gfn, leaf.pfn, SpecPage::Host);
        Ok(())
    }

    /// All of the runs become the guest's alone.
    ///
    /// A page that it shares with the host is unshared, for which `consents` must know of its
    /// request.
    ///
    /// # Errors
    /// `EINVAL` for runs that name a page twice; those of [`Self::host_donate_guest`] and
    /// [`Self::guest_unshare_host`] for the first page that has one; `EPERM` without consent.
    pub(super) fn make_private(
        &mut self,
        runs: &[GuestRun],
        consents: impl Fn(Gfn) -> bool,
    ) -> Result<(), Errno> {
        self.hook(runs, Self::step_to_private, consents)
    }

    fn step_to_private(&self, gfn: Gfn, pfn: Pfn) -> Result<Step, Errno> {
        match self.guest.table.page(gfn) {
            Ok(leaf) if leaf.pfn != pfn => Err(Errno::EPERM),
            Ok(leaf) if leaf.state == PageState::Owned => Ok(Step::Nothing),
            Ok(_) => Ok(Step::Unshare),
            Err(_) => Ok(Step::Donate),
        }
    }

    /// The host may see all of the runs.
    ///
    /// A page that the guest has to itself is shared, for which `consents` must know of its request.
    /// A page that the guest has never been given is the host's to see anyway.
    ///
    /// # Errors
    /// `EINVAL` for runs that name a page twice; `EPERM` if the guest has another page there, or the
    /// frame is another guest's; those of [`Self::guest_share_host`]; `EPERM` without consent.
    pub(super) fn make_shared(
        &mut self,
        runs: &[GuestRun],
        consents: impl Fn(Gfn) -> bool,
    ) -> Result<(), Errno> {
        self.hook(runs, Self::step_to_shared, consents)
    }

    fn step_to_shared(&self, gfn: Gfn, pfn: Pfn) -> Result<Step, Errno> {
        match self.guest.table.page(gfn) {
            Ok(leaf) if leaf.pfn != pfn => Err(Errno::EPERM),
            Ok(leaf) if leaf.state == PageState::SharedOwned => Ok(Step::Nothing),
            Ok(_) => Ok(Step::Share),
            Err(_) if self.host.state(pfn) == HostPage::Owned => Ok(Step::Nothing),
            Err(_) => Err(Errno::EPERM),
        }
    }

    /// Checks every page, takes the memory for tables, then makes the transitions. Under the locks a
    /// page needs the same one both times, and passes its checks again.
    fn hook(
        &mut self,
        runs: &[GuestRun],
        step: impl Fn(&Self, Gfn, Pfn) -> Result<Step, Errno>,
        consents: impl Fn(Gfn) -> bool,
    ) -> Result<(), Errno> {
        check_disjoint(runs)?;
        for &run in runs {
            self.host.check_memory(run.pfn, run.nr_pages)?;
        }
        let mut donates = false;
        for (gfn, pfn) in runs.iter().flat_map(|&run| pages(run)) {
            let step = step(self, gfn, pfn)?;
            match step {
                Step::Nothing => {}
                Step::Donate => self.check_donate_run(GuestRun { gfn, pfn, nr_pages: 1 })?,
                Step::Share => self.check_share(gfn).map(|_| ())?,
                Step::Unshare => self.check_unshare(gfn).map(|_| ())?,
            }
            donates |= step == Step::Donate;
            if step.is_the_guests_wish() && !consents(gfn) {
                return Err(Errno::EPERM);
            }
        }
        if donates {
            self.reserve(runs)?;
        }
        for (gfn, pfn) in runs.iter().flat_map(|&run| pages(run)) {
            match step(self, gfn, pfn)? {
                Step::Nothing => {}
                Step::Donate => self.host_donate_guest(GuestRun { gfn, pfn, nr_pages: 1 })?,
                Step::Share => self.guest_share_host(gfn)?,
                Step::Unshare => self.guest_unshare_host(gfn)?,
            }
        }
        Ok(())
    }

    /// Takes pages back by the host's wish.
    ///
    /// # Errors
    /// `EINVAL` for runs that name a page twice; `EBUSY` if one of them is the guest's and it lives;
    /// else those of [`Self::reclaim_dying_guest_page`].
    pub(super) fn reclaim(&mut self, runs: &[GuestRun], arena: &Arena) -> Result<(), Errno> {
        check_disjoint(runs)?;
        let has = |parties: &Self, gfn: Gfn, pfn: Pfn| {
            parties.guest.table.page(gfn).is_ok_and(|leaf| leaf.pfn == pfn)
        };
        for &run in runs {
            self.host.check_memory(run.pfn, run.nr_pages)?;
            let is_guests = pages(run).any(|(gfn, pfn)| has(self, gfn, pfn));
            if is_guests && self.guest.life == Life::Alive {
                return Err(Errno::EBUSY);
            }
        }
        for (gfn, pfn) in runs.iter().flat_map(|&run| pages(run)) {
            if has(self, gfn, pfn) {
                self.reclaim_dying_guest_page(gfn, arena)?;
            }
        }
        Ok(())
    }

    /// Whether none of the runs is mapped by the guest: what it has been given, or shares, stays where it is.
    /// pKVM has no hypercall that would move such a page.
    ///
    /// # Errors
    /// `EPERM` if a page is.
    pub(super) fn check_movable(&self, runs: impl Iterator<Item = GuestRun>) -> Result<(), Errno> {
        for run in runs {
            self.host.check_memory(run.pfn, run.nr_pages)?;
            if pages(run).any(|(gfn, _)| self.guest.table.page(gfn).is_ok()) {
                return Err(Errno::EPERM);
            }
        }
        Ok(())
    }

    fn reserve(&mut self, runs: &[GuestRun]) -> Result<(), Errno> {
        self.host.reserve(runs)?;
        self.guest.table.reserve(runs.iter().map(|run| (run.gfn, run.nr_pages)))?;
        Ok(())
    }

    /// In debug builds, makes the same step in the specification and compares.
    #[cfg(debug_assertions)]
    fn stepped(&mut self, gfn: Gfn, pfn: Pfn, to: SpecPage) {
        self.host.spec.step(pfn, to);
        assert_eq!(self.view(gfn, pfn), to, "at {gfn:?}, {pfn:?}");
    }

    #[cfg(not(debug_assertions))]
    fn stepped(&mut self, _gfn: Gfn, _pfn: Pfn, _to: SpecPage) {}

    /// The page as the tables have it.
    #[cfg(debug_assertions)]
    fn view(&self, gfn: Gfn, pfn: Pfn) -> SpecPage {
        let owner = self.guest.owner_of(gfn);
        let guest = self.guest.table.page(gfn).ok().filter(|leaf| leaf.pfn == pfn);
        match (self.host.state(pfn), guest.map(|leaf| leaf.state)) {
            (HostPage::Owned, None) => SpecPage::Host,
            (HostPage::NoPage(found), Some(PageState::Owned)) if found == owner => {
                SpecPage::Guest(owner)
            }
            (HostPage::SharedBorrowed, Some(PageState::SharedOwned)) => {
                SpecPage::SharedByGuest(owner)
            }
            _ => SpecPage::Illegal,
        }
    }
}

#[cfg(test)]
mod tests;
