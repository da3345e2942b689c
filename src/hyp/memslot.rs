//! Memslots: which guest frames are which pages of which object.
//!
//! The rules are those of `KVM_SET_USER_MEMORY_REGION2` with a guest_memfd: slots do not overlap in guest
//! memory, a page of an object is in one slot at most, and a slot is made and deleted but never changed.

use std::fmt;

use crate::addr::{Gfn, Pgoff};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::gmem::{BindingId, GuestMemfd};
use crate::range::{GfnRange, PgoffRange};
use crate::state::Visibility;

/// How many memslots a guest may have: KVM's limit.
const MAX_SLOTS: u16 = 32_764;

/// The number of a memslot, one guest's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemslotId(u16);

impl MemslotId {
    /// The memslot of that number; `None` beyond the 32,764 that there are.
    pub const fn from_u16(number: u16) -> Option<Self> {
        if number < MAX_SLOTS { Some(Self(number)) } else { None }
    }

    /// The number.
    pub const fn to_u16(self) -> u16 {
        self.0
    }
}

impl fmt::Display for MemslotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memslot {}", self.0)
    }
}

/// Guest frames that are pages of an object.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) id: MemslotId,
    pub(super) gfns: GfnRange,
    pub(super) first: Pgoff,
    pub(super) memfd: GuestMemfd,
    /// What of it was shared when it was made, ascending; kept where sides are fixed.
    pub(super) shared: Box<[GfnRange]>,
    /// None while the object is being asked, be it to enter the slot or to let it go.
    pub(super) binding: Option<BindingId>,
}

/// What of a memslot-to-be is shared.
///
/// # Errors
/// [`ErrorKind::OutOfRange`]; [`ErrorKind::Exhausted`].
pub(super) fn shared_part(
    memfd: &GuestMemfd,
    gfn: Gfn,
    pages: PgoffRange,
) -> Result<Box<[GfnRange]>, Error> {
    let mut shared = Vec::new();
    let sides = memfd.visibility(pages).map_err(|error| error.of(Op::BindSlot).on(pages))?;
    for (part, _) in sides.filter(|(_, side)| *side == Visibility::Shared) {
        let start = gfn.checked_add(part.start().get() - pages.start().get());
        let start = start.ok_or_else(|| Error::new(Op::BindSlot, ErrorKind::Overflow))?;
        shared.try_reserve(1).map_err(|_| Error::new(Op::BindSlot, ErrorKind::Exhausted))?;
        shared.push(GfnRange::new(start, part.nr_pages())?);
    }
    Ok(shared.into_boxed_slice())
}

/// A page of an object that a memslot puts at a guest frame.
#[derive(Clone, Debug)]
pub(in crate::hyp) struct SlotPage {
    pub(in crate::hyp) memfd: GuestMemfd,
    pub(in crate::hyp) page: Pgoff,
}

/// The memslots of a guest.
#[derive(Debug, Default)]
pub(super) struct Memslots {
    /// In ascending order of guest frames.
    slots: Vec<Slot>,
}

impl Memslots {
    /// What a memslot has there.
    pub(super) fn page(&self, gfn: Gfn) -> Option<SlotPage> {
        let next = self.slots.partition_point(|slot| slot.gfns.start() <= gfn);
        let slot = self.slots.get(next.checked_sub(1)?)?;
        if !slot.gfns.contains(gfn) || slot.binding.is_none() {
            return None;
        }
        let page = slot.first.checked_add(gfn.get() - slot.gfns.start().get())?;
        Some(SlotPage { memfd: slot.memfd.clone(), page })
    }

    /// The lowest number that no slot has.
    pub(super) fn free_id(&self) -> Result<MemslotId, Error> {
        let is_free = |id: &MemslotId| self.slots.iter().all(|slot| slot.id != *id);
        let id = (0..MAX_SLOTS).map(MemslotId).find(is_free);
        id.ok_or_else(|| Error::new(Op::BindSlot, ErrorKind::Saturated).because("memslots"))
    }

    /// Enters a memslot that is not yet in use, so that no other can take its place.
    pub(super) fn hold(&mut self, slot: Slot) -> Result<(), Error> {
        let exists = |why: String| Error::new(Op::BindSlot, ErrorKind::Exists).because(why);
        // The number first, as KVM looks at it: a slot on private memory is not changed, only deleted.
        if let Some(other) = self.slots.iter().find(|other| other.id == slot.id) {
            let why = format!("{} cannot be changed, only deleted", other.id);
            return Err(exists(why).errno_is(Errno::EINVAL));
        }
        let in_the_way = self.slots.iter().find(|it| it.gfns.intersection(&slot.gfns).is_some());
        if let Some(other) = in_the_way {
            return Err(exists(format!("{} is at {}", other.id, other.gfns)));
        }
        self.slots.try_reserve(1).map_err(|_| Error::new(Op::BindSlot, ErrorKind::Exhausted))?;
        let at = self.slots.partition_point(|other| other.gfns.start() < slot.gfns.start());
        self.slots.insert(at, slot);
        Ok(())
    }

    /// Whether frames are in one memslot, and were all on this side when it was made.
    pub(super) fn were_all(&self, gfns: GfnRange, side: Visibility) -> bool {
        let Some(slot) = self.slots.iter().find(|slot| slot.gfns.covers(&gfns)) else {
            return false;
        };
        let next = slot.shared.partition_point(|shared| shared.end() <= gfns.start());
        let shared = slot.shared.get(next);
        match side {
            Visibility::Shared => shared.is_some_and(|shared| shared.covers(&gfns)),
            Visibility::Private => shared.is_none_or(|shared| shared.start() >= gfns.end()),
        }
    }

    /// How many pages from a guest frame on are in its memslot.
    pub(super) fn nr_from(&self, gfn: Gfn) -> u64 {
        let slot = self.slots.iter().find(|slot| slot.gfns.contains(gfn));
        slot.map_or(0, |slot| slot.gfns.end().get() - gfn.get())
    }

    /// The slot of that number, unless it was given up meanwhile.
    pub(super) fn get_mut(&mut self, id: MemslotId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.id == id)
    }

    /// Takes the slot out of use; it still holds its place. The object is asked next.
    pub(super) fn suspend(&mut self, id: MemslotId) -> Result<(GuestMemfd, BindingId), Error> {
        let none = || Error::new(Op::UnbindSlot, ErrorKind::NotFound).errno_is(Errno::EINVAL);
        let slot = self.get_mut(id).ok_or_else(|| none().because(id.to_string()))?;
        let busy = || Error::new(Op::UnbindSlot, ErrorKind::Busy);
        let binding = slot.binding.take().ok_or_else(busy)?;
        Ok((slot.memfd.clone(), binding))
    }

    pub(super) fn remove(&mut self, id: MemslotId) {
        self.slots.retain(|slot| slot.id != id);
    }

    pub(super) fn take(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.slots)
    }
}
