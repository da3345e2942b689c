//! Loads and stores, by every way to memory.

use super::super::World;
use super::super::rm::Vmid;
use super::super::touch::Bytes;
use super::judge::{Zeroed, behind};
use super::messages::ipa_of;
use super::vms::{GUESTS, NR_PAGED, PAGE, PAGED, RAM, Vms};
use super::{Step, Touched};
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
        let place = self.place_of(choices, vmid);
        // At the head of a page or elsewhere, but not across it.
        let at = Ipa::new(place & if choices.one_in(8) { !7 } else { !0xfff });
        let token = (u64::from(vmid.0) << 32) | (nth + 1);
        let store = token.to_le_bytes();
        let mut load = [0; 8];
        let is_load = choices.one_in(2);
        let bytes = if is_load { Bytes::Load(&mut load) } else { Bytes::Store(&store) };
        let behind = self.gunyah.with(|world| behind(world, vmid, at));
        let done = match (vmid, choices.below(3)) {
            (Vmid::HLOS, 0) => self.gunyah.user(at, bytes).is_ok(),
            (Vmid::HLOS, 1) => self.gunyah.uaccess(at, bytes).is_ok(),
            _ => self.gunyah.vcpu(vmid, at, bytes).is_ok(),
        };
        let is_head = at.in_page().get() == 0;
        let memory = RAM..PAGED + NR_PAGED + 1;
        let touched = behind.filter(|at| done && is_head && memory.contains(&at.pfn().get()));
        let touched = touched.map(|at| {
            let value = if is_load { u64::from_le_bytes(load) } else { token };
            Touched { pfn: at.pfn(), by: vmid, value, is_load }
        });
        // What is stored elsewhere in the page, heads do not show.
        let zeroed = match touched {
            Some(Touched { pfn, value, is_load: false, .. }) => Zeroed::Stored(pfn, value),
            _ => Zeroed::None,
        };
        Step { zeroed, touched, ..Step::named(format!("touch {done}")) }
    }
}
