//! Where memory goes back: hole punching.

use std::fmt;

use super::layout::{HidesIfPanicking, Layout};
use super::object::{GuestMemfd, Inner};
use crate::addr::{ByteSize, Pgoff};
use crate::backing::WhyKept;
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::Slot;
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::GuestRun;
use crate::state::{Frozen, Reader, Wait, Wanted, with_reader};

/// What a hole punch did. Pages without memory count nowhere: they had no folio, or were holes already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Punched {
    returned: ByteSize,
    released: ByteSize,
    kept: ByteSize,
    why_kept: Option<WhyKept>,
}

impl Punched {
    /// Whole folios that went back to the pool, with all of their pages.
    pub fn returned(&self) -> ByteSize {
        self.returned
    }

    /// Pages that went back to the host, out of folios that stay.
    pub fn released(&self) -> ByteSize {
        self.released
    }

    /// Pages that were zeroed and whose memory stays, because the backing cannot give it back.
    pub fn kept(&self) -> ByteSize {
        self.kept
    }

    /// Why memory was kept; `None` if none was.
    pub fn why_kept(&self) -> Option<WhyKept> {
        self.why_kept
    }
}

/// As in `2097152 bytes to the pool, 0 to the host, 4096 kept: the pool is on the heap`.
impl fmt::Display for Punched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { returned, released, kept, why_kept } = self;
        let [returned, released, kept] = [returned, released, kept].map(|size| size.get());
        write!(f, "{returned} bytes to the pool, {released} to the host, {kept} kept")?;
        match why_kept {
            Some(why) => write!(f, ": {why}"),
            None => Ok(()),
        }
    }
}

fn add(sum: &mut ByteSize, pages: PgoffRange) {
    *sum = ByteSize::from_bytes(sum.get() + pages.len_bytes().get());
}

impl GuestMemfd {
    /// Forgets the contents of the range, as `fallocate(FALLOC_FL_PUNCH_HOLE)` does: it reads as
    /// zeroes from then on and its visibility is as before. Says where the memory went.
    ///
    /// A folio goes back to the pool with its last page, whole, and stays reserved for this object. Until
    /// then it stays whole, and what was punched of it is holes: their memory goes back to the host where
    /// the backing can do that (a memory file of 4 KiB pages), and else it is zeroed and kept. A folio that
    /// is nothing but holes stays as well while one of them is pinned or being converted, or if the host
    /// does not give back what the pool must have; the next punch of any of its pages tries again.
    ///
    /// What lies past the end is ignored. In a host view a hole answers with `SIGBUS` until something is
    /// written or [allocated](Self::allocate) there. (On hugetlb, where a view goes by 2 MiB, so does the
    /// rest of its folio.)
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a page is pinned, with the first culprit;
    /// [`ErrorKind::HypervisorRefused`] if the guest owns a page and lives;
    /// [`ErrorKind::SubscriberRefused`];
    /// [`ErrorKind::Quarantined`]; [`ErrorKind::Exhausted`], [`ErrorKind::Os`] or
    /// [`ErrorKind::MissingCapability`] as with [`convert`](Self::convert). Nothing is changed then.
    pub fn punch_hole(&self, range: PgoffRange) -> Result<Punched, Error> {
        let op = Op::PunchHole;
        let object = &*self.0;
        let Some(range) = object.pages.intersection(&range) else { return Ok(Punched::default()) };
        let layout = &mut *object.layout.write();
        object.fence_rest(layout);
        object.make_room_for_holes(range).map_err(|error| error.of(op).on(range))?;
        with_reader(|reader| {
            // Before the freeze, so that it outlives that and finds out what is quarantined.
            let _hidden = HidesIfPanicking { object, layout };
            let (mut frozen, reach) = object.freeze_to_punch(reader, range)?;
            let outcome = object.punch_frozen(reader, layout, &mut frozen, range, reach);
            frozen.thaw();
            outcome.map_err(|error| error.on(range))
        })
    }
}

/// What becomes of a folio that nobody needs any more.
enum Whole {
    Returned,
    Stays,
}

impl Inner {
    /// What may fail for want of memory fails before anything has happened.
    fn make_room_for_holes(&self, range: PgoffRange) -> Result<(), Error> {
        // The largest folios come first.
        let first = self.frames.shape().slots(range).next();
        if first.is_none_or(|slot| slot.size() == FolioSize::Base) {
            return Ok(());
        }
        if fails(FailPoint::Memory) {
            return Err(Error::new(Op::PunchHole, ErrorKind::Exhausted));
        }
        self.frames.make_room_for_holes()
    }

    /// Freezes the range, and with it whatever else is left of the folios at its two ends if that is all
    /// holes: then they can go back whole. Somebody who is at one of these keeps that folio where it is.
    fn freeze_to_punch(
        &self,
        reader: &Reader,
        range: PgoffRange,
    ) -> Result<(Frozen<'_>, PgoffRange), Error> {
        let mut reach = self.with_holes_around(range);
        loop {
            let stop = match self.tree.freeze(reader, &[reach], Wanted::All, &Wait::never()) {
                Ok(frozen) => return Ok((frozen, reach)),
                Err(stop) if reach == range => {
                    return Err(self.stopped(Op::PunchHole, Some(range), stop));
                }
                Err(stop) => stop,
            };
            let less = match stop.page() {
                Some(page) if page < range.start() => between(range.start(), reach.end()),
                Some(page) if page >= range.end() => between(reach.start(), range.end()),
                _ => None,
            };
            reach = less.unwrap_or(range);
        }
    }

