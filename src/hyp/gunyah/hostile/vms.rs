//! The machine, the host and three guests; and beside what the resource manager has, memory that VMs have
//! capabilities for.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::aspace::BbmLevel;
use super::super::cspace::{Cspace, Object, Rights};
use super::super::error::HypError;
use super::super::host::Guest;
use super::super::hypercall::EXTENT_DERIVE;
use super::super::machine::{Bank, Machine};
use super::super::rm::message::{AclEntry, Create, Request, SglEntry, Transfer};
use super::super::rm::vm::Image;
use super::super::rm::{Fate, Vmid};
use super::super::{Gunyah, World};
use super::judge::Snapshot;
use super::wire::encode;
use crate::addr::Pfn;
use crate::backing::Arena;
use crate::error::Errno;
use crate::range::PfnRange;

pub(super) const RAM: u64 = 0x2000;
/// What the resource manager has of it.
pub(super) const NR_RAM: u64 = 0x60;
/// What VMs have capabilities for.
pub(super) const BARE: u64 = RAM + NR_RAM;
pub(super) const NR_BARE: u64 = 0x20;
pub(super) const DEVICE: u64 = 0x9000;
pub(super) const NR_DEVICE: u64 = 4;
/// What the host has for a VM that it pages, and for that VM's image.
pub(super) const PAGED: u64 = BARE + NR_BARE;
pub(super) const NR_PAGED: u64 = 8;
const NR_HEAP: u64 = 0xa0;
pub(super) const GUESTS: [Vmid; 3] = [Vmid(0x80), Vmid(0x81), Vmid(0x82)];
pub(super) const PAGE: u64 = 4096;

/// What a VM holds: capabilities, and their numbers as it knows them.
#[derive(Debug, Default)]
pub(super) struct Holder {
    pub(super) caps: Cspace,
    pub(super) extents: Vec<u64>,
    pub(super) spaces: Vec<u64>,
    /// What it mapped last: space, extent, address, offset and size.
    pub(super) mapped: Option<[u64; 5]>,
}

#[derive(Debug)]
pub(super) struct Vms {
    pub(super) gunyah: Arc<Gunyah>,
    /// Parcels that somebody wants cleared; `None` if an accept was refused on the way.
    pub(super) wishes: BTreeMap<u32, Option<bool>>,
    /// One with all rights, and one with few.
    pub(super) holders: [Holder; 2],
    /// It is paged, and its number is none of those.
    pub(super) paged: Guest,
}

fn range(start: u64, nr: u64) -> Result<PfnRange, HypError> {
    PfnRange::new(Pfn::new(start), nr).map_err(|_| HypError::ArgumentInvalid)
}

/// Frames of the paged VM's.
pub(super) fn paged() -> Result<PfnRange, HypError> {
    range(PAGED, NR_PAGED)
}

/// Frames that the resource manager has no part in.
pub(super) fn bare() -> Result<PfnRange, HypError> {
    range(BARE, NR_BARE)
}

fn machine() -> Result<Machine, HypError> {
    let nr = NR_RAM + NR_BARE + NR_PAGED + 1;
    let banks = vec![Bank { frames: range(RAM, nr)?, bytes: Some(Pfn::new(0)) }];
    let arena = Arena::heap(nr).map_err(|_| HypError::NoMem)?;
    Machine::new(banks, range(DEVICE, NR_DEVICE)?, range(0x100, NR_HEAP)?, Some(arena))
}

impl Vms {
    /// Boots; two guests run already.
    pub(super) fn boot() -> Result<Self, String> {
        let why = |error: HypError| format!("boot: {error:?}");
        let gunyah =
            machine().and_then(|machine| Gunyah::boot(machine, BbmLevel::Zero, Fate::Lost));
        let gunyah = gunyah.map_err(why)?;
        let holders = gunyah.with(take_out).map_err(why)?;
        for (vmid, page) in GUESTS.into_iter().zip([BARE - 1, BARE - 2]).take(2) {
            begin(&gunyah, vmid, page).map_err(|what| format!("boot of {vmid:?}: {what}"))?;
        }
        let gunyah = Arc::new(gunyah);
        let paged =
            begin_paged(&gunyah).map_err(|errno| format!("boot of a paged VM: {errno:?}"))?;
        Ok(Self { gunyah, wishes: BTreeMap::new(), holders, paged })
    }

