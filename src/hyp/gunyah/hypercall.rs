//! The hypervisor's calls, by number and raw registers. Any numbers may come.
//!
//! Making an extent and giving it its range is one call here: the original has an object that is made, configured
//! and activated in three.

use super::attrs::MapAttrs;
use super::cspace::{Cspace, Object, Rights};
use super::error::HypError;
use super::hyp::Hyp;

pub(crate) const ASPACE_MAP: u64 = 0x602b;
pub(crate) const ASPACE_UNMAP: u64 = 0x602c;
pub(crate) const ASPACE_UPDATE_ACCESS: u64 = 0x602d;
pub(crate) const EXTENT_MODIFY: u64 = 0x6030;
pub(crate) const EXTENT_CONFIGURE: u64 = 0x6031;
pub(crate) const EXTENT_DERIVE: u64 = 0x6032;
pub(crate) const EXTENT_DONATE: u64 = 0x6033;
pub(crate) const ASPACE_LOOKUP: u64 = 0x605a;
pub(crate) const ASPACE_CONFIGURE_VMMIO: u64 = 0x6060;

/// Bit 31 of flags: the caller does not wait until nobody uses what was there before. Here nobody does.
pub(crate) const NO_SYNC: u64 = 1 << 31;
/// Of map flags: part of an extent.
pub(crate) const PARTIAL: u64 = 1;

/// What a call leaves in registers 0 to 3.
pub(crate) type Registers = [u64; 4];

impl Hyp {
    /// Makes a call for the holder of these capabilities.
    pub(crate) fn hypercall(&mut self, caps: &mut Cspace, number: u64, x: [u64; 7]) -> Registers {
        let answer = match number {
            ASPACE_MAP => self.call_map(caps, x).map(|()| [0; 3]),
            ASPACE_UNMAP => self.call_unmap(caps, x).map(|()| [0; 3]),
            ASPACE_UPDATE_ACCESS => self.call_update_access(caps, x).map(|()| [0; 3]),
            ASPACE_LOOKUP => self.call_lookup(caps, x),
            ASPACE_CONFIGURE_VMMIO => self.call_configure_vmmio(caps, x).map(|()| [0; 3]),
            EXTENT_MODIFY => self.call_modify(caps, x).map(|()| [0; 3]),
            EXTENT_CONFIGURE => self.call_configure(caps, x),
            EXTENT_DERIVE => self.call_derive(caps, x),
            EXTENT_DONATE => self.call_donate(caps, x).map(|()| [0; 3]),
            _ => Err(HypError::Unimplemented),
        };
        match answer {
            Ok([a, b, c]) => [0, a, b, c],
            Err(error) => [error.register(), 0, 0, 0],
        }
    }

    /// Address space, extent, address, attributes, flags, offset, size.
    fn call_map(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        let attrs = MapAttrs::decode(x[3])?;
        let is_partial = map_flags(x[4])?;
        let aspace = caps.aspace(x[0], Rights::ASPACE_MAP)?;
        let extent = caps.extent(x[1], Rights::EXTENT_MAP)?;
        match is_partial {
            true => self.map_partial(extent, aspace, x[2], (x[5], x[6]), attrs),
            false => self.map(extent, aspace, x[2], attrs),
        }
    }

    /// Address space, extent, address, flags, offset, size.
    fn call_unmap(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        let is_partial = map_flags(x[3])?;
        let aspace = caps.aspace(x[0], Rights::ASPACE_MAP)?;
        let extent = caps.extent(x[1], Rights::EXTENT_MAP)?;
        match is_partial {
            true => self.unmap_partial(extent, aspace, x[2], (x[4], x[5])),
            false => self.unmap(extent, aspace, x[2]),
        }
    }

    /// Address space, extent, address, rights, flags, offset, size.
    fn call_update_access(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        if x[3] & !0x77 != 0 {
            return Err(HypError::ArgumentInvalid);
        }
        let access = MapAttrs::decode(x[3])?;
        let is_partial = map_flags(x[4])?;
        let aspace = caps.aspace(x[0], Rights::ASPACE_MAP)?;
        let extent = caps.extent(x[1], Rights::EXTENT_MAP)?;
        match is_partial {
            true => self.update_access_partial(extent, aspace, x[2], (x[5], x[6]), access),
            false => self.update_access(extent, aspace, x[2], access),
        }
    }

