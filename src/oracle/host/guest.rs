//! The model's guest: memslots, and what it was given.

use super::action::GuestAct;
use super::keepers::Why;
use super::mistake::HostMistake;
use super::model::{Model, OUT_OF_RANGE};
use super::step::{Answer, Refused, Run, pages_of};
use crate::backing::ArenaBacking;
use crate::error::{Errno, ErrorKind};
use crate::geometry::HUGE_PAGES;
use crate::gmem::ContentPolicy;
use crate::state::Visibility;

const NOT_THE_HOSTS: Refused = Refused(ErrorKind::HypervisorRefused, Errno::EPERM);

/// Guest frames that are pages of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) at: u64,
    pub(super) range: Run,
}

/// A page that the guest was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Has {
    pub(super) page: u64,
    /// Private if it has the page to itself, shared if it lets the host see it.
    pub(super) side: Visibility,
}

impl Model {
    /// Mostly a private page in a memslot.
    pub(super) fn guest_place(&self, claim: u16) -> Option<u64> {
        if claim % 16 == 15 {
            return None;
        }
        let pages = self.slots.values().flat_map(|slot| pages_of(slot.range));
        let wanted = |&page: &u64| claim % 4 == 0 || self.is(page, Visibility::Private);
        let pages: Vec<u64> = pages.filter(wanted).collect();
        let nth = usize::from(claim >> 4).checked_rem(pages.len())?;
        self.place_of(*pages.get(nth)?)
    }

    /// Mostly where the guest has been given something.
    pub(super) fn given_place(&self, claim: u16) -> Option<u64> {
        let nth = usize::from(claim / 8).checked_rem(self.guest.len())?;
        self.guest.keys().copied().nth(nth).filter(|_| claim % 8 > 0)
    }

    /// Mostly the number of a memslot that there is.
    pub(super) fn slot_id(&self, claim: u8) -> Option<u16> {
        let nth = usize::from(claim / 8).checked_rem(self.slots.len())?;
        self.slots.keys().copied().nth(nth).filter(|_| claim % 8 > 0)
    }

    /// The page that a memslot has at a guest frame.
    pub(super) fn bound_at(&self, at: u64) -> Option<u64> {
        let slot = self.slots.values().find(|it| (it.at..it.at + it.range.1).contains(&at))?;
        Some(slot.range.0 + (at - slot.at))
    }

    /// Where the guest sees a page.
    pub(super) fn place_of(&self, page: u64) -> Option<u64> {
        let slot = self.slots.values().find(|it| pages_of(it.range).contains(&page))?;
        Some(slot.at + (page - slot.range.0))
    }

    /// Whether the guest has been given the page, shared since or not.
    pub(super) fn is_guests(&self, page: u64) -> bool {
        self.guest.values().any(|has| has.page == page)
    }

    /// What the hypervisor makes of a conversion: all pages, or none.
    pub(super) fn move_to_side(
        &mut self,
        pages: &[u64],
        to: Visibility,
        asked: Option<u64>,
    ) -> Result<(), Refused> {
        let bound: Vec<(u64, u64)> = pages
            .iter()
            .filter(|&&page| self.is_resident(page))
            .filter_map(|&page| Some((self.place_of(page)?, page)))
            .collect();
        let needs_consent =
            |at: &u64| self.guest.get(at).is_some_and(|has| has.side != to) && asked != Some(*at);
        let is_refused = bound.iter().any(|(at, _)| needs_consent(at));
        if is_refused && !self.errs(HostMistake::GuestsNeedNotConsent) {
            return Err(NOT_THE_HOSTS);
        }
        for (at, page) in bound {
            match (self.guest.get_mut(&at), to) {
                (Some(has), _) => has.side = to,
                (None, Visibility::Private) => drop(self.guest.insert(at, Has { page, side: to })),
                (None, Visibility::Shared) => {}
            }
        }
        Ok(())
    }

    pub(super) fn bind(&mut self, id: u16, at: u64, range: Run) -> Result<(), Refused> {
        if self.slots.contains_key(&id) && !self.errs(HostMistake::MemslotsAreReplaced) {
            return Err(Refused(ErrorKind::Exists, Errno::EINVAL));
        }
        let meets = |a: Run, b: Run| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
        let is_taken = self.slots.values().any(|it| meets((it.at, it.range.1), (at, range.1)));
        if is_taken && !self.errs(HostMistake::MemslotsOverlap) {
            return Err(Refused(ErrorKind::Exists, Errno::EEXIST));
        }
        if range.0 + range.1 > self.nr_pages() {
            return Err(OUT_OF_RANGE);
        }
        if self.slots.values().any(|it| meets(it.range, range)) {
            return Err(Refused(ErrorKind::Exists, Errno::EEXIST));
        }
        let pages: Vec<u64> = pages_of(range).collect();
        self.take_back(&pages, Why::Memslot)?;
        self.slots.insert(id, Slot { at, range });
        self.grant(pages.into_iter());
        Ok(())
    }

