//! Where folios come and go by the VMM's wish: `fallocate` and its hole punching.

use super::layout::Layout;
use super::object::{GuestMemfd, Inner};
use crate::error::{Error, ErrorKind, Op};
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::GuestRun;
use crate::state::{Frozen, Reader, Wait, Wanted, with_reader};

impl GuestMemfd {
    /// Gives every page of the range a folio, as `fallocate(FALLOC_FL_KEEP_SIZE)` does. Cannot fail
    /// for want of frames: they were reserved when the object was created.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Exhausted`] or [`ErrorKind::Os`] if the host has no
    /// room for the mappings of a view. Nothing is allocated then.
    pub fn allocate(&self, range: PgoffRange) -> Result<(), Error> {
        self.0.check_range(Op::Allocate, range)?;
        self.0.populate(Op::Allocate, &mut self.0.layout.write(), range)
    }

    /// Forgets the contents of the range, as `fallocate(FALLOC_FL_PUNCH_HOLE)` does: it reads as
    /// zeroes from then on, its visibility is as before, and folios that lie in it whole go back to
    /// the pool, where they stay reserved for this object. A folio that is punched in part keeps
    /// its memory.
    ///
    /// What lies past the end is ignored. In a host view a folio that went back answers with
    /// `SIGBUS` until something is written or [allocated](Self::allocate) there.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a page is pinned, with the first culprit;
    /// [`ErrorKind::HypervisorRefused`] if the guest owns a page and lives;
    /// [`ErrorKind::SubscriberRefused`];
    /// [`ErrorKind::Quarantined`]; [`ErrorKind::Exhausted`], [`ErrorKind::Os`] or
    /// [`ErrorKind::MissingCapability`] as with [`convert`](Self::convert). Nothing is changed then.
    pub fn punch_hole(&self, range: PgoffRange) -> Result<(), Error> {
        let object = &*self.0;
        let Some(range) = object.pages.intersection(&range) else { return Ok(()) };
        let layout = &mut *object.layout.write();
        with_reader(|reader| {
            let mut frozen = object
                .tree
                .freeze(reader, &[range], Wanted::All, &Wait::never())
                .map_err(|stop| object.stopped(Op::PunchHole, Some(range), stop))?;
            let outcome = object.punch_frozen(reader, layout, &mut frozen, range);
            // Conversions need the lock to go on, so nothing turns private between the two.
            frozen.thaw();
            object.show_shared(layout, range);
            outcome.map_err(|error| error.on(range))
        })
    }
}

impl Inner {
    fn punch_frozen(
        &self,
        reader: &Reader,
        layout: &Layout,
        frozen: &mut Frozen<'_>,
        range: PgoffRange,
    ) -> Result<(), Error> {
        let op = Op::PunchHole;
        let guest = self.guest_runs(op, layout, &[range])?;
        if !frozen.wait_for_sections(reader) {
            return Err(Error::new(op, ErrorKind::MissingCapability).because("membarrier(2)"));
        }
        let shared = match layout.subscribers.is_empty() {
            true => Vec::new(),
            false => self.shared_runs(op, range)?,
        };
        self.revoke_from_subscribers(op, layout, &shared)?;
        let outcome = self.punch_revoked(op, layout, &guest, range);
        // Before the thaw, as a conversion does.
        self.grant_to_subscribers(layout, &shared);
        outcome
    }

    /// Punches what no access and no subscriber reaches any more.
    fn punch_revoked(
        &self,
        op: Op,
        layout: &Layout,
        guest: &[GuestRun],
        range: PgoffRange,
    ) -> Result<(), Error> {
        self.hide(layout, range)?;
        if let Some(hypervisor) = layout.hypervisor() {
            hypervisor
                .reclaim(guest)
                .map_err(|errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno))?;
            hypervisor.invalidate_range(guest);
        }
        // Nothing fails from here on but for an arena that lost its memory.
        let shape = self.frames.shape();
        for slot in shape.slots(range).filter(|slot| range.covers(&slot.pages())) {
            let Some(pfn) = self.frames.get(&slot) else { continue };
            for (_, view) in &layout.views {
                // Should the kernel have no room for another mapping, the hidden one stays: it
                // faults as well, and the next folio to come here replaces it.
                let _ = view.remove(self, slot.pages());
            }
            self.frames.set(&slot, None);
            self.reservation.give_back(pfn, slot.size());
        }
        // What is left of the range lies in folios that are punched in part.
        self.zero_resident(range)
    }

    /// Fills what the range has of resident memory with zeroes.
    pub(super) fn zero_resident(&self, range: PgoffRange) -> Result<(), Error> {
        self.frames
            .resident(range)
            .try_for_each(|(_, frames): (_, PfnRange)| self.arena.zero(frames))
    }
}
