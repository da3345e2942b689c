//! Where a conversion is ordered. design/conversion.md argues the order.

use super::layout::Layout;
use super::object::{GuestMemfd, Inner};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::range::PgoffRange;
use crate::stage2::{GuestRun, Stage2};
use crate::state::{Frozen, Visibility, wait_for_sections};

/// What a conversion does with the bytes of the pages that change sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContentPolicy {
    /// The other side finds what was written last.
    Preserve,
    /// Both sides find zeroes.
    Zero,
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "a conversion may have had nothing to do"]
pub struct Conversion {
    changed_pages: u64,
}

impl Conversion {
    /// How many pages changed sides; the others were where they should be already.
    pub fn changed_pages(&self) -> u64 {
        self.changed_pages
    }
}

impl GuestMemfd {
    /// Moves every page of the range to one side, in place: the bytes stay, the folio stays whole.
    /// All pages change, or none does.
    ///
    /// Only pages that are on the other side are looked at: the others may be pinned, and keep their
    /// bytes under [`ContentPolicy::Zero`] too. An access by [`read`](Self::read) and its kin either
    /// ends before the memory turns private, or is refused.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Busy`] if a page is pinned or being converted, with
    /// the first one and who holds it; [`ErrorKind::Quarantined`]; [`ErrorKind::HypervisorRefused`]
    /// with the hypervisor's errno; [`ErrorKind::Exhausted`]. All is as before then.
    pub fn convert(
        &self,
        range: PgoffRange,
        to: Visibility,
        content: ContentPolicy,
    ) -> Result<Conversion, Error> {
        let object = &*self.0;
        let op = match to {
            Visibility::Private => Op::ConvertToPrivate,
            Visibility::Shared => Op::ConvertToShared,
        };
        object.check_range(op, range)?;
        if to == Visibility::Shared {
            object.populate_for_views(op, range)?;
        }
        // Where views only know huge pages, a neighbour's visibility matters as well: one at a time.
        let (alone, together);
        let layout: &Layout = match object.reservation.pool().view_granule() {
            FolioSize::Huge2M => {
                alone = object.layout.write();
                &alone
            }
            FolioSize::Base => {
                together = object.layout.read();
                &together
            }
        };
        let frozen =
            object.table.freeze_for(range, to).map_err(|stop| object.stopped(op, range, stop))?;
        let changed_pages = frozen.runs().iter().map(PgoffRange::nr_pages).sum();
        let outcome = match to {
            Visibility::Private => object.make_private(op, layout, frozen, content),
            Visibility::Shared => object.make_shared(op, layout, frozen, content),
        };
        outcome.map_err(|error| error.on(range))?;
        Ok(Conversion { changed_pages })
    }
}

impl Inner {
    /// A shared page that a view maps must have a folio, and this is the last moment at which
    /// finding one may fail.
    fn populate_for_views(&self, op: Op, range: PgoffRange) -> Result<(), Error> {
        if self.layout.read().views.is_empty() {
            return Ok(());
        }
        self.populate(op, &mut self.layout.write(), range)
    }

    fn make_private(
        &self,
        op: Op,
        layout: &Layout,
        frozen: Frozen<'_>,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        if let Err(error) = self.revoke(op, layout, &frozen) {
            // Still frozen: nobody can turn them private before they are shown again.
            frozen.runs().iter().for_each(|&run| self.show(layout, run));
            frozen.thaw();
            return Err(error);
        }
        self.settle_content(op, content, &frozen)?;
        frozen.release(Visibility::Private);
        Ok(())
    }

    /// Takes the frozen pages away from the host: first from those who are inside of an access, then
    /// from the views, then by the hypervisor, whose refusal can still be undone.
    fn revoke(&self, op: Op, layout: &Layout, frozen: &Frozen<'_>) -> Result<(), Error> {
        let guest = self.guest_runs(op, layout, frozen.runs())?;
        if !frozen.runs().is_empty() && !wait_for_sections() {
            return Err(Error::new(op, ErrorKind::MissingCapability)
                .because("membarrier(2) is refused since it was registered"));
        }
        for &run in frozen.runs() {
            self.hide(layout, run)?;
        }
        ask(op, layout, &guest, |hypervisor| hypervisor.make_private(&guest))
    }

    fn make_shared(
        &self,
        op: Op,
        layout: &Layout,
        frozen: Frozen<'_>,
        content: ContentPolicy,
    ) -> Result<(), Error> {
        let outcome = self
            .guest_runs(op, layout, frozen.runs())
            .and_then(|guest| ask(op, layout, &guest, |h| h.make_shared(&guest)));
        if let Err(error) = outcome {
            frozen.thaw();
            return Err(error);
        }
        self.settle_content(op, content, &frozen)?;
        // Before the words are published: afterwards another conversion could hide the pages, and
        // they would be shown after that.
        frozen.runs().iter().for_each(|&run| self.show(layout, run));
        frozen.release(Visibility::Shared);
        Ok(())
    }

    /// On an error, which takes an arena that lost its memory, the caller's `frozen` is dropped and
    /// the pages are quarantined: the hypervisor has moved them, and nobody knows their bytes.
    fn settle_content(
        &self,
        op: Op,
        content: ContentPolicy,
        frozen: &Frozen<'_>,
    ) -> Result<(), Error> {
        match content {
            ContentPolicy::Preserve => Ok(()),
            ContentPolicy::Zero => frozen
                .runs()
                .iter()
                .try_for_each(|&run| self.zero_resident(run))
                .map_err(|_| Error::new(op, ErrorKind::Quarantined)),
        }
    }
}

/// Asks the hypervisor, if there is one and it has to do with the pages.
fn ask(
    op: Op,
    layout: &Layout,
    guest: &[GuestRun],
    question: impl FnOnce(&dyn Stage2) -> Result<(), Errno>,
) -> Result<(), Error> {
    match layout.hypervisor() {
        Some(hypervisor) if !guest.is_empty() => question(&*hypervisor)
            .map_err(|errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno)),
        _ => Ok(()),
    }
}
