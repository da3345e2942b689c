//! Translations that a CPU or a vCPU remembers.
//!
//! Each has 64, direct mapped by frame number. All accesses ask here first and use what they find, tables or
//! no tables: so an invalidation that is forgotten is seen. Who looks and who invalidates hold the same
//! lock, that of the tables; every break of an entry calls [`Tlbs::invalidate`].

use crate::addr::{Gfn, Pfn};
use crate::geometry::index;
use crate::stage2::Prot;

const NR_LINES: usize = 64;

/// Where a page leads, and with what rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    pub(crate) pfn: Pfn,
    pub(crate) prot: Prot,
}

type Line = Option<(Gfn, Translation)>;

/// The TLBs of all that walk one tree.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tlbs {
    of: Vec<[Line; NR_LINES]>,
}

const fn slot(gfn: Gfn) -> usize {
    index(gfn.get() % NR_LINES as u64)
}

impl Tlbs {
    /// One for each of `nr`.
    pub(crate) fn new(nr: usize) -> Self {
        Self { of: vec![[None; NR_LINES]; nr] }
    }

    /// One more; its number.
    pub(crate) fn add(&mut self) -> usize {
        self.of.push([None; NR_LINES]);
        self.of.len() - 1
    }

    #[inline]
    pub(crate) fn look_up(&self, who: usize, gfn: Gfn) -> Option<Translation> {
        let (tag, translation) = self.of.get(who)?[slot(gfn)]?;
        (tag == gfn).then_some(translation)
    }

    pub(crate) fn fill(&mut self, who: usize, gfn: Gfn, translation: Translation) {
        if let Some(lines) = self.of.get_mut(who) {
            lines[slot(gfn)] = Some((gfn, translation));
        }
    }

    /// Forgets pages everywhere.
    pub(crate) fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
        let hit = |tag: Gfn| tag.get().wrapping_sub(gfn.get()) < nr_pages;
        for lines in &mut self.of {
            if nr_pages == 1 {
                let line = &mut lines[slot(gfn)];
                *line = line.filter(|&(tag, _)| !hit(tag));
            } else {
                lines.iter_mut().for_each(|line| *line = line.filter(|&(tag, _)| !hit(tag)));
            }
        }
    }

    /// Remembers again what was forgotten since: a seeded mistake.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn recall(&mut self, was: &Self) {
        for (now, was) in self.of.iter_mut().flatten().zip(was.of.iter().flatten()) {
            *now = now.or(*was);
        }
    }

    /// All that is remembered by anybody.
    pub(crate) fn remembered(&self) -> impl Iterator<Item = (Gfn, Translation)> {
        self.of.iter().flatten().flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_invalidated_is_forgotten_by_all_and_nothing_else_is() {
        let mut tlbs = Tlbs::new(2);
        let to = |pfn| Translation { pfn: Pfn::new(pfn), prot: Prot::RWX };
        for (who, gfn) in [(0, 1), (0, 2), (1, 2), (1, 130)] {
            tlbs.fill(who, Gfn::new(gfn), to(gfn));
        }
        assert_eq!(tlbs.look_up(1, Gfn::new(2)), None, "130 shares a line with 2");
        assert_eq!(tlbs.look_up(1, Gfn::new(130)), Some(to(130)));
        tlbs.invalidate(Gfn::new(2), 1);
        let left: Vec<_> = tlbs.remembered().map(|(gfn, _)| gfn.get()).collect();
        assert_eq!(left, [1, 130]);
        tlbs.invalidate(Gfn::new(0), 130);
        assert_eq!(tlbs.remembered().count(), 1);
        tlbs.invalidate(Gfn::new(0), u64::MAX);
        assert_eq!(tlbs.remembered().count(), 0);
        assert_eq!(tlbs.look_up(7, Gfn::new(1)), None);
    }
}
