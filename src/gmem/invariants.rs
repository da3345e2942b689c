//! What must hold of an object whenever nobody is changing it.

use std::collections::BTreeMap;

use super::layout::Layout;
use super::object::{GuestMemfd, Inner};
use super::pin::OwnerTag;
use super::shown::{next_run, part};
use crate::addr::{Pfn, Pgoff};
use crate::os::maps::Maps;
use crate::range::{PfnRange, PgoffRange};
use crate::state::{Phase, Visibility, Word};

impl GuestMemfd {
    /// Adds a sentence for everything that is not as it should be.
    pub(crate) fn check_invariants(&self, findings: &mut Vec<String>) {
        let object = &*self.0;
        // No folio, view or binding comes or goes, and no conversion is under way, meanwhile.
        let layout = object.layout.write();
        let words: Vec<(Pgoff, Word)> = object.words().collect();
        let mut say = |page: Pgoff, what: String| {
            findings.push(format!("{} page {page}: {what}", object.name));
        };

        let is_sound = |frames: PfnRange| {
            object.reservation.failed_in(frames.start(), frames.nr_pages()).is_empty()
        };
        let has_failed = |page: Pgoff| {
            let folios = PgoffRange::single(page).map(|page| object.frames.folios(page));
            folios.is_ok_and(|mut folios| folios.any(|(_, frames)| !is_sound(frames)))
        };
        let pins = object.ledger.held();
        let mut held: BTreeMap<Pgoff, u32> = BTreeMap::new();
        for page in pins.iter().flat_map(|(range, _)| range.iter()) {
            *held.entry(page).or_default() += 1;
        }
        for &(page, word) in &words {
            let counted = word.pins() + u32::from(word.is_exclusive());
            let written = held.get(&page).copied().unwrap_or(0);
            if counted != written {
                say(page, format!("{counted} pins counted, {written} written down"));
            }
            // Who had it when it failed may have it still.
            if counted > 0 && !word.is_open() && !has_failed(page) {
                say(page, format!("pinned though it is {word:?}"));
            }
            if word.phase() != Phase::Settled && !has_failed(page) {
                say(page, format!("not settled: {word:?}"));
            }
        }
        unpinned_exports(object, &layout, pins, &mut say);
        if let Some(page) = object.frames.contradiction() {
            say(
                page,
                String::from("its folio has holes that are not written down, or the reverse"),
            );
        }
        for (pages, frames) in object.frames.holes(object.pages) {
            let is_free = |pfn: &Pfn| object.reservation.pool().is_free(*pfn);
            if let Some(pfn) = frames.iter().find(is_free) {
                say(pages.start(), format!("a hole in a folio, and its frame {pfn} is free"));
            }
            // Memory that went back to the host would be had again by a look.
            let is_kept = object.arena.why_kept(frames).is_some();
            let is_kept = is_kept && is_sound(frames);
            if is_kept && !matches!(object.arena.is_zero(frames), Ok(true)) {
                say(pages.start(), format!("a hole of {} pages is not zero", pages.nr_pages()));
            }
        }
        for (_, view) in &layout.views {
            let shown = view.shown();
            let present = match view.present(words.len()) {
                Ok(present) => present,
                Err(error) => {
                    say(Pgoff::new(0), format!("no look at the page tables: {error}"));
                    continue;
                }
            };
            for ((&(page, word), is_shown), present) in
                words.iter().zip(shown.pages.iter()).zip(present)
            {
                if *is_shown && word.visibility() == Visibility::Private {
                    say(page, String::from("private and mapped in a view"));
                }
                // Until the next look at it who has it pinned has it there.
                let is_left = || layout.failed.iter().any(|failed| failed.has(page));
                if *is_shown && word.phase() == Phase::Quarantined && !is_left() {
                    say(page, String::from("quarantined and mapped in a view"));
                }
                let may_be_untouched = *is_shown && view.is_faulted_in(&shown, page);
                // The kernel has taken it out by itself, if it knows.
                if *is_shown != present && !may_be_untouched && !has_failed(page) {
                    say(page, format!("mapped in a view: we say {is_shown}, the kernel {present}"));
                }
                if *is_shown && object.frames.frame(page).is_none() {
                    say(page, String::from("mapped in a view with nothing behind"));
                }
            }
        }
        if !layout.views.is_empty() {
            misplaced(object, &layout, &mut say);
        }
    }

    /// The frames that hold the object, and who may see each.
    pub(crate) fn frames(&self) -> Vec<(Pfn, Visibility)> {
        let object = &*self.0;
        let resident = object.frames.resident(object.pages);
        let each = resident.flat_map(|(pages, frames)| pages.iter().zip(frames.iter()));
        each.filter_map(|(page, pfn)| Some((pfn, object.word(page)?.visibility()))).collect()
    }

    /// First page and first frame of each folio: for tests that follow them.
    #[cfg(feature = "oracle")]
    pub(crate) fn folios(&self) -> Vec<(Pgoff, Pfn)> {
        let slots = self.0.frames.shape().slots(self.0.pages);
        slots.filter_map(|slot| Some((slot.pages().start(), self.0.frames.get(&slot)?))).collect()
    }

