//! The rules about single operations, by name: what one step may lead to. Those about what stands still are in
//! `invariants`.

use super::super::rm::Vmid;
use super::super::rm::message::Transfer;
use super::super::rm::vm::VmState;
use super::Step;
use super::judge::{Snapshot, bytes_are_right};
use crate::addr::{Gfn, Pfn};

/// A step, and everything before and after it.
pub(super) struct Change<'a> {
    pub(super) before: &'a Snapshot,
    pub(super) after: &'a Snapshot,
    pub(super) step: &'a Step,
}

type Rule = fn(&Change<'_>) -> Option<String>;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("46 what is reclaimed only its owner has, where it had it", reclaimed_is_the_owners),
    ("47 what is to be cleared is, and nothing else", zeroes_where_they_were_asked_for),
    ("50 what is refused changes nothing", refused_changes_nothing),
    ("51 VMs go from state to state as they may", states_follow_each_other),
];

/// What is wrong with a step, and the rule's name.
pub(super) fn check(change: &Change<'_>) -> Option<String> {
    RULES.iter().find_map(|(name, rule)| Some(format!("{name}: {}", rule(change)?)))
}

/// A gift goes another way: its parcel is gone when it is taken.
fn reclaimed_is_the_owners(change: &Change<'_>) -> Option<String> {
    let is_gone = |handle: &u32| !change.after.parcels.contains_key(handle);
    let gone = change.before.parcels.iter().filter(|(handle, _)| is_gone(handle));
    for (handle, parcel) in gone.filter(|(_, parcel)| parcel.transfer != Transfer::Donate) {
        if parcel.share_count != 0 {
            return Some(format!("parcel {handle} went while {} had it", parcel.share_count));
        }
        let home = change.after.homes.get(&parcel.owner).copied().flatten();
        let Some(home) = home.filter(|_| parcel.owner == Vmid::HLOS) else { continue };
        for region in &parcel.regions {
            for nth in 0..region.nr {
                let pfn = Pfn::new(region.pfn.get() + nth);
                let at = Gfn::new(region.owner_gfn.get() + nth);
                let has = change.after.mapped.get(&pfn).map_or(&[][..], Vec::as_slice);
                let is_there = match has {
                    [one] => one.aspace == home.aspace && one.gfn == at,
                    _ => false,
                };
                if !is_there {
                    return Some(format!("{pfn:?} came back to {has:?}, not to {at:?}"));
                }
            }
        }
    }
    None
}

fn zeroes_where_they_were_asked_for(change: &Change<'_>) -> Option<String> {
    bytes_are_right(change.before, change.after, &change.step.zeroed)
}

fn refused_changes_nothing(change: &Change<'_>) -> Option<String> {
    let changed = change.step.refused.then(|| change.before.difference(change.after)).flatten();
    changed.or_else(|| change.before.difference_outside(change.after, change.step.within.as_ref()?))
}

/// One step is one call, and that leads one state on at most.
fn states_follow_each_other(change: &Change<'_>) -> Option<String> {
    let (before, after) = (&change.before.states, &change.after.states);
    for (vmid, &was) in before {
        let fits = match after.get(vmid) {
            Some(&is) => is == was || was.leads_to(is),
            None => matches!(was, VmState::Load | VmState::Reset),
        };
        if !fits {
            return Some(format!("{vmid:?} was {was:?} and is {:?}", after.get(vmid)));
        }
    }
    let new = after.iter().find(|(vmid, is)| !before.contains_key(vmid) && **is != VmState::Load);
    new.map(|(vmid, is)| format!("{vmid:?} is new, and {is:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::vms::{GUESTS, Vms};
    use super::*;

    #[test]
    fn each_rule_notices_what_it_is_about() {
        let before = Vms::boot().unwrap().snapshot();
        let told = |spoil: fn(&mut Snapshot)| {
            let mut after = before.clone();
            spoil(&mut after);
            let step = Step::named("nothing".into());
            check(&Change { before: &before, after: &after, step: &step })
        };
        assert_eq!(told(|_| ()), None);
        type Spoil = fn(&mut Snapshot);
        let ways: [(&str, Spoil); 4] = [
            ("46 ", |after| after.parcels.clear()),
            ("47 ", |after| *after.heads.values_mut().next().unwrap() += 1),
            ("50 ", |after| after.mapped.clear()),
            ("51 ", |after| *after.states.get_mut(&GUESTS[0]).unwrap() = VmState::Reset),
        ];
        for (name, spoil) in ways {
            let told = told(spoil).expect(name);
            assert!(told.starts_with(name), "{told}");
        }
    }
}
