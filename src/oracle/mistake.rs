//! Rules that the model can be told to get wrong.

/// A rule that the model gets wrong on purpose, to see that the comparison notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mistake {
    /// A conversion to private is not refused by pins.
    ConvertsPinnedPages,
    /// A conversion is also refused by pins of pages that are on the right side already.
    RefusesPinsOfPagesAlreadyThere,
    /// A hole punch is not refused by pins.
    PunchesPinnedPages,
    /// Bytes of folios that are punched in part stay.
    KeepsBytesOfPartialPunch,
    /// Folios that are punched whole stay.
    KeepsPunchedFolios,
    /// Folios whose pages are punched one after the other stay.
    KeepsFoliosOfHoles,
    /// A punched page is private again.
    PunchChangesVisibility,
    /// A conversion that should zero does not.
    ForgetsToZero,
    /// A conversion that should zero does so on all pages of its range.
    ZeroesPagesAlreadyThere,
    /// A conversion loses the bytes that it should preserve.
    LosesBytes,
    /// Private memory can be read.
    ReadsPrivate,
    /// A read gives holes a folio.
    ReadAllocates,
    /// A write takes pages, not folios.
    WriteTakesOnePage,
    /// Private pages can be pinned.
    PinsPrivate,
    /// An exclusive pin gets on with others.
    SharesExclusivePins,
    /// Only the first owner is named.
    NamesOneOwner,
    /// The last culprit is reported in place of the first.
    ReportsTheLastCulprit,
    /// A conversion names one culprit, however many are asked for.
    NamesOneCulprit,
    /// A conversion of several ranges is only refused by pins of the first.
    LooksAtOneRange,
    /// A wait that is over is answered as if there had been none.
    NeverWaits,
    /// Subscribers keep what turns private.
    SubscribersKeepPrivatePages,
    /// The promises to other objects are forgotten.
    ForgetsPromises,
    /// Objects that are gone keep their memory.
    LeaksDroppedObjects,
    /// Views map private pages as well.
    ViewsMapPrivatePages,
}

impl Mistake {
    /// All of them.
    pub const ALL: [Self; 24] = [
        Self::ConvertsPinnedPages,
        Self::RefusesPinsOfPagesAlreadyThere,
        Self::PunchesPinnedPages,
        Self::KeepsBytesOfPartialPunch,
        Self::KeepsPunchedFolios,
        Self::KeepsFoliosOfHoles,
        Self::PunchChangesVisibility,
        Self::ForgetsToZero,
        Self::ZeroesPagesAlreadyThere,
        Self::LosesBytes,
        Self::ReadsPrivate,
        Self::ReadAllocates,
        Self::WriteTakesOnePage,
        Self::PinsPrivate,
        Self::SharesExclusivePins,
        Self::NamesOneOwner,
        Self::ReportsTheLastCulprit,
        Self::NamesOneCulprit,
        Self::LooksAtOneRange,
        Self::NeverWaits,
        Self::SubscribersKeepPrivatePages,
        Self::ForgetsPromises,
        Self::LeaksDroppedObjects,
        Self::ViewsMapPrivatePages,
    ];
}
