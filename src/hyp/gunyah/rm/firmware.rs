//! Firmware that a VM begins with before its own image: the host gives the resource manager one copy, early, and each
//! VM that is vouched for by it gets that copy when it starts, in memory that was named before.

use super::accept::{DONE, MAP_CONTIGUOUS, SANITIZE, VALIDATE_ACL_ATTR};
use super::message::{Accept, AclEntry, Request, Transfer};
use super::vm::{Auth, VmState};
use super::{MEM_NORMAL, Parcel, Rm, Vmid};
use crate::addr::Pa;
use crate::geometry::{PAGE_BYTES, PAGE_SHIFT};
use crate::hyp::gunyah::error::RmError;
use crate::hyp::gunyah::hyp::Hyp;
use crate::hyp::gunyah::machine::Machine;

/// What the resource manager has of it.
#[derive(Debug, Default)]
pub(crate) struct Firmware {
    /// The page that each of its pages is in, and its bytes.
    image: Option<(Vec<Pa>, u64)>,
    /// The host has said that nothing more is loaded.
    closed: bool,
}

/// Where a VM is to have it: bytes of a parcel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    handle: u32,
    offset: u64,
    size: u64,
}

const PAGE: u64 = PAGE_BYTES as u64;

/// The pages of a parcel, one after the other.
fn pages(parcel: &Parcel) -> Vec<Pa> {
    let all = parcel.regions.iter();
    let pages = all.flat_map(|region| (0..region.nr).map(|nth| region.pfn.pa().get() + nth * PAGE));
    pages.map(Pa::new).collect()
}

fn size_of(parcel: &Parcel) -> u64 {
    parcel.nr_pages() << PAGE_SHIFT
}

/// Where a byte is.
fn at(pages: &[Pa], byte: u64) -> Option<Pa> {
    let page = pages.get(usize::try_from(byte >> PAGE_SHIFT).ok()?)?;
    Some(Pa::new(page.get() + byte % PAGE))
}

impl Rm {
    /// The host gives the firmware for all VMs that one authority vouches for.
    ///
    /// # Errors
    /// In this order: `Denied` when loading has ended, and to others than the host; `ArgumentInvalid` for an authority
    /// without firmware; `Busy` if there is one; `HandleInvalid` for no parcel of the resource manager's;
    /// `ArgumentInvalid` for nothing, an offset, or more than the parcel; what ACCEPT says to a gift.
    pub(crate) fn load_firmware(
        &mut self,
        hyp: &mut Hyp,
        client: Vmid,
        auth: u32,
        handle: u32,
        (offset, size): (u64, u64),
    ) -> Result<(), RmError> {
        if self.firmware.closed || client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        if auth != Auth::Android as u32 {
            return Err(RmError::ArgumentInvalid);
        }
        if self.firmware.image.is_some() {
            return Err(RmError::Busy);
        }
        let parcel = self.parcels.get(&handle).filter(|parcel| parcel.member(Vmid::RM).is_some());
        let parcel = parcel.ok_or(RmError::HandleInvalid)?;
        if size == 0 || offset != 0 || size > size_of(parcel) {
            return Err(RmError::ArgumentInvalid);
        }
        let pages = pages(parcel);
        self.take_firmware(hyp, Vmid::RM, handle, Transfer::Donate, 0)?;
        self.firmware.image = Some((pages, size));
        Ok(())
    }

    /// No more firmware: VMs with it may start.
    ///
    /// # Errors
    /// `Denied` when that was said before, and to others than the host.
    pub(crate) fn end_loading(&mut self, client: Vmid) -> Result<(), RmError> {
        if self.firmware.closed || client != Vmid::HLOS {
            return Err(RmError::Denied);
        }
        self.firmware.closed = true;
        Ok(())
    }

