//! The resource manager: a VM of the system's that lends, shares and donates memory between the others.
//!
//! | file | holds |
//! |---|---|
//! | `message` | requests as bytes, read to the last one |
//! | `create` | DONATE, LEND, SHARE and APPEND: memory goes into a parcel |
//! | `accept` | ACCEPT |
//! | `release` | RELEASE, RECLAIM, and what a reset gives back by force |
//! | `notify` | NOTIFY, and what VMs are told |
//! | `vm` | VMs and their states |
//! | `spec` | parcels again, in the plainest way, and what each request must be answered |
//! | `firmware` | what VMs begin with before their image |
//! | `paging` | a VM whose memory the host provides page by page, without parcels |
//! | `ranges` | which of a VM's addresses are in use |
//!
//! A parcel is an extent beside those that VMs own; what is put into it is donated to it, and so vanishes from where
//! its owner had it, unless the parcel maps it there as well. It knows every frame by the owner's address, and gives
//! it back to there. It works on one request after the other.

pub(super) mod accept;
pub(super) mod create;
mod firmware;
pub(super) mod message;
pub(super) mod notify;
pub(super) mod paging;
mod ranges;
pub(super) mod release;
pub(super) mod spec;
pub(super) mod vm;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::attrs::{Access, MapAttrs, MapType};
use super::error::{HypError, RmError};
use super::hyp::Hyp;
use super::machine::Machine;
use super::memdb::ExtentId;
use crate::addr::{Gfn, Pfn};
use crate::geometry::PAGE_SHIFT;
use firmware::Firmware;
use message::{AttrEntry, Request, Transfer};
use spec::Spec;
use vm::{Home, Vm};

/// The first frame beyond what it counts in: 44 bits of address.
pub(crate) const ADDRESS_LIMIT: Pfn = Pfn::new(1 << 32);
/// How many parcels of a VM's own there may be.
pub(crate) const MOST_PARCELS: u32 = 64;
/// How many pieces a parcel may have.
pub(crate) const MOST_REGIONS: usize = 1 << 20;
const NO_HANDLE: u32 = u32::MAX;

/// A VM's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Vmid(pub(crate) u16);

impl Vmid {
    /// The host.
    pub(crate) const HLOS: Self = Self(3);
    /// The resource manager.
    pub(crate) const RM: Self = Self(0xff);
    pub(crate) const FIRST_DYNAMIC: Self = Self(0x80);
    pub(crate) const LAST_DYNAMIC: Self = Self(0xbf);

    /// Whether a VM could have it.
    fn is_valid(self) -> bool {
        self == Self::HLOS
            || self == Self::RM
            || (Self::FIRST_DYNAMIC..=Self::LAST_DYNAMIC).contains(&self)
    }
}

/// What kind of memory a parcel has, as messages say it: anything but 1 is memory.
pub(crate) const MEM_NORMAL: u8 = 0;
pub(crate) const MEM_IO: u8 = 1;

/// How far a parcel has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ParcelState {
    /// More may be appended.
    Init,
    /// Complete; nobody has accepted it.
    Sharing,
    /// Somebody has.
    Shared,
}

/// A VM that may have a parcel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) vmid: Vmid,
    pub(crate) rights: u8,
    pub(crate) attr: u16,
    /// Where it puts the regions; fewer until it has said so for all.
    pub(crate) gfns: Option<Vec<Gfn>>,
    pub(crate) contiguous: bool,
    /// It has accepted.
    pub(crate) shared: bool,
    /// And it has it mapped.
    pub(crate) mapped: bool,
}

/// A piece of a parcel: consecutive frames, at consecutive addresses of the owner's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) pfn: Pfn,
    pub(crate) nr: u64,
    pub(crate) owner_gfn: Gfn,
}

/// Memory on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parcel {
    pub(crate) extent: ExtentId,
    pub(crate) owner: Vmid,
    pub(crate) transfer: Transfer,
    pub(crate) mem_type: u8,
    pub(crate) label: u32,
    pub(crate) tag: Option<u32>,
    pub(crate) state: ParcelState,
    pub(crate) share_count: u32,
    pub(crate) sanitize_create: bool,
    /// Somebody wants it cleared before its owner has it back.
    pub(crate) sanitize_reclaim: bool,
    pub(crate) locked: bool,
    pub(crate) members: Vec<Member>,
    pub(crate) attrs: Vec<AttrEntry>,
    pub(crate) regions: Vec<Region>,
}

impl Parcel {
    pub(crate) fn is_io(&self) -> bool {
        self.mem_type == MEM_IO
    }

