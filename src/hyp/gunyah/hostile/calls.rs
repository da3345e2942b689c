//! Hypercalls with any registers, mostly of what there is.

use super::super::World;
use super::super::cspace::{CapId, Rights};
use super::super::hypercall::*;
use super::Step;
use super::judge::Zeroed;
use super::vms::{BARE, Holder, PAGE, RAM, Vms, bare};
use crate::addr::Pfn;
use crate::geometry::PAGE_SHIFT;
use crate::hyp::choices::Choices;
use crate::range::PfnRange;

/// More extents than these are given up again.
const MOST_EXTENTS: usize = 10;

/// A call's number and registers.
fn call_of(choices: &mut Choices<'_>, holder: &Holder) -> (u64, [u64; 7]) {
    let cap = |choices: &mut Choices<'_>, all: &[u64]| match choices.one_in(20) {
        true => choices.odd(),
        false => choices.of(all),
    };
    let extent = cap(choices, &holder.extents);
    let other = cap(choices, &holder.extents);
    let space = cap(choices, &holder.spaces);
    // Of extents that begin at 0, and of those that begin with the frames.
    let pages = choices.of(&[0, 1, 3, 0xf, 0x10, BARE, BARE, BARE + 4, BARE + 0x10, RAM]);
    let offset = if choices.one_in(24) { choices.odd() } else { pages * PAGE };
    let nr = choices.of(&[1, 1, 2, 4, 0x10, 0x20, 0x21]);
    let size = if choices.one_in(24) { choices.odd() } else { nr * PAGE };
    let at = match choices.below(12) {
        0 => choices.odd(),
        _ => choices.of(&[0x4000, 0x4001, 0x4010, 0x3fff]) * PAGE,
    };
    let attrs = choices.of(&[0xf_0077, 0xf_0066, 0xf_0044, 0x5_0066, 0x1_0066]);
    match choices.below(20) {
        0..=3 => (ASPACE_MAP, [space, extent, at, attrs, PARTIAL, offset, size]),
        4 => (ASPACE_MAP, [space, extent, at, attrs, 0, 0, 0]),
        5 | 6 => match holder.mapped.filter(|_| !choices.one_in(3)) {
            Some([space, extent, at, offset, size]) => {
                (ASPACE_UNMAP, [space, extent, at, PARTIAL, offset, size, 0])
            }
            None => (ASPACE_UNMAP, [space, extent, at, PARTIAL, offset, size, 0]),
        },
        7..=10 => {
            let how = choices.below(3);
            let (from, to) = match (how, &holder.extents[..]) {
                (0, [_, root, children @ ..]) if !children.is_empty() => {
                    (*root, choices.of(children))
                }
                (1, [_, root, children @ ..]) if !children.is_empty() => {
                    (choices.of(children), *root)
                }
                (2, [_, _, children @ ..]) if !children.is_empty() => {
                    (choices.of(children), choices.of(children))
                }
                _ => (extent, other),
            };
            let (from, to) = if choices.one_in(4) { (extent, other) } else { (from, to) };
            (EXTENT_DONATE, [how, from, to, offset, size, 0, 0])
        }
        11 => (ASPACE_UPDATE_ACCESS, [space, extent, at, 0x44, 0, 0, 0]),
        12..=14 => {
            let flags = choices.of(&[0, 1 | NO_SYNC, 1 | NO_SYNC, 2 | NO_SYNC, 255]);
            (EXTENT_MODIFY, [extent, flags, offset, size, 0, 0, 0])
        }
        15 | 16 => {
            let attrs = choices.of(&[7, 7 | 1 << 16, 4, 6 | 1 << 16, 7 | 2 << 8]);
            (EXTENT_DERIVE, [extent, offset, size, attrs, 0, 0, 0])
        }
        17 => (EXTENT_CONFIGURE, [extent, offset, size, choices.of(&[7, 7 | 1 << 16]), 0, 0, 0]),
        18 => {
            let at = at.wrapping_add(choices.of(&[0, 1, 8]));
            (
                ASPACE_CONFIGURE_VMMIO,
                [space, at, choices.of(&[8, 8, size]), choices.below(2), 0, 0, 0],
            )
        }
        _ => (ASPACE_LOOKUP, [space, extent, at, size, 0, 0, 0]),
    }
}

impl Vms {
    pub(super) fn hypercall(&mut self, choices: &mut Choices<'_>) -> Step {
        let Self { gunyah, holders, .. } = self;
        let holder = &mut holders[usize::from(choices.one_in(4))];
        let (mut number, mut x) = call_of(choices, holder);
        match choices.below(24) {
            0 => number = choices.odd(),
            1 => number = choices.of(&[0x602a, 0x602e, 0x6034, 0x605b, 0x6061]),
            2 => x = [0; 7].map(|_: u64| choices.odd()),
            3..=5 => x[choices.index(7)] = choices.odd(),
            _ => {}
        }
        let zeroes = number == EXTENT_MODIFY && x[1] & 0xff == 1;
        gunyah.with(|world| {
            let cleared = if zeroes { owned(world, holder, x) } else { Vec::new() };
            let answer = world.hyp.hypercall(&mut holder.caps, number, x);
            let refused = answer[0] != 0;
            if !refused && (number, x[4]) == (ASPACE_MAP, PARTIAL) {
                holder.mapped = Some([x[0], x[1], x[2], x[5], x[6]]);
            }
            if !refused && matches!(number, EXTENT_DERIVE | EXTENT_CONFIGURE) {
                keep(world, holder, answer[1]);
            }
            Step {
                refused,
                zeroed: match zeroes && !refused {
                    true => Zeroed::Exactly(cleared),
                    false => Zeroed::None,
                },
                within: bare().ok(),
                ..Step::named(format!("call {number:#x} {:#x}", answer[0]))
            }
        })
    }
}

/// What the extent has of the bytes that a call names.
fn owned(world: &World, holder: &Holder, x: [u64; 7]) -> Vec<Pfn> {
    use super::super::memdb::Owner;
    let Ok(id) = holder.caps.extent(x[0], Rights::of(0)) else { return Vec::new() };
    let Some(extent) = world.hyp.extents.get(&id) else { return Vec::new() };
    let start = extent.frames.start().checked_add(x[2] >> PAGE_SHIFT);
    let frames = start.and_then(|start| PfnRange::new(start, x[3] >> PAGE_SHIFT).ok());
    let Some(frames) = frames.and_then(|frames| frames.intersection(&extent.frames)) else {
        return Vec::new();
    };
    let pieces = world.hyp.memdb.walk(frames, Owner::Extent(id));
    pieces.iter().flat_map(|piece| piece.iter()).collect()
}

/// A new extent stays, unless there are many.
fn keep(world: &mut World, holder: &mut Holder, cap: u64) {
    if holder.extents.len() < MOST_EXTENTS {
        holder.extents.push(cap);
        return;
    }
    let Ok(id) = holder.caps.extent(cap, Rights::of(0)) else { return };
    if world.hyp.delete_extent(id).is_ok() {
        holder.caps.remove(CapId(cap)).ok();
    }
}
