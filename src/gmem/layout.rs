//! What folios, views and bindings change together, under one lock.
//!
//! Conversions hold the lock for reading from when they have frozen what they need: the words keep
//! two of them apart. Whatever puts a folio somewhere or takes it away holds it for writing. Lock order:
//! words, this one, then the hypervisor's, then the pool's; who has this one takes words only if it need
//! not wait for them.

use std::sync::{Arc, Weak};

use slab::Slab;

use super::object::{Inner, runs};
use super::subscriber::Subscriber;
use super::view_map::{NotInstalled, ViewMap};
use crate::addr::{Gfn, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::Slot;
use crate::geometry::FolioSize;
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::{GuestRun, Stage2};
use crate::state::{Phase, Visibility};

/// A part of the object that a guest sees.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) pages: PgoffRange,
    pub(super) gfn: Gfn,
}

#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) views: Slab<Arc<ViewMap>>,
    pub(super) bindings: Slab<Binding>,
    pub(super) subscribers: Slab<Arc<dyn Subscriber>>,
    /// The one virtual machine that the bindings are of. Not kept alive: it keeps the object alive.
    pub(super) vm: Option<Weak<dyn Stage2>>,
}

impl Layout {
    /// The hypervisor's side of the guest, while there is one.
    pub(super) fn hypervisor(&self) -> Option<Arc<dyn Stage2>> {
        self.vm.as_ref()?.upgrade()
    }

    /// How many pages at least one view has mapped.
    pub(super) fn nr_mapped(&self) -> u64 {
        let mut views = self.views.iter().map(|(_, view)| view);
        let Some(first) = views.next() else { return 0 };
        let mut mapped = first.shown().pages.clone();
        for view in views {
            mapped |= &view.shown().pages;
        }
        mapped.count_ones() as u64
    }
}

