//! Drives model and library side by side.

use std::collections::BTreeMap;
use std::fmt;

use super::action::{Action, Asked, Patience};
use super::answer::{Answer, Refused};
use super::compare::{Depth, Difference, answers, compare, same};
use super::facts::PoolFacts;
use super::mistake::Mistake;
use super::model::Model;
use super::real::Real;
use super::step::{How, Step};
use crate::addr::ByteSize;
use crate::backing::ArenaBacking;
use crate::folio::FolioPool;
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::gmem::{ContentPolicy, GuestMemfd};
use crate::state::Visibility;

/// The pool: few enough frames that objects run out of them, and a ragged end.
const NR_HUGE: u64 = 3;
const NR_SMALL: u64 = 37;
/// So many steps from one look at everything to the next.
const STRIDE: u64 = 32;

/// Where the library and the model part.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {step}\n  {what} should be: {model}\n  {what} is:        {gmem}")]
pub struct Disagreement {
    place: Place,
    action: Option<Box<Action>>,
    step: String,
    what: String,
    model: String,
    gmem: String,
}

/// As it reads: a test that unwraps shows this.
impl fmt::Debug for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Disagreement {
    /// The action that showed it; `None` for the steps before the first and behind the last.
    pub fn action(&self) -> Option<&Action> {
        self.action.as_deref()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Setting up.
    Before,
    /// The action with this number, counted from zero.
    Action(usize),
    /// Taking everything down.
    Behind,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before => f.write_str("before the first action"),
            Self::Action(at) => write!(f, "action {at}"),
            Self::Behind => f.write_str("behind the last action"),
        }
    }
}

/// What a run has come by, so that a test can tell whether it was worth anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Coverage {
    /// How often which step was answered how, as in `Convert Busy`.
    pub answers: BTreeMap<String, u64>,
    /// How often raw memory of a view was touched.
    pub touches: u64,
    /// How many of those were expected to end in a `SIGBUS`, and did.
    pub faults: u64,
}

impl Coverage {
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
        let name = match step {
            Step::MapView { path, mapping, .. } => format!("MapView {path:?} {mapping:?}"),
            _ => String::from(debug.split_whitespace().next().unwrap_or_default()),
        };
        let outcome = match answer {
            Answer::Refused(Refused { kind, .. }) => format!("{name} {kind:?}"),
            _ => format!("{name} Ok"),
        };
        *self.answers.entry(outcome).or_default() += 1;
    }
}

/// One line for each answer.
impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (answer, count) in &self.answers {
            writeln!(f, "{count:8} {answer}")?;
        }
        writeln!(f, "{:8} touches, {} of them faults", self.touches, self.faults)
    }
}

/// Does the actions on a pool of the given backing, and compares every answer and everything that
/// can be seen with the model's; takes everything down, and makes sure that every frame is back and
/// scrubbed.
///
/// # Errors
/// The first difference.
pub fn run(actions: &[Action], backing: ArenaBacking) -> Result<Coverage, Disagreement> {
    Runner::new(backing, None, None)?.run(actions)
}

/// [`run`], with a look by somebody else at the pool and all objects whenever everything is compared.
///
/// # Errors
/// The first difference, or what the other one found wrong.
pub fn run_inspected(
    actions: &[Action],
    backing: ArenaBacking,
    inspect: &mut Inspect<'_>,
) -> Result<Coverage, Disagreement> {
    Runner::new(backing, None, Some(inspect))?.run(actions)
}

/// Looks at a pool and all of its objects, and says what is wrong.
pub type Inspect<'a> = dyn FnMut(&FolioPool, &[&GuestMemfd]) -> Result<(), String> + 'a;

/// [`run`] against a model that gets a rule wrong, to see that the comparison notices.
///
/// # Errors
/// The first difference.
pub fn run_mistaken(
    actions: &[Action],
    backing: ArenaBacking,
    mistake: Mistake,
) -> Result<Coverage, Disagreement> {
    Runner::new(backing, Some(mistake), None)?.run(actions)
}

/// The actions without those that a disagreement does not need. All of them if there is none.
pub fn shrink(
    actions: &[Action],
    run: impl Fn(&[Action]) -> Result<Coverage, Disagreement>,
) -> Vec<Action> {
    super::shrink::without_the_needless(actions, |fewer| run(fewer).is_err())
}

struct Runner<'i, 'c> {
    inspect: Option<&'i mut Inspect<'c>>,
    model: Model,
    real: Real,
    coverage: Coverage,
    steps: u64,
}

