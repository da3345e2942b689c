//! Rules that the model can be told to get wrong.

/// A rule that the model gets wrong on purpose, to see that the comparison notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolMistake {
    /// What is promised counts as free.
    ForgetsPromises,
    /// Who overcommits may take what others were promised.
    TakesWhatIsPromised,
    /// A promise that was taken up is not made again when the folio comes back.
    PromisesOnce,
    /// Objects that are gone keep their frames.
    LeaksDroppedObjects,
    /// Objects that are gone are charged on.
    ChargesDroppedObjects,
    /// Accounts have no limits.
    IgnoresLimits,
    /// Who overcommits is charged nothing.
    ChargesPromisesOnly,
    /// An account's peak goes down again.
    PeakIsNow,
    /// A failed frame is used again.
    ReusesFailedFrames,
    /// What a page loses with its frame is there still.
    ForgetsFailedPages,
    /// What a forgotten pin holds comes back.
    ReusesPinnedFolios,
    /// Pins keep nothing from moving or being punched.
    IgnoresPins,
    /// A range that could not be allocated whole stays allocated in part.
    KeepsHalfAnAllocation,
    /// What moves to another zone loses its bytes.
    MovesLoseBytes,
    /// What moves is counted where it was and where it is.
    MovesUseTwice,
    /// Private pages may be in any zone.
    PrivateAnywhere,
    /// A folio comes from the last part that has one.
    TakesTheLastPart,
    /// Bytes of the owner before show up in fresh pages.
    FreshPagesAreDirty,
    /// Nothing waits for a scrub, scrubber or not.
    NothingIsDirty,
}

impl PoolMistake {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::MovesLoseBytes,
        Self::MovesUseTwice,
        Self::PrivateAnywhere,
        Self::TakesTheLastPart,
        Self::FreshPagesAreDirty,
        Self::NothingIsDirty,
        Self::ForgetsPromises,
        Self::TakesWhatIsPromised,
        Self::PromisesOnce,
        Self::LeaksDroppedObjects,
        Self::ChargesDroppedObjects,
        Self::IgnoresLimits,
        Self::ChargesPromisesOnly,
        Self::PeakIsNow,
        Self::ReusesFailedFrames,
        Self::ForgetsFailedPages,
        Self::ReusesPinnedFolios,
        Self::IgnoresPins,
        Self::KeepsHalfAnAllocation,
    ];
}
