//! What a call does to a pool, and what it answers.

use std::collections::BTreeMap;

use super::frames::{Count, Frame, Part, Use};
use super::mistake::PoolMistake;
use super::object::{Charges, Object, Page, Run};
use crate::error::ErrorKind;
use crate::folio::{PrivatePlacement, Zone};
use crate::geometry::FolioSize;

/// What a call came to, or what is wrong with that.
pub(super) type Verdict = Result<(), String>;

/// How a call was answered.
pub(super) type Outcome = Result<(), ErrorKind>;

/// Where the folios of an object are seen to be: first pages, and first frames.
pub(super) type Seen = BTreeMap<u64, u64>;

/// An object, and a page of it.
pub(super) type Held = (usize, u64);

/// Where a folio comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A part that the object draws from, and its promise if it has one.
    Own(usize),
    /// A part in which nothing was promised to it.
    Beside(usize),
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) parts: Vec<Part>,
    pub(super) objects: Vec<Object>,
    pub(super) accounts: Vec<Charges>,
    pub(super) has_scrubber: bool,
    /// No more than this waits for a scrub.
    pub(super) most_dirty: u64,
    /// What an account's peak may have become at most in a call that was undone.
    pub(super) most_peak: BTreeMap<usize, u64>,
    pub(super) mistake: Option<PoolMistake>,
}

/// What an object is to be.
#[derive(Clone, Debug)]
pub(super) struct Birth<'a> {
    pub(super) nr: u64,
    pub(super) nr_pages: u64,
    pub(super) folio: FolioSize,
    pub(super) zones: &'a [Zone],
    pub(super) placement: PrivatePlacement,
    pub(super) is_promised: bool,
    pub(super) page: Page,
    pub(super) account: Option<usize>,
}

/// Fails unless a call was answered as it must be.
pub(super) fn must_be(wanted: Outcome, outcome: Outcome) -> Verdict {
    match wanted == outcome {
        true => Ok(()),
        false => Err(format!("the answer should be {wanted:?}, and is {outcome:?}")),
    }
}

impl Model {
    pub(super) fn makes(&self, mistake: PoolMistake) -> bool {
        self.mistake == Some(mistake)
    }

    pub(super) fn part_of(&self, pfn: u64) -> Option<usize> {
        self.parts.iter().position(|part| part.covers(pfn))
    }

    pub(super) fn zone_of(&self, pfn: u64) -> Option<Zone> {
        Some(self.parts.get(self.part_of(pfn)?)?.zone)
    }

    fn has_failures(&self) -> bool {
        self.parts.iter().any(|part| part.frames.iter().any(|frame| frame.has_failed))
    }

    fn object(&self, at: usize) -> Result<&Object, String> {
        self.objects.get(at).ok_or_else(|| String::from("no such object in the model"))
    }

    pub(super) fn object_mut(&mut self, at: usize) -> Result<&mut Object, String> {
        self.objects.get_mut(at).ok_or_else(|| String::from("no such object in the model"))
    }

