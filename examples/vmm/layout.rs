//! The machine as both sides know it: where memory lies, and which registers there are.

use gmem::addr::{ByteSize, Gfn, Ipa, Offset, Pgoff};
use gmem::error::Error;
use gmem::range::{GfnRange, PgoffRange};

use crate::Fallible;

const PAGE: u64 = 4096;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Where guest memory begins; it is the object from its first page on.
pub(crate) const RAM: u64 = 0x8000_0000;
pub(crate) const RAM_BYTES: u64 = 64 * MIB;

/// What the VMM leaves for the guest before it boots.
pub(crate) mod params {
    pub(crate) const BASE: u64 = super::RAM;
    pub(crate) const BYTES: usize = 72;
    pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"gmemboot");
    // Offsets: magic, lengths of payload and disk in bytes, the unit in which memory can be shared,
    // the payload's SHA-256, and whether what is shared stays so for good.
    pub(crate) const AT_MAGIC: usize = 0;
    pub(crate) const AT_PAYLOAD_BYTES: usize = 8;
    pub(crate) const AT_DISK_BYTES: usize = 16;
    pub(crate) const AT_SHARE_UNIT: usize = 24;
    pub(crate) const AT_PAYLOAD_SHA256: usize = 32;
    pub(crate) const AT_STAYS_SHARED: usize = 64;
}

/// Guest-private words through which the two vCPUs work together.
pub(crate) mod control {
    const BASE: u64 = super::RAM + super::PAGE;
    /// 0 while vCPU 0 sets up, 1 when it has, 2 when vCPU 1 has seen it.
    pub(crate) const BOOT: u64 = BASE;
    /// Chunks that vCPU 0 has put into the ring.
    pub(crate) const PRODUCED: u64 = BASE + 8;
    /// Chunks that vCPU 1 has taken out of it.
    pub(crate) const CONSUMED: u64 = BASE + 16;
    /// One more than the number of chunks there will be; 0 while unknown.
    pub(crate) const END: u64 = BASE + 24;
    /// 1 when the digest is there.
    pub(crate) const DIGEST_READY: u64 = BASE + 32;
    pub(crate) const DIGEST: u64 = BASE + 64;
    /// How many bytes each chunk in the ring has.
    pub(crate) const LENS: u64 = BASE + 256;
    pub(crate) const BYTES: usize = 4096;
    pub(crate) const START: u64 = BASE;
}

/// The payload, as a kernel image would be: begins and ends within a folio.
pub(crate) const PAYLOAD: u64 = RAM + 2 * MIB;
pub(crate) const PAYLOAD_BYTES: usize = (3 << 20) + (40 << 10);

/// The ring in private memory that carries the disk's bytes from vCPU 0 to vCPU 1.
pub(crate) const RING: u64 = RAM + 16 * MIB;
pub(crate) const RING_SLOTS: u64 = 12;

/// How many bytes a disk request asks for, at most.
pub(crate) const CHUNK: u64 = 256 * KIB;

/// The first shared area: the virtqueue, request headers, and the page of the guest's report.
pub(crate) const QUEUE: u64 = RAM + 32 * MIB;
pub(crate) const QUEUE_PAGES: u64 = 5;
pub(crate) const QUEUE_SIZE: u16 = 32;
pub(crate) const DESC_TABLE: u64 = QUEUE;
pub(crate) const AVAIL_RING: u64 = QUEUE + PAGE;
pub(crate) const USED_RING: u64 = QUEUE + 2 * PAGE;
pub(crate) const HEADERS: u64 = QUEUE + 3 * PAGE;
pub(crate) const STATUSES: u64 = QUEUE + 3 * PAGE + 2048;
pub(crate) const REPORT: u64 = QUEUE + 4 * PAGE;

/// The second shared area: buffers for the disk, and a page more that borders on private memory.
/// Begins and ends within a folio, so that folios hold private and shared pages side by side.
pub(crate) const BOUNCE: u64 = RAM + 33 * MIB + 200 * KIB;
pub(crate) const BOUNCE_SLOTS: u64 = 8;
pub(crate) const BOUNCE_PAGES: u64 = BOUNCE_SLOTS * CHUNK / PAGE + 1;

