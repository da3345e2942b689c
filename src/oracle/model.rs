//! The naive model: every rule once more, with lists and loops and nothing clever.
//!
//! It is one thread, one page at a time, and shares no code with what it judges beyond the names of
//! things. Sums are made anew each time they are asked for.

use std::collections::{BTreeMap, BTreeSet};

use super::action::{Asked, Patience};
use super::answer::{Answer, PunchFacts, Refused, Run, pages_of, refused};
use super::ledger::Ledger;
use super::mistake::Mistake;
use super::object::{Object, Page};
use super::step::{How, Owner, STRANGER, Step, pattern};
use crate::backing::ArenaBacking;
use crate::error::{ErrorKind, Found, Op};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::gmem::{ContentPolicy, PinMode, ViewPath};
use crate::state::Visibility;

/// One pin, on all pages of a range.
#[derive(Clone, Debug)]
pub(super) struct Pin {
    pub(super) object: usize,
    pub(super) range: Run,
    pub(super) name: &'static str,
    pub(super) mode: PinMode,
}

/// The pool, its objects and their pins as they should be.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) ledger: Ledger,
    pub(super) objects: Vec<Object>,
    pub(super) pins: Vec<Pin>,
    pub(super) backing: ArenaBacking,
    /// What every attempt to map a view by these paths is answered, which this host or backing cannot do.
    pub(super) no_views: NoViews,
    pub(super) mistake: Option<Mistake>,
}

/// The paths by which there are no views, and what whoever tries is answered.
pub(super) type NoViews = Vec<(ViewPath, Refused)>;

/// What becomes of a range before anybody looks at an object.
fn born(asked: Asked) -> Result<Run, Refused> {
    let (start, nr_pages) = match asked {
        Asked::Bytes { start, len } if start % 4096 != 0 || len % 4096 != 0 => {
            return Err(refused(Op::Range, ErrorKind::Unaligned));
        }
        Asked::Bytes { start, len } => (start / 4096, len / 4096),
        Asked::Pages { start, nr_pages } => (start, nr_pages),
    };
    if nr_pages == 0 {
        return Err(refused(Op::Range, ErrorKind::EmptyRange));
    }
    // The end in bytes must be a file position, which is a signed number of 64 bits.
    let end = (u128::from(start) + u128::from(nr_pages)) * 4096;
    if end > (1 << 63) - 1 {
        return Err(refused(Op::Range, ErrorKind::Overflow));
    }
    Ok((start, nr_pages))
}

impl Model {
    pub(super) fn new(
        backing: ArenaBacking,
        capacity: u64,
        no_views: NoViews,
        mistake: Option<Mistake>,
    ) -> Self {
        let ledger = Ledger::new(capacity);
        Self { ledger, objects: Vec::new(), pins: Vec::new(), backing, no_views, mistake }
    }

