//! Page ranges: half open, never empty, never wrapping, checked once at birth.

use std::fmt;

use crate::addr::{ByteSize, Gfn, Offset, PageNumber, Pfn, Pgoff};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{MAX_PAGES, PAGE_SHIFT, index};

/// A run of pages in one address space.
///
/// Whoever holds one may rely on: at least one page, and an end that can be expressed in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange<T> {
    start: T,
    nr_pages: u64,
}

/// Pages of an object.
pub type PgoffRange = PageRange<Pgoff>;
/// Guest frames.
pub type GfnRange = PageRange<Gfn>;
/// Frames of the arena.
pub type PfnRange = PageRange<Pfn>;

impl<T: PageNumber> PageRange<T> {
    /// The pages `start..start + nr_pages`.
    ///
    /// # Errors
    /// [`ErrorKind::EmptyRange`], or [`ErrorKind::Overflow`] if the end lies beyond what Linux can
    /// address in a file (2^63 - 1 bytes).
    #[inline]
    pub fn new(start: T, nr_pages: u64) -> Result<Self, Error> {
        if nr_pages == 0 {
            return Err(Error::new(Op::Range, ErrorKind::EmptyRange));
        }
        match start.to_raw().checked_add(nr_pages) {
            Some(end) if end <= MAX_PAGES => Ok(Self { start, nr_pages }),
            _ => Err(Error::new(Op::Range, ErrorKind::Overflow)),
        }
    }

    /// One page.
    ///
    /// # Errors
    /// [`ErrorKind::Overflow`] if the page lies beyond 2^63 - 1 bytes.
    #[inline]
    pub fn single(page: T) -> Result<Self, Error> {
        Self::new(page, 1)
    }

    /// The first page.
    #[inline]
    pub fn start(&self) -> T {
        self.start
    }

    /// The first page behind the range.
    #[inline]
    pub fn end(&self) -> T {
        T::from_raw(self.start.to_raw() + self.nr_pages)
    }

    /// How many pages.
    #[inline]
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// How many bytes.
    #[inline]
    pub fn len_bytes(&self) -> ByteSize {
        ByteSize::from_pages(self.nr_pages)
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = T> + ExactSizeIterator + use<T> {
        // A range of usize has an exact length, one of u64 has not.
        let start = index(self.start.to_raw());
        (start..start + index(self.nr_pages)).map(|raw| T::from_raw(raw as u64))
    }

    /// Whether the page is one of these.
    #[inline]
    pub fn contains(&self, page: T) -> bool {
        self.start <= page && page < self.end()
    }

    /// Whether all of `other` is in here.
    #[inline]
    pub fn covers(&self, other: &Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The pages that both ranges have, if any.
    #[inline]
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        let nr_pages = end.to_raw().checked_sub(start.to_raw()).filter(|&n| n > 0)?;
        Some(Self { start, nr_pages })
    }

    /// At most so many pages from `start` on, none of them at `end` or behind. `end` is one that a range
    /// may have.
    #[inline]
    pub(crate) fn before(end: T, start: T, most: u64) -> Option<Self> {
        let left = end.to_raw().checked_sub(start.to_raw())?;
        let nr_pages = left.min(most);
        (nr_pages > 0).then_some(Self { start, nr_pages })
    }

    /// Both ranges as one, if they overlap or touch.
    pub(crate) fn hull_if_joined(&self, other: &Self) -> Option<Self> {
        let start = self.start.min(other.start);
        let end = self.end().max(other.end());
        let joined = self.start <= other.end() && other.start <= self.end();
        joined.then(|| Self { start, nr_pages: end.to_raw() - start.to_raw() })
    }

    /// The pages of `self` from its `skip`th on, at most `most` of them.
    #[inline]
    pub(crate) fn slice(&self, skip: u64, most: u64) -> Option<Self> {
        let left = self.nr_pages.checked_sub(skip)?;
        let nr_pages = left.min(most);
        (nr_pages > 0).then(|| Self { start: T::from_raw(self.start.to_raw() + skip), nr_pages })
    }
}

impl PgoffRange {
    /// The pages of the byte range `start..start + len`, both page aligned.
    ///
    /// # Errors
    /// [`ErrorKind::Unaligned`], [`ErrorKind::EmptyRange`] or [`ErrorKind::Overflow`]: the
    /// `EINVAL`s that the kernel's `fallocate` on a guest_memfd gives.
    pub fn from_bytes(start: Offset, len: ByteSize) -> Result<Self, Error> {
        if !start.is_page_aligned() || !len.is_page_aligned() {
            return Err(Error::new(Op::Range, ErrorKind::Unaligned));
        }
        Self::new(start.pgoff(), len.get() >> PAGE_SHIFT)
    }