impl Inner {
    /// The runs of guest memory behind the given pages: those that a binding covers and a folio
    /// backs.
    pub(super) fn guest_runs(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<Vec<GuestRun>, Error> {
        let mut runs = Vec::new();
        for range in pages {
            for (_, binding) in &layout.bindings {
                let Some(part) = binding.pages.intersection(range) else { continue };
                for (pages, frames) in self.frames.resident(part) {
                    let skip = pages.start().get() - binding.pages.start().get();
                    let Some(gfn) = binding.gfn.checked_add(skip) else { continue };
                    if fails(FailPoint::Memory) || runs.try_reserve(1).is_err() {
                        return Err(Error::new(op, ErrorKind::Exhausted));
                    }
                    let nr_pages = frames.nr_pages();
                    runs.push(GuestRun { gfn, pfn: frames.start(), nr_pages });
                }
            }
        }
        Ok(runs)
    }

    /// Makes sure that every page of the range has a folio and is no hole: all of them, or none more than
    /// before.
    pub(super) fn populate(
        &self,
        op: Op,
        layout: &mut Layout,
        range: PgoffRange,
    ) -> Result<(), Error> {
        let mut taken: Vec<(Slot, Pfn)> = Vec::new();
        let is_viewed = !layout.views.is_empty();
        let undo = |taken: Vec<(Slot, Pfn)>| {
            for (slot, pfn) in taken {
                match is_viewed {
                    true => self.reservation.give_back(pfn, slot.size()),
                    false => self.reservation.give_back_clean(pfn),
                }
            }
        };
        let absent = |slot: &Slot| self.frames.get(slot).is_none();
        for slot in self.frames.shape().slots(range).filter(absent) {
            let outcome = match fails(FailPoint::Memory) || taken.try_reserve(1).is_err() {
                false => self.take_folio(layout, &slot),
                true => Err(Error::new(op, ErrorKind::Exhausted)),
            };
            match outcome {
                Ok(pfn) => taken.push((slot, pfn)),
                Err(error) => {
                    undo(taken);
                    return Err(error.of(op).on(range));
                }
            }
        }
        if let Err(error) = self.commit_holes(op, range) {
            undo(taken);
            return Err(error.on(range));
        }
        for (slot, pfn) in taken {
            self.frames.set(&slot, Some(pfn));
            self.show_shared(layout, slot.pages());
        }
        for (holes, _) in self.frames.holes(range) {
            // Before it can be reached: the map first, then the views.
            self.frames.fill(holes);
            self.show_shared(layout, holes);
        }
        Ok(())
    }

    /// A folio for the slot, installed in every view but not shown, and not yet the object's.
    fn take_folio(&self, layout: &Layout, slot: &Slot) -> Result<Pfn, Error> {
        if fails(FailPoint::Folio) {
            return Err(Error::new(Op::Allocate, ErrorKind::Exhausted));
        }
        let pfn = self.reservation.take(slot.size(), slot.pages().start(), self.side_of(slot))?;
        let mut views = layout.views.iter();
        let outcome = views
            .try_for_each(|(_, view)| view.install(self, slot.pages(), pfn))
            .and_then(|()| match layout.views.is_empty() {
                true => Ok(()),
                // A raw pointer may have written to it while it was being installed.
                false => PfnRange::new(pfn, slot.size().nr_pages())
                    .and_then(|frames| self.arena.zero(frames))
                    .map_err(NotInstalled::Left),
            });
        match outcome {
            Ok(()) => Ok(pfn),
            // Views that have it already hide it, and answer with SIGBUS as before.
            Err(NotInstalled::Undone(error)) => {
                self.reservation.give_back(pfn, slot.size());
                Err(error)
            }
            Err(NotInstalled::Left(error)) => {
                self.reservation.quarantine(pfn);
                Err(error)
            }
        }
    }

    /// Maps into the views what the range has of shared pages with folios, with the layout locked for
    /// writing: a conversion to private that holds some of them hides them when its turn comes.
    pub(super) fn show_shared(&self, layout: &Layout, range: PgoffRange) {
        if layout.views.is_empty() {
            return;
        }
        let shared = self.spans(range).map(|(pages, word)| {
            let shared = word.visibility() == Visibility::Shared;
            (pages, shared && word.phase() != Phase::Quarantined)
        });
        for (pages, shared) in runs(shared) {
            if shared {
                self.show(layout, pages, &[]);
            }
        }
    }

    /// Maps the pages into the views, as far as they have folios, whatever their words say.
    ///
    /// Where views only take whole huge folios, one is mapped if it has no hole and the rest of it is shared,
    /// or is among `becoming_shared`, which the caller holds. The layout is then locked for writing.
    #[inline]
    pub(super) fn show(&self, layout: &Layout, pages: PgoffRange, becoming_shared: &[PgoffRange]) {
        if layout.views.is_empty() {
            return;
        }
        match self.reservation.pool().view_granule() {
            FolioSize::Base => {
                for (pages, frames) in self.frames.resident(pages) {
                    layout.views.iter().for_each(|(_, view)| view.show(self, pages, frames));
                }
            }
            FolioSize::Huge2M | FolioSize::Huge1G => {
                let becomes = |pages: PgoffRange| {
                    becoming_shared.iter().any(|becoming| becoming.covers(&pages))
                };
                let is_shared = |slot: &Slot| {
                    self.spans(slot.pages()).all(|(pages, word)| {
                        let shared = word.visibility() == Visibility::Shared;
                        shared && word.phase() != Phase::Quarantined || becomes(pages)
                    })
                };
                let resident = |slot: &Slot| self.is_resident(slot.pages());
                for slot in self.frames.shape().slots(pages).filter(resident).filter(is_shared) {
                    for (pages, frames) in self.frames.resident(slot.pages()) {
                        layout.views.iter().for_each(|(_, view)| view.show(self, pages, frames));
                    }
                }
            }
        }
    }

    /// Takes the pages out of every view, and with them whatever a view cannot tell from them.
    #[inline]
    pub(super) fn hide(&self, layout: &Layout, ranges: &[PgoffRange]) -> Result<(), Error> {
        let granule = self.reservation.pool().view_granule();
        for (_, view) in &layout.views {
            if ranges.iter().any(|_| fails(FailPoint::View)) {
                return Err(Error::new(Op::MapView, ErrorKind::Os).because("made to fail"));
            }
            match granule {
                FolioSize::Base => view.hide(self, ranges)?,
                FolioSize::Huge2M | FolioSize::Huge1G => {
                    for slot in ranges.iter().flat_map(|&range| self.frames.shape().slots(range)) {
                        view.hide(self, &[slot.pages()])?;
                    }
                }
            }
        }
        Ok(())
    }
}
