//! Parcels again, in the plainest way: told from what VMs ask and how they are answered, and apart from what the
//! resource manager keeps. It also says what a request must be answered, where parcels alone decide that: the checks of
//! each request as one list, of which the first that fails is the answer.
//!
//! In builds with debug assertions every request makes its step here as well and is compared at its end. In other builds
//! there is nothing here.

#[cfg(debug_assertions)]
use std::collections::BTreeMap;

use super::Vmid;
#[cfg(debug_assertions)]
use super::accept::{self, DONE, MAP_CONTIGUOUS, MAP_OTHER};
#[cfg(debug_assertions)]
use super::create::{self, addr_valid};
use super::message::Request;
#[cfg(debug_assertions)]
use super::message::{Accept, AclEntry, AttrEntry, Create, SglEntry, Transfer};
#[cfg(debug_assertions)]
use super::{MEM_IO, MEM_NORMAL, MOST_PARCELS, ParcelState, Rm, notify, release};
#[cfg(debug_assertions)]
use crate::geometry::PAGE_SHIFT;
use crate::hyp::gunyah::error::RmError;

/// What a member has of a parcel.
#[cfg(debug_assertions)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Had {
    Nothing,
    /// It has accepted, and said where it wants it.
    Addresses,
    Memory,
}

#[cfg(debug_assertions)]
#[derive(Clone, Debug)]
struct Kept {
    owner: Vmid,
    create: Create,
    /// No more will be appended.
    complete: bool,
    members: BTreeMap<Vmid, Had>,
    /// Who began to take it in one piece.
    contiguous: Vec<Vmid>,
    /// The owner's pages, as runs of numbers.
    pages: Vec<(u64, u64)>,
    clear: bool,
    tag: Option<u32>,
    locked: bool,
}

#[cfg(debug_assertions)]
#[derive(Debug, Default)]
pub(crate) struct Spec {
    parcels: BTreeMap<u32, Kept>,
    /// How many parcels each VM is charged for.
    charged: BTreeMap<Vmid, u32>,
}

/// The first that holds, or none.
#[cfg(debug_assertions)]
fn first(checks: &[(bool, RmError)]) -> Option<RmError> {
    checks.iter().find(|(fails, _)| *fails).map(|&(_, error)| error)
}

/// Pages as runs: what goes on is one.
#[cfg(debug_assertions)]
fn runs(pages: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for (start, nr) in pages {
        match found.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += nr,
            _ => found.push((start, nr)),
        }
    }
    found
}

#[cfg(debug_assertions)]
fn pages_of(sgl: &[SglEntry]) -> impl Iterator<Item = (u64, u64)> {
    sgl.iter().map(|entry| (entry.ipa >> PAGE_SHIFT, entry.size >> PAGE_SHIFT))
}

#[cfg(debug_assertions)]
impl Kept {
    fn is_io(&self) -> bool {
        self.create.mem_type == MEM_IO
    }

    fn rights(&self, vmid: Vmid) -> u8 {
        let entry = self.create.acl.iter().find(|entry| entry.vmid == vmid);
        entry.map_or(0, |entry| entry.rights)
    }

    fn has(&self, vmid: Vmid) -> bool {
        self.members.get(&vmid).is_some_and(|&had| had > Had::Nothing)
    }

    fn nr_having(&self) -> usize {
        self.members.values().filter(|&&had| had > Had::Nothing).count()
    }

    fn state(&self) -> ParcelState {
        match (self.nr_having(), self.complete) {
            (0, false) => ParcelState::Init,
            (0, true) => ParcelState::Sharing,
            _ => ParcelState::Shared,
        }
    }

    /// Whether it cannot be cleared for a member that asks for that.
    fn cannot_clear(&self, vmid: Vmid) -> bool {
        self.is_io() || self.rights(vmid) & 2 == 0
    }
}

#[cfg(debug_assertions)]
impl Spec {
    /// A VM exists.
    pub(crate) fn began(&mut self, vmid: Vmid) {
        self.charged.insert(vmid, 0);
    }

    pub(crate) fn ended(&mut self, vmid: Vmid) {
        self.charged.remove(&vmid);
    }

    pub(crate) fn lock(&mut self, handle: u32, locked: bool) {
        self.parcels.entry(handle).and_modify(|kept| kept.locked = locked);
    }

    /// A member no longer has a parcel.
    pub(crate) fn left(&mut self, handle: u32, vmid: Vmid) {
        if let Some(kept) = self.parcels.get_mut(&handle) {
            kept.members.entry(vmid).and_modify(|had| *had = Had::Nothing);
            kept.contiguous.retain(|&other| other != vmid);
        }
    }

