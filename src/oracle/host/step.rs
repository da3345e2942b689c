//! An action with its claims settled, and what it is answered.

use super::action::{GuestAct, HostAction, Mood, Terms};
use super::model::{MOST_SUBSCRIBERS, MOST_VIEWS, Model};
use crate::error::{Errno, Error, ErrorKind};
use crate::folio::Zone;
use crate::gmem::{ContentPolicy, PinMode, ViewMapping, ViewPath};
use crate::hyp::iommu::DmaFaultKind;
use crate::oracle::action::{Asked, RangeClaim};
use crate::state::Visibility;

/// Start and length, in pages.
pub(super) type Run = (u64, u64);

pub(super) fn pages_of(range: Run) -> std::ops::Range<u64> {
    range.0..range.0 + range.1
}

/// Guest frames from here on are where memslots are made.
pub(super) const FIRST_GFN: u64 = 0x8_0000;
/// So many, give and take.
const NR_GFNS: u64 = 0x300;
const NR_SLOT_IDS: u8 = 6;

/// One call. Views, pins, exports and subscribers go by their place in the list of those there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    MapView { path: ViewPath, mapping: ViewMapping },
    DropView { view: usize },
    RegainHuge { view: usize },
    Convert { ranges: Vec<Run>, to: Visibility, content: ContentPolicy },
    Punch { range: Run },
    Allocate { range: Run },
    Migrate { range: Run, to: Zone },
    Pin { range: Run, mode: PinMode },
    Unpin { pin: usize },
    Write { range: Run, byte: u8 },
    Read { page: u64 },
    Export { range: Run },
    Return { export: usize },
    Subscribe { terms: Terms },
    Leave { who: usize },
    Change { who: usize, mood: Mood, can_be_fenced: bool },
    Dma { who: usize, at: u64, byte: u8 },
    Bind { id: u16, at: u64, range: Run },
    Unbind { id: u16 },
    Guest { at: u64, act: GuestAct, byte: u8 },
    Teardown,
    Examine,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// So many pages.
    Changed(u64),
    /// So many pages have moved; these folios have not, and why.
    Moved(u64, Vec<(Run, Refused)>),
    /// All of a page is this.
    Byte(u8),
    Refused(Refused),
    /// No memslot is there.
    NoSlot,
    /// The guest expected private memory, and there is none.
    NotPrivate,
    /// What a hypercall has come to.
    Granted(bool),
    Dma(DmaFaultKind),
}

/// An error, without the words for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused(pub(super) ErrorKind, pub(super) Errno);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self(error.kind(), error.errno())
    }
}

impl From<Error> for Answer {
    fn from(error: Error) -> Self {
        Self::Refused(error.into())
    }
}

impl Step {
    /// What an action comes to in this state; `None` if there is nothing that it could be about.
    pub(super) fn of(action: &HostAction, model: &Model) -> Option<Self> {
        let nr_pages = model.nr_pages();
        let range = |claim: RangeClaim| run_of(claim, nr_pages);
        let few = |claim: RangeClaim| range(claim).map(|(start, nr)| (start, nr.min(3)));
        let pick = |claim: u8, of: usize| usize::from(claim).checked_rem(of);
        let gfn = |claim: u16| FIRST_GFN + u64::from(claim) % NR_GFNS;
        Some(match *action {
            HostAction::MapView { path, mapping } => {
                if model.nr_views() >= MOST_VIEWS {
                    return None;
                }
                Self::MapView { path, mapping }
            }
            HostAction::DropView(view) => Self::DropView { view: pick(view, model.nr_views())? },
            HostAction::RegainHuge(view) => {
                Self::RegainHuge { view: pick(view, model.nr_views())? }
            }
            HostAction::Convert { ranges, both, to_private, content } => {
                let to = if to_private { Visibility::Private } else { Visibility::Shared };
                let nr = 1 + usize::from(both);
                let ranges = ranges.iter().take(nr).filter_map(|&claim| range(claim)).collect();
                Self::Convert { ranges, to, content }
            }
            HostAction::Punch(claim) => Self::Punch { range: range(claim)? },
            HostAction::Allocate(claim) => Self::Allocate { range: range(claim)? },
            HostAction::Migrate { range: claim, to } => Self::Migrate { range: range(claim)?, to },
            HostAction::Pin { range: claim, mode } => Self::Pin { range: range(claim)?, mode },
            HostAction::Unpin(pin) => Self::Unpin { pin: pick(pin, model.pins.len())? },
            HostAction::Write { range: claim, byte } => Self::Write { range: few(claim)?, byte },
            HostAction::Read(claim) => Self::Read { page: range(claim)?.0 },
            HostAction::Export(claim) => Self::Export { range: range(claim)? },
            HostAction::Return(export) => {
                Self::Return { export: pick(export, model.exports.len())? }
            }
            HostAction::Subscribe(terms) => {
                if model.nr_subscribers() >= MOST_SUBSCRIBERS {
                    return None;
                }
                Self::Subscribe { terms }
            }
            HostAction::Leave { who, even_lost } => {
                let who = pick(who, model.nr_subscribers())?;
                // Few are gone before anything has happened to them.
                if even_lost < 128 || even_lost < 192 && model.would_be_lost(who) {
                    return None;
                }
                Self::Leave { who }
            }
            HostAction::Change { who, mood, can_be_fenced } => {
                Self::Change { who: pick(who, model.nr_subscribers())?, mood, can_be_fenced }
            }
            HostAction::Dma { who, at, byte } => {
                let who = pick(who, model.nr_subscribers())?;
                let at = match at % 4 {
                    0 => gfn(at >> 2),
                    1 => run_of_place(at, nr_pages),
                    _ => model.mapped_place(who, at)?,
                };
                Self::Dma { who, at, byte }
            }
            HostAction::Bind { id, at, range: claim } => {
                Self::Bind { id: (id % NR_SLOT_IDS).into(), at: gfn(at), range: range(claim)? }
            }
            HostAction::Unbind(0..128) => return None,
            HostAction::Unbind(id) => {
                Self::Unbind { id: model.slot_id(id).unwrap_or((id % NR_SLOT_IDS).into()) }
            }
            HostAction::Guest { at, act, byte } => {
                let place = match act {
                    GuestAct::Store | GuestAct::Share => model.guest_place(at),
                    GuestAct::Unshare | GuestAct::Relinquish => model.given_place(at),
                };
                Self::Guest { at: place.unwrap_or_else(|| gfn(at)), act, byte }
            }
            HostAction::Teardown(0..240) => return None,
            // What then becomes of its subscription, tests/handout has.
            HostAction::Teardown(_) if model.would_lose_a_subscriber() => return None,
            HostAction::Teardown(_) => Self::Teardown,
            HostAction::Examine(0..160) => return None,
            HostAction::Examine(_) => Self::Examine,
        })
    }
}

/// Pages around the border of the first folio, or anywhere.
fn run_of_place(claim: u16, nr_pages: u64) -> u64 {
    let claim = u64::from(claim);
    match claim % 3 {
        0 => (claim >> 4) % (nr_pages + 2),
        _ => 504 + (claim >> 4) % 16,
    }
}

/// A range as it may be born; it may end behind the object.
fn run_of(claim: RangeClaim, nr_pages: u64) -> Option<Run> {
    let (start, nr) = match claim.of(nr_pages) {
        Asked::Pages { start, nr_pages } => (start, nr_pages),
        Asked::Bytes { start, len } => (start >> 12, len >> 12),
    };
    (nr > 0 && start < 1 << 32 && nr < 1 << 32).then_some((start, nr))
}
