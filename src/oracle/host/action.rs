//! What a VMM may do to the host's side of an object, in small integers that are only claims.

use arbitrary::{Arbitrary, Unstructured};

use crate::folio::Zone;
use crate::gmem::{ContentPolicy, PinMode, ViewMapping, ViewPath};
use crate::hyp::iommu::Places;
use crate::oracle::action::{RangeClaim, arbitrary_choice};
use crate::state::Visibility;

/// One call. Numbers pick one of what there is.
#[derive(Arbitrary, Clone, Debug, PartialEq, Eq)]
pub enum HostAction {
    /// Maps one more view.
    MapView {
        /// By what it keeps private pages out of reach.
        path: ViewPath,
        /// When shared pages are mapped.
        mapping: ViewMapping,
    },
    /// Unmaps a view.
    DropView(u8),
    /// Maps blocks of a view by huge entries again.
    RegainHuge(u8),
    /// Moves pages to one side.
    Convert {
        /// Which pages.
        ranges: [RangeClaim; 2],
        /// Whether both of them.
        both: bool,
        /// To which side.
        to_private: bool,
        /// What becomes of their bytes.
        content: ContentPolicy,
    },
    /// Forgets the contents of pages.
    Punch(RangeClaim),
    /// Gives pages their folios.
    Allocate(RangeClaim),
    /// Moves folios to a zone.
    Migrate {
        /// Which pages.
        range: RangeClaim,
        /// Where to.
        to: Zone,
    },
    /// Pins pages.
    Pin {
        /// Which pages.
        range: RangeClaim,
        /// How it gets on with other pins.
        mode: PinMode,
    },
    /// Drops a pin.
    Unpin(u8),
    /// Fills pages with a byte.
    Write {
        /// Which pages, a few.
        range: RangeClaim,
        /// With what.
        byte: u8,
    },
    /// Reads a page.
    Read(RangeClaim),
    /// Lends pages to another process.
    Export(RangeClaim),
    /// That process gives them back.
    Return(u8),
    /// One more subscriber, with a domain and a device of its own.
    Subscribe(Terms),
    /// A subscription is dropped.
    Leave {
        /// Which one.
        who: u8,
        /// Seldom also by one that keeps what it has, and cannot be cut off: after that little goes on.
        even_lost: u8,
    },
    /// A subscriber takes it otherwise to be asked from now on.
    Change {
        /// Which one.
        who: u8,
        /// How.
        mood: Mood,
        /// Whether it can be cut off.
        can_be_fenced: bool,
    },
    /// A device transfers a page.
    Dma {
        /// Of which subscriber.
        who: u8,
        /// Where from or to.
        at: u16,
        /// What it writes, or zero to read.
        byte: u8,
    },
    /// Makes a memslot.
    Bind {
        /// Which number.
        id: u8,
        /// Where.
        at: u16,
        /// Which pages.
        range: RangeClaim,
    },
    /// Deletes a memslot. Every other time.
    Unbind(u8),
    /// The guest does something to a page.
    Guest {
        /// Where.
        at: u16,
        /// What.
        act: GuestAct,
        /// What it writes.
        byte: u8,
    },
    /// Ends the guest; another one begins. Seldom.
    Teardown(u8),
    /// Now and then: looks at all that there is.
    Examine(u8),
}

impl HostAction {
    /// The actions that some bytes stand for, whatever they are.
    pub fn list(bytes: &[u8]) -> Vec<Self> {
        let mut input = Unstructured::new(bytes);
        let mut actions = Vec::new();
        while !input.is_empty() {
            match Self::arbitrary(&mut input) {
                Ok(action) => actions.push(action),
                Err(_) => break,
            }
        }
        actions
    }
}

/// What a guest does to a page of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAct {
    /// Fills it.
    Store,
    /// Asks to share it; the VMM converts it.
    Share,
    /// Asks to have it alone again; the VMM converts it.
    Unshare,
    /// Gives it up.
    Relinquish,
}

/// On what terms somebody subscribes.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Which pages it is told of.
    pub side: Visibility,
    /// What becomes of conversions if it is silent.
    pub silence: Silence,
    /// Whether it has time to answer.
    pub time: Time,
    /// Where its device finds pages.
    pub places: Spot,
}

/// What becomes of a conversion whose subscriber is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// It is refused.
    Refuses,
    /// The subscriber is cut off.
    Fences,
}

/// How long a subscriber may think.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// It answers within the call, or not at all.
    None,
    /// A moment, in which it does not answer either.
    Some,
    /// Long enough for another thread to answer.
    Plenty,
}

/// [`Places`], as a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// Where the object has them.
    Object,
    /// Where the guest has them.
    Guest,
}

impl From<Spot> for Places {
    fn from(spot: Spot) -> Self {
        match spot {
            Spot::Object => Self::Object,
            Spot::Guest => Self::Guest,
        }
    }
}

/// How a subscriber takes it to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Lets go.
    LetsGo,
    /// Does not, and says so.
    Refuses,
    /// Does not, and loses the means to answer.
    Loses,
    /// Lets go later: in time if there is plenty, else when nobody waits any more.
    Tarries,
}

arbitrary_choice! {
    ViewPath: Self::Best, Self::UserfaultfdSyscall, Self::UserfaultfdDevice, Self::Fixed, Self::Fixed;
    ViewMapping: Self::Eager, Self::Lazy;
    Silence: Self::Refuses, Self::Fences;
    Time: Self::None, Self::None, Self::None, Self::Some, Self::Plenty;
    Spot: Self::Object, Self::Guest;
    GuestAct: Self::Store, Self::Store, Self::Share, Self::Share, Self::Unshare, Self::Relinquish;
    Mood: Self::LetsGo, Self::LetsGo, Self::LetsGo, Self::Refuses, Self::Loses, Self::Tarries;
}
