//! Drives model and library side by side.

use crate::oracle::shrink;
use std::collections::BTreeMap;
use std::fmt;

use super::action::{HostAction, Mood};
use super::compare::{Depth, compare};
use super::mistake::HostMistake;
use super::model::Model;
use super::real::{Real, sizes};
use super::step::{Answer, Step, pages_of};
use crate::backing::ArenaBacking;
use crate::folio::{FolioPool, Zone};
use crate::gmem::{ContentPolicy, GuestMemfd};
use crate::hyp::Hypervisor;
use crate::state::{Standing, Visibility};

/// So many steps from one look at everything to the next.
const STRIDE: u64 = 32;

/// Where the library and the model part.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("action {at}: {step}\n  {what}")]
pub struct HostDisagreement {
    at: usize,
    step: String,
    what: String,
}

/// As it reads: a test that unwraps shows this.
impl fmt::Debug for HostDisagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a run has come by, so that a test can tell whether it was worth anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct HostCoverage {
    /// How often which step was answered how, as in `Convert SubscriberRefused ETIMEDOUT`.
    pub answers: BTreeMap<String, u64>,
    /// How often raw memory of a view was touched.
    pub touches: u64,
    /// How many of those were expected to end in a `SIGBUS`, and did.
    pub faults: u64,
}

impl HostCoverage {
    /// Adds what another run has come by.
    pub fn add(&mut self, other: Self) {
        for (answer, count) in other.answers {
            *self.answers.entry(answer).or_default() += count;
        }
        self.touches += other.touches;
        self.faults += other.faults;
    }

    fn note(&mut self, step: &Step, answer: &Answer) {
        let debug = format!("{step:?}");
        let name = debug.split_whitespace().next().unwrap_or_default();
        let name = match step {
            Step::MapView { path, mapping } => format!("MapView {path:?} {mapping:?}"),
            Step::Guest { act, .. } => format!("Guest {act:?}"),
            _ => String::from(name),
        };
        let outcome = match answer {
            Answer::Refused(refused) => format!("{name} {:?} {:?}", refused.0, refused.1),
            Answer::Moved(_, refused) => match refused.first() {
                Some((_, why)) => format!("{name} {:?} {:?}", why.0, why.1),
                None => format!("{name} Ok"),
            },
            Answer::Dma(kind) => format!("{name} {kind:?}"),
            Answer::NoSlot | Answer::NotPrivate | Answer::Granted(_) => {
                format!("{name} {answer:?}")
            }
            Answer::Done | Answer::Changed(_) | Answer::Byte(_) => format!("{name} Ok"),
        };
        *self.answers.entry(outcome).or_default() += 1;
    }
}

/// One line for each answer.
impl fmt::Display for HostCoverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (answer, count) in &self.answers {
            writeln!(f, "{count:8} {answer}")?;
        }
        writeln!(f, "{:8} touches, {} of them faults", self.touches, self.faults)
    }
}

/// Looks at a pool, its object and the hypervisor, and says what is wrong.
pub type HostInspect = fn(&FolioPool, &GuestMemfd, &Hypervisor) -> Result<(), String>;

/// Does the actions on an object of a pool of its own, and compares every answer and everything that can be
/// seen with the model's; takes everything down, and makes sure that every frame is back and scrubbed but for
/// those that somebody has never let go of.
///
/// # Errors
/// The first difference, or what `inspect` found wrong.
pub fn run_host(
    actions: &[HostAction],
    backing: ArenaBacking,
    inspect: HostInspect,
) -> Result<HostCoverage, HostDisagreement> {
    run(actions, backing, None, inspect)
}

/// [`run_host`] against a model that gets a rule wrong, to see that the comparison notices.
///
/// # Errors
/// The first difference.
pub fn run_host_mistaken(
    actions: &[HostAction],
    backing: ArenaBacking,
    mistake: HostMistake,
) -> Result<HostCoverage, HostDisagreement> {
    run(actions, backing, Some(mistake), |_, _, _| Ok(()))
}

/// The actions without those that a disagreement does not need. All of them if there is none.
pub fn shrink_host(
    actions: &[HostAction],
    run: impl Fn(&[HostAction]) -> Result<HostCoverage, HostDisagreement>,
) -> Vec<HostAction> {
    shrink::without_the_needless(actions, |fewer| run(fewer).is_err())
}

struct Runner {
    inspect: HostInspect,
    model: Model,
    real: Real,
    coverage: HostCoverage,
    steps: u64,
}