    pub(super) fn errs(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    pub(super) fn object(&self, object: usize) -> Result<&Object, Refused> {
        self.objects.get(object).ok_or_else(|| refused(Op::Range, ErrorKind::NotFound))
    }

    fn object_mut(&mut self, object: usize) -> Result<&mut Object, Refused> {
        self.objects.get_mut(object).ok_or_else(|| refused(Op::Range, ErrorKind::NotFound))
    }

    /// Does a step, and says what the library should answer.
    pub(super) fn apply(&mut self, step: &Step) -> Answer {
        self.try_apply(step).unwrap_or_else(Answer::Refused)
    }

    fn try_apply(&mut self, step: &Step) -> Result<Answer, Refused> {
        match *step {
            Step::Create { bytes, folio, initial } => self.create(bytes, folio, initial),
            Step::Drop { object } => {
                self.object_mut(object)?.has_handle = false;
                self.forget_the_dead();
                Ok(Answer::Done)
            }
            Step::Allocate { object, range } => {
                let range = born(range)?;
                self.object(object)?.inside(Op::Allocate, range)?;
                self.populate(object, range)?;
                Ok(Answer::Done)
            }
            Step::Punch { object, range } => self.punch(object, born(range)?),
            Step::Pin { object, range, owner, mode, .. } => self.pin(object, range, owner, mode),
            Step::Unpin { pin } => {
                if pin < self.pins.len() {
                    self.pins.remove(pin);
                }
                self.forget_the_dead();
                Ok(Answer::Done)
            }
            Step::Convert { object, ref ranges, to, how } => {
                let ranges =
                    ranges.iter().map(|&range| born(range)).collect::<Result<Vec<_>, _>>()?;
                self.convert(object, &ranges, to, how)
            }
            Step::Trim { .. } => Ok(Answer::Done),
            Step::Read { object, at, len, .. } => self.read(object, at, len),
            Step::Write { object, at, len, seed, .. } => {
                self.write(Op::Write, object, at, &pattern(seed, at, len))
            }
            Step::Load { object, at, .. } => self.load(object, at),
            Step::Store { object, at, value, .. } => {
                self.aligned(at)?;
                self.write(Op::Atomic, object, at, &value.to_ne_bytes())
            }
            Step::MapView { object, path, .. } => self.map_view(object, path),
            Step::DropView { object, .. } => {
                let object = self.object_mut(object)?;
                object.nr_views = object.nr_views.saturating_sub(1);
                self.forget_the_dead();
                Ok(Answer::Done)
            }
            Step::Visibility { object, range } => {
                let range = born(range)?;
                self.object(object)?.inside(Op::Range, range)?;
                Ok(Answer::Sides(self.sides(object, range)))
            }
            Step::Snapshot { object, range } => {
                let range = born(range)?;
                self.object(object)?.inside(Op::Range, range)?;
                Ok(Answer::Pages(self.facts(object, range)))
            }
            Step::Owners { object, range } => {
                Ok(Answer::Names(self.owners(object, born(range)?).map(String::from).collect()))
            }
            Step::Examine => Ok(Answer::Done),
        }
    }

    fn create(
        &mut self,
        bytes: u64,
        folio: FolioSize,
        initial: Visibility,
    ) -> Result<Answer, Refused> {
        let op = Op::CreateObject;
        let invalid = bytes == 0 || bytes % 4096 != 0 || bytes > i64::MAX.unsigned_abs();
        let whole_only = self.backing == ArenaBacking::MemfdHugetlb2M;
        let has_small = folio == FolioSize::Base || bytes % (HUGE_PAGES * 4096) != 0;
        if invalid || (whole_only && has_small) {
            return Err(refused(op, ErrorKind::InvalidSize));
        }
        let nr_pages = bytes / 4096;
        let nr_huge = if folio == FolioSize::Huge2M { nr_pages / HUGE_PAGES } else { 0 };
        let (promised, promised_huge) =
            if self.errs(Mistake::ForgetsPromises) { (0, 0) } else { self.promised() };
        let free_huge = self.ledger.nr_free_huge().saturating_sub(promised_huge);
        let free = self.ledger.nr_free().saturating_sub(promised);
        if nr_huge > free_huge || nr_pages > free {
            return Err(refused(op, ErrorKind::Exhausted));
        }
        let home = self.ledger.find_home(nr_pages);
        self.objects.push(Object {
            home,
            has_handle: true,
            is_gone: false,
            nr_views: 0,
            folio,
            pages: (0..nr_pages)
                .map(|_| Page { visibility: initial, bytes: None, is_hole: false })
                .collect(),
            folios: BTreeMap::new(),
            names: Vec::new(),
        });
        Ok(Answer::Done)
    }

    /// What objects may still take: pages in all, and whole huge folios.
    pub(super) fn promised(&self) -> (u64, u64) {
        let mut promised = (0, 0);
        for object in self.objects.iter().filter(|object| !object.is_gone) {
            for folio in object.folios_of((0, object.nr_pages())) {
                if !object.folios.contains_key(&folio) {
                    promised.0 += folio.1;
                    promised.1 += u64::from(folio.1 == HUGE_PAGES);
                }
            }
        }
        promised
    }

    fn populate(&mut self, object: usize, range: Run) -> Result<(), Refused> {
        let mut promised = self.promised();
        let (objects, ledger) = (&mut self.objects, &mut self.ledger);
        let Some(object) = objects.get_mut(object) else { return Ok(()) };
        for folio in object.folios_of(range) {
            if object.folios.contains_key(&folio) {
                continue;
            }
            let size = if folio.1 == 1 { FolioSize::Base } else { FolioSize::Huge2M };
            promised.0 = promised.0.saturating_sub(folio.1);
            promised.1 = promised.1.saturating_sub(u64::from(size == FolioSize::Huge2M));
            let home = object.home.map(|home| home + folio.0);
            let frame = ledger.take(size, home, promised);
            // Never: it was promised.
            let frame = frame.ok_or_else(|| refused(Op::Allocate, ErrorKind::Exhausted))?;
            object.folios.insert(folio, frame);
            pages_of(folio).for_each(|page| object.set_hole(page, false));
        }
        pages_of(range).for_each(|page| object.set_hole(page, false));
        Ok(())
    }

    /// Gives back the memory of objects that nobody refers to any more.
    fn forget_the_dead(&mut self) {
        if self.errs(Mistake::LeaksDroppedObjects) {
            return;
        }
        for (at, object) in self.objects.iter_mut().enumerate() {
            let pinned = self.pins.iter().any(|pin| pin.object == at);
            if object.has_handle || object.nr_views > 0 || pinned {
                continue;
            }
            object.is_gone = true;
            if let Some(home) = object.home.take() {
                self.ledger.leave_home(home);
            }
            for ((_, nr_pages), frame) in std::mem::take(&mut object.folios) {
                self.ledger.give_back(frame, nr_pages);
            }
        }
    }

    fn punch(&mut self, object: usize, range: Run) -> Result<Answer, Refused> {
        let nr_pages = self.object(object)?.nr_pages();
        let end = (range.0 + range.1).min(nr_pages);
        if range.0 >= end {
            return Ok(Answer::Punched(PunchFacts::default()));
        }
        let range = (range.0, end - range.0);
        if !self.errs(Mistake::PunchesPinnedPages) {
            self.first_held(Op::PunchHole, object, range)?;
        }
        let mut facts = PunchFacts::default();
        for folio in self.object(object)?.folios_of(range) {
            self.punch_folio(object, folio, range, &mut facts)?;
        }
        Ok(Answer::Punched(facts))
    }

    fn punch_folio(
        &mut self,
        object: usize,
        folio: Run,
        range: Run,
        facts: &mut PunchFacts,
    ) -> Result<(), Refused> {
        let (mistake, why_kept) = (self.mistake, self.why_kept());
        let inside = |page: &u64| pages_of(range).contains(page);
        let whole = pages_of(folio).all(|page| inside(&page));
        let is_pinned = |page: u64| self.pins_on(object, (page, 1)).next().is_some();
        let pinned = pages_of(folio).any(|page| !inside(&page) && is_pinned(page));
        let ledger = &mut self.ledger;
        let Some(object) = self.objects.get_mut(object) else { return Ok(()) };
        let mut punched = 0;
        for page in pages_of(folio).filter(inside) {
            punched += u64::from(object.is_resident(page));
            object.set_hole(page, true);
            let Some(page) = object.page_mut(page) else { continue };
            if whole || mistake != Some(Mistake::KeepsBytesOfPartialPunch) {
                page.bytes = None;
            }
            if mistake == Some(Mistake::PunchChangesVisibility) {
                page.visibility = Visibility::Private;
            }
        }
        let all = pages_of(folio).all(|page| object.is_hole(page));
        let stays = match mistake {
            Some(Mistake::KeepsPunchedFolios) => true,
            Some(Mistake::KeepsFoliosOfHoles) => !whole,
            _ => pinned,
        };
        if let Some(frame) = object.folios.get(&folio).copied().filter(|_| all && !stays) {
            object.folios.remove(&folio);
            ledger.give_back(frame, folio.1);
            facts.returned += folio.1;
        } else if why_kept.is_none() {
            facts.released += punched;
        } else if punched > 0 {
            facts.kept += punched;
            facts.why_kept = why_kept;
        }
        Ok(())
    }

    fn pin(
        &mut self,
        object: usize,
        range: Asked,
        owner: Owner,
        mode: PinMode,
    ) -> Result<Answer, Refused> {
        // The tag is fetched first, whatever comes of the pin.
        let name = match owner {
            Owner::Named(name) => name,
            Owner::TagOf(_) => STRANGER,
        };
        let of = if let Owner::TagOf(other) = owner { other } else { object };
        let names = &mut self.object_mut(of)?.names;
        if !names.contains(&name) {
            names.push(name);
        }
        let range = born(range)?;
        let op = match mode {
            PinMode::Counted | PinMode::LongTerm => Op::Pin,
            PinMode::Exclusive => Op::PinExclusive,
        };
        self.object(object)?.inside(op, range)?;
        if of != object {
            return Err(refused(op, ErrorKind::NotFound).on(range));
        }
        if mode == PinMode::LongTerm {
            return Err(refused(op, ErrorKind::Convertible).on(range));
        }
        for page in pages_of(range) {
            if self.object(object)?.is(page, Visibility::Private)
                && !self.errs(Mistake::PinsPrivate)
            {
                return Err(refused(op, ErrorKind::NotShared).on(range).at(page, Found::Private));
            }
            let Some(found) = self.held(object, page) else { continue };
            let alone = mode == PinMode::Exclusive && !self.errs(Mistake::SharesExclusivePins);
            if alone || matches!(found, Found::ExclusivelyPinned { .. }) {
                return Err(refused(op, ErrorKind::Busy).on(range).at(page, found));
            }
        }
        self.pins.push(Pin { object, range, name, mode });
        Ok(Answer::Done)
    }

    pub(super) fn pins_on(&self, object: usize, range: Run) -> impl Iterator<Item = &Pin> {
        let meets = move |pin: &Run| pin.0 < range.0 + range.1 && range.0 < pin.0 + pin.1;
        self.pins.iter().filter(move |pin| pin.object == object && meets(&pin.range))
    }

    /// Who holds pins on the range, each once, in the order in which they were registered.
    pub(super) fn owners(&self, object: usize, range: Run) -> impl Iterator<Item = &'static str> {
        let names = self.objects.get(object).map(|object| object.names.as_slice());
        let most = if self.errs(Mistake::NamesOneOwner) { 1 } else { usize::MAX };
        names
            .unwrap_or_default()
            .iter()
            .copied()
            .filter(move |name| self.pins_on(object, range).any(|pin| pin.name == *name))
            .take(most)
    }

