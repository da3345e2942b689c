//! Where a pin is taken: a promise that pages are neither converted nor punched, with the name of
//! whoever holds it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::object::{GuestMemfd, Inner};
use crate::addr::Pgoff;
use crate::error::{Error, ErrorKind, Op};
use crate::range::PgoffRange;
use crate::state::{
    Counted, Local, ObjectId, OwnerId, Record, Refusal, Stop, Wait, each_holder, with_local,
    with_reader,
};

/// How a pin gets on with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PinMode {
    /// One of several.
    Counted,
    /// The only one: refused if there is any other, and refuses every other.
    Exclusive,
}

/// The name of somebody who takes pins, registered with one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerTag {
    object: ObjectId,
    owner: OwnerId,
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
                owners.insert(owner);
            }
        });
        let names = self.names();
        owners.iter().filter_map(|owner| names.get(owner.0 as usize).cloned()).collect()
    }

    /// The range of every pin that is written down: for the audit.
    pub(super) fn held(&self) -> Vec<PgoffRange> {
        let mut held = Vec::new();
        each_holder(self.id, |range, _| held.push(range));
        held
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
        if place.is_none() {
            names.try_reserve(1).map_err(|_| exhausted())?;
            names.push(name.into());
        }
        Ok(OwnerTag { object, owner: OwnerId(owner) })
    }

    /// Pins every page of the range until the guard is dropped. All pages, or none.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotFound`] for a tag of another object;
    /// [`ErrorKind::NotShared`], [`ErrorKind::Busy`] (being converted, pinned exclusively, or for an
    /// exclusive pin pinned at all), [`ErrorKind::Saturated`] (65,535 pins on a page) or
    /// [`ErrorKind::Quarantined`], each with the first culprit; [`ErrorKind::Exhausted`].
    #[inline]
    pub fn pin(
        &self,
        range: PgoffRange,
        owner: OwnerTag,
        mode: PinMode,
    ) -> Result<PinGuard<'_>, Error> {
        self.pin_waiting(range, owner, mode, &Wait::never())
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
    ) -> Result<PinGuard<'_>, Error> {
        let object = &*self.0;
        let op = match mode {
            PinMode::Counted => Op::Pin,
            PinMode::Exclusive => Op::PinExclusive,
        };
        object.check_range(op, range)?;
        if owner.object != object.ledger.id {
            return Err(Error::new(op, ErrorKind::NotFound)
                .on(range)
                .because("the owner tag is another object's"));
        }
        let (counted, record) = with_local(|local| {
            let record = local.records.note(object.ledger.id, range, owner.owner);
            let record = record.ok_or(Stop::OutOfMemory)?;
            match object.take(local, range, mode, wait) {
                Ok(counted) => Ok((counted, record)),
                Err(stop) => {
                    record.clear();
                    Err(stop)
                }
            }
        })
        .map_err(|stop| object.stopped(op, Some(range), stop))?;
        let counted = Some(counted);
        Ok(PinGuard { memfd: Handle::Borrowed(self), range, owner, mode, counted, record })
    }

    /// The names of those who hold a pin on any page of the range, each once.
    pub fn owners(&self, range: PgoffRange) -> Vec<Arc<str>> {
        self.0.ledger.owners(|held| held.intersection(&range).is_some())
    }
}

impl Inner {
    #[inline]
    fn take(
        &self,
        local: &Local,
        range: PgoffRange,
        mode: PinMode,
        wait: &Wait,
    ) -> Result<Counted, Stop> {
        loop {
            let outcome = match mode {
                PinMode::Counted => self.tree.pin(&local.reader, range),
                PinMode::Exclusive => self.tree.pin_exclusive(&local.reader, range),
            };
            match outcome {
                Err(Stop::At(page, Refusal::Converting)) if !wait.is_never() => {
                    self.tree.await_settled(wait, page)?;
                }
                outcome => return outcome,
            }
        }
    }
}

/// A pin. The pages stay shared and in place until it is dropped.
///
/// It borrows the object, which costs nothing, or [owns](Self::into_owned) a handle to it. It cannot be
/// copied: there is no way to drop it twice. If it is forgotten its pages stay pinned for good, and when
/// the object goes their folios are quarantined: a device may still be at work there.
///
/// ```compile_fail,E0599
/// fn twice(pin: gmem::PinGuard<'static>) -> [gmem::PinGuard<'static>; 2] {
///     [pin.clone(), pin]
/// }
/// ```
///
/// ```compile_fail,E0382
/// fn dropped_twice(pin: gmem::PinGuard<'static>) {
///     drop(pin);
///     drop(pin);
/// }
/// ```
///
/// ```compile_fail,E0040
/// fn dropped_by_hand(mut pin: gmem::PinGuard<'static>) {
///     pin.drop();
/// }
/// ```
#[derive(Debug)]
#[must_use = "the pin ends when the guard is dropped"]
pub struct PinGuard<'a> {
    memfd: Handle<'a>,
    range: PgoffRange,
    owner: OwnerTag,
    mode: PinMode,
    /// `None` once the pin has been handed on.
    counted: Option<Counted>,
    record: &'static Record,
}

#[derive(Debug)]
enum Handle<'a> {
    Borrowed(&'a GuestMemfd),
    Owned(GuestMemfd),
}

impl PinGuard<'_> {
    /// The pages that are pinned.
    pub fn range(&self) -> PgoffRange {
        self.range
    }

    /// Under whose name.
    pub fn owner(&self) -> OwnerTag {
        self.owner
    }

    /// How the pin gets on with others.
    pub fn mode(&self) -> PinMode {
        self.mode
    }

    /// The object whose pages these are.
    pub fn memfd(&self) -> &GuestMemfd {
        match &self.memfd {
            Handle::Borrowed(memfd) => memfd,
            Handle::Owned(memfd) => memfd,
        }
    }

    /// The same pin with a handle of its own, which keeps the object alive.
    pub fn into_owned(mut self) -> PinGuard<'static> {
        PinGuard {
            memfd: Handle::Owned(self.memfd().clone()),
            range: self.range,
            owner: self.owner,
            mode: self.mode,
            counted: self.counted.take(),
            record: self.record,
        }
    }
}

impl Drop for PinGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        let Some(counted) = self.counted.take() else { return };
        let object = &*self.memfd().0;
        match (counted, self.mode) {
            (Counted::InPage, _) => object.tree.unpin_page(self.range.start()),
            (Counted::InRange, PinMode::Counted) => {
                with_reader(|reader| object.tree.unpin(reader, self.range));
            }
            (Counted::InRange, PinMode::Exclusive) => {
                with_reader(|reader| object.tree.unpin_exclusive(reader, self.range));
            }
        }
        self.record.clear();
    }
}
