//! The comparison: everything that can be seen of the object from the host's side.

use std::fmt::Debug;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::keepers::Keeper;
use super::mistake::HostMistake;
use super::model::Model;
use super::real::Real;
use super::step::{Answer, FIRST_GFN, Run, pages_of};
use crate::addr::{Access, Gfn, Offset};
use crate::error::Error;
use crate::geometry::{HUGE_PAGES, PAGE_BYTES, index};
use crate::gmem::{HostView, Residency, Touch};
use crate::hyp::iommu::DmaFaultKind;
use crate::os::sigbus::{FaultCause, SigbusHandler};
use crate::state::{Standing, Visibility};

/// How often raw memory was touched, and how often that ended in a `SIGBUS`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Touched {
    pub(super) touches: u64,
    pub(super) faults: u64,
}

/// How much to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Some pages, other ones each time.
    Sample(u64),
    All,
}

impl Depth {
    fn wants(self, page: u64) -> bool {
        let hot = page < 3 || (HUGE_PAGES - 3..HUGE_PAGES + 3).contains(&page);
        match self {
            Self::Sample(step) => hot || page % 61 == step % 61,
            Self::All => true,
        }
    }
}

type Verdict = Result<(), String>;

fn same<T: PartialEq + Debug>(what: impl FnOnce() -> String, model: &T, real: &T) -> Verdict {
    match model == real {
        true => Ok(()),
        false => Err(format!(
            "{} should be: {model:x?}
  and is: {real:x?}",
            what()
        )),
    }
}

fn in_words(error: Error) -> String {
    format!("refused: {error}")
}

/// Compares all that can be seen.
///
/// # Errors
/// The first difference.
pub(super) fn compare(model: &mut Model, real: &Real, depth: Depth) -> Result<Touched, String> {
    model.see(&real.seen())?;
    let facts = Facts::of(model, real);
    compare_counters(&facts, real)?;
    compare_pages(&facts, real)?;
    let mut touched = Touched::default();
    for (nth, view) in real.views.iter().enumerate() {
        compare_view(model, &facts, nth, view, depth, &mut touched)?;
    }
    for keeper in model.keepers.iter().flatten() {
        compare_domain(&facts, real, keeper)?;
    }
    compare_devices(model, real, depth)?;
    compare_guest(model, real, depth)?;
    if depth == Depth::All {
        compare_bytes(model, real)?;
        compare_exports(model, real)?;
    }
    Ok(touched)
}

/// What the model says of each page, made once for all that is compared.
struct Facts {
    pages: Vec<Fact>,
}

#[derive(Clone, Copy)]
struct Fact {
    side: Visibility,
    is_resident: bool,
    is_touchable: bool,
    is_held: bool,
    is_mapped: bool,
    /// By the library's own account.
    frame: Option<u64>,
}

impl Facts {
    fn of(model: &Model, real: &Real) -> Self {
        let fact = |page: u64| Fact {
            side: model.page(page).map_or(Visibility::Private, |page| page.side),
            is_resident: false,
            is_touchable: false,
            is_held: false,
            is_mapped: false,
            frame: None,
        };
        let mut facts = Self { pages: (0..model.nr_pages()).map(fact).collect() };
        for (start, pfn) in real.frames() {
            for (nth, page) in pages_of(model.folio_at(start)).enumerate() {
                let is_touchable = model.is_touchable(page);
                let Some(fact) = facts.pages.get_mut(index(page)) else { continue };
                fact.frame = Some(pfn.get() + nth as u64);
                fact.is_resident = model.page(page).is_some_and(|page| !page.is_hole);
                fact.is_touchable = is_touchable;
                fact.is_mapped = is_touchable && !model.views.is_empty();
            }
        }
        let all_of = |ranges: &[Run]| ranges.iter().flat_map(|&range| pages_of(range)).collect();
        let held: Vec<Run> = model.held().map(|(range, _)| range).collect();
        let held: Vec<u64> = all_of(&held);
        let exported: Vec<u64> = match model.errs(HostMistake::ExportsMapNothing) {
            true => Vec::new(),
            false => all_of(&model.exports),
        };
        for page in held {
            facts.pages.get_mut(index(page)).into_iter().for_each(|fact| fact.is_held = true);
        }
        for page in exported {
            facts.pages.get_mut(index(page)).into_iter().for_each(|fact| fact.is_mapped = true);
        }
        facts
    }
}

