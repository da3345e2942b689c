//! Mistakes that a model seeds to show that it would notice them.

#![cfg_attr(
    not(all(loom, feature = "loom")),
    expect(unreachable_pub, reason = "public for the models, and only in their build")
)]

/// A mistake in the protocol of the tree. Most were made in earnest by some variant of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A block that is held by a conversion is split all the same.
    SplitsFrozenBlocks,
    /// A part is written for the first time without a look at what it has become.
    WritesPartsBlindly,
    /// Any word is written without a look at what it has become.
    WritesBlindly,
    /// Who splits a block writes all of its parts, and so over what others have written there since.
    FillsTables,
    /// A part that is ahead of the word of its block, which was read too early, passes for one that inherits.
    TakesLaterPartsForOlder,
    /// A merge gives back the parts that it silences: they speak to whoever comes late.
    MergeFreesItsParts,
    /// A merge does not number the split that it ends: old parts pass for parts that inherit.
    MergeForgetsItsSplit,
    /// A merge does not ask for all of its parts.
    MergesTooMuch,
    /// A merge does not wait for those who may still be on their way down.
    MergesWithoutWaiting,
    /// Tables are given back without waiting for those who may still look into them.
    TrimsWithoutWaiting,
    /// A block that drains lets pins in.
    DrainingLetsPinsIn,
    /// Who gives up waiting leaves the words as they are.
    GivesUpWithoutUndoing,
    /// Nobody is woken when the last pin goes.
    WakesNobody,
    /// A word that was never written is taken for one that is shared and idle.
    PinsUnwrittenPages,
    /// A conversion does not look again at what it left alone.
    LooksOnce,
    /// A conversion looks again outside of a section.
    TouchesWithoutSection,
    /// A late answer of a subscriber passes for the answer to the next question.
    QuestionsWithoutNumbers,
    /// A question is given up on some time after the look that found no answer.
    GivesUpAfterTheLook,
    /// A subscriber is given something because of how things stood some time before.
    GivesOnAnEarlierLook,
    /// Neither side of a grace period runs a fence. With membarrier readers run none; models seed this
    /// where the words alone have to order what happens.
    SectionsWithoutFences,
    /// A block that somebody scrubs stays where others look for dirty ones until it is scrubbed.
    ScrubsInPlace,
    /// Who waits for a block that is scrubbed is woken before it is back.
    WakesBeforeItIsBack,
    /// A block whose scrub has failed stays in the hands of whoever tried.
    KeepsWhatWasNotScrubbed,
    /// A scrubber goes to sleep on what it saw before it let go of the lock.
    SleepsOnOldNews,
    /// Who was promised nothing takes what others were.
    TakesWhatIsPromised,
    /// A folio is to be seen in its object before what was done to it is.
    PublishesFoliosEarly,
    /// Translations are forgotten, and those who use them are not waited for.
    ForgetsWithoutWaiting,
    /// A translation that made way for another passes for one that nobody uses.
    EvictsInSilence,
    /// A vCPU that has found a translation leaves its section before it has used it.
    LeavesBeforeTheCopy,
    /// What a walk has found is remembered after the lock of the tables is let go.
    RemembersOldNews,
    /// Somebody takes the host's lock before that of the VMs.
    LocksInReverse,
}

#[cfg(not(all(loom, feature = "loom")))]
#[inline(always)]
pub(crate) const fn seeded(_: Flaw) -> bool {
    false
}

#[cfg(all(loom, feature = "loom"))]
pub(crate) use modelled::seeded;

#[cfg(all(loom, feature = "loom"))]
pub use modelled::seed;

#[cfg(all(loom, feature = "loom"))]
mod modelled {
    use std::cell::Cell;

    use super::Flaw;

    thread_local! {
        // All of loom's threads are one thread of the system.
        static SEEDED: Cell<Option<Flaw>> = const { Cell::new(None) };
    }

    /// Makes the mistake from here on, or none.
    pub fn seed(flaw: Option<Flaw>) {
        SEEDED.set(flaw);
    }

    pub(crate) fn seeded(flaw: Flaw) -> bool {
        // While a panic unwinds nobody can be woken: the model has come to its end.
        let over = flaw == Flaw::WakesNobody && std::thread::panicking();
        over || SEEDED.get() == Some(flaw)
    }
}
