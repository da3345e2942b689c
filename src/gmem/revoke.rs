//! Taking pages back from subscribers, and giving them: what conversions, punches, migrations and those who
//! bring memory call. design/handout.md argues the order.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::handout::HandOutRun;
use super::layout::Layout;
use super::object::Inner;
use super::subscriber::{HandOut, OnSilence};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::failpoint::{FailPoint, fails};
use crate::range::PgoffRange;
use crate::state::{Line, Outcome, Question, Standing, Visibility};

/// How many runs a subscriber is told of at once where there may be no memory to list them all.
const BATCH: usize = 64;

/// A subscriber that was asked to let go.
struct Asked<'a> {
    hand_out: &'a HandOut,
    runs: &'a [HandOutRun],
    question: Question,
    deadline: Option<Instant>,
}

/// What became of that.
enum Left {
    /// It has to be told if it may have the pages after all.
    Granted,
    /// It has kept them, or was cut off and is told nothing any more.
    Alone,
}

/// What becomes of pages while somebody who is asked for them panics.
#[derive(Clone, Copy, PartialEq)]
enum IfBroken {
    Quarantined,
    GivenAgain,
}

/// Those who are given again what they were asked for, should somebody panic before this is cleared.
struct Called<'a>(Vec<(&'a HandOut, &'a [HandOutRun])>);

impl Drop for Called<'_> {
    fn drop(&mut self) {
        for (hand_out, runs) in &self.0 {
            let _ = catch_unwind(AssertUnwindSafe(|| hand_out.grant(runs)));
        }
    }
}