    /// What lies behind each page that has a folio, whoever may see it: for tests that compare all of it.
    #[cfg(feature = "oracle")]
    #[doc(hidden)]
    pub fn bytes_behind(&self) -> Vec<(Pgoff, Box<[u8]>)> {
        let object = &*self.0;
        let mut bytes = Vec::new();
        for page in object.pages.iter() {
            let Some(pfn) = object.frames.frame(page) else { continue };
            let mut buf = vec![0; crate::geometry::PAGE_BYTES].into_boxed_slice();
            if object.arena.read(pfn.pa(), &mut buf).is_ok() {
                bytes.push((page, buf));
            }
        }
        bytes
    }
}

/// What another process has mapped has a pin of its own, or it could be converted. A pin that was taken for
/// another reason may end before.
fn unpinned_exports(
    object: &Inner,
    layout: &Layout,
    mut pins: Vec<(PgoffRange, OwnerTag)>,
    say: &mut impl FnMut(Pgoff, String),
) {
    for (_, export) in &layout.exports {
        match pins.iter().position(|&pin| pin == (export.pages, export.owner)) {
            Some(place) => drop(pins.swap_remove(place)),
            None => {
                let name = object.ledger.name_of(export.owner);
                let name = name.as_deref().unwrap_or("nobody we know");
                say(export.pages.start(), format!("exported by {name}, without a pin"));
            }
        }
    }
}

/// Who touches a page of a view finds the frame that the object has there.
fn misplaced(object: &Inner, layout: &Layout, say: &mut impl FnMut(Pgoff, String)) {
    let maps = match Maps::read() {
        Ok(maps) => maps,
        Err(error) => return say(Pgoff::new(0), format!("no look at the mappings: {error}")),
    };
    for (_, view) in &layout.views {
        let shown = view.shown();
        for (pages, frames) in object.frames.resident(object.pages) {
            let mut from = pages.start();
            while let Some(run) = next_run(&shown.pages, from, pages.end(), true) {
                from = run.end();
                let Some(frames) = part(pages, frames, run) else { continue };
                match view.misplaced(&maps, run, frames) {
                    Ok(None) => {}
                    Ok(Some(page)) => {
                        say(page, String::from("a view maps something else there"));
                    }
                    Err(error) => say(run.start(), format!("no look at its file: {error}")),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Exported;
    use super::*;
    use crate::addr::ByteSize;
    use crate::backing::{ArenaBacking, PartSpec};
    use crate::folio::{FolioPool, Zone};
    use crate::gmem::PinMode;
    use crate::state::{Wait, Wanted, with_reader};

    #[test]
    fn a_quarantined_page_that_a_view_shows_is_found() {
        let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(2));
        let pool = FolioPool::builder().part(part, Zone::Normal).create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let _view = memfd.map_view().unwrap();
        memfd.allocate(memfd.pages()).unwrap();
        let found = || {
            let mut findings = Vec::new();
            memfd.check_invariants(&mut findings);
            findings.retain(|found| found.contains("view"));
            findings.join("; ")
        };
        assert_eq!(found(), "");
        let page = PgoffRange::new(Pgoff::new(7), 1).unwrap();
        with_reader(|reader| {
            let frozen = memfd.0.tree.freeze(reader, &[page], Wanted::All, &Wait::never());
            drop(frozen.unwrap());
        });
        assert_eq!(found(), "guest page 0x7: quarantined and mapped in a view");
        memfd.0.hide(&memfd.0.layout.read(), &[page]).unwrap();
        assert_eq!(found(), "");
    }

    #[test]
    fn an_export_without_a_pin_is_found() {
        let part = PartSpec::new([ArenaBacking::Memfd], ByteSize::from_mib(2));
        let pool = FolioPool::builder().part(part, Zone::Normal).dedicated().create().unwrap();
        let builder = GuestMemfd::builder(ByteSize::from_mib(2)).initial(Visibility::Shared);
        let memfd = builder.create(&pool).unwrap();
        let [peer, disk] = ["peer", "disk"].map(|name| memfd.register_owner(name).unwrap());
        let range = |start, nr_pages| PgoffRange::new(Pgoff::new(start), nr_pages).unwrap();
        let found = || {
            let mut findings = Vec::new();
            memfd.check_invariants(&mut findings);
            findings.join("; ")
        };
        let exports = [(0, 4), (0, 4), (9, 1), (2, 4)]
            .map(|(start, nr_pages)| memfd.export(range(start, nr_pages), peer).unwrap());
        assert_eq!(found(), "");

        let forged = |pages, owner| {
            let key = memfd.0.layout.write().exports.insert(Exported { pages, owner });
            let found = found();
            memfd.0.layout.write().exports.remove(key);
            found
        };
        let wrong = "guest page 0x0: exported by peer, without a pin";
        assert_eq!(forged(range(0, 4), peer), wrong, "the others' pins are theirs");
        assert_eq!(forged(range(0, 1), peer), wrong);
        assert_eq!(forged(range(9, 1), disk), "guest page 0x9: exported by disk, without a pin");
        let pin = memfd.pin(range(9, 1), disk, PinMode::Counted).unwrap();
        assert_eq!(forged(range(9, 1), disk), "");
        drop((pin, exports));
        assert_eq!(found(), "");
    }
}
