//! The naive model: pages, who may touch them, and what each call does to them.

use std::collections::{BTreeMap, BTreeSet};

use super::action::HostAction;
use super::guest::{Has, Slot};
use super::keepers::{Keeper, Why};
use super::mistake::HostMistake;
use super::step::{Answer, Refused, Run, Step, pages_of};
use crate::backing::ArenaBacking;
use crate::error::{Errno, ErrorKind};
use crate::folio::Zone;
use crate::geometry::{HUGE_PAGES, index};
use crate::gmem::{ContentPolicy, PinMode, ViewPath};
use crate::state::Visibility;

pub(super) const MOST_VIEWS: usize = 4;
pub(super) const MOST_SUBSCRIBERS: usize = 4;

pub(super) const OUT_OF_RANGE: Refused = Refused(ErrorKind::OutOfRange, Errno::EINVAL);
const BUSY: Refused = Refused(ErrorKind::Busy, Errno::EAGAIN);
const NOT_SHARED: Refused = Refused(ErrorKind::NotShared, Errno::EFAULT);
const UNSUPPORTED: Refused = Refused(ErrorKind::Unsupported, Errno::EOPNOTSUPP);
const NOT_MOVED: Refused = Refused(ErrorKind::HypervisorRefused, Errno::EPERM);

/// The paths by which there are no views, and what whoever tries is answered.
pub(super) type NoViews = Vec<(ViewPath, Refused)>;

/// Where the folios of the object are seen to be: first pages, and zones.
pub(super) type Seen = BTreeMap<u64, Option<Zone>>;

#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) side: Visibility,
    /// The byte that all of the page has.
    pub(super) byte: u8,
    /// Punched, and not touched since; or without a folio.
    pub(super) is_hole: bool,
}

/// An object and all that looks at it, as they should be.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) backing: ArenaBacking,
    pub(super) pages: Vec<Page>,
    /// First pages, and zones as far as they are known.
    pub(super) folios: Seen,
    pub(super) views: Vec<ViewPath>,
    pub(super) pins: Vec<(Run, PinMode)>,
    pub(super) exports: Vec<Run>,
    /// Subscribers. Who comes takes the place of who left last, and they are asked in this order.
    pub(super) keepers: Vec<Option<Keeper>>,
    pub(super) vacant: Vec<usize>,
    pub(super) nr_keepers_ever: u64,
    pub(super) slots: BTreeMap<u16, Slot>,
    /// What the guest has, by guest frames.
    pub(super) guest: BTreeMap<u64, Has>,
    pub(super) no_views: NoViews,
    pub(super) mistake: Option<HostMistake>,
}

impl Model {
    pub(super) fn new(
        backing: ArenaBacking,
        nr_pages: u64,
        no_views: NoViews,
        mistake: Option<HostMistake>,
    ) -> Self {
        let page = Page { side: Visibility::Shared, byte: 0, is_hole: true };
        Self {
            backing,
            pages: vec![page; index(nr_pages)],
            folios: Seen::new(),
            views: Vec::new(),
            pins: Vec::new(),
            exports: Vec::new(),
            keepers: Vec::new(),
            vacant: Vec::new(),
            nr_keepers_ever: 0,
            slots: BTreeMap::new(),
            guest: BTreeMap::new(),
            no_views,
            mistake,
        }
    }