    /// What stands in the way of somebody who needs the page for himself.
    fn held(&self, object: usize, page: u64) -> Option<Found> {
        let pins: Vec<&Pin> = self.pins_on(object, (page, 1)).collect();
        let owners = self.owners(object, (page, 1)).map(Into::into).collect();
        if pins.iter().any(|pin| pin.mode == PinMode::Exclusive) {
            return Some(Found::ExclusivelyPinned { owners });
        }
        let pins = u32::try_from(pins.len()).ok().filter(|&pins| pins > 0)?;
        Some(Found::Pinned { pins, owners })
    }

    /// Refuses if one of the pages is held.
    fn first_held(&self, op: Op, object: usize, range: Run) -> Result<(), Refused> {
        let held = |page| self.held(object, page).map(|found| (page, found));
        let mut culprits: Vec<_> = pages_of(range).filter_map(held).collect();
        if self.errs(Mistake::ReportsTheLastCulprit) {
            culprits.reverse();
        }
        match culprits.into_iter().next() {
            Some((page, found)) => Err(refused(op, ErrorKind::Busy).on(range).at(page, found)),
            None => Ok(()),
        }
    }

    fn convert(
        &mut self,
        object: usize,
        ranges: &[Run],
        to: Visibility,
        how: How,
    ) -> Result<Answer, Refused> {
        let How { content, most_culprits, patience } = how;
        let op = match to {
            Visibility::Private => Op::ConvertToPrivate,
            Visibility::Shared => Op::ConvertToShared,
        };
        let from = self.object(object)?;
        ranges.iter().try_for_each(|&range| from.inside(op, range))?;
        let pages: BTreeSet<u64> = ranges.iter().flat_map(|&range| pages_of(range)).collect();
        let there_too = self.errs(Mistake::RefusesPinsOfPagesAlreadyThere);
        let looks_at = |page: u64| match ranges.first() {
            Some(&first) if self.errs(Mistake::LooksAtOneRange) => pages_of(first).contains(&page),
            _ => true,
        };
        let matters = |page: &u64| looks_at(*page) && (there_too || !from.is(*page, to));
        let held = |page| self.held(object, page).map(|found| (page, found));
        let mut culprits: Vec<_> = pages.iter().copied().filter(matters).filter_map(held).collect();
        if self.errs(Mistake::ReportsTheLastCulprit) {
            culprits.reverse();
        }
        culprits.truncate(match self.mistake {
            Some(Mistake::ConvertsPinnedPages) => 0,
            Some(Mistake::NamesOneCulprit) => 1,
            _ => usize::from(most_culprits),
        });
        if let Some(&(first, _)) = culprits.first() {
            let kind = match patience {
                _ if self.errs(Mistake::NeverWaits) => ErrorKind::Busy,
                Patience::None => ErrorKind::Busy,
                Patience::Expired => ErrorKind::TimedOut,
                Patience::Cancelled => ErrorKind::Cancelled,
            };
            // Ranges that overlap or touch are one.
            let start = (0..=first).rev().take_while(|page| pages.contains(page)).last();
            let start = start.unwrap_or(first);
            let nr_pages = (start..).take_while(|page| pages.contains(page)).count() as u64;
            let refused = refused(op, kind).on((start, nr_pages));
            return Err(culprits.into_iter().fold(refused, |it, (page, found)| it.at(page, found)));
        }
        // A view maps what becomes shared, so there has to be something.
        if to == Visibility::Shared && self.nr_views(object) > 0 {
            for &page in &pages {
                if !self.object(object)?.is(page, to) {
                    self.populate(object, (page, 1))?;
                }
            }
        }
        let mistake = self.mistake;
        let object = self.object_mut(object)?;
        let mut changed = 0;
        for page in pages {
            let Some(page) = object.page_mut(page) else { continue };
            let changes = page.visibility != to;
            changed += u64::from(changes);
            page.visibility = to;
            let zero = match mistake {
                Some(Mistake::LosesBytes) => changes,
                Some(Mistake::ForgetsToZero) => false,
                Some(Mistake::ZeroesPagesAlreadyThere) => content == ContentPolicy::Zero,
                _ => changes && content == ContentPolicy::Zero,
            };
            if zero {
                page.bytes = None;
            }
        }
        Ok(Answer::Changed(changed))
    }