    pub(super) fn create(&mut self, birth: &Birth<'_>, outcome: Outcome) -> Verdict {
        let floats = birth.placement == PrivatePlacement::MoveToNormal
            && birth.zones.iter().any(|&zone| zone != Zone::Normal);
        let mut zones: Vec<Zone> = Vec::new();
        for &zone in birth.zones.iter().chain(floats.then_some(&Zone::Normal)) {
            if !zones.contains(&zone) {
                zones.push(zone);
            }
        }
        let of_zone = |zone: Zone| {
            let parts = self.parts.iter().enumerate();
            parts.filter(move |(_, part)| part.zone == zone).map(|(nr, _)| nr)
        };
        let (own, beside): (Vec<Zone>, Vec<Zone>) =
            zones.iter().partition(|&&zone| !floats || zone == Zone::Normal);
        let mut left: Vec<(usize, Count)> =
            own.into_iter().flat_map(of_zone).map(|nr| (nr, Count::default())).collect();
        let beside: Vec<usize> = beside.into_iter().flat_map(of_zone).collect();

        let before = self.parts.clone();
        let mut wanted = Ok(());
        if birth.is_promised {
            let mut missing = Object::shape(birth.nr_pages, birth.folio);
            for size in [512, 1] {
                for (nr, of_part) in &mut left {
                    let Some(part) = self.parts.get_mut(*nr) else { continue };
                    let granted = part.promisable(size, missing.of(size));
                    *part.promised.of_mut(size) += granted;
                    *of_part.of_mut(size) += granted;
                    *missing.of_mut(size) -= granted;
                }
            }
            let charges = birth.account.and_then(|account| self.accounts.get_mut(account));
            if missing != Count::default() {
                wanted = Err(ErrorKind::Exhausted);
            } else if let Some(charges) = charges {
                match charges.allows(birth.nr_pages)
                    || self.mistake == Some(PoolMistake::IgnoresLimits)
                {
                    true => charges.charge(birth.nr_pages),
                    false => wanted = Err(ErrorKind::LimitReached),
                }
            }
        }
        must_be(wanted, outcome)?;
        if wanted.is_err() {
            self.parts = before;
            return Ok(());
        }
        let pages = usize::try_from(birth.nr_pages).map_err(|error| error.to_string())?;
        self.objects.push(Object {
            nr: birth.nr,
            folio: birth.folio,
            zones: birth.zones.to_vec(),
            placement: birth.placement,
            is_promised: birth.is_promised,
            account: birth.account,
            charged: if birth.is_promised { birth.nr_pages } else { 0 },
            pages: vec![birth.page; pages],
            folios: BTreeMap::new(),
            left,
            beside,
        });
        Ok(())
    }

    /// Where a folio for these pages has to come from, or why there is none.
    fn source(&self, object: &Object, slot: Run) -> Result<Source, ErrorKind> {
        let charges = object.account.and_then(|account| self.accounts.get(account));
        let is_allowed = object.is_promised || charges.is_none_or(|it| it.allows(slot.1));
        if !is_allowed && !self.makes(PoolMistake::IgnoresLimits) {
            return Err(ErrorKind::LimitReached);
        }
        let is_shared = !object.is_particular() || object.is_shared(slot);
        let has_room = |nr: &usize| {
            self.parts.get(*nr).is_some_and(|part| part.can_spare(slot.1, part.promised))
        };
        if let Some(&nr) = object.beside.iter().filter(|_| is_shared).find(|nr| has_room(nr)) {
            return Ok(Source::Beside(nr));
        }
        self.own_source(object, slot, is_shared)
    }

    /// The same, of the parts that the object draws from.
    pub(super) fn own_source(
        &self,
        object: &Object,
        slot: Run,
        anywhere: bool,
    ) -> Result<Source, ErrorKind> {
        let mut found = Err(ErrorKind::Exhausted);
        let mut is_elsewhere = false;
        for &(nr, left) in &object.left {
            let Some(part) = self.parts.get(nr) else { continue };
            let mut promised = part.promised;
            if object.is_promised {
                if left.of(slot.1) == 0 {
                    continue;
                }
                *promised.of_mut(slot.1) -= 1;
                if !part.free().keeps(part.promised) {
                    // Memory failed that was promised: who comes first is served.
                    promised = Count::default();
                }
            } else if self.makes(PoolMistake::TakesWhatIsPromised) {
                promised = Count::default();
            }
            if !anywhere && part.zone != Zone::Normal && !self.makes(PoolMistake::PrivateAnywhere) {
                is_elsewhere = true;
                continue;
            }
            if part.can_spare(slot.1, promised) {
                found = Ok(Source::Own(nr));
                if !self.makes(PoolMistake::TakesTheLastPart) {
                    break;
                }
            }
        }
        found.map_err(|kind| if is_elsewhere { ErrorKind::Unsupported } else { kind })
    }