    pub(crate) fn nr_pages(&self) -> u64 {
        self.regions.iter().map(|region| region.nr).sum()
    }

    pub(crate) fn member(&self, vmid: Vmid) -> Option<&Member> {
        self.members.iter().find(|member| member.vmid == vmid)
    }

    /// Where a member has, or will have, each region.
    pub(crate) fn places(&self, member: &Member) -> Vec<(Region, Gfn)> {
        let gfns = member.gfns.as_deref().unwrap_or_default();
        let mut nr_before = 0;
        let mut places = Vec::new();
        for (nth, &region) in self.regions.iter().enumerate() {
            let gfn = match member.contiguous {
                true => gfns.first().and_then(|first| first.checked_add(nr_before)),
                false => gfns.get(nth).copied(),
            };
            nr_before += region.nr;
            places.extend(gfn.map(|gfn| (region, gfn)));
        }
        places
    }
}

impl Member {
    /// As what it maps the memory.
    pub(crate) fn map_attrs(&self) -> MapAttrs {
        let kind = match self.attr {
            1 => MapType::DEVICE,
            2 => MapType::UNCACHED,
            _ => MapType::CACHED,
        };
        MapAttrs::new(Access::of(self.rights), kind)
    }
}

/// What becomes of memory that was donated to a VM which is gone. The original leaves it where nobody has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Fate {
    /// In the extent above all VMs', where no VM has it.
    #[default]
    Lost,
    /// The host gets it, as it is, but maps it nowhere.
    Host,
}

/// An answer: an error, or what the request asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) error: Option<RmError>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    /// As the VM gets it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let code = self.error.map_or(0, |error| error as u32);
        code.to_le_bytes().into_iter().chain(self.body.iter().copied()).collect()
    }
}

#[derive(Debug)]
pub(crate) struct Rm {
    pub(super) vms: BTreeMap<Vmid, Vm>,
    pub(super) parcels: BTreeMap<u32, Parcel>,
    next_handle: u32,
    /// Above all VMs' memory, and above their devices.
    pub(super) root: ExtentId,
    pub(super) device_root: ExtentId,
    device_base: Pfn,
    nr_device_pages: u64,
    pub(super) fate: Fate,
    pub(super) spec: Spec,
    firmware: Firmware,
    machine: Arc<Machine>,
}

/// An extent of any memory, with all rights, that memory is donated to; and one of a device's.
const DDR_ATTRS: u64 = 7 | 1 << 16;
const DEVICE_ATTRS: u64 = 6 | 1 << 8 | 1 << 16;

impl Rm {
    /// Takes all memory, and gives it to the host, who has it mapped as it is.
    ///
    /// # Errors
    /// `NoMem` without room for the host's tables.
    pub(crate) fn boot(hyp: &mut Hyp, fate: Fate) -> Result<Self, HypError> {
        let device = hyp.machine.device();
        let (device_base, device_size) = (device.start().pa().get(), device.len_bytes().get());
        let root = hyp.create_extent(0, ADDRESS_LIMIT.get() << PAGE_SHIFT, DDR_ATTRS, false)?;
        let device_root = hyp.create_extent(device_base, device_size, DEVICE_ATTRS, true)?;
        let mut rm = Self {
            vms: BTreeMap::new(),
            parcels: BTreeMap::new(),
            next_handle: 0,
            root,
            device_root,
            device_base: device.start(),
            nr_device_pages: device.nr_pages(),
            fate,
            spec: Spec::default(),
            firmware: Firmware::default(),
            machine: Arc::clone(&hyp.machine),
        };
        rm.spec.began(Vmid::RM);
        rm.spec.began(Vmid::HLOS);
        rm.vms.insert(Vmid::RM, Vm::running(Vmid::RM, rm.new_home(hyp)?));
        let home = rm.new_home(hyp)?;
        rm.vms.insert(Vmid::HLOS, Vm::running(Vmid::RM, home));
        for bank in hyp.machine.banks().to_vec() {
            let at = bank.frames.start().pa().get();
            let bytes = (at, bank.frames.len_bytes().get());
            hyp.donate_child(root, bytes, false)?;
            hyp.donate_child(home.memory, bytes, false)?;
            let attrs = MapAttrs::new(Access::RWX, MapType::CACHED);
            hyp.map_partial(home.memory, home.aspace, at, bytes, attrs)?;
        }
        hyp.donate_child(home.device, (0, device_size), false)?;
        let attrs = MapAttrs::new(Access::RW, MapType::DEVICE);
        hyp.map(home.device, home.aspace, device_base, attrs)?;
        Ok(rm)
    }

