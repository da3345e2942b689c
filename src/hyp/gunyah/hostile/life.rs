//! VMs that come and go.

use super::super::World;
use super::super::rm::message::{AclEntry, Create, Request, SglEntry, Transfer};
use super::super::rm::vm::{Image, VmState};
use super::super::rm::{Vmid, create};
use super::Step;
use super::vms::{GUESTS, NR_RAM, PAGE, RAM, Vms};
use super::wire::encode;
use crate::hyp::choices::Choices;

impl Vms {
    pub(super) fn life(&mut self, choices: &mut Choices<'_>) -> Step {
        let mut vmid = choices.of(&GUESTS);
        if !choices.one_in(3) {
            vmid = self.on_its_way().unwrap_or(vmid);
        }
        let client = if choices.one_in(12) { GUESTS[0] } else { Vmid::HLOS };
        let state = self.gunyah.with(|world| world.rm.vms.get(&vmid).map(|vm| vm.state));
        let choice = match choices.one_in(8) {
            true => choices.of(&[0, 1, 2, 3, 4, 6, 8, 9]),
            false => match state {
                None => 0,
                Some(VmState::Load) => 1,
                Some(VmState::Auth) => 2,
                Some(VmState::Init) => 3,
                Some(VmState::Ready) => 4,
                Some(VmState::Running) => choices.of(&[4, 4, 4, 4, 4, 4, 5, 7]),
                Some(VmState::Paused) => 6,
                Some(VmState::Exited | VmState::InitFailed) => 8,
                Some(VmState::Resetting) => 9,
                Some(VmState::Reset) => 10,
            },
        };
        let fits = self.image_for(vmid);
        if choice == 1 && fits.is_none() && !choices.one_in(6) {
            return self.lend_image(choices, vmid);
        }
        let handle = fits.unwrap_or_else(|| self.handle_of(choices));
        let ipa = choices.below(64) * PAGE;
        let image = Image { handle, ipa, unsanitized: choices.one_in(2) };
        let auth = choices.of(&[0, 1, 2, 3]);
        let answer = self.gunyah.with(|World { hyp, rm, .. }| match choice {
            0 => rm.allocate(client, vmid).map(drop),
            1 => rm.config_image(hyp, client, vmid, auth, image),
            2 => rm.auth_image(client, vmid, auth != 0),
            3 => rm.init_vm(hyp, client, vmid),
            4 => rm.start_vm(client, vmid),
            5 => rm.pause_vm(client, vmid, true),
            6 => rm.pause_vm(client, vmid, false),
            7 => rm.stop_vm(client, vmid),
            8 => rm.reset_vm(client, vmid),
            9 => rm.reset_step(hyp, vmid).map(drop),
            _ => rm.deallocate(client, vmid),
        });
        if choice == 3 {
            // The resource manager accepts for the VM, and may want it cleared.
            let noted = self.gunyah.with(|world| {
                world
                    .rm
                    .parcels
                    .iter()
                    .map(|(&handle, parcel)| (handle, parcel.sanitize_reclaim))
                    .collect::<Vec<_>>()
            });
            for (handle, noted) in noted {
                if noted {
                    self.wishes.insert(handle, Some(true));
                }
            }
        }
        let what = format!("life {choice} {:?}", answer.err());
        Step { refused: answer.is_err(), ..Step::named(what) }
    }

    /// A guest that is being made, or taken apart.
    fn on_its_way(&self) -> Option<Vmid> {
        let stays = [VmState::Running, VmState::Paused];
        self.gunyah.with(|world| {
            let mut all = world.rm.vms.iter().filter(|(vmid, _)| GUESTS.contains(vmid));
            all.find(|(_, vm)| !stays.contains(&vm.state)).map(|(&vmid, _)| vmid)
        })
    }

    /// A parcel that a VM can begin with.
    fn image_for(&self, vmid: Vmid) -> Option<u32> {
        self.gunyah.with(|world| {
            let mut all = world.rm.parcels.iter();
            let found = all.find(|(_, parcel)| {
                parcel.transfer == Transfer::Lend
                    && parcel.label == 0
                    && parcel.members.len() == 1
                    && (parcel.members[0].vmid, parcel.members[0].rights) == (vmid, 7)
            });
            found.map(|(&handle, _)| handle)
        })
    }

    fn lend_image(&mut self, choices: &mut Choices<'_>, vmid: Vmid) -> Step {
        let ipa = (RAM + choices.below(NR_RAM)) * PAGE;
        let (id, body) = encode(&Request::Create(Create {
            transfer: Transfer::Lend,
            mem_type: 0,
            flags: choices.of(&[0, create::SANITIZE]),
            label: 0,
            acl: vec![AclEntry { vmid, rights: 7 }],
            sgl: vec![SglEntry { ipa, size: PAGE }],
            attrs: Vec::new(),
        }));
        self.send(Vmid::HLOS, id, &body)
    }
}
