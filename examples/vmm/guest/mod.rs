//! The guest: ordinary Rust that reaches memory and devices only through its vCPU.
//!
//! vCPU 0 checks what it was booted with, shares what the disk needs, drives the disk, and copies
//! what arrives into private memory. vCPU 1 hashes it there. Then vCPU 0 reports, takes back what it
//! had shared, and powers off. Where the hypervisor has no call to share memory, as for a guest that
//! is not protected, all of it is the host's to see, and nothing is shared or taken back.

mod driver;
mod malice;

use sha2::{Digest, Sha256};

use crate::Fallible;
use crate::cpu::Cpu;
use crate::layout::{
    BOUNCE, BOUNCE_SLOTS, CHUNK, PAYLOAD, PAYLOAD_BYTES, REPORT, RING, RING_SLOTS, SECTOR, board,
    control, params, report, shared_areas,
};
use driver::{Driver, Request};
use malice::Malice;

/// How much a vCPU moves at a time: what a loop of loads and stores would do through its cache.
const BURST: usize = 64 << 10;

/// What the guest was told at boot.
struct Params {
    payload_bytes: u64,
    disk_bytes: u64,
    share_unit: u64,
    /// What is shared stays so for good.
    stays_shared: bool,
    payload_sha256: [u8; 32],
}

/// The program of vCPU 0.
pub(crate) fn boot(cpu: &mut Cpu) -> Fallible<()> {
    let params = read_params(cpu)?;
    verify_payload(cpu, &params)?;
    cpu.store(control::START, &[0; control::BYTES])?;

    let is_protected = cpu.has_private_memory()?;
    let shared = if is_protected { shared_areas(params.share_unit) } else { Vec::new() };
    for page in shared.iter().flat_map(pages) {
        cpu.share_page(page)?;
    }
    let nr_pages: u64 = shared.iter().map(|(_, nr_pages)| nr_pages).sum();
    cpu.print(&match is_protected {
        true => format!("shared {nr_pages} pages for the virtqueue and bounce buffers"),
        false => "there is no call to share memory: the host sees all of it".to_owned(),
    })?;
    let mut disk = Driver::start(cpu)?;
    let sectors = params.disk_bytes.div_ceil(SECTOR);
    if disk.capacity_sectors() != sectors {
        return Err(
            format!("the disk has {} sectors, not {sectors}", disk.capacity_sectors()).into()
        );
    }
    let id = disk.id(cpu)?;
    cpu.print(&format!("disk {id:?}, {} bytes in {sectors} sectors", params.disk_bytes))?;

    cpu.store_u64(control::BOOT, 1)?;
    let malice = match shared.last().and_then(|area| pages(area).last()) {
        Some(border) => Malice::of_protected(border),
        None => Malice::of_non_protected(),
    };
    read_disk(cpu, &mut disk, params.disk_bytes, &malice)?;
    send_report(cpu, params.disk_bytes)?;

    disk.stop(cpu)?;
    if !params.stays_shared {
        for page in shared.iter().flat_map(pages) {
            cpu.unshare_page(page)?;
        }
    }
    cpu.print(match is_protected {
        true if params.stays_shared => "what was shared stays so; powering off",
        true => "took back every shared page; powering off",
        false => "powering off",
    })
}

/// The program of vCPU 1.
pub(crate) fn hash(cpu: &mut Cpu) -> Fallible<()> {
    while cpu.compare_exchange_u64(control::BOOT, 1, 2)? != 1 {
        cpu.relax()?;
    }
    let mut hasher = Sha256::new();
    let mut buf = vec![0; BURST];
    let mut consumed = 0;
    loop {
        if consumed < cpu.load_u64(control::PRODUCED)? {
            let slot = consumed % RING_SLOTS;
            let len = cpu.load_u64(control::LENS + slot * 8)?.min(CHUNK);
            for (at, len) in bursts(len) {
                cpu.load(RING + slot * CHUNK + at, &mut buf[..len])?;
                hasher.update(&buf[..len]);
            }
            consumed += 1;
            cpu.store_u64(control::CONSUMED, consumed)?;
        } else if cpu.load_u64(control::END)? == consumed + 1 {
            break;
        } else {
            cpu.relax()?;
        }
    }
    cpu.store(control::DIGEST, &hasher.finalize())?;
    cpu.store_u64(control::DIGEST_READY, 1)
}

fn read_params(cpu: &mut Cpu) -> Fallible<Params> {
    let mut raw = [0; params::BYTES];
    cpu.load(params::BASE, &mut raw)?;
    if word(&raw, params::AT_MAGIC) != params::MAGIC {
        return Err("there are no boot parameters where they should be".into());
    }
    let mut payload_sha256 = [0; 32];
    payload_sha256.copy_from_slice(&raw[params::AT_PAYLOAD_SHA256..][..32]);
    Ok(Params {
        payload_bytes: word(&raw, params::AT_PAYLOAD_BYTES),
        disk_bytes: word(&raw, params::AT_DISK_BYTES),
        share_unit: word(&raw, params::AT_SHARE_UNIT),
        stays_shared: word(&raw, params::AT_STAYS_SHARED) != 0,
        payload_sha256,
    })
}

