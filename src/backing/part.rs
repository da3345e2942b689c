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

/// Whether the frames of one part may follow those of another at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    Close,
    /// There is always a gap. So a run of frames is of one file, and a mapping of it is one mapping,
    /// which userfaultfd insists on.
    Apart,
}

/// Where the parts lie: behind one another, with gaps where alignment or spacing wants them.
///
/// # Errors
/// [`ErrorKind::InvalidSize`] if there are none, if one is empty or no whole number of pages, or if
/// there are no frame numbers for so many.
pub(super) fn place(parts: &[PartSpec], spacing: Spacing) -> Result<Vec<PfnRange>, Error> {
    let invalid = || Error::new(Op::CreatePool, ErrorKind::InvalidSize);
    let mut free = 0_u64;
    let mut placed = Vec::new();
    for part in parts {
        let nr_pages = part.size.whole_pages();
        if !part.size.is_page_aligned() || nr_pages > MAX_PAGES {
            return Err(invalid());
        }
        let start = free.checked_next_multiple_of(alignment(nr_pages)).ok_or_else(invalid)?;
        let frames = PfnRange::new(Pfn::new(start), nr_pages).map_err(|_| invalid())?;
        free = frames.end().get() + u64::from(spacing == Spacing::Apart);
        placed.push(frames);
    }
    if placed.is_empty() { Err(invalid()) } else { Ok(placed) }
}

/// What the address of frame 0 must be a multiple of, so that every part can be mapped by pages as large
/// as it may have.
pub(super) fn address_alignment(parts: &[PartSpec], frames: &[PfnRange]) -> ByteSize {
    let largest = frames.iter().map(|frames| alignment(frames.nr_pages())).max().unwrap_or(1);
    let wanted = parts.iter().flat_map(|part| &part.preference).map(|it| it.view_granule()).max();
    let wanted = wanted.unwrap_or_default().max(FolioSize::Huge2M);
    ByteSize::from_pages(largest).min(wanted.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(spacing: Spacing, sizes: &[u64]) -> Result<Vec<(u64, u64)>, ErrorKind> {
        let part = |&pages| PartSpec::new([ArenaBacking::Heap], ByteSize::from_pages(pages));
        let placed = place(&sizes.iter().map(part).collect::<Vec<_>>(), spacing);
        let raw = |frames: Vec<PfnRange>| {
            frames.iter().map(|frames| (frames.start().get(), frames.nr_pages())).collect()
        };
        placed.map(raw).map_err(|error| error.kind())
    }

    #[test]
    fn parts_begin_where_their_largest_folio_may() {
        let close = |sizes: &[u64]| placed(Spacing::Close, sizes);
        assert_eq!(close(&[1, 1, 3, 512]), Ok(vec![(0, 1), (1, 1), (4, 3), (512, 512)]));
        assert_eq!(close(&[512, 512, 1]), Ok(vec![(0, 512), (512, 512), (1024, 1)]));
        let gib = 1 << 18;
        assert_eq!(
            close(&[1, 3 * gib + 5, gib]),
            Ok(vec![(0, 1), (gib, 3 * gib + 5), (5 * gib, gib)])
        );
    }

    #[test]
    fn parts_on_files_never_touch() {
        let apart = |sizes: &[u64]| placed(Spacing::Apart, sizes);
        assert_eq!(apart(&[512, 512, 1]), Ok(vec![(0, 512), (1024, 512), (1537, 1)]));
        assert_eq!(apart(&[1, 1, 3]), Ok(vec![(0, 1), (2, 1), (4, 3)]));
    }

    #[test]
    fn sizes_that_nobody_can_have_are_refused() {
        let most = MAX_PAGES;
        for spacing in [Spacing::Close, Spacing::Apart] {
            for sizes in [&[][..], &[0], &[1, 0], &[most, 1], &[1, most], &[most + 1]] {
                assert_eq!(placed(spacing, sizes), Err(ErrorKind::InvalidSize), "{sizes:?}");
            }
            assert_eq!(placed(spacing, &[most]), Ok(vec![(0, most)]));
        }
        let odd = PartSpec::new([ArenaBacking::Heap], ByteSize::from_bytes(4097));
        assert_eq!(place(&[odd], Spacing::Close).unwrap_err().kind(), ErrorKind::InvalidSize);
    }

    #[test]
    fn the_address_of_frame_0_suits_every_part() {
        let mib = |backing, size| PartSpec::new([backing], ByteSize::from_mib(size));
        let alignment = |parts: &[PartSpec]| {
            address_alignment(parts, &place(parts, Spacing::Apart).unwrap()).get() >> 10
        };
        let [small, large] = [1, 3 << 10].map(|size| mib(ArenaBacking::Memfd, size));
        assert_eq!(alignment(std::slice::from_ref(&small)), 1 << 10);
        assert_eq!(alignment(&[small.clone(), large]), 2 << 10);
        let giant = mib(ArenaBacking::MemfdHugetlb1G, 1 << 10);
        assert_eq!(alignment(&[small, giant]), 1 << 20);
    }
}
