//! What is promised of an arena, and whether more can be. design/folios.md argues the inequalities.

use crate::geometry::{FolioSize, HUGE_PAGES};

/// So many folios of each size: as free blocks, those of a size outside of all larger ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Of 1 GiB.
    pub(crate) giant: u64,
    /// Of 2 MiB.
    pub(crate) huge: u64,
    /// Of 4 KiB.
    pub(crate) base: u64,
}

/// Folios of 2 MiB in one of 1 GiB.
const IN_GIANT: u64 = FolioSize::Huge1G.nr_pages() / HUGE_PAGES;

impl Blocks {
    #[inline]
    pub(crate) fn of(&self, size: FolioSize) -> u64 {
        match size {
            FolioSize::Base => self.base,
            FolioSize::Huge2M => self.huge,
            FolioSize::Huge1G => self.giant,
        }
    }

    #[inline]
    pub(crate) fn of_mut(&mut self, size: FolioSize) -> &mut u64 {
        match size {
            FolioSize::Base => &mut self.base,
            FolioSize::Huge2M => &mut self.huge,
            FolioSize::Huge1G => &mut self.giant,
        }
    }

    /// How many frames that is; as many as there can be if there cannot be that many.
    #[inline]
    pub(crate) fn pages(&self) -> u64 {
        let huge = self.giant.saturating_mul(IN_GIANT).saturating_add(self.huge);
        huge.saturating_mul(HUGE_PAGES).saturating_add(self.base)
    }

    #[inline]
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            giant: self.giant.saturating_add(other.giant),
            huge: self.huge.saturating_add(other.huge),
            base: self.base.saturating_add(other.base),
        }
    }

    #[inline]
    pub(super) fn minus(self, other: Self) -> Self {
        Self {
            giant: self.giant.saturating_sub(other.giant),
            huge: self.huge.saturating_sub(other.huge),
            base: self.base.saturating_sub(other.base),
        }
    }

    /// Whether so much free memory keeps the promises.
    #[inline]
    pub(super) fn keep(&self, promised: &Self) -> bool {
        let room = || {
            let giant = self.giant.checked_sub(promised.giant)?;
            let huge =
                giant.checked_mul(IN_GIANT)?.checked_add(self.huge)?.checked_sub(promised.huge)?;
            huge.checked_mul(HUGE_PAGES)?.checked_add(self.base)?.checked_sub(promised.base)
        };
        room().is_some()
    }

    /// How many frames are missing for the promises to be kept, in folios of their sizes.
    pub(super) fn missing(&self, promised: &Self) -> u64 {
        let giant = promised.giant.saturating_sub(self.giant);
        let spare = self.giant.saturating_sub(promised.giant);
        let spare = spare.saturating_mul(IN_GIANT).saturating_add(self.huge);
        let huge = promised.huge.saturating_sub(spare);
        let spare = spare.saturating_sub(promised.huge);
        let spare = spare.saturating_mul(HUGE_PAGES).saturating_add(self.base);
        Self { giant, huge, base: promised.base.saturating_sub(spare) }.pages()
    }

    /// How many more folios of a size could be promised, if nothing else is.
    pub(super) fn promisable(&self, promised: &Self, size: FolioSize) -> u64 {
        let giant = self.giant.saturating_sub(promised.giant);
        let huge = (giant * IN_GIANT + self.huge).saturating_sub(promised.huge);
        let base = (huge * HUGE_PAGES + self.base).saturating_sub(promised.base);
        let huge = huge.min(base / HUGE_PAGES);
        match size {
            FolioSize::Base => base,
            FolioSize::Huge2M => huge,
            FolioSize::Huge1G => giant.min(huge / IN_GIANT),
        }
    }

    /// What is left when a folio is cut out of a block that is worth folios of `from`.
    #[inline]
    pub(super) fn cut(mut self, from: FolioSize, size: FolioSize) -> Option<Self> {
        let left = self.of_mut(from);
        *left = left.checked_sub(1)?;
        match (from, size) {
            (FolioSize::Huge1G, FolioSize::Huge2M) => self.huge += IN_GIANT - 1,
            (FolioSize::Huge1G, FolioSize::Base) => {
                self.huge += IN_GIANT - 1;
                self.base += HUGE_PAGES - 1;
            }
            (FolioSize::Huge2M, FolioSize::Base) => self.base += HUGE_PAGES - 1,
            _ => {}
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [FolioSize; 3] = [FolioSize::Base, FolioSize::Huge2M, FolioSize::Huge1G];

    /// The argument of design/folios.md, tried out: what is promised can be taken in any order, each
    /// from the smallest block that will do.
    #[test]
    fn a_promise_can_be_taken_up_in_any_order() {
        let mut kept = 0;
        for seed in 0..20_000_u64 {
            let mut random = seed;
            let mut next = |most: u64| {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (random >> 33) % most
            };
            let mut free = Blocks { giant: next(3), huge: next(5), base: next(9) };
            let mut promised = Blocks { giant: next(3), huge: next(1030), base: next(1500) };
            assert_eq!(free.missing(&promised) == 0, free.keep(&promised));
            if !free.keep(&promised) {
                continue;
            }
            kept += 1;
            while promised != Blocks::default() {
                let size = SIZES[usize::try_from(next(3)).unwrap()];
                let Some(left) = promised.of(size).checked_sub(1) else { continue };
                *promised.of_mut(size) = left;
                let fit = SIZES.into_iter().filter(|&from| from >= size);
                free = fit.into_iter().find_map(|from| free.cut(from, size)).unwrap();
                assert!(free.keep(&promised), "{free:?} {promised:?}");
            }
        }
        assert!(kept > 3);
    }

    #[test]
    fn what_can_be_promised_is_no_less_and_no_more() {
        let free = Blocks { giant: 2, huge: 3, base: 7 };
        for promised in [
            Blocks::default(),
            Blocks { giant: 1, huge: 4, base: 0 },
            Blocks { giant: 0, huge: 513, base: 600 },
            Blocks { giant: 2, huge: 3, base: 7 },
        ] {
            assert!(free.keep(&promised));
            for size in SIZES {
                let mut more = promised;
                *more.of_mut(size) += free.promisable(&promised, size);
                assert!(free.keep(&more), "{more:?}");
                *more.of_mut(size) += 1;
                assert!(!free.keep(&more), "{more:?}");
            }
        }
    }

    #[test]
    fn what_is_missing_is_counted_in_folios_of_its_size() {
        let free = Blocks { giant: 1, huge: 3, base: 7 };
        let missing = |giant, huge, base| free.missing(&Blocks { giant, huge, base });
        assert_eq!([missing(1, 3, 7), missing(0, 515, 7), missing(1, 0, 3 * 512 + 7)], [0; 3]);
        assert_eq!(missing(2, 0, 0), 1 << 18);
        assert_eq!(missing(0, 517, 0), 2 * 512, "two folios, whatever else is free");
        assert_eq!(missing(1, 2, 512 + 8), 1);
        assert_eq!(missing(3, 4, 9), (2 << 18) + 512 + 2);
    }

    #[test]
    fn absurd_counts_are_no_trouble() {
        let all = Blocks { giant: u64::MAX, huge: u64::MAX, base: u64::MAX };
        assert_eq!(all.pages(), u64::MAX);
        assert!(!Blocks::default().keep(&all));
        assert_eq!(all.plus(all), all);
    }
}
