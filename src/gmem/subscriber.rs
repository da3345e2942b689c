//! Those who are told which pages the host may see: an IOMMU that maps them for devices, for one.

use std::fmt;
use std::sync::Arc;

use super::layout::Layout;
use super::object::{GuestMemfd, Inner, runs};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::range::PgoffRange;
use crate::state::{Phase, Visibility};

/// Somebody who lets others at the shared pages of an object, and must follow when they change sides.
///
/// Pages are taken away before they turn private and given when they have been shared. A hole punch takes
/// shared pages away and gives them again, since the memory behind them may be another's by then. The
/// calls come with locks of the object held: an implementation calls nothing of the object. If one panics,
/// the pages are quarantined, and what the other subscribers have been told about them so far stands.
pub trait Subscriber: Send + Sync + fmt::Debug {
    /// Takes pages away. When this returns `Ok`, nobody reaches them through here any more.
    ///
    /// # Errors
    /// Whatever stands in the way. The pages are as before then, and so is the conversion.
    fn revoke(&self, pages: &[PgoffRange]) -> Result<(), Errno>;

    /// Gives pages: they are shared now, or they are again, because a conversion that had revoked them
    /// was undone.
    fn grant(&self, pages: &[PgoffRange]);
}

/// A subscriber is told until this is dropped. It keeps the object alive.
#[derive(Debug)]
#[must_use = "the subscription ends when it is dropped"]
pub struct Subscription {
    memfd: GuestMemfd,
    key: usize,
}

impl GuestMemfd {
    /// Tells `subscriber` from now on which pages it may let others at, and at once which these are.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`].
    pub fn subscribe(&self, subscriber: Arc<dyn Subscriber>) -> Result<Subscription, Error> {
        let object = &*self.0;
        // No conversion tells anybody anything meanwhile. One that waits for the lock has changed no
        // page's side yet, and tells the newcomer too.
        let mut layout = object.layout.write();
        let shared = object.shared_runs(Op::Subscribe, object.pages)?;
        subscriber.grant(&shared);
        let key = layout.subscribers.insert(subscriber);
        Ok(Subscription { memfd: self.clone(), key })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.memfd.0.layout.write().subscribers.try_remove(self.key);
    }
}

impl Inner {
    /// What of a range the host may see, as runs; with the layout locked for writing.
    pub(super) fn shared_runs(&self, op: Op, range: PgoffRange) -> Result<Vec<PgoffRange>, Error> {
        let mut shared = Vec::new();
        let sides = self.spans(range).map(|(pages, word)| {
            let is_shared = word.visibility() == Visibility::Shared;
            (pages, is_shared && word.phase() != Phase::Quarantined)
        });
        for (pages, _) in runs(sides).filter(|&(_, is_shared)| is_shared) {
            if fails(FailPoint::Memory) || shared.try_reserve(1).is_err() {
                return Err(Error::new(op, ErrorKind::Exhausted));
            }
            shared.push(pages);
        }
        Ok(shared)
    }

    /// Takes frozen pages away from every subscriber, or from none.
    pub(super) fn revoke_from_subscribers(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<(), Error> {
        for (key, subscriber) in &layout.subscribers {
            if let Err(errno) = subscriber.revoke(pages) {
                let before = layout.subscribers.iter().take_while(|&(other, _)| other != key);
                before.for_each(|(_, subscriber)| subscriber.grant(pages));
                return Err(Error::new(op, ErrorKind::SubscriberRefused).errno_is(errno));
            }
        }
        Ok(())
    }

    /// Gives frozen pages to every subscriber.
    pub(super) fn grant_to_subscribers(&self, layout: &Layout, pages: &[PgoffRange]) {
        for (_, subscriber) in &layout.subscribers {
            subscriber.grant(pages);
        }
    }
}