impl Inner {
    /// Takes pages away from every subscriber that has them, or from none. All are asked before any is waited
    /// for. The pages are frozen: if one panics they are nobody's any more.
    pub(super) fn take_back(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<(), Error> {
        self.take_back_as(op, layout, pages, IfBroken::Quarantined)
    }

    /// [`take_back`](Self::take_back) of pages that nobody has frozen, with the layout locked for writing: if one
    /// panics, those who have let go by then are given them again.
    pub(super) fn take_back_thawed(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<(), Error> {
        self.take_back_as(op, layout, pages, IfBroken::GivenAgain)
    }

    fn take_back_as(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
        if_broken: IfBroken,
    ) -> Result<(), Error> {
        if layout.subscribers.is_empty() {
            return Ok(());
        }
        let shared = self.list(op, layout, pages, Visibility::Shared)?;
        let private = self.list(op, layout, pages, Visibility::Private)?;
        let exhausted = || Error::new(op, ErrorKind::Exhausted);
        let (mut asked, mut acks) = (Vec::new(), Vec::new());
        for (_, hand_out) in &layout.subscribers {
            let runs = match hand_out.options.side {
                Visibility::Shared => &*shared,
                Visibility::Private => &*private,
            };
            match hand_out.line.standing() {
                Standing::FencedOff => continue,
                _ if runs.is_empty() => continue,
                Standing::Lost => {
                    let why = format!(
                        "{} has left or was given up on, and has not let go",
                        hand_out.name()
                    );
                    return Err(Error::new(op, ErrorKind::SubscriberRefused).because(why));
                }
                Standing::Told | Standing::Leaving => {}
            }
            let is_room = asked.try_reserve(1).is_ok() && acks.try_reserve(1).is_ok();
            if fails(FailPoint::Memory) || !is_room {
                return Err(exhausted());
            }
            let (question, ack) = Line::ask(&hand_out.line).ok_or_else(exhausted)?;
            acks.push(ack);
            asked.push(Asked { hand_out, runs, question, deadline: None });
        }
        let mut left = Vec::new();
        left.try_reserve_exact(asked.len()).map_err(|_| exhausted())?;
        let mut called = Called(Vec::new());
        called.0.try_reserve_exact(asked.len()).map_err(|_| exhausted())?;
        // Nothing wants memory from here on.
        for (asked, ack) in asked.iter_mut().zip(acks) {
            asked.deadline = Instant::now().checked_add(asked.hand_out.options.answer_within);
            if if_broken == IfBroken::GivenAgain {
                called.0.push((asked.hand_out, asked.runs));
            }
            asked.hand_out.subscriber.revoke(asked.runs, ack);
        }
        let mut refused = None;
        for Asked { hand_out, runs, question, deadline } in asked {
            match hand_out.heard(op, question.wait(deadline), &mut refused) {
                Left::Granted => left.push((hand_out, runs)),
                Left::Alone => {}
            }
        }
        called.0.clear();
        let Some(error) = refused else { return Ok(()) };
        left.iter().for_each(|(hand_out, runs)| hand_out.grant(runs));
        Err(error)
    }

    /// What there is of these pages on one side, if anybody is to be told of it.
    fn list(
        &self,
        op: Op,
        layout: &Layout,
        pages: &[PgoffRange],
        side: Visibility,
    ) -> Result<Vec<HandOutRun>, Error> {
        let exhausted = || Error::new(op, ErrorKind::Exhausted);
        let mut list = Vec::new();
        if layout.subscribers.iter().any(|(_, hand_out)| hand_out.options.side == side) {
            if fails(FailPoint::Memory) {
                return Err(exhausted());
            }
            let pages = pages.iter().flat_map(|&range| self.on_side(range, side));
            for run in self.hand_out_runs(layout, pages) {
                if list.try_reserve(1).is_err() {
                    return Err(exhausted());
                }
                list.push(run);
            }
        }
        Ok(list)
    }

    /// Gives pages to those who may see what is on one side, whatever their words say. They are frozen.
    pub(super) fn grant_as(&self, layout: &Layout, side: Visibility, pages: &[PgoffRange]) {
        for (_, hand_out) in &layout.subscribers {
            if hand_out.options.side == side {
                self.grant_to(layout, hand_out, pages.iter().copied());
            }
        }
    }

    /// Gives pages to those who may see them by their words, which stay as they are meanwhile: they are
    /// frozen, or the layout is locked for writing.
    pub(super) fn grant_again(&self, layout: &Layout, pages: &[PgoffRange]) {
        layout.subscribers.iter().for_each(|(_, it)| self.grant_by_words(layout, it, pages));
    }

    /// [`grant_again`](Self::grant_again), to each of them also if one panics. The first panic comes back.
    pub(super) fn grant_to_each(
        &self,
        layout: &Layout,
        pages: &[PgoffRange],
    ) -> Result<(), Box<dyn Any + Send>> {
        let mut told = Ok(());
        for (_, hand_out) in &layout.subscribers {
            let grant = || self.grant_by_words(layout, hand_out, pages);
            told = told.and(catch_unwind(AssertUnwindSafe(grant)));
        }
        told
    }

    fn grant_by_words(&self, layout: &Layout, hand_out: &HandOut, pages: &[PgoffRange]) {
        let side = hand_out.options.side;
        let pages = pages.iter().flat_map(|&range| self.on_side(range, side));
        self.grant_to(layout, hand_out, pages);
    }

    /// Gives a newcomer whatever it may see. The layout is locked for writing.
    pub(super) fn grant_all(&self, layout: &Layout, hand_out: &HandOut) {
        let pages = self.on_side(self.pages, hand_out.options.side);
        self.grant_to(layout, hand_out, pages);
    }

    fn grant_to(
        &self,
        layout: &Layout,
        hand_out: &HandOut,
        pages: impl Iterator<Item = PgoffRange>,
    ) {
        in_batches(self.hand_out_runs(layout, pages), |runs| {
            hand_out.grant(runs);
            true
        });
    }

    /// Takes pages back from a subscriber where that cannot be refused: if it does not let go it is cut off, and
    /// given up on if it cannot be. Whether it reaches none of them. The layout is locked for writing.
    ///
    /// It is asked for them where the layout has them, which is where they were granted: whatever changes that
    /// comes through here, or has them taken back and granted again.
    pub(super) fn part_from(&self, layout: &Layout, hand_out: &HandOut, pages: PgoffRange) -> bool {
        // Somebody who panics has not let go.
        let ask = || self.is_let_go(layout, hand_out, pages);
        let is_gone = matches!(catch_unwind(AssertUnwindSafe(ask)), Ok(true)) || {
            let cut = catch_unwind(AssertUnwindSafe(|| hand_out.cut_off()));
            matches!(cut, Ok(Ok(())))
        };
        if !is_gone {
            hand_out.line.lose();
        }
        is_gone
    }

    fn is_let_go(&self, layout: &Layout, hand_out: &HandOut, pages: PgoffRange) -> bool {
        match hand_out.line.standing() {
            Standing::Told | Standing::Leaving => {}
            Standing::FencedOff => return true,
            // Nobody knows where it has them.
            Standing::Lost => return false,
        }
        let pages = self.on_side(pages, hand_out.options.side);
        in_batches(self.hand_out_runs(layout, pages), |runs| {
            let Some((question, ack)) = Line::ask(&hand_out.line) else { return false };
            let deadline = Instant::now().checked_add(hand_out.options.answer_within);
            hand_out.subscriber.revoke(runs, ack);
            question.wait_out(deadline) == Outcome::LetGo
        })
    }
}

impl HandOut {
    /// Gives runs, unless it is cut off: meanwhile nobody cuts it off, and so it never has more than that
    /// takes away.
    fn grant(&self, runs: &[HandOutRun]) {
        self.line.give(|| self.subscriber.grant(runs));
    }

    /// Cuts it off from all that it was ever given.
    pub(super) fn cut_off(&self) -> Result<(), Errno> {
        self.line.cut_off(|| self.subscriber.fence())
    }

    /// What to make of an answer, or of none.
    fn heard(&self, op: Op, outcome: Outcome, refused: &mut Option<Error>) -> Left {
        let error = |errno: Errno, what: &str| {
            let why = format!("{} {what}", self.name());
            Error::new(op, ErrorKind::SubscriberRefused).errno_is(errno).because(why)
        };
        match (outcome, self.options.on_silence) {
            (Outcome::LetGo, _) if self.line.standing() == Standing::FencedOff => Left::Alone,
            (Outcome::LetGo, _) => Left::Granted,
            (Outcome::Refused(errno), _) => {
                refused.get_or_insert_with(|| error(errno, "does not let go"));
                Left::Alone
            }
            // Nobody is cut off for a conversion that does not come about.
            (Outcome::Silent, OnSilence::FenceOff) if refused.is_none() => match self.cut_off() {
                Ok(()) => Left::Alone,
                Err(errno) => {
                    *refused = Some(error(errno, "did not answer, and cannot be fenced off"));
                    Left::Granted
                }
            },
            (Outcome::Silent, _) => {
                refused.get_or_insert_with(|| error(Errno::ETIMEDOUT, "did not answer"));
                Left::Granted
            }
        }
    }
}

/// Hands on a few runs at a time, without memory, as long as `tell` says so. Whether it always did.
fn in_batches(
    runs: impl Iterator<Item = HandOutRun>,
    mut tell: impl FnMut(&[HandOutRun]) -> bool,
) -> bool {
    let mut runs = runs.peekable();
    while let Some(&first) = runs.peek() {
        let mut batch = [first; BATCH];
        let mut nr = 0;
        for (place, run) in batch.iter_mut().zip(&mut runs) {
            *place = run;
            nr += 1;
        }
        if !tell(batch.get(..nr).unwrap_or_default()) {
            return false;
        }
    }
    true
}
