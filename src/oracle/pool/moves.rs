//! The calls that move folios: each to where the pool has found room, never out of the zone that was
//! meant.

use super::frames::{Part, Use};
use super::mistake::PoolMistake;
use super::model::{Model, Outcome, Seen, Source, Verdict, must_be};
use super::object::{Page, Run};
use crate::error::ErrorKind;
use crate::folio::{PrivatePlacement, Zone};
use crate::geometry::{FolioSize, HUGE_PAGES};
use crate::state::Visibility;

/// What is to become of one folio.
enum Way {
    Stays,
    Goes(u64, Source),
}

impl Model {
    /// Whether a folio has to move to a zone, and to which part.
    fn way(&self, at: usize, slot: Run, to: Zone) -> Result<Way, ErrorKind> {
        let Some(object) = self.objects.get(at) else { return Ok(Way::Stays) };
        let Some(&old) = object.folios.get(&slot.0) else { return Ok(Way::Stays) };
        if self.zone_of(old) == Some(to) {
            return Ok(Way::Stays);
        }
        object.ask(slot, |page| self.refuses_change(page))?;
        if to != Zone::Normal && object.is_particular() && !object.is_shared(slot) {
            return Err(ErrorKind::Unsupported);
        }
        if to == Zone::Normal && !object.beside.is_empty() {
            return self.own_source(object, slot, false).map(|source| Way::Goes(old, source));
        }
        let mut parts = self.parts.iter().enumerate().filter(|(_, part)| part.zone == to);
        let found = parts.find(|(_, part)| part.can_spare(slot.1, part.promised));
        let (nr, _) = found.ok_or(ErrorKind::Exhausted)?;
        Ok(Way::Goes(old, Source::Beside(nr)))
    }

    /// Notes that a folio is where it is seen to be now.
    fn go(&mut self, at: usize, slot: Run, (old, new): (u64, u64), source: Source) -> Verdict {
        let floats = self.objects.get(at).is_some_and(|object| !object.beside.is_empty());
        self.put(at, slot, new, source)?;
        let again = floats && self.zone_of(old) == Some(Zone::Normal);
        if !self.makes(PoolMistake::MovesUseTwice) {
            self.take_away(at, slot, old, again)?;
        }
        if self.makes(PoolMistake::MovesLoseBytes) {
            self.object_mut(at)?.pages_mut(slot).for_each(|page| page.byte = 0);
        }
        Ok(())
    }

    /// One folio is to move, and did or was refused.
    fn migrate_folio(
        &mut self,
        at: usize,
        slot: Run,
        to: Zone,
        refused: Option<ErrorKind>,
        seen: &Seen,
    ) -> Verdict {
        let way = self.way(at, slot, to);
        let outcome = refused.map_or(Ok(()), Err);
        must_be(way.as_ref().map(|_| ()).map_err(|&kind| kind), outcome)
            .map_err(|what| format!("pages {slot:?} to {to}: {what}"))?;
        match way {
            Ok(Way::Goes(old, source)) => {
                let &new = seen.get(&slot.0).ok_or("a folio was lost on its way")?;
                self.go(at, slot, (old, new), source)
            }
            _ => Ok(()),
        }
    }

    /// The folios of a range are to be in a zone; each that stays elsewhere has a reason.
    pub(super) fn migrate(
        &mut self,
        at: usize,
        range: Run,
        to: Zone,
        outcome: Result<&[(Run, ErrorKind)], ErrorKind>,
        seen: &Seen,
    ) -> Verdict {
        let object = self.objects.get(at).ok_or("no such object")?;
        let is_meant = to == Zone::Normal || object.zones.contains(&to);
        let wanted = if is_meant { Ok(()) } else { Err(ErrorKind::Unsupported) };
        must_be(wanted, outcome.map(|_| ()))?;
        let Ok(refused) = outcome else { return Ok(()) };
        for slot in object.slots(range) {
            let why = refused.iter().find(|(pages, _)| *pages == slot).map(|&(_, kind)| kind);
            self.migrate_folio(at, slot, to, why, seen)?;
        }
        Ok(())
    }

