//! All that a pool's lock guards: parts, owners and accounts. No bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use slab::Slab;

use super::account::Charge;
use super::frames::{Frames, IsQuarantined, Promise, Taken};
use super::home::{Home, Homes};
use super::ledger::Blocks;
use super::record::{Record, Records, Use};
use crate::addr::{ByteSize, PageNumber, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, HUGE_ORDER};
use crate::range::PfnRange;

/// What kind of frames an part has, after the kernel's zones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Zone {
    /// For anything.
    #[default]
    Normal,
    /// For what can be moved at any time, so that the part can be emptied (`ZONE_MOVABLE`).
    Movable,
    /// For what can be moved when a device wants one large run (`MIGRATE_CMA`).
    Cma,
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "normal",
            Self::Movable => "movable",
            Self::Cma => "cma",
        })
    }
}

/// A run of frames of one zone.
#[derive(Debug)]
pub(super) struct PartState {
    pub(super) start: u64,
    pub(super) zone: Zone,
    pub(super) frames: Frames,
    pub(super) records: Records,
    pub(super) homes: Homes,
}

impl PartState {
    pub(super) fn new(frames: PfnRange, zone: Zone) -> Result<Self, Error> {
        let nr_pages = frames.nr_pages();
        Ok(Self {
            start: frames.start().get(),
            zone,
            frames: Frames::new(nr_pages)?,
            records: Records::new(nr_pages)?,
            homes: Homes::new(nr_pages)?,
        })
    }

    /// A frame of the part as the pool numbers it.
    pub(super) fn pfn(&self, frame: u64) -> Pfn {
        Pfn::from_raw(self.start + frame)
    }

    pub(super) fn metadata_bytes(&self) -> u64 {
        let maps = self.frames.metadata_bytes() + self.homes.metadata_bytes();
        maps + self.records.metadata_bytes()
    }
}

/// Somebody who has folios: an object.
#[derive(Debug)]
struct Owner {
    account: Option<usize>,
    promise: Promise,
    /// The parts that it may draw from, in its order, and what each still owes it.
    left: Vec<(usize, Blocks)>,
    /// Arenas outside of its promise, where folios that hold shared memory alone are put as long as there
    /// is room. All that is promised is in [`Zone::Normal`] then.
    opportune: Vec<usize>,
    mover: Option<Weak<dyn Mover>>,
    home: Option<(usize, Home)>,
    /// What its account is charged for it.
    charged_pages: u64,
}

/// A folio that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// All zeroes.
    Clean(Pfn),
    /// To be scrubbed by the caller.
    Dirty(Pfn),
    /// The caller scrubs this block of 2 MiB, gives it to [`State::scrubbed`], and tries again.
    ScrubFirst(Pfn),
    /// The caller waits until a scrub has ended, and tries again.
    Wait,
}

/// What a scrubber is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Work,
    End,
}

/// What becomes of private memory of an object whose folios may be outside of [`Zone::Normal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PrivatePlacement {
    /// It moves to [`Zone::Normal`] before it turns private. All of the object is promised there, so that
    /// this cannot fail for want of frames; other zones take what is shared, as long as they have room.
    #[default]
    MoveToNormal,
    /// Nothing turns private outside of [`Zone::Normal`]: conversions and first touches there are refused.
    Refuse,
}

/// What a folio is to hold at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Nothing but shared memory.
    SharedOnly,
    /// Private memory as well.
    Any,
}

/// Somebody who can move his folios to other frames when asked.
pub(crate) trait Mover: Send + Sync + fmt::Debug {
    /// Moves the folio that holds the pages from `page` on out of the frame that it is in, which must be
    /// `from`, to any other of the same zone.
    fn move_away(&self, page: Pgoff, from: Pfn) -> Result<(), Error>;
}

/// What is wanted of a pool for an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand<'a> {
    pub(super) blocks: Blocks,
    pub(super) zones: &'a [Zone],
    pub(super) private: PrivatePlacement,
    pub(super) account: Option<usize>,
    pub(super) promise: Promise,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) parts: Vec<PartState>,
    owners: Slab<Owner>,
    pub(super) accounts: Slab<Charge>,
    /// The threads that clean dirty folios, and what they are to do.
    pub(super) scrubbers: BTreeMap<u64, Order>,
    /// How many there ever were: each has a number of its own.
    pub(super) nr_scrubbers: u64,
}

const SIZES: [FolioSize; 3] = [FolioSize::Huge1G, FolioSize::Huge2M, FolioSize::Base];

