//! Rules that the model can be told to get wrong.

/// A rule that the model gets wrong on purpose, to see that the comparison notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostMistake {
    /// Views show private pages.
    ViewsShowPrivatePages,
    /// Views show holes.
    ViewsShowHoles,
    /// A view that comes later shows nothing.
    LaterViewsAreEmpty,
    /// What is exported does not count as mapped.
    ExportsMapNothing,
    /// What is exported is not pinned.
    ExportsPinNothing,
    /// Subscribers keep what leaves their side.
    SubscribersKeepWhatLeaves,
    /// Subscribers keep what is punched.
    SubscribersKeepHoles,
    /// Subscribers are not given what comes back after a conversion that was refused.
    NothingIsGivenBack,
    /// Who was fenced off goes on reaching memory.
    FencesLetThrough,
    /// Silence is taken for an answer.
    SilenceIsConsent,
    /// Who refuses is fenced off like one that is silent.
    RefusalsAreFenced,
    /// Who has left without letting go holds nothing.
    TheLostHoldNothing,
    /// Guests' devices find pages where they were before a memslot came.
    MemslotsMoveNothing,
    /// Memslots may overlap.
    MemslotsOverlap,
    /// A memslot is replaced by another of its number.
    MemslotsAreReplaced,
    /// A memslot goes with what the guest has there.
    MemslotsGoAtOnce,
    /// The host converts what is the guest's without being asked.
    GuestsNeedNotConsent,
    /// Folios move although the guest has them mapped.
    GuestsPagesMove,
    /// What the guest gives up keeps its bytes.
    RelinquishedPagesKeepBytes,
    /// Moves lose the bytes.
    MovesLoseBytes,
    /// Pins keep nothing from moving.
    PinnedPagesMove,
}

impl HostMistake {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::ViewsShowPrivatePages,
        Self::ViewsShowHoles,
        Self::LaterViewsAreEmpty,
        Self::ExportsMapNothing,
        Self::ExportsPinNothing,
        Self::SubscribersKeepWhatLeaves,
        Self::SubscribersKeepHoles,
        Self::NothingIsGivenBack,
        Self::FencesLetThrough,
        Self::SilenceIsConsent,
        Self::RefusalsAreFenced,
        Self::TheLostHoldNothing,
        Self::MemslotsMoveNothing,
        Self::MemslotsOverlap,
        Self::MemslotsAreReplaced,
        Self::MemslotsGoAtOnce,
        Self::GuestsNeedNotConsent,
        Self::GuestsPagesMove,
        Self::RelinquishedPagesKeepBytes,
        Self::MovesLoseBytes,
        Self::PinnedPagesMove,
    ];
}
