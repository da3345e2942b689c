//! Hypercalls that the host's kernel makes for a VM, with capabilities; and what it makes of refusals.

use super::given::Side;
use super::pieces::Piece;
use crate::error::Errno;
use crate::hyp::gunyah::World;
use crate::hyp::gunyah::attrs::{Access, MapAttrs, MapType};
use crate::hyp::gunyah::cspace::{Cspace, Object, Rights};
use crate::hyp::gunyah::error::{HypError, RmError};
use crate::hyp::gunyah::hypercall::{
    ASPACE_MAP, ASPACE_UNMAP, EXTENT_DONATE, EXTENT_MODIFY, NO_SYNC, PARTIAL,
};
use crate::hyp::gunyah::rm::Vmid;
use crate::hyp::gunyah::rm::paging::Paging;
use crate::hyp::gunyah::rm::vm::Home;
use crate::range::PfnRange;

/// Of a donation: to an extent with the same parent.
const TO_SIBLING: u64 = 2;
/// Of a change of an extent: zeroes.
const ZERO: u64 = 1;

/// What the resource manager hands out for a VM.
#[derive(Debug)]
pub(super) struct Resources {
    caps: Cspace,
    host_private: u64,
    host_shared: u64,
    guest_private: u64,
    guest_shared: u64,
    aspace: u64,
}

/// The frames of a piece.
pub(super) fn frames(piece: Piece) -> Result<PfnRange, Errno> {
    PfnRange::new(piece.pfn, piece.nr).map_err(|error| error.errno())
}

impl Resources {
    /// Capabilities with no more rights than it takes.
    pub(super) fn new(host: Home, guest: Home, paging: Paging) -> Result<Self, HypError> {
        let mut caps = Cspace::default();
        let mut cap = |object, rights| caps.insert(object, rights).map(|cap| cap.0);
        let of_guest = Rights::EXTENT_MAP.and(Rights::EXTENT_DONATE);
        Ok(Self {
            host_private: cap(Object::Extent(host.memory), Rights::EXTENT_DONATE)?,
            host_shared: cap(Object::Extent(host.memory), Rights::EXTENT_DONATE)?,
            guest_private: cap(Object::Extent(paging.private), of_guest)?,
            guest_shared: cap(Object::Extent(paging.shared), of_guest)?,
            aspace: cap(Object::Aspace(guest.aspace), Rights::ASPACE_MAP)?,
            caps,
        })
    }

    fn guest(&self, side: Side) -> u64 {
        match side {
            Side::Lent => self.guest_private,
            Side::Shared => self.guest_shared,
        }
    }

    fn host(&self, side: Side) -> u64 {
        match side {
            Side::Lent => self.host_private,
            Side::Shared => self.host_shared,
        }
    }

    fn call(&mut self, world: &mut World, number: u64, x: [u64; 7]) -> Result<(), Errno> {
        match world.hyp.hypercall(&mut self.caps, number, x) {
            [0, ..] => Ok(()),
            [error, ..] => Err(errno_of(error)),
        }
    }

    fn donate(
        &mut self,
        world: &mut World,
        [from, to]: [u64; 2],
        piece: Piece,
    ) -> Result<(), Errno> {
        let x = [TO_SIBLING, from, to, piece.pfn.pa().get(), piece.size(), 0, 0];
        self.call(world, EXTENT_DONATE, x)
    }

    /// From the host to the guest.
    pub(super) fn give(
        &mut self,
        world: &mut World,
        piece: Piece,
        side: Side,
    ) -> Result<(), Errno> {
        let ways = [self.host(side), self.guest(side)];
        self.donate(world, ways, piece)
    }

    /// From the guest to the host.
    pub(super) fn take(
        &mut self,
        world: &mut World,
        piece: Piece,
        side: Side,
    ) -> Result<(), Errno> {
        let ways = [self.guest(side), self.host(side)];
        self.donate(world, ways, piece)
    }

    /// From one of the guest's to the other.
    pub(super) fn turn(&mut self, world: &mut World, piece: Piece, to: Side) -> Result<(), Errno> {
        let from = match to {
            Side::Lent => Side::Shared,
            Side::Shared => Side::Lent,
        };
        let ways = [self.guest(from), self.guest(to)];
        self.donate(world, ways, piece)
    }

