//! Memory of a guest's: lent, shared, turned from one into the other, taken back.
//!
//! Each is done in rounds over all pieces. A round that fails is taken back, and with it those before.

use super::Guest;
use super::calls::{Resources, frames};
use super::given::{Given, Side};
use super::pieces::{self, Piece, pieces};
use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::hyp::gunyah::aspace::{Purpose, Purse};
use crate::hyp::gunyah::rm::ADDRESS_LIMIT;
use crate::hyp::gunyah::{Gunyah, World};
use crate::stage2::GuestRun;

/// Guest frame numbers that a guest has.
const GFN_LIMIT: Gfn = Gfn::new(1 << (48 - 12));

/// What becomes of the bytes of memory that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Contents {
    /// They stay: the guest has asked for this.
    Keep,
    /// Those that the guest had for itself are zeroes before anybody sees them.
    Clear,
}

/// One step, and its way back.
type Step = fn(&mut Resources, &mut World, Piece) -> Result<(), Errno>;

/// A round: what is done to each piece, and how that is taken back.
#[derive(Clone, Copy)]
struct Round {
    act: Step,
    undo: Step,
}

const LEND: Round = Round { act: give_lent, undo: take_lent };
const SHARE: Round = Round {
    act: |resources, world, piece| resources.give(world, piece, Side::Shared),
    undo: |resources, world, piece| resources.take(world, piece, Side::Shared),
};
const MAP_LENT: Round = Round {
    act: |resources, world, piece| resources.map(world, piece, Side::Lent),
    undo: |resources, world, piece| resources.unmap(world, piece, Side::Lent),
};
const MAP_SHARED: Round = Round {
    act: |resources, world, piece| resources.map(world, piece, Side::Shared),
    undo: |resources, world, piece| resources.unmap(world, piece, Side::Shared),
};
/// What is shared turns into what is lent.
const TURN_LENT: Round = Round { act: shared_to_lent, undo: lent_to_shared };
const TURN_SHARED: Round = TURN_LENT.reversed();
/// Lent memory comes back, cleared. What was in it no undoing brings back.
const TAKE_CLEARED: Round = Round {
    act: |resources, world, piece| {
        resources.zero(world, piece)?;
        take_lent(resources, world, piece)
    },
    undo: give_lent,
};

impl Round {
    const fn reversed(self) -> Self {
        Self { act: self.undo, undo: self.act }
    }
}

/// The host's user space must have nothing of it, and its kernel loses it.
fn give_lent(resources: &mut Resources, world: &mut World, piece: Piece) -> Result<(), Errno> {
    let frames = frames(piece)?;
    world.kernel.check_unused(frames)?;
    resources.give(world, piece, Side::Lent)?;
    world.kernel.hide(frames);
    Ok(())
}

fn take_lent(resources: &mut Resources, world: &mut World, piece: Piece) -> Result<(), Errno> {
    resources.take(world, piece, Side::Lent)?;
    world.kernel.show(frames(piece)?);
    Ok(())
}

fn shared_to_lent(resources: &mut Resources, world: &mut World, piece: Piece) -> Result<(), Errno> {
    let frames = frames(piece)?;
    world.kernel.check_unused(frames)?;
    resources.turn(world, piece, Side::Lent)?;
    world.kernel.hide(frames);
    Ok(())
}

fn lent_to_shared(resources: &mut Resources, world: &mut World, piece: Piece) -> Result<(), Errno> {
    resources.turn(world, piece, Side::Shared)?;
    world.kernel.show(frames(piece)?);
    Ok(())
}

/// Rounds over the same pieces, with frames for tables that are their own.
struct Rounds<'a> {
    gunyah: &'a Gunyah,
    resources: &'a mut Resources,
    parts: &'a [Given],
    purse: Option<Purse>,
}

impl<'a> Rounds<'a> {
    /// # Errors
    /// `ENOMEM`.
    fn new(
        gunyah: &'a Gunyah,
        resources: &'a mut Resources,
        parts: &'a [Given],
        purpose: Purpose,
    ) -> Result<Self, Errno> {
        let purse = fill(gunyah, parts, purpose)?;
        Ok(Self { gunyah, resources, parts, purse: Some(purse) })
    }