impl<'i, 'c> Runner<'i, 'c> {
    fn new(
        backing: ArenaBacking,
        mistake: Option<Mistake>,
        inspect: Option<&'i mut Inspect<'c>>,
    ) -> Result<Self, Disagreement> {
        let nr_small = if backing == ArenaBacking::MemfdHugetlb2M { 0 } else { NR_SMALL };
        let nr_pages = NR_HUGE * HUGE_PAGES + nr_small;
        let made = Real::new(backing, nr_pages)
            .and_then(|real| real.no_views().map(|no_views| (real, no_views)));
        let (real, no_views) = made.map_err(|error| Disagreement {
            place: Place::Before,
            action: None,
            step: format!("a pool of {nr_pages} pages on {backing}, and a view"),
            what: String::from("the answer"),
            model: String::from("done"),
            gmem: error.to_string(),
        })?;
        let model = Model::new(backing, nr_pages, no_views, mistake);
        Ok(Self { inspect, model, real, coverage: Coverage::default(), steps: 0 })
    }

    fn run(mut self, actions: &[Action]) -> Result<Coverage, Disagreement> {
        let bytes = match self.model.backing {
            ArenaBacking::MemfdHugetlb2M => (2 * HUGE_PAGES) << 12,
            _ => (HUGE_PAGES + 21) << 12,
        };
        let first = Step::Create { bytes, folio: FolioSize::Huge2M, initial: Visibility::Shared };
        self.step(Place::Before, &first)?;
        for (at, action) in actions.iter().enumerate() {
            if let Some(step) = Step::of(action, &self.model) {
                self.step(Place::Action(at), &step).map_err(|mut it| {
                    it.action = Some(Box::new(action.clone()));
                    it
                })?;
            }
        }
        self.take_down()?;
        Ok(self.coverage)
    }

    /// Shows all bytes, gives everything back, and looks at what is left.
    fn take_down(&mut self) -> Result<(), Disagreement> {
        while self.model.nr_pins() > 0 {
            self.step(Place::Behind, &Step::Unpin { pin: 0 })?;
        }
        let alive: Vec<(usize, u64)> =
            self.model.alive().map(|(at, object)| (at, object.nr_pages())).collect();
        for &(object, nr_pages) in &alive {
            // Private bytes come to light.
            let ranges = vec![Asked::Pages { start: 0, nr_pages }];
            let content = ContentPolicy::Preserve;
            let how = How { content, most_culprits: 1, patience: Patience::None };
            let to = Visibility::Shared;
            self.step(Place::Behind, &Step::Convert { object, ranges, to, how })?;
        }
        let behind = |it| disagreement(Place::Behind, &Step::Examine, it);
        self.look(Depth::Bytes).map_err(behind)?;
        for &(object, _) in &alive {
            while self.model.nr_views(object) > 0 {
                self.step(Place::Behind, &Step::DropView { object, view: 0 })?;
            }
            self.step(Place::Behind, &Step::Drop { object })?;
        }
        self.all_is_back().map_err(behind)
    }

    /// Every frame is free, promised to nobody, and clean.
    fn all_is_back(&self) -> Result<(), Difference> {
        let capacity = self.model.pool_facts().capacity;
        let wanted = PoolFacts { capacity, free: capacity, reserved: 0, used: 0, quarantined: 0 };
        same("the pool in the end", &wanted, &self.real.pool_facts()?)?;
        let clean = self.real.pool().verify_scrubbed().map_err(|dirty| dirty.to_string());
        same("scrubbed memory", &Ok(ByteSize::from_pages(capacity)), &clean)
    }

    fn step(&mut self, place: Place, step: &Step) -> Result<(), Disagreement> {
        self.try_step(step).map_err(|difference| disagreement(place, step, difference))
    }

    fn try_step(&mut self, step: &Step) -> Result<(), Difference> {
        self.steps += 1;
        let wanted = self.model.apply(step);
        let found = self
            .real
            .apply(step)
            .map_err(|what| Difference::new("gmem contradicts itself", "sense", what))?;
        self.coverage.note(step, &found);
        answers("the answer", &wanted, &found)?;
        let all = *step == Step::Examine || self.steps % STRIDE == 0;
        let depth = if all { Depth::All } else { Depth::Sample(self.steps) };
        self.look(depth)
    }

    fn look(&mut self, depth: Depth) -> Result<(), Difference> {
        let touched = compare(&self.model, &self.real, depth)?;
        self.coverage.touches += touched.touches;
        self.coverage.faults += touched.faults;
        match &mut self.inspect {
            Some(inspect) if depth != Depth::Sample(self.steps) => {
                let objects: Vec<_> =
                    self.model.alive().filter_map(|(at, _)| self.real.memfd(at)).collect();
                inspect(self.real.pool(), &objects)
                    .map_err(|what| Difference::new("what the inspection finds", "nothing", what))
            }
            _ => Ok(()),
        }
    }
}

fn disagreement(place: Place, step: &Step, difference: Difference) -> Disagreement {
    let Difference { what, model, gmem } = difference;
    Disagreement { place, action: None, step: format!("{step:x?}"), what, model, gmem }
}