    fn read(&mut self, object: usize, at: u64, len: u64) -> Result<Answer, Refused> {
        let Some(pages) = self.object(object)?.pages_of_bytes(Op::Read, at, len)? else {
            return Ok(Answer::Bytes(Vec::new()));
        };
        if !self.errs(Mistake::ReadsPrivate) {
            self.all_shared(Op::Read, object, pages)?;
        }
        if self.errs(Mistake::ReadAllocates) {
            self.populate(object, pages)?;
        }
        let object = self.object(object)?;
        Ok(Answer::Bytes((at..at + len).map(|at| object.byte(at)).collect()))
    }

    fn write(&mut self, op: Op, object: usize, at: u64, bytes: &[u8]) -> Result<Answer, Refused> {
        let len = bytes.len() as u64;
        let Some(pages) = self.object(object)?.pages_of_bytes(op, at, len)? else {
            return Ok(Answer::Done);
        };
        self.all_shared(op, object, pages)?;
        if !self.errs(Mistake::WriteTakesOnePage) {
            self.populate(object, pages)?;
        }
        let object = self.object_mut(object)?;
        (at..).zip(bytes).for_each(|(at, &byte)| object.set_byte(at, byte));
        Ok(Answer::Done)
    }

    fn aligned(&self, at: u64) -> Result<(), Refused> {
        if at % 8 == 0 { Ok(()) } else { Err(refused(Op::Atomic, ErrorKind::Unaligned)) }
    }

