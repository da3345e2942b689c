//! An extent in address spaces.

use super::super::aspace::{AspaceId, Piece};
use super::super::attrs::{ExtentKind, MapAttrs};
use super::super::error::HypError;
use super::super::hyp::Hyp;
use super::super::memdb::{ExtentId, Owner};
use super::records::Records;
use super::{Bytes, Extent, PAGE_MASK, Slot};
use crate::addr::{Gfn, Pfn};
use crate::geometry::PAGE_SHIFT;
use crate::range::PfnRange;

/// How far sparse extents record addresses.
const VBASE_BITS: u32 = 48;

/// Whether an address and the size behind it are such as a sparse extent records.
fn check_vbase(vbase: u64, size: u64) -> Result<(), HypError> {
    let last = vbase.checked_add(size.saturating_sub(1)).ok_or(HypError::AddrInvalid)?;
    match last >> VBASE_BITS {
        0 => Ok(()),
        _ => Err(HypError::AddrInvalid),
    }
}

impl Extent {
    /// Part of an extent, as partial mappings name it.
    fn part(&self, vbase: u64, bytes: Bytes) -> Result<PfnRange, HypError> {
        bytes.check_aligned(vbase)?;
        let less = bytes.size.checked_sub(1).ok_or(HypError::ArgumentSize)?;
        let last = bytes.offset.checked_add(less).ok_or(HypError::ArgumentSize)?;
        vbase.checked_add(less).ok_or(HypError::ArgumentSize)?;
        if last >= self.frames.len_bytes().get() {
            return Err(HypError::ArgumentSize);
        }
        self.frames_of(bytes)
    }

    /// The slot that records the whole of a basic extent at an address.
    fn basic_slot(&self, aspace: AspaceId, gfn: Gfn) -> Option<usize> {
        let start = self.frames.start();
        self.slots.iter().position(|slot| {
            slot.as_ref().is_some_and(|slot| {
                let to = slot.records.at(start, 1).to;
                slot.aspace == aspace && to.is_some_and(|(at, _)| at == gfn)
            })
        })
    }

    /// Records a mapping: in a slot of this address space where the frames are not recorded, or in an empty one.
    fn record(
        &mut self,
        aspace: AspaceId,
        frames: PfnRange,
        gfn: Gfn,
        attrs: MapAttrs,
    ) -> Result<usize, HypError> {
        if self.kind == ExtentKind::Sparse {
            for (nth, slot) in self.slots.iter_mut().enumerate() {
                let Some(slot) = slot.as_mut().filter(|slot| slot.aspace == aspace) else {
                    continue;
                };
                if slot.records.insert(frames, gfn, attrs) {
                    return Ok(nth);
                }
            }
        }
        let empty = self.slots.iter().position(Option::is_none).ok_or(HypError::MappingsFull)?;
        let mut records = Records::default();
        records.insert(frames, gfn, attrs);
        self.slots[empty] = Some(Slot { aspace, records });
        Ok(empty)
    }

    fn unrecord(&mut self, nth: usize, frames: PfnRange, gfn: Gfn) -> bool {
        let Some(slot) = &mut self.slots[nth] else { return false };
        let done = slot.records.remove(frames, gfn);
        if slot.records.is_empty() {
            self.slots[nth] = None;
        }
        done
    }
}

impl Hyp {
    /// Maps all of an extent. What is mapped there already is no obstacle.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`; `ArgumentInvalid` for rights or a kind that the extent has not; `Denied`
    /// if the address space is read-only; `AddrOverflow` or `AddrInvalid`; `MappingsFull`; `NoMem`.
    pub(crate) fn map(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
        attrs: MapAttrs,
    ) -> Result<(), HypError> {
        if vbase & PAGE_MASK != 0 {
            return Err(HypError::ArgumentAlignment);
        }
        let extent = self.extent(id)?;
        let (frames, kind) = (extent.frames, extent.kind);
        self.check_map(extent, aspace, attrs)?;
        let size = frames.len_bytes().get();
        if kind == ExtentKind::Basic && vbase.checked_add(size - 1).is_none() {
            return Err(HypError::AddrOverflow);
        }
        if kind == ExtentKind::Sparse {
            check_vbase(vbase, size)?;
        }
        self.map_frames(id, aspace, frames, vbase, attrs)
    }

