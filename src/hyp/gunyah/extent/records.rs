//! What an extent says of its mappings in one address space: for every frame at most one address, whether the
//! extent has the frame at present or not.

use std::collections::BTreeMap;

use super::super::attrs::MapAttrs;
use crate::addr::{Gfn, Pfn};
use crate::range::PfnRange;

/// Frames that are mapped in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    nr: u64,
    gfn: Gfn,
    attrs: MapAttrs,
}

/// Where frames from some frame on are recorded, and how many are recorded alike; or not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) to: Option<(Gfn, MapAttrs)>,
    pub(crate) nr: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Records(BTreeMap<u64, Record>);

impl Records {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is recorded at a frame, for at most so many.
    pub(crate) fn at(&self, pfn: Pfn, most: u64) -> Recorded {
        let raw = pfn.get();
        if let Some((&start, record)) = self.0.range(..=raw).next_back() {
            let skip = raw - start;
            if skip < record.nr {
                let gfn = Gfn::new(record.gfn.get() + skip);
                let nr = most.min(record.nr - skip);
                return Recorded { to: Some((gfn, record.attrs)), nr };
            }
        }
        let next = self.0.range(raw..).next().map_or(u64::MAX, |(&start, _)| start);
        Recorded { to: None, nr: most.min(next - raw) }
    }

    /// Records frames of which none was recorded; says whether that was so.
    pub(crate) fn insert(&mut self, frames: PfnRange, gfn: Gfn, attrs: MapAttrs) -> bool {
        let free = self.at(frames.start(), frames.nr_pages());
        if free.to.is_some() || free.nr < frames.nr_pages() {
            return false;
        }
        let (mut start, mut record) =
            (frames.start().get(), Record { nr: frames.nr_pages(), gfn, attrs });
        let next = self.0.get(&frames.end().get()).copied();
        if let Some(next) = next.filter(|next| record.goes_on_in(next)) {
            self.0.remove(&frames.end().get());
            record.nr += next.nr;
        }
        let before = self.0.range(..start).next_back().map(|(&at, &before)| (at, before));
        if let Some((at, before)) = before {
            if at + before.nr == start && before.goes_on_in(&record) {
                (start, record) = (at, Record { nr: before.nr + record.nr, ..before });
            }
        }
        self.0.insert(start, record);
        true
    }

    /// Whether frames are all recorded, in one piece from an address on.
    pub(crate) fn has(&self, frames: PfnRange, gfn: Gfn) -> bool {
        let mut nr_seen = 0;
        while nr_seen < frames.nr_pages() {
            let at = Pfn::new(frames.start().get() + nr_seen);
            let found = self.at(at, frames.nr_pages() - nr_seen);
            match found.to {
                Some((to, _)) if to.get() == gfn.get() + nr_seen => nr_seen += found.nr,
                _ => return false,
            }
        }
        true
    }

    /// Forgets frames that are all recorded, in one piece from an address on; says whether that was so.
    pub(crate) fn remove(&mut self, frames: PfnRange, gfn: Gfn) -> bool {
        let has_all = self.has(frames, gfn);
        if has_all {
            self.clear(frames);
        }
        has_all
    }

    /// Forgets whatever is recorded of frames.
    fn clear(&mut self, frames: PfnRange) {
        for cut in [frames.start().get(), frames.end().get()] {
            let across = self.0.range_mut(..cut).next_back();
            let Some((&start, record)) = across.filter(|(start, record)| **start + record.nr > cut)
            else {
                continue;
            };
            let skip = cut - start;
            let rest = Record {
                nr: record.nr - skip,
                gfn: Gfn::new(record.gfn.get() + skip),
                attrs: record.attrs,
            };
            record.nr = skip;
            self.0.insert(cut, rest);
        }
        let inside = self.0.range(frames.start().get()..frames.end().get());
        let inside: Vec<u64> = inside.map(|(&start, _)| start).collect();
        for start in inside {
            self.0.remove(&start);
        }
    }

    /// Changes the rights of all of it.
    pub(crate) fn set_access(&mut self, attrs: MapAttrs) {
        for record in self.0.values_mut() {
            record.attrs = record.attrs.with_access(attrs);
        }
    }

    /// Everything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (PfnRange, Gfn, MapAttrs)> {
        self.0.iter().filter_map(|(&start, record)| {
            let frames = PfnRange::new(Pfn::new(start), record.nr).ok()?;
            Some((frames, record.gfn, record.attrs))
        })
    }
}

impl Record {
    fn goes_on_in(&self, next: &Self) -> bool {
        self.gfn.checked_add(self.nr) == Some(next.gfn) && self.attrs == next.attrs
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::attrs::{Access, MapType};
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, nr: u64) -> PfnRange {
        PfnRange::new(Pfn::new(start), nr).unwrap()
    }

    const RW: MapAttrs = MapAttrs::new(Access::RW, MapType::CACHED);
    const R: MapAttrs = MapAttrs::new(Access::R, MapType::CACHED);

    proptest! {
        /// Against a list of frames.
        #[test]
        fn they_are_a_list_of_frames(
            steps in prop::collection::vec((0_u64..30, 1_u64..12, 0_u64..3, any::<[bool; 2]>()), 1..50)
        ) {
            let mut records = Records::default();
            let mut list = vec![None; 50];
            for (start, nr, shift, [insert, write]) in steps {
                let frames = range(start, nr);
                let gfn = |pfn: u64| Gfn::new(pfn + 100 * shift);
                let attrs = if write { RW } else { R };
                let inside = start as usize..(start + nr) as usize;
                let fits = inside.clone().all(|at| match list[at] {
                    None => insert,
                    Some((to, _)) => !insert && to == gfn(at as u64),
                });
                let done = match insert {
                    true => records.insert(frames, gfn(start), attrs),
                    false => records.remove(frames, gfn(start)),
                };
                prop_assert_eq!(done, fits);
                for at in inside.filter(|_| fits) {
                    list[at] = insert.then(|| (gfn(at as u64), attrs));
                }
                for (pfn, &to) in list.iter().enumerate() {
                    let found = records.at(Pfn::new(pfn as u64), 1);
                    prop_assert_eq!(found, Recorded { to, nr: 1 });
                }
            }
            let nr: u64 = records.iter().map(|(frames, ..)| frames.nr_pages()).sum();
            prop_assert_eq!(nr, list.iter().flatten().count() as u64);
        }
    }

    #[test]
    fn neighbours_that_go_on_are_one() {
        let mut records = Records::default();
        for (start, nr) in [(0, 4), (8, 4), (4, 4)] {
            assert!(records.insert(range(start, nr), Gfn::new(0x100 + start), RW));
        }
        assert_eq!(records.iter().count(), 1);
        assert_eq!(
            records.at(Pfn::new(2), 99),
            Recorded { to: Some((Gfn::new(0x102), RW)), nr: 10 }
        );
        assert_eq!(records.at(Pfn::new(12), 99), Recorded { to: None, nr: 99 });
        assert!(records.insert(range(12, 1), Gfn::new(0x10c), R), "other rights");
        assert_eq!(records.iter().count(), 2);
        records.set_access(R);
        assert!(records.iter().all(|(.., attrs)| attrs == R));
    }
}
