//! All that a pool's lock guards: parts, owners and accounts. No bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use slab::Slab;

use super::account::Charge;
use super::frames::{IsQuarantined, Promise, Taken, Wish};
use super::ledger::Blocks;
use super::owner::{Mover, Owner, Side, at_home};
use super::part::{Bytes, Got, PartState, Zone, part_of};
use super::record::{Record, Use};
use crate::addr::{Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_ORDER};
use crate::range::PfnRange;

/// Whether a folio comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    On,
    Off,
}

/// What a scrubber is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Work,
    End,
}

/// A thread that cleans dirty folios.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    pub(super) order: Order,
    /// How many folios of 2 MiB are to be clean.
    pub(super) keep_clean: u64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) parts: Vec<PartState>,
    pub(super) owners: Slab<Owner>,
    pub(super) accounts: Slab<Charge>,
    /// The threads that clean dirty folios, and what they are to do.
    pub(super) scrubbers: BTreeMap<u64, Watch>,
    /// How many there ever were: each has a number of its own.
    pub(super) nr_scrubbers: u64,
}

impl State {
    /// Takes a folio for the pages of an owner that begin at `page`.
    #[inline]
    pub(super) fn take(
        &mut self,
        owner: usize,
        size: FolioSize,
        page: Pgoff,
        side: Side,
    ) -> Result<Got, Error> {
        let Some(Owner { promise, account, .. }) = self.owners.get(owner) else {
            return Err(no_such_owner());
        };
        let (promise, account) = (*promise, *account);
        if promise == Promise::None {
            self.may_charge(Op::Allocate, account, size.nr_pages())?;
        }
        let got = match self.take_opportune(owner, size, page, side) {
            Some(got) => Ok(got),
            None => self.take_from_parts(owner, size, page, side),
        };
        if !matches!(got, Ok(Got::Clean(_) | Got::Dirty(_))) {
            return got;
        }
        if promise == Promise::None {
            // It may be charged: that was asked above.
            self.charge(Op::Allocate, account, size.nr_pages())?;
            if let Some(owner) = self.owners.get_mut(owner) {
                owner.charged_pages += size.nr_pages();
            }
        }
        self.count(account, size, Counted::On);
        got
    }

