//! Messages to the resource manager that could work, broken ones, and any bytes; and what each may change.

use super::super::error::RmError;
use super::super::rm::message::{
    ACCEPT, APPEND, Accept, AclEntry, AttrEntry, Create, DONATE, LEND, NOTIFY, RECLAIM, RELEASE,
    Request, SHARE, SglEntry, Transfer,
};
use super::super::rm::{ParcelState, Vmid, accept, create, notify};
use super::Step;
use super::judge::{Zeroed, frames};
use super::vms::{DEVICE, GUESTS, NR_DEVICE, PAGE, RAM, Vms};
use super::wire::encode;
use crate::addr::Pfn;
use crate::hyp::choices::Choices;

pub(super) fn ipa_of(choices: &mut Choices<'_>) -> u64 {
    match choices.below(16) {
        0 => choices.odd(),
        1 => (DEVICE + choices.below(NR_DEVICE)) * PAGE,
        2..=4 => choices.below(16) * PAGE,
        5 => (RAM + choices.below(0x40)) * PAGE,
        _ => (RAM + choices.below(24)) * PAGE,
    }
}

fn size_of(choices: &mut Choices<'_>) -> u64 {
    match choices.below(12) {
        0 => choices.odd(),
        1 => 0x10 * PAGE,
        _ => (1 + choices.below(4)) * PAGE,
    }
}

fn vmid_of(choices: &mut Choices<'_>) -> Vmid {
    match choices.below(12) {
        0 => Vmid(choices.of(&[0, 0xff, 4, 0x83, 0xbf, 0xc0, 0xffff])),
        1 => Vmid::HLOS,
        _ => choices.of(&GUESTS),
    }
}

fn rights_of(choices: &mut Choices<'_>) -> u8 {
    match choices.below(10) {
        0 => choices.byte(),
        _ => choices.of(&[7, 7, 7, 7, 6, 6, 4, 5]),
    }
}

fn sgl_of(choices: &mut Choices<'_>) -> Vec<SglEntry> {
    let nr = choices.of(&[1, 1, 1, 2, 3, 0]);
    (0..nr).map(|_| SglEntry { ipa: ipa_of(choices), size: size_of(choices) }).collect()
}

impl Vms {
    pub(super) fn handle_of(&self, choices: &mut Choices<'_>) -> u32 {
        let all: Vec<u32> = self.gunyah.with(|world| world.rm.parcels.keys().copied().collect());
        match choices.one_in(12) || all.is_empty() {
            true => choices.of(&[0, 1, 999, u32::MAX]),
            false => choices.of(&all),
        }
    }

    /// A parcel that can be appended to.
    fn incomplete(&self) -> Option<u32> {
        self.gunyah.with(|world| {
            let mut all = world.rm.parcels.iter();
            all.find(|(_, parcel)| parcel.state == ParcelState::Init).map(|(&handle, _)| handle)
        })
    }

    fn create_of(&self, choices: &mut Choices<'_>, from: Vmid) -> Create {
        if choices.one_in(6) {
            // What a VM can begin with.
            let acl = vec![AclEntry { vmid: choices.of(&GUESTS), rights: 7 }];
            let (sgl, flags) = (sgl_of(choices), choices.of(&[0, create::SANITIZE]));
            let attrs = Vec::new();
            let transfer = Transfer::Lend;
            return Create { transfer, mem_type: 0, flags, label: 0, acl, sgl, attrs };
        }
        let transfer =
            choices.of(&[Transfer::Lend, Transfer::Lend, Transfer::Share, Transfer::Donate]);
        let mut acl = vec![AclEntry { vmid: vmid_of(choices), rights: rights_of(choices) }];
        if choices.one_in(3) {
            acl.push(AclEntry { vmid: vmid_of(choices), rights: rights_of(choices) });
        }
        if transfer == Transfer::Share && !choices.one_in(8) {
            acl.push(AclEntry { vmid: from, rights: rights_of(choices) });
        }
        if transfer == Transfer::Donate && !choices.one_in(4) {
            acl.truncate(1);
            acl[0].rights = 7;
        }
        let mut sgl = sgl_of(choices);
        let mem_type = choices.of(&[0, 0, 0, 0, 0, 0, 1, 7]);
        if mem_type == 1 {
            sgl = vec![SglEntry { ipa: (DEVICE + choices.below(4)) * PAGE, size: PAGE }];
            acl.iter_mut().for_each(|entry| entry.rights &= choices.of(&[6, 6, 7]));
        }
        let attrs = match choices.one_in(6) {
            true => {
                let attr = choices.of(&[0, 1, 2, 3, 4]);
                vec![AttrEntry { attr, vmid: acl[0].vmid }]
            }
            false => Vec::new(),
        };
        let flags = choices.of(&[0, 0, 0, 1, 1, 2, 3]);
        Create { transfer, mem_type, flags, label: choices.of(&[0, 1]), acl, sgl, attrs }
    }

