//! Who has folios: what objects are promised, where, and at whose expense.

use std::fmt;
use std::sync::{Arc, Weak};

use super::frames::Promise;
use super::home::Home;
use super::ledger::Blocks;
use super::part::{Got, PartState, Zone};
use super::record::{Record, Use};
use super::room::make_room;
use super::state::State;
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::range::PfnRange;

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

/// What a first touch prefers, where the folio that would keep an object in one run waits for a scrub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// That folio, scrubbed by whoever touches it: the object stays one run of frames, so one mapping and one memslot.
    #[default]
    Contiguous,
    /// One that is clean, wherever it is: nobody scrubs while there is one.
    CleanFirst,
}

/// What a folio is to hold at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Nothing but shared memory.
    SharedOnly,
    /// Private memory as well.
    Any,
}

/// Whether a folio was moved, or was not where it was to be moved from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    Yes,
    No,
}

/// Somebody who does to his folios what the pool asks for.
pub(crate) trait Mover: Send + Sync + fmt::Debug {
    /// Moves the folio that holds the pages from `page` on out of the frame that it is in, which must be
    /// `from`, to any other of the same zone.
    fn move_away(&self, page: Pgoff, from: Pfn) -> Result<Moved, Error>;

    /// Keeps everybody from the pages from `page` on, whose frames failed, if they are still there.
    fn fence(&self, page: Pgoff, frames: PfnRange) -> Result<(), Error>;
}

/// What is wanted of a pool for an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand<'a> {
    pub(super) blocks: Blocks,
    pub(super) zones: &'a [Zone],
    pub(super) private: PrivatePlacement,
    pub(super) placement: Placement,
    pub(super) account: Option<usize>,
    pub(super) promise: Promise,
}

/// Somebody who has folios: an object.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) account: Option<usize>,
    pub(super) promise: Promise,
    /// The parts that it may draw from, in its order, and what each still owes it.
    pub(super) left: Vec<(usize, Blocks)>,
    /// Parts outside of its promise, where folios that hold shared memory alone are put as long as there
    /// is room. All that is promised is in [`Zone::Normal`] then.
    pub(super) opportune: Vec<usize>,
    pub(super) mover: Option<Weak<dyn Mover>>,
    pub(super) placement: Placement,
    /// Where it would like to be: one home in the parts outside of its promise, and one in those of it.
    pub(super) homes: Vec<(usize, Home)>,
    /// What its account is charged for it.
    pub(super) charged_pages: u64,
}

impl Owner {
    /// Whether its folios in a zone are part of its promise.
    pub(super) fn is_promised_in(&self, zone: Zone) -> bool {
        self.opportune.is_empty() || zone == Zone::Normal
    }
}

/// Where a page's folio is at home in a part.
pub(super) fn at_home(homes: &[(usize, Home)], nr: usize, page: Pgoff) -> Option<u64> {
    let (_, home) = homes.iter().find(|(home, _)| *home == nr)?;
    home.start.checked_add(page.get())
}

const SIZES: [FolioSize; 3] = [FolioSize::Huge1G, FolioSize::Huge2M, FolioSize::Base];

impl State {
    /// Promises an object its folios, or says why not.
    pub(super) fn reserve(&mut self, demand: &Demand<'_>) -> Result<usize, Error> {
        let op = Op::CreateObject;
        make_room(&mut self.owners, op)?;
        let (own, opportune) = self.parts_for(demand);
        let mut parts: Vec<_> = own.into_iter().map(|nr| (nr, Blocks::default())).collect();
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
        let mut find = |nr: usize| {
            let PartState { homes, frames, .. } = self.parts.get_mut(nr)?;
            let nr_pages = demand.blocks.pages();
            let clean = homes.find(|at| frames.is_clean(at), nr_pages);
            let home = clean.or_else(|| homes.find(|at| frames.is_whole(at), nr_pages))?;
            Some((nr, home))
        };
        let beside = opportune.iter().find_map(|&nr| find(nr));
        let own = parts.iter().find_map(|&(nr, _)| find(nr));
        let homes = beside.into_iter().chain(own).collect();
        Ok(self.owners.insert(Owner {
            account: demand.account,
            promise: demand.promise,
            left: parts,
            opportune,
            mover: None,
            placement: demand.placement,
            homes,
            charged_pages: nr_pages,
        }))
    }

