//! VMs: who made them, how far they have come, what is theirs.

use std::collections::VecDeque;

use super::accept::{DONE, MAP_CONTIGUOUS, SANITIZE, VALIDATE_ACL_ATTR};
use super::firmware::Region;
use super::message::{Accept, AclEntry, Notification, Request, SglEntry, Transfer};
use super::paging::Paging;
use super::ranges::Ranges;
use super::{Fate, MEM_NORMAL, Rm, Vmid};
use crate::addr::Gfn;
use crate::geometry::PAGE_SHIFT;
use crate::hyp::gunyah::aspace::AspaceId;
use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::hyp::Hyp;
use crate::hyp::gunyah::memdb::{ExtentId, Owner};

/// A VM's state. One that does not exist is NONE, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum VmState {
    Init = 1,
    Ready = 2,
    Running = 3,
    Paused = 4,
    Load = 5,
    Auth = 6,
    InitFailed = 8,
    Exited = 9,
    Resetting = 10,
    Reset = 11,
}

impl VmState {
    /// Whether there is a way from here to there.
    pub(crate) fn leads_to(self, to: Self) -> bool {
        use VmState::{
            Auth, Exited, Init, InitFailed, Load, Paused, Ready, Reset, Resetting, Running,
        };
        match to {
            Load => false,
            Init => matches!(self, Load | Auth | Reset),
            Auth => matches!(self, Load | Reset),
            Ready => self == Init,
            Running => matches!(self, Ready | Paused),
            Paused => self == Running,
            InitFailed => matches!(self, Init | Ready | Load | Auth | Reset),
            Exited => matches!(self, Running | Paused),
            Resetting => matches!(self, Exited | Ready | InitFailed),
            Reset => self == Resetting,
        }
    }
}

/// What a reset does, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResetStage {
    DestroyVdevices,
    ReleaseMemparcels,
    ReleaseIrqs,
    DestroyVm,
    CleanupVm,
}

/// Who says that a VM's image is what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Auth {
    Nobody = 0,
    Platform = 1,
    /// The image's own firmware.
    Android = 2,
}

/// A VM's address space, and the extents of what it owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) aspace: AspaceId,
    pub(crate) memory: ExtentId,
    pub(crate) device: ExtentId,
}

impl Home {
    pub(crate) fn extent(self, io: bool) -> ExtentId {
        if io { self.device } else { self.memory }
    }
}

/// The parcel that a VM begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) handle: u32,
    pub(crate) ipa: u64,
    /// Its memory comes back as the VM leaves it.
    pub(crate) unsanitized: bool,
}

/// How many notifications wait for a VM that does not read them.
const MOST_WAITING: usize = 256;
/// What VMs have of addresses: 36 bits.
const ADDRESS_PAGES: Gfn = Gfn::new(1 << 24);

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) owner: Vmid,
    pub(crate) state: VmState,
    pub(crate) stage: ResetStage,
    pub(crate) home: Option<Home>,
    pub(crate) ranges: Ranges,
    /// Parcels of its own.
    pub(crate) nr_parcels: u32,
    /// Parcels that it has accepted, in that order.
    pub(crate) accepted: Vec<u32>,
    image: Option<Image>,
    /// Who vouches for it.
    pub(super) auth: Option<Auth>,
    /// Where it is to have its firmware.
    pub(super) firmware: Option<Region>,
    /// If the host pages its memory on demand.
    pub(crate) paging: Option<Paging>,
    inbox: VecDeque<Notification>,
    /// Notifications that found no room.
    pub(crate) nr_lost: u64,
}

impl Vm {
    fn new(owner: Vmid) -> Self {
        Self {
            owner,
            state: VmState::Load,
            stage: ResetStage::DestroyVdevices,
            home: None,
            ranges: Ranges::new(ADDRESS_PAGES),
            nr_parcels: 0,
            accepted: Vec::new(),
            image: None,
            auth: None,
            firmware: None,
            paging: None,
            inbox: VecDeque::new(),
            nr_lost: 0,
        }
    }

    /// One that is there from the start.
    pub(super) fn running(owner: Vmid, home: Home) -> Self {
        Self { state: VmState::Running, home: Some(home), ..Self::new(owner) }
    }

    /// Whether a VM has memory at no other address than the machine: the host, and everybody a device.
    pub(super) fn is_direct(vmid: Vmid, io: bool) -> bool {
        io || vmid == Vmid::HLOS
    }

