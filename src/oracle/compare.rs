//! Everything that can be seen from outside, compared.

use super::answer::{Answer, PageFacts, first_difference};
use super::mistake::Mistake;
use super::model::Model;
use super::real::{Real, Trouble};
use crate::addr::{Access, ByteSize, Offset, Pgoff};
use crate::geometry::{HUGE_PAGES, PAGE_BYTES};
use crate::gmem::{GuestMemfd, HostView, Touch};
use crate::os::sigbus::FaultCause;
use crate::os::sigbus::SigbusHandler;
use crate::state::Visibility;

/// Where the two differ.
#[derive(Clone, Debug)]
pub(super) struct Difference {
    pub(super) what: String,
    pub(super) model: String,
    pub(super) gmem: String,
}

impl Difference {
    pub(super) fn new(
        what: impl Into<String>,
        model: impl Into<String>,
        gmem: impl Into<String>,
    ) -> Self {
        Self { what: what.into(), model: model.into(), gmem: gmem.into() }
    }
}

impl From<Trouble> for Difference {
    fn from(trouble: Trouble) -> Self {
        Self::new("gmem contradicts itself", "sense", trouble.in_words())
    }
}

/// How many bytes to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// The pages that were written to, and some others, each time different ones.
    Sample(u64),
    /// All that the host may see.
    Bytes,
    /// Also all free frames.
    All,
}

impl Depth {
    fn wants(self, page: u64) -> bool {
        match self {
            Self::Sample(step) => page % 61 == step % 61,
            Self::Bytes | Self::All => true,
        }
    }
}

/// How often raw memory was touched, and how often that ended in a `SIGBUS`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Touched {
    pub(super) touches: u64,
    pub(super) faults: u64,
}

/// Compares all that can be seen.
///
/// # Errors
/// The first difference.
pub(super) fn compare(model: &Model, real: &Real, depth: Depth) -> Result<Touched, Difference> {
    same("the pool's counters", &model.pool_facts(), &real.pool_facts()?)?;
    let mut touched = Touched::default();
    for (object, _) in model.alive() {
        let Some(memfd) = real.memfd(object) else {
            return Err(Difference::new(format!("object {object}"), "alive", "gone"));
        };
        compare_state(model, real, object, memfd)?;
        compare_bytes(model, object, memfd, depth)?;
        for view in real.views(object) {
            compare_view(model, object, view, depth, &mut touched)?;
        }
    }
    if depth == Depth::All {
        let facts = model.pool_facts();
        let free = ByteSize::from_pages(facts.free + facts.reserved);
        let clean = real.pool().verify_scrubbed().map_err(|dirty| dirty.to_string());
        same("scrubbed memory", &Ok(free), &clean)?;
    }
    Ok(touched)
}

/// Compares two values.
///
/// # Errors
/// Both, in words.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    model: &T,
    real: &T,
) -> Result<(), Difference> {
    if model == real {
        return Ok(());
    }
    Err(Difference::new(what, format!("{model:?}"), format!("{real:?}")))
}

fn compare_state(
    model: &Model,
    real: &Real,
    object: usize,
    memfd: &GuestMemfd,
) -> Result<(), Difference> {
    let named = |what: &str| format!("{what} of object {object}");
    let (all, range) = ((0, model.nr_pages(object)), memfd.pages());
    same(&named("the counters"), &model.object_facts(object), &real.object_facts(object)?)?;
    let sides = Answer::Sides(model.sides(object, all));
    answers(named("the visibility"), &sides, &real.sides(object, range)?)?;
    let facts = model.facts(object, all);
    let pages = Answer::Pages(facts.clone());
    answers(named("the pages"), &pages, &real.pages(object, range)?)?;
    for side in [Visibility::Shared, Visibility::Private] {
        let Some(told) = real.told(object, side) else { continue };
        let everything = model.errs(Mistake::SubscribersKeepPrivatePages);
        let is_told =
            |facts: &PageFacts| facts.resident && (everything || facts.visibility == side);
        let wanted = facts.iter().filter(|(_, facts)| is_told(facts));
        let wanted: Vec<u64> =
            wanted.flat_map(|&((start, nr_pages), _)| start..start + nr_pages).collect();
        if let Some((wanted, told)) = first_difference(&wanted, &told) {
            return Err(Difference::new(named("what a subscriber has"), wanted, told));
        }
    }
    let names = Answer::Names(model.owners(object, all).map(String::from).collect());
    answers(named("the owners"), &names, &real.owners(object, range)?)
}

/// Compares two answers.
///
/// # Errors
/// What differs first.
pub(super) fn answers(
    what: impl Into<String>,
    model: &Answer,
    real: &Answer,
) -> Result<(), Difference> {
    match model.differs(real) {
        Some((model, real)) => Err(Difference::new(what, model, real)),
        None => Ok(()),
    }
}

/// Looks at the bytes of shared pages: private ones show theirs when they are shared again.
fn compare_bytes(
    model: &Model,
    object: usize,
    memfd: &GuestMemfd,
    depth: Depth,
) -> Result<(), Difference> {
    let zeroes = [0; PAGE_BYTES];
    let mut found = [0; PAGE_BYTES];
    for page in shared_pages(model, object) {
        let wanted = match model.page_bytes(object, page) {
            Some(bytes) => bytes,
            None if depth.wants(page) => &zeroes,
            None => continue,
        };
        memfd.read(Pgoff::new(page).offset(), &mut found).map_err(Trouble::from)?;
        if found != *wanted {
            let (wanted, found) = (Answer::Bytes(wanted.to_vec()), Answer::Bytes(found.to_vec()));
            return answers(format!("page {page:#x} of object {object}"), &wanted, &found);
        }
    }
    Ok(())
}

fn shared_pages(model: &Model, object: usize) -> impl Iterator<Item = u64> {
    let all = (0, model.nr_pages(object));
    model
        .sides(object, all)
        .into_iter()
        .filter(|(_, side)| *side == Visibility::Shared)
        .flat_map(|((start, nr_pages), _)| start..start + nr_pages)
}

/// Touches raw memory: what is shared and there can be touched, all else is a `SIGBUS`.
fn compare_view(
    model: &Model,
    object: usize,
    view: &HostView,
    depth: Depth,
    touched: &mut Touched,
) -> Result<(), Difference> {
    let handler = SigbusHandler::install().map_err(Trouble::from)?;
    for page in 0..model.nr_pages(object) {
        let hot = page < 2 || (HUGE_PAGES - 2..HUGE_PAGES + 2).contains(&page);
        if !hot && !depth.wants(page) {
            continue;
        }
        // Somewhere in the page, by turns a load and a store.
        let at = Offset::new((page << 12) + page * 37 % 4096);
        let access = if page % 2 == 0 { Access::Read } else { Access::Write };
        let found = view.touch(handler, at, access).map_err(Trouble::from)?;
        touched.touches += 1;
        let what = || format!("a touch of byte {at} of object {object}");
        if model.is_touchable(object, page) {
            let byte = model.byte(object, at.get());
            same(&what(), &Touch::Byte(byte), &found)?;
            continue;
        }
        touched.faults += 1;
        match found {
            Touch::Fault(fault)
                if Some(fault.hva) == view.hva_of(at)
                    && fault.offset == at
                    && fault.cause == FaultCause::NotMapped => {}
            _ => {
                let wanted = format!("a SIGBUS at {:?}", view.hva_of(at));
                return Err(Difference::new(what(), wanted, format!("{found:?}")));
            }
        }
    }
    Ok(())
}