    fn gone(&mut self, handle: u32) {
        if let Some(kept) = self.parcels.remove(&handle) {
            self.charged.entry(kept.owner).and_modify(|nr| *nr = nr.saturating_sub(1));
        }
    }

    /// What parcels alone say to a request: it must be refused so; or anything may be said, but no other refusal than
    /// those that come after.
    fn refusal(&self, from: Vmid, request: &Request) -> Option<RmError> {
        use RmError::{ArgumentInvalid, Denied, HandleInvalid, MemInUse, MemReleased};
        let handle = match request {
            Request::Create(create) => return self.refuses_create(from, create),
            Request::Append { sgl, .. } if sgl.is_empty() => return Some(ArgumentInvalid),
            Request::Accept(Accept { handle, .. })
            | Request::Append { handle, .. }
            | Request::Release { handle, .. }
            | Request::Reclaim { handle, .. }
            | Request::Notify { handle, .. } => handle,
        };
        let Some(kept) = self.parcels.get(handle) else { return Some(HandleInvalid) };
        let (is_owner, has) = (kept.owner == from, kept.has(from));
        let is_member = kept.members.contains_key(&from);
        match request {
            Request::Create(_) => None,
            Request::Append { .. } => {
                first(&[(!is_owner, Denied), (kept.state() != ParcelState::Init, Denied)])
            }
            Request::Accept(accept) => kept.refuses_accept(from, accept),
            Request::Release { flags, .. } => first(&[
                (kept.locked, Denied),
                (!is_member, HandleInvalid),
                (is_owner, Denied),
                (!has, MemReleased),
                (flags & release::SANITIZE != 0 && kept.cannot_clear(from), ArgumentInvalid),
            ]),
            Request::Reclaim { flags, .. } => first(&[
                (!is_owner, Denied),
                (kept.nr_having() > 0, MemInUse),
                (kept.locked, Denied),
                (flags & release::SANITIZE != 0 && kept.is_io(), ArgumentInvalid),
            ]),
            Request::Notify { flags, tag, .. } => {
                let is_other = kept.tag.is_some_and(|known| known != *tag);
                let to_owner = [notify::OF_RELEASED, notify::OF_ACCEPTED].contains(flags);
                let to_others = [notify::OF_SHARED, notify::OF_RECALL].contains(flags);
                first(&[
                    (is_other, ArgumentInvalid),
                    (to_others && !is_owner, Denied),
                    (to_owner && !is_member, HandleInvalid),
                    (*flags == notify::OF_RELEASED && has, MemInUse),
                    (*flags == notify::OF_ACCEPTED && !has, MemReleased),
                    (!to_owner && !to_others, ArgumentInvalid),
                ])
            }
        }
    }

    fn refuses_create(&self, from: Vmid, create: &Create) -> Option<RmError> {
        use RmError::{ArgumentInvalid, Denied, VmidInvalid};
        let Create { transfer, mem_type, flags, acl, sgl, attrs, .. } = create;
        let (io, gift) = (*mem_type == MEM_IO, *transfer == Transfer::Donate);
        let is_full = self.charged.get(&from).is_some_and(|&nr| nr >= MOST_PARCELS);
        let mut checks = vec![
            (acl.is_empty() || sgl.is_empty(), ArgumentInvalid),
            (gift && acl.len() > 1, ArgumentInvalid),
            (is_full, Denied),
            (io && flags & create::SANITIZE != 0, ArgumentInvalid),
        ];
        for (nth, entry) in acl.iter().enumerate() {
            let is_twice = acl[..nth].iter().any(|before| before.vmid == entry.vmid);
            let is_vm = matches!(entry.vmid.0, 3 | 0xff | 0x80..=0xbf);
            let is_right = matches!(entry.rights, 4..=7);
            checks.push((is_twice || !is_vm || !is_right, ArgumentInvalid));
            checks.push((io && entry.rights & 1 != 0, ArgumentInvalid));
            checks.push((gift && entry.rights != if io { 6 } else { 7 }, Denied));
        }
        let owner_is_in = acl.iter().any(|entry| entry.vmid == from);
        checks.push((owner_is_in != (*transfer == Transfer::Share), ArgumentInvalid));
        for (nth, &AttrEntry { attr, vmid }) in attrs.iter().enumerate() {
            let is_twice = attrs[..nth].iter().any(|before| before.vmid == vmid);
            let fits = if io { attr == 1 } else { matches!(attr, 0 | 2 | 3) };
            checks.push((is_twice || !fits || gift && attr > 1, ArgumentInvalid));
            checks.push((acl.iter().all(|entry| entry.vmid != vmid), VmidInvalid));
        }
        first(&checks)
    }
}