    /// An atomic needs memory to be atomic on, so a load populates too.
    fn load(&mut self, object: usize, at: u64) -> Result<Answer, Refused> {
        self.aligned(at)?;
        if let Some(pages) = self.object(object)?.pages_of_bytes(Op::Atomic, at, 8)? {
            self.all_shared(Op::Atomic, object, pages)?;
            self.populate(object, pages)?;
        }
        let object = self.object(object)?;
        let mut word = [0; 8];
        (at..).zip(&mut word).for_each(|(at, byte)| *byte = object.byte(at));
        Ok(Answer::Word(u64::from_ne_bytes(word)))
    }

    fn all_shared(&self, op: Op, object: usize, pages: Run) -> Result<(), Refused> {
        let object = self.object(object)?;
        match pages_of(pages).find(|&page| !object.is(page, Visibility::Shared)) {
            Some(page) => Err(refused(op, ErrorKind::NotShared).on(pages).at(page, Found::Private)),
            None => Ok(()),
        }
    }

    /// However it is made, a view shows the same.
    fn map_view(&mut self, object: usize, path: ViewPath) -> Result<Answer, Refused> {
        if let Some((_, refused)) = self.no_views.iter().find(|(refused, _)| *refused == path) {
            return Err(refused.clone());
        }
        let this = self.object(object)?;
        let shared: Vec<u64> =
            (0..this.nr_pages()).filter(|&page| this.is(page, Visibility::Shared)).collect();
        for page in shared {
            self.populate(object, (page, 1))?;
        }
        self.object_mut(object)?.nr_views += 1;
        Ok(Answer::Done)
    }
}