    /// Counts a folio that an account's objects have, or have no more.
    #[inline]
    fn count(&mut self, account: Option<usize>, size: FolioSize, counted: Counted) {
        let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) else { return };
        match counted {
            Counted::On => account.used(size.nr_pages()),
            Counted::Off => account.unused(size.nr_pages()),
        }
    }

    fn account_of(&self, owner: usize) -> Option<usize> {
        self.owners.get(owner)?.account
    }

    #[inline]
    fn take_from_parts(
        &mut self,
        key: usize,
        size: FolioSize,
        page: Pgoff,
        side: Side,
    ) -> Result<Got, Error> {
        let (mut waits, mut outside) = (false, false);
        let Some(owner) = self.owners.get_mut(key) else { return Err(no_such_owner()) };
        for (nr, left) in &mut owner.left {
            if owner.promise == Promise::Kept && left.of(size) == 0 {
                continue;
            }
            let Some(part) = self.parts.get_mut(*nr) else { continue };
            if side == Side::Any && part.zone != Zone::Normal {
                outside = true;
                continue;
            }
            let home = at_home(&owner.homes, *nr, page);
            let wish = Wish { home, placement: owner.placement };
            let (start, bytes) = match part.take(size, wish, owner.promise) {
                Taken::Clean(start) => (start, Bytes::Zero),
                Taken::Dirty(start) => (start, Bytes::Dirty),
                Taken::ScrubFirst(start) => return Ok(Got::ScrubFirst(part.pfn(start))),
                Taken::Wait => {
                    waits = true;
                    continue;
                }
                Taken::Nothing => continue,
            };
            part.note(key, page, size, start, (bytes, owner.promise))?;
            if owner.promise == Promise::Kept {
                *left.of_mut(size) -= 1;
            }
            let pfn = part.pfn(start);
            return Ok(if bytes == Bytes::Zero { Got::Clean(pfn) } else { Got::Dirty(pfn) });
        }
        // What was promised is there in one piece.
        if size == FolioSize::Huge1G && !waits && owner.promise == Promise::None {
            let may = |part: &PartState| side == Side::SharedOnly || part.zone == Zone::Normal;
            let mut parts = owner.left.iter().map(|&(nr, _)| nr);
            let gathered =
                parts.find_map(|nr| self.parts.get_mut(nr).filter(|part| may(part))?.gather());
            if let Some(got) = gathered {
                return Ok(got);
            }
        }
        match waits {
            true => Ok(Got::Wait),
            false if outside => Err(Error::new(Op::Allocate, ErrorKind::Unsupported)
                .because("private memory is not put outside of zone normal")),
            false => {
                Err(Error::new(Op::Allocate, ErrorKind::Exhausted).because(match owner.promise {
                    Promise::Kept => {
                        "the object has no folio left to take, or memory failed that was promised"
                    }
                    Promise::None => "the pool has no folio that nobody was promised",
                }))
            }
        }
    }

    /// Takes a folio outside of an owner's promise, if it is to hold shared memory alone and there is room.
    fn take_opportune(
        &mut self,
        key: usize,
        size: FolioSize,
        page: Pgoff,
        side: Side,
    ) -> Option<Got> {
        let owner = self.owners.get(key).filter(|owner| !owner.opportune.is_empty())?;
        let parts = owner.opportune.iter().filter(|_| side == Side::SharedOnly);
        for &nr in parts {
            let Some(part) = self.parts.get_mut(nr) else { continue };
            let home = at_home(&owner.homes, nr, page);
            // Room that has to be waited for is no room, but at home.
            let waits = home.is_some_and(|home| part.frames.is_in_hands(home));
            let wish = Wish { home, placement: owner.placement };
            let got = part.take_unpromised(key, size, page, wish);
            let got = got.filter(|&got| got != Got::Wait || waits);
            if got.is_some() {
                return got;
            }
        }
        None
    }

    /// Takes a folio of a zone to which one of the owner's, at `old`, is to move. Until that has moved out both
    /// are in use, but nothing is charged.
    pub(super) fn take_to(
        &mut self,
        key: usize,
        size: FolioSize,
        page: Pgoff,
        (old, zone): (Pfn, Zone),
    ) -> Result<Got, Error> {
        let got = self.take_room(key, size, page, (old, zone));
        if let Ok(Got::Clean(_) | Got::Dirty(_)) = got {
            self.count(self.account_of(key), size, Counted::On);
        }
        got
    }

    fn take_room(
        &mut self,
        key: usize,
        size: FolioSize,
        page: Pgoff,
        (old, zone): (Pfn, Zone),
    ) -> Result<Got, Error> {
        let Some(owner) = self.owners.get(key) else { return Err(no_such_owner()) };
        if owner.is_promised_in(zone)
            && !self.zone_of(old).is_some_and(|it| owner.is_promised_in(it))
        {
            // What is promised is there for just that.
            return self.take_from_parts(key, size, page, Side::Any);
        }
        let mut waits = false;
        let parts = self.parts.iter_mut().enumerate().filter(|(_, part)| part.zone == zone);
        for (nr, part) in parts {
            let home = at_home(&owner.homes, nr, page);
            let wish = Wish { home, placement: owner.placement };
            match part.take_unpromised(key, size, page, wish) {
                Some(Got::Wait) => waits = true,
                Some(got) => return Ok(got),
                None => {}
            }
        }
        let gathers = size == FolioSize::Huge1G && !waits;
        let mut parts = self.parts.iter_mut().filter(|part| gathers && part.zone == zone);
        match parts.find_map(PartState::gather) {
            Some(got) => Ok(got),
            None if waits => Ok(Got::Wait),
            None => Err(Error::new(Op::Migrate, ErrorKind::Exhausted)
                .because(format!("nothing in zone {zone} that nobody was promised"))),
        }
    }

    /// Takes one of two folios back that hold the same pages of an owner, who goes on with the other. The
    /// promise stays as it was before there were two.
    pub(super) fn moved_out(&mut self, gone: Pfn, stays: Pfn, bytes: Bytes) {
        let Some(key) = self.owner_of(gone) else { return };
        let Some(owner) = self.owners.get(key) else { return };
        let promised = |pfn| self.zone_of(pfn).is_some_and(|zone| owner.is_promised_in(zone));
        let again = match promised(gone) && !promised(stays) {
            true => owner.promise,
            false => Promise::None,
        };
        if let Some(size) = self.put_back(gone, bytes, again) {
            self.count(self.account_of(key), size, Counted::Off);
        }
    }

    fn owner_of(&self, pfn: Pfn) -> Option<usize> {
        let part = self.parts.iter().find(|part| part.covers(pfn))?;
        match part.records.at(pfn.get() - part.start)?.state {
            Use::Owned { owner, .. } => Some(owner),
            Use::Quarantined => None,
        }
    }

    /// In which zone a frame is.
    pub(super) fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        self.parts.iter().find(|part| part.covers(pfn)).map(|part| part.zone)
    }

    /// Takes a folio back that an owner is done with. A clean one, or one that is scrubbed later.
    #[inline]
    pub(super) fn give_back(&mut self, pfn: Pfn, bytes: Bytes) {
        let Some(key) = self.owner_of(pfn) else { return };
        let zone = self.zone_of(pfn);
        let Some(owner) = self.owners.get(key) else { return };
        // A folio that has moved is promised again where it is now, but for one that was no part of the
        // promise.
        let again = match zone.is_some_and(|zone| owner.is_promised_in(zone)) {
            true => owner.promise,
            false => Promise::None,
        };
        let Some(size) = self.put_back(pfn, bytes, again) else { return };
        let Some(owner) = self.owners.get_mut(key) else { return };
        let account = owner.account;
        if owner.promise == Promise::None {
            owner.charged_pages = owner.charged_pages.saturating_sub(size.nr_pages());
            self.uncharge(account, size.nr_pages());
        }
        self.count(account, size, Counted::Off);
    }

    /// Makes a folio free, and promises its owner another in the same part, or none.
    #[inline]
    fn put_back(&mut self, pfn: Pfn, bytes: Bytes, again: Promise) -> Option<FolioSize> {
        let (nr, part) = part_of(&mut self.parts, pfn)?;
        let start = pfn.get() - part.start;
        let Record { size, state, .. } = part.records.remove(start)?;
        let again = match bytes {
            Bytes::Zero => part.frames.give_back_clean(start, size, again),
            Bytes::Dirty => {
                part.frames.give_back_dirty(start, size, again);
                again
            }
        };
        let Use::Owned { owner, .. } = state else { return Some(size) };
        let owner = self.owners.get_mut(owner).filter(|_| again == Promise::Kept);
        let Some(owner) = owner else { return Some(size) };
        match owner.left.iter_mut().find(|(other, _)| *other == nr) {
            Some((_, left)) => *left.of_mut(size) += 1,
            None => {
                let mut left = Blocks::default();
                *left.of_mut(size) += 1;
                owner.left.push((nr, left));
            }
        }
        Some(size)
    }

    /// Keeps a folio out of use for ever. Who had it is charged for it until he goes.
    pub(super) fn quarantine(&mut self, pfn: Pfn) {
        let Some((_, part)) = part_of(&mut self.parts, pfn) else { return };
        let start = pfn.get() - part.start;
        let Some(record) = part.records.at_mut(start) else { return };
        let Use::Owned { owner, .. } = record.state else { return };
        record.state = Use::Quarantined;
        let size = record.size;
        part.frames.quarantine(start, size);
        self.count(self.account_of(owner), size, Counted::Off);
    }

    /// The frames of a folio that are not to be touched, in ascending order.
    pub(super) fn poisoned_in(&self, pfn: Pfn, nr_pages: u64) -> Vec<Pfn> {
        let Some(part) = self.parts.iter().find(|part| part.covers(pfn)) else {
            return Vec::new();
        };
        let bad = part.frames.poisoned_in(pfn.get() - part.start, nr_pages);
        bad.iter().map(|&frame| part.pfn(frame)).collect()
    }

    /// Keeps frames of one part out of use, which are one page of the host. If they were in a dirty block, the
    /// caller has that to scrub now.
    pub(super) fn poison(&mut self, frames: PfnRange) -> Result<Poisoned, Error> {
        let Some((_, part)) = part_of(&mut self.parts, frames.start()) else {
            return Err(Error::new(Op::Poison, ErrorKind::OutOfRange));
        };
        let frame = frames.start().get() - part.start;
        let record = part.records.containing(frame);
        let is_quarantined = match record.map(|record| record.state) {
            Some(Use::Quarantined) => IsQuarantined::Yes,
            _ => IsQuarantined::No,
        };
        if !part.frames.poison(frame, frames.nr_pages(), is_quarantined)? {
            return Ok(Poisoned::Already);
        }
        Ok(match part.frames.dirty_around(frame) {
            Some((start, size)) => Poisoned::ScrubAround(part.pfn(start), size),
            None => Poisoned::Fenced,
        })
    }

    /// Who has a frame, and the page that is in it.
    pub(super) fn who_has(&self, pfn: Pfn) -> Option<(Arc<dyn Mover>, Pgoff)> {
        let part = self.parts.iter().find(|part| part.covers(pfn))?;
        let frame = pfn.get() - part.start;
        let record = part.records.containing(frame)?;
        let (owner, first) = self.mover_of(record)?;
        Some((owner, Pgoff::new(first.get() + (frame - record.start))))
    }

    /// A dirty block to scrub, in the caller's hands.
    pub(super) fn next_dirty(&mut self) -> Option<(Pfn, FolioSize)> {
        self.parts.iter_mut().find_map(|part| {
            let (start, size) = part.frames.next_dirty()?;
            Some((part.pfn(start), size))
        })
    }

    /// Takes a scrubbed block back.
    pub(super) fn scrubbed(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, part)) = part_of(&mut self.parts, pfn) {
            part.frames.scrubbed(pfn.get() - part.start, size);
        }
    }

    /// Takes a block back that is as dirty as it was.
    pub(super) fn not_scrubbed(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, part)) = part_of(&mut self.parts, pfn) {
            part.not_scrubbed(pfn.get() - part.start, size);
        }
    }

    /// Takes a block back of which some frame cannot be scrubbed.
    pub(super) fn cannot_be_scrubbed(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, part)) = part_of(&mut self.parts, pfn) {
            part.cannot_be_scrubbed(pfn.get() - part.start, size);
        }
    }

    /// A block that is free and clean seems to have no memory: a scrub is to find out.
    pub(super) fn doubt(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, part)) = part_of(&mut self.parts, pfn) {
            part.frames.doubt(pfn.get() - part.start, size);
        }
    }

    /// A block that waits for a scrub cannot be scrubbed.
    pub(super) fn lose_dirty(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, part)) = part_of(&mut self.parts, pfn) {
            part.lose_dirty(pfn.get() - part.start, size);
        }
    }

    /// Whether less is clean than a scrubber is to keep, and something could be cleaned.
    #[inline]
    pub(super) fn is_short_of_clean(&self) -> bool {
        let short = |watch: &Watch| self.nr_clean_huge() < watch.keep_clean;
        let is_short = !self.scrubbers.is_empty() && self.scrubbers.values().any(short);
        is_short && self.parts.iter().any(|part| part.frames.nr_dirty() > 0)
    }

    /// Free memory in whole clean folios of 2 MiB.
    pub(super) fn nr_clean_huge(&self) -> u64 {
        let clean = |part: &PartState| {
            let blocks = part.frames.buddy().blocks();
            (blocks.giant << (FolioSize::Huge1G.order() - HUGE_ORDER)) + blocks.huge
        };
        self.parts.iter().map(clean).sum()
    }
}

/// What came of a report that a frame failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Poisoned {
    /// It was known.
    Already,
    /// It is out of use, or will be when its folio comes back.
    Fenced,
    /// The same; the rest of this block, in the caller's hands, is to be scrubbed.
    ScrubAround(Pfn, FolioSize),
}

fn no_such_owner() -> Error {
    Error::new(Op::Allocate, ErrorKind::NotFound)
}
