//! Who wrote what is in a frame, and who was given it: what one VM wrote reaches another only by a share, a loan or a
//! gift; or by the one known way, a borrower's bytes that come back to the owner when nobody asked for zeroes.

use std::collections::{BTreeMap, BTreeSet};

use super::super::attrs::Access;
use super::super::memdb::Owner;
use super::super::rm::Vmid;
use super::judge::{Snapshot, frames};
use crate::addr::Pfn;

/// What a VM wrote: a number that nobody else writes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    value: u64,
    by: Vmid,
    /// Who may know it.
    given: BTreeSet<Vmid>,
}

#[derive(Debug, Default)]
pub(crate) struct Taint {
    written: BTreeMap<Pfn, Written>,
    /// Pages that came back to their owner with what a borrower wrote.
    pub(crate) nr_returned: u64,
}

impl Taint {
    /// Whoever has the parcel that a frame is in is given what is stored there.
    pub(crate) fn store(&mut self, pfn: Pfn, value: u64, by: Vmid, now: &Snapshot) {
        let mut given = BTreeSet::from([by]);
        for parcel in now.parcels.values().filter(|parcel| frames(parcel).any(|of| of == pfn)) {
            given.extend(parcel.members.iter().map(|member| member.vmid));
        }
        self.written.insert(pfn, Written { value, by, given });
    }

    /// The host provides a VM with frames.
    pub(crate) fn provide(&mut self, frames: impl Iterator<Item = Pfn>, to: Vmid) {
        for pfn in frames {
            if let Some(written) = self.written.get_mut(&pfn) {
                written.given.insert(to);
            }
        }
    }

    pub(crate) fn clear(&mut self, frames: &[Pfn]) {
        for pfn in frames {
            self.written.remove(pfn);
        }
    }

    /// Somebody was refused, and some frames are cleared all the same.
    pub(crate) fn forget_zeroes(&mut self, before: &Snapshot, after: &Snapshot) {
        self.written.retain(|pfn, _| before.heads.get(pfn) == after.heads.get(pfn));
    }

    /// What a VM has read.
    ///
    /// # Errors
    /// If it is not what was written there last, was to be zeroes, or was not given to it.
    pub(crate) fn load(&self, pfn: Pfn, value: u64, by: Vmid) -> Result<(), String> {
        let written = self.written.get(&pfn);
        match written {
            None if value == 0 => Ok(()),
            Some(written) if written.value == value && written.given.contains(&by) => Ok(()),
            _ => Err(format!("{by:?} reads {value:#x} in {pfn:?}, which has {written:x?}")),
        }
    }

    /// What a step has made of who knows what.
    ///
    /// # Errors
    /// If somebody has what was not given to them.
    pub(crate) fn moved(&mut self, before: &Snapshot, after: &Snapshot) -> Result<(), String> {
        self.new_vms(before, after);
        for (handle, parcel) in &before.parcels {
            if after.parcels.contains_key(handle) {
                continue;
            }
            for pfn in frames(parcel) {
                let Some(written) = self.written.get_mut(&pfn) else { continue };
                let Some(holder) = after.holder(pfn) else { continue };
                if written.given.contains(&holder) {
                    continue;
                }
                if holder != parcel.owner {
                    return Err(format!(
                        "{pfn:?} of {parcel:?} is {holder:?}'s, with {written:x?}"
                    ));
                }
                self.nr_returned += 1;
                written.given.insert(holder);
            }
        }
        for parcel in after.parcels.values() {
            for pfn in frames(parcel) {
                if let Some(written) = self.written.get_mut(&pfn) {
                    written.given.extend(parcel.members.iter().map(|member| member.vmid));
                }
            }
        }
        self.look(after)
    }

    /// A number that is used again is another VM's.
    fn new_vms(&mut self, before: &Snapshot, after: &Snapshot) {
        for vmid in after.homes.keys().filter(|vmid| !before.homes.contains_key(vmid)) {
            for written in self.written.values_mut() {
                written.given.remove(vmid);
            }
        }
    }

    /// Whether all who can read a frame may.
    fn look(&self, now: &Snapshot) -> Result<(), String> {
        for (pfn, written) in &self.written {
            for page in now.mapped.get(pfn).into_iter().flatten() {
                let mut homes = now.homes.iter();
                let of = |(_, home): &(&Vmid, &Option<_>)| {
                    home.is_some_and(|home: super::super::rm::vm::Home| home.aspace == page.aspace)
                };
                let reader = homes.find(of).map(|(&vmid, _)| vmid);
                let may = reader.is_some_and(|vmid| written.given.contains(&vmid));
                if page.access.covers(Access::R) && !may {
                    return Err(format!("{reader:?} can read {written:x?} in {pfn:?}"));
                }
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// The VM that has a frame for its own.
    fn holder(&self, pfn: Pfn) -> Option<Vmid> {
        let owner = self.owners.iter().find(|(of, _)| *of == pfn).map(|&(_, owner)| owner)?;
        let mut homes = self.homes.iter().filter_map(|(&vmid, home)| Some((vmid, (*home)?)));
        let has = |id| owner == Owner::Extent(id);
        homes.find(|(_, home)| has(home.memory) || has(home.device)).map(|(vmid, _)| vmid)
    }
}
