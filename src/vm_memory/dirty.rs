//! Which guest memory was written through an address space.

use std::num::NonZeroUsize;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};

use crate::addr::Gfn;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::PAGE_BYTES;
use crate::range::GfnRange;

/// The type of a region's bitmap: none, unless somebody asked for it.
pub(super) type MaybeBitmap = Option<AtomicBitmap>;

/// A bit for each page of a slot, shared by all address spaces that were made of one.
#[derive(Clone, Debug, Default)]
pub(super) struct DirtyLog(Option<Arc<AtomicBitmap>>);

impl DirtyLog {
    pub(super) fn new(frames: GfnRange) -> Result<Self, Error> {
        let exhausted = || Error::new(Op::Range, ErrorKind::Overflow);
        let len = usize::try_from(frames.len_bytes().get()).map_err(|_| exhausted())?;
        let page = NonZeroUsize::new(PAGE_BYTES).ok_or_else(exhausted)?;
        Ok(Self(Some(Arc::new(AtomicBitmap::new(len, page)))))
    }

    /// The bits of what begins so far into the slot.
    pub(super) fn slice_at(&self, offset: usize) -> BS<'_, MaybeBitmap> {
        self.0.as_deref().map(|bitmap| bitmap.slice_at(offset))
    }

    pub(super) fn mark(&self, offset: usize, len: usize) {
        if let Some(bitmap) = &self.0 {
            bitmap.mark_dirty(offset, len);
        }
    }

    /// Clears the log, and says what was in it: ranges in ascending order that do not touch.
    pub(super) fn take(&self, frames: GfnRange) -> Vec<GfnRange> {
        let mut dirty: Vec<GfnRange> = Vec::new();
        let words = self.0.as_deref().map(AtomicBitmap::get_and_reset).unwrap_or_default();
        for (nr, word) in (0_u64..).zip(words) {
            let mut left = word;
            while left != 0 {
                let bit = u64::from(left.trailing_zeros());
                left &= left - 1;
                let page = frames.start().checked_add(nr * u64::from(u64::BITS) + bit);
                let Some(page) = page.and_then(|gfn: Gfn| GfnRange::single(gfn).ok()) else {
                    continue;
                };
                match dirty.last_mut().and_then(|last| Some((last.hull_if_joined(&page)?, last))) {
                    Some((joined, last)) => *last = joined,
                    None => dirty.push(page),
                }
            }
        }
        dirty
    }
}