    /// The first byte.
    pub fn start_offset(&self) -> Offset {
        self.start.offset()
    }
}

impl<T: PageNumber> fmt::Debug for PageRange<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}..{:?}", self.start, self.end())
    }
}

/// In bytes, as an error report wants it: `0x40000..0x48000`.
impl<T: PageNumber> fmt::Display for PageRange<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |page: T| page.to_raw() << PAGE_SHIFT;
        write!(f, "{:#x}..{:#x}", bytes(self.start), bytes(self.end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, nr_pages: u64) -> PgoffRange {
        PgoffRange::new(Pgoff::new(start), nr_pages).expect("a valid range")
    }

    #[test]
    fn birth_refuses_what_later_code_must_not_meet() {
        let kind = |start, nr| PgoffRange::new(Pgoff::new(start), nr).map_err(|e| e.kind());
        assert_eq!(kind(0, 0), Err(ErrorKind::EmptyRange));
        assert_eq!(kind(u64::MAX, 1), Err(ErrorKind::Overflow));
        assert_eq!(kind(1, u64::MAX), Err(ErrorKind::Overflow));
        assert_eq!(kind(MAX_PAGES, 1), Err(ErrorKind::Overflow));
        assert!(kind(MAX_PAGES - 1, 1).is_ok());
    }

    #[test]
    fn byte_ranges_must_be_aligned() {
        let kind = |start, len| {
            PgoffRange::from_bytes(Offset::new(start), ByteSize::from_bytes(len))
                .map_err(|e| e.kind())
        };
        assert_eq!(kind(1, 4096), Err(ErrorKind::Unaligned));
        assert_eq!(kind(0, 4097), Err(ErrorKind::Unaligned));
        assert_eq!(kind(0, 0), Err(ErrorKind::EmptyRange));
        assert_eq!(kind(4096, 8192), Ok(range(1, 2)));
    }

    #[test]
    fn overlap_and_slices() {
        assert_eq!(range(0, 4).intersection(&range(2, 8)), Some(range(2, 2)));
        assert_eq!(range(0, 4).intersection(&range(4, 1)), None);
        let before =
            |end, start, most| PgoffRange::before(Pgoff::new(end), Pgoff::new(start), most);
        assert_eq!(before(8, 4, 2), Some(range(4, 2)));
        assert_eq!(before(8, 4, 512), Some(range(4, 4)));
        assert_eq!((before(8, 8, 1), before(8, 9, 1), before(8, 0, 0)), (None, None, None));
        assert_eq!(range(0, 4).hull_if_joined(&range(2, 8)), Some(range(0, 10)));
        assert_eq!(range(4, 1).hull_if_joined(&range(0, 4)), Some(range(0, 5)));
        assert_eq!(range(0, 9).hull_if_joined(&range(2, 2)), Some(range(0, 9)));
        assert_eq!(range(0, 4).hull_if_joined(&range(5, 1)), None);
        assert_eq!(range(4, 4).slice(1, 2), Some(range(5, 2)));
        assert_eq!(range(4, 4).slice(4, 2), None);
        assert_eq!(range(4, 2).iter().rev().map(Pgoff::get).collect::<Vec<_>>(), [5, 4]);
    }

    #[test]
    fn display_speaks_bytes() {
        assert_eq!(range(0x40, 8).to_string(), "0x40000..0x48000");
    }
}
