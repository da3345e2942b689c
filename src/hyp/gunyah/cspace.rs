//! Capabilities: a number that a VM holds for an object, with rights.

use std::collections::BTreeMap;

use super::aspace::AspaceId;
use super::error::HypError;
use super::memdb::ExtentId;

/// What a capability is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    Partition,
    Extent(ExtentId),
    Aspace(AspaceId),
}

/// What its holder may do with it; the bits are the original's, of each kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights(u32);

impl Rights {
    pub(crate) const ALL: Self = Self(u32::MAX);
    pub(crate) const PARTITION_CREATE: Self = Self(1);
    pub(crate) const PARTITION_DONATE: Self = Self(2);
    pub(crate) const EXTENT_MAP: Self = Self(1);
    pub(crate) const EXTENT_DERIVE: Self = Self(2);
    pub(crate) const EXTENT_LOOKUP: Self = Self(8);
    pub(crate) const EXTENT_DONATE: Self = Self(16);
    pub(crate) const ASPACE_MAP: Self = Self(2);
    pub(crate) const ASPACE_LOOKUP: Self = Self(4);

    pub(crate) const fn of(raw: u32) -> Self {
        Self(raw)
    }

    /// Both of them.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A capability's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CapId(pub(crate) u64);

#[derive(Clone, Copy, Debug)]
struct Cap {
    object: Object,
    rights: Rights,
}

/// How many a VM may hold.
const MOST_CAPS: usize = 1 << 16;

/// The capabilities of one VM.
#[derive(Debug, Default)]
pub(crate) struct Cspace {
    caps: BTreeMap<CapId, Cap>,
    next: u64,
}

impl Cspace {
    /// Numbers begin somewhere, so that a guess is no capability.
    const FIRST: u64 = 0x1000;

    /// # Errors
    /// `CspaceFull`.
    pub(crate) fn insert(&mut self, object: Object, rights: Rights) -> Result<CapId, HypError> {
        if self.caps.len() >= MOST_CAPS {
            return Err(HypError::CspaceFull);
        }
        let id = CapId(Self::FIRST + self.next);
        self.next += 1;
        self.caps.insert(id, Cap { object, rights });
        Ok(id)
    }

    /// # Errors
    /// `CapNull`.
    pub(crate) fn remove(&mut self, id: CapId) -> Result<Object, HypError> {
        self.caps.remove(&id).map(|cap| cap.object).ok_or(HypError::CapNull)
    }

    /// The object, if it is of the kind that `of` wants and the holder has the rights.
    fn get<T>(
        &self,
        raw: u64,
        rights: Rights,
        of: impl Fn(Object) -> Option<T>,
    ) -> Result<T, HypError> {
        let cap = self.caps.get(&CapId(raw)).ok_or(HypError::CapNull)?;
        let object = of(cap.object).ok_or(HypError::WrongObjectType)?;
        match cap.rights.0 & rights.0 == rights.0 {
            true => Ok(object),
            false => Err(HypError::InsufficientRights),
        }
    }

    /// # Errors
    /// In this order: `CapNull`, `WrongObjectType`, `InsufficientRights`.
    pub(crate) fn extent(&self, raw: u64, rights: Rights) -> Result<ExtentId, HypError> {
        self.get(raw, rights, |object| match object {
            Object::Extent(id) => Some(id),
            _ => None,
        })
    }

    /// # Errors
    /// As for [`Self::extent`].
    pub(crate) fn aspace(&self, raw: u64, rights: Rights) -> Result<AspaceId, HypError> {
        self.get(raw, rights, |object| match object {
            Object::Aspace(id) => Some(id),
            _ => None,
        })
    }

    /// # Errors
    /// As for [`Self::extent`].
    pub(crate) fn partition(&self, raw: u64, rights: Rights) -> Result<(), HypError> {
        self.get(raw, rights, |object| (object == Object::Partition).then_some(()))
    }
}

#[cfg(test)]
impl Cspace {
    /// Gives a capability another number.
    pub(crate) fn rename(&mut self, from: CapId, to: CapId) {
        if let Some(cap) = self.caps.remove(&from) {
            self.caps.insert(to, cap);
        }
    }
}