    /// Does something to each piece, or to none.
    fn run(&mut self, round: Round) -> Result<(), Errno> {
        for (nth, piece) in pieces(self.parts).enumerate() {
            if let Err(errno) = self.step(round.act, piece) {
                self.undo(round, nth);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Takes back what was done to the first pieces.
    fn undo(&mut self, round: Round, nr: usize) {
        for piece in pieces(self.parts).take(nr) {
            let undone = self.step(round.undo, piece);
            self.gunyah.with(|world| world.hyp.note(undone));
        }
    }

    /// Takes a whole round back.
    fn undo_all(&mut self, round: Round) {
        self.undo(round, usize::MAX);
    }

    fn step(&mut self, step: Step, piece: Piece) -> Result<(), Errno> {
        let Some(purse) = &self.purse else { return Err(Errno::EIO) };
        let resources = &mut *self.resources;
        self.gunyah.step(purse, |world| step(resources, world, piece))
    }
}

impl Drop for Rounds<'_> {
    fn drop(&mut self) {
        if let Some(purse) = self.purse.take() {
            self.gunyah.with(|world| world.hyp.heap.empty(purse));
        }
    }
}

/// Frames for all tables that parts may need.
fn fill(gunyah: &Gunyah, parts: &[Given], purpose: Purpose) -> Result<Purse, Errno> {
    let nr_tables = pieces::nr_tables(parts);
    Ok(gunyah.with(|world| world.hyp.heap.fill(nr_tables, purpose))?)
}

fn round_of_map(side: Side) -> Round {
    match side {
        Side::Lent => MAP_LENT,
        Side::Shared => MAP_SHARED,
    }
}

impl Guest {
    /// What the guest has at an address, or that it has nothing; and for how many pages, at most so many.
    pub(crate) fn given(&self, gfn: Gfn, most: u64) -> (Option<Given>, u64) {
        self.book.at(gfn, most)
    }

    /// All that it has, by address.
    pub(crate) fn all_given(&self) -> impl Iterator<Item = Given> {
        self.book.iter()
    }

    /// Gives the guest memory where it has none. `prepare` is called when nothing can fail any more, before the
    /// guest reaches it; it may write to the frames. What is lent the host has lost by then.
    ///
    /// # Errors
    /// `EINVAL` for runs of nothing, or that name a page twice; `EAGAIN` if the guest has one of the addresses; `ENOMEM`;
    /// `EPERM` to lend what user space has mapped or pinned; the hypervisor's, above all `EINVAL` for what is not the
    /// host's. Nothing has changed then.
    pub(crate) fn provide(
        &mut self,
        runs: &[GuestRun],
        side: Side,
        writes: bool,
        prepare: &mut dyn FnMut(),
    ) -> Result<(), Errno> {
        pieces::check(runs, GFN_LIMIT, ADDRESS_LIMIT)?;
        if runs.iter().any(|&run| self.book.has_any(run)) {
            // EEXIST inside; whoever faulted tries again, and finds it.
            return Err(Errno::EAGAIN);
        }
        let mut parts = Vec::new();
        parts.try_reserve_exact(runs.len()).map_err(|_| Errno::ENOMEM)?;
        parts.extend(runs.iter().map(|&run| Given { run, side, writes }));
        let give = if side == Side::Lent { LEND } else { SHARE };
        {
            let mut rounds = Rounds::new(&self.gunyah, &mut self.resources, &parts, Purpose::Give)?;
            rounds.run(give)?;
            prepare();
            let mapped = rounds.run(round_of_map(side));
            mapped.inspect_err(|_| rounds.undo_all(give))?;
        }
        parts.into_iter().for_each(|given| self.book.insert(given));
        Ok(())
    }

    /// Turns what the guest has from one side to the other, contents preserved. `prepare` is called when nothing can fail
    /// any more, while neither side reaches what it did not before, and the guest none of it.
    ///
    /// # Errors
    /// `EINVAL` as for [`Self::provide`]; `EAGAIN` unless the guest has exactly this, all of it on the other side;
    /// `ENOMEM`; `EPERM` to lend what user space has mapped or pinned. Nothing has changed then.
    pub(crate) fn turn(
        &mut self,
        runs: &[GuestRun],
        to: Side,
        prepare: &mut dyn FnMut(),
    ) -> Result<(), Errno> {
        let parts = self.turnable(runs, to)?;
        let purse = fill(&self.gunyah, &parts, Purpose::Give)?;
        self.turn_parts(parts, to, prepare, purse)
    }

    /// Turns some of what is to be lent, which the guest has with the host, and provides the rest: both or neither.
    ///
    /// # Errors
    /// As for [`Self::turn`] and [`Self::provide`].
    pub(crate) fn lend_all(
        &mut self,
        turning: &[GuestRun],
        absent: &[GuestRun],
        prepare: &mut dyn FnMut(),
    ) -> Result<(), Errno> {
        let parts = self.turnable(turning, Side::Lent)?;
        // For the way back, which cannot fail then.
        let spare = fill(&self.gunyah, &parts, Purpose::Give)?;
        let turned = self.turn(turning, Side::Lent, &mut || ());
        // What is turned the guest could reach before, so it may be prepared together with the rest.
        let provided = turned.map(|()| self.provide(absent, Side::Lent, true, prepare));
        match provided {
            Ok(Err(errno)) => {
                let back = parts.into_iter().map(|given| Given { side: Side::Lent, ..given });
                let undone = self.turn_parts(back.collect(), Side::Shared, &mut || (), spare);
                debug_assert_eq!(undone, Ok(()), "what was turned can be turned back");
                Err(errno)
            }
            Ok(Ok(())) => {
                self.gunyah.with(|world| world.hyp.heap.empty(spare));
                Ok(())
            }
            Err(errno) => {
                self.gunyah.with(|world| world.hyp.heap.empty(spare));
                Err(errno)
            }
        }
    }

    /// What the guest has of runs, if that is all of it and on the other side.
    fn turnable(&self, runs: &[GuestRun], to: Side) -> Result<Vec<Given>, Errno> {
        pieces::check(runs, GFN_LIMIT, ADDRESS_LIMIT)?;
        let parts = self.book.within(runs)?;
        let nr_has: u64 = parts.iter().map(|given| given.run.nr_pages).sum();
        let nr_wanted: u64 = runs.iter().map(|run| run.nr_pages).sum();
        if nr_has < nr_wanted || parts.iter().any(|given| given.side == to) {
            return Err(Errno::EAGAIN);
        }
        Ok(parts)
    }

    fn turn_parts(
        &mut self,
        parts: Vec<Given>,
        to: Side,
        prepare: &mut dyn FnMut(),
        purse: Purse,
    ) -> Result<(), Errno> {
        let (from, turn) = match to {
            Side::Lent => (Side::Shared, TURN_LENT),
            Side::Shared => (Side::Lent, TURN_SHARED),
        };
        let unmap = round_of_map(from).reversed();
        {
            let (gunyah, resources) = (&*self.gunyah, &mut self.resources);
            let mut rounds = Rounds { gunyah, resources, parts: &parts, purse: Some(purse) };
            rounds.run(unmap)?;
            if to == Side::Shared {
                prepare();
            }
            rounds.run(turn).inspect_err(|_| rounds.undo_all(unmap))?;
            if to == Side::Lent {
                prepare();
            }
            rounds.run(round_of_map(to)).inspect_err(|_| {
                rounds.undo_all(turn);
                rounds.undo_all(unmap);
            })?;
        }
        for given in parts {
            self.book.remove(given.run);
            self.book.insert(Given { side: to, ..given });
        }
        Ok(())
    }

    /// Takes memory back from the guest, as far as it has any there.
    ///
    /// # Errors
    /// `EINVAL` as for [`Self::provide`]; `EAGAIN` if the guest has other frames there; `ENOMEM`. Nothing has changed
    /// then, but for bytes that were cleared before memory turned out to be broken.
    pub(crate) fn reclaim(&mut self, runs: &[GuestRun], contents: Contents) -> Result<(), Errno> {
        pieces::check(runs, GFN_LIMIT, ADDRESS_LIMIT)?;
        let mut lent = self.book.within(runs)?;
        if lent.is_empty() {
            return Ok(());
        }
        let nr_lent = partition(&mut lent);
        let shared = lent.split_off(nr_lent);
        self.take_back(&lent, &shared, contents)?;
        lent.iter().chain(&shared).for_each(|given| self.book.remove(given.run));
        Ok(())
    }

    /// Takes as much back as can be, cleared, and forgets of the rest that the guest had it: memory that cannot be cleared is
    /// nobody's from then on.
    ///
    /// # Errors
    /// The first refusal.
    pub(crate) fn reclaim_or_forsake(&mut self, runs: &[GuestRun]) -> Result<(), Errno> {
        if self.reclaim(runs, Contents::Clear).is_ok() {
            return Ok(());
        }
        let mut outcome = Ok(());
        for run in runs {
            for nth in 0..run.nr_pages {
                let page = GuestRun {
                    gfn: run.gfn.checked_add(nth).ok_or(Errno::EINVAL)?,
                    pfn: run.pfn.checked_add(nth).ok_or(Errno::EINVAL)?,
                    nr_pages: 1,
                };
                if let Err(errno) = self.reclaim(&[page], Contents::Clear) {
                    self.book.remove(page);
                    outcome = outcome.and(Err(errno));
                }
            }
        }
        outcome
    }

    fn take_back(
        &mut self,
        lent: &[Given],
        shared: &[Given],
        contents: Contents,
    ) -> Result<(), Errno> {
        let take_lent = match contents {
            Contents::Keep => LEND.reversed(),
            Contents::Clear => TAKE_CLEARED,
        };
        // What cannot be brought back comes last.
        let mut of_shared =
            Rounds::new(&self.gunyah, &mut self.resources, shared, Purpose::TakeBack)?;
        of_shared.run(MAP_SHARED.reversed())?;
        let taken = of_shared.run(SHARE.reversed());
        taken.inspect_err(|_| of_shared.undo_all(MAP_SHARED.reversed()))?;
        let taken = rounds_of_lent(&self.gunyah, of_shared.resources, lent, take_lent);
        taken.inspect_err(|_| {
            of_shared.undo_all(SHARE.reversed());
            of_shared.undo_all(MAP_SHARED.reversed());
        })
    }
}

fn rounds_of_lent(
    gunyah: &Gunyah,
    resources: &mut Resources,
    lent: &[Given],
    take: Round,
) -> Result<(), Errno> {
    let mut rounds = Rounds::new(gunyah, resources, lent, Purpose::TakeBack)?;
    rounds.run(MAP_LENT.reversed())?;
    rounds.run(take).inspect_err(|_| rounds.undo_all(MAP_LENT.reversed()))
}

/// Sorts what is lent to the front, and counts it.
fn partition(parts: &mut [Given]) -> usize {
    parts.sort_by_key(|given| given.side == Side::Shared);
    parts.partition_point(|given| given.side == Side::Lent)
}

/// What a guest was given, and the hypervisor does not have so.
impl Guest {
    pub(crate) fn check(&self) -> Vec<String> {
        let world = self.gunyah.world.read();
        let vm = self.vmid.and_then(|vmid| world.rm.vms.get(&vmid));
        let Some((home, paging)) = vm.and_then(|vm| vm.home.zip(vm.paging)) else {
            return match self.book.iter().next() {
                None => Vec::new(),
                Some(given) => vec![format!("{:?} is gone, and has {given:?}", self.vmid)],
            };
        };
        let mut wrong = Vec::new();
        let mut nr_lent_and_shared = [0; 2];
        for given in self.book.iter() {
            let (extent, nr) = match given.side {
                Side::Lent => (paging.private, &mut nr_lent_and_shared[0]),
                Side::Shared => (paging.shared, &mut nr_lent_and_shared[1]),
            };
            *nr += given.run.nr_pages;
            let at = given.run.gfn.ipa().get();
            let size = crate::addr::ByteSize::from_pages(given.run.nr_pages).get();
            let mut nr_done = 0;
            while nr_done < size {
                match world.hyp.lookup(home.aspace, extent, at + nr_done, size - nr_done) {
                    Ok((offset, size, _)) if offset == given.run.pfn.pa().get() + nr_done => {
                        nr_done += size;
                    }
                    found => {
                        wrong.push(format!("{given:?} is {found:?} from {nr_done:#x} on"));
                        break;
                    }
                }
            }
        }
        let limit = crate::range::PfnRange::new(Pfn::new(0), ADDRESS_LIMIT.get());
        let has = |id| -> u64 {
            let owner = crate::hyp::gunyah::memdb::Owner::Extent(id);
            let pieces = limit.as_ref().map(|&all| world.hyp.memdb.walk(all, owner));
            pieces.unwrap_or_default().iter().map(crate::range::PfnRange::nr_pages).sum()
        };
        let found = [paging.private, paging.shared].map(has);
        if found != nr_lent_and_shared {
            wrong.push(format!(
                "{:?} has {found:?}, and was given {nr_lent_and_shared:?}",
                self.vmid
            ));
        }
        wrong
    }
}
