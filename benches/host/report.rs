//! Rows for the reader: what design/host.md says that something costs, beside what it is instead of.

use gmem::addr::{ByteSize, Offset};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, ViewMapping, ViewOptions, ViewPath, Visibility};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bare::{self, HUGE, PAGE, Pages};
use crate::harness::{Bench, Row};
use crate::{MIB, Outcome, allow, backing, both_ways, convert, range};

fn object(pages: Pages) -> Outcome<GuestMemfd> {
    let size = ByteSize::from_bytes(8 * MIB as u64);
    let pool = FolioPool::new(backing(pages), size)?;
    Ok(GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?)
}

/// A page of a view by `MAP_FIXED`.
pub(crate) fn fixed(bench: &mut Bench) -> Outcome<()> {
    let (ours, other) = (object(Pages::Small)?, object(Pages::Small)?);
    let _fixed = ours.map_view_with(&ViewOptions::default().path(ViewPath::Fixed))?;
    let _registered = other.map_view()?;
    let page = range(HUGE + 7 * PAGE, PAGE);
    bench.row(
        Row::new("report_fixed_4k", "userfaultfd", 2_000),
        || both_ways(&ours, page),
        || both_ways(&other, page),
    );
    Ok(())
}

/// The first page of an open block, which has its huge entry again each time. The peer's block stays closed.
pub(crate) fn close(bench: &mut Bench) -> Outcome<()> {
    let _setting = allow(Pages::Transparent, 0);
    let (ours, other) = (object(Pages::Transparent)?, object(Pages::Transparent)?);
    let (view, _other) = (ours.map_view()?, other.map_view()?);
    let (page, block) = (range(HUGE + 7 * PAGE, PAGE), range(HUGE, HUGE));
    let huge = || view.regain_huge(block).expect("room for a mapping");
    convert(&ours, page, Visibility::Private);
    convert(&ours, page, Visibility::Shared);
    if huge().get() == 0 || view.huge().get() == 0 {
        return Err("no block is mapped by a huge entry".into());
    }
    bench.row(
        Row::new("report_close_and_regain", "closed_already", 200),
        || {
            both_ways(&ours, page);
            huge()
        },
        || both_ways(&other, page),
    );
    Ok(())
}

/// 2 MiB of small pages to private and back, all touched in between.
pub(crate) fn lazy(bench: &mut Bench) -> Outcome<()> {
    let (ours, other) = (object(Pages::Small)?, object(Pages::Small)?);
    let lazy = ours.map_view_with(&ViewOptions::default().mapping(ViewMapping::Lazy))?;
    let eager = other.map_view()?;
    let pointer = |view: &gmem::HostView| {
        let at = view.pointer(Offset::new(HUGE as u64), ByteSize::from_mib(2));
        at.map(|at| at.as_ptr()).ok_or("no pointer")
    };
    let (our_place, other_place) = (pointer(&lazy)?, pointer(&eager)?);
    let block = range(HUGE, HUGE);
    bench.row(
        Row::new("report_lazy_2m_untouched", "eager", 100),
        || both_ways(&ours, block),
        || both_ways(&other, block),
    );
    bench.row(
        Row::new("report_lazy_2m_touched", "eager", 100),
        || {
            both_ways(&ours, block);
            bare::touch(our_place, HUGE)
        },
        || {
            both_ways(&other, block);
            bare::touch(other_place, HUGE)
        },
    );
    Ok(())
}

/// Short checked reads, which go by words of 8 bytes.
pub(crate) fn short_reads(bench: &mut Bench) -> Outcome<()> {
    let size = ByteSize::from_mib(2);
    let pool = FolioPool::new(ArenaBacking::Memfd, size)?;
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool)?;
    memfd.write(Offset::new(0), &[7; PAGE])?;
    let plain: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 * MIB)])?;
    plain.write_slice(&[7; PAGE], GuestAddress(0))?;
    let (mut ours, mut theirs) = ([0; PAGE], [0; PAGE]);
    for (name, len) in
        [("report_read_64", 64), ("report_read_256", 256), ("report_read_1024", 1024)]
    {
        bench.row(
            Row::new(name, "vm_memory_read_slice", 20_000),
            || memfd.read(Offset::new(0), &mut ours[..len]).expect("shared memory"),
            || plain.read_slice(&mut theirs[..len], GuestAddress(0)).expect("memory"),
        );
    }
    Ok(())
}