impl State {
    /// Promises an object its folios, or says why not.
    pub(super) fn reserve(&mut self, demand: &Demand<'_>) -> Result<usize, Error> {
        let op = Op::CreateObject;
        let floats = demand.private == PrivatePlacement::MoveToNormal
            && demand.zones.iter().any(|&zone| zone != Zone::Normal);
        let (mut parts, mut opportune) = (Vec::new(), Vec::new());
        for (nr, part) in demand.zones.iter().flat_map(|&zone| self.of_zone(zone)) {
            match floats && part.zone != Zone::Normal {
                true => opportune.push(nr),
                false => parts.push((nr, Blocks::default())),
            }
        }
        if floats && !demand.zones.contains(&Zone::Normal) {
            parts.extend(self.of_zone(Zone::Normal).map(|(nr, _)| (nr, Blocks::default())));
        }
        let nr_pages = match demand.promise {
            Promise::None => 0,
            Promise::Kept => {
                self.promise(&mut parts, demand.blocks)?;
                demand.blocks.pages()
            }
        };
        if let Err(error) = self.charge(op, demand.account, nr_pages) {
            self.unpromise(&parts);
            return Err(error);
        }
        let home = parts.iter().find_map(|&(nr, _)| {
            let part = self.parts.get_mut(nr)?;
            Some((nr, part.homes.find(part.frames.buddy(), demand.blocks.pages())?))
        });
        Ok(self.owners.insert(Owner {
            account: demand.account,
            promise: demand.promise,
            left: parts,
            opportune,
            mover: None,
            home,
            charged_pages: nr_pages,
        }))
    }

    fn of_zone(&self, zone: Zone) -> impl Iterator<Item = (usize, &PartState)> {
        self.parts.iter().enumerate().filter(move |(_, part)| part.zone == zone)
    }

    /// Has the parts promise what is wanted, in their order, the largest folios first.
    fn promise(&mut self, left: &mut [(usize, Blocks)], wanted: Blocks) -> Result<(), Error> {
        for size in SIZES {
            let mut missing = wanted.of(size);
            for (nr, promised) in left.iter_mut() {
                let Some(part) = self.parts.get_mut(*nr) else { continue };
                let frames = &mut part.frames;
                let most = frames.free().promisable(&frames.promised(), size).min(missing);
                let mut more = Blocks::default();
                *more.of_mut(size) = most;
                if most > 0 && frames.promise(more) {
                    *promised = promised.plus(more);
                    missing -= most;
                }
            }
            if missing > 0 {
                let parts: Vec<usize> = left.iter().map(|&(nr, _)| nr).collect();
                self.unpromise(left);
                return Err(self.cannot_promise(&parts, wanted));
            }
        }
        Ok(())
    }

    fn unpromise(&mut self, left: &[(usize, Blocks)]) {
        for &(nr, blocks) in left {
            if let Some(part) = self.parts.get_mut(nr) {
                part.frames.unpromise(blocks);
            }
        }
    }

    /// The error that says how much is missing.
    fn cannot_promise(&self, parts: &[usize], wanted: Blocks) -> Error {
        let can = |size| -> u64 {
            let parts = parts.iter().filter_map(|&nr| self.parts.get(nr));
            parts.map(|a| a.frames.free().promisable(&a.frames.promised(), size)).sum()
        };
        let [giant, huge, base] = SIZES.map(can);
        let missing = wanted.pages().saturating_sub(base);
        Error::new(Op::CreateObject, ErrorKind::Exhausted).because(format!(
            "wanted are {} folios of 1 GiB, {} of 2 MiB and {} of 4 KiB; of one size alone the pool can still \
             promise {giant}, {huge} or {base}; {} bytes are missing{}",
            wanted.giant,
            wanted.huge,
            wanted.base,
            ByteSize::from_pages(missing).get(),
            if missing == 0 { " in all, but not in blocks of that size" } else { "" },
        ))
    }

    fn charge(&mut self, op: Op, account: Option<usize>, nr_pages: u64) -> Result<(), Error> {
        match account.and_then(|key| self.accounts.get_mut(key)) {
            Some(account) => account.charge(op, nr_pages),
            None => Ok(()),
        }
    }