fn compare_counters(facts: &Facts, real: &Real) -> Verdict {
    let count = |wanted: fn(&&Fact) -> bool| facts.pages.iter().filter(wanted).count() as u64;
    let wanted = [
        count(|fact| fact.side == Visibility::Shared),
        count(|fact| fact.side == Visibility::Private),
        count(|fact| fact.is_held),
        count(|fact| fact.is_mapped),
        count(|fact| fact.frame.is_some() && !fact.is_resident),
        0,
    ];
    let stat = real.memfd.stat();
    let found = [stat.shared, stat.private, stat.pinned, stat.mapped, stat.holes, stat.quarantined];
    let what = || String::from("shared, private, pinned, mapped, holes and quarantined");
    same(what, &wanted, &found.map(|size| size.whole_pages()))
}

fn compare_pages(facts: &Facts, real: &Real) -> Verdict {
    let snapshot = real.memfd.snapshot(real.memfd.pages()).map_err(in_words)?;
    for (pages, info) in snapshot {
        for page in pages.iter().map(|page| page.get()) {
            let wanted = facts.pages.get(index(page)).map(|it| (it.side, it.is_resident));
            let found = (info.visibility, info.residency == Residency::Resident);
            same(|| format!("side and residence of page {page:#x}"), &wanted, &Some(found))?;
        }
    }
    Ok(())
}

/// Touches raw memory: what is shared and there can be touched, all else is a `SIGBUS`.
fn compare_view(
    model: &Model,
    facts: &Facts,
    nth: usize,
    view: &HostView,
    depth: Depth,
    touched: &mut Touched,
) -> Verdict {
    let handler = SigbusHandler::install().map_err(in_words)?;
    for page in (0..model.nr_pages()).filter(|&page| depth.wants(page)) {
        let at = Offset::new((page << 12) + page * 37 % 4096);
        let access = if page % 2 == 0 { Access::Read } else { Access::Write };
        let found = view.touch(handler, at, access).map_err(in_words)?;
        touched.touches += 1;
        let what = || format!("a touch of page {page:#x} in view {nth} ({})", view.path());
        let is_touchable = facts.pages.get(index(page)).is_some_and(|it| it.is_touchable);
        if is_touchable && model.shows(nth) {
            let byte = model.page(page).map_or(0, |page| page.byte);
            same(what, &Touch::Byte(byte), &found)?;
            continue;
        }
        touched.faults += 1;
        match found {
            Touch::Fault(fault)
                if Some(fault.hva) == view.hva_of(at)
                    && fault.offset == at
                    && fault.cause == FaultCause::NotMapped => {}
            _ => return Err(format!("{} should be a SIGBUS, and is {found:?}", what())),
        }
    }
    Ok(())
}

/// Everything in a domain, place by place, with the frames that are behind the pages now.
fn compare_domain(facts: &Facts, real: &Real, keeper: &Keeper) -> Verdict {
    let what = || format!("what subscriber {} ({:?}) has mapped", keeper.nr, keeper.terms);
    let Some(domain) = real.domain(keeper.nr) else {
        return Err(format!("{}: no such subscriber", what()));
    };
    if keeper.standing == Standing::FencedOff {
        // Whatever it has, no device gets through to it: see `compare_devices`.
        return Ok(());
    }
    let frame_of = |page: u64| facts.pages.get(index(page)).and_then(|it| it.frame);
    let mut wanted = keeper.maps.iter().map(|(&place, &page)| (place, frame_of(page)));
    let leaves = domain.leaves();
    let mut found = leaves.iter().flat_map(|(at, frames)| at.iter().zip(frames.iter()));
    loop {
        let found = found.next().map(|(at, frame)| (at.get(), Some(frame.get())));
        let wanted = wanted.next();
        same(what, &wanted, &found)?;
        if wanted.is_none() {
            return Ok(());
        }
    }
}