fn verify_payload(cpu: &mut Cpu, params: &Params) -> Fallible<()> {
    if params.payload_bytes != PAYLOAD_BYTES as u64 {
        return Err(format!("a payload of {} bytes is not mine", params.payload_bytes).into());
    }
    let mut hasher = Sha256::new();
    let mut buf = vec![0; BURST];
    for (at, len) in bursts(params.payload_bytes) {
        cpu.load(PAYLOAD + at, &mut buf[..len])?;
        hasher.update(&buf[..len]);
    }
    if hasher.finalize().as_slice() != params.payload_sha256 {
        return Err("the payload is not what was preloaded".into());
    }
    cpu.print(&format!("payload of {} bytes is intact", params.payload_bytes))
}

/// The addresses of an area's pages.
fn pages(area: &(u64, u64)) -> impl Iterator<Item = u64> + use<> {
    let (start, nr_pages) = *area;
    (0..nr_pages).map(move |page| start + page * 4096)
}

/// Reads the whole disk through the bounce buffers into the ring. Half way, malice strikes.
fn read_disk(cpu: &mut Cpu, disk: &mut Driver, disk_bytes: u64, malice: &Malice) -> Fallible<()> {
    let chunks = disk_bytes.div_ceil(CHUNK);
    let mut buf = vec![0; BURST];
    let mut submitted = 0;
    for chunk in 0..chunks {
        if chunk == chunks / 2 {
            malice.strike(cpu, disk)?;
        }
        let before = submitted;
        while submitted < chunks && submitted < chunk + BOUNCE_SLOTS {
            let len = len_of(submitted, disk_bytes).next_multiple_of(SECTOR);
            let slot = submitted % BOUNCE_SLOTS;
            let data = BOUNCE + slot * CHUNK;
            disk.submit(cpu, slot, &Request::read(submitted * (CHUNK / SECTOR), data, len))?;
            submitted += 1;
        }
        if submitted != before {
            disk.notify(cpu)?;
        }
        let slot = chunk % BOUNCE_SLOTS;
        let status = disk.wait(cpu, slot)?;
        if status != driver::OK {
            return Err(format!("the disk answered a read with status {status}").into());
        }
        wait_for_room(cpu, chunk)?;
        let (from, to) = (BOUNCE + slot * CHUNK, RING + (chunk % RING_SLOTS) * CHUNK);
        let len = len_of(chunk, disk_bytes);
        for (at, len) in bursts(len) {
            cpu.load(from + at, &mut buf[..len])?;
            cpu.store(to + at, &buf[..len])?;
        }
        cpu.store_u64(control::LENS + (chunk % RING_SLOTS) * 8, len)?;
        cpu.store_u64(control::PRODUCED, chunk + 1)?;
    }
    if chunks == 0 {
        malice.strike(cpu, disk)?;
    }
    cpu.store_u64(control::END, chunks + 1)
}

/// Until vCPU 1 has read what this place in the ring held before.
fn wait_for_room(cpu: &mut Cpu, chunk: u64) -> Fallible<()> {
    while chunk >= cpu.load_u64(control::CONSUMED)? + RING_SLOTS {
        cpu.relax()?;
    }
    Ok(())
}

fn send_report(cpu: &mut Cpu, disk_bytes: u64) -> Fallible<()> {
    while cpu.load_u64(control::DIGEST_READY)? == 0 {
        cpu.relax()?;
    }
    let mut raw = [0; report::BYTES];
    raw[report::AT_MAGIC..][..8].copy_from_slice(&report::MAGIC.to_le_bytes());
    raw[report::AT_DISK_BYTES..][..8].copy_from_slice(&disk_bytes.to_le_bytes());
    cpu.load(control::DIGEST, &mut raw[report::AT_DIGEST..][..32])?;
    cpu.store(REPORT, &raw)?;
    cpu.store_u32(board::REPORT_READY, 1)
}

/// How many bytes of the disk are in a chunk.
fn len_of(chunk: u64, disk_bytes: u64) -> u64 {
    disk_bytes.saturating_sub(chunk * CHUNK).min(CHUNK)
}

/// Cuts `len` bytes into what is moved at a time.
fn bursts(len: u64) -> impl Iterator<Item = (u64, usize)> {
    let left = move |at| usize::try_from(len - at).unwrap_or(usize::MAX);
    (0..len).step_by(BURST).map(move |at| (at, left(at).min(BURST)))
}

/// The little-endian word at `at`.
pub(crate) fn word(raw: &[u8], at: usize) -> u64 {
    raw.iter().skip(at).take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_cover_a_length_exactly() {
        for len in [0, 1, BURST as u64, BURST as u64 + 1, CHUNK] {
            let mut next = 0;
            for (at, len) in bursts(len) {
                assert_eq!(at, next);
                next += len as u64;
            }
            assert_eq!(next, len);
        }
    }

    #[test]
    fn the_last_chunk_is_what_is_left() {
        assert_eq!(len_of(0, 0), 0);
        assert_eq!(len_of(0, CHUNK + 1), CHUNK);
        assert_eq!(len_of(1, CHUNK + 1), 1);
    }

    #[test]
    fn words_are_little_endian() {
        assert_eq!(word(&[0, 1, 2, 0, 0, 0, 0, 0, 0], 1), 0x201);
    }
}
