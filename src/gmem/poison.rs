//! Memory that failed under an object: what the kernel says by a `SIGBUS` of the kinds `BUS_MCEERR_AO` and
//! `BUS_MCEERR_AR`.

use super::layout::Layout;
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
    /// nobody reads, zeroes or moves its frame any more. Its folio stays where it is. When that goes back, the
    /// rest of it is used again, and the frame never is: it is [poisoned](crate::PoolStat::poisoned). On hugetlb
    /// all of that is said of the whole huge page, because the kernel gives up no less. A
    /// guest that has the page for its own learns of the failure from its hypervisor.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotFound`] if there is no memory behind the page;
    /// [`ErrorKind::Exhausted`] without host memory to remember it. [`ErrorKind::Busy`] if the page is pinned or
    /// being converted, [`ErrorKind::SubscriberRefused`], [`ErrorKind::MissingCapability`] and
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
        let layout = &*self.layout.write();
        let mut folios = self.frames.folios(pages);
        if folios.next() != Some((pages, frames)) {
            return Ok(());
        }
        // An earlier failure may have been of some of them.
        let left = self.spans(pages).filter(|(_, word)| word.phase() != Phase::Quarantined);
        let left: Vec<PgoffRange> =
            runs(left.map(|(pages, _)| (pages, ()))).map(|it| it.0).collect();
        with_reader(|reader| {
            left.iter().try_for_each(|&pages| self.freeze_failed(reader, layout, pages))
        })
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
