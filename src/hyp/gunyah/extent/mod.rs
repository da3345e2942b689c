//! Memory extents: who may have which memory, map it where, and pass it on.
//!
//! | file | holds |
//! |---|---|
//! | `records` | what an extent says of its mappings in one address space |
//! | `map` | mapping, unmapping, other rights |
//! | `donate` | memory goes from one owner to another, and mappings follow |
//!
//! An extent records mappings of its whole range, also of what it does not have. An entry is in a table if and
//! only if the extent that has the frame records it: so when memory changes hands, mappings change with it.

mod donate;
mod map;
pub(super) mod records;

use std::collections::BTreeSet;

use super::aspace::AspaceId;
use super::attrs::{Access, ExtentAttrs, ExtentKind, MapAttrs, MemType};
use super::error::HypError;
use super::hyp::Hyp;
use super::memdb::{ExtentId, MOST_EXTENTS, Owner};
use crate::addr::Pfn;
use crate::geometry::{PAGE_BYTES, PAGE_SHIFT};
use crate::range::PfnRange;
use records::Records;

/// In how many address spaces an extent can be mapped.
pub(crate) const MAX_MAPS: usize = 4;
/// Of an address or a size.
const PAGE_MASK: u64 = PAGE_BYTES as u64 - 1;

/// Mappings in one address space.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(super) aspace: AspaceId,
    pub(super) records: Records,
}

#[derive(Clone, Debug)]
pub(crate) struct Extent {
    pub(super) kind: ExtentKind,
    pub(super) memtype: MemType,
    pub(super) access: Access,
    pub(super) frames: PfnRange,
    pub(super) parent: Option<ExtentId>,
    pub(super) children: BTreeSet<ExtentId>,
    pub(super) slots: [Option<Slot>; MAX_MAPS],
    /// Nobody holds it any more, but its children do.
    pub(super) is_deleted: bool,
}

/// Bytes of an extent, checked: whole pages that exist, and lie in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes {
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl Bytes {
    fn check_aligned(self, more: u64) -> Result<(), HypError> {
        match (self.offset | self.size | more) & PAGE_MASK {
            0 => Ok(()),
            _ => Err(HypError::ArgumentAlignment),
        }
    }
}

impl Extent {
    /// The frames of aligned bytes, for donations and cleaning.
    fn frames_of(&self, bytes: Bytes) -> Result<PfnRange, HypError> {
        let base = self.frames.start().get() << PAGE_SHIFT;
        let start = base.checked_add(bytes.offset).ok_or(HypError::ArgumentInvalid)?;
        let last = bytes.size.checked_sub(1).and_then(|less| start.checked_add(less));
        last.ok_or(HypError::ArgumentSize)?;
        let frames = PfnRange::new(Pfn::new(start >> PAGE_SHIFT), bytes.size >> PAGE_SHIFT);
        let frames = frames.map_err(|_| HypError::ArgumentInvalid)?;
        self.frames.covers(&frames).then_some(frames).ok_or(HypError::ArgumentInvalid)
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().flatten()
    }
}

impl Hyp {
    pub(super) fn extent(&self, id: ExtentId) -> Result<&Extent, HypError> {
        self.extents.get(&id).ok_or(HypError::Failure)
    }

    fn new_extent(
        &mut self,
        frames: PfnRange,
        attrs: ExtentAttrs,
        parent: Option<ExtentId>,
    ) -> Result<ExtentId, HypError> {
        if self.nr_extents_ever >= MOST_EXTENTS {
            return Err(HypError::NoMem);
        }
        let id = ExtentId(self.nr_extents_ever);
        self.nr_extents_ever += 1;
        let extent = Extent {
            kind: attrs.kind,
            memtype: attrs.memtype,
            access: attrs.access,
            frames,
            parent,
            children: BTreeSet::new(),
            slots: Default::default(),
            is_deleted: false,
        };
        self.extents.insert(id, extent);
        Ok(id)
    }

    /// Makes an extent of the partition's. A basic one has all of its range at once, a sparse one nothing. A
    /// device's has all of it, and nobody may have had it before.
    ///
    /// # Errors
    /// In this order: `ArgumentInvalid`, `ArgumentAlignment`, `ArgumentInvalid` for attributes; `NotOwner`.
    pub(crate) fn create_extent(
        &mut self,
        base: u64,
        size: u64,
        attrs: u64,
        is_device: bool,
    ) -> Result<ExtentId, HypError> {
        if size == 0 || base.checked_add(size - 1).is_none() {
            return Err(HypError::ArgumentInvalid);
        }
        Bytes { offset: base, size }.check_aligned(0)?;
        let attrs = ExtentAttrs::decode(attrs)?;
        let frames = PfnRange::new(Pfn::new(base >> PAGE_SHIFT), size >> PAGE_SHIFT);
        let frames = frames.map_err(|_| HypError::NotOwner)?;
        let id = self.new_extent(frames, attrs, None)?;
        let taken = match (is_device, attrs.kind) {
            (true, _) => self.memdb.insert(frames, Owner::Extent(id)),
            (false, ExtentKind::Basic) => {
                self.memdb.update(frames, Owner::Extent(id), Owner::Partition)
            }
            (false, ExtentKind::Sparse) => return Ok(id),
        };
        if let Err(error) = taken {
            self.extents.remove(&id);
            return Err(error);
        }
        self.spec.own(frames, Owner::Extent(id));
        self.settle();
        Ok(id)
    }

