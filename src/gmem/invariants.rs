//! What must hold of an object whenever nobody is changing it.

use std::collections::BTreeMap;

use super::object::GuestMemfd;
use crate::addr::{Pfn, Pgoff};
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
        let mut held: BTreeMap<Pgoff, u32> = BTreeMap::new();
        for page in object.ledger.held().iter().flat_map(|range| range.iter()) {
            *held.entry(page).or_default() += 1;
        }
        for &(page, word) in &words {
            let counted = word.pins() + u32::from(word.is_exclusive());
            let written = held.get(&page).copied().unwrap_or(0);
            if counted != written {
                say(page, format!("{counted} pins counted, {written} written down"));
            }
            if counted > 0 && !word.is_open() {
                say(page, format!("pinned though it is {word:?}"));
            }
            if word.phase() != Phase::Settled && !has_failed(page) {
                say(page, format!("not settled: {word:?}"));
            }
        }
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
                let may_be_untouched = *is_shown && view.is_faulted_in(&shown, page);
                if *is_shown != present && !may_be_untouched {
                    say(page, format!("mapped in a view: we say {is_shown}, the kernel {present}"));
                }
                if *is_shown && object.frames.frame(page).is_none() {
                    say(page, String::from("mapped in a view with nothing behind"));
                }
            }
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