    /// Notes that a folio was put into a frame, which must be one of `source`.
    pub(super) fn put(&mut self, at: usize, slot: Run, pfn: u64, source: Source) -> Verdict {
        let nr = match source {
            Source::Own(nr) | Source::Beside(nr) => nr,
        };
        let object = self.objects.get_mut(at).ok_or("no such object")?;
        let part = self.parts.get_mut(nr).ok_or("no such part")?;
        if !part.covers(pfn) {
            return Err(format!("pages {slot:?} came to frame {pfn}, not to part {nr}"));
        }
        if (pfn - part.start) % slot.1 != 0 || !part.all_free(pfn, slot.1) {
            return Err(format!(
                "pages {slot:?} came to frame {pfn}, which is not free or not aligned"
            ));
        }
        part.set(pfn, slot.1, Use::Of(object.nr));
        if object.is_promised && matches!(source, Source::Own(_)) {
            *part.promised.of_mut(slot.1) -= 1;
            let of_part = object.left.iter_mut().find(|(other, _)| *other == nr);
            *of_part.ok_or("a part without a promise")?.1.of_mut(slot.1) -= 1;
        }
        object.folios.insert(slot.0, pfn);
        Ok(())
    }

    /// Notes that a frame does not hold a folio of an object any more, and what is promised for it.
    pub(super) fn take_away(&mut self, at: usize, slot: Run, pfn: u64, again: bool) -> Verdict {
        let nr = self.part_of(pfn).ok_or("a folio in no part")?;
        let (reuses, once) =
            (self.makes(PoolMistake::ReusesFailedFrames), self.makes(PoolMistake::PromisesOnce));
        let object = self.objects.get_mut(at).ok_or("no such object")?;
        let part = self.parts.get_mut(nr).ok_or("no such part")?;
        let is_whole = !part.has_failed(pfn, slot.1);
        part.set(pfn, slot.1, Use::Free);
        if reuses {
            part.run_mut(pfn, slot.1).iter_mut().for_each(|frame| frame.has_failed = false);
        }
        if slot.1 > 1 && self.has_scrubber && is_whole {
            self.most_dirty += slot.1;
        }
        if again && is_whole && object.is_promised && !once {
            if !object.left.iter().any(|&(other, _)| other == nr) {
                object.left.push((nr, Count::default()));
            }
            *part.promised.of_mut(slot.1) += 1;
            let of_part = object.left.iter_mut().find(|(other, _)| *other == nr);
            *of_part.ok_or("a part without a promise")?.1.of_mut(slot.1) += 1;
        }
        Ok(())
    }

    /// A folio goes back to the pool with all that it holds.
    pub(super) fn give_back(&mut self, at: usize, slot: Run) -> Verdict {
        let object = self.object_mut(at)?;
        let Some(pfn) = object.folios.remove(&slot.0) else { return Ok(()) };
        let floats = !object.beside.is_empty();
        for page in object.pages_mut(slot) {
            (page.byte, page.is_hole) = (0, false);
        }
        let again = !floats || self.zone_of(pfn) == Some(Zone::Normal);
        self.take_away(at, slot, pfn, again)?;
        self.count_off(at, slot)
    }

    fn count_off(&mut self, at: usize, slot: Run) -> Verdict {
        let only_promises = self.makes(PoolMistake::ChargesPromisesOnly);
        let object = self.objects.get_mut(at).ok_or("no such object")?;
        let charges = object.account.and_then(|account| self.accounts.get_mut(account));
        let Some(charges) = charges else { return Ok(()) };
        charges.used -= slot.1;
        if !object.is_promised && !only_promises {
            object.charged -= slot.1;
            charges.charged -= slot.1;
        }
        Ok(())
    }

    fn count_on(&mut self, at: usize, slot: Run) -> Verdict {
        let only_promises = self.makes(PoolMistake::ChargesPromisesOnly);
        let object = self.objects.get_mut(at).ok_or("no such object")?;
        let charges = object.account.and_then(|account| self.accounts.get_mut(account));
        let Some(charges) = charges else { return Ok(()) };
        charges.used += slot.1;
        if !object.is_promised && !only_promises {
            object.charged += slot.1;
            charges.charge(slot.1);
        }
        Ok(())
    }

