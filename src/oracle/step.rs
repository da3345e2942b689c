//! An action with its claims settled: what is really called, and with which numbers.

use super::action::{Action, Asked, Door, Patience, Question, ViewChange};
use super::model::Model;
use crate::geometry::FolioSize;
use crate::gmem::{ContentPolicy, PinMode, ViewMapping, ViewPath};
use crate::state::Visibility;

/// The names under which pins are taken.
pub(super) const NAMES: [&str; 4] = ["virtio-blk", "virtio-net", "vhost-user", "vfio"];
/// The name whose tag of one object is tried on another.
pub(super) const STRANGER: &str = "stranger";
/// So many objects with a handle are enough.
const MOST_OBJECTS: usize = 6;
const MOST_VIEWS: usize = 3;

/// Whose tag a pin is taken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Named(&'static str),
    /// The tag of `STRANGER` in another object.
    TagOf(usize),
}

/// The options of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct How {
    pub(super) content: ContentPolicy,
    pub(super) most_culprits: u8,
    pub(super) patience: Patience,
}

/// One call. Objects are numbered in the order of their creation, pins by their place in the list of
/// those that are held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Create { bytes: u64, folio: FolioSize, initial: Visibility },
    Drop { object: usize },
    Allocate { object: usize, range: Asked },
    Punch { object: usize, range: Asked },
    Pin { object: usize, range: Asked, owner: Owner, mode: PinMode, patience: Patience },
    Unpin { pin: usize },
    Convert { object: usize, ranges: Vec<Asked>, to: Visibility, how: How },
    Trim { object: usize },
    Read { object: usize, at: u64, len: u64, door: Door },
    Write { object: usize, at: u64, len: u64, seed: u8, door: Door },
    Load { object: usize, at: u64, door: Door },
    Store { object: usize, at: u64, value: u64, door: Door },
    MapView { object: usize, path: ViewPath, mapping: ViewMapping },
    DropView { object: usize, view: usize },
    Visibility { object: usize, range: Asked },
    Snapshot { object: usize, range: Asked },
    Owners { object: usize, range: Asked },
    Examine,
}

impl Step {
    /// What an action comes to in this state; `None` if there is nothing that it could be about.
    pub(super) fn of(action: &Action, model: &Model) -> Option<Self> {
        let on = |claim: u8| model.pick_object(claim);
        Some(match *action {
            Action::CreateObject { size, folio, initial } => {
                if model.nr_handles() >= MOST_OBJECTS {
                    return None;
                }
                Self::Create { bytes: size.bytes(), folio, initial }
            }
            // Seldom, or nothing would grow old.
            Action::DropObject { object } => match object {
                0..160 => return None,
                _ => Self::Drop { object: on(object)?.0 },
            },
            Action::Allocate { object, range } => {
                let (object, nr_pages) = on(object)?;
                Self::Allocate { object, range: range.of(nr_pages) }
            }
            Action::Punch { object, range } => {
                let (object, nr_pages) = on(object)?;
                Self::Punch { object, range: range.of(nr_pages) }
            }
            Action::Pin { object: claim, range, owner, mode, patience } => {
                let (object, nr_pages) = on(claim)?;
                let owner = match owner {
                    0..240 => Owner::Named(NAMES.get(usize::from(owner) % NAMES.len()).copied()?),
                    _ => match on(claim.wrapping_add(1))?.0 {
                        other if other == object => Owner::Named(STRANGER),
                        other => Owner::TagOf(other),
                    },
                };
                Self::Pin { object, range: range.of(nr_pages), owner, mode, patience }
            }
            // Every other pin stays for long.
            Action::Unpin { which } => match which {
                0..128 => return None,
                _ => Self::Unpin { pin: model.pick_pin(which)? },
            },
            Action::Convert { object, ranges, nr_ranges, to, content, most_culprits, patience } => {
                let (object, nr_pages) = on(object)?;
                let nr_ranges = match nr_ranges {
                    0..8 => 0,
                    8..160 => 1,
                    160..210 => 2,
                    _ => 3,
                };
                let ranges = ranges.iter().take(nr_ranges).map(|it| it.of(nr_pages)).collect();
                let how = How { content, most_culprits: 1 + most_culprits % 5, patience };
                Self::Convert { object, ranges, to, how }
            }
            Action::Trim { object } => Self::Trim { object: on(object)?.0 },
            Action::Read { object, bytes, door } => {
                let (object, nr_pages) = on(object)?;
                let (at, len) = bytes.of(nr_pages);
                Self::Read { object, at, len, door }
            }
            Action::Write { object, bytes, seed, door } => {
                let (object, nr_pages) = on(object)?;
                let (at, len) = bytes.of(nr_pages);
                Self::Write { object, at, len, seed, door }
            }
            Action::LoadU64 { object, at, door } => {
                let (object, nr_pages) = on(object)?;
                Self::Load { object, at: at.word(nr_pages), door }
            }
            Action::StoreU64 { object, at, value, door } => {
                let (object, nr_pages) = on(object)?;
                Self::Store { object, at: at.word(nr_pages), value, door }
            }
            Action::View { object: claim, change } => {
                let object = on(claim)?.0;
                match (change, model.nr_views(object)) {
                    (ViewChange::Map, MOST_VIEWS..) => return None,
                    (ViewChange::Map, _) => {
                        let (path, mapping) = view_of(claim);
                        Self::MapView { object, path, mapping }
                    }
                    (ViewChange::Drop(which), nr_views) => {
                        Self::DropView { object, view: usize::from(which).checked_rem(nr_views)? }
                    }
                }
            }
            Action::Ask { object, range, question } => {
                let (object, nr_pages) = on(object)?;
                let range = range.of(nr_pages);
                match question {
                    Question::Visibility => Self::Visibility { object, range },
                    Question::Snapshot => Self::Snapshot { object, range },
                    Question::Owners => Self::Owners { object, range },
                }
            }
            Action::Examine(0..160) => return None,
            Action::Examine(_) => Self::Examine,
        })
    }
}

/// By which path and mapping a view is made: the half of them by what a caller gets who says nothing.
fn view_of(claim: u8) -> (ViewPath, ViewMapping) {
    let mapping = if claim % 2 == 0 { ViewMapping::Eager } else { ViewMapping::Lazy };
    match claim % 16 {
        0..6 => (ViewPath::Best, mapping),
        6..8 => (ViewPath::UserfaultfdSyscall, mapping),
        8..10 => (ViewPath::UserfaultfdDevice, mapping),
        _ => (ViewPath::Fixed, mapping),
    }
}

/// Bytes to write: all zero for seed zero, otherwise a sequence that does not repeat soon.
pub(super) fn pattern(seed: u8, at: u64, len: u64) -> Vec<u8> {
    if seed == 0 {
        return (0..len).map(|_| 0).collect();
    }
    let mut state = (at << 8 | u64::from(seed)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Never zero, so that a byte that got lost is seen.
        state.to_le_bytes()[3] | 1
    };
    (0..len).map(next).collect()
}
