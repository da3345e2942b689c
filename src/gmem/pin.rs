//! Where a pin is taken: a promise that pages are neither converted nor punched, with the name of
//! whoever holds it.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::object::{GuestMemfd, Inner, Sides};
use crate::addr::Pgoff;
use crate::error::{Error, ErrorKind, Op};
use crate::range::PgoffRange;
use crate::state::{
    Local, ObjectId, OwnerId, Record, Refusal, Stop, Wait, each_holder, with_local,
};

/// How a pin gets on with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinMode {
    /// One of several.
    Counted,
    /// The only one: refused if there is any other, and refuses every other.
    Exclusive,
    /// One of several, for as long as a device exists. Only where nothing is ever
    /// [converted](crate::GuestMemfdBuilder::sides): elsewhere a [hand-out](GuestMemfd::subscribe) is the way.
    LongTerm,
}

/// The name of somebody who takes pins, registered with one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerTag {
    object: ObjectId,
    owner: u32,
}

/// How a pin is counted, and so how it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// In the word of its only page, where it stays.
    Page = 0,
    /// In whatever words there are for its range by then.
    Range = 1,
    /// By the exclusive bit of those.
    Exclusive = 2,
    /// As a range, for good.
    LongTerm = 3,
}

/// What a record says of a pin besides its pages: the owner's number, and in the lowest two bits the
/// hold.
impl Hold {
    const BITS: u32 = 2;

    #[inline]
    fn with_owner(self, owner: u32) -> OwnerId {
        OwnerId(owner << Self::BITS | self as u32)
    }

    #[inline]
    fn of(id: OwnerId) -> Self {
        match id.0 & ((1 << Self::BITS) - 1) {
            0 => Self::Page,
            1 => Self::Range,
            2 => Self::Exclusive,
            _ => Self::LongTerm,
        }
    }

    fn owner(id: OwnerId) -> u32 {
        id.0 >> Self::BITS
    }
}

/// Who is registered. Who holds what is in the records of the threads.
#[derive(Debug)]
pub(super) struct Ledger {
    /// The object's number, to know one's own tags and records by.
    id: ObjectId,
    names: Mutex<Vec<Arc<str>>>,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self { id: ObjectId::new_unique(), names: Mutex::default() }
    }

    pub(super) fn id(&self) -> ObjectId {
        self.id
    }

    fn names(&self) -> MutexGuard<'_, Vec<Arc<str>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of those who hold a pin on the page, each once.
    pub(super) fn owners_of_page(&self, page: Pgoff) -> Vec<Arc<str>> {
        self.owners(|range| range.contains(page))
    }

    fn owners(&self, holds: impl Fn(&PgoffRange) -> bool) -> Vec<Arc<str>> {
        let mut owners = BTreeSet::new();
        each_holder(self.id, |range, owner| {
            if holds(&range) {
                owners.insert(Hold::owner(owner));
            }
        });
        let names = self.names();
        owners.iter().filter_map(|&owner| names.get(owner as usize).cloned()).collect()
    }

    /// The range of every pin that is written down, and under whose name: for the audit.
    pub(super) fn held(&self) -> Vec<(PgoffRange, OwnerTag)> {
        let mut held = Vec::new();
        let tag = |id| OwnerTag { object: self.id, owner: Hold::owner(id) };
        each_holder(self.id, |range, id| held.push((range, tag(id))));
        held
    }

    /// What the owner of a tag is called.
    pub(super) fn name_of(&self, tag: OwnerTag) -> Option<Arc<str>> {
        self.names().get(tag.owner as usize).cloned()
    }
}

