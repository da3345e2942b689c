//! Getting the memory: for each part the first backing that the host can provide.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::heap::HeapMemory;
use super::part::{Spacing, address_alignment, place};
use super::{Arena, ArenaBacking, Memory, Part, PartReport, PartSpec};
use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::{NumaNode, index};
use crate::os::mapping::Mapping;
use crate::os::memory::require_available;
use crate::os::sigbus::stand_once;
use crate::os::{memfd, numa, thp};
use crate::range::PfnRange;

type Obtained = (Arc<Arena>, Vec<PartReport>);

impl Arena {
    /// Gets memory for all parts, or for none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidSize`]; [`ErrorKind::Unsupported`] if a part names no backing, or some parts
    /// would be on the heap and some on files; else what the last backing of a part was refused with:
    /// [`ErrorKind::Unaligned`], [`ErrorKind::MissingCapability`], [`ErrorKind::Exhausted`] or
    /// [`ErrorKind::Os`].
    pub(crate) fn obtain(parts: &[PartSpec]) -> Result<Obtained, Error> {
        if parts.iter().any(|part| part.preference.is_empty()) {
            return Err(none_named());
        }
        let mut backings = parts.iter().flat_map(|part| &part.preference);
        if backings.clone().all(|&backing| backing == ArenaBacking::Heap) {
            return on_heap(parts);
        }
        match parts {
            _ if backings.all(|&backing| backing != ArenaBacking::Heap) => on_files(parts),
            [part] => by_turns(part),
            _ => Err(Error::new(Op::CreatePool, ErrorKind::Unsupported)
                .because("a pool is on the heap as a whole or not at all")),
        }
    }

    /// An arena that needs no operating system.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn heap(nr_pages: u64) -> Result<Arc<Self>, Error> {
        let part = PartSpec::new([ArenaBacking::Heap], ByteSize::from_pages(nr_pages));
        Self::obtain(&[part]).map(|(arena, _)| arena)
    }
}

fn none_named() -> Error {
    Error::new(Op::CreatePool, ErrorKind::Unsupported).because("no backing was named")
}

/// A part that is the whole pool may be on the heap for want of a file, and the other way round.
fn by_turns(part: &PartSpec) -> Result<Obtained, Error> {
    let mut passed_over = Vec::new();
    for &backing in &part.preference {
        match Arena::obtain(&[PartSpec { preference: vec![backing], ..part.clone() }]) {
            Ok((arena, mut reports)) => {
                reports.iter_mut().for_each(|report| report.passed_over.append(&mut passed_over));
                return Ok((arena, reports));
            }
            Err(error) => passed_over.push((backing, error)),
        }
    }
    Err(last(passed_over))
}

/// Why the last backing could not be had either.
fn last(mut passed_over: Vec<(ArenaBacking, Error)>) -> Error {
    passed_over.pop().map_or_else(none_named, |(_, error)| error)
}

fn on_heap(parts: &[PartSpec]) -> Result<Obtained, Error> {
    let frames = place(parts, Spacing::Close)?;
    if parts.iter().any(|part| part.node.is_some()) {
        return Err(Error::new(Op::CreatePool, ErrorKind::Unsupported)
            .because("the heap is of no NUMA node"));
    }
    let align = address_alignment(parts, &frames);
    let nr_pages = end(&frames);
    let memory = Memory::Heap(HeapMemory::new(ByteSize::from_pages(nr_pages), align)?);
    let part = |&frames| Part { frames, backing: ArenaBacking::Heap, node: None, file: None };
    let parts: Box<[_]> = frames.iter().map(part).collect();
    let reports = parts.iter().map(|part| report(part, Vec::new())).collect();
    Ok((Arc::new(Arena::new(memory, parts, nr_pages)), reports))
}

fn on_files(specs: &[PartSpec]) -> Result<Obtained, Error> {
    let frames = place(specs, Spacing::Apart)?;
    let nr_pages = end(&frames);
    // What files hold can go from under their mapping.
    stand_once(Op::CreatePool)?;
    let align = address_alignment(specs, &frames);
    let map = Mapping::reserve(Op::CreatePool, ByteSize::from_pages(nr_pages), align)?;
    let mut parts = Vec::new();
    let mut reports = Vec::new();
    for (spec, &frames) in specs.iter().zip(&frames) {
        let (part, passed_over) = first_to_be_had(&map, spec, frames)?;
        reports.push(report(&part, passed_over));
        parts.push(part);
    }
    let memory = Memory::Files(map);
    let parts = parts.into_boxed_slice();
    Ok((Arc::new(Arena::new(memory, parts, nr_pages)), reports))
}

fn first_to_be_had(
    map: &Mapping,
    spec: &PartSpec,
    frames: PfnRange,
) -> Result<(Part, Vec<(ArenaBacking, Error)>), Error> {
    let mut passed_over = Vec::new();
    for &backing in &spec.preference {
        match file_behind(map, frames, backing, spec.node) {
            Ok(file) => {
                let part = Part { frames, backing, node: spec.node, file: Some(file) };
                return Ok((part, passed_over));
            }
            Err(error) => passed_over.push((backing, error)),
        }
        // With the mapping goes the memory that the file may have got.
        let (at, len) = bytes(frames);
        map.unmap(at, len)?;
    }
    Err(last(passed_over))
}

/// Puts a file behind the frames and gives it its memory.
fn file_behind(
    map: &Mapping,
    frames: PfnRange,
    backing: ArenaBacking,
    node: Option<NumaNode>,
) -> Result<OwnedFd, Error> {
    let kind = backing.pages().ok_or_else(none_named)?;
    let size = frames.len_bytes();
    admit(backing, size, node)?;
    let file = memfd::create_arena(kind, size)?;
    let (at, len) = bytes(frames);
    map.map_uncommitted(at, len, file.as_fd())?;
    map.keep_private(at, len)?;
    // From here on pages come to be, and where they come from is settled.
    if let Some(node) = node {
        numa::bind(map, at, len, node)?;
    }
    if backing == ArenaBacking::MemfdThp {
        // Through the mapping: fallocate would not see the advice.
        map.want_huge(at, len)?;
        map.populate(at, len)?;
    } else {
        memfd::commit(file.as_fd(), kind, size)?;
    }
    map.forbid_collapse(at, len)?;
    Ok(file)
}

/// Refuses what is known beforehand not to be had.
fn admit(backing: ArenaBacking, size: ByteSize, node: Option<NumaNode>) -> Result<(), Error> {
    let unit = backing.view_granule();
    if size.whole_pages() % unit.nr_pages() != 0 {
        return Err(Error::new(Op::CreatePool, ErrorKind::Unaligned)
            .because(format!("hugetlb wants a multiple of {} MiB", unit.bytes().get() >> 20)));
    }
    if backing == ArenaBacking::MemfdThp {
        thp::require_shmem()?;
    }
    if let Some(node) = node {
        numa::require(node)?;
    }
    if backing.is_hugetlb() {
        return Ok(());
    }
    require_available(size)?;
    node.map_or(Ok(()), |node| numa::require_available(node, size))
}

/// One past the last frame.
fn end(frames: &[PfnRange]) -> u64 {
    frames.last().map_or(0, |frames| frames.end().get())
}

/// Where frames are in the arena's mapping.
pub(super) fn bytes(frames: PfnRange) -> (usize, usize) {
    (index(frames.start().pa().get()), index(frames.len_bytes().get()))
}

fn report(part: &Part, passed_over: Vec<(ArenaBacking, Error)>) -> PartReport {
    let Part { frames, backing, node, .. } = *part;
    PartReport { backing, frames, node, passed_over }
}