    /// Maps part of a sparse extent.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`; `ArgumentSize` for no size, a wrap, or more than there is;
    /// `ArgumentInvalid`, `Denied` as for [`Self::map`]; `ExtentType` if it is basic; `AddrInvalid`, `MappingsFull`,
    /// `NoMem`.
    pub(crate) fn map_partial(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
        bytes: (u64, u64),
        attrs: MapAttrs,
    ) -> Result<(), HypError> {
        let bytes = Bytes { offset: bytes.0, size: bytes.1 };
        let extent = self.extent(id)?;
        let frames = extent.part(vbase, bytes)?;
        self.check_map(extent, aspace, attrs)?;
        if extent.kind == ExtentKind::Basic {
            return Err(HypError::ExtentType);
        }
        check_vbase(vbase, bytes.size)?;
        self.map_frames(id, aspace, frames, vbase, attrs)
    }

    fn check_map(
        &self,
        extent: &Extent,
        aspace: AspaceId,
        attrs: MapAttrs,
    ) -> Result<(), HypError> {
        match attrs.fits(extent.access, extent.memtype) {
            true => self.check_writable(aspace),
            false => Err(HypError::ArgumentInvalid),
        }
    }

    fn check_writable(&self, aspace: AspaceId) -> Result<(), HypError> {
        match self.aspaces.get(&aspace) {
            Some(aspace) if aspace.read_only => Err(HypError::Denied),
            Some(_) => Ok(()),
            None => Err(HypError::Failure),
        }
    }

    fn map_frames(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        frames: PfnRange,
        vbase: u64,
        attrs: MapAttrs,
    ) -> Result<(), HypError> {
        let gfn = Gfn::new(vbase >> PAGE_SHIFT);
        let extent = self.extents.get_mut(&id).ok_or(HypError::Failure)?;
        let slot = extent.record(aspace, frames, gfn, attrs)?;
        if let Err(error) = self.apply(id, aspace, frames, gfn, attrs) {
            if let Some(extent) = self.extents.get_mut(&id) {
                extent.unrecord(slot, frames, gfn);
            }
            self.settle();
            return Err(error);
        }
        self.spec.claim(id, aspace, frames, gfn, attrs);
        self.settle();
        Ok(())
    }

    /// Maps what the extent has of the frames, all or nothing.
    fn apply(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        frames: PfnRange,
        gfn: Gfn,
        attrs: MapAttrs,
    ) -> Result<(), HypError> {
        let mut undo = Vec::new();
        for piece in self.pieces(id, frames, gfn) {
            let Some(space) = self.aspaces.get_mut(&aspace) else { continue };
            if let Err(error) = space.map(aspace, &mut self.heap, piece, attrs, &mut undo) {
                self.roll_back(undo);
                return Err(error);
            }
        }
        Ok(())
    }

    /// What the extent has of frames that go to an address.
    fn pieces(&self, id: ExtentId, frames: PfnRange, gfn: Gfn) -> Vec<Piece> {
        let owned = self.memdb.walk(frames, Owner::Extent(id)).into_iter();
        let pieces = owned.map(|part| {
            let skip = part.start().get() - frames.start().get();
            Piece { gfn: Gfn::new(gfn.get() + skip), pfn: part.start(), nr: part.nr_pages() }
        });
        pieces.collect()
    }

    /// Unmaps all of an extent from where it is mapped.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`, `Denied`, `AddrInvalid` if it is not mapped there, `NoMem`.
    pub(crate) fn unmap(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
    ) -> Result<(), HypError> {
        if vbase & PAGE_MASK != 0 {
            return Err(HypError::ArgumentAlignment);
        }
        self.check_writable(aspace)?;
        let extent = self.extent(id)?;
        let (frames, kind) = (extent.frames, extent.kind);
        if kind == ExtentKind::Sparse {
            check_vbase(vbase, frames.len_bytes().get())?;
        }
        self.unmap_frames(id, aspace, frames, vbase)
    }

    /// Unmaps part of a sparse extent. Entries that lead elsewhere by now stay.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`, `ArgumentSize`, `Denied`, `ExtentType`, `AddrInvalid` if not all of it is
    /// mapped there, `NoMem`.
    pub(crate) fn unmap_partial(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
        bytes: (u64, u64),
    ) -> Result<(), HypError> {
        let bytes = Bytes { offset: bytes.0, size: bytes.1 };
        let extent = self.extent(id)?;
        let frames = extent.part(vbase, bytes)?;
        let kind = extent.kind;
        self.check_writable(aspace)?;
        if kind == ExtentKind::Basic {
            return Err(HypError::ExtentType);
        }
        check_vbase(vbase, bytes.size)?;
        self.unmap_frames(id, aspace, frames, vbase)
    }