/// What the guest shares, as start and number of pages, if it can only share whole units.
pub(crate) fn shared_areas(unit: u64) -> Vec<(u64, u64)> {
    let unit = unit.max(PAGE);
    let mut areas: Vec<(u64, u64)> = Vec::new();
    for (start, nr_pages) in [(QUEUE, QUEUE_PAGES), (BOUNCE, BOUNCE_PAGES)] {
        let end = (start + nr_pages * PAGE).next_multiple_of(unit);
        let start = start - start % unit;
        match areas.last_mut() {
            Some(last) if last.0 + last.1 * PAGE >= start => last.1 = (end - last.0) / PAGE,
            _ => areas.push((start, (end - start) / PAGE)),
        }
    }
    areas
}

/// What the guest tells its owner at the end, in the report page.
pub(crate) mod report {
    pub(crate) const BYTES: usize = 64;
    pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"gmemdone");
    pub(crate) const AT_MAGIC: usize = 0;
    pub(crate) const AT_DISK_BYTES: usize = 8;
    pub(crate) const AT_DIGEST: usize = 32;
}

/// The board's own registers, 32 bits each.
pub(crate) mod board {
    pub(crate) const BASE: u64 = 0x0900_0000;
    /// Write: one byte for the console.
    pub(crate) const CONSOLE: u64 = BASE;
    /// Read: returns when an interrupt is pending, or after a while. Stands for WFI.
    pub(crate) const WAIT: u64 = BASE + 4;
    /// Write: the report page holds a report.
    pub(crate) const REPORT_READY: u64 = BASE + 8;
    pub(crate) const END: u64 = BASE + 12;
}

/// The disk's registers: virtio over MMIO, version 2.
pub(crate) mod virtio {
    pub(crate) const BASE: u64 = 0x0a00_0000;
    pub(crate) const END: u64 = BASE + 0x200;
    pub(crate) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
    pub(crate) const VERSION: u32 = 2;
    pub(crate) const BLOCK: u32 = 2;
}

/// Bytes in a sector of a virtio disk.
pub(crate) const SECTOR: u64 = 512;

/// The guest frames of an area.
pub(crate) fn frames(start: u64, nr_pages: u64) -> Result<GfnRange, Error> {
    GfnRange::new(Ipa::new(start).gfn(), nr_pages)
}

/// The lower 32 bits.
pub(crate) fn low_half(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// All of guest memory.
pub(crate) fn ram() -> Result<GfnRange, Error> {
    frames(RAM, ByteSize::from_bytes(RAM_BYTES).whole_pages())
}

/// Where in the object a guest address lies; `None` outside of guest memory.
pub(crate) fn offset_of(ipa: u64) -> Option<Offset> {
    ipa.checked_sub(RAM).filter(|&at| at < RAM_BYTES).map(Offset::new)
}

/// The same, where the address has to be one of guest memory.
pub(crate) fn offset(ipa: u64) -> Fallible<Offset> {
    offset_of(ipa).ok_or_else(|| format!("{ipa:#x} is no guest memory").into())
}

/// The pages of the object that are these guest frames.
pub(crate) fn pages_of(frames: GfnRange) -> Result<PgoffRange, Error> {
    let first: Gfn = Ipa::new(RAM).gfn();
    let start = frames.start().get().saturating_sub(first.get());
    PgoffRange::new(Pgoff::new(start), frames.nr_pages())
}

// Every area ends before the next one begins.
const _: () = assert!(PAYLOAD + PAYLOAD_BYTES as u64 <= RING);
const _: () = assert!(RING + RING_SLOTS * CHUNK <= QUEUE);
const _: () = assert!(QUEUE + QUEUE_PAGES * PAGE < BOUNCE);
const _: () = assert!(BOUNCE + BOUNCE_PAGES * PAGE < QUEUE + 4 * MIB);
const _: () = assert!(QUEUE + 4 * MIB < RAM + RAM_BYTES);
const _: () = assert!(BOUNCE % PAGE == 0 && CHUNK % PAGE == 0 && CHUNK % SECTOR == 0);
// Three descriptors for each buffer, and three for a request of another kind.
const _: () = assert!((BOUNCE_SLOTS + 1) * 3 <= QUEUE_SIZE as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_shared_in_whole_units() {
        assert_eq!(shared_areas(0), [(QUEUE, QUEUE_PAGES), (BOUNCE, BOUNCE_PAGES)]);
        assert_eq!(shared_areas(PAGE), shared_areas(0));
        assert_eq!(shared_areas(2 * MIB), [(QUEUE, 1024)]);
    }

    #[test]
    fn what_is_no_guest_memory_has_no_offset() {
        assert_eq!(offset_of(RAM), Some(Offset::new(0)));
        assert_eq!(offset_of(RAM - 1), None);
        assert_eq!(offset_of(RAM + RAM_BYTES), None);
    }
}