#[cfg(debug_assertions)]
impl Kept {
    fn refuses_accept(&self, from: Vmid, accept: &Accept) -> Option<RmError> {
        use RmError::{ArgumentInvalid, Denied, ValidateFailed, VmidInvalid};
        let wants = |flag| accept.flags & flag != 0;
        let Create { transfer, mem_type, flags, label, acl, attrs, .. } = &self.create;
        let told =
            |acl: &[AclEntry]| -> Vec<_> { acl.iter().map(|e| (e.vmid, e.rights)).collect() };
        let is_same = told(acl) == told(&accept.acl) && *attrs == accept.attrs;
        let had = self.members.get(&from);
        let in_pieces = had == Some(&Had::Addresses) && !self.contiguous.contains(&from);
        first(&[
            (accept.mem_type != *mem_type, ArgumentInvalid),
            (accept.transfer != *transfer as u8, ArgumentInvalid),
            (wants(accept::VALIDATE_SANITIZED) && flags & create::SANITIZE == 0, ValidateFailed),
            (wants(accept::VALIDATE_LABEL) && accept.label != *label, ValidateFailed),
            (wants(accept::VALIDATE_ACL_ATTR) && !is_same, ValidateFailed),
            (wants(MAP_OTHER), Denied),
            (accept.map_vmid != Vmid(0), ArgumentInvalid),
            (had.is_none(), VmidInvalid),
            (self.owner == from || had == Some(&Had::Memory), Denied),
            (wants(MAP_CONTIGUOUS) && (*mem_type != MEM_NORMAL || in_pieces), ArgumentInvalid),
            (wants(accept::SANITIZE) && self.cannot_clear(from), ArgumentInvalid),
        ])
    }
}

/// What may still be said to a request that parcels alone do not refuse.
#[cfg(debug_assertions)]
fn may_still(request: &Request, error: RmError) -> bool {
    use RmError::{
        ArgumentInvalid, Denied, MapFailed, MemInUse, MemInvalid, MsgInvalid, NoMem, NoResource,
        VmidInvalid,
    };
    let errors: &[RmError] = match request {
        // Of memory that is not the owner's, of no tables, and of too many pieces.
        Request::Create(_) => &[ArgumentInvalid, MemInvalid, MapFailed, NoMem, Denied],
        Request::Append { .. } => &[ArgumentInvalid, MemInvalid, MapFailed, Denied],
        Request::Accept(_) => &[ArgumentInvalid, NoResource, MapFailed, MemInvalid],
        Request::Release { .. } => &[MapFailed],
        // A parcel may outlive its owner's home.
        Request::Reclaim { .. } => &[NoMem, VmidInvalid],
        Request::Notify { flags: notify::OF_SHARED, .. } => {
            &[MsgInvalid, ArgumentInvalid, VmidInvalid, MemInUse]
        }
        Request::Notify { flags: notify::OF_RECALL, .. } => {
            &[MsgInvalid, ArgumentInvalid, VmidInvalid]
        }
        Request::Notify { .. } => &[],
    };
    errors.contains(&error)
}

#[cfg(debug_assertions)]
impl Spec {
    /// A request was answered: says what is wrong with the answer, and makes the step.
    pub(crate) fn answered(
        &mut self,
        from: Vmid,
        request: &Request,
        answer: Result<Option<u32>, RmError>,
    ) -> Option<String> {
        let wrong = match (self.refusal(from, request), answer) {
            (Some(error), Err(other)) if error == other => return None,
            (Some(error), _) => Some(format!("{answer:?}, and should be {error:?}")),
            (None, Err(error)) if !may_still(request, error) => Some(format!("{error:?}")),
            (None, Ok(_)) => self.cannot_be(request),
            _ => None,
        };
        if wrong.is_some() {
            return wrong.map(|wrong| format!("{request:x?} from {from:?} was answered {wrong}"));
        }
        self.step(from, request, answer);
        None
    }

    /// What nobody may be answered to: pages that are none.
    fn cannot_be(&self, request: &Request) -> Option<String> {
        let (Request::Create(Create { sgl, .. }) | Request::Append { sgl, .. }) = request else {
            return None;
        };
        let is_none = |entry: &&SglEntry| {
            entry.size == 0 || !addr_valid(entry.ipa) || !addr_valid(entry.size)
        };
        sgl.iter().find(is_none).map(|entry| format!("with {entry:x?}"))
    }

