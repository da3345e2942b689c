//! The host and three guests, which know what there is and mostly name it.

use std::collections::BTreeMap;

use super::super::aspace::BbmLevel;
use super::super::error::RmError;
use super::super::machine::{Bank, Machine};
use super::super::rm::message::{
    ACCEPT, APPEND, Accept, AclEntry, AttrEntry, Create, DONATE, Request, SglEntry, Transfer,
};
use super::super::rm::vm::{Image, VmState};
use super::super::rm::{Fate, Vmid, accept, create};
use super::super::touch::Bytes;
use super::super::{Gunyah, World};
use super::judge::{Snapshot, Taint, Zeroed, behind, bytes_are_right, frames};
use super::wire::encode;
use super::{Choices, Flaw};
use crate::addr::{Gfn, Ipa, Pfn};
use crate::backing::Arena;
use crate::range::PfnRange;

const RAM: u64 = 0x2000;
const NR_RAM: u64 = 0x60;
const DEVICE: u64 = 0x9000;
const NR_DEVICE: u64 = 4;
const NR_HEAP: u64 = 0x60;
const GUESTS: [Vmid; 3] = [Vmid(0x80), Vmid(0x81), Vmid(0x82)];
const PAGE: u64 = 4096;
const MOST_STEPS: u64 = 400;

/// How often each kind of step was answered how, and how often a secret came to light in the one way it can.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    pub(crate) answers: BTreeMap<String, u64>,
    pub(crate) nr_leaks: u64,
}

/// What a step was, as far as it matters to what may have changed.
struct Step {
    what: String,
    refused: bool,
    zeroed: Zeroed,
    taint: Vec<(Pfn, Vmid)>,
}

struct Vms {
    gunyah: Gunyah,
    /// Parcels that somebody wants cleared; `None` if an accept was refused on the way.
    wishes: BTreeMap<u32, Option<bool>>,
}

fn boot() -> Gunyah {
    let range = |start, nr| PfnRange::new(Pfn::new(start), nr).unwrap();
    let banks = vec![Bank { frames: range(RAM, NR_RAM), bytes: Some(Pfn::new(0)) }];
    let arena = Arena::heap(NR_RAM).unwrap();
    let machine =
        Machine::new(banks, range(DEVICE, NR_DEVICE), range(0x100, NR_HEAP), Some(arena)).unwrap();
    let gunyah = Gunyah::boot(machine, BbmLevel::Zero, Fate::Lost).unwrap();
    // Two guests run already.
    for (vmid, page) in GUESTS.into_iter().zip([RAM + NR_RAM - 1, RAM + NR_RAM - 2]).take(2) {
        let create = Create {
            transfer: Transfer::Lend,
            mem_type: 0,
            flags: 0,
            label: 0,
            acl: vec![AclEntry { vmid, rights: 7 }],
            sgl: vec![SglEntry { ipa: page * PAGE, size: PAGE }],
            attrs: Vec::new(),
        };
        let (id, body) = encode(&Request::Create(create));
        let reply = gunyah.message(Vmid::HLOS, id, &body).body;
        let handle = u32::from_le_bytes(reply.try_into().unwrap());
        let image = Image { handle, ipa: 0x80 * PAGE, unsanitized: true };
        gunyah.with(|World { hyp, rm, .. }| {
            rm.allocate(Vmid::HLOS, vmid).unwrap();
            rm.config_image(hyp, Vmid::HLOS, vmid, 0, image).unwrap();
            rm.init_vm(hyp, Vmid::HLOS, vmid).unwrap();
            rm.start_vm(Vmid::HLOS, vmid).unwrap();
        });
    }
    gunyah
}