    /// Pages are to be on one side.
    pub(super) fn convert(
        &mut self,
        at: usize,
        range: Run,
        to: Visibility,
        outcome: Outcome,
        seen: &Seen,
    ) -> Verdict {
        let object = self.objects.get(at).ok_or("no such object")?;
        let placement = object.placement;
        if to == Visibility::Private && object.is_particular() {
            for slot in object.slots(range) {
                let refuses = placement == PrivatePlacement::Refuse;
                let way = match self.way(at, slot, Zone::Normal) {
                    Ok(Way::Stays) => continue,
                    _ if self.makes(PoolMistake::PrivateAnywhere) => continue,
                    _ if refuses => return must_be(Err(ErrorKind::Unsupported), outcome),
                    Err(kind) => return must_be(Err(kind), outcome),
                    Ok(way) => way,
                };
                if let Way::Goes(old, source) = way {
                    let &new = seen.get(&slot.0).ok_or("a folio was lost on its way")?;
                    self.go(at, slot, (old, new), source)?;
                }
            }
        }
        let object = self.objects.get(at).ok_or("no such object")?;
        let is_left_alone = |page: &Page| page.visibility == to && !page.has_failed;
        let refusal = |page: &Page| self.refuses_change(page).filter(|_| !is_left_alone(page));
        let refusal = object.ask(range, refusal);
        must_be(refusal, outcome)?;
        if refusal.is_ok() {
            let pages = self.object_mut(at)?.pages_mut(range);
            pages.for_each(|page| page.visibility = to);
        }
        Ok(())
    }

    /// Room was made, or not. Folios of a zone are somewhere else in it now.
    pub(super) fn compact(
        &mut self,
        size: FolioSize,
        zone: Zone,
        outcome: Result<Option<Run>, ErrorKind>,
        seen: &[Seen],
    ) -> Verdict {
        let is_possible = size != FolioSize::Base;
        let wanted = if is_possible { Ok(()) } else { Err(ErrorKind::Unsupported) };
        must_be(wanted, outcome.map(|_| ()))?;
        let Ok(made) = outcome else { return Ok(()) };
        let mut of_zone = self.parts.iter().filter(|part| part.zone == zone);
        let can_spare =
            |part: &Part| part.free().huge > 0 && part.can_spare(HUGE_PAGES, part.promised);
        let is_there = size == FolioSize::Huge2M && of_zone.any(can_spare);
        let before = self.objects.clone();
        self.moved_within(zone, seen)?;
        self.most_dirty = 0;
        let moved = before.iter().zip(&self.objects).any(|(a, b)| a.folios != b.folios);
        match made {
            None if is_there => Err(String::from("there is a free block, and it was not found")),
            Some(_) if is_there && moved => Err(String::from("folios moved for nothing")),
            None => Ok(()),
            Some((pfn, nr_pages)) => {
                let part = self.part_of(pfn).and_then(|nr| self.parts.get(nr));
                let is_made = part.is_some_and(|part| {
                    part.zone == zone
                        && (pfn - part.start) % HUGE_PAGES == 0
                        && part.all_free(pfn, nr_pages)
                });
                if is_made { Ok(()) } else { Err(format!("frame {pfn} was made free, and is not")) }
            }
        }
    }

    /// Takes over where folios are now. First all away, then there: one may be where another was.
    fn moved_within(&mut self, zone: Zone, seen: &[Seen]) -> Verdict {
        let mut moved = Vec::new();
        for (at, (object, seen)) in self.objects.iter().zip(seen).enumerate() {
            for (&page, &old) in &object.folios {
                let slot = object.slot_at(page);
                let &new = seen.get(&page).ok_or("a folio was lost on its way")?;
                if new == old {
                    continue;
                }
                if [old, new].map(|pfn| self.zone_of(pfn)) != [Some(zone); 2] {
                    return Err(format!("pages {slot:?} left zone {zone}"));
                }
                if object.any(slot, |page| page.refuses_change().is_some()) {
                    return Err(format!("pages {slot:?} moved, pinned or failed"));
                }
                let is_own = zone == Zone::Normal && !object.beside.is_empty();
                moved.push((at, slot, (old, new), is_own));
            }
        }
        for &(at, slot, (old, _), is_own) in &moved {
            self.take_away(at, slot, old, is_own)?;
        }
        for &(at, slot, (_, new), is_own) in &moved {
            let nr = self.part_of(new).ok_or("a folio in no part")?;
            self.put(at, slot, new, if is_own { Source::Own(nr) } else { Source::Beside(nr) })?;
        }
        Ok(())
    }

    /// How much is used by living objects.
    pub(super) fn nr_used(&self) -> u64 {
        let count = |part: &super::frames::Part| part.count(|it| matches!(it, Use::Of(_)));
        self.parts.iter().map(count).sum()
    }
}