    fn step(&mut self, from: Vmid, request: &Request, answer: Result<Option<u32>, RmError>) {
        match (request, answer) {
            (Request::Create(create), Ok(Some(handle))) => self.created(from, handle, create),
            (Request::Append { handle, flags, sgl }, Ok(_)) => {
                if let Some(kept) = self.parcels.get_mut(handle) {
                    let all: Vec<_> = kept.pages.iter().copied().chain(pages_of(sgl)).collect();
                    kept.pages = runs(all.into_iter());
                    kept.complete |= flags & create::APPEND_DONE != 0;
                }
            }
            (Request::Accept(accept), answer) => self.accepted(from, accept, answer.is_ok()),
            (Request::Release { handle, flags }, answer) => {
                self.wish(*handle, flags & release::SANITIZE != 0);
                if answer.is_ok() {
                    self.left(*handle, from);
                }
            }
            (Request::Reclaim { handle, flags }, answer) => {
                self.wish(*handle, flags & release::SANITIZE != 0);
                if answer.is_ok() {
                    self.gone(*handle);
                }
            }
            (
                Request::Notify { handle, flags: notify::OF_SHARED, tag, .. },
                Ok(_) | Err(RmError::MemInUse),
            ) => {
                self.parcels.entry(*handle).and_modify(|kept| kept.tag = Some(*tag));
            }
            _ => {}
        }
    }

    fn wish(&mut self, handle: u32, wished: bool) {
        self.parcels.entry(handle).and_modify(|kept| kept.clear |= wished);
    }

    fn created(&mut self, owner: Vmid, handle: u32, create: &Create) {
        let kept = Kept {
            owner,
            create: create.clone(),
            complete: create.flags & create::WILL_APPEND == 0,
            members: create.acl.iter().map(|entry| (entry.vmid, Had::Nothing)).collect(),
            contiguous: Vec::new(),
            pages: runs(pages_of(&create.sgl)),
            clear: false,
            tag: None,
            locked: false,
        };
        self.parcels.insert(handle, kept);
        self.charged.entry(owner).and_modify(|nr| *nr += 1);
    }

    fn accepted(&mut self, from: Vmid, accept: &Accept, is_ok: bool) {
        self.wish(accept.handle, accept.flags & accept::SANITIZE != 0);
        let Some(kept) = self.parcels.get_mut(&accept.handle).filter(|_| is_ok) else { return };
        let done = accept.flags & DONE != 0;
        if done && kept.create.transfer == Transfer::Donate {
            return self.gone(accept.handle);
        }
        if accept.flags & MAP_CONTIGUOUS != 0 && !kept.has(from) {
            kept.contiguous.push(from);
        }
        kept.complete = true;
        kept.members.insert(from, if done { Had::Memory } else { Had::Addresses });
    }

    /// What is not as it should be.
    pub(crate) fn difference(&self, rm: &Rm) -> Option<String> {
        if !self.parcels.keys().eq(rm.parcels.keys()) {
            return Some(format!("there are {:?}, and should be {:?}", rm.parcels, self.parcels));
        }
        for (handle, kept) in &self.parcels {
            let parcel = &rm.parcels[handle];
            let had = |member: &super::Member| match (member.mapped, member.shared) {
                (true, _) => Had::Memory,
                (false, true) => Had::Addresses,
                (false, false) => Had::Nothing,
            };
            let members = parcel.members.iter().map(|member| (member.vmid, had(member)));
            let regions = parcel.regions.iter().map(|region| (region.owner_gfn.get(), region.nr));
            let fits = [
                parcel.owner == kept.owner,
                parcel.transfer == kept.create.transfer,
                parcel.state == kept.state(),
                parcel.share_count as usize == kept.nr_having(),
                members.collect::<BTreeMap<_, _>>() == kept.members,
                runs(regions) == kept.pages,
                parcel.sanitize_reclaim == kept.clear,
                parcel.tag == kept.tag,
                parcel.locked == kept.locked,
            ];
            if fits.contains(&false) {
                return Some(format!("{parcel:?} should be {kept:?}: {fits:?}"));
            }
        }
        let charged = rm.vms.iter().map(|(&vmid, vm)| (vmid, vm.nr_parcels));
        let fits = charged.eq(self.charged.iter().map(|(&vmid, &nr)| (vmid, nr)));
        (!fits).then(|| format!("parcels are counted {:?}", self.charged))
    }
}

/// Nothing, at no cost.
#[cfg(not(debug_assertions))]
#[derive(Debug, Default)]
pub(crate) struct Spec;

#[cfg(not(debug_assertions))]
impl Spec {
    pub(crate) fn began(&mut self, _: Vmid) {}
    pub(crate) fn ended(&mut self, _: Vmid) {}
    pub(crate) fn lock(&mut self, _: u32, _: bool) {}
    pub(crate) fn left(&mut self, _: u32, _: Vmid) {}
    pub(crate) fn answered(
        &mut self,
        _: Vmid,
        _: &Request,
        _: Result<Option<u32>, RmError>,
    ) -> Option<String> {
        None
    }
}
