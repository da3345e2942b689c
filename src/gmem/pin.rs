//! Where a pin is taken: a promise that pages are neither converted nor punched, with the name of
//! whoever holds it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::object::GuestMemfd;
use crate::addr::Pgoff;
use crate::error::{Error, ErrorKind, Op};
use crate::range::PgoffRange;
use crate::state::{Counted, Refusal, Stop, Wait, with_reader};

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
    ledger: u64,
    index: usize,
}

/// Who is registered, and who holds what.
#[derive(Debug)]
pub(super) struct Ledger {
    /// A number that no other ledger of the process has, to know one's own tags by.
    id: u64,
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    names: Vec<Arc<str>>,
    /// A pin is in here from before it is counted in the words until after it is not any more.
    pins: Slab<Record>,
}

#[derive(Debug)]
struct Record {
    range: PgoffRange,
    owner: usize,
}

impl Ledger {
    pub(super) fn new() -> Self {
        static NEXT: Mutex<u64> = Mutex::new(0);
        let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        Self { id: *next, records: Mutex::default() }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of those who hold a pin on the page, each once.
    pub(super) fn owners_of_page(&self, page: Pgoff) -> Vec<Arc<str>> {
        self.owners(|range| range.contains(page))
    }

    fn owners(&self, holds: impl Fn(&PgoffRange) -> bool) -> Vec<Arc<str>> {
        let records = self.records();
        let mut owners: Vec<usize> = records
            .pins
            .iter()
            .filter(|(_, record)| holds(&record.range))
            .map(|(_, record)| record.owner)
            .collect();
        owners.sort_unstable();
        owners.dedup();
        owners.into_iter().filter_map(|owner| records.names.get(owner).cloned()).collect()
    }

    /// The range of every pin that is written down: for the audit.
    pub(super) fn held(&self) -> Vec<PgoffRange> {
        self.records().pins.iter().map(|(_, record)| record.range).collect()
    }
}

impl GuestMemfd {
    /// Registers a name for pins to be taken under. The same name gives the same tag.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn register_owner(&self, name: &str) -> Result<OwnerTag, Error> {
        let ledger = self.0.ledger.id;
        let names = &mut self.0.ledger.records().names;
        if let Some(index) = names.iter().position(|known| **known == *name) {
            return Ok(OwnerTag { ledger, index });
        }
        names.try_reserve(1).map_err(|_| Error::new(Op::RegisterOwner, ErrorKind::Exhausted))?;
        names.push(name.into());
        Ok(OwnerTag { ledger, index: names.len() - 1 })
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
        let mut records = object.ledger.records();
        if owner.ledger != object.ledger.id || owner.index >= records.names.len() {
            return Err(Error::new(op, ErrorKind::NotFound)
                .on(range)
                .because("the owner tag is another object's"));
        }
        let key = records.pins.insert(Record { range, owner: owner.index });
        drop(records);
        let outcome = with_reader(|reader| {
            loop {
                let outcome = match mode {
                    PinMode::Counted => object.tree.pin(reader, range),
                    PinMode::Exclusive => object.tree.pin_exclusive(reader, range),
                };
                match outcome {
                    Err(Stop::At(page, Refusal::Converting)) if !wait.is_never() => {
                        object.tree.await_settled(wait, page)?;
                    }
                    outcome => return outcome,
                }
            }
        });
        match outcome {
            Ok(counted) => {
                let counted = Some(counted);
                Ok(PinGuard { memfd: Handle::Borrowed(self), range, owner, mode, counted, key })
            }
            Err(stop) => {
                object.ledger.records().pins.try_remove(key);
                Err(object.stopped(op, Some(range), stop))
            }
        }
    }

    /// The names of those who hold a pin on any page of the range, each once.
    pub fn owners(&self, range: PgoffRange) -> Vec<Arc<str>> {
        self.0.ledger.owners(|held| held.intersection(&range).is_some())
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
    key: usize,
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
            key: self.key,
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
        object.ledger.records().pins.try_remove(self.key);
    }
}