    /// Every page of the range gets its folio and is no hole, or nothing happens.
    pub(super) fn populate(
        &mut self,
        at: usize,
        range: Run,
        outcome: Outcome,
        seen: &Seen,
        is_made_to_fail: bool,
    ) -> Verdict {
        let object = self.object(at)?;
        let slots = object.slots(range);
        let absent: Vec<Run> = slots.into_iter().filter(|it| !object.has_folio(it.0)).collect();
        if let Err(kind) = outcome {
            self.may_fail(at, &absent, kind, is_made_to_fail)?;
            if self.makes(PoolMistake::KeepsHalfAnAllocation) && absent.len() > 1 {
                self.object_mut(at)?.folios.insert(range.0, 0);
            }
            return Ok(());
        }
        if is_made_to_fail {
            return Err(String::from("it was made to fail, and has not"));
        }
        for slot in absent {
            let object = self.object(at)?;
            let source = self.source(object, slot).map_err(|kind| {
                format!("pages {slot:?} got a folio, where they should have got {kind:?}")
            })?;
            let &pfn = seen.get(&slot.0).ok_or_else(|| format!("pages {slot:?} got no folio"))?;
            self.put(at, slot, pfn, source)?;
            self.count_on(at, slot)?;
            if self.makes(PoolMistake::FreshPagesAreDirty) {
                self.object_mut(at)?.pages_mut((slot.0, 1)).for_each(|page| page.byte = 1);
            }
        }
        self.object_mut(at)?.pages_mut(range).for_each(|page| page.is_hole = false);
        Ok(())
    }

    /// Whether it may be that some of these folios cannot be had, and that all are refused.
    fn may_fail(
        &mut self,
        at: usize,
        absent: &[Run],
        kind: ErrorKind,
        is_made_to_fail: bool,
    ) -> Verdict {
        let object = self.object(at)?;
        let pages: u64 = absent.iter().map(|slot| slot.1).sum();
        let charges = object.account.and_then(|account| self.accounts.get(account));
        let most = charges.map(|charges| charges.charged + pages).filter(|_| !object.is_promised);
        if let (Some(most), Some(account)) = (most, object.account) {
            if absent.len() > 1 {
                self.most_peak.insert(account, most);
            }
        }
        let object = self.object(at)?;
        if is_made_to_fail {
            return must_be(Err(ErrorKind::Exhausted), Err(kind));
        }
        if let [slot] = absent {
            return must_be(self.source(object, *slot).map(|_| ()), Err(kind));
        }
        let limited = charges_refuse(self, object, pages);
        let is_reason = match kind {
            ErrorKind::LimitReached => limited,
            ErrorKind::Unsupported => {
                object.is_particular() && !absent.iter().all(|&slot| object.is_shared(slot))
            }
            ErrorKind::Exhausted if object.is_promised => self.has_failures(),
            ErrorKind::Exhausted => {
                // At the worst, each folio is cut out of a whole block of its own.
                let has_room = |&(nr, _): &(usize, Count)| {
                    let nr_blocks = absent.len() as u64;
                    let part = self.parts.get(nr);
                    part.is_some_and(|part| part.promisable(512, nr_blocks) == nr_blocks)
                };
                !object.left.iter().any(has_room)
            }
            _ => false,
        };
        match is_reason {
            true => Ok(()),
            false => Err(format!("no reason to refuse {} folios: {kind:?}", absent.len())),
        }
    }

    /// A range is punched.
    pub(super) fn punch(&mut self, at: usize, range: Run, outcome: Outcome) -> Verdict {
        let object = self.object(at)?;
        let refusal = object.ask(range, |page| self.refuses_change(page));
        must_be(refusal, outcome)?;
        if refusal.is_err() {
            return Ok(());
        }
        for slot in object.slots(range) {
            let object = self.object(at)?;
            if !object.has_folio(slot.0) {
                continue;
            }
            let inside = |page: u64| (range.0..range.0 + range.1).contains(&page);
            let stays = |page: u64| {
                let is_hole = |page: &Page| page.is_hole && page.refuses_change().is_none();
                !inside(page) && !object.page(page).is_some_and(is_hole)
            };
            if !(slot.0..slot.0 + slot.1).any(stays) {
                self.give_back(at, slot)?;
                continue;
            }
            for page in (slot.0..slot.0 + slot.1).filter(|&page| inside(page)) {
                for page in self.object_mut(at)?.pages_mut((page, 1)) {
                    page.is_hole = true;
                    page.byte = 0;
                }
            }
        }
        Ok(())
    }

