//! Migration: a folio moves to other frames, and nobody but those who count frames notices.

use super::layout::{HidesIfPanicking, Layout};
use super::object::{GuestMemfd, Inner, PlacedPrivate};
use crate::addr::{ByteSize, Pfn, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::{Moved, Mover, PrivatePlacement, Side, Slot, Zone};
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::{GuestMove, GuestRun};
use crate::state::{Frozen, Reader, Visibility, Wait, Wanted, Word, with_reader};

/// What a migration came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Migration {
    /// How much has moved, in whole folios.
    pub moved: ByteSize,
    /// The folios that stayed, and why; not those that were where they should be already.
    pub refused: Vec<(PgoffRange, Error)>,
}

impl GuestMemfd {
    /// Moves the folios that hold any page of the range to a zone. Folios that are in it already stay.
    ///
    /// Each folio moves whole or not at all; pages keep their bytes, their side and their places in views and
    /// in the guest. Checked accesses wait meanwhile, and raw pointers fault, as in a conversion: who
    /// cannot have that has pinned the page. A folio stays if a page of it is pinned or being converted, if
    /// the guest owns a page and its hypervisor does not move such pages, or if a subscriber refuses.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Unsupported`] unless the object was created
    /// [for](crate::GuestMemfdBuilder::zones) that zone, or it is [`Zone::Normal`]. What stands in the way of a folio is in [`Migration::refused`].
    pub fn migrate(&self, range: PgoffRange, to: Zone) -> Result<Migration, Error> {
        let object = &*self.0;
        object.check_range(Op::Migrate, range)?;
        if to != Zone::Normal && !object.zones.contains(&to) {
            return Err(Error::new(Op::Migrate, ErrorKind::Unsupported)
                .because(format!("the object was not created for zone {to}")));
        }
        let mut migration = Migration::default();
        for slot in object.frames.places(range) {
            match object.migrate_folio(&slot, Only::Outside(to), to, &Wait::never()) {
                Ok(Moved::Yes) => {
                    let moved = migration.moved.get() + slot.size().bytes().get();
                    migration.moved = ByteSize::from_bytes(moved);
                }
                Ok(Moved::No) => {}
                Err(error) => migration.refused.push((slot.pages(), error)),
            }
        }
        Ok(migration)
    }
}

impl Mover for Inner {
    fn move_away(&self, page: Pgoff, from: Pfn) -> Result<Moved, Error> {
        let range = PgoffRange::single(page)?;
        self.check_range(Op::Migrate, range)?;
        let zone = self.reservation.zone_of(from).unwrap_or_default();
        let slot = self.frames.shape().slots(range).next();
        slot.map_or(Ok(Moved::No), |slot| {
            self.migrate_folio(&slot, Only::At(from), zone, &Wait::never())
        })
    }

    fn fence(&self, page: Pgoff, frames: PfnRange) -> Result<(), Error> {
        self.quarantine_failed(page, frames)
    }
}

/// Which folio is to move; any other stays.
#[derive(Clone, Copy)]
enum Only {
    At(Pfn),
    Outside(Zone),
}

/// A folio that is to take the place of another. Quarantined should somebody panic before it is known
/// what it holds.
struct Replacement<'a> {
    object: &'a Inner,
    unknown: Option<Pfn>,
}

impl Drop for Replacement<'_> {
    fn drop(&mut self) {
        if let Some(pfn) = self.unknown {
            self.object.reservation.quarantine(pfn);
        }
    }
}

impl Inner {
    /// Whether a folio is to hold shared pages alone.
    pub(super) fn side_of(&self, slot: &Slot) -> Side {
        let is_shared = |(_, word): (_, Word)| word.visibility() == Visibility::Shared;
        match self.private {
            PlacedPrivate::Anywhere => Side::SharedOnly,
            PlacedPrivate::Checked(_) if self.spans(slot.pages()).all(is_shared) => {
                Side::SharedOnly
            }
            PlacedPrivate::Checked(_) => Side::Any,
        }
    }