/// What devices reach, also by what they remember; and how their subscriptions stand.
fn compare_devices(model: &Model, real: &Real, depth: Depth) -> Verdict {
    for who in 0..model.nr_subscribers() {
        let Some(keeper) = model.keeper(who) else { continue };
        let standing = real.subscription(who).map(|it| it.standing());
        same(|| format!("the standing of subscriber {who}"), &Some(keeper.standing), &standing)?;
        let mapped = keeper.maps.keys().copied().filter(|&place| depth.wants(place)).take(12);
        let others = (0..model.nr_pages()).filter(|&page| depth.wants(page)).take(12);
        for place in mapped.chain(others) {
            let wanted = model.read_by_dma(keeper, place);
            let found = real.dma(who, place, 0).map_err(in_words)?;
            same(|| format!("a DMA of subscriber {who} from {place:#x}"), &wanted, &found)?;
        }
    }
    Ok(())
}

impl Model {
    /// What a device reads.
    fn read_by_dma(&self, keeper: &Keeper, place: u64) -> Answer {
        let is_cut = keeper.standing == Standing::FencedOff;
        match keeper.maps.get(&place) {
            _ if is_cut && !self.errs(HostMistake::FencesLetThrough) => {
                Answer::Dma(DmaFaultKind::Detached)
            }
            None => Answer::Dma(DmaFaultKind::NotMapped),
            Some(&page) => Answer::Byte(self.page(page).map_or(0, |page| page.byte)),
        }
    }
}

fn compare_guest(model: &Model, real: &Real, depth: Depth) -> Verdict {
    let edges = model.slots.values().flat_map(|slot| {
        let end = slot.at + slot.range.1;
        [slot.at - 1, slot.at, end - 1, end]
    });
    let all = match depth {
        Depth::All => FIRST_GFN..FIRST_GFN + 0x600,
        Depth::Sample(_) => 0..0,
    };
    for at in edges.chain(all) {
        let found = real.vm.memslot(Gfn::new(at).ipa());
        if found.as_ref().is_some_and(|(memfd, _)| !memfd.is(&real.memfd)) {
            return Err(format!("guest frame {at:#x} is another object's"));
        }
        let found = found.map(|(_, offset)| offset.pgoff().get());
        same(|| format!("the page at guest frame {at:#x}"), &model.bound_at(at), &found)?;
    }
    let stat = real.vm.stat();
    let count = |side| model.guest.values().filter(|has| has.side == side).count() as u64;
    let wanted = [count(Visibility::Private), count(Visibility::Shared)];
    let found = [stat.owned, stat.shared].map(|size| size.whole_pages());
    same(|| String::from("what the guest has, alone and shared"), &wanted, &found)
}

/// Every byte of every page that has memory, whoever may see it.
fn compare_bytes(model: &Model, real: &Real) -> Verdict {
    for (page, bytes) in real.memfd.bytes_behind() {
        let wanted = model.page(page.get()).map_or(0, |it| it.byte);
        if *bytes != [wanted; PAGE_BYTES] {
            let wrong = bytes.iter().copied().find(|&byte| byte != wanted);
            return same(|| format!("a byte of page {page}"), &Some(wanted), &wrong);
        }
    }
    Ok(())
}

/// What another process finds in the files it was sent.
fn compare_exports(model: &Model, real: &Real) -> Verdict {
    for (export, &range) in real.exports.iter().zip(&model.exports) {
        let mut next = range.0;
        for region in export.regions() {
            let (start, nr_pages) = (region.pages.start().get(), region.pages.nr_pages());
            same(|| String::from("where a region of an export begins"), &next, &start)?;
            next += nr_pages;
            let fd = region.file.try_clone_to_owned().map_err(|error| error.to_string())?;
            let file = File::from(fd);
            for page in pages_of((start, nr_pages)) {
                let mut byte = [0xa5];
                let at = region.file_start.get() + ((page - start) << 12) + 77;
                file.read_exact_at(&mut byte, at).map_err(|error| error.to_string())?;
                let wanted = model.page(page).map_or(0, |page| page.byte);
                same(|| format!("page {page:#x} in its file"), &[wanted], &byte)?;
            }
        }
        same(|| String::from("the end of an export"), &(range.0 + range.1), &next)?;
    }
    Ok(())
}
