//! The door for hypervisors: where a guest sees the object, and what happens when it touches a page
//! that its stage 2 does not have yet.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::Weak;

use super::layout::{Binding, Layout};
use super::object::{GuestMemfd, Inner};
use crate::addr::{Gfn, Pfn, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Found, Op};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::{Faulted, GuestRun, Prevented, Stage2};
use crate::state::{Phase, Refusal, Visibility, Word};

/// A binding, to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindingId(usize);

/// A binding has ended.
#[must_use = "somebody may have panicked on the way"]
pub(crate) struct Unbound(Result<(), Box<dyn Any + Send>>);

impl Unbound {
    /// Goes on with the panic, if there was one.
    pub(crate) fn settle(self) {
        self.0.unwrap_or_else(|panic| resume_unwind(panic));
    }
}

impl GuestMemfd {
    /// Makes the pages visible to a guest at `gfn`. A page is bound once at most, and all bindings
    /// of an object are one machine's, as with the kernel's guest_memfd. If a subscriber panics they are not bound.
    pub(crate) fn bind(
        &self,
        vm: Weak<dyn Stage2>,
        gfn: Gfn,
        pages: PgoffRange,
    ) -> Result<BindingId, Error> {
        let op = Op::BindSlot;
        self.0.check_range(op, pages)?;
        GfnRange::new(gfn, pages.nr_pages()).map_err(|error| error.of(op).on(pages))?;
        let object = &*self.0;
        let layout = &mut *object.layout.write();
        let exists = |why| Err(Error::new(op, ErrorKind::Exists).on(pages).because(why));
        let taken = layout.bindings.iter().any(|(_, b)| b.pages.intersection(&pages).is_some());
        if taken {
            return exists("part of it is bound already");
        }
        let is_other = |other: &Weak<dyn Stage2>| !Weak::ptr_eq(other, &vm);
        if !layout.bindings.is_empty() && layout.vm.as_ref().is_some_and(is_other) {
            // Not EEXIST: the kernel takes it for a file that is none of this machine's.
            return exists("the object is bound to another machine")
                .map_err(|error| error.errno_is(Errno::EINVAL));
        }
        // Subscribers are to find the pages at other places.
        object.take_back_thawed(op, layout, &[pages]).map_err(|error| error.on(pages))?;
        *object.guest.lock() = Some(Weak::clone(&vm));
        layout.vm = Some(vm);
        let id = BindingId(layout.bindings.insert(Binding { pages, gfn }));
        if let Err(panic) = object.grant_to_each(layout, &[pages]) {
            // Nobody would know of the binding. Should another one panic as well, the first is told.
            let _ = object.end_binding(layout, id);
            resume_unwind(panic);
        }
        Ok(id)
    }

    /// Ends a binding, which nobody can refuse: a subscriber that does not let go is cut off, or lost. The
    /// hypervisor has given the memory back before.
    pub(crate) fn unbind(&self, id: BindingId) {
        let layout = &mut *self.0.layout.write();
        // A subscriber that panics when it is given the pages goes without: this may be the end of a drop.
        let _ = self.0.end_binding(layout, id);
    }

    /// Ends a binding while the guest runs, if the hypervisor takes the pages back from it.
    ///
    /// No fault of the guest is resolved meanwhile, and none finds the binding afterwards. If a subscriber panics
    /// when it is given the pages at no place, the caller has that panic to go on with when it has settled its own
    /// things; with any other panic the binding stands.
    pub(crate) fn unbind_live(&self, id: BindingId) -> Result<Unbound, Error> {
        let (op, object) = (Op::UnbindSlot, &*self.0);
        let layout = &mut *object.layout.write();
        let Some(pages) = layout.bindings.get(id.0).map(|binding| binding.pages) else {
            return Ok(Unbound(Ok(())));
        };
        let guest = object.guest_runs(op, layout, &[pages])?;
        // Subscribers are to find the pages at no place any more.
        object.take_back_thawed(op, layout, &[pages]).map_err(|error| error.on(pages))?;
        let outcome = match layout.hypervisor() {
            Some(hypervisor) => {
                let reclaimed = hypervisor.reclaim(&guest);
                reclaimed.map(|()| hypervisor.invalidate_range(&guest))
            }
            None => Ok(()),
        };
        let refused =
            |errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno).on(pages);
        match outcome {
            Ok(()) => {
                object.remove(layout, id);
                Ok(Unbound(object.grant_to_each(layout, &[pages])))
            }
            Err(errno) => {
                object.grant_to_each(layout, &[pages]).unwrap_or_else(|panic| resume_unwind(panic));
                Err(refused(errno))
            }
        }
    }

    /// Resolves a guest's fault on a bound page: gives it a folio, and has the hypervisor map it if it is on the side
    /// on which the guest may have it.
    ///
    /// Conversions wait meanwhile, so a fault never makes one fail.
    pub(crate) fn guest_fault(&self, page: Pgoff) -> Result<Faulted, Error> {
        let op = Op::GuestFault;
        let object = &*self.0;
        let range = PgoffRange::single(page)?;
        object.check_range(op, range)?;
        let mut layout = object.layout.write();
        let Some(word) = object.word(page).filter(|word| word.phase() != Phase::Quarantined) else {
            let error = Error::new(op, ErrorKind::Quarantined);
            return Err(error.at(page.offset(), Found::Quarantined));
        };
        // No more bound, here or below: who looks again finds that.
        let Some(hypervisor) = layout.hypervisor() else { return Ok(Faulted::Mapped) };
        let side = word.visibility();
        if !hypervisor.takes(side) {
            return Ok(Faulted::OtherSide);
        }
        object.populate(op, &mut layout, range)?;
        let guest = object.guest_runs(op, &layout, &[range])?;
        let Some(&run) = guest.first() else { return Ok(Faulted::Mapped) };
        let block = object.block_around(op, &layout, page, side)?;
        hypervisor
            .fault(side, run, block)
            .map_err(|errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno).on(range))
    }

    /// Does something with the frame behind a page, which stays where it is meanwhile, and no conversion is in the middle.
    /// What is not there, or is a hole, has none.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`].
    pub(crate) fn with_frame<T>(
        &self,
        page: Pgoff,
        act: impl FnOnce(Option<Pfn>) -> T,
    ) -> Result<T, Error> {
        let object = &*self.0;
        let range = PgoffRange::single(page)?;
        object.check_range(Op::Range, range)?;
        let _layout = object.layout.write();
        let frame = object.frames.resident(range).next();
        Ok(act(frame.map(|(_, frames)| frames.start())))
    }

    /// Whether some of it is made of folios of 2 MiB or more.
    pub(crate) fn has_huge_folios(&self) -> bool {
        let blocks = self.0.frames.shape().blocks();
        blocks.giant + blocks.huge > 0
    }
}

