//! What folios, views and bindings change together, under one lock.
//!
//! Conversions hold the lock for reading from when they have frozen what they need: the words keep
//! two of them apart. Whatever puts a folio somewhere or takes it away holds it for writing. Lock order:
//! words, this one, then the hypervisor's, then the pool's; who has this one takes words only if it need
//! not wait for them.

use std::panic::resume_unwind;
use std::sync::{Arc, Weak};

use slab::Slab;

use super::object::{Inner, runs};
use super::pin::OwnerTag;
use super::poison::Failed;
use super::punch::between;
use super::subscriber::HandOut;
use super::view_map::ViewMap;
use crate::addr::{Gfn, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::folio::Slot;
use crate::geometry::{FolioSize, index};
use crate::range::{PfnRange, PgoffRange};
use crate::stage2::{GuestRun, Stage2};
use crate::state::{Phase, Visibility, Word};

/// A part of the object that a guest sees.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) pages: PgoffRange,
    pub(super) gfn: Gfn,
}

/// Pages that another process has mapped, and under whose name they are pinned.
#[derive(Debug)]
pub(super) struct Exported {
    pub(super) pages: PgoffRange,
    pub(super) owner: OwnerTag,
}

#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) views: Slab<Arc<ViewMap>>,
    pub(super) bindings: Slab<Binding>,
    pub(super) subscribers: Slab<HandOut>,
    /// What other processes have mapped. All of it is pinned.
    pub(super) exports: Slab<Exported>,
    /// Memory that failed, and is not out of everybody's reach yet.
    pub(super) failed: Vec<Failed>,
    /// The one virtual machine that the bindings are of. Not kept alive: it keeps the object alive.
    pub(super) vm: Option<Weak<dyn Stage2>>,
}

impl Layout {
    /// The hypervisor's side of the guest, while there is one.
    pub(super) fn hypervisor(&self) -> Option<Arc<dyn Stage2>> {
        self.vm.as_ref()?.upgrade()
    }

    /// Whether nobody but the views has to do with a page that changes sides: no guest, no subscriber, and no
    /// memory that failed.
    #[inline]
    pub(super) fn has_views_alone(&self) -> bool {
        self.bindings.is_empty() && self.subscribers.is_empty() && self.failed.is_empty()
    }

    /// What of a range no guest sees.
    pub(super) fn unbound(&self, range: PgoffRange) -> impl Iterator<Item = PgoffRange> {
        let mut at = range.start();
        std::iter::from_fn(move || {
            while at < range.end() {
                let from = at;
                let bound = |pages: &PgoffRange| pages.contains(from);
                let mut all = self.bindings.iter().map(|(_, binding)| binding.pages);
                if let Some(pages) = all.clone().find(bound) {
                    at = pages.end();
                    continue;
                }
                let next = all.by_ref().map(|pages| pages.start()).filter(|&start| start > from);
                at = next.min().map_or(range.end(), |next| next.min(range.end()));
                return between(from, at);
            }
            None
        })
    }

    /// How many pages at least one view or one other process has mapped.
    pub(super) fn nr_mapped(&self) -> u64 {
        let mut views = self.views.iter().map(|(_, view)| view);
        let mut mapped = views.next().map(|first| first.shown().pages.clone());
        for view in views {
            if let Some(mapped) = &mut mapped {
                *mapped |= &view.shown().pages;
            }
        }
        let of_views = mapped.as_ref().map_or(0, |mapped| mapped.count_ones() as u64);
        let mut exports: Vec<_> = self.exports.iter().map(|(_, it)| it.pages).collect();
        exports.sort_unstable_by_key(PgoffRange::start);
        let mut counted = Pgoff::new(0);
        let mut of_others = 0;
        for range in exports {
            let start = range.start().max(counted);
            counted = counted.max(range.end());
            let pages = index(start.get())..index(counted.get());
            let nr_pages = pages.len() as u64;
            let shown = mapped.as_ref().and_then(|mapped| mapped.get(pages));
            of_others += nr_pages - shown.map_or(0, |shown| shown.count_ones() as u64);
        }
        of_views + of_others
    }
}

/// When a subscriber or a hypervisor panics, what it was asked about is quarantined, and goes out of the
/// views as well.
pub(super) struct HidesIfPanicking<'a> {
    pub(super) object: &'a Inner,
    pub(super) layout: &'a Layout,
}

impl Drop for HidesIfPanicking<'_> {
    #[inline]
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.hide();
        }
    }
}

impl HidesIfPanicking<'_> {
    #[cold]
    fn hide(&self) {
        for (pages, word) in self.object.spans(self.object.pages) {
            // Who had it pinned when it failed has it in the views still.
            if word.phase() == Phase::Quarantined && !word.is_held() {
                // Should this fail too, nothing is left to be tried.
                let _ = self.object.hide(self.layout, &[pages]);
            }
        }
    }
}

/// So many other folios are tried in place of one without memory.
const MOST_OTHERS: u32 = 16;

