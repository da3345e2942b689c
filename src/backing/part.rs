//! Parts of an arena: what is wanted of each, where they lie, and what they were obtained as.

use std::fmt;
use std::os::fd::OwnedFd;

use super::ArenaBacking;
use crate::addr::{ByteSize, Pfn};
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{FolioSize, MAX_PAGES, NumaNode};
use crate::range::PfnRange;

/// A part of a pool's memory, as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSpec {
    pub(super) preference: Vec<ArenaBacking>,
    pub(super) size: ByteSize,
    pub(super) node: Option<NumaNode>,
}

impl PartSpec {
    /// So many bytes on the first of these backings that the host can provide.
    pub fn new(preference: impl Into<Vec<ArenaBacking>>, size: ByteSize) -> Self {
        Self { preference: preference.into(), size, node: None }
    }

    /// All of it from one NUMA node.
    #[must_use]
    pub fn on_node(mut self, node: NumaNode) -> Self {
        self.node = Some(node);
        self
    }
}

/// A part of a pool's memory, as it was obtained.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartReport {
    /// What it is made of.
    pub backing: ArenaBacking,
    /// Its frames.
    pub frames: PfnRange,
    /// The NUMA node that it was asked from.
    pub node: Option<NumaNode>,
    /// The backings that would have been preferred, and why each could not be had.
    pub passed_over: Vec<(ArenaBacking, Error)>,
}

impl fmt::Display for PartReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.frames, self.backing)?;
        if let Some(node) = self.node {
            write!(f, ", NUMA node {node}")?;
        }
        self.passed_over.iter().try_for_each(|(backing, why)| write!(f, "; not {backing}: {why}"))
    }
}

/// A run of consecutive frames of one backing.
#[derive(Debug)]
pub(crate) struct Part {
    pub(super) frames: PfnRange,
    pub(super) backing: ArenaBacking,
    pub(super) node: Option<NumaNode>,
    /// Its bytes are all of this file; `None` on the heap.
    pub(super) file: Option<OwnedFd>,
}

impl Part {
    pub(crate) fn frames(&self) -> PfnRange {
        self.frames
    }

    pub(crate) fn backing(&self) -> ArenaBacking {
        self.backing
    }

    pub(crate) fn node(&self) -> Option<NumaNode> {
        self.node
    }
}

/// What a part's first frame is a multiple of: a folio of any size that fits in it begins at a
/// multiple of its own size then.
fn alignment(nr_pages: u64) -> u64 {
    nr_pages.next_power_of_two().min(FolioSize::Huge1G.nr_pages())
}

/// Where the parts lie: behind one another, with gaps where alignment wants them.
///
/// # Errors
/// [`ErrorKind::InvalidSize`] if there are none, if one is empty or no whole number of pages, or if
/// there are no frame numbers for so many.
pub(super) fn place(parts: &[PartSpec]) -> Result<Vec<PfnRange>, Error> {
    let invalid = || Error::new(Op::CreatePool, ErrorKind::InvalidSize);
    let mut behind = 0_u64;
    let mut placed = Vec::new();
    for part in parts {
        let nr_pages = part.size.whole_pages();
        if !part.size.is_page_aligned() || nr_pages > MAX_PAGES {
            return Err(invalid());
        }
        let start = behind.checked_next_multiple_of(alignment(nr_pages)).ok_or_else(invalid)?;
        let frames = PfnRange::new(Pfn::new(start), nr_pages).map_err(|_| invalid())?;
        behind = frames.end().get();
        placed.push(frames);
    }
    if placed.is_empty() { Err(invalid()) } else { Ok(placed) }
}

/// What the address of frame 0 is a multiple of, so that every part's is of its alignment.
pub(super) fn common_alignment(frames: &[PfnRange]) -> ByteSize {
    let widest = frames.iter().map(|frames| alignment(frames.nr_pages())).max();
    ByteSize::from_pages(widest.unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(sizes: &[u64]) -> Result<Vec<(u64, u64)>, ErrorKind> {
        let part = |&pages| PartSpec::new([ArenaBacking::Heap], ByteSize::from_pages(pages));
        let placed = place(&sizes.iter().map(part).collect::<Vec<_>>());
        let raw = |frames: Vec<PfnRange>| {
            frames.iter().map(|frames| (frames.start().get(), frames.nr_pages())).collect()
        };
        placed.map(raw).map_err(|error| error.kind())
    }

    #[test]
    fn parts_begin_where_their_largest_folio_may() {
        assert_eq!(placed(&[1, 1, 3, 512]), Ok(vec![(0, 1), (1, 1), (4, 3), (512, 512)]));
        assert_eq!(placed(&[512, 512, 1]), Ok(vec![(0, 512), (512, 512), (1024, 1)]));
        let gib = 1 << 18;
        assert_eq!(
            placed(&[1, 3 * gib + 5, gib]),
            Ok(vec![(0, 1), (gib, 3 * gib + 5), (5 * gib, gib)])
        );
    }

    #[test]
    fn sizes_that_nobody_can_have_are_refused() {
        for sizes in [&[][..], &[0], &[1, 0], &[MAX_PAGES, 1], &[1, MAX_PAGES], &[MAX_PAGES + 1]] {
            assert_eq!(placed(sizes), Err(ErrorKind::InvalidSize), "{sizes:?}");
        }
        let odd = PartSpec::new([ArenaBacking::Heap], ByteSize::from_bytes(4097));
        assert_eq!(place(&[odd]).unwrap_err().kind(), ErrorKind::InvalidSize);
        assert_eq!(placed(&[MAX_PAGES]), Ok(vec![(0, MAX_PAGES)]));
    }

    #[test]
    fn the_address_of_frame_0_suits_every_part() {
        let frames = |start, nr_pages| PfnRange::new(Pfn::new(start), nr_pages).unwrap();
        let parts = [frames(0, 1), frames(512, 300)];
        assert_eq!(common_alignment(&parts), ByteSize::from_mib(2));
        assert_eq!(common_alignment(&[frames(0, 1 << 30)]), ByteSize::from_mib(1024));
    }
}