    /// Says where a VM is to have its firmware: in its image's parcel, or in one of its own. `VM_SET_FIRMWARE_MEM`.
    ///
    /// # Errors
    /// In this order: `NoResource` for no VM, `Denied` to others than its owner, `VmState` unless it is INIT,
    /// `ArgumentInvalid` if no firmware vouches for it, `Denied` if there is none, `MemInvalid` for no parcel that is for
    /// the VM, `ArgumentInvalid` beyond its end.
    pub(crate) fn set_firmware_mem(
        &mut self,
        client: Vmid,
        vmid: Vmid,
        handle: u32,
        (offset, size): (u64, u64),
    ) -> Result<(), RmError> {
        let vm = self.vms.get_mut(&vmid).ok_or(RmError::NoResource)?;
        if vm.owner != client {
            return Err(RmError::Denied);
        }
        if vm.state != VmState::Init {
            return Err(RmError::VmState);
        }
        if vm.auth != Some(Auth::Android) {
            return Err(RmError::ArgumentInvalid);
        }
        if self.firmware.image.is_none() {
            return Err(RmError::Denied);
        }
        let parcel = self.parcels.get(&handle).filter(|parcel| parcel.member(vmid).is_some());
        let parcel = parcel.ok_or(RmError::MemInvalid)?;
        if offset.checked_add(size).is_none_or(|end| end > size_of(parcel)) {
            return Err(RmError::ArgumentInvalid);
        }
        vm.firmware = Some(Region { handle, offset, size });
        Ok(())
    }

    /// The VM accepts the parcel for its firmware, if that is not its image's. Always to be cleared.
    pub(super) fn accept_firmware(
        &mut self,
        hyp: &mut Hyp,
        vmid: Vmid,
        image: u32,
    ) -> Result<(), RmError> {
        let region = self.vms.get(&vmid).and_then(|vm| vm.firmware);
        match region.filter(|region| region.size > 0 && region.handle != image) {
            Some(region) => self.take_firmware(hyp, vmid, region.handle, Transfer::Lend, SANITIZE),
            None => Ok(()),
        }
    }

    fn take_firmware(
        &mut self,
        hyp: &mut Hyp,
        vmid: Vmid,
        handle: u32,
        transfer: Transfer,
        flags: u8,
    ) -> Result<(), RmError> {
        let accept = Accept {
            handle,
            mem_type: MEM_NORMAL,
            transfer: transfer as u8,
            flags: DONE | VALIDATE_ACL_ATTR | MAP_CONTIGUOUS | flags,
            label: 0,
            acl: vec![AclEntry { vmid, rights: 7 }],
            sgl: Vec::new(),
            map_vmid: Vmid(0),
            attrs: Vec::new(),
        };
        self.perform(hyp, vmid, &Request::Accept(accept)).map(drop)
    }

    /// Copies the firmware to where a VM is to have it, and clears what is left of that, as it starts. Where there is no
    /// firmware at all, VMs start without it.
    ///
    /// # Errors
    /// In this order: `Denied` while firmware may still be loaded, `MemInvalid` for less memory than it needs.
    pub(super) fn start_firmware(&self, vmid: Vmid) -> Result<(), RmError> {
        let Some(vm) = self.vms.get(&vmid).filter(|vm| vm.auth == Some(Auth::Android)) else {
            return Ok(());
        };
        let Some((from, size)) = &self.firmware.image else { return Ok(()) };
        if !self.firmware.closed {
            return Err(RmError::Denied);
        }
        let region = vm.firmware.filter(|region| region.size >= *size);
        let region = region.ok_or(RmError::MemInvalid)?;
        let parcel = self.parcels.get(&region.handle).ok_or(RmError::MemInvalid)?;
        let to = pages(parcel);
        fill(&self.machine, from, *size, &to, region).ok_or(RmError::MemInvalid)
    }
}

/// Byte by byte, so that neither has to begin on a page.
fn fill(machine: &Machine, from: &[Pa], size: u64, to: &[Pa], region: Region) -> Option<()> {
    let mut byte = [0; 1];
    for nth in 0..region.size {
        match nth < size {
            true => machine.read(at(from, nth)?, &mut byte).ok()?,
            false => byte = [0],
        }
        machine.write(at(to, region.offset + nth)?, &byte).ok()?;
    }
    Some(())
}