    pub(super) fn errs(&self, mistake: HostMistake) -> bool {
        self.mistake == Some(mistake)
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    pub(super) fn nr_views(&self) -> usize {
        self.views.len()
    }

    pub(super) fn step_of(&self, action: &HostAction) -> Option<Step> {
        Step::of(action, self)
    }

    pub(super) fn page(&self, page: u64) -> Option<&Page> {
        self.pages.get(index(page))
    }

    pub(super) fn page_mut(&mut self, page: u64) -> Option<&mut Page> {
        self.pages.get_mut(index(page))
    }

    pub(super) fn is(&self, page: u64, side: Visibility) -> bool {
        self.page(page).is_some_and(|page| page.side == side)
    }

    /// The folio that a page is in, whether it is there or not.
    pub(super) fn folio_at(&self, page: u64) -> Run {
        let start = page / HUGE_PAGES * HUGE_PAGES;
        match start + HUGE_PAGES <= self.nr_pages() {
            true => (start, HUGE_PAGES),
            false => (page, 1),
        }
    }

    pub(super) fn folios_of(&self, range: Run) -> Vec<Run> {
        let mut folios: Vec<Run> = pages_of(range).map(|page| self.folio_at(page)).collect();
        folios.dedup();
        folios
    }

    pub(super) fn is_resident(&self, page: u64) -> bool {
        self.folios.contains_key(&self.folio_at(page).0)
            && self.page(page).is_some_and(|page| !page.is_hole)
    }

    /// Whether a raw pointer into a view finds the page.
    pub(super) fn is_touchable(&self, page: u64) -> bool {
        let folio = self.folio_at(page);
        let together = match self.backing {
            ArenaBacking::MemfdHugetlb2M => folio,
            _ => (page, 1),
        };
        let is_there = |it: &Page| !it.is_hole || self.errs(HostMistake::ViewsShowHoles);
        let is_open = |it: &Page| {
            it.side == Visibility::Shared || self.errs(HostMistake::ViewsShowPrivatePages)
        };
        let mut pages = pages_of(together).filter_map(|page| self.page(page));
        self.folios.contains_key(&folio.0) && pages.all(|it| is_there(it) && is_open(it))
    }

    /// Whether this view shows anything.
    pub(super) fn shows(&self, view: usize) -> bool {
        view == 0 || !self.errs(HostMistake::LaterViewsAreEmpty)
    }

    /// All that holds pages where they are: pins, and what is exported.
    pub(super) fn held(&self) -> impl Iterator<Item = (Run, PinMode)> {
        let exports = match self.errs(HostMistake::ExportsPinNothing) {
            true => &[],
            false => self.exports.as_slice(),
        };
        let exports = exports.iter().map(|&range| (range, PinMode::Counted));
        self.pins.iter().copied().chain(exports)
    }

    pub(super) fn is_held(&self, page: u64) -> bool {
        self.held().any(|(range, _)| pages_of(range).contains(&page))
    }

    fn inside(&self, range: Run) -> Result<(), Refused> {
        match range.0 + range.1 <= self.nr_pages() {
            true => Ok(()),
            false => Err(OUT_OF_RANGE),
        }
    }

    /// Does a step, and says what the library should answer.
    pub(super) fn apply(&mut self, step: &Step) -> Answer {
        self.try_apply(step).unwrap_or_else(Answer::Refused)
    }

    fn try_apply(&mut self, step: &Step) -> Result<Answer, Refused> {
        match *step {
            Step::MapView { path, .. } => self.map_view(path)?,
            Step::DropView { view } => drop(self.views.remove(view)),
            Step::RegainHuge { .. } | Step::Examine => {}
            Step::Convert { ref ranges, to, content } => {
                return self.convert(ranges, to, content, None).map(Answer::Changed);
            }
            Step::Punch { range } => self.punch(range)?,
            Step::Allocate { range } => {
                self.inside(range)?;
                self.populate(range);
            }
            Step::Migrate { range, to } => return self.migrate(range, to),
            Step::Pin { range, mode } => {
                self.pin(range, mode)?;
                self.pins.push((range, mode));
            }
            Step::Unpin { pin } => drop(self.pins.remove(pin)),
            Step::Write { range, byte } => {
                self.inside(range)?;
                self.all_shared(range)?;
                self.populate(range);
                self.fill(range, byte);
            }
            Step::Read { page } => {
                self.inside((page, 1))?;
                self.all_shared((page, 1))?;
                return Ok(Answer::Byte(self.page(page).map_or(0, |page| page.byte)));
            }
            Step::Export { range } => self.export(range)?,
            Step::Return { export } => drop(self.exports.remove(export)),
            Step::Subscribe { terms } => self.subscribe(terms),
            Step::Leave { who } => self.leave(who),
            Step::Change { who, mood, can_be_fenced } => self.change(who, mood, can_be_fenced),
            Step::Dma { who, at, byte } => return Ok(self.dma(who, at, byte)),
            Step::Bind { id, at, range } => self.bind(id, at, range)?,
            Step::Unbind { id } => self.unbind(id)?,
            Step::Guest { at, act, byte } => return Ok(self.guest_acts(at, act, byte)),
            Step::Teardown => self.teardown(),
        }
        Ok(Answer::Done)
    }

    /// However it is made, a view shows the same: whatever is shared, for which it gets memory.
    fn map_view(&mut self, path: ViewPath) -> Result<(), Refused> {
        if let Some(&(_, refused)) = self.no_views.iter().find(|(other, _)| *other == path) {
            return Err(refused);
        }
        let is_shared = |page: &u64| self.is(*page, Visibility::Shared);
        let shared: Vec<u64> = (0..self.nr_pages()).filter(is_shared).collect();
        shared.into_iter().for_each(|page| self.populate((page, 1)));
        self.views.push(path);
        Ok(())
    }

    /// Sees to it that all of the pages have memory.
    pub(super) fn populate(&mut self, range: Run) {
        let mut fresh = Vec::new();
        for folio in self.folios_of(range) {
            if let std::collections::btree_map::Entry::Vacant(vacant) = self.folios.entry(folio.0) {
                vacant.insert(None);
                fresh.extend(pages_of(folio));
            }
        }
        fresh.extend(pages_of(range));
        for &page in &fresh {
            if let Some(page) = self.page_mut(page) {
                page.is_hole = false;
            }
        }
        self.grant(fresh.into_iter());
    }

    fn all_shared(&self, range: Run) -> Result<(), Refused> {
        match pages_of(range).all(|page| self.is(page, Visibility::Shared)) {
            true => Ok(()),
            false => Err(NOT_SHARED),
        }
    }

    pub(super) fn fill(&mut self, range: Run, byte: u8) {
        for page in pages_of(range) {
            if let Some(page) = self.page_mut(page) {
                page.byte = byte;
            }
        }
    }

    fn pin(&self, range: Run, mode: PinMode) -> Result<(), Refused> {
        self.inside(range)?;
        for page in pages_of(range) {
            if self.is(page, Visibility::Private) {
                return Err(NOT_SHARED);
            }
            let modes: Vec<PinMode> = self
                .held()
                .filter(|(held, _)| pages_of(*held).contains(&page))
                .map(|(_, mode)| mode)
                .collect();
            let is_alone = modes.contains(&PinMode::Exclusive);
            if is_alone || mode == PinMode::Exclusive && !modes.is_empty() {
                return Err(BUSY);
            }
        }
        Ok(())
    }

    fn export(&mut self, range: Run) -> Result<(), Refused> {
        self.inside(range)?;
        if self.backing == ArenaBacking::Heap {
            return Err(UNSUPPORTED);
        }
        let askew = range.0 % HUGE_PAGES != 0 || range.1 % HUGE_PAGES != 0;
        if self.backing == ArenaBacking::MemfdHugetlb2M && askew {
            return Err(Refused(ErrorKind::Unaligned, Errno::EINVAL));
        }
        self.pin(range, PinMode::Counted)?;
        self.populate(range);
        self.exports.push(range);
        Ok(())
    }

    /// All pages of the ranges change sides, or none does. The guest waits for an answer about the page at
    /// `asked`, if it does.
    pub(super) fn convert(
        &mut self,
        ranges: &[Run],
        to: Visibility,
        content: ContentPolicy,
        asked: Option<u64>,
    ) -> Result<u64, Refused> {
        ranges.iter().try_for_each(|&range| self.inside(range))?;
        let pages: BTreeSet<u64> = ranges.iter().flat_map(|&range| pages_of(range)).collect();
        if to == Visibility::Private {
            // First of all it moves to where private memory may be.
            let folios: BTreeSet<Run> = pages.iter().map(|&page| self.folio_at(page)).collect();
            for folio in folios {
                self.migrate_folio(folio, Zone::Normal)?;
            }
        }
        let changes: Vec<u64> = pages.into_iter().filter(|&page| !self.is(page, to)).collect();
        if changes.iter().any(|&page| self.is_held(page)) {
            return Err(BUSY);
        }
        if to == Visibility::Shared && !self.views.is_empty() {
            changes.iter().for_each(|&page| self.populate((page, 1)));
        }
        self.take_back(&changes, Why::Conversion)?;
        if let Err(refused) = self.move_to_side(&changes, to, asked) {
            if !self.errs(HostMistake::NothingIsGivenBack) {
                self.grant(changes.into_iter());
            }
            return Err(refused);
        }
        for &page in &changes {
            let Some(page) = self.page_mut(page) else { continue };
            page.side = to;
            if content == ContentPolicy::Zero {
                page.byte = 0;
            }
        }
        let nr_changed = changes.len() as u64;
        self.grant(changes.into_iter());
        Ok(nr_changed)
    }

    fn punch(&mut self, range: Run) -> Result<(), Refused> {
        let end = (range.0 + range.1).min(self.nr_pages());
        if range.0 >= end {
            return Ok(());
        }
        let range = (range.0, end - range.0);
        if pages_of(range).any(|page| self.is_held(page)) {
            return Err(BUSY);
        }
        let pages: Vec<u64> = pages_of(range).collect();
        self.take_back(&pages, Why::Punch)?;
        if pages.iter().any(|&page| self.is_guests(page)) {
            self.grant(pages.into_iter());
            return Err(Refused(ErrorKind::HypervisorRefused, Errno::EBUSY));
        }
        for &page in &pages {
            if let Some(page) = self.page_mut(page) {
                (page.is_hole, page.byte) = (true, 0);
            }
        }
        for folio in self.folios_of(range) {
            let is_hollow = |page| self.page(page).is_some_and(|page| page.is_hole);
            if pages_of(folio).all(|page| is_hollow(page) && !self.is_held(page)) {
                self.folios.remove(&folio.0);
            }
        }
        Ok(())
    }

    fn migrate(&mut self, range: Run, to: Zone) -> Result<Answer, Refused> {
        self.inside(range)?;
        if to == Zone::Cma {
            return Err(UNSUPPORTED);
        }
        let (mut moved, mut refused) = (0, Vec::new());
        for folio in self.folios_of(range) {
            match self.migrate_folio(folio, to) {
                Ok(true) => moved += folio.1,
                Ok(false) => {}
                Err(why) => refused.push((folio, why)),
            }
        }
        Ok(Answer::Moved(moved, refused))
    }

    /// Whether it has moved; it has not if it is not there, or where it should be.
    fn migrate_folio(&mut self, folio: Run, to: Zone) -> Result<bool, Refused> {
        match self.folios.get(&folio.0) {
            Some(&zone) if zone != Some(to) => {}
            _ => return Ok(false),
        }
        let is_held = pages_of(folio).any(|page| self.is_held(page));
        if is_held && !self.errs(HostMistake::PinnedPagesMove) {
            return Err(BUSY);
        }
        let is_private = pages_of(folio).any(|page| self.is(page, Visibility::Private));
        if to != Zone::Normal && is_private {
            return Err(UNSUPPORTED);
        }
        let pages: Vec<u64> = pages_of(folio).collect();
        self.take_back(&pages, Why::Move)?;
        let stays = pages.iter().any(|&page| self.is_guests(page));
        if stays && !self.errs(HostMistake::GuestsPagesMove) {
            self.grant(pages.into_iter());
            return Err(NOT_MOVED);
        }
        self.folios.insert(folio.0, Some(to));
        if self.errs(HostMistake::MovesLoseBytes) {
            self.fill(folio, 0);
        }
        self.grant(pages.into_iter());
        Ok(true)
    }

    /// Learns where new folios have come to lie.
    ///
    /// # Errors
    /// In words, if one is missing, or not where it must be.
    pub(super) fn see(&mut self, seen: &Seen) -> Result<(), String> {
        let has = |seen: &Seen| seen.keys().copied().collect::<Vec<_>>();
        if has(seen) != has(&self.folios) {
            return Err(format!("folios at {:x?}, wanted {:x?}", has(seen), has(&self.folios)));
        }
        for (&start, zone) in seen {
            let folio = self.folio_at(start);
            let is_private = pages_of(folio).any(|page| self.is(page, Visibility::Private));
            if is_private && *zone != Some(Zone::Normal) {
                return Err(format!("the folio at {start:#x} has private pages in {zone:?}"));
            }
            match self.folios.get_mut(&start) {
                Some(known) if known.is_some() && *known != *zone => {
                    return Err(format!("the folio at {start:#x} is in {zone:?}, not {known:?}"));
                }
                Some(known) => *known = *zone,
                None => {}
            }
        }
        Ok(())
    }
}
