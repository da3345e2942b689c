//! VMs, vCPUs, and what EL2 was given for them.

use std::collections::{BTreeMap, BTreeSet};

use super::super::State;
use super::View;
use crate::addr::Pfn;

/// 29: no page stays behind. Everything that EL2 owns is its carve-out or the firmware, or a VM's, a vCPU's, or a table's; or
/// broken.
pub(super) fn what_el2_owns_is_used(view: &View<'_>) -> Vec<String> {
    let mut used: BTreeSet<Pfn> = view.carveout.iter().collect();
    used.extend(view.host.firmware.iter());
    for entry in view.vms.live() {
        used.extend(entry.frames());
        used.extend(entry.resting().flat_map(|vcpu| vcpu.frames()));
    }
    for guest in view.guests {
        used.extend(guest.mmu.tree.table_frames());
        used.extend(&guest.mmu.pool);
    }
    let loaded = view.cpus.iter().filter_map(|cpu| cpu.loaded.as_ref());
    used.extend(loaded.flat_map(|loaded| loaded.vcpu.frames()));
    let owned = view.host.pages.touched().filter(|(_, page)| page.hyp() == State::Owned);
    let owned: BTreeSet<_> = owned.map(|(pfn, _)| pfn).collect();
    let left = owned.difference(&used).filter(|&&pfn| !view.is_orphan(pfn));
    let left = left.map(|pfn| format!("EL2 owns {pfn:?} for nothing"));
    let lost =
        used.difference(&owned).map(|pfn| format!("EL2 uses {pfn:?}, and it is not its own"));
    left.chain(lost).collect()
}

/// 32.
pub(super) fn vcpus_are_loaded_once(view: &View<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut loaded = BTreeMap::new();
    for (nr, cpu) in view.cpus.iter().enumerate() {
        if let Some(here) = &cpu.loaded {
            if let Some(other) = loaded.insert((here.vm.handle, here.vcpu.idx), nr) {
                wrong.push(format!("CPUs {other} and {nr} have the same vCPU"));
            }
        }
    }
    for entry in view.vms.live() {
        let handle = entry.vm.handle;
        let mut nr = 0;
        for (idx, cpu) in entry.loaded_on() {
            nr += 1;
            if loaded.remove(&(handle, idx)) != Some(cpu) {
                wrong.push(format!("vCPU {idx} of {handle:#x} is not on CPU {cpu}"));
            }
        }
        if entry.nr_refs != nr || nr > 0 && entry.dying {
            wrong.push(format!("{handle:#x} has {} references, {nr} loaded", entry.nr_refs));
        }
    }
    wrong.extend(loaded.keys().map(|vcpu| format!("{vcpu:x?} is loaded, and nobody's")));
    wrong
}

/// 34: what EL2 reads stays pinned as long as it does.
pub(super) fn pins_have_reasons(view: &View<'_>) -> Vec<String> {
    let mut reasons = BTreeMap::<Pfn, u32>::new();
    let loaded = view.cpus.iter().filter_map(|cpu| cpu.loaded.as_ref());
    let loaded = loaded.map(|loaded| loaded.vcpu.pinned());
    let resting = view.vms.live().flat_map(|entry| entry.resting()).map(|vcpu| vcpu.pinned());
    let vms = view.vms.live().map(|entry| entry.pinned());
    for pfn in loaded.chain(resting).chain(vms).flat_map(|pages| pages.iter()) {
        *reasons.entry(pfn).or_default() += 1;
    }
    let short = |(pfn, nr): (Pfn, u32)| {
        let pins = u32::from(view.host.page(pfn).nr_pins);
        (pins < nr).then(|| format!("{pfn:?} is pinned {pins} times, and needed {nr} times"))
    };
    reasons.into_iter().filter_map(short).collect()
}