impl GuestMemfd {
    /// Registers a name for pins to be taken under. The same name gives the same tag.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn register_owner(&self, name: &str) -> Result<OwnerTag, Error> {
        let exhausted = || Error::new(Op::RegisterOwner, ErrorKind::Exhausted);
        let object = self.0.ledger.id;
        let names = &mut self.0.ledger.names();
        let place = names.iter().position(|known| **known == *name);
        let owner = u32::try_from(place.unwrap_or(names.len())).map_err(|_| exhausted())?;
        if owner > u32::MAX >> Hold::BITS {
            return Err(exhausted());
        }
        if place.is_none() {
            names.try_reserve(1).map_err(|_| exhausted())?;
            names.push(name.into());
        }
        Ok(OwnerTag { object, owner })
    }

    /// Pins every page of the range until the guard is dropped. All pages, or none.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotFound`] for a tag of another object;
    /// [`ErrorKind::NotShared`], [`ErrorKind::Busy`] (being converted, pinned exclusively, or for an
    /// exclusive pin pinned at all), [`ErrorKind::Saturated`] (65,535 pins on a page) or
    /// [`ErrorKind::Quarantined`], each with the first culprit; [`ErrorKind::Convertible`] for a pin for good
    /// on an object that may be converted; [`ErrorKind::Exhausted`].
    #[inline]
    pub fn pin(
        &self,
        range: PgoffRange,
        owner: OwnerTag,
        mode: PinMode,
    ) -> Result<PinGuard<&Self>, Error> {
        match self.pin_page(range, owner, mode) {
            Some(guard) => Ok(guard),
            None => self.pin_waiting(range, owner, mode, &Wait::never()),
        }
    }

    /// The pin that devices take all the time: one page, which has a word of its own. `None` if it is
    /// another one, or is refused; the long way says which.
    #[inline]
    fn pin_page(
        &self,
        range: PgoffRange,
        owner: OwnerTag,
        mode: PinMode,
    ) -> Option<PinGuard<&Self>> {
        let object = &*self.0;
        let is_of_object = owner.object == object.ledger.id;
        if mode != PinMode::Counted || range.nr_pages() != 1 || !is_of_object {
            return None;
        }
        let id = Hold::Page.with_owner(owner.owner);
        let record = with_local(|local| local.records.note(object.ledger.id, range, id))?;
        if !object.tree.pin_page(range.start()) {
            record.clear();
            return None;
        }
        Some(PinGuard { memfd: self, record })
    }

    /// [`pin`](Self::pin), but waits for a conversion that is at the pages to settle. Other pins are
    /// not waited for, and neither is memory that is private.
    ///
    /// # Errors
    /// As [`pin`](Self::pin); [`ErrorKind::TimedOut`] or [`ErrorKind::Cancelled`] if the conversion
    /// did not settle.
    pub fn pin_waiting(
        &self,
        range: PgoffRange,
        owner: OwnerTag,
        mode: PinMode,
        wait: &Wait,
    ) -> Result<PinGuard<&Self>, Error> {
        let object = &*self.0;
        let (op, hold) = match mode {
            PinMode::Counted => (Op::Pin, Hold::Range),
            PinMode::Exclusive => (Op::PinExclusive, Hold::Exclusive),
            PinMode::LongTerm => (Op::Pin, Hold::LongTerm),
        };
        object.check_range(op, range)?;
        if owner.object != object.ledger.id {
            return Err(Error::new(op, ErrorKind::NotFound)
                .on(range)
                .because("the owner tag is another object's"));
        }
        if hold == Hold::LongTerm && object.sides == Sides::Convertible {
            return Err(Error::new(op, ErrorKind::Convertible).on(range));
        }
        let id = hold.with_owner(owner.owner);
        let mut layout = None;
        let record = with_local(|local| {
            loop {
                // Anew for each attempt: who waits holds nothing.
                let record = local.records.note(object.ledger.id, range, id);
                let record = record.ok_or(Stop::OutOfMemory)?;
                let Err(stop) = object.take(local, range, hold) else { return Ok(record) };
                record.clear();
                match stop {
                    Stop::At(page, Refusal::Converting) if !wait.is_never() => {
                        object.tree.await_settled(wait, page)?;
                    }
                    // As in a checked access: who moves the folio is waited for, and shut out.
                    Stop::At(_, Refusal::Converting) if layout.is_none() => {
                        layout = Some(object.layout.read());
                    }
                    stop => return Err(stop),
                }
            }
        })
        .map_err(|stop| object.stopped(op, Some(range), stop))?;
        Ok(PinGuard { memfd: self, record })
    }

    /// The names of those who hold a pin on any page of the range, each once.
    pub fn owners(&self, range: PgoffRange) -> Vec<Arc<str>> {
        self.0.ledger.owners(|held| held.intersection(&range).is_some())
    }
}

