//! Collapse: the kernel is asked to make huge pages of folios where it has none.

use super::layout::{HidesIfPanicking, Layout};
use super::object::{GuestMemfd, Inner};
use crate::addr::{ByteSize, Pfn};
use crate::error::{Error, Op};
use crate::folio::Slot;
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::state::{Wait, Wanted, with_reader};

/// What a collapse came to.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Collapse {
    /// How much the kernel says is in huge pages now, in whole folios, some of it before already.
    pub collapsed: ByteSize,
    /// The folios that are not, and why.
    pub refused: Vec<(PgoffRange, Error)>,
}

impl GuestMemfd {
    /// Has the kernel make huge pages of the folios of 2 MiB or more that hold any page of the range: for
    /// pools on [`ArenaBacking::MemfdThp`](crate::ArenaBacking::MemfdThp), whose pages the kernel did not find
    /// huge or has split since. What it makes of all of the pool is in [`PoolStat::huge`](crate::PoolStat::huge).
    ///
    /// Pages keep their bytes and their side. Raw pointers fault while their folio is at it, so that one with a
    /// pin in it stays as it is; subscribers give it up, and are given it again.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`](crate::error::ErrorKind::OutOfRange). What stands in the way of a folio is in
    /// [`Collapse::refused`]: on other backings that is
    /// [`ErrorKind::Unsupported`](crate::error::ErrorKind::Unsupported), and
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted) if the host has no huge page.
    pub fn collapse(&self, range: PgoffRange) -> Result<Collapse, Error> {
        let object = &*self.0;
        object.check_range(Op::Collapse, range)?;
        let mut collapse = Collapse::default();
        let is_huge = |slot: &Slot| slot.size() != FolioSize::Base;
        for slot in object.frames.shape().slots(range).filter(is_huge) {
            let layout = &*object.layout.write();
            let Some(pfn) = object.frames.get(&slot) else { continue };
            match object.collapse_folio(layout, &slot, pfn) {
                Ok(()) => {
                    let collapsed = collapse.collapsed.get() + slot.size().bytes().get();
                    collapse.collapsed = ByteSize::from_bytes(collapsed);
                }
                Err(error) => collapse.refused.push((slot.pages(), error)),
            }
        }
        Ok(collapse)
    }
}

impl Inner {
    fn collapse_folio(&self, layout: &Layout, slot: &Slot, pfn: Pfn) -> Result<(), Error> {
        let (op, pages) = (Op::Collapse, slot.pages());
        with_reader(|reader| {
            // Before the freeze, so that it outlives that and finds out what is quarantined.
            let _hidden = HidesIfPanicking { object: self, layout };
            let frozen = self
                .tree
                .freeze(reader, &[pages], Wanted::All, &Wait::never())
                .map_err(|stop| self.stopped(op, Some(pages), stop))?;
            let outcome = self.collapse_frozen(layout, slot, pfn);
            frozen.thaw();
            outcome.map_err(|error| error.of(op).on(pages))
        })
    }

    fn collapse_frozen(&self, layout: &Layout, slot: &Slot, pfn: Pfn) -> Result<(), Error> {
        let (op, pages) = (Op::Collapse, slot.pages());
        let frames = PfnRange::new(pfn, pages.nr_pages())?;
        // The kernel would copy what cannot be read.
        self.check_sound(op, pages, pfn)?;
        self.take_back(op, layout, &[pages])?;
        let outcome = self.hide(layout, &[pages]).and_then(|()| self.arena.collapse(frames));
        // Before anybody can pin them, who would rely on finding them there.
        self.show_shared(layout, pages);
        self.grant_again(layout, &[pages]);
        outcome
    }
}