impl Inner {
    /// The runs of guest memory behind the given pages: those that a binding covers and a folio
    /// backs.
    #[inline]
    pub(super) fn guest_runs(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<Vec<GuestRun>, Error> {
        match layout.bindings.is_empty() {
            true => Ok(Vec::new()),
            false => self.bound_runs(op, layout, pages),
        }
    }

    fn bound_runs(
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
        // Views that have it already hide it, and answer with SIGBUS as before.
        let undo = |taken: Vec<(Slot, Pfn)>| {
            taken.into_iter().for_each(|(_, pfn)| self.reservation.give_back_clean(pfn));
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
        for (slot, pfn) in &taken {
            self.frames.set(slot, Some(*pfn));
            self.show_shared(layout, slot.pages());
        }
        // When all are the object's: a subscriber may panic. What the others are to have they have then.
        let mut told = Ok(());
        for (slot, _) in &taken {
            told = told.and(self.grant_to_each(layout, &[slot.pages()]));
        }
        let holes = self.frames.has_had_holes().then(|| self.frames.holes(range));
        for (holes, _) in holes.into_iter().flatten() {
            // Before it can be reached: the map first, then the views.
            self.frames.fill(holes);
            self.show_shared(layout, holes);
            told = told.and(self.grant_to_each(layout, &[holes]));
        }
        told.unwrap_or_else(|panic| resume_unwind(panic));
        Ok(())
    }

    /// A folio for the slot, installed in every view but not shown, and not yet the object's.
    fn take_folio(&self, layout: &Layout, slot: &Slot) -> Result<Pfn, Error> {
        if fails(FailPoint::Folio) {
            return Err(Error::new(Op::Allocate, ErrorKind::Exhausted));
        }
        let pfn = self.take_present(slot)?;
        // Out of the reach of raw pointers from the first moment on, so it is as clean as it was taken.
        let mut views = layout.views.iter();
        let installed = views.try_for_each(|(_, view)| view.install(self, slot.pages(), pfn));
        installed.map(|()| pfn).inspect_err(|_| self.reservation.give_back_clean(pfn))
    }

    /// A folio that has memory. Somebody may have taken that from outside while it was free.
    fn take_present(&self, slot: &Slot) -> Result<Pfn, Error> {
        let (size, page) = (slot.size(), slot.pages().start());
        let mut others = MOST_OTHERS;
        loop {
            let pfn = self.reservation.take(size, page, self.side_of(slot))?;
            let frames = PfnRange::new(pfn, size.nr_pages())?;
            let Err(error) = self.arena.require(Op::Allocate, frames) else { return Ok(pfn) };
            self.reservation.give_back_in_doubt(pfn, size);
            // One of 4 KiB would be the same again.
            let left = others.checked_sub(1).filter(|_| size != FolioSize::Base);
            others = left.ok_or(error)?;
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
                self.show(layout, &[pages], &[]);
            }
        }
    }

    /// Maps the ranges into the views, as far as they have folios, whatever their words say.
    ///
    /// Where views only take whole huge folios, one is mapped if it has no hole and the rest of it is shared,
    /// or is among `becoming_shared`, which the caller holds. The layout is then locked for writing.
    #[inline]
    pub(super) fn show(
        &self,
        layout: &Layout,
        ranges: &[PgoffRange],
        becoming_shared: &[PgoffRange],
    ) {
        let granule = self.arena.view_granule();
        for (_, view) in &layout.views {
            if granule == FolioSize::Base {
                view.show(self, ranges);
                continue;
            }
            for &range in ranges {
                let whole = |pages: &PgoffRange| self.is_whole(*pages, becoming_shared);
                granules(range, granule).filter(whole).for_each(|pages| view.show(self, &[pages]));
            }
        }
    }

    /// Whether all of the pages are there, and shared or becoming so.
    fn is_whole(&self, pages: PgoffRange, becoming_shared: &[PgoffRange]) -> bool {
        let becomes =
            |pages: PgoffRange| becoming_shared.iter().any(|becoming| becoming.covers(&pages));
        let is_shared = |word: Word| {
            word.visibility() == Visibility::Shared && word.phase() != Phase::Quarantined
        };
        self.is_resident(pages)
            && (becomes(pages)
                || self.spans(pages).all(|(pages, word)| is_shared(word) || becomes(pages)))
    }

    /// Shows again what went out of the views together with a page.
    pub(super) fn show_beside(&self, layout: &Layout, page: PgoffRange) {
        granules(page, self.arena.view_granule()).for_each(|pages| self.show_shared(layout, pages));
    }

    /// Takes the pages out of every view, and with them whatever a view cannot tell from them.
    #[inline]
    pub(super) fn hide(&self, layout: &Layout, ranges: &[PgoffRange]) -> Result<(), Error> {
        let granule = self.arena.view_granule();
        for (_, view) in &layout.views {
            if ranges.iter().any(|_| fails(FailPoint::View)) {
                return Err(Error::new(Op::MapView, ErrorKind::Os).because("made to fail"));
            }
            if granule == FolioSize::Base {
                view.hide(self, ranges)?;
                continue;
            }
            for &range in ranges {
                granules(range, granule).try_for_each(|pages| view.hide(self, &[pages]))?;
            }
        }
        Ok(())
    }
}

/// What views map at once of a range, or more: whatever holds one of its pages. Where that is more than a page
/// the object is made of nothing else.
#[inline]
pub(super) fn granules(pages: PgoffRange, granule: FolioSize) -> impl Iterator<Item = PgoffRange> {
    let first = pages.start().get() >> granule.order();
    let behind = ((pages.end().get() - 1) >> granule.order()) + 1;
    let pages = move |place: u64| {
        PgoffRange::new(Pgoff::new(place << granule.order()), granule.nr_pages()).ok()
    };
    (first..behind).filter_map(pages)
}
