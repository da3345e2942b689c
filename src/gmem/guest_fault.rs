//! The door for hypervisors: where a guest sees the object, and what happens when it touches a page
//! that its stage 2 does not have yet.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::Weak;

use super::layout::{Binding, Layout};
use super::object::{GuestMemfd, Inner};
use crate::addr::{Gfn, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Found, Op};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::Stage2;
use crate::state::{Phase, Visibility};

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
                remove(layout, id);
                Ok(Unbound(object.grant_to_each(layout, &[pages])))
            }
            Err(errno) => {
                object.grant_to_each(layout, &[pages]).unwrap_or_else(|panic| resume_unwind(panic));
                Err(refused(errno))
            }
        }
    }

    /// Resolves a guest's fault on a bound page: gives it a folio, and gives it to the guest if it is
    /// private. For a shared page it says so and does nothing: whether the guest may have it like
    /// that is the hypervisor's affair.
    ///
    /// Conversions wait meanwhile, so a fault never makes one fail.
    pub(crate) fn guest_fault(&self, page: Pgoff) -> Result<Visibility, Error> {
        let op = Op::GuestFault;
        let object = &*self.0;
        let range = PgoffRange::single(page)?;
        object.check_range(op, range)?;
        let mut layout = object.layout.write();
        let word = object.word(page);
        if word.is_none_or(|word| word.phase() == Phase::Quarantined) {
            let error = Error::new(op, ErrorKind::Quarantined);
            return Err(error.at(page.offset(), Found::Quarantined));
        }
        if word.is_some_and(|word| word.visibility() == Visibility::Shared) {
            return Ok(Visibility::Shared);
        }
        object.populate(op, &mut layout, range)?;
        let guest = object.guest_runs(op, &layout, &[range])?;
        if let Some(hypervisor) = layout.hypervisor() {
            hypervisor.make_private(&guest, &mut || ()).map_err(|errno| {
                Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno).on(range)
            })?;
        }
        Ok(Visibility::Private)
    }
}

impl Inner {
    /// Takes the places of a binding from each subscriber before they are nobody's: afterwards it would be asked for the
    /// pages, but never for these.
    fn end_binding(&self, layout: &mut Layout, id: BindingId) -> Result<(), Box<dyn Any + Send>> {
        let Some(pages) = layout.bindings.get(id.0).map(|binding| binding.pages) else {
            return Ok(());
        };
        for (_, hand_out) in &layout.subscribers {
            self.part_from(layout, hand_out, pages);
        }
        remove(layout, id);
        self.grant_to_each(layout, &[pages])
    }
}

fn remove(layout: &mut Layout, id: BindingId) {
    layout.bindings.try_remove(id.0);
    if layout.bindings.is_empty() {
        layout.vm = None;
    }
}
