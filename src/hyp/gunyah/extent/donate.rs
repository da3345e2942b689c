//! Memory changes hands, and mappings follow: those of the owner that was go, those of the new one come. All of
//! it, or nothing.

use super::super::aspace::{Piece, Undo};
use super::super::attrs::{ExtentKind, MapAttrs};
use super::super::error::HypError;
use super::super::hyp::Hyp;
use super::super::memdb::{ExtentId, Owner};
use super::{Bytes, MAX_MAPS, Slot};
use crate::addr::{Gfn, Pfn};
use crate::range::PfnRange;

/// Where one slot puts frames: the same for all frames of a stretch.
type Target = Option<(super::AspaceId, Gfn, MapAttrs)>;

impl Hyp {
    /// Gives memory to a child from its parent, or with `reverse` back. The parent of an extent that is not
    /// derived is the partition.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`, `ArgumentInvalid` for a wrap of the offset, `ArgumentSize`,
    /// `ArgumentInvalid` outside of the extent; `ExtentType` if it is basic, `ArgumentInvalid` if its parent is;
    /// `NotOwner`; `NoMem`. Nothing has changed then.
    pub(crate) fn donate_child(
        &mut self,
        child: ExtentId,
        bytes: (u64, u64),
        reverse: bool,
    ) -> Result<(), HypError> {
        let bytes = Bytes { offset: bytes.0, size: bytes.1 };
        bytes.check_aligned(0)?;
        let extent = self.extent(child)?;
        let frames = extent.frames_of(bytes)?;
        if extent.kind == ExtentKind::Basic {
            return Err(HypError::ExtentType);
        }
        let parent = match extent.parent {
            Some(parent) if self.extent(parent)?.kind == ExtentKind::Basic => {
                return Err(HypError::ArgumentInvalid);
            }
            Some(parent) => Owner::Extent(parent),
            None => Owner::Partition,
        };
        let child = Owner::Extent(child);
        let (from, to) = if reverse { (child, parent) } else { (parent, child) };
        let answer = self.transfer(from, to, frames);
        self.settle();
        answer
    }

    /// Gives memory to another child of the same parent.
    ///
    /// # Errors
    /// In this order: `ArgumentAlignment`, `ArgumentInvalid` for a wrap of the offset, `ArgumentSize`,
    /// `ArgumentInvalid` outside of one of them, or if they are no siblings; `ExtentType` if the giver is basic,
    /// `ArgumentInvalid` if the taker is; `NotOwner`; `NoMem`. Nothing has changed then.
    pub(crate) fn donate_sibling(
        &mut self,
        from: ExtentId,
        to: ExtentId,
        bytes: (u64, u64),
    ) -> Result<(), HypError> {
        let bytes = Bytes { offset: bytes.0, size: bytes.1 };
        bytes.check_aligned(0)?;
        let (giver, taker) = (self.extent(from)?, self.extent(to)?);
        let frames = giver.frames_of(bytes)?;
        let are_siblings = from != to && giver.parent.is_some() && giver.parent == taker.parent;
        if !taker.frames.covers(&frames) || !are_siblings {
            return Err(HypError::ArgumentInvalid);
        }
        match (giver.kind, taker.kind) {
            (ExtentKind::Basic, _) => return Err(HypError::ExtentType),
            (_, ExtentKind::Basic) => return Err(HypError::ArgumentInvalid),
            _ => {}
        }
        let answer = self.transfer(Owner::Extent(from), Owner::Extent(to), frames);
        self.settle();
        answer
    }

    /// Ownership, and then mappings.
    pub(super) fn transfer(
        &mut self,
        from: Owner,
        to: Owner,
        frames: PfnRange,
    ) -> Result<(), HypError> {
        self.memdb.update(frames, to, from)?;
        let mut undo = Vec::new();
        if let Err(error) = self.move_mappings(from, to, frames, &mut undo) {
            self.roll_back(undo);
            let back = self.memdb.update(frames, from, to);
            self.note(back);
            return Err(error);
        }
        self.spec.own(frames, to);
        Ok(())
    }

    fn move_mappings(
        &mut self,
        from: Owner,
        to: Owner,
        frames: PfnRange,
        undo: &mut Vec<Undo>,
    ) -> Result<(), HypError> {
        let Self { extents, aspaces, heap, .. } = self;
        let slots_of = |owner| match owner {
            Owner::Extent(id) => extents.get(&id).map(|extent| &extent.slots),
            _ => None,
        };
        let (from, to) = (slots_of(from), slots_of(to));
        let mut next = frames.start().get();
        while next < frames.end().get() {
            let pfn = Pfn::new(next);
            let mut nr = frames.end().get() - next;
            let old = targets(from, pfn, &mut nr);
            let new = targets(to, pfn, &mut nr);
            // One after the other, so that no page is mapped for both at any time.
            for &(aspace, gfn, _) in old.iter().flatten() {
                let stays = new.iter().flatten().any(|&(to, at, _)| (to, at) == (aspace, gfn));
                if let Some(space) = aspaces.get_mut(&aspace).filter(|_| !stays) {
                    space.unmap(aspace, heap, Piece { gfn, pfn, nr }, undo)?;
                }
            }
            for &(aspace, gfn, attrs) in new.iter().flatten() {
                let is_there = old.iter().flatten().any(|&was| was == (aspace, gfn, attrs));
                if let Some(space) = aspaces.get_mut(&aspace).filter(|_| !is_there) {
                    space.map(aspace, heap, Piece { gfn, pfn, nr }, attrs, undo)?;
                }
            }
            next += nr;
        }
        Ok(())
    }
}

/// Where an owner's slots put frames from one on; and for how many this holds.
fn targets(slots: Option<&[Option<Slot>; MAX_MAPS]>, pfn: Pfn, nr: &mut u64) -> [Target; MAX_MAPS] {
    let mut found = [None; MAX_MAPS];
    for (target, slot) in found.iter_mut().zip(slots.into_iter().flatten()) {
        let Some(slot) = slot else { continue };
        let recorded = slot.records.at(pfn, *nr);
        *nr = recorded.nr;
        *target = recorded.to.map(|(gfn, attrs)| (slot.aspace, gfn, attrs));
    }
    found
}