    fn uncharge(&mut self, account: Option<usize>, nr_pages: u64) {
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) {
            account.uncharge(nr_pages);
        }
    }

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
            self.give_back(pfn, bytes);
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

    /// Who is to be asked to move an owner's folios.
    pub(super) fn set_mover(&mut self, key: usize, mover: Weak<dyn Mover>) {
        if let Some(owner) = self.owners.get_mut(key) {
            owner.mover = Some(mover);
        }
    }

    /// Who can move the folio that begins at a frame of an part, and the first page of it.
    pub(super) fn mover_of(&self, record: &Record) -> Option<(Arc<dyn Mover>, Pgoff)> {
        let Use::Owned { owner, page } = record.state else { return None };
        let mover = self.owners.get(owner)?.mover.as_ref()?.upgrade()?;
        Some((mover, Pgoff::new(page)))
    }

    /// In which zone a frame is.
    pub(super) fn zone_of(&self, pfn: Pfn) -> Option<Zone> {
        self.parts.iter().find(|part| part.covers(pfn)).map(|part| part.zone)
    }

    /// Takes a folio back. A clean one, or one that is scrubbed later.
    #[inline]
    pub(super) fn give_back(&mut self, pfn: Pfn, bytes: Bytes) {
        let Some((nr, part)) = part_of(&mut self.parts, pfn) else { return };
        let start = pfn.get() - part.start;
        let Some(record) = part.records.remove(start) else { return };
        let Use::Owned { owner: key, .. } = record.state else { return };
        let Some(owner) = self.owners.get_mut(key) else { return };
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
        let account = owner.account;
        if owner.promise == Promise::None {
            owner.charged_pages = owner.charged_pages.saturating_sub(record.size.nr_pages());
            self.uncharge(account, record.size.nr_pages());
        }
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) {
            account.unused(record.size.nr_pages());
        }
    }

    /// Keeps a folio out of use for ever.
    pub(super) fn quarantine(&mut self, pfn: Pfn) {
        let Some((_, part)) = part_of(&mut self.parts, pfn) else { return };
        let start = pfn.get() - part.start;
        if let Some(record) = part.records.at_mut(start) {
            record.state = Use::Quarantined;
            let size = record.size;
            part.frames.quarantine(start, size);
        }
    }

    /// Ends an owner's promise.
    pub(super) fn leave(&mut self, key: usize) {
        let Some(owner) = self.owners.try_remove(key) else { return };
        if owner.promise == Promise::Kept {
            self.unpromise(&owner.left);
        }
        self.uncharge(owner.account, owner.charged_pages);
        if let Some((nr, home)) = owner.home {
            if let Some(part) = self.parts.get_mut(nr) {
                part.homes.leave(home);
            }
        }
    }

    /// The frames of a folio that are not to be touched, in ascending order.
    pub(super) fn poisoned_in(&self, pfn: Pfn, size: FolioSize) -> Vec<Pfn> {
        let Some(part) = self.parts.iter().find(|part| part.covers(pfn)) else {
            return Vec::new();
        };
        let bad = part.frames.poisoned_in(pfn.get() - part.start, size.nr_pages());
        bad.iter().map(|&frame| part.pfn(frame)).collect()
    }

    /// Keeps a frame out of use. If it was in a dirty block, the caller has that to scrub now.
    pub(super) fn poison(&mut self, pfn: Pfn) -> Result<Poisoned, Error> {
        let Some((_, part)) = part_of(&mut self.parts, pfn) else {
            return Err(Error::new(Op::Poison, ErrorKind::OutOfRange));
        };
        let frame = pfn.get() - part.start;
        let record = part.records.containing(frame);
        let is_quarantined = match record.map(|record| record.state) {
            Some(Use::Quarantined) => IsQuarantined::Yes,
            _ => IsQuarantined::No,
        };
        if !part.frames.poison(frame, is_quarantined)? {
            return Ok(Poisoned::Already);
        }
        Ok(match part.frames.dirty_around(frame) {
            Some((start, size)) => Poisoned::ScrubAround(part.pfn(start), size),
            None => Poisoned::Fenced,
        })
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
            part.frames.not_scrubbed(pfn.get() - part.start, size);
        }
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

/// What is known of the bytes of a folio that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    /// All zero.
    Zero,
    /// Not all zero, perhaps. For folios of 2 MiB or more without poisoned frames.
    Dirty,
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

impl PartState {
    /// Writes down whose a folio is that was just taken, or puts it back.
    #[inline]
    fn note(
        &mut self,
        owner: usize,
        page: Pgoff,
        size: FolioSize,
        start: u64,
        (bytes, promise): (Bytes, Promise),
    ) -> Result<(), Error> {
        let state = Use::Owned { owner, page: page.get() };
        let outcome = self.records.insert(Record { start, size, state });
        if outcome.is_err() {
            match bytes {
                Bytes::Zero => {
                    self.frames.give_back_clean(start, size, promise);
                }
                Bytes::Dirty => self.frames.give_back_dirty(start, size, promise),
            }
        }
        outcome
    }

    /// Takes a folio that nobody was promised; `None` if there is none without waiting for a scrub.
    fn take_unpromised(&mut self, owner: usize, size: FolioSize, page: Pgoff) -> Option<Got> {
        let (start, bytes) = match self.frames.take(size, None, Promise::None) {
            Taken::Clean(start) => (start, Bytes::Zero),
            Taken::Dirty(start) => (start, Bytes::Dirty),
            Taken::ScrubFirst(start) => return Some(Got::ScrubFirst(self.pfn(start))),
            Taken::Wait | Taken::Nothing => return None,
        };
        self.note(owner, page, size, start, (bytes, Promise::None)).ok()?;
        let pfn = self.pfn(start);
        Some(if bytes == Bytes::Zero { Got::Clean(pfn) } else { Got::Dirty(pfn) })
    }

    pub(super) fn covers(&self, pfn: Pfn) -> bool {
        pfn.get().checked_sub(self.start).is_some_and(|frame| frame < self.frames.nr_pages())
    }
}

#[inline]
fn part_of(parts: &mut [PartState], pfn: Pfn) -> Option<(usize, &mut PartState)> {
    parts.iter_mut().enumerate().find(|(_, part)| part.covers(pfn))
}

fn no_such_owner() -> Error {
    Error::new(Op::Allocate, ErrorKind::NotFound)
}
