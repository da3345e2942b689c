//! Which of a VM's addresses are in use.

use std::collections::BTreeMap;

use crate::addr::Gfn;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// Start and end of what is in use; neighbours are one.
    used: BTreeMap<u64, u64>,
    end: u64,
}

impl Ranges {
    /// Pages `0..end`, none in use.
    pub(crate) fn new(end: Gfn) -> Self {
        Self { used: BTreeMap::new(), end: end.get() }
    }

    fn is_free(&self, start: u64, end: u64) -> bool {
        end <= self.end && self.used.range(..end).next_back().is_none_or(|(_, &last)| last <= start)
    }

    /// Takes pages at an address.
    pub(crate) fn take(&mut self, at: Gfn, nr: u64) -> Option<Gfn> {
        let end = at.get().checked_add(nr)?;
        self.is_free(at.get(), end).then(|| {
            self.insert(at.get(), end);
            at
        })
    }

    /// Takes the first pages that are free and aligned to a power of two.
    pub(crate) fn take_any(&mut self, nr: u64, align: u64) -> Option<Gfn> {
        let mut start = 0_u64;
        for (&used, &end) in &self.used {
            if start.checked_add(nr)? <= used {
                break;
            }
            start = end.checked_next_multiple_of(align)?;
        }
        self.take(Gfn::new(start), nr)
    }

    fn insert(&mut self, mut start: u64, mut end: u64) {
        if let Some((&before, &last)) = self.used.range(..start).next_back() {
            if last == start {
                start = before;
            }
        }
        if let Some(last) = self.used.remove(&end) {
            end = last;
        }
        self.used.insert(start, end);
    }

    /// Gives pages back that are in use.
    pub(crate) fn give(&mut self, at: Gfn, nr: u64) {
        let (start, end) = (at.get(), at.get().saturating_add(nr));
        let Some((&first, &last)) = self.used.range(..=start).next_back() else { return };
        if last < end {
            return;
        }
        self.used.remove(&first);
        if first < start {
            self.used.insert(first, start);
        }
        if end < last {
            self.used.insert(end, last);
        }
    }

    /// Whether pages are all in use.
    pub(crate) fn has(&self, at: Gfn, nr: u64) -> bool {
        let before = self.used.range(..=at.get()).next_back();
        before.is_some_and(|(_, &last)| at.get().saturating_add(nr) <= last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_once_and_given_in_parts() {
        let mut ranges = Ranges::new(Gfn::new(0x1000));
        assert_eq!(ranges.take(Gfn::new(0x10), 0x10), Some(Gfn::new(0x10)));
        for (at, nr) in [(0, 0x11), (0x1f, 1), (0x1f, 9), (0x0, 0x100), (0x1000, 1), (u64::MAX, 2)]
        {
            assert_eq!(ranges.take(Gfn::new(at), nr), None, "{at:#x}");
        }
        assert_eq!(ranges.take_any(0x10, 1), Some(Gfn::new(0)));
        assert_eq!(ranges.take_any(0x200, 0x200), Some(Gfn::new(0x200)));
        assert_eq!(ranges.take_any(0x1e0, 1), Some(Gfn::new(0x20)));
        assert_eq!(ranges.used.len(), 1, "all of it is one piece");
        assert_eq!(ranges.take_any(0xc01, 1), None);
        assert!(ranges.has(Gfn::new(0), 0x400) && !ranges.has(Gfn::new(1), 0x400));
        ranges.give(Gfn::new(0x100), 0x80);
        assert!(!ranges.has(Gfn::new(0x17f), 1) && ranges.has(Gfn::new(0x180), 0x280));
        ranges.give(Gfn::new(0x100), 0x81);
        assert!(ranges.has(Gfn::new(0x180), 1), "what is not all in use stays");
        assert_eq!(ranges.take_any(0x80, 0x80), Some(Gfn::new(0x100)));
        assert_eq!(ranges.take_any(u64::MAX, 1), None);
    }
}
