//! Places of memslots that are gone, as far as somebody may still have pages mapped there.

use super::layout::Binding;
use super::shown::between;
use crate::addr::Pgoff;
use crate::range::{GfnRange, PgoffRange};
use crate::sync::Mutex;

/// A guest that ends takes its memslots with it, whether subscribers let go or not. Whoever has not, or was
/// given the pages again because another has not, goes on with the places that it knows. So it is asked for
/// the pages at these places until it has let go of them once.
#[derive(Debug)]
pub(super) struct Departed(Mutex<Vec<Binding>>);

impl Default for Departed {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl Departed {
    /// So that as many more can be kept without asking for memory.
    pub(super) fn has_room_for(&self, nr: usize) -> bool {
        self.0.lock().try_reserve(nr).is_ok()
    }

    /// Keeps a place, for which there is room.
    pub(super) fn keep(&self, binding: Binding) {
        self.0.lock().push(binding);
    }

    /// Nobody has these pages at a place of old any more.
    pub(super) fn forget(&self, pages: &[PgoffRange]) {
        let departed = &mut *self.0.lock();
        let is_gone = |binding: &Binding| pages.iter().any(|gone| gone.covers(&binding.pages));
        departed.retain(|binding| !is_gone(binding));
        for gone in pages {
            let mut at = 0;
            while let Some(binding) = departed.get(at).copied() {
                at += 1;
                let rest = [
                    between(binding.pages.start(), gone.start().min(binding.pages.end())),
                    between(gone.end().max(binding.pages.start()), binding.pages.end()),
                ];
                let mut rest = rest.into_iter().flatten().filter_map(|pages| binding.part(pages));
                let (Some(first), second) = (rest.next(), rest.next()) else { continue };
                // A place too many does no harm: nobody has the pages there.
                if second.is_some() && departed.try_reserve(departed.len() + 1).is_err() {
                    continue;
                }
                if let Some(place) = departed.get_mut(at - 1) {
                    *place = first;
                }
                departed.extend(second);
            }
        }
    }

    /// The binding that a page had, and the next page for which that is not the answer.
    pub(super) fn of(&self, page: Pgoff) -> (Option<Binding>, Option<Pgoff>) {
        let departed = self.0.lock();
        match departed.iter().find(|binding| binding.pages.contains(page)) {
            Some(&binding) => (Some(binding), Some(binding.pages.end())),
            None => {
                let starts = departed.iter().map(|binding| binding.pages.start());
                (None, starts.filter(|&start| start > page).min())
            }
        }
    }

    /// Adds the pages that somebody may have at these guest frames; says whether there was memory for them.
    pub(super) fn add_pages_at(&self, gfns: GfnRange, pages: &mut Vec<PgoffRange>) -> bool {
        let departed = self.0.lock();
        let there = |binding: &Binding| {
            let at = GfnRange::new(binding.gfn, binding.pages.nr_pages()).ok()?;
            let there = at.intersection(&gfns)?;
            let skip = there.start().get() - at.start().get();
            binding.pages.slice(skip, there.nr_pages())
        };
        let is_room = pages.try_reserve(departed.len()).is_ok();
        if is_room {
            pages.extend(departed.iter().filter_map(there));
        }
        is_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;

    fn pages(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
    }

    #[test]
    fn what_is_forgotten_leaves_the_rest_at_its_places() {
        let departed = Departed::default();
        assert!(departed.has_room_for(2));
        departed.keep(Binding { pages: pages(10, 10), gfn: Gfn::new(100) });
        departed.keep(Binding { pages: pages(30, 2), gfn: Gfn::new(500) });
        departed.forget(&[pages(13, 2), pages(31, 4)]);
        let place = |page: u64| {
            let (binding, _) = departed.of(Pgoff::new(page));
            binding.map(|it| it.gfn.get() + (page - it.pages.start().get()))
        };
        let found = [9, 10, 12, 13, 14, 15, 19, 20, 30, 31].map(place);
        let wanted = [0, 100, 102, 0, 0, 105, 109, 0, 500, 0];
        assert_eq!(found.map(|place| place.unwrap_or(0)), wanted);
        assert_eq!(departed.of(Pgoff::new(13)).1, Some(Pgoff::new(15)));
        let mut there = Vec::new();
        let gfns = GfnRange::new(Gfn::new(102), 4).unwrap();
        assert!(departed.add_pages_at(gfns, &mut there));
        assert_eq!(there, [pages(12, 1), pages(15, 1)]);
        departed.forget(&[pages(0, 40)]);
        assert_eq!(departed.of(Pgoff::new(0)), (None, None));
    }
}
