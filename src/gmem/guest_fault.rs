//! The door for hypervisors: where a guest sees the object, and what happens when it touches a page
//! that its stage 2 does not have yet.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Weak;

use super::layout::{Binding, Layout};
use super::object::GuestMemfd;
use crate::addr::{Gfn, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Found, Op};
use crate::range::{GfnRange, PgoffRange};
use crate::stage2::Stage2;
use crate::state::{Phase, Visibility};

/// A binding, to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindingId(usize);

impl GuestMemfd {
    /// Makes the pages visible to a guest at `gfn`. A page is bound once at most, and all bindings
    /// of an object are one machine's, as with the kernel's guest_memfd.
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
        let mut layout = object.layout.write();
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
        object.take_back(op, &layout, &[pages]).map_err(|error| error.on(pages))?;
        layout.vm = Some(vm);
        let id = layout.bindings.insert(Binding { pages, gfn });
        object.grant_again(&layout, &[pages]);
        Ok(BindingId(id))
    }

    /// Ends a binding. The hypervisor has given the memory back before.
    pub(crate) fn unbind(&self, id: BindingId) {
        let mut layout = self.0.layout.write();
        let pages = layout.bindings.get(id.0).map(|binding| binding.pages);
        // A subscriber that refuses goes on with the places that it knows, which does no harm: the pages are
        // as much its to see as before. Neither does one that panics, as long as it does not end a drop.
        let retold = pages.filter(|_| !layout.subscribers.is_empty()).filter(|&pages| {
            let take_back = || self.0.take_back(Op::BindSlot, &layout, &[pages]).is_ok();
            catch_unwind(AssertUnwindSafe(take_back)).unwrap_or(false)
        });
        remove(&mut layout, id);
        if let Some(pages) = retold {
            let grant = || self.0.grant_again(&layout, &[pages]);
            let _ = catch_unwind(AssertUnwindSafe(grant));
        }
    }

    /// Ends a binding while the guest runs, if the hypervisor takes the pages back from it.
    ///
    /// No fault of the guest is resolved meanwhile, and none finds the binding afterwards.
    pub(crate) fn unbind_live(&self, id: BindingId) -> Result<(), Error> {
        let (op, object) = (Op::UnbindSlot, &*self.0);
        let layout = &mut *object.layout.write();
        let Some(pages) = layout.bindings.get(id.0).map(|binding| binding.pages) else {
            return Ok(());
        };
        let guest = object.guest_runs(op, layout, &[pages])?;
        // Subscribers are to find the pages at no place any more.
        object.take_back(op, layout, &[pages]).map_err(|error| error.on(pages))?;
        let outcome = match layout.hypervisor() {
            Some(hypervisor) => {
                let reclaimed = hypervisor.reclaim(&guest);
                reclaimed.map(|()| hypervisor.invalidate_range(&guest))
            }
            None => Ok(()),
        };
        if outcome.is_ok() {
            remove(layout, id);
        }
        object.grant_again(layout, &[pages]);
        outcome
            .map_err(|errno| Error::new(op, ErrorKind::HypervisorRefused).errno_is(errno).on(pages))
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

fn remove(layout: &mut Layout, id: BindingId) {
    layout.bindings.try_remove(id.0);
    if layout.bindings.is_empty() {
        layout.vm = None;
    }
}