    /// Gives addresses back.
    pub(super) fn give(&mut self, vmid: Vmid, io: bool, gfn: Gfn, nr: u64) {
        if !Self::is_direct(vmid, io) {
            self.ranges.give(gfn, nr);
        }
    }

    pub(super) fn tell(&mut self, notification: Notification) {
        match self.inbox.len() < MOST_WAITING {
            true => self.inbox.push_back(notification),
            false => self.nr_lost += 1,
        }
    }

    /// The first notification that waits.
    pub(crate) fn hear(&mut self) -> Option<Notification> {
        self.inbox.pop_front()
    }
}

impl Rm {
    /// A new VM, with a number of its own choice or any.
    ///
    /// # Errors
    /// In this order: `Denied` to others than the host, `VmidInvalid` for a number that is not a dynamic VM's,
    /// `NoResource` if it is taken, or all are.
    pub(crate) fn allocate(&mut self, client: Vmid, wanted: Vmid) -> Result<Vmid, RmError> {
        if client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        let dynamic = Vmid::FIRST_DYNAMIC..=Vmid::LAST_DYNAMIC;
        let vmid = match wanted {
            Vmid(0) => {
                let all = (dynamic.start().0..=dynamic.end().0).map(Vmid);
                all.into_iter().find(|vmid| !self.vms.contains_key(vmid))
            }
            wanted if !dynamic.contains(&wanted) => return Err(RmError::VmidInvalid),
            wanted => Some(wanted).filter(|vmid| !self.vms.contains_key(vmid)),
        };
        let vmid = vmid.ok_or(RmError::NoResource)?;
        let mut vm = Vm::new(client);
        // What is at a device's address is the device.
        vm.ranges.take(Gfn::new(self.device_base.get()), self.nr_device_pages);
        self.vms.insert(vmid, vm);
        self.spec.began(vmid);
        Ok(vmid)
    }

    /// A VM that its owner asks about.
    fn owned(&mut self, client: Vmid, vmid: Vmid, stranger: RmError) -> Result<&mut Vm, RmError> {
        let vm = self.vms.get_mut(&vmid).ok_or(RmError::VmidInvalid)?;
        match vm.owner == client && vmid != Vmid::HLOS {
            true => Ok(vm),
            false => Err(stranger),
        }
    }

    fn enter(&mut self, vmid: Vmid, to: VmState) -> Result<(), RmError> {
        let vm = self.vms.get_mut(&vmid).ok_or(RmError::VmidInvalid)?;
        match vm.state.leads_to(to) {
            true => {
                vm.state = to;
                Ok(())
            }
            false => Err(RmError::VmState),
        }
    }

    /// Says what a VM begins with: a parcel that is lent to it alone, in which its image lies.
    ///
    /// # Errors
    /// In this order: `Denied` to others than the host; `VmidInvalid`, `Denied` to others than the owner; `VmState`;
    /// and then, with a VM whose start has failed: `ArgumentInvalid` for no such authority, `NoMem`,
    /// `HandleInvalid` for no parcel that is for the VM, `ArgumentInvalid` for one that is not for it alone, with
    /// all rights and no label.
    pub(crate) fn config_image(
        &mut self,
        hyp: &mut Hyp,
        client: Vmid,
        vmid: Vmid,
        auth: u32,
        image: Image,
    ) -> Result<(), RmError> {
        if client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        let vm = self.owned(client, vmid, RmError::Denied)?;
        if !vm.state.leads_to(VmState::Auth) {
            return Err(RmError::VmState);
        }
        let answer = self.configure(hyp, vmid, auth, image);
        let next = match answer {
            Ok(Auth::Platform) => VmState::Auth,
            Ok(Auth::Nobody | Auth::Android) => VmState::Init,
            Err(_) => VmState::InitFailed,
        };
        self.enter(vmid, next)?;
        answer.map(drop)
    }