    /// The parts in which an object is promised folios, in its order, and those beside.
    fn parts_for(&self, demand: &Demand<'_>) -> (Vec<usize>, Vec<usize>) {
        let floats = demand.private == PrivatePlacement::MoveToNormal
            && demand.zones.iter().any(|&zone| zone != Zone::Normal);
        let (mut own, mut opportune) = (Vec::new(), Vec::new());
        for (nr, part) in demand.zones.iter().flat_map(|&zone| self.of_zone(zone)) {
            let parts = match floats && part.zone != Zone::Normal {
                true => &mut opportune,
                false => &mut own,
            };
            // A zone may be named twice.
            if !parts.contains(&nr) {
                parts.push(nr);
            }
        }
        if floats && !demand.zones.contains(&Zone::Normal) {
            own.extend(self.of_zone(Zone::Normal).map(|(nr, _)| nr));
        }
        (own, opportune)
    }

    /// A step towards a free block of 1 GiB, for a promise that could not be made. `None` if there is none to be
    /// had, or if there is not so much memory in all.
    pub(super) fn gather(&mut self, demand: &Demand<'_>) -> Option<Got> {
        let (parts, _) = self.parts_for(demand);
        let can = self.promisable(&parts, FolioSize::Base);
        if demand.promise == Promise::None || can < demand.blocks.pages() {
            return None;
        }
        parts.into_iter().find_map(|nr| self.parts.get_mut(nr)?.gather())
    }

    /// How many folios of a size parts can still promise.
    fn promisable(&self, parts: &[usize], size: FolioSize) -> u64 {
        let parts = parts.iter().filter_map(|&nr| self.parts.get(nr));
        parts.map(|it| it.frames.free().promisable(&it.frames.promised(), size)).sum()
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

    pub(super) fn unpromise(&mut self, left: &[(usize, Blocks)]) {
        for &(nr, blocks) in left {
            if let Some(part) = self.parts.get_mut(nr) {
                part.frames.unpromise(blocks);
            }
        }
    }

    /// The error that says how much is missing.
    fn cannot_promise(&self, parts: &[usize], wanted: Blocks) -> Error {
        let [giant, huge, base] = SIZES.map(|size| self.promisable(parts, size));
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

    pub(super) fn charge(
        &mut self,
        op: Op,
        account: Option<usize>,
        nr_pages: u64,
    ) -> Result<(), Error> {
        match account.and_then(|key| self.accounts.get_mut(key)) {
            Some(account) => account.charge(op, nr_pages),
            None => Ok(()),
        }
    }

    /// Whether so much more could be charged.
    pub(super) fn may_charge(
        &self,
        op: Op,
        account: Option<usize>,
        nr_pages: u64,
    ) -> Result<(), Error> {
        match account.and_then(|key| self.accounts.get(key)) {
            Some(account) => account.may_charge(op, nr_pages),
            None => Ok(()),
        }
    }

    pub(super) fn uncharge(&mut self, account: Option<usize>, nr_pages: u64) {
        if let Some(account) = account.and_then(|key| self.accounts.get_mut(key)) {
            account.uncharge(nr_pages);
        }
    }

    /// Who is to be asked to move an owner's folios.
    pub(super) fn set_mover(&mut self, key: usize, mover: Weak<dyn Mover>) {
        if let Some(owner) = self.owners.get_mut(key) {
            owner.mover = Some(mover);
        }
    }

    /// Who can move the folio that begins at a frame of a part, and the first page of it.
    pub(super) fn mover_of(&self, record: &Record) -> Option<(Arc<dyn Mover>, Pgoff)> {
        let Use::Owned { owner, page } = record.state else { return None };
        let mover = self.owners.get(owner)?.mover.as_ref()?.upgrade()?;
        Some((mover, Pgoff::new(page)))
    }

    /// Ends an owner's promise.
    pub(super) fn leave(&mut self, key: usize) {
        let Some(owner) = self.owners.try_remove(key) else { return };
        if owner.promise == Promise::Kept {
            self.unpromise(&owner.left);
        }
        self.uncharge(owner.account, owner.charged_pages);
        for (nr, home) in owner.homes {
            if let Some(part) = self.parts.get_mut(nr) {
                part.homes.leave(home);
            }
        }
    }
}
