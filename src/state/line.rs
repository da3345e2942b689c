//! Asking somebody to let go of pages, and what comes back: an answer, silence, or an answer too late.
//!
//! Each question has a number of its own. An answer to one that was given up on is nobody's, and never the
//! next one's. A question is over exactly once, under the lock of its line: so either who asks has the answer
//! and who answers was in time, or neither.

use std::time::Instant;

use super::flaw::{Flaw, seeded};
use crate::error::Errno;
use crate::sync::{Arc, Condvar, Mutex};

/// What joins the object and one subscriber.
#[derive(Debug)]
pub struct Line {
    state: Mutex<State>,
    changed: Condvar,
    /// Held while something is given to the subscriber, or it is cut off: taken before the state's, and with
    /// nothing waited for but the subscriber's call.
    gives: Mutex<()>,
}

#[derive(Debug)]
struct State {
    standing: Standing,
    next: u64,
    open: Vec<(u64, Answer)>,
}

/// How the object stands with a subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It is told what it may let others at, and asked to let go.
    Told,
    /// Its subscription is being dropped: nobody is waited for who has not answered yet.
    Leaving,
    /// It was cut off from all memory, and is told nothing until it subscribes again.
    FencedOff,
    /// It was given up on: it did not let go when it had to, and could not be cut off. Nobody knows what it still
    /// reaches, so nothing that it may reach becomes anybody else's.
    Lost,
}

/// What is known of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Awaited,
    LetGo,
    Refused(Errno),
    /// Nobody is left who could answer.
    Never,
}

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The pages are out of reach.
    LetGo,
    /// They are as before.
    Refused(Errno),
    /// Nobody knows.
    Silent,
}

/// Whether an answer was still waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Heard {
    /// It counts.
    InTime,
    /// The question was given up on before, and what was asked for has not come about, or has by other means.
    /// The answer changes nothing.
    TooLate,
}

impl Line {
    /// Nothing is asked yet.
    pub fn new() -> Self {
        let state = State { standing: Standing::Told, next: 0, open: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new(), gives: Mutex::new(()) }
    }

    /// How things stand.
    pub fn standing(&self) -> Standing {
        self.state.lock().standing
    }

    /// Gives the subscriber something by this call, unless it was cut off. One call after the other: what comes
    /// before it is cut off ends before, and nothing comes after.
    pub fn give(&self, call: impl FnOnce()) {
        let early = seeded(Flaw::GivesOnAnEarlierLook).then(|| self.standing());
        let _gives = self.gives.lock();
        match early.unwrap_or_else(|| self.standing()) {
            Standing::Told | Standing::Leaving => call(),
            Standing::FencedOff | Standing::Lost => {}
        }
    }

    /// Cuts the subscriber off by this call, unless it is: whatever it was given is out of reach then, and who
    /// waits for it need not.
    ///
    /// # Errors
    /// That of the call. Things stand as before.
    pub fn cut_off<E>(&self, fence: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let _gives = self.gives.lock();
        if self.standing() != Standing::FencedOff {
            fence()?;
            self.change(|_| Standing::FencedOff);
        }
        Ok(())
    }

    /// Nobody is to wait for an answer that does not come at once, for now.
    pub fn leave(&self) {
        self.change(|now| if now == Standing::Told { Standing::Leaving } else { now });
    }

    /// The subscriber has not let go where it had to.
    pub fn lose(&self) {
        self.change(|_| Standing::Lost);
    }

    fn change(&self, to: impl FnOnce(Standing) -> Standing) {
        let mut state = self.state.lock();
        state.standing = to(state.standing);
        drop(state);
        self.changed.wake_all();
    }

    /// A new question, and the only means to answer it. `None` without memory. Not a method: loom's
    /// `Arc` cannot be a receiver.
    pub fn ask(line: &Arc<Self>) -> Option<(Question, Ack)> {
        let mut state = line.state.lock();
        state.open.try_reserve(1).ok()?;
        let nr = match seeded(Flaw::QuestionsWithoutNumbers) {
            false => state.next,
            true => 0,
        };
        state.next = state.next.wrapping_add(1);
        state.open.push((nr, Answer::Awaited));
        drop(state);
        Some((Question { line: Arc::clone(line), nr }, Ack { line: Arc::clone(line), nr }))
    }

    fn answer(&self, nr: u64, answer: Answer) -> Heard {
        let mut state = self.state.lock();
        let awaited =
            |&&mut (open, known): &&mut (u64, Answer)| open == nr && known == Answer::Awaited;
        let Some((_, known)) = state.open.iter_mut().find(awaited) else { return Heard::TooLate };
        *known = answer;
        drop(state);
        self.changed.wake_all();
        Heard::InTime
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn known(&self, nr: u64) -> Answer {
        self.open.iter().find(|&&(open, _)| open == nr).map_or(Answer::Never, |&(_, known)| known)
    }
}

/// A question that was asked. It is given up on when this is dropped.
#[derive(Debug)]
pub struct Question {
    line: Arc<Line>,
    nr: u64,
}

impl Question {
    /// Waits for the answer, until that moment or without one for good; a moment that has passed gives up at
    /// once. Models have no clock.
    pub fn wait(self, deadline: Option<Instant>) -> Outcome {
        self.hear(deadline, |standing| standing == Standing::Leaving)
    }