    fn configure(
        &mut self,
        hyp: &mut Hyp,
        vmid: Vmid,
        auth: u32,
        image: Image,
    ) -> Result<Auth, RmError> {
        let all = [Auth::Nobody, Auth::Platform, Auth::Android];
        let auth = all.into_iter().find(|&known| known as u32 == auth);
        let auth = auth.ok_or(RmError::ArgumentInvalid)?;
        let parcel = self.parcels.get(&image.handle).ok_or(RmError::HandleInvalid)?;
        let member = parcel.member(vmid).ok_or(RmError::HandleInvalid)?;
        let is_private = parcel.mem_type == MEM_NORMAL
            && parcel.transfer == Transfer::Lend
            && parcel.label == 0
            && parcel.members.len() == 1
            && (member.rights, member.attr) == (7, 0);
        if !is_private {
            return Err(RmError::ArgumentInvalid);
        }
        let home = self.new_home(hyp).map_err(|_| RmError::NoMem)?;
        let vm = self.vms.get_mut(&vmid).ok_or(RmError::VmidInvalid)?;
        vm.home = Some(home);
        // An image that nobody vouches for is not worth clearing.
        let unsanitized = image.unsanitized || auth == Auth::Nobody;
        vm.image = Some(Image { unsanitized, ..image });
        (vm.auth, vm.firmware) = (Some(auth), None);
        Ok(auth)
    }

    /// The platform vouches for an image, or does not.
    ///
    /// # Errors
    /// In this order: `Denied`, `VmidInvalid`, `Denied`, `VmState` unless this is what the VM waits for;
    /// `ValidateFailed` if the image is not what it should be, and the VM's start has failed.
    pub(crate) fn auth_image(
        &mut self,
        client: Vmid,
        vmid: Vmid,
        is_genuine: bool,
    ) -> Result<(), RmError> {
        self.check_owned(client, vmid, VmState::Auth)?;
        self.enter(vmid, if is_genuine { VmState::Init } else { VmState::InitFailed })?;
        is_genuine.then_some(()).ok_or(RmError::ValidateFailed)
    }

    pub(super) fn check_owned(
        &mut self,
        client: Vmid,
        vmid: Vmid,
        state: VmState,
    ) -> Result<(), RmError> {
        if client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        match self.owned(client, vmid, RmError::Denied)?.state == state {
            true => Ok(()),
            false => Err(RmError::VmState),
        }
    }

    /// Gives a VM its first memory.
    ///
    /// # Errors
    /// In this order: `Denied`, `VmidInvalid`, `Denied`, `VmState`; what ACCEPT says, and the VM's start has failed.
    pub(crate) fn init_vm(
        &mut self,
        hyp: &mut Hyp,
        client: Vmid,
        vmid: Vmid,
    ) -> Result<(), RmError> {
        self.check_owned(client, vmid, VmState::Init)?;
        let accepted = self.accept_image(hyp, vmid);
        self.enter(vmid, if accepted.is_ok() { VmState::Ready } else { VmState::InitFailed })?;
        accepted
    }