    /// An object goes.
    pub(super) fn leave(&mut self, at: usize) -> Verdict {
        let slots: Vec<u64> = self.object(at)?.folios.keys().copied().collect();
        for page in slots {
            let object = self.object(at)?;
            let slot = object.slot_at(page);
            let is_pinned = object.any(slot, |page| page.is_pinned);
            if is_pinned && !self.makes(PoolMistake::ReusesPinnedFolios) {
                let Some(pfn) = self.object_mut(at)?.folios.remove(&page) else { continue };
                let nr = self.part_of(pfn).ok_or("a folio in no part")?;
                self.parts.get_mut(nr).ok_or("no such part")?.set(pfn, slot.1, Use::Quarantined);
                let account = self.object(at)?.account;
                if let Some(charges) = account.and_then(|it| self.accounts.get_mut(it)) {
                    charges.used -= slot.1;
                }
            } else if !self.makes(PoolMistake::LeaksDroppedObjects) {
                self.give_back(at, slot)?;
            }
        }
        let object = self.objects.remove(at);
        for (nr, left) in object.left {
            let Some(part) = self.parts.get_mut(nr) else { continue };
            part.promised.huge -= left.huge;
            part.promised.base -= left.base;
        }
        let charges = object.account.and_then(|account| self.accounts.get_mut(account));
        if let (Some(charges), false) =
            (charges, self.mistake == Some(PoolMistake::ChargesDroppedObjects))
        {
            charges.charged -= object.charged;
        }
        Ok(())
    }

    /// The object that has a frame, and which page of it.
    pub(super) fn holder(&self, pfn: u64) -> Option<Held> {
        let held = |object: &Object| {
            let mut folios = object.folios.iter();
            folios.find_map(|(&page, &first)| {
                let at = pfn.checked_sub(first)?;
                (at < object.slot_at(page).1).then_some(page + at)
            })
        };
        let mut objects = self.objects.iter().enumerate();
        objects.find_map(|(at, object)| Some((at, held(object)?)))
    }

    /// What a page has against a change.
    pub(super) fn refuses_change(&self, page: &Page) -> Option<ErrorKind> {
        let refusal = page.refuses_change();
        refusal.filter(|&kind| kind != ErrorKind::Busy || !self.makes(PoolMistake::IgnoresPins))
    }

    /// Whether what an object has in a frame is pinned.
    pub(super) fn is_pinned(&self, holder: Option<Held>) -> bool {
        let page = holder.and_then(|(at, page)| self.objects.get(at)?.page(page));
        page.is_some_and(|page| page.is_pinned)
    }

    /// A frame is reported to have failed. The page in it is lost, and nothing beside it.
    pub(super) fn poison(&mut self, pfn: u64, holder: Option<Held>, outcome: Outcome) -> Verdict {
        let forgets = self.makes(PoolMistake::ForgetsFailedPages);
        if let Some((at, page)) = holder.filter(|_| !forgets) {
            let pages = self.object_mut(at)?.pages_mut((page, 1));
            pages.for_each(|page| page.has_failed = true);
        }
        let nr = self.part_of(pfn);
        must_be(nr.map(|_| ()).ok_or(ErrorKind::OutOfRange), outcome)?;
        if let Some(part) = nr.and_then(|nr| self.parts.get_mut(nr)) {
            part.run_mut(pfn, 1).iter_mut().for_each(|frame: &mut Frame| frame.has_failed = true);
        }
        Ok(())
    }
}

fn charges_refuse(model: &Model, object: &Object, pages: u64) -> bool {
    let charges = object.account.and_then(|account| model.accounts.get(account));
    !object.is_promised && charges.is_some_and(|charges| !charges.allows(pages))
}