    /// An address space, and extents without memory.
    fn new_home(&self, hyp: &mut Hyp) -> Result<Home, HypError> {
        let memory = self.new_extent(hyp, false)?;
        let device = self.new_extent(hyp, true)?;
        let aspace = hyp.create_aspace().inspect_err(|_| {
            for extent in [memory, device] {
                let deleted = hyp.delete_extent(extent);
                hyp.note(deleted);
            }
        })?;
        Ok(Home { aspace, memory, device })
    }

    fn new_extent(&self, hyp: &mut Hyp, io: bool) -> Result<ExtentId, HypError> {
        match io {
            true => {
                let size = hyp.machine.device().len_bytes().get();
                hyp.derive_extent(self.device_root, 0, size, DEVICE_ATTRS)
            }
            false => hyp.derive_extent(self.root, 0, ADDRESS_LIMIT.get() << PAGE_SHIFT, DDR_ATTRS),
        }
    }

    /// Offset and size of a region in extents of its kind.
    fn bytes_of(&self, region: Region, io: bool) -> (u64, u64) {
        let base = if io { self.device_base.get() } else { 0 };
        (region.pfn.get().saturating_sub(base) << PAGE_SHIFT, region.nr << PAGE_SHIFT)
    }

    /// A VM's home. What asks is on its way from or to a VM that is there.
    fn home(&self, vmid: Vmid) -> Option<Home> {
        self.vms.get(&vmid)?.home
    }

    /// Does what a VM asks for.
    pub(crate) fn request(&mut self, hyp: &mut Hyp, from: Vmid, id: u32, body: &[u8]) -> Reply {
        match self.dispatch(hyp, from, id, body) {
            Ok(body) => Reply { error: None, body },
            Err(error) => Reply { error: Some(error), body: Vec::new() },
        }
    }

    fn dispatch(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        id: u32,
        body: &[u8],
    ) -> Result<Vec<u8>, RmError> {
        let vm = self.vms.get(&from).ok_or(RmError::VmidInvalid)?;
        // Only who runs can send, and the resource manager itself sends nothing.
        if vm.state != vm::VmState::Running || from == Vmid::RM {
            return Err(RmError::VmState);
        }
        let request = message::parse(id, body)?;
        self.perform(hyp, from, &request)
    }

    /// Does what a VM that may ask asks for, and compares with what should be so.
    fn perform(
        &mut self,
        hyp: &mut Hyp,
        from: Vmid,
        request: &Request,
    ) -> Result<Vec<u8>, RmError> {
        let mut handle = None;
        let answer = match request {
            Request::Create(create) => self.create(hyp, from, create).map(|new| {
                handle = Some(new);
                new.to_le_bytes().to_vec()
            }),
            Request::Append { handle, flags, sgl } => {
                self.append(hyp, from, *handle, *flags, sgl).map(|()| Vec::new())
            }
            Request::Accept(accept) => {
                let placed = self.accept(hyp, from, accept);
                placed.map(|placed| placed.map_or(Vec::new(), |placed| placed.encode()))
            }
            Request::Release { handle, flags } => {
                self.release(hyp, from, *handle, *flags).map(|()| Vec::new())
            }
            Request::Reclaim { handle, flags } => {
                self.reclaim(hyp, from, *handle, *flags).map(|()| Vec::new())
            }
            Request::Notify { handle, flags, tag, list } => {
                self.notify(from, *handle, *flags, *tag, list).map(|()| Vec::new())
            }
        };
        let told = answer.as_ref().map(|_| handle).map_err(|&error| error);
        let wrong = self.spec.answered(from, request, told);
        assert!(wrong.is_none(), "a request was answered as none should be: {wrong:?}");
        self.settle();
        answer
    }

    /// The end of a request: compares with the specification, in builds that have one.
    #[cfg(debug_assertions)]
    pub(super) fn settle(&self) {
        let wrong = self.spec.difference(self);
        assert!(wrong.is_none(), "parcels are not what was specified: {wrong:?}");
    }

    #[cfg(not(debug_assertions))]
    pub(super) fn settle(&self) {}

    /// Locks a parcel, so that it is neither released nor reclaimed, or unlocks it. The platform does that.
    pub(crate) fn set_lock(&mut self, handle: u32, locked: bool) {
        if let Some(parcel) = self.parcels.get_mut(&handle) {
            parcel.locked = locked;
            self.spec.lock(handle, locked);
        }
    }
}