/// Does what the bytes say.
///
/// # Errors
/// The first step after which something was wrong, and what.
pub(crate) fn run(bytes: &[u8], flaw: Option<Flaw>) -> Result<Coverage, String> {
    let choices = &mut Choices(bytes);
    let mut vms = Vms { gunyah: boot(), wishes: BTreeMap::new() };
    let mut taint = Taint::default();
    let mut coverage = Coverage::default();
    let snapshot = |vms: &Vms| vms.gunyah.with(|world| Snapshot::of(world));
    let mut before = snapshot(&vms);
    for nth in 0..MOST_STEPS {
        if choices.0.is_empty() {
            break;
        }
        let step = vms.step(choices, nth);
        if let Some(flaw) = flaw {
            vms.gunyah.with(|world| flaw.spoil(world, &before, step.refused));
        }
        let after = snapshot(&vms);
        let changed = step.refused.then(|| before.difference(&after)).flatten();
        let wrong = changed
            .or_else(|| bytes_are_right(&before, &after, &step.zeroed))
            .or_else(|| vms.gunyah.with(|world| world.check().into_iter().next()));
        if let Some(wrong) = wrong {
            return Err(format!("step {nth}, {}: {wrong}", step.what));
        }
        if let Zeroed::Exactly(frames) = &step.zeroed {
            taint.clear(frames);
        }
        for &(pfn, vmid) in &step.taint {
            taint.store(pfn, vmid);
        }
        coverage.nr_leaks += returned(&before, &after, &taint, &step.zeroed)?;
        *coverage.answers.entry(step.what).or_default() += 1;
        before = after;
    }
    Ok(coverage)
}

/// Frames that went back to their owner with what a borrower wrote: never if anybody asked for zeroes.
fn returned(
    before: &Snapshot,
    after: &Snapshot,
    taint: &Taint,
    zeroed: &Zeroed,
) -> Result<u64, String> {
    let mut nr = 0;
    for (handle, parcel) in &before.parcels {
        if after.parcels.contains_key(handle) || parcel.transfer != Transfer::Lend {
            continue;
        }
        let leaked = frames(parcel).filter(|&pfn| taint.is_of_other(pfn, parcel.owner)).count();
        if leaked > 0 && matches!(zeroed, Zeroed::Exactly(_)) {
            return Err(format!("parcel {handle} was cleared, and is tainted"));
        }
        nr += leaked as u64;
    }
    Ok(nr)
}

fn ipa_of(choices: &mut Choices<'_>) -> u64 {
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
        nth => [7, 7, 7, 7, 6, 6, 4, 5, 7][nth as usize - 1],
    }
}

fn sgl_of(choices: &mut Choices<'_>) -> Vec<SglEntry> {
    let nr = choices.of(&[1, 1, 1, 2, 3, 0]);
    (0..nr).map(|_| SglEntry { ipa: ipa_of(choices), size: size_of(choices) }).collect()
}

impl Vms {
    fn handle_of(&self, choices: &mut Choices<'_>) -> u32 {
        let all: Vec<u32> = self.gunyah.with(|world| world.rm.parcels.keys().copied().collect());
        match choices.one_in(12) || all.is_empty() {
            true => choices.of(&[0, 1, 999, u32::MAX]),
            false => choices.of(&all),
        }
    }

