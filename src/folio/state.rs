//! All that a pool's lock guards: parts, owners and accounts. No bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use slab::Slab;

use super::account::Charge;
use super::frames::{IsQuarantined, Promise, Taken};
use super::ledger::Blocks;
use super::owner::{Mover, Owner, Side};
use super::part::{Bytes, Got, PartState, Zone, part_of};
use super::record::{Record, Use};
use crate::addr::{Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_ORDER};
use crate::range::PfnRange;

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
            self.charge(Op::Allocate, account, size.nr_pages())?;
        }
        let got = match self.take_opportune(owner, size, page, side) {
            Some(got) => Ok(got),
            None => self.take_from_parts(owner, size, page, side),
        };
        let taken = matches!(got, Ok(Got::Clean(_) | Got::Dirty(_)));
        if promise == Promise::None {
            match self.owners.get_mut(owner).filter(|_| taken) {
                Some(owner) => owner.charged_pages += size.nr_pages(),
                None => self.uncharge(account, size.nr_pages()),
            }
        }
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)).filter(|_| taken)
        {
            account.used(size.nr_pages());
        }
        got
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
            let home = owner.home.filter(|(home, _)| home == nr);
            let home = home.and_then(|(_, home)| home.start.checked_add(page.get()));
            let (start, bytes) = match part.frames.take(size, home, owner.promise) {
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
            if let Some(got) = part.take_unpromised(key, size, page) {
                return Some(got);
            }
        }
        None
    }

    /// Takes a folio of a zone to which one of the owner's is to move, at nobody's expense.
    pub(super) fn take_to(
        &mut self,
        key: usize,
        size: FolioSize,
        page: Pgoff,
        zone: Zone,
    ) -> Result<Got, Error> {
        let Some(owner) = self.owners.get(key) else { return Err(no_such_owner()) };
        if zone == Zone::Normal && !owner.opportune.is_empty() {
            // What is promised is there for just that.
            return self.take_from_parts(key, size, page, Side::Any);
        }
        let parts = self.parts.iter_mut().filter(|part| part.zone == zone);
        let mut found = parts.filter_map(|part| part.take_unpromised(key, size, page));
        found.next().ok_or_else(|| {
            Error::new(Op::Migrate, ErrorKind::Exhausted)
                .because(format!("nothing in zone {zone} that nobody was promised"))
        })
    }

    /// Takes the folio back that one of the same owner's has moved out of: the promise goes with it.
    pub(super) fn moved_out(&mut self, pfn: Pfn, bytes: Bytes) {
        let Some((_, part)) = part_of(&mut self.parts, pfn) else { return };
        let start = pfn.get() - part.start;
        let Some(Record { size, state: Use::Owned { owner, .. }, .. }) = part.records.at(start)
        else {
            return;
        };
        let (size, owner) = (*size, self.owners.get_mut(*owner));
        if owner.is_some_and(|owner| !owner.opportune.is_empty() && part.zone == Zone::Normal) {
            // It stays promised where it was promised.
            self.put_back(pfn, bytes);
            return;
        }
        part.records.remove(start);
        match bytes {
            Bytes::Zero => {
                part.frames.give_back_clean(start, size, Promise::None);
            }
            Bytes::Dirty => part.frames.give_back_dirty(start, size, Promise::None),
        }
    }

    /// In which zone a frame is.
    pub(super) fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        self.parts.iter().find(|part| part.covers(pfn)).map(|part| part.zone)
    }

    /// Takes a folio back. A clean one, or one that is scrubbed later.
    #[inline]
    pub(super) fn give_back(&mut self, pfn: Pfn, bytes: Bytes) {
        if let Some((owner, size)) = self.put_back(pfn, bytes) {
            self.has_less(owner, size);
        }
    }

    /// An owner has one folio less at its account's expense.
    #[inline]
    fn has_less(&mut self, owner: usize, size: FolioSize) {
        let Some(owner) = self.owners.get_mut(owner) else { return };
        let account = owner.account;
        if owner.promise == Promise::None {
            owner.charged_pages = owner.charged_pages.saturating_sub(size.nr_pages());
            self.uncharge(account, size.nr_pages());
        }
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) {
            account.unused(size.nr_pages());
        }
    }

    /// Takes a folio back at nobody's expense; whose it was.
    #[inline]
    fn put_back(&mut self, pfn: Pfn, bytes: Bytes) -> Option<(usize, FolioSize)> {
        let (nr, part) = part_of(&mut self.parts, pfn)?;
        let start = pfn.get() - part.start;
        let record = part.records.remove(start)?;
        let Use::Owned { owner: key, .. } = record.state else { return None };
        let owner = self.owners.get_mut(key)?;
        // A folio that has moved is promised again where it is now, but for one that was no part of the
        // promise.
        let is_promised = owner.opportune.is_empty() || part.zone == Zone::Normal;
        let known = owner.left.iter().any(|&(other, _)| other == nr);
        if is_promised && !known && owner.promise == Promise::Kept {
            owner.left.push((nr, Blocks::default()));
        }
        let promise = if is_promised { owner.promise } else { Promise::None };
        let again = match bytes {
            Bytes::Zero => part.frames.give_back_clean(start, record.size, promise),
            Bytes::Dirty => {
                part.frames.give_back_dirty(start, record.size, promise);
                promise
            }
        };
        if again == Promise::Kept {
            let left = owner.left.iter_mut().filter(|(other, _)| *other == nr);
            left.for_each(|(_, left)| *left.of_mut(record.size) += 1);
        }
        Some((key, record.size))
    }

    /// Keeps a folio out of use for ever.
    pub(super) fn quarantine(&mut self, pfn: Pfn) {
        if let Some((owner, size)) = self.set_aside(pfn) {
            self.has_less(owner, size);
        }
    }

    /// Keeps a folio out of use for ever that is at nobody's expense; whose it was.
    pub(super) fn set_aside(&mut self, pfn: Pfn) -> Option<(usize, FolioSize)> {
        let (_, part) = part_of(&mut self.parts, pfn)?;
        let start = pfn.get() - part.start;
        let record = part.records.at_mut(start)?;
        let size = record.size;
        let Use::Owned { owner, .. } = std::mem::replace(&mut record.state, Use::Quarantined)
        else {
            return None;
        };
        part.frames.quarantine(start, size);
        Some((owner, size))
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
    pub(super) fn owner_of(&self, pfn: Pfn) -> Option<(Arc<dyn Mover>, Pgoff)> {
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