    pub(super) fn unbind(&mut self, id: u16) -> Result<(), Refused> {
        let none = Refused(ErrorKind::NotFound, Errno::EINVAL);
        let range = self.slots.get(&id).ok_or(none)?.range;
        let pages: Vec<u64> = pages_of(range).collect();
        self.take_back(&pages, Why::Memslot)?;
        let is_needed = pages.iter().any(|&page| self.is_guests(page));
        if is_needed && !self.errs(HostMistake::MemslotsGoAtOnce) {
            self.grant(pages.into_iter());
            return Err(Refused(ErrorKind::HypervisorRefused, Errno::EBUSY));
        }
        self.slots.remove(&id);
        self.grant(pages.into_iter());
        Ok(())
    }

    /// The guest is no more: what it had to itself is zeroed, and its memslots go.
    pub(super) fn teardown(&mut self) {
        for has in std::mem::take(&mut self.guest).into_values() {
            if has.side == Visibility::Private {
                self.fill((has.page, 1), 0);
            }
        }
        let mut slots: Vec<(u16, Slot)> =
            self.slots.iter().map(|(&id, &slot)| (id, slot)).collect();
        slots.sort_by_key(|(_, slot)| slot.at);
        for (id, slot) in slots {
            let pages: Vec<u64> = pages_of(slot.range).collect();
            self.part_from_all(&pages);
            self.slots.remove(&id);
            self.grant(pages.into_iter());
        }
    }

    pub(super) fn guest_acts(&mut self, at: u64, act: GuestAct, byte: u8) -> Answer {
        let has = self.guest.get(&at).copied();
        match act {
            GuestAct::Store => match self.touched(at) {
                Ok(page) => {
                    self.fill((page, 1), byte);
                    Answer::Done
                }
                Err(exit) => exit,
            },
            GuestAct::Share => match has {
                Some(Has { side: Visibility::Shared, .. }) => Answer::Granted(false),
                _ => match self.touched(at) {
                    Ok(page) => self.asks(at, page, Visibility::Shared),
                    Err(_) => Answer::NotPrivate,
                },
            },
            GuestAct::Unshare => match has {
                Some(Has { side: Visibility::Shared, page }) => {
                    self.asks(at, page, Visibility::Private)
                }
                _ => Answer::Granted(false),
            },
            GuestAct::Relinquish => match has {
                // It takes the page back first.
                Some(Has { side: Visibility::Shared, .. }) => Answer::Granted(false),
                Some(Has { side: Visibility::Private, page }) => {
                    self.guest.remove(&at);
                    if !self.errs(HostMistake::RelinquishedPagesKeepBytes) {
                        self.fill((page, 1), 0);
                    }
                    Answer::Granted(true)
                }
                None => Answer::Granted(true),
            },
        }
    }

    /// The page behind a guest frame that the guest touches: it is given to it, if it is private.
    fn touched(&mut self, at: u64) -> Result<u64, Answer> {
        if let Some(has) = self.guest.get(&at) {
            return Ok(has.page);
        }
        let page = self.bound_at(at).ok_or(Answer::NoSlot)?;
        if self.is(page, Visibility::Shared) {
            return Err(Answer::NotPrivate);
        }
        self.populate((page, 1));
        for (at, page) in self.given_with(at, page) {
            self.guest.insert(at, Has { page, side: Visibility::Private });
        }
        Ok(page)
    }

    /// What the guest is given with a page: its whole huge folio, if one entry of its tables can be all of that.
    fn given_with(&self, at: u64, page: u64) -> Vec<(u64, u64)> {
        let alone = vec![(at, page)];
        let Some(first) = at.checked_sub(page % HUGE_PAGES) else { return alone };
        if self.backing != ArenaBacking::MemfdHugetlb2M || first % HUGE_PAGES != 0 {
            return alone;
        }
        let start = page - page % HUGE_PAGES;
        let block: Vec<_> = (0..HUGE_PAGES).map(|nth| (first + nth, start + nth)).collect();
        let fits = |&(at, page): &(u64, u64)| {
            self.bound_at(at) == Some(page)
                && self.is(page, Visibility::Private)
                && self.is_resident(page)
                && !self.guest.contains_key(&at)
        };
        if block.iter().all(fits) { block } else { alone }
    }

    /// The VMM does what the guest asks for, if it can.
    fn asks(&mut self, at: u64, page: u64, to: Visibility) -> Answer {
        let done = self.convert(&[(page, 1)], to, ContentPolicy::Preserve, Some(at));
        Answer::Granted(done.is_ok())
    }
}
