//! Those who are told which pages they may let others at: an IOMMU that maps them for devices, for one.
//! design/handout.md has the protocol.

use std::fmt;
use std::sync::Arc as StdArc;
use std::time::Duration;

use super::handout::HandOutRun;
use super::object::GuestMemfd;
use crate::error::{Errno, Error};
use crate::state::{Ack, Line, Standing, Visibility};
use crate::sync::Arc;

/// Somebody who lets others at pages of an object, and must follow when they change sides, move or go.
///
/// It is told of exactly those pages that are on its side and have memory: taken away before they leave it,
/// given when they have come. A page that moves to another frame is taken and given again.
///
/// The calls come with locks of the object held: an implementation calls nothing of the object, and nobody
/// who is to [answer](Ack) waits for something that allocates, punches, migrates or converts, or takes a lock
/// that somebody holds while he accesses or pins guest memory: of pages that are punched or moved, that waits for the answer. Calls about
/// the same page come one after the other, and are to be carried out in that order, also by whoever does so
/// later. If one panics, the pages are quarantined, and what other subscribers have been told about them
/// so far stands.
pub trait Subscriber: Send + Sync + fmt::Debug {
    /// Takes runs away. The answer is [given](Ack) when nobody reaches them through here any more: in this
    /// call, or later by another thread.
    ///
    /// If it comes later than [agreed](SubscribeOptions::answer_within), and the conversion is refused for it,
    /// the runs are granted again, in a call that follows this one.
    ///
    /// No time limit bounds the call itself, nor any other one here: what may block is handed on to another
    /// thread, with the [`Ack`].
    fn revoke(&self, runs: &[HandOutRun], ack: Ack);

    /// Gives runs: they are on this side now, or they are again, because a conversion that had revoked them
    /// was undone.
    fn grant(&self, runs: &[HandOutRun]);

    /// Cuts off all access at once, whatever has been granted: by detaching the domain, for one, or by
    /// turning the devices' bus mastering off. May be called more than once. When this returns `Ok`, nobody reaches anything through
    /// here any more, and what was granted before and is not carried out yet comes to nothing.
    ///
    /// No grant of this subscription is under way meanwhile, and none follows. Revokes may be.
    ///
    /// # Errors
    /// Whatever stands in the way; `EOPNOTSUPP` unless there is a way to do this.
    fn fence(&self) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }
}

/// What becomes of a conversion if a subscriber does not answer in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnSilence {
    /// It is refused. What cannot be, as the end of a guest, cuts the subscriber off all the same.
    #[default]
    RefuseConversion,
    /// The subscriber is [cut off](Subscriber::fence), and the conversion goes on. If that fails, it is refused.
    FenceOff,
}

/// What a subscriber wants: to see what is shared, and a second to answer, unless said otherwise.
#[derive(Clone, Debug)]
pub struct SubscribeOptions {
    name: StdArc<str>,
    pub(super) side: Visibility,
    pub(super) answer_within: Duration,
    pub(super) on_silence: OnSilence,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            name: "a subscriber".into(),
            side: Visibility::Shared,
            answer_within: Duration::from_secs(1),
            on_silence: OnSilence::default(),
        }
    }
}

impl SubscribeOptions {
    /// A name for errors.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Which pages it is told of: the shared ones, or for devices that the guest trusts, the private ones.
    #[must_use]
    pub fn side(mut self, side: Visibility) -> Self {
        self.side = side;
        self
    }

    /// How long a conversion waits for its answer, from when [`revoke`](Subscriber::revoke) is called; for that to
    /// return it waits without limit. Meanwhile nothing else changes what pages there are: a
    /// guest that touches memory for the first time waits as well.
    #[must_use]
    pub fn answer_within(mut self, time: Duration) -> Self {
        self.answer_within = time;
        self
    }

    /// What happens if it does not answer.
    #[must_use]
    pub fn on_silence(mut self, what: OnSilence) -> Self {
        self.on_silence = what;
        self
    }
}

/// A subscriber, as the object keeps it.
#[derive(Debug)]
pub(super) struct HandOut {
    pub(super) subscriber: StdArc<dyn Subscriber>,
    pub(super) options: SubscribeOptions,
    pub(super) line: Arc<Line>,
}

impl HandOut {
    pub(super) fn name(&self) -> &str {
        &self.options.name
    }

    /// Whether it may reach pages of this side, and nobody will ever know.
    pub(super) fn is_lost(&self, side: Visibility) -> bool {
        self.options.side == side && self.line.standing() == Standing::Lost
    }
}

/// A subscriber is told until this is dropped. It keeps the object alive.
///
/// When it is dropped the subscriber is asked to let go of everything, and cut off if it does not. Should
/// that fail as well, nobody knows what it still reaches: then no page of its side changes any more, and the
/// memory is not recycled when the object goes.
///
/// The thread that drops it may wait for the answer, so it is not the one that answers.
#[derive(Debug)]
#[must_use = "the subscription ends when it is dropped"]
pub struct Subscription {
    memfd: GuestMemfd,
    line: Arc<Line>,
    key: usize,
}

impl GuestMemfd {
    /// Tells `subscriber` from now on which shared pages it may let others at, and at once which these are.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`](crate::error::ErrorKind::Exhausted).
    pub fn subscribe(&self, subscriber: StdArc<dyn Subscriber>) -> Result<Subscription, Error> {
        self.subscribe_with(subscriber, SubscribeOptions::default())
    }

    /// [`subscribe`](Self::subscribe), but for other pages or on other terms.
    ///
    /// A newcomer that panics when it is given its pages is asked to let go of them, as if its subscription had
    /// been dropped.
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    pub fn subscribe_with(
        &self,
        subscriber: StdArc<dyn Subscriber>,
        options: SubscribeOptions,
    ) -> Result<Subscription, Error> {
        let object = &*self.0;
        let line = Arc::new(Line::new());
        let hand_out = HandOut { subscriber, options, line: Arc::clone(&line) };
        // Before the lock, so that it is dropped after that if the newcomer panics: what it was given by then
        // is taken back.
        let subscription;
        // No conversion tells anybody anything meanwhile. One that waits for the lock has changed no
        // page's side yet, and tells the newcomer too.
        let mut layout = object.layout.write();
        let key = layout.subscribers.insert(hand_out);
        subscription = Subscription { memfd: self.clone(), line, key };
        if let Some(hand_out) = layout.subscribers.get(key) {
            object.grant_all(&layout, hand_out);
        }
        drop(layout);
        Ok(subscription)
    }
}

impl Subscription {
    /// How things stand: [`Standing::Told`], or [`Standing::FencedOff`] since it did not answer, or
    /// [`Standing::Lost`] since it kept the places of a guest that went, and could not be cut off.
    pub fn standing(&self) -> Standing {
        self.line.standing()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let object = &*self.memfd.0;
        // A conversion that waits for an answer has the lock, and the answer may never come any more.
        self.line.leave();
        let mut layout = object.layout.write();
        let Some(hand_out) = layout.subscribers.get(self.key) else { return };
        let gone = match object.part_from(&layout, hand_out, object.pages) {
            true => layout.subscribers.try_remove(self.key),
            false => None,
        };
        // It may own views and exports, which lock the layout when they go.
        drop(layout);
        drop(gone);
    }
}