    fn with_holes_around(&self, range: PgoffRange) -> PgoffRange {
        let mut reach = range;
        let ends = [range.start(), Pgoff::new(range.end().get().saturating_sub(1))];
        for slot in ends.into_iter().filter_map(|page| self.frames.shape().slot(page)) {
            let pages = slot.pages();
            let outside =
                [between(pages.start(), range.start()), between(range.end(), pages.end())];
            if outside.iter().flatten().all(|&rest| self.frames.is_hollow(rest)) {
                reach = reach.hull_if_joined(&pages).unwrap_or(reach);
            }
        }
        reach
    }

    fn punch_frozen(
        &self,
        reader: &Reader,
        layout: &Layout,
        frozen: &mut Frozen<'_>,
        range: PgoffRange,
        reach: PgoffRange,
    ) -> Result<Punched, Error> {
        let op = Op::PunchHole;
        let guest = self.guest_runs(op, layout, &[range])?;
        if fails(FailPoint::Barrier) || !frozen.wait_for_sections(reader) {
            return Err(Error::new(op, ErrorKind::MissingCapability).because("membarrier(2)"));
        }
        self.take_back(op, layout, &[range])?;
        let outcome = self.punch_revoked(op, layout, &guest, range, reach);
        // Before the thaw, as a conversion does: who pins them then relies on finding them there. What is a hole
        // now is not given.
        self.show_shared(layout, range);
        self.grant_again(layout, &[range]);
        outcome
    }

    /// Punches what no access and no subscriber reaches any more.
    fn punch_revoked(
        &self,
        op: Op,
        layout: &Layout,
        guest: &[GuestRun],
        range: PgoffRange,
        reach: PgoffRange,
    ) -> Result<Punched, Error> {
        self.hide(layout, &[range])?;
        if let Some(hypervisor) = layout.hypervisor() {
            hypervisor
                .reclaim(guest)
                .map_err(|errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno))?;
            hypervisor.invalidate_range(guest);
        }
        // Nothing fails from here on but for an arena that lost its memory.
        let mut punched = Punched::default();
        for slot in self.frames.places(range) {
            let whole = match reach.covers(&slot.pages()) {
                true => self.return_whole(layout, &slot, &mut punched),
                false => Whole::Stays,
            };
            if let (Whole::Stays, Some(part)) = (whole, slot.pages().intersection(&range)) {
                self.punch_part(&slot, part, &mut punched)?;
            }
        }
        Ok(punched)
    }

    /// Gives a folio back to the pool, all of whose memory is committed; so it is tried for the holes first.
    fn return_whole(&self, layout: &Layout, slot: &Slot, punched: &mut Punched) -> Whole {
        let Some(pfn) = self.frames.get(slot) else { return Whole::Stays };
        if self.commit_holes(Op::PunchHole, slot.pages()).is_err() {
            return Whole::Stays;
        }
        for (_, view) in &layout.views {
            // Should the kernel have no room for another mapping, the hidden one stays: it
            // faults as well, and the next folio to come here replaces it.
            let _ = view.remove(self, slot.pages());
        }
        self.frames.set(slot, None);
        self.reservation.give_back(pfn, slot.size());
        add(&mut punched.returned, slot.pages());
        Whole::Returned
    }

    /// Makes pages of a folio that stays holes.
    fn punch_part(
        &self,
        slot: &Slot,
        part: PgoffRange,
        punched: &mut Punched,
    ) -> Result<(), Error> {
        for (pages, frames) in self.frames.resident(part) {
            let released = self.arena.release(frames);
            if let Err(why) = released {
                self.arena.zero(frames)?;
                add(&mut punched.kept, pages);
                punched.why_kept = Some(why);
            } else {
                add(&mut punched.released, pages);
            }
            // What the host refused is memory that reads as zeroes, as before: a hole of this arena has none.
            if !matches!(released, Err(WhyKept::Refused(_))) {
                self.frames.punch(slot, pages);
            }
        }
        Ok(())
    }

    /// Has memory for all holes of the range, which stay holes.
    pub(super) fn commit_holes(&self, op: Op, range: PgoffRange) -> Result<(), Error> {
        if !self.frames.has_had_holes() {
            return Ok(());
        }
        self.arena.commit(op, self.frames.holes(range).map(|(_, frames)| frames))
    }

    /// Gives back what was committed of holes. What the host does not take is a hole no more.
    pub(super) fn release_holes(&self, range: PgoffRange) {
        for (pages, frames) in self.frames.holes(range) {
            if let Err(WhyKept::Refused(_)) = self.arena.release(frames) {
                self.frames.fill(pages);
            }
        }
    }

    /// Fills what the range has of resident memory with zeroes.
    pub(super) fn zero_resident(&self, range: PgoffRange) -> Result<(), Error> {
        self.frames
            .resident(range)
            .try_for_each(|(_, frames): (_, PfnRange)| self.arena.zero(frames))
    }
}

/// The pages from `start` up to `end`, if there are any.
pub(super) fn between(start: Pgoff, end: Pgoff) -> Option<PgoffRange> {
    PgoffRange::new(start, end.get().checked_sub(start.get())?).ok()
}