    /// Sees to it that what is to turn private is where private memory may be. If there is time, pins are
    /// waited for, as the conversion does: here those of the whole folio.
    pub(super) fn place_private(
        &self,
        op: Op,
        ranges: &[PgoffRange],
        wait: &Wait,
    ) -> Result<(), Error> {
        let PlacedPrivate::Checked(placement) = self.private else { return Ok(()) };
        for slot in ranges.iter().flat_map(|&range| self.frames.places(range)) {
            if self.is_placed(&slot) {
                continue;
            }
            if placement == PrivatePlacement::Refuse {
                return Err(misplaced(op).on(slot.pages()));
            }
            self.migrate_folio(&slot, Only::Outside(Zone::Normal), Zone::Normal, wait)
                .map_err(|error| error.of(op))?;
        }
        Ok(())
    }

    /// Whether frozen pages that are to turn private are where private memory may be: between
    /// [`place_private`](Self::place_private) and the freeze they may have been punched and touched.
    pub(super) fn check_placed(&self, op: Op, ranges: &[PgoffRange]) -> Result<(), Error> {
        let PlacedPrivate::Checked(_) = self.private else { return Ok(()) };
        let mut slots = ranges.iter().flat_map(|&range| self.frames.places(range));
        match slots.find(|slot| !self.is_placed(slot)) {
            Some(slot) => Err(misplaced(op).on(slot.pages())),
            None => Ok(()),
        }
    }

    fn is_placed(&self, slot: &Slot) -> bool {
        let zone = self.frames.get(slot).and_then(|pfn| self.reservation.zone_of(pfn));
        zone.is_none_or(|zone| zone == Zone::Normal)
    }

    /// Whether a conversion was refused because a folio is outside of zone normal, which is to move.
    pub(super) fn is_displaced(&self, error: &Error) -> bool {
        let moves = matches!(self.private, PlacedPrivate::Checked(PrivatePlacement::MoveToNormal));
        moves && error.kind() == ErrorKind::Unsupported
    }

    fn migrate_folio(
        &self,
        slot: &Slot,
        only: Only,
        to: Zone,
        wait: &Wait,
    ) -> Result<Moved, Error> {
        let op = Op::Migrate;
        with_reader(|reader| {
            let freeze = || {
                let pages = [slot.pages()];
                let frozen = self.tree.freeze(reader, &pages, Wanted::All, wait);
                frozen.map_err(|stop| self.stopped(op, Some(slot.pages()), stop))
            };
            // Who waits must not have the layout yet. Who does not has it first, so that others can tell.
            let early = if wait.is_never() { None } else { Some(freeze()?) };
            let layout = &mut *self.layout.write();
            let old = self.frames.get(slot).filter(|&old| match only {
                Only::At(pfn) => pfn == old,
                Only::Outside(zone) => self.reservation.zone_of(old) != Some(zone),
            });
            let Some(old) = old else {
                early.into_iter().for_each(Frozen::thaw);
                return Ok(Moved::No);
            };
            // Before the freeze, so that it outlives that and finds out what is quarantined.
            let _hidden = HidesIfPanicking { object: self, layout };
            let mut frozen = early.map_or_else(freeze, Ok)?;
            if to != Zone::Normal && self.side_of(slot) == Side::Any {
                frozen.thaw();
                return Err(misplaced(op).on(slot.pages()));
            }
            let outcome = self.migrate_frozen(reader, layout, &mut frozen, slot, (old, to));
            frozen.thaw();
            outcome.map_err(|error| error.of(op).on(slot.pages()))?;
            Ok(Moved::Yes)
        })
    }

    fn migrate_frozen(
        &self,
        reader: &Reader,
        layout: &Layout,
        frozen: &mut Frozen<'_>,
        slot: &Slot,
        (old, to): (Pfn, Zone),
    ) -> Result<(), Error> {
        let op = Op::Migrate;
        let guest = self.guest_runs(op, layout, &[slot.pages()])?;
        if fails(FailPoint::Barrier) || !frozen.wait_for_sections(reader) {
            return Err(Error::new(op, ErrorKind::MissingCapability).because("membarrier(2)"));
        }
        self.take_back(op, layout, &[slot.pages()])?;
        let outcome = self
            .hide(layout, &[slot.pages()])
            .and_then(|()| self.replace(layout, &guest, slot, (old, to)));
        // Before anybody can pin them, who would rely on finding them there.
        self.show_shared(layout, slot.pages());
        self.grant_again(layout, &[slot.pages()]);
        outcome
    }