    /// [`wait`](Self::wait), where who does not answer is given up on: also for one that is leaving.
    pub fn wait_out(self, deadline: Option<Instant>) -> Outcome {
        self.hear(deadline, |_| false)
    }

    fn hear(self, deadline: Option<Instant>, is_hasty: impl Fn(Standing) -> bool) -> Outcome {
        let line = &self.line;
        let mut state = line.state.lock();
        loop {
            let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let outcome = match (state.known(self.nr), state.standing) {
                (Answer::LetGo, _) | (Answer::Awaited | Answer::Never, Standing::FencedOff) => {
                    Outcome::LetGo
                }
                (Answer::Refused(errno), _) => Outcome::Refused(errno),
                (Answer::Never, _) => Outcome::Silent,
                (Answer::Awaited, now) if is_over || is_hasty(now) => Outcome::Silent,
                (Answer::Awaited, _) => {
                    state = line.changed.wait_until(state, deadline);
                    continue;
                }
            };
            // Under the same lock as the look: an answer that comes now comes too late.
            if seeded(Flaw::GivesUpAfterTheLook) {
                drop(state);
                return outcome;
            }
            state.open.retain(|&(open, _)| open != self.nr);
            return outcome;
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.line.state.lock().open.retain(|&(open, _)| open != self.nr);
    }
}

/// The answer that a subscriber owes. It may be given at once or later, from any thread.
///
/// To drop it unused is to say that nobody will ever answer, and is taken as silence at once.
#[derive(Debug)]
#[must_use = "a conversion waits for the answer"]
pub struct Ack {
    line: Arc<Line>,
    nr: u64,
}

impl Ack {
    /// Says that nobody reaches the pages through here any more.
    pub fn let_go(self) -> Heard {
        self.line.answer(self.nr, Answer::LetGo)
    }

    /// Says that the pages are as before, and why.
    pub fn refuse(self, errno: Errno) -> Heard {
        self.line.answer(self.nr, Answer::Refused(errno))
    }
}

impl Drop for Ack {
    fn drop(&mut self) {
        // What was answered stays so.
        self.line.answer(self.nr, Answer::Never);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    fn asked(line: &Arc<Line>) -> (Question, Ack) {
        Line::ask(line).unwrap()
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(5))
    }

    #[test]
    fn an_answer_counts_once_and_for_its_own_question() {
        let line = Arc::new(Line::new());
        let (question, ack) = asked(&line);
        assert_eq!(ack.let_go(), Heard::InTime);
        assert_eq!(question.wait(None), Outcome::LetGo);
        let (question, late) = asked(&line);
        assert_eq!(question.wait(soon()), Outcome::Silent);
        let (question, ack) = asked(&line);
        assert_eq!(late.let_go(), Heard::TooLate);
        assert_eq!(ack.refuse(Errno::EBUSY), Heard::InTime);
        assert_eq!(question.wait(soon()), Outcome::Refused(Errno::EBUSY));
        assert!(line.state.lock().open.is_empty());
    }

    #[test]
    fn silence_is_known_at_once_where_nobody_can_answer() {
        let line = Arc::new(Line::new());
        let (question, ack) = asked(&line);
        drop(ack);
        assert_eq!(question.wait(None), Outcome::Silent);
        let (question, ack) = asked(&line);
        line.leave();
        assert_eq!(question.wait(None), Outcome::Silent);
        assert_eq!(ack.let_go(), Heard::TooLate);
        let (question, ack) = asked(&line);
        assert_eq!(ack.let_go(), Heard::InTime);
        assert_eq!(question.wait(None), Outcome::LetGo, "what answers at once is heard");
        let (question, ack) = asked(&line);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| question.wait_out(None));
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(ack.let_go(), Heard::InTime, "some wait all the same");
            assert_eq!(waits.join().unwrap(), Outcome::LetGo);
        });
    }

    #[test]
    fn who_is_fenced_off_has_let_go() {
        let line = Arc::new(Line::new());
        let (question, ack) = asked(&line);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| question.wait(None));
            line.cut_off(|| Ok::<(), Errno>(())).unwrap();
            assert_eq!(waits.join().unwrap(), Outcome::LetGo);
        });
        assert_eq!(ack.refuse(Errno::EBUSY), Heard::TooLate);
        line.give(|| unreachable!("it is given nothing"));
        assert_eq!(line.cut_off(|| Err(Errno::EBUSY)), Ok(()), "it is already");
    }

    #[test]
    fn who_could_not_be_cut_off_is_given_more() {
        let line = Line::new();
        assert_eq!(line.cut_off(|| Err(Errno::ENODEV)), Err(Errno::ENODEV));
        let mut nr_given = 0;
        line.give(|| nr_given += 1);
        line.lose();
        line.give(|| nr_given += 1);
        assert_eq!((line.standing(), nr_given), (Standing::Lost, 1));
        line.cut_off(|| Ok::<(), Errno>(())).unwrap();
        assert_eq!(line.standing(), Standing::FencedOff, "then it is known what it reaches");
    }
}
