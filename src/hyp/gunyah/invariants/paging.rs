//! Memory that the host provides on demand.

use super::super::memdb::{ExtentId, Owner};
use super::super::rm::Vmid;
use super::super::rm::paging::Paging;
use super::super::rm::vm::Home;
use super::View;
use crate::addr::{Gfn, Pfn};

impl View<'_> {
    /// VMs that have such memory.
    pub(super) fn pagings(&self) -> impl Iterator<Item = (Home, Paging)> {
        self.rm.vms.values().filter_map(|vm| vm.home.zip(vm.paging))
    }

    fn frames_of(&self, id: ExtentId) -> impl Iterator<Item = Pfn> {
        let banks = self.frames().into_iter();
        banks
            .flat_map(move |frames| self.hyp.memdb.walk(frames, Owner::Extent(id)))
            .flat_map(|piece| piece.iter())
    }
}

pub(super) fn the_host_has_nothing_lent(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (_, paging) in view.pagings() {
        for pfn in view.frames_of(paging.private) {
            let uses = view.kernel.uses(pfn);
            if uses.nr_mapped > 0 {
                wrong.push(format!("{pfn:?} is lent, and user space has it mapped"));
            }
            if uses.nr_pinned > 0 {
                wrong.push(format!("{pfn:?} is lent, and pinned"));
            }
            if view.kernel.sees(pfn) {
                wrong.push(format!("{pfn:?} is lent, and in the kernel's direct map"));
            }
        }
    }
    wrong
}

pub(super) fn paged_memory_is_where_it_should_be(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let host = view.rm.vms.get(&Vmid::HLOS).and_then(|vm| vm.home).map(|home| home.aspace);
    for (home, paging) in view.pagings() {
        for (id, is_shared) in [(paging.private, false), (paging.shared, true)] {
            for pfn in view.frames_of(id) {
                let mapped = view.of(pfn);
                let of_host = mapped.iter().filter(|page| Some(page.aspace) == host);
                let is_direct = |page: &super::Mapped| page.gfn == Gfn::new(pfn.get());
                let (nr_host, all_direct) =
                    (of_host.clone().count(), of_host.clone().all(is_direct));
                let nr_guest = mapped.iter().filter(|page| page.aspace == home.aspace).count();
                let fits = nr_host == usize::from(is_shared)
                    && all_direct
                    && nr_guest <= 1
                    && nr_host + nr_guest == mapped.len();
                if !fits {
                    wrong.push(format!("{pfn:?} is mapped by {mapped:?}"));
                }
            }
        }
    }
    wrong
}