    /// Makes an extent of part of another, with no more rights. What the parent records, the child records, with
    /// its own rights. If one of the two is basic, the memory is the child's at once.
    ///
    /// # Errors
    /// In this order: `ArgumentInvalid` for no size or a wrap, `AddrInvalid` outside of the parent,
    /// `ArgumentAlignment`, `ArgumentInvalid` for attributes, rights or another kind of memory; `NotOwner`;
    /// `Denied` if the parent maps only part of what a basic child would have; `NoMem`.
    pub(crate) fn derive_extent(
        &mut self,
        parent_id: ExtentId,
        offset: u64,
        size: u64,
        attrs: u64,
    ) -> Result<ExtentId, HypError> {
        let parent = self.extent(parent_id)?;
        if size == 0 || offset.checked_add(size - 1).is_none() {
            return Err(HypError::ArgumentInvalid);
        }
        let parent_size = parent.frames.len_bytes().get();
        let end = offset.checked_add(size).filter(|&end| end <= parent_size);
        if offset >= parent_size || end.is_none() {
            return Err(HypError::AddrInvalid);
        }
        Bytes { offset, size }.check_aligned(0)?;
        let attrs = ExtentAttrs::decode(attrs)?;
        let memtype_fits = parent.memtype == MemType::Any || parent.memtype == attrs.memtype;
        if !parent.access.covers(attrs.access) || !memtype_fits {
            return Err(HypError::ArgumentInvalid);
        }
        let frames = parent.frames_of(Bytes { offset, size })?;
        let takes_all = parent.kind == ExtentKind::Basic || attrs.kind == ExtentKind::Basic;
        if takes_all && !self.memdb.is_all(frames, Owner::Extent(parent_id)) {
            return Err(HypError::NotOwner);
        }
        let inherited = parent.inherited(frames, attrs)?;
        let id = self.new_extent(frames, attrs, Some(parent_id))?;
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.slots = inherited;
        }
        self.spec.derive(id, parent_id, frames, attrs.access);
        if takes_all {
            if let Err(error) = self.transfer(Owner::Extent(parent_id), Owner::Extent(id), frames) {
                self.extents.remove(&id);
                self.spec.forget_extent(id);
                return Err(error);
            }
        }
        if let Some(parent) = self.extents.get_mut(&parent_id) {
            parent.children.insert(id);
        }
        self.settle();
        Ok(id)
    }

    /// Gives an extent up. Its memory is its parent's again, or the partition's; with children it waits for them.
    ///
    /// # Errors
    /// `NoMem` if the parent's mappings cannot be made; nothing has changed.
    pub(crate) fn delete_extent(&mut self, id: ExtentId) -> Result<(), HypError> {
        let mut next = Some(id);
        while let Some(id) = next {
            let extent = self.extents.get_mut(&id).ok_or(HypError::Failure)?;
            extent.is_deleted = true;
            if !extent.children.is_empty() {
                break;
            }
            let (frames, parent) = (extent.frames, extent.parent);
            let to = parent.map_or(Owner::Partition, Owner::Extent);
            let pieces = self.memdb.walk(frames, Owner::Extent(id));
            for (nth, &piece) in pieces.iter().enumerate() {
                if let Err(error) = self.transfer(Owner::Extent(id), to, piece) {
                    for &piece in &pieces[..nth] {
                        let back = self.transfer(to, Owner::Extent(id), piece);
                        self.note(back);
                    }
                    if let Some(extent) = self.extents.get_mut(&id) {
                        extent.is_deleted = false;
                    }
                    self.settle();
                    return Err(error);
                }
            }
            self.extents.remove(&id);
            self.spec.forget_extent(id);
            next = None;
            if let Some(parent) = parent {
                if let Some(extent) = self.extents.get_mut(&parent) {
                    extent.children.remove(&id);
                    next = extent.is_deleted.then_some(parent);
                }
            }
        }
        self.settle();
        Ok(())
    }
}

impl Extent {
    /// What a child records of its parent's mappings.
    fn inherited(
        &self,
        frames: PfnRange,
        attrs: ExtentAttrs,
    ) -> Result<[Option<Slot>; MAX_MAPS], HypError> {
        let mut slots: [Option<Slot>; MAX_MAPS] = Default::default();
        for (to, from) in slots.iter_mut().zip(&self.slots) {
            let Some(from) = from else { continue };
            let mut records = Records::default();
            let mut next = frames.start().get();
            while next < frames.end().get() {
                let found = from.records.at(Pfn::new(next), frames.end().get() - next);
                let is_part = found.nr < frames.nr_pages();
                if is_part && attrs.kind == ExtentKind::Basic {
                    return Err(HypError::Denied);
                }
                if let Some((gfn, mapped)) = found.to {
                    let part = PfnRange::new(Pfn::new(next), found.nr);
                    let part = part.map_err(|_| HypError::Failure)?;
                    let masked: MapAttrs = mapped.masked(attrs.access);
                    records.insert(part, gfn, masked);
                }
                next += found.nr;
            }
            if !records.is_empty() {
                *to = Some(Slot { aspace: from.aspace, records });
            }
        }
        Ok(slots)
    }
}
