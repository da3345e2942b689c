//! Memory that failed under an object: what the kernel says by a `SIGBUS` of the kinds `BUS_MCEERR_AO` and
//! `BUS_MCEERR_AR`.

use super::layout::{HidesIfPanicking, Layout};
use super::object::{GuestMemfd, Inner, runs};
use crate::addr::{Offset, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Found, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::Behind;
use crate::range::{PfnRange, PgoffRange};
use crate::state::{Phase, Reader, Wait, Wanted, with_reader};

impl GuestMemfd {
    /// Keeps a page out of use for good, because the memory behind it failed: the page of a byte of the object,
    /// as [`HostFault::offset`](crate::HostFault::offset) has it.
    ///
    /// The page is quarantined: every access gets [`ErrorKind::Quarantined`], views fault there, and
    /// nobody reads, zeroes or moves its frame any more. Who has it pinned keeps it, also in views, until he lets go; views fault there
    /// from the next report, hole punch or conversion that fails on. Its folio stays where it is. When that goes back, the
    /// rest of it is used again, and the frame never is: it is [poisoned](crate::PoolStat::poisoned). On hugetlb
    /// all of that is said of the whole huge page, because the kernel gives up no less. A
    /// guest that has the page for its own learns of the failure from its hypervisor.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotFound`] if there is no memory behind the page;
    /// [`ErrorKind::Exhausted`] without host memory to remember it. [`ErrorKind::Busy`] if somebody converts the
    /// page, or waits to: that conversion fails before it touches the frame, and the page is quarantined then. Until it
    /// does, accesses go on. [`ErrorKind::SubscriberRefused`], [`ErrorKind::MissingCapability`] and
    /// [`ErrorKind::Os`] say that somebody can still reach the page: its frame is poisoned all the same, and
    /// another call quarantines the page.
    pub fn report_memory_failure(&self, at: Offset) -> Result<(), Error> {
        let out_of_range = |_| Error::new(Op::Poison, ErrorKind::OutOfRange);
        let page = PgoffRange::single(at.pgoff()).map_err(out_of_range)?;
        self.0.check_range(Op::Poison, page)?;
        let behind = self.0.frames.parts(page).next().map(|(_, behind)| behind);
        let frames = match behind {
            Some(Behind::Frames(frames)) => Some(frames),
            Some(Behind::Holes(frames)) => self.0.arena.why_kept(frames).map(|_| frames),
            Some(Behind::Nothing) | None => None,
        };
        let absent = || Error::new(Op::Poison, ErrorKind::NotFound).on(page);
        self.pool().report_memory_failure(frames.ok_or_else(absent)?.start())
    }
}

impl Inner {
    /// Quarantines pages of one folio whose frames failed, if they have moved nowhere else meanwhile.
    pub(super) fn quarantine_failed(&self, page: Pgoff, frames: PfnRange) -> Result<(), Error> {
        let op = Op::Poison;
        let pages = PgoffRange::new(page, frames.nr_pages())?;
        self.check_range(op, pages)?;
        let layout = &mut *self.layout.write();
        self.fence_rest(layout);
        let failed = Failed { pages, frames };
        let exhausted = |_| Error::new(op, ErrorKind::Exhausted).on(pages);
        layout.failed.try_reserve(1).map_err(exhausted)?;
        let (rest, outcome) = match self.fence(layout, failed) {
            Ok(rest) => (rest, Ok(())),
            // The conversion that is at the pages will see that they failed, before it touches them.
            Err(error) if error.kind() == ErrorKind::Busy => (Rest::Some, Err(error)),
            Err(error) => (Rest::None, Err(error)),
        };
        if rest == Rest::Some && !layout.failed.contains(&failed) {
            layout.failed.push(failed);
        }
        outcome
    }

    /// Goes on with what failed before and could not be taken from everybody then.
    pub(super) fn fence_rest(&self, layout: &mut Layout) {
        if layout.failed.is_empty() {
            return;
        }
        // One by one, so that none is forgotten if somebody panics.
        let mut next = 0;
        while let Some(&failed) = layout.failed.get(next) {
            match self.fence(layout, failed) {
                Ok(Rest::None) => drop(layout.failed.swap_remove(next)),
                _ => next += 1,
            }
        }
    }

    /// The same for a conversion that has come upon something.
    pub(super) fn fence_rest_of_failed(&self) {
        let is_done = self.layout.read().failed.is_empty();
        if !is_done {
            self.fence_rest(&mut self.layout.write());
        }
    }

    /// Refuses frozen pages that failed when somebody was about to convert them.
    pub(super) fn check_not_failed(
        &self,
        op: Op,
        layout: &Layout,
        runs: &[PgoffRange],
    ) -> Result<(), Error> {
        let failed = layout
            .failed
            .iter()
            .flat_map(|failed| runs.iter().filter_map(|run| failed.pages.intersection(run)));
        match failed.min_by_key(PgoffRange::start) {
            Some(pages) => Err(Error::new(op, ErrorKind::MemoryFailure)
                .because("it is about to be quarantined")
                .at(pages.start_offset(), Found::Failed)),
            None => Ok(()),
        }
    }

    /// Takes pages that failed out of everybody's reach; what is pinned, from all but those who have it.
    fn fence(&self, layout: &Layout, failed: Failed) -> Result<Rest, Error> {
        let pages = failed.pages;
        if self.frames.folios(pages).next() != Some((pages, failed.frames)) {
            return Ok(Rest::None);
        }
        let _hidden = HidesIfPanicking { object: self, layout };
        // An earlier failure may have been of some of them.
        let left = self.spans(pages).filter(|(_, word)| word.phase() != Phase::Quarantined);
        let left: Vec<PgoffRange> =
            runs(left.map(|(pages, _)| (pages, ()))).map(|it| it.0).collect();
        with_reader(|reader| {
            left.iter().try_for_each(|&left| match self.freeze_failed(reader, layout, left) {
                Err(error) if is_pinned(&error) => self.condemn_failed(reader, layout, left),
                outcome => outcome,
            })
        })?;
        // A view may not tell the one that is pinned from the others.
        if self.spans(pages).any(|(_, word)| word.is_held()) {
            return Ok(Rest::Some);
        }
        self.hide(layout, &[pages]).map_err(|error| error.of(Op::Poison).on(pages))?;
        self.show_beside(layout, pages);
        Ok(Rest::None)
    }

    /// Quarantines pages some of which are pinned: from here on nobody comes to them but who has the pins, to
    /// whom they also stay in the views.
    fn condemn_failed(
        &self,
        reader: &Reader,
        layout: &Layout,
        pages: PgoffRange,
    ) -> Result<(), Error> {
        let op = Op::Poison;
        let outcome = self.guest_runs(op, layout, &[pages]).and_then(|guest| {
            self.take_back_thawed(op, layout, &[pages])?;
            let condemned = self.tree.condemn(reader, pages);
            self.grant_again(layout, &[pages]);
            condemned.map_err(|stop| self.stopped(op, Some(pages), stop))?;
            if let Some(hypervisor) = layout.hypervisor() {
                hypervisor.invalidate_range(&guest);
            }
            match fails(FailPoint::Barrier) || !reader.wait_for_others() {
                true => Err(Error::new(op, ErrorKind::MissingCapability).because("membarrier(2)")),
                false => Ok(()),
            }
        });
        outcome.map_err(|error| error.of(op).on(pages))
    }

    fn freeze_failed(
        &self,
        reader: &Reader,
        layout: &Layout,
        pages: PgoffRange,
    ) -> Result<(), Error> {
        let op = Op::Poison;
        let stopped = |stop| self.stopped(op, Some(pages), stop);
        let mut frozen =
            self.tree.freeze(reader, &[pages], Wanted::All, &Wait::never()).map_err(stopped)?;
        let outcome = self.guest_runs(op, layout, &[pages]).and_then(|guest| {
            if fails(FailPoint::Barrier) || !frozen.wait_for_sections(reader) {
                return Err(Error::new(op, ErrorKind::MissingCapability).because("membarrier(2)"));
            }
            self.take_back(op, layout, &[pages])?;
            if let Err(error) = self.hide(layout, &[pages]) {
                self.show_beside(layout, pages);
                self.grant_again(layout, &[pages]);
                return Err(error);
            }
            if let Some(hypervisor) = layout.hypervisor() {
                hypervisor.invalidate_range(&guest);
            }
            Ok(())
        });
        match outcome {
            // A freeze that is neither released nor thawed quarantines.
            Ok(()) => drop(frozen),
            Err(_) => {
                // First shown: whoever pins a page relies on finding it in the view.
                self.show_shared(layout, pages);
                frozen.thaw();
            }
        }
        self.show_beside(layout, pages);
        outcome.map_err(|error| error.of(op).on(pages))
    }

    /// Refuses to touch a folio in which a frame failed.
    pub(super) fn check_sound(&self, op: Op, pages: PgoffRange, first: Pfn) -> Result<(), Error> {
        let failed = self.reservation.failed_in(first, pages.nr_pages());
        let Some(&frame) = failed.first() else { return Ok(()) };
        let page = pages.start().get() + (frame.get() - first.get());
        let error = Error::new(op, ErrorKind::MemoryFailure).because("a frame of it failed");
        Err(error.at(Pgoff::new(page).offset(), Found::Failed))
    }
}

/// Pages of one folio, and their frames, which failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pages: PgoffRange,
    frames: PfnRange,
}

impl Failed {
    pub(super) fn has(&self, page: Pgoff) -> bool {
        self.pages.contains(page)
    }
}

/// What is left to do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    None,
    /// Who has the pages pinned has them still.
    Some,
}

fn is_pinned(error: &Error) -> bool {
    let found = error.culprit().map(|culprit| &culprit.found);
    matches!(found, Some(Found::Pinned { .. } | Found::ExclusivelyPinned { .. }))
}