    /// Puts another folio in the place of one that no access, subscriber or view reaches any more.
    fn replace(
        &self,
        layout: &Layout,
        guest: &[GuestRun],
        slot: &Slot,
        way: (Pfn, Zone),
    ) -> Result<(), Error> {
        self.check_sound(Op::Migrate, slot.pages(), way.0)?;
        // What goes back to the pool is committed, holes and all.
        self.commit_holes(Op::Migrate, slot.pages())?;
        let outcome = self.replace_committed(layout, guest, slot, way);
        self.release_holes(slot.pages());
        outcome
    }

    fn replace_committed(
        &self,
        layout: &Layout,
        guest: &[GuestRun],
        slot: &Slot,
        (old, to): (Pfn, Zone),
    ) -> Result<(), Error> {
        let op = Op::Migrate;
        if fails(FailPoint::Folio) {
            return Err(Error::new(op, ErrorKind::Exhausted));
        }
        let pages = slot.pages();
        let pfn = self.reservation.take_to(slot.size(), pages.start(), (old, to))?;
        let mut guard = Replacement { object: self, unknown: Some(pfn) };
        // All views first: what may fail with them does so before the hypervisor has moved anything.
        let mut nr_touched = 0;
        let mut views = layout.views.iter().map(|(_, view)| view);
        let installed = views.try_for_each(|view| {
            nr_touched += 1;
            view.install(self, pages, pfn)
        });
        let outcome = installed.and_then(|()| self.move_contents(layout, guest, slot, (old, pfn)));
        guard.unknown = None;
        match outcome {
            Ok(()) => {
                self.frames.replace(slot, pfn);
                self.reservation.moved_out(old, pfn, slot.size());
            }
            Err(_) => {
                let mut stays = false;
                for (_, view) in layout.views.iter().take(nr_touched) {
                    if view.install(self, pages, old).is_err() {
                        // It may map the new one for as long as it lives.
                        view.goes_astray(pages);
                        stays = true;
                    }
                }
                match stays {
                    true => self.reservation.quarantine(pfn),
                    false => self.reservation.moved_out(pfn, old, slot.size()),
                }
            }
        }
        outcome
    }

    fn move_contents(
        &self,
        layout: &Layout,
        guest: &[GuestRun],
        slot: &Slot,
        (old, new): (Pfn, Pfn),
    ) -> Result<(), Error> {
        let op = Op::Migrate;
        let mut copied = None;
        let mut copy = || copied = Some(self.copy_folio(slot, old, new));
        match layout.hypervisor().filter(|_| !guest.is_empty()) {
            None => copy(),
            Some(hypervisor) => {
                let moves = moves(op, guest, old, new)?;
                let refused = |errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno);
                if fails(FailPoint::Hypervisor) {
                    return Err(refused(Errno::ENOMEM));
                }
                hypervisor.migrate(&moves, &mut copy).map_err(refused)?;
            }
        }
        copied.unwrap_or_else(|| {
            Err(Error::new(op, ErrorKind::HypervisorRefused).because("it has moved nothing"))
        })
    }

    fn copy_folio(&self, slot: &Slot, old: Pfn, new: Pfn) -> Result<(), Error> {
        self.frames.resident(slot.pages()).try_for_each(|(_, frames)| {
            let skip = frames.start().get() - old.get();
            let to = new
                .checked_add(skip)
                .ok_or_else(|| Error::new(Op::Migrate, ErrorKind::Overflow))?;
            self.arena.copy_frames(frames, to)
        })
    }
}

/// Where the guest's runs of a folio are to be.
fn moves(op: Op, guest: &[GuestRun], old: Pfn, new: Pfn) -> Result<Vec<GuestMove>, Error> {
    let mut moves = Vec::new();
    if fails(FailPoint::Memory) || moves.try_reserve_exact(guest.len()).is_err() {
        return Err(Error::new(op, ErrorKind::Exhausted));
    }
    for &from in guest {
        let skip = from.pfn.get() - old.get();
        let to = new.checked_add(skip).ok_or_else(|| Error::new(op, ErrorKind::Overflow))?;
        moves.push(GuestMove { from, to });
    }
    Ok(moves)
}

fn misplaced(op: Op) -> Error {
    Error::new(op, ErrorKind::Unsupported)
        .because("its folio is outside of zone normal, and is not to move")
}

#[cfg(test)]
mod tests;