fn run(
    actions: &[HostAction],
    backing: ArenaBacking,
    mistake: Option<HostMistake>,
    inspect: HostInspect,
) -> Result<HostCoverage, HostDisagreement> {
    let differ = |at: usize, step: String, what: String| HostDisagreement { at, step, what };
    let made = Real::new(backing).and_then(|real| Ok((real.no_views()?, real)));
    let (no_views, real) = made.map_err(|error| differ(0, "a pool".into(), error.to_string()))?;
    let model = Model::new(backing, sizes(backing).0, no_views, mistake);
    let coverage = HostCoverage::default();
    let mut runner = Runner { inspect, model, real, coverage, steps: 0 };
    for (at, action) in actions.iter().enumerate() {
        if let Some(step) = runner.model.step_of(action) {
            runner.step(&step).map_err(|what| differ(at, format!("{step:x?}"), what))?;
        }
    }
    runner.take_down().map_err(|what| differ(actions.len(), "taking all down".into(), what))
}

impl Runner {
    fn step(&mut self, step: &Step) -> Result<(), String> {
        self.steps += 1;
        let wanted = self.model.apply(step);
        let found = self.real.apply(step);
        self.coverage.note(step, &found);
        if wanted != found {
            return Err(format!(
                "the answer should be {wanted:x?}\n  the answer is        {found:x?}"
            ));
        }
        self.real.catch_up()?;
        let all = *step == Step::Examine || self.steps % STRIDE == 0;
        self.look(if all { Depth::All } else { Depth::Sample(self.steps) })
    }

    fn look(&mut self, depth: Depth) -> Result<(), String> {
        let touched = compare(&mut self.model, &self.real, depth)?;
        self.coverage.touches += touched.touches;
        self.coverage.faults += touched.faults;
        match depth {
            Depth::All => (self.inspect)(&self.real.pool, &self.real.memfd, &self.real.hypervisor),
            Depth::Sample(_) => Ok(()),
        }
    }

    /// Everything goes, and only what somebody has never let go of does not come back.
    fn take_down(mut self) -> Result<HostCoverage, String> {
        self.step(&Step::Examine)?;
        while !self.model.exports.is_empty() {
            self.step(&Step::Return { export: 0 })?;
        }
        while !self.model.pins.is_empty() {
            self.step(&Step::Unpin { pin: 0 })?;
        }
        // What the guest has stays where it is, also what it shares.
        let range = (0, self.model.nr_pages());
        self.step(&Step::Migrate { range, to: Zone::Movable })?;
        for who in 0..self.model.nr_subscribers() {
            let mood = self.model.keeper(who).map_or(Mood::LetsGo, |keeper| keeper.mood);
            self.step(&Step::Change { who, mood, can_be_fenced: true })?;
        }
        self.step(&Step::Teardown)?;
        for who in 0..self.model.nr_subscribers() {
            self.step(&Step::Change { who, mood: Mood::LetsGo, can_be_fenced: true })?;
        }
        // Nobody keeps what he was told of in a memslot that is gone.
        for to in [Visibility::Private, Visibility::Shared] {
            let ranges = vec![range];
            self.step(&Step::Convert { ranges, to, content: ContentPolicy::Preserve })?;
        }
        while self.model.nr_subscribers() > 0 {
            self.step(&Step::Leave { who: 0 })?;
        }
        while !self.model.views.is_empty() {
            self.step(&Step::DropView { view: 0 })?;
        }
        self.look(Depth::All)?;
        let lost: Vec<Visibility> = self
            .model
            .keepers
            .iter()
            .flatten()
            .filter(|keeper| keeper.standing == Standing::Lost)
            .map(|keeper| keeper.terms.side)
            .collect();
        let is_lost = |page| lost.iter().any(|&side| self.model.is(page, side));
        let folios = self.model.folios.keys().map(|&start| self.model.folio_at(start));
        let lost: u64 =
            folios.filter(|&folio| pages_of(folio).any(is_lost)).map(|folio| folio.1).sum();
        let pool = self.real.into_pool();
        let stat = pool.stat();
        let counts = [stat.quarantined, stat.used, stat.reserved].map(|size| size.whole_pages());
        if counts != [lost, 0, 0] || stat.free.whole_pages() + lost != stat.capacity.whole_pages() {
            return Err(format!("in the end {lost} pages should be lost: {stat:?}"));
        }
        match pool.verify_scrubbed() {
            Ok(clean) if clean == stat.free => Ok(self.coverage),
            other => Err(format!("clean memory should be {:?}, and is {other:?}", stat.free)),
        }
    }
}
