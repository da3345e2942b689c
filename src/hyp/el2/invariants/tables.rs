//! The trees themselves, and what is remembered of them.

use super::super::State;
use super::View;
use crate::addr::Gfn;

/// 19: no TLB has what the tables do not say. The right to write is excepted: the host takes it from guests that are not
/// protected, and asks for that to be forgotten afterwards.
pub(super) fn no_translation_is_stale(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (gfn, to) in view.host.tlbs.remembered() {
        let found = view.host.tree.translate(gfn).map(|(pfn, _)| pfn);
        if found != Some(to.pfn) || view.host.page(to.pfn).host() == State::NoPage {
            wrong.push(format!("a CPU remembers {gfn:?} at {to:?}; the table has {found:?}"));
        }
    }
    for guest in view.guests {
        for (gfn, to) in guest.mmu.tlbs.remembered() {
            let found = guest.mmu.tree.translate(gfn).map(|(pfn, _)| pfn);
            if found != Some(to.pfn) {
                let handle = guest.handle;
                wrong.push(format!("a vCPU of {handle:#x} remembers {gfn:?} at {to:?}: {found:?}"));
            }
        }
    }
    wrong
}

/// 33: references are entries and one; what is a table, or waits to be one, is EL2's, and the host cannot reach it.
pub(super) fn tables_are_sound(view: &View<'_>) -> Vec<String> {
    let mut wrong = view.host.tree.check();
    let mut frames: Vec<_> = view.host.tree.table_frames().collect();
    for guest in view.guests {
        wrong.extend(guest.mmu.tree.check());
        frames.extend(guest.mmu.tree.table_frames());
        frames.extend(&guest.mmu.pool);
    }
    let loaded = view.cpus.iter().filter_map(|cpu| cpu.loaded.as_ref());
    let loaded = loaded.map(|loaded| &*loaded.vcpu);
    let vcpus = view.vms.live().flat_map(|entry| entry.resting()).chain(loaded);
    frames.extend(vcpus.flat_map(|vcpu| vcpu.memcache.iter().copied()));
    let nr = frames.len();
    frames.sort_unstable();
    frames.dedup();
    if frames.len() != nr {
        wrong.push(format!("{} frames are tables twice", nr - frames.len()));
    }
    for pfn in frames {
        let reached = view.host.tree.translate(Gfn::new(pfn.get())).is_some();
        if view.host.page(pfn).hyp() != State::Owned || reached {
            wrong.push(format!("{pfn:?} is a table, and not EL2's alone"));
        }
    }
    wrong
}