    /// A machine with a mistake in it cannot be taken apart.
    pub(super) fn abandon(self) {
        std::mem::forget(self.paged);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.gunyah.with(|world| Snapshot::of(world))
    }
}

/// A guest that runs, and is paged. The numbers of the others are not for it.
fn begin_paged(gunyah: &Arc<Gunyah>) -> Result<Guest, Errno> {
    let kept = GUESTS[2];
    gunyah.with(|World { rm, kernel, .. }| {
        kernel.free_page(Pfn::new(PAGED + NR_PAGED));
        rm.allocate(Vmid::HLOS, kept).map(drop)
    })?;
    let paged = Guest::create(gunyah)?;
    gunyah.with(|world| world.rm.deallocate(Vmid::HLOS, kept))?;
    Ok(paged)
}

/// A guest that runs, with one page.
fn begin(gunyah: &Gunyah, vmid: Vmid, page: u64) -> Result<(), String> {
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
    let reply = gunyah.message(Vmid::HLOS, id, &body);
    let handle = reply.body.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let handle = handle.ok_or_else(|| format!("{:?}", reply.error))?;
    let image = Image { handle, ipa: 0x80 * PAGE, unsanitized: true };
    let started = gunyah.with(|World { hyp, rm, .. }| {
        rm.allocate(Vmid::HLOS, vmid)?;
        rm.config_image(hyp, Vmid::HLOS, vmid, 0, image)?;
        rm.init_vm(hyp, Vmid::HLOS, vmid)?;
        rm.start_vm(Vmid::HLOS, vmid)
    });
    started.map_err(|error| format!("{error:?}"))
}

/// Memory goes from the host back to the partition, and from there to an extent that VMs hold capabilities for.
fn take_out(world: &mut World) -> Result<[Holder; 2], HypError> {
    let World { hyp, rm, .. } = world;
    let host = rm.vms.get(&Vmid::HLOS).and_then(|vm| vm.home).ok_or(HypError::Failure)?;
    let bytes = (BARE * PAGE, NR_BARE * PAGE);
    hyp.unmap_partial(host.memory, host.aspace, bytes.0, bytes)?;
    hyp.donate_child(host.memory, bytes, true)?;
    hyp.donate_child(rm.root, bytes, true)?;
    let root = hyp.create_extent(0, 0x1_0000 * PAGE, 7 | 1 << 16, false)?;
    hyp.donate_child(root, bytes, false)?;

    let [mut rich, mut poor] = [Holder::default(), Holder::default()];
    let partition = rich.caps.insert(Object::Partition, Rights::ALL)?.0;
    let cap = rich.caps.insert(Object::Extent(root), Rights::ALL)?.0;
    rich.extents = vec![partition, cap];
    for attrs in [7 | 1 << 16, 6 | 1 << 16] {
        let x = [cap, bytes.0, bytes.1, attrs, 0, 0, 0];
        let [_, child, ..] = hyp.hypercall(&mut rich.caps, EXTENT_DERIVE, x);
        rich.extents.push(child);
        let id = rich.caps.extent(child, Rights::of(0))?;
        let rights = Rights::of(!16);
        poor.extents.push(poor.caps.insert(Object::Extent(id), rights)?.0);
    }
    for _ in 0..3 {
        let id = hyp.create_aspace()?;
        rich.spaces.push(rich.caps.insert(Object::Aspace(id), Rights::ALL)?.0);
        poor.spaces.push(poor.caps.insert(Object::Aspace(id), Rights::of(!2))?.0);
    }
    Ok([rich, poor])
}