    pub(super) fn map(&mut self, world: &mut World, piece: Piece, side: Side) -> Result<(), Errno> {
        let access = match (side, piece.writes) {
            (Side::Lent, true) => Access::RWX,
            (Side::Lent, false) => Access::RX,
            (Side::Shared, true) => Access::RW,
            (Side::Shared, false) => Access::R,
        };
        let attrs = MapAttrs::new(access, MapType::CACHED).encode();
        let (ipa, pa) = (piece.gfn.ipa().get(), piece.pfn.pa().get());
        let x = [self.aspace, self.guest(side), ipa, attrs, PARTIAL, pa, piece.size()];
        self.call(world, ASPACE_MAP, x)
    }

    pub(super) fn unmap(
        &mut self,
        world: &mut World,
        piece: Piece,
        side: Side,
    ) -> Result<(), Errno> {
        let (ipa, pa) = (piece.gfn.ipa().get(), piece.pfn.pa().get());
        let x = [self.aspace, self.guest(side), ipa, PARTIAL, pa, piece.size(), 0];
        self.call(world, ASPACE_UNMAP, x)
    }

    /// What a donation from protected memory does by itself, in versions that have it.
    pub(super) fn zero(&mut self, world: &mut World, piece: Piece) -> Result<(), Errno> {
        let x = [self.guest_private, ZERO | NO_SYNC, piece.pfn.pa().get(), piece.size(), 0, 0, 0];
        self.call(world, EXTENT_MODIFY, x)
    }
}

/// What the kernel answers when the hypervisor refuses.
fn errno_of(register: u64) -> Errno {
    let is = |error: HypError| register == error.register();
    let denied = [
        HypError::Denied,
        HypError::CapNull,
        HypError::WrongObjectType,
        HypError::InsufficientRights,
    ];
    match () {
        () if is(HypError::NoMem) => Errno::ENOMEM,
        () if denied.into_iter().any(is) => Errno::EACCES,
        () if is(HypError::Busy) => Errno::EBUSY,
        () if is(HypError::Unimplemented) => Errno::EOPNOTSUPP,
        () => Errno::EINVAL,
    }
}

impl From<HypError> for Errno {
    fn from(error: HypError) -> Self {
        errno_of(error.register())
    }
}

/// What the kernel answers when the resource manager refuses.
impl From<RmError> for Errno {
    fn from(error: RmError) -> Self {
        match error {
            RmError::NoMem => Self::ENOMEM,
            RmError::NoResource => Self::ENODEV,
            RmError::Denied => Self::EPERM,
            RmError::Busy => Self::EBUSY,
            RmError::Unimplemented => Self::EOPNOTSUPP,
            _ => Self::EINVAL,
        }
    }
}

/// A message of the host's to the resource manager.
///
/// # Errors
/// As the kernel says it.
pub(super) fn message(
    world: &mut World,
    from: Vmid,
    id: u32,
    body: &[u8],
) -> Result<Vec<u8>, Errno> {
    let World { hyp, rm, .. } = world;
    let reply = rm.request(hyp, from, id, body);
    match reply.error {
        None => Ok(reply.body),
        Some(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_become_errnos() {
        let hyp = [
            (HypError::NoMem, Errno::ENOMEM),
            (HypError::Denied, Errno::EACCES),
            (HypError::CapNull, Errno::EACCES),
            (HypError::InsufficientRights, Errno::EACCES),
            (HypError::WrongObjectType, Errno::EACCES),
            (HypError::Busy, Errno::EBUSY),
            (HypError::Unimplemented, Errno::EOPNOTSUPP),
            (HypError::NotOwner, Errno::EINVAL),
            (HypError::MappingsFull, Errno::EINVAL),
        ];
        for (error, errno) in hyp {
            assert_eq!(Errno::from(error), errno, "{error:?}");
        }
        let rm = [
            (RmError::NoMem, Errno::ENOMEM),
            (RmError::NoResource, Errno::ENODEV),
            (RmError::Denied, Errno::EPERM),
            (RmError::Busy, Errno::EBUSY),
            (RmError::Unimplemented, Errno::EOPNOTSUPP),
            (RmError::MemInUse, Errno::EINVAL),
            (RmError::VmState, Errno::EINVAL),
        ];
        for (error, errno) in rm {
            assert_eq!(Errno::from(error), errno, "{error:?}");
        }
    }
}