impl Inner {
    /// The 2 MiB around a page, if one folio holds them, all of it is there and on one side, nothing is under way, and
    /// the guest sees it so that one entry of its tables can be all of it.
    fn block_around(
        &self,
        op: Op,
        layout: &Layout,
        page: Pgoff,
        side: Visibility,
    ) -> Result<Option<GuestRun>, Error> {
        let slot = self.frames.shape().slots(PgoffRange::single(page)?).next();
        if slot.is_none_or(|slot| slot.size() == FolioSize::Base) {
            return Ok(None);
        }
        let start = Pgoff::new(page.get() - page.get() % HUGE_PAGES);
        let pages = PgoffRange::new(start, HUGE_PAGES)?;
        let fits = |(_, word): (PgoffRange, Word)| {
            word.visibility() == side && word.phase() == Phase::Settled
        };
        if !self.is_resident(pages) || !self.spans(pages).all(fits) {
            return Ok(None);
        }
        let runs = self.guest_runs(op, layout, &[pages])?;
        let is_block =
            |run: &GuestRun| run.nr_pages == HUGE_PAGES && run.gfn.get() % HUGE_PAGES == 0;
        Ok(runs.first().copied().filter(is_block))
    }

    /// Takes the places of a binding from each subscriber before they are nobody's: afterwards it would be asked for the
    /// pages, but never for these.
    fn end_binding(&self, layout: &mut Layout, id: BindingId) -> Result<(), Box<dyn Any + Send>> {
        let Some(pages) = layout.bindings.get(id.0).map(|binding| binding.pages) else {
            return Ok(());
        };
        for (_, hand_out) in &layout.subscribers {
            self.part_from(layout, hand_out, pages);
        }
        self.remove(layout, id);
        self.grant_to_each(layout, &[pages])
    }

    fn remove(&self, layout: &mut Layout, id: BindingId) {
        layout.bindings.try_remove(id.0);
        if layout.bindings.is_empty() {
            layout.vm = None;
            *self.guest.lock() = None;
        }
    }

    /// Refuses to turn pages that a guest sees where it cannot have them so, with memory or without.
    #[inline]
    pub(super) fn check_may_turn(
        &self,
        op: Op,
        layout: &Layout,
        ranges: &[PgoffRange],
        to: Visibility,
    ) -> Result<(), Error> {
        match layout.hypervisor() {
            Some(hypervisor) if hypervisor.fixes_sides() => {
                check_sides(&*hypervisor, op, layout, ranges, to)
            }
            _ => Ok(()),
        }
    }

    /// Tells the hypervisor of what was refused, if that is of its business. Refusals only, so a lock is no matter; the
    /// layout's would be one, since some are found inside of a section.
    #[cold]
    pub(super) fn note_refused(&self, op: Op, refusal: Refusal) {
        let is_pin = matches!(op, Op::Pin | Op::PinExclusive);
        let moves =
            matches!(op, Op::ConvertToPrivate | Op::ConvertToShared | Op::PunchHole | Op::Migrate);
        let what = match refusal {
            Refusal::Private if is_pin => Prevented::Pin,
            Refusal::Private => Prevented::Access,
            Refusal::Pinned(_) | Refusal::Exclusive if moves => Prevented::Conversion,
            _ => return,
        };
        let guest = self.guest.lock().as_ref().and_then(Weak::upgrade);
        if let Some(hypervisor) = guest {
            hypervisor.note_prevented(what);
        }
    }
}

fn check_sides(
    hypervisor: &dyn Stage2,
    op: Op,
    layout: &Layout,
    ranges: &[PgoffRange],
    to: Visibility,
) -> Result<(), Error> {
    for range in ranges {
        for (_, Binding { pages, gfn }) in &layout.bindings {
            let Some(part) = pages.intersection(range) else { continue };
            let skip = part.start().get() - pages.start().get();
            let start = gfn.checked_add(skip);
            let gfns = start.and_then(|start| GfnRange::new(start, part.nr_pages()).ok());
            if gfns.is_none_or(|gfns| !hypervisor.may_be(gfns, to)) {
                return Err(Error::new(op, ErrorKind::HypervisorRefused)
                    .errno_is(Errno::EOPNOTSUPP)
                    .because("the guest cannot have all of it on that side")
                    .on(*range));
            }
        }
    }
    Ok(())
}
