//! A pool of several zones, and what tests look at there.

use gmem::addr::{ByteSize, Offset, Pgoff};
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, FolioPool, GuestMemfd, PartSpec, PoolStat, Zone};

/// The pages of a folio of 2 MiB.
pub(crate) const FOLIO: u64 = 512;

pub(crate) fn range(start: u64, nr_pages: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(start), nr_pages).unwrap()
}

pub(crate) fn pages(nr_pages: u64) -> ByteSize {
    ByteSize::from_pages(nr_pages)
}

/// So many pages of each zone, of one backing.
pub(crate) fn pool(backing: ArenaBacking, parts: &[(Zone, u64)]) -> FolioPool {
    let part = |nr_pages| PartSpec::new([backing], pages(nr_pages));
    let builder = parts.iter().fold(FolioPool::builder(), |builder, &(zone, nr_pages)| {
        builder.part(part(nr_pages), zone)
    });
    builder.create().unwrap()
}

/// Whether all that is there of the object is in a zone, and something is.
pub(crate) fn is_all_in(memfd: &GuestMemfd, zone: Zone) -> bool {
    let zones = zones_of(memfd);
    !zones.is_empty() && zones.iter().all(|&it| it == zone)
}

/// The zone of each run of folios that are there, in ascending order of pages.
pub(crate) fn zones_of(memfd: &GuestMemfd) -> Vec<Zone> {
    let runs = memfd.frames_of(memfd.pages()).unwrap();
    runs.map(|(_, frames)| memfd.pool().zone_of(frames.start()).unwrap()).collect()
}

/// Gives every page bytes of its own.
pub(crate) fn write_all(memfd: &GuestMemfd) {
    for page in 0..memfd.size().whole_pages() {
        memfd.write(Offset::new(page << 12), &contents(page)).unwrap();
    }
}

pub(crate) fn contents(page: u64) -> [u8; 4096] {
    let mut bytes = [page as u8 | 1; 4096];
    bytes[8..16].copy_from_slice(&page.to_le_bytes());
    bytes
}

pub(crate) fn read_page(memfd: &GuestMemfd, page: u64) -> [u8; 4096] {
    let mut bytes = [0xee; 4096];
    memfd.read(Offset::new(page << 12), &mut bytes).unwrap();
    bytes
}

/// What of the counters may not change while folios move inside of a zone or back and forth.
pub(crate) fn counters(pool: &FolioPool, zone: Zone) -> [ByteSize; 5] {
    let PoolStat { free, reserved, used, quarantined, poisoned, .. } = pool.zone_stat(zone);
    [free, reserved, used, quarantined, poisoned]
}

/// Everything is free and zero.
pub(crate) fn assert_all_back(pool: &FolioPool) {
    let stat = pool.stat();
    assert_eq!(stat.free, stat.capacity, "{stat:?}");
    assert_eq!(pool.verify_scrubbed(), Ok(stat.capacity));
}