    fn create_of(&self, choices: &mut Choices<'_>, from: Vmid) -> Create {
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
        Create { transfer, mem_type, flags, label: choices.below(2) as u32, acl, sgl, attrs }
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
            label: choices.below(2) as u32,
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
        let handle = self.handle_of(choices);
        let flags = choices.of(&[0, 0, 1]);
        let kind = choices.below(16);
        let mut from = self.usual_sender(choices, kind, handle);
        if choices.one_in(8) {
            from = choices.of(&[Vmid::HLOS, GUESTS[0], GUESTS[1], GUESTS[2]]);
        }
        let request = match kind {
            0..=4 => Request::Create(self.create_of(choices, from)),
            5..=8 => Request::Accept(self.accept_of(choices, handle)),
            9 | 10 => Request::Release { handle, flags },
            11..=13 => Request::Reclaim { handle, flags },
            14 => Request::Append { handle, flags, sgl: sgl_of(choices) },
            _ => {
                let mut list = vec![choices.of(&[1, 1, 2, 0]), 0, 0, 0];
                list.extend(vmid_of(choices).0.to_le_bytes());
                list.extend([0; 2]);
                let flags = choices.of(&[1, 2, 4, 8, 3]);
                Request::Notify { handle, flags, tag: choices.below(2) as u32, list }
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
            3 => id = choices.odd() as u32,
            4 => body = (0..choices.byte()).map(|_| choices.byte()).collect(),
            _ => {}
        }
        (from, id, body)
    }

    fn step(&mut self, choices: &mut Choices<'_>, nth: u64) -> Step {
        match choices.below(16) {
            0..=9 => self.message(choices),
            10..=14 => self.touch(choices, nth),
            _ => self.life(choices),
        }
    }

    fn message(&mut self, choices: &mut Choices<'_>) -> Step {
        let (from, id, body) = self.message_of(choices);
        let before = self.gunyah.with(|world| world.rm.parcels.clone());
        let reply = self.gunyah.message(from, id, &body);
        let after = self.gunyah.with(|world| world.rm.parcels.clone());
        let what = format!("{id:#x} {:?}", reply.error);
        let flags = |at: usize| body.get(at).copied().unwrap_or(0);
        let handle = body.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let mut zeroed = Zeroed::None;
        match (id, reply.error) {
            (DONATE..=0x5100_0013, Some(_)) if id != ACCEPT && flags(2) & 1 != 0 => {
                zeroed = Zeroed::Some;
            }
            (DONATE..=0x5100_0013, None) if id != ACCEPT => {
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
            (0x5100_0014, None) if flags(4) & 1 != 0 => {
                self.wishes.insert(handle, Some(true));
            }
            (0x5100_0015, None) => {
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
            (0x5100_0015, Some(RmError::NoMem)) => zeroed = Zeroed::Some,
            _ => {}
        }
        Step { what, refused: reply.error.is_some(), zeroed, taint: Vec::new() }
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

    fn touch(&self, choices: &mut Choices<'_>, nth: u64) -> Step {
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
        Step { what: format!("touch {done}"), refused: true, zeroed, taint }
    }

    fn life(&mut self, choices: &mut Choices<'_>) -> Step {
        let vmid = choices.of(&GUESTS);
        let client = if choices.one_in(12) { GUESTS[0] } else { Vmid::HLOS };
        let state = self.gunyah.with(|world| world.rm.vms.get(&vmid).map(|vm| vm.state));
        let choice = match choices.one_in(5) {
            true => choices.below(10),
            false => match state {
                None => 0,
                Some(VmState::Load) => 1,
                Some(VmState::Auth) => 2,
                Some(VmState::Init) => 3,
                Some(VmState::Ready) => 4,
                Some(VmState::Running) => choices.of(&[4, 4, 4, 5, 7]),
                Some(VmState::Paused) => 6,
                Some(VmState::Exited | VmState::InitFailed) => 8,
                Some(VmState::Resetting) => 9,
                Some(VmState::Reset) => 10,
            },
        };
        let image = self.image_for(choices, vmid, choice == 1);
        let auth = choices.below(4) as u32;
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
        Step {
            what: format!("life {choice} {:?}", answer.err()),
            refused: answer.is_err(),
            zeroed: Zeroed::None,
            taint: Vec::new(),
        }
    }

    /// A parcel that a VM can begin with, if it is to.
    fn image_for(&mut self, choices: &mut Choices<'_>, vmid: Vmid, wanted: bool) -> Image {
        let unsanitized = choices.one_in(2);
        let fits = self.gunyah.with(|world| {
            let mut all = world.rm.parcels.iter();
            let found = all.find(|(_, parcel)| {
                parcel.transfer == Transfer::Lend
                    && parcel.label == 0
                    && parcel.members.len() == 1
                    && parcel.members[0].vmid == vmid
            });
            found.map(|(&handle, _)| handle)
        });
        let handle = match fits {
            Some(handle) => handle,
            None if wanted => self.handle_of(choices),
            None => 0,
        };
        Image { handle, ipa: choices.below(64) * PAGE, unsanitized }
    }
}
