//! All that a pool's lock guards: arenas, owners and accounts. No bytes.

use std::collections::BTreeMap;
use std::fmt;

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

/// What kind of frames an arena has, after the kernel's zones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Zone {
    /// For anything.
    #[default]
    Normal,
    /// For what can be moved at any time, so that the arena can be emptied (`ZONE_MOVABLE`).
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
pub(super) struct ArenaState {
    pub(super) start: u64,
    pub(super) zone: Zone,
    pub(super) frames: Frames,
    pub(super) records: Records,
    pub(super) homes: Homes,
}

impl ArenaState {
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

    /// A frame of the arena as the pool numbers it.
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
    /// The arenas that it may draw from, in its order, and what each still owes it.
    left: Vec<(usize, Blocks)>,
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

/// What is wanted of a pool for an object.
#[derive(Debug)]
pub(super) struct Demand<'a> {
    pub(super) blocks: Blocks,
    pub(super) zones: &'a [Zone],
    pub(super) account: Option<usize>,
    pub(super) promise: Promise,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) arenas: Vec<ArenaState>,
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
        let mut arenas = Vec::new();
        for zone in demand.zones {
            let of_zone = self.arenas.iter().enumerate().filter(|(_, arena)| arena.zone == *zone);
            for (nr, _) in of_zone {
                arenas.try_reserve(1).map_err(|_| Error::new(op, ErrorKind::Exhausted))?;
                arenas.push((nr, Blocks::default()));
            }
        }
        let nr_pages = match demand.promise {
            Promise::None => 0,
            Promise::Kept => {
                self.promise(&mut arenas, demand.blocks)?;
                demand.blocks.pages()
            }
        };
        if let Err(error) = self.charge(op, demand.account, nr_pages) {
            self.unpromise(&arenas);
            return Err(error);
        }
        let home = arenas.iter().find_map(|&(nr, _)| {
            let arena = self.arenas.get_mut(nr)?;
            Some((nr, arena.homes.find(arena.frames.buddy(), demand.blocks.pages())?))
        });
        Ok(self.owners.insert(Owner {
            account: demand.account,
            promise: demand.promise,
            left: arenas,
            home,
            charged_pages: nr_pages,
        }))
    }

    /// Has the arenas promise what is wanted, in their order, the largest folios first.
    fn promise(&mut self, left: &mut [(usize, Blocks)], wanted: Blocks) -> Result<(), Error> {
        for size in SIZES {
            let mut missing = wanted.of(size);
            for (nr, promised) in left.iter_mut() {
                let Some(arena) = self.arenas.get_mut(*nr) else { continue };
                let frames = &mut arena.frames;
                let most = frames.free().promisable(&frames.promised(), size).min(missing);
                let mut more = Blocks::default();
                *more.of_mut(size) = most;
                if most > 0 && frames.promise(more) {
                    *promised = promised.plus(more);
                    missing -= most;
                }
            }
            if missing > 0 {
                let arenas: Vec<usize> = left.iter().map(|&(nr, _)| nr).collect();
                self.unpromise(left);
                return Err(self.cannot_promise(&arenas, wanted));
            }
        }
        Ok(())
    }

    fn unpromise(&mut self, left: &[(usize, Blocks)]) {
        for &(nr, blocks) in left {
            if let Some(arena) = self.arenas.get_mut(nr) {
                arena.frames.unpromise(blocks);
            }
        }
    }

    /// The error that says how much is missing.
    fn cannot_promise(&self, arenas: &[usize], wanted: Blocks) -> Error {
        let can = |size| -> u64 {
            let arenas = arenas.iter().filter_map(|&nr| self.arenas.get(nr));
            arenas.map(|a| a.frames.free().promisable(&a.frames.promised(), size)).sum()
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
    ) -> Result<Got, Error> {
        let Some(Owner { promise, account, .. }) = self.owners.get(owner) else {
            return Err(no_such_owner());
        };
        let (promise, account) = (*promise, *account);
        if promise == Promise::None {
            self.charge(Op::Allocate, account, size.nr_pages())?;
        }
        let got = self.take_from_arenas(owner, size, page);
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
    fn take_from_arenas(&mut self, key: usize, size: FolioSize, page: Pgoff) -> Result<Got, Error> {
        let mut waits = false;
        let Some(owner) = self.owners.get_mut(key) else { return Err(no_such_owner()) };
        for (nr, left) in &mut owner.left {
            if owner.promise == Promise::Kept && left.of(size) == 0 {
                continue;
            }
            let Some(arena) = self.arenas.get_mut(*nr) else { continue };
            let home = owner.home.filter(|(home, _)| home == nr);
            let home = home.and_then(|(_, home)| home.start.checked_add(page.get()));
            let (start, is_clean) = match arena.frames.take(size, home, owner.promise) {
                Taken::Clean(start) => (start, true),
                Taken::Dirty(start) => (start, false),
                Taken::ScrubFirst(start) => return Ok(Got::ScrubFirst(arena.pfn(start))),
                Taken::Wait => {
                    waits = true;
                    continue;
                }
                Taken::Nothing => continue,
            };
            let state = Use::Owned { owner: key, page: page.get() };
            if let Err(error) = arena.records.insert(Record { start, size, state }) {
                match is_clean {
                    true => {
                        arena.frames.give_back_clean(start, size, owner.promise);
                    }
                    false => arena.frames.give_back_dirty(start, size, owner.promise),
                }
                return Err(error);
            }
            if owner.promise == Promise::Kept {
                *left.of_mut(size) -= 1;
            }
            let pfn = arena.pfn(start);
            return Ok(if is_clean { Got::Clean(pfn) } else { Got::Dirty(pfn) });
        }
        match waits {
            true => Ok(Got::Wait),
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

    /// Takes a folio back. A clean one, or one that is scrubbed later.
    #[inline]
    pub(super) fn give_back(&mut self, pfn: Pfn, bytes: Bytes) {
        let Some((nr, arena)) = arena_of(&mut self.arenas, pfn) else { return };
        let start = pfn.get() - arena.start;
        let Some(record) = arena.records.remove(start) else { return };
        let Use::Owned { owner: key, .. } = record.state else { return };
        let Some(owner) = self.owners.get_mut(key) else { return };
        // A folio that has moved is promised again where it is now.
        let promise = match owner.left.iter().any(|&(other, _)| other == nr) {
            true => owner.promise,
            false => Promise::None,
        };
        let again = match bytes {
            Bytes::Zero => arena.frames.give_back_clean(start, record.size, promise),
            Bytes::Dirty => {
                arena.frames.give_back_dirty(start, record.size, promise);
                promise
            }
        };
        if again == Promise::Kept {
            let left = owner.left.iter_mut().filter(|(other, _)| *other == nr);
            left.for_each(|(_, left)| *left.of_mut(record.size) += 1);
        }
        let (account, promise) = (owner.account, owner.promise);
        if promise == Promise::None {
            owner.charged_pages = owner.charged_pages.saturating_sub(record.size.nr_pages());
            self.uncharge(account, record.size.nr_pages());
        }
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) {
            account.unused(record.size.nr_pages());
        }
    }

    /// Keeps a folio out of use for ever.
    pub(super) fn quarantine(&mut self, pfn: Pfn) {
        let Some((_, arena)) = arena_of(&mut self.arenas, pfn) else { return };
        let start = pfn.get() - arena.start;
        if let Some(record) = arena.records.at_mut(start) {
            record.state = Use::Quarantined;
            let size = record.size;
            arena.frames.quarantine(start, size);
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
            if let Some(arena) = self.arenas.get_mut(nr) {
                arena.homes.leave(home);
            }
        }
    }

    /// The frames of a folio that are not to be touched, in ascending order.
    pub(super) fn poisoned_in(&self, pfn: Pfn, size: FolioSize) -> Vec<Pfn> {
        let Some(arena) = self.arenas.iter().find(|arena| arena.covers(pfn)) else {
            return Vec::new();
        };
        let bad = arena.frames.poisoned_in(pfn.get() - arena.start, size.nr_pages());
        bad.iter().map(|&frame| arena.pfn(frame)).collect()
    }

    /// Keeps a frame out of use. If it was in a dirty block, the caller has that to scrub now.
    pub(super) fn poison(&mut self, pfn: Pfn) -> Result<Poisoned, Error> {
        let Some((_, arena)) = arena_of(&mut self.arenas, pfn) else {
            return Err(Error::new(Op::Poison, ErrorKind::OutOfRange));
        };
        let frame = pfn.get() - arena.start;
        let record = arena.records.containing(frame);
        let is_quarantined = match record.map(|record| record.state) {
            Some(Use::Quarantined) => IsQuarantined::Yes,
            _ => IsQuarantined::No,
        };
        if !arena.frames.poison(frame, is_quarantined)? {
            return Ok(Poisoned::Already);
        }
        Ok(match arena.frames.dirty_around(frame) {
            Some((start, size)) => Poisoned::ScrubAround(arena.pfn(start), size),
            None => Poisoned::Fenced,
        })
    }

    /// A dirty block to scrub, in the caller's hands.
    pub(super) fn next_dirty(&mut self) -> Option<(Pfn, FolioSize)> {
        self.arenas.iter_mut().find_map(|arena| {
            let (start, size) = arena.frames.next_dirty()?;
            Some((arena.pfn(start), size))
        })
    }

    /// Takes a scrubbed block back.
    pub(super) fn scrubbed(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, arena)) = arena_of(&mut self.arenas, pfn) {
            arena.frames.scrubbed(pfn.get() - arena.start, size);
        }
    }

    /// Takes a block back that is as dirty as it was.
    pub(super) fn not_scrubbed(&mut self, pfn: Pfn, size: FolioSize) {
        if let Some((_, arena)) = arena_of(&mut self.arenas, pfn) {
            arena.frames.not_scrubbed(pfn.get() - arena.start, size);
        }
    }

    /// Free memory in whole clean folios of 2 MiB.
    pub(super) fn nr_clean_huge(&self) -> u64 {
        let clean = |arena: &ArenaState| {
            let blocks = arena.frames.buddy().blocks();
            (blocks.giant << (FolioSize::Huge1G.order() - HUGE_ORDER)) + blocks.huge
        };
        self.arenas.iter().map(clean).sum()
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

impl ArenaState {
    pub(super) fn covers(&self, pfn: Pfn) -> bool {
        pfn.get().checked_sub(self.start).is_some_and(|frame| frame < self.frames.nr_pages())
    }
}

#[inline]
fn arena_of(arenas: &mut [ArenaState], pfn: Pfn) -> Option<(usize, &mut ArenaState)> {
    arenas.iter_mut().enumerate().find(|(_, arena)| arena.covers(pfn))
}

fn no_such_owner() -> Error {
    Error::new(Op::Allocate, ErrorKind::NotFound)
}