    fn unmap_frames(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        frames: PfnRange,
        vbase: u64,
    ) -> Result<(), HypError> {
        let gfn = Gfn::new(vbase >> PAGE_SHIFT);
        let extent = self.extents.get_mut(&id).ok_or(HypError::Failure)?;
        let nth = match extent.kind {
            ExtentKind::Basic => extent.basic_slot(aspace, gfn),
            ExtentKind::Sparse => extent.slots.iter().position(|slot| {
                slot.as_ref()
                    .is_some_and(|slot| slot.aspace == aspace && slot.records.has(frames, gfn))
            }),
        };
        let nth = nth.ok_or(HypError::AddrInvalid)?;
        self.unmap_pieces(id, [(aspace, frames, gfn)])?;
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.unrecord(nth, frames, gfn);
        }
        self.spec.unclaim(id, aspace, frames, gfn);
        self.settle();
        Ok(())
    }

    /// Empties what the tables have of mappings: of all of them, or of none.
    fn unmap_pieces(
        &mut self,
        id: ExtentId,
        mappings: impl IntoIterator<Item = (AspaceId, PfnRange, Gfn)>,
    ) -> Result<(), HypError> {
        let mut undo = Vec::new();
        for (aspace, frames, gfn) in mappings {
            for piece in self.pieces(id, frames, gfn) {
                let Some(space) = self.aspaces.get_mut(&aspace) else { continue };
                if let Err(error) = space.unmap(aspace, &mut self.heap, piece, &mut undo) {
                    self.roll_back(undo);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Unmaps an extent from everywhere.
    ///
    /// # Errors
    /// `NoMem`; nothing has changed.
    pub(crate) fn unmap_all(&mut self, id: ExtentId) -> Result<(), HypError> {
        let extent = self.extent(id)?;
        let mut mappings = Vec::new();
        for slot in extent.slots() {
            mappings.extend(slot.records.iter().map(|(frames, gfn, _)| (slot.aspace, frames, gfn)));
        }
        self.unmap_pieces(id, mappings)?;
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.slots = Default::default();
        }
        self.spec.unclaim_all(id);
        self.settle();
        Ok(())
    }

    /// Changes the rights of a basic extent's mapping. A sparse one always says that it is not mapped there.
    ///
    /// # Errors
    /// In this order: `ArgumentInvalid` for rights that it has not, `ArgumentAlignment`, `Denied`, `AddrInvalid`,
    /// `NoMem`.
    pub(crate) fn update_access(
        &mut self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
        access: MapAttrs,
    ) -> Result<(), HypError> {
        let extent = self.extent(id)?;
        if !extent.access.covers(access.access()) {
            return Err(HypError::ArgumentInvalid);
        }
        if vbase & PAGE_MASK != 0 {
            return Err(HypError::ArgumentAlignment);
        }
        self.check_writable(aspace)?;
        let gfn = Gfn::new(vbase >> PAGE_SHIFT);
        let frames = extent.frames;
        let slot = match extent.kind {
            ExtentKind::Basic => extent.basic_slot(aspace, gfn),
            ExtentKind::Sparse => None,
        };
        let nth = slot.ok_or(HypError::AddrInvalid)?;
        let recorded =
            extent.slots[nth].as_ref().and_then(|slot| slot.records.at(frames.start(), 1).to);
        let (_, old) = recorded.ok_or(HypError::AddrInvalid)?;
        let new = old.with_access(access);
        self.apply(id, aspace, frames, gfn, new)?;
        if let Some(slot) = self.extents.get_mut(&id).and_then(|extent| extent.slots[nth].as_mut())
        {
            slot.records.set_access(access);
        }
        self.spec.unclaim(id, aspace, frames, gfn);
        self.spec.claim(id, aspace, frames, gfn, new);
        self.settle();
        Ok(())
    }

    /// The same for part of a sparse extent: the original never finds the mapping, so this says so too.
    ///
    /// # Errors
    /// In this order: `ArgumentInvalid`, `ArgumentAlignment`, `ArgumentSize`, `Denied`, `ExtentType` if it is basic,
    /// `AddrInvalid`.
    pub(crate) fn update_access_partial(
        &self,
        id: ExtentId,
        aspace: AspaceId,
        vbase: u64,
        bytes: (u64, u64),
        access: MapAttrs,
    ) -> Result<(), HypError> {
        let extent = self.extent(id)?;
        if !extent.access.covers(access.access()) {
            return Err(HypError::ArgumentInvalid);
        }
        extent.part(vbase, Bytes { offset: bytes.0, size: bytes.1 })?;
        self.check_writable(aspace)?;
        match extent.kind {
            ExtentKind::Basic => Err(HypError::ExtentType),
            ExtentKind::Sparse => Err(HypError::AddrInvalid),
        }
    }

    /// Where an extent is at an address: offset, size and attributes of what follows in one piece.
    ///
    /// # Errors
    /// In this order: `ArgumentSize` for none, `AddrOverflow`, `ArgumentAlignment`, `AddrInvalid` if nothing is
    /// mapped, `NotOwner` if not all that is mapped in one piece is the extent's.
    pub(crate) fn lookup(
        &self,
        aspace: AspaceId,
        id: ExtentId,
        vbase: u64,
        size: u64,
    ) -> Result<(u64, u64, MapAttrs), HypError> {
        let less = size.checked_sub(1).ok_or(HypError::ArgumentSize)?;
        vbase.checked_add(less).ok_or(HypError::AddrOverflow)?;
        if (vbase | size) & PAGE_MASK != 0 {
            return Err(HypError::ArgumentAlignment);
        }
        let extent = self.extent(id)?;
        let space = self.aspaces.get(&aspace).ok_or(HypError::Failure)?;
        let gfn = Gfn::new(vbase >> PAGE_SHIFT);
        let found = space.lookup(gfn, size >> PAGE_SHIFT).ok_or(HypError::AddrInvalid)?;
        let frames = PfnRange::new(found.pfn, found.nr).map_err(|_| HypError::Failure)?;
        if !self.memdb.is_all(frames, Owner::Extent(id)) {
            return Err(HypError::NotOwner);
        }
        let recorded = extent
            .slots()
            .filter(|slot| slot.aspace == aspace)
            .find_map(|slot| slot.records.at(found.pfn, 1).to.filter(|&(at, _)| at == gfn));
        let (_, attrs) = recorded.ok_or(HypError::Failure)?;
        let offset = found.pfn.get() - extent.frames.start().get();
        Ok((offset << PAGE_SHIFT, found.nr << PAGE_SHIFT, attrs))
    }

    /// Zeroes, cleans or flushes what the extent has of a range. Caches are not modelled: the last two only check.
    ///
    /// # Errors
    /// In this order: `Denied` for a device's memory, or without the right to write; `ArgumentAlignment`;
    /// `ArgumentInvalid` for a wrap; `ArgumentSize` for no size; `ArgumentInvalid` outside of it; `Failure` if
    /// memory is broken.
    pub(crate) fn clean(
        &mut self,
        id: ExtentId,
        bytes: (u64, u64),
        zero: bool,
    ) -> Result<(), HypError> {
        use super::super::attrs::{Access, MemType};
        let extent = self.extent(id)?;
        if extent.memtype == MemType::Device || !extent.access.covers(Access::W) {
            return Err(HypError::Denied);
        }
        let bytes = Bytes { offset: bytes.0, size: bytes.1 };
        bytes.check_aligned(0)?;
        let frames = extent.frames_of(bytes)?;
        if zero {
            for piece in self.memdb.walk(frames, Owner::Extent(id)) {
                self.machine.zero(piece)?;
                self.nr_zeroed += piece.nr_pages();
            }
        }
        Ok(())
    }

    /// Forgets all mappings in an address space that is gone.
    pub(in super::super) fn unslot(&mut self, aspace: AspaceId) {
        for extent in self.extents.values_mut() {
            for slot in &mut extent.slots {
                if slot.as_ref().is_some_and(|slot| slot.aspace == aspace) {
                    *slot = None;
                }
            }
        }
    }

    /// Whether a frame has an owner that records this mapping of it.
    pub(crate) fn records(&self, aspace: AspaceId, gfn: Gfn, pfn: Pfn) -> Option<MapAttrs> {
        let Owner::Extent(id) = self.memdb.owner(pfn) else { return None };
        let extent = self.extents.get(&id)?;
        extent.slots().filter(|slot| slot.aspace == aspace).find_map(|slot| {
            let (at, attrs) = slot.records.at(pfn, 1).to?;
            (at == gfn).then_some(attrs)
        })
    }
}