    /// Address space, extent, address, size.
    fn call_lookup(&self, caps: &Cspace, x: [u64; 7]) -> Result<[u64; 3], HypError> {
        let aspace = caps.aspace(x[0], Rights::ASPACE_LOOKUP)?;
        let extent = caps.extent(x[1], Rights::EXTENT_LOOKUP)?;
        let (offset, size, attrs) = self.lookup(aspace, extent, x[2], x[3])?;
        Ok([offset, size, attrs.encode()])
    }

    /// Address space, address, size, and whether to add or to remove.
    fn call_configure_vmmio(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        let aspace = caps.aspace(x[0], Rights::ASPACE_ADD_VMMIO)?;
        let space = self.aspaces.get_mut(&aspace).ok_or(HypError::Failure)?;
        match x[3] {
            0 => space.vmmio.add(x[1], x[2]),
            1 => space.vmmio.remove(x[1], x[2]),
            _ => Err(HypError::Unimplemented),
        }
    }

    /// Extent, flags, offset, size. What touches bytes wants `NO_SYNC`; what only waits must not have it.
    fn call_modify(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        let (op, syncs) = (x[1] & 0xff, x[1] & NO_SYNC == 0);
        if x[1] & !(0xff | NO_SYNC) != 0 {
            return Err(HypError::ArgumentInvalid);
        }
        let extent = caps.extent(x[0], Rights::EXTENT_MAP)?;
        match (op, syncs) {
            (0, _) => self.unmap_all(extent),
            (1, false) => self.clean(extent, (x[2], x[3]), true),
            (2 | 3, false) => self.clean(extent, (x[2], x[3]), false),
            (255, true) => Ok(()),
            _ => Err(HypError::ArgumentInvalid),
        }
    }

    /// Partition, base, size, attributes. Answers with the new capability.
    fn call_configure(&mut self, caps: &mut Cspace, x: [u64; 7]) -> Result<[u64; 3], HypError> {
        caps.partition(x[0], Rights::PARTITION_CREATE)?;
        let id = self.create_extent(x[1], x[2], x[3], false)?;
        self.hand_out(caps, Object::Extent(id))
    }

    /// Parent, offset, size, attributes. Answers with the new capability.
    fn call_derive(&mut self, caps: &mut Cspace, x: [u64; 7]) -> Result<[u64; 3], HypError> {
        let parent = caps.extent(x[0], Rights::EXTENT_DERIVE)?;
        let id = self.derive_extent(parent, x[1], x[2], x[3])?;
        self.hand_out(caps, Object::Extent(id))
    }

    fn hand_out(&mut self, caps: &mut Cspace, object: Object) -> Result<[u64; 3], HypError> {
        let cap = caps.insert(object, Rights::ALL);
        if let (Err(_), Object::Extent(id)) = (&cap, object) {
            let deleted = self.delete_extent(id);
            self.note(deleted);
        }
        Ok([cap?.0, 0, 0])
    }

    /// Options, from, to, offset, size.
    fn call_donate(&mut self, caps: &Cspace, x: [u64; 7]) -> Result<(), HypError> {
        if x[0] & !(0xff | NO_SYNC) != 0 {
            return Err(HypError::ArgumentInvalid);
        }
        let bytes = (x[3], x[4]);
        match x[0] & 0xff {
            0 => self.call_donate_child(caps, x[1], x[2], bytes, false),
            1 => self.call_donate_child(caps, x[2], x[1], bytes, true),
            2 => {
                let from = caps.extent(x[1], Rights::EXTENT_DONATE)?;
                let to = caps.extent(x[2], Rights::EXTENT_DONATE)?;
                self.donate_sibling(from, to, bytes)
            }
            _ => Err(HypError::ArgumentInvalid),
        }
    }

    fn call_donate_child(
        &mut self,
        caps: &Cspace,
        parent: u64,
        child: u64,
        bytes: (u64, u64),
        reverse: bool,
    ) -> Result<(), HypError> {
        let child = caps.extent(child, Rights::EXTENT_DONATE)?;
        let is_parent = match self.extent(child)?.parent {
            Some(wanted) => caps.extent(parent, Rights::EXTENT_DONATE)? == wanted,
            None => caps.partition(parent, Rights::PARTITION_DONATE).map(|()| true)?,
        };
        match is_parent {
            true => self.donate_child(child, bytes, reverse),
            false => Err(HypError::ArgumentInvalid),
        }
    }
}

fn map_flags(raw: u64) -> Result<bool, HypError> {
    match raw & !(PARTIAL | NO_SYNC) {
        0 => Ok(raw & PARTIAL != 0),
        _ => Err(HypError::ArgumentInvalid),
    }
}