impl Inner {
    fn take(&self, local: &Local, range: PgoffRange, hold: Hold) -> Result<(), Stop> {
        let counted = match hold {
            Hold::Page | Hold::Range | Hold::LongTerm => self.tree.pin(&local.reader, range),
            Hold::Exclusive => self.tree.pin_exclusive(&local.reader, range),
        };
        counted.map(|_| ())
    }
}

/// A pin. The pages stay shared and in place until it is dropped.
///
/// It borrows the object, which costs nothing, or [owns](Self::into_owned) a handle to it. It cannot be
/// copied: there is no way to drop it twice. If it is forgotten its pages stay pinned for good, and when
/// the object goes their folios are quarantined: a device may still be at work there.
///
/// ```compile_fail,E0599
/// fn twice(pin: gmem::PinGuard) -> [gmem::PinGuard; 2] {
///     [pin.clone(), pin]
/// }
/// ```
///
/// ```compile_fail,E0382
/// fn dropped_twice(pin: gmem::PinGuard) {
///     drop(pin);
///     drop(pin);
/// }
/// ```
///
/// ```compile_fail,E0040
/// fn dropped_by_hand(mut pin: gmem::PinGuard) {
///     pin.drop();
/// }
/// ```
#[derive(Debug)]
#[must_use = "the pin ends when the guard is dropped"]
pub struct PinGuard<M: Borrow<GuestMemfd> = GuestMemfd> {
    memfd: M,
    /// What else there is to say of the pin. So a guard is two pointers, and comes in registers.
    record: &'static Record,
}

impl<M: Borrow<GuestMemfd>> PinGuard<M> {
    /// The pages that are pinned.
    pub fn range(&self) -> PgoffRange {
        // It is one: it was noted as one.
        self.record.range().unwrap_or(self.memfd().pages())
    }

    /// Under whose name.
    pub fn owner(&self) -> OwnerTag {
        let owner = Hold::owner(self.record.owner());
        OwnerTag { object: self.memfd().0.ledger.id, owner }
    }

    /// How the pin gets on with others.
    pub fn mode(&self) -> PinMode {
        match Hold::of(self.record.owner()) {
            Hold::Page | Hold::Range => PinMode::Counted,
            Hold::Exclusive => PinMode::Exclusive,
            Hold::LongTerm => PinMode::LongTerm,
        }
    }

    /// The object whose pages these are.
    #[inline]
    pub fn memfd(&self) -> &GuestMemfd {
        self.memfd.borrow()
    }

    #[inline(never)]
    fn unpin_range(&self) {
        let (tree, range) = (&self.memfd().0.tree, self.range());
        with_local(|local| match self.mode() {
            PinMode::Counted | PinMode::LongTerm => tree.unpin(&local.reader, range),
            PinMode::Exclusive => tree.unpin_exclusive(&local.reader, range),
        });
    }
}

impl PinGuard<&GuestMemfd> {
    /// The same pin with a handle of its own, which keeps the object alive.
    pub fn into_owned(self) -> PinGuard {
        let handed_on = ManuallyDrop::new(self);
        PinGuard { memfd: handed_on.memfd.clone(), record: handed_on.record }
    }
}

impl<M: Borrow<GuestMemfd>> Drop for PinGuard<M> {
    #[inline]
    fn drop(&mut self) {
        match Hold::of(self.record.owner()) {
            Hold::Page => self.memfd().0.tree.unpin_page(self.record.start()),
            Hold::Range | Hold::Exclusive | Hold::LongTerm => self.unpin_range(),
        }
        self.record.clear();
    }
}