    fn accept_image(&mut self, hyp: &mut Hyp, vmid: Vmid) -> Result<(), RmError> {
        let image = self.vms.get(&vmid).and_then(|vm| vm.image).ok_or(RmError::HandleInvalid)?;
        let parcel = self.parcels.get(&image.handle).ok_or(RmError::HandleInvalid)?;
        let sanitize = if image.unsanitized { 0 } else { SANITIZE };
        let accept = Accept {
            handle: image.handle,
            mem_type: MEM_NORMAL,
            transfer: Transfer::Lend as u8,
            flags: DONE | VALIDATE_ACL_ATTR | MAP_CONTIGUOUS | sanitize,
            label: 0,
            acl: vec![AclEntry { vmid, rights: 7 }],
            sgl: vec![SglEntry { ipa: image.ipa, size: parcel.nr_pages() << PAGE_SHIFT }],
            map_vmid: Vmid(0),
            attrs: Vec::new(),
        };
        self.perform(hyp, vmid, &Request::Accept(accept))?;
        self.accept_firmware(hyp, vmid, image.handle)
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// In this order: `VmidInvalid`, `Denied` to others than the owner, `VmState`; `Denied` or `MemInvalid` for its
    /// firmware, and the VM is READY still.
    pub(crate) fn start_vm(&mut self, client: Vmid, vmid: Vmid) -> Result<(), RmError> {
        match self.owned(client, vmid, RmError::Denied)?.state {
            VmState::Ready => {
                self.start_firmware(vmid)?;
                self.enter(vmid, VmState::Running)
            }
            _ => Err(RmError::VmState),
        }
    }

    /// Halts a VM, or lets it go on.
    ///
    /// # Errors
    /// `VmidInvalid`; `Denied` to others than the owner; `VmState`.
    pub(crate) fn pause_vm(
        &mut self,
        client: Vmid,
        vmid: Vmid,
        pause: bool,
    ) -> Result<(), RmError> {
        match (self.owned(client, vmid, RmError::Denied)?.state, pause) {
            (VmState::Running, true) => self.enter(vmid, VmState::Paused),
            (VmState::Paused, false) => self.enter(vmid, VmState::Running),
            _ => Err(RmError::VmState),
        }
    }

    /// Ends a VM by force.
    ///
    /// # Errors
    /// `VmidInvalid`, also to others than the owner; `VmState` unless it runs or is paused.
    pub(crate) fn stop_vm(&mut self, client: Vmid, vmid: Vmid) -> Result<(), RmError> {
        self.owned(client, vmid, RmError::VmidInvalid)?;
        self.enter(vmid, VmState::Exited)
    }

    /// Begins to take a VM apart.
    ///
    /// # Errors
    /// `VmidInvalid`, also to others than the owner; `VmState`.
    pub(crate) fn reset_vm(&mut self, client: Vmid, vmid: Vmid) -> Result<(), RmError> {
        self.owned(client, vmid, RmError::VmidInvalid)?;
        self.enter(vmid, VmState::Resetting)?;
        self.owned(client, vmid, RmError::VmidInvalid)?.stage = ResetStage::DestroyVdevices;
        Ok(())
    }

    /// One step of it. Says whether there is another.
    ///
    /// # Errors
    /// `VmidInvalid`; `VmState` unless it is being taken apart; `MapFailed` or `NoMem` for want of tables, and the
    /// step may be tried again.
    pub(crate) fn reset_step(&mut self, hyp: &mut Hyp, vmid: Vmid) -> Result<bool, RmError> {
        let vm = self.vms.get(&vmid).ok_or(RmError::VmidInvalid)?;
        if vm.state != VmState::Resetting {
            return Err(RmError::VmState);
        }
        let stage = vm.stage;
        let next = match stage {
            ResetStage::DestroyVdevices => ResetStage::ReleaseMemparcels,
            ResetStage::ReleaseMemparcels if !self.release_last(hyp, vmid)? => return Ok(true),
            ResetStage::ReleaseMemparcels => ResetStage::ReleaseIrqs,
            ResetStage::ReleaseIrqs => ResetStage::DestroyVm,
            ResetStage::DestroyVm => {
                self.destroy_home(hyp, vmid)?;
                ResetStage::CleanupVm
            }
            ResetStage::CleanupVm => return self.enter(vmid, VmState::Reset).map(|()| false),
        };
        if let Some(vm) = self.vms.get_mut(&vmid) {
            vm.stage = next;
        }
        Ok(true)
    }

    /// What was donated to the VM goes where it is to go, and its address space is no more.
    fn destroy_home(&mut self, hyp: &mut Hyp, vmid: Vmid) -> Result<(), RmError> {
        self.end_paging(hyp, vmid)?;
        let Some(home) = self.home(vmid) else { return Ok(()) };
        if self.fate == Fate::Host {
            let host = self.home(Vmid::HLOS).ok_or(RmError::VmidInvalid)?;
            for bank in hyp.machine.banks().to_vec() {
                for piece in hyp.memdb.walk(bank.frames, Owner::Extent(home.memory)) {
                    let bytes = (piece.start().pa().get(), piece.len_bytes().get());
                    let given = hyp.donate_sibling(home.memory, host.memory, bytes);
                    given.map_err(|_| RmError::NoMem)?;
                }
            }
        }
        for extent in [home.memory, home.device] {
            hyp.delete_extent(extent).map_err(|_| RmError::NoMem)?;
        }
        hyp.delete_aspace(home.aspace);
        if let Some(vm) = self.vms.get_mut(&vmid) {
            vm.home = None;
            vm.image = None;
            vm.ranges = Ranges::new(ADDRESS_PAGES);
            vm.ranges.take(Gfn::new(self.device_base.get()), self.nr_device_pages);
        }
        Ok(())
    }

    /// Forgets a VM.
    ///
    /// # Errors
    /// In this order: `Denied` to others than the host, `VmidInvalid`, `Denied` to others than the owner; `VmState`
    /// unless it is new, or taken apart.
    pub(crate) fn deallocate(&mut self, client: Vmid, vmid: Vmid) -> Result<(), RmError> {
        if client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        match self.owned(client, vmid, RmError::Denied)?.state {
            VmState::Load | VmState::Reset => {
                self.vms.remove(&vmid);
                self.spec.ended(vmid);
                Ok(())
            }
            _ => Err(RmError::VmState),
        }
    }
}
