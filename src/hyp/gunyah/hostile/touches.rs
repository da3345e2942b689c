//! Loads and stores, by every way to memory.

use super::super::World;
use super::super::rm::Vmid;
use super::super::touch::Bytes;
use super::Step;
use super::judge::{Zeroed, behind};
use super::messages::ipa_of;
use super::vms::{GUESTS, NR_RAM, PAGE, RAM, Vms};
use crate::addr::{Gfn, Ipa};
use crate::hyp::choices::Choices;

impl Vms {
    /// Where a VM has something, mostly.
    fn place_of(&self, choices: &mut Choices<'_>, vmid: Vmid) -> u64 {
        let mapped = self.gunyah.with(|world: &mut World| {
            let home = world.rm.vms.get(&vmid).and_then(|vm| vm.home);
            let mut found = Vec::new();
            if let Some(space) = home.and_then(|home| world.hyp.aspaces.get(&home.aspace)) {
                space.tree.visit(|gfn, _, _| found.push(gfn));
            }
            found
        });
        match mapped.is_empty() || choices.one_in(4) {
            true => ipa_of(choices),
            false => {
                let at: Gfn = mapped[usize::from(choices.byte()) % mapped.len()];
                at.ipa().get() + choices.of(&[0, 0, 0, PAGE, 4092])
            }
        }
    }

    pub(super) fn touch(&self, choices: &mut Choices<'_>, nth: u64) -> Step {
        let vmid = choices.of(&[Vmid::HLOS, GUESTS[0], GUESTS[1], GUESTS[2]]);
        let at = Ipa::new(
            self.place_of(choices, vmid) & if choices.one_in(8) { u64::MAX } else { !0xfff },
        );
        let value = (u64::from(vmid.0) << 32) | (nth + 1);
        let store = value.to_le_bytes();
        let mut load = [0; 8];
        let is_load = choices.one_in(3);
        let bytes = if is_load { Bytes::Load(&mut load) } else { Bytes::Store(&store) };
        let behind = self.gunyah.with(|world| behind(world, vmid, at));
        let done = match (vmid, choices.below(3)) {
            (Vmid::HLOS, 0) => self.gunyah.user(at, bytes).is_ok(),
            (Vmid::HLOS, 1) => self.gunyah.uaccess(at, bytes).is_ok(),
            _ => self.gunyah.vcpu(vmid, at, bytes).is_ok(),
        };
        let is_head = at.in_page().get() == 0;
        let stored =
            behind.filter(|at| done && !is_load && is_head && at.pfn().get() < RAM + NR_RAM);
        let stored = stored.filter(|at| at.pfn().get() >= RAM);
        // What is stored elsewhere in the page, heads do not show.
        let zeroed = stored.map_or(Zeroed::None, |at| Zeroed::Stored(at.pfn(), value));
        let taint = stored.map(|at| (at.pfn(), vmid)).into_iter().collect();
        Step { zeroed, taint, ..Step::named(format!("touch {done}")) }
    }
}