    fn accept_of(&self, choices: &mut Choices<'_>, handle: u32) -> Accept {
        let known = self.gunyah.with(|world| world.rm.parcels.get(&handle).cloned());
        let mut flags = choices.of(&[accept::DONE, accept::DONE, accept::DONE, 0]);
        for flag in [accept::SANITIZE, accept::MAP_CONTIGUOUS, accept::VALIDATE_LABEL] {
            flags |= if choices.one_in(4) { flag } else { 0 };
        }
        for flag in [accept::VALIDATE_ACL_ATTR, accept::VALIDATE_SANITIZED, accept::MAP_OTHER] {
            flags |= if choices.one_in(12) { flag } else { 0 };
        }
        let sgl = match choices.below(6) {
            0 => sgl_of(choices),
            1 => {
                let regions = known.iter().flat_map(|parcel| parcel.regions.iter());
                let at = choices.below(64) * PAGE;
                regions.map(|region| SglEntry { ipa: at, size: region.nr * PAGE }).collect()
            }
            _ => Vec::new(),
        };
        let told = |known: Option<u8>, choices: &mut Choices<'_>| match choices.one_in(16) {
            true => choices.byte(),
            false => known.unwrap_or(0),
        };
        Accept {
            handle,
            mem_type: told(known.as_ref().map(|parcel| parcel.mem_type), choices),
            transfer: told(known.as_ref().map(|parcel| parcel.transfer as u8), choices),
            flags,
            label: choices.of(&[0, 1]),
            acl: known
                .iter()
                .flat_map(|parcel| &parcel.members)
                .map(|member| AclEntry { vmid: member.vmid, rights: member.rights })
                .collect(),
            sgl,
            map_vmid: Vmid(if choices.one_in(20) { 3 } else { 0 }),
            attrs: known.map(|parcel| parcel.attrs).unwrap_or_default(),
        }
    }

    /// A message, and who sends it.
    fn message_of(&self, choices: &mut Choices<'_>) -> (Vmid, u32, Vec<u8>) {
        let mut handle = self.handle_of(choices);
        let flags = choices.of(&[0, 0, 1]);
        let kind = choices.below(16);
        if matches!(kind, 13 | 14) {
            handle = self.incomplete().unwrap_or(handle);
        }
        let mut from = self.usual_sender(choices, kind, handle);
        if choices.one_in(8) {
            from = choices.of(&[Vmid::HLOS, GUESTS[0], GUESTS[1], GUESTS[2]]);
        }
        let request = match kind {
            0..=4 => Request::Create(self.create_of(choices, from)),
            5..=8 => Request::Accept(self.accept_of(choices, handle)),
            9 | 10 => Request::Release { handle, flags },
            11 | 12 => Request::Reclaim { handle, flags },
            13 | 14 => Request::Append { handle, flags, sgl: sgl_of(choices) },
            _ => {
                let mut list = vec![choices.of(&[1, 1, 2, 0]), 0, 0, 0];
                list.extend(vmid_of(choices).0.to_le_bytes());
                list.extend([0; 2]);
                let flags = choices.of(&[1, 2, 4, 8, 3]);
                Request::Notify { handle, flags, tag: choices.of(&[0, 1]), list }
            }
        };
        let (mut id, mut body) = encode(&request);
        match choices.below(60) {
            0 => body.truncate(usize::from(choices.byte())),
            1 => body.extend([0; 3]),
            2 => {
                let at = usize::from(choices.byte()) % body.len();
                body[at] = choices.byte();
            }
            3 => id = choices.of(&[0, DONATE - 1, 0x5100_0016, APPEND + 1, 0x5110_0011, u32::MAX]),
            4 => body = (0..choices.byte()).map(|_| choices.byte()).collect(),
            _ => {}
        }
        (from, id, body)
    }

    pub(super) fn message(&mut self, choices: &mut Choices<'_>) -> Step {
        let (from, id, body) = self.message_of(choices);
        self.send(from, id, &body)
    }

    /// Sends it, and says what it may have changed.
    pub(super) fn send(&mut self, from: Vmid, id: u32, body: &[u8]) -> Step {
        let before = self.gunyah.with(|world| world.rm.parcels.clone());
        let reply = self.gunyah.message(from, id, body);
        let after = self.gunyah.with(|world| world.rm.parcels.clone());
        let what = format!("{id:#x} {:?}", reply.error);
        let flags = |at: usize| body.get(at).copied().unwrap_or(0);
        let handle = body.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let mut zeroed = Zeroed::None;
        let mut tagged = None;
        match (id, reply.error) {
            (NOTIFY, Some(RmError::MemInUse)) if flags(4) == notify::OF_SHARED => {
                // Somebody in the list is READY and has it: the others were told all the same.
                let tag = body.get(8..12).and_then(|tag| tag.first_chunk());
                tagged = tag.map(|tag| (handle, u32::from_le_bytes(*tag)));
            }
            (DONATE | LEND | SHARE, Some(_)) if flags(2) & create::SANITIZE != 0 => {
                zeroed = Zeroed::Some;
            }
            (DONATE | LEND | SHARE, None) => {
                let new = after.iter().find(|(handle, _)| !before.contains_key(handle));
                if let Some((&handle, parcel)) = new {
                    self.wishes.insert(handle, Some(false));
                    if flags(2) & create::SANITIZE != 0 {
                        zeroed = Zeroed::Exactly(frames(parcel).collect());
                    }
                }
            }
            (APPEND, answer) => {
                let old = before.get(&handle);
                if old.is_some_and(|parcel| parcel.sanitize_create) {
                    zeroed = Zeroed::Some;
                    if let (None, Some(now), Some(old)) = (answer, after.get(&handle), old) {
                        let new = frames(now).skip(frames(old).count());
                        zeroed = Zeroed::Exactly(new.collect());
                    }
                }
            }
            (ACCEPT, answer) if flags(6) & accept::SANITIZE != 0 => {
                let wish = self.wishes.entry(handle).or_insert(Some(false));
                match answer {
                    None => *wish = Some(true),
                    Some(_) if *wish != Some(true) => *wish = None,
                    Some(_) => {}
                }
            }
            (RELEASE, None) if flags(4) & 1 != 0 => {
                self.wishes.insert(handle, Some(true));
            }
            (RECLAIM, None) => {
                let wish = match flags(4) & 1 {
                    0 => self.wishes.get(&handle).copied().unwrap_or(Some(false)),
                    _ => Some(true),
                };
                let parcel = before.get(&handle);
                let all: Vec<Pfn> = parcel.into_iter().flat_map(frames).collect();
                // An accept that was refused may have noted the wish, or not: the parcel knows.
                let noted = parcel.is_some_and(|parcel| parcel.sanitize_reclaim);
                if wish.unwrap_or(noted) {
                    zeroed = Zeroed::Exactly(all);
                }
                self.wishes.remove(&handle);
            }
            (RECLAIM, Some(RmError::NoMem)) => zeroed = Zeroed::Some,
            _ => {}
        }
        Step { refused: reply.error.is_some(), zeroed, tagged, ..Step::named(what) }
    }

    /// Who would send such a message about a parcel.
    fn usual_sender(&self, choices: &mut Choices<'_>, kind: u64, handle: u32) -> Vmid {
        let parcel = self.gunyah.with(|world| world.rm.parcels.get(&handle).cloned());
        let Some(parcel) = parcel else { return Vmid::HLOS };
        let others = parcel.members.iter().map(|member| member.vmid);
        let others: Vec<_> = others.filter(|&vmid| vmid != parcel.owner).collect();
        match kind {
            0..=4 => Vmid::HLOS,
            5..=10 if !others.is_empty() => choices.of(&others),
            _ => parcel.owner,
        }
    }
}
