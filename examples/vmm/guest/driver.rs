//! The guest's disk driver: virtio-blk over MMIO, with a split virtqueue in shared memory.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::Fallible;
use crate::cpu::Cpu;
use crate::layout::{
    AVAIL_RING, BOUNCE, BOUNCE_SLOTS, DESC_TABLE, HEADERS, QUEUE_SIZE, STATUSES, USED_RING, board,
    low_half, virtio,
};

/// The status of a request that went well.
pub(super) const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];
/// A status byte that the device has not written yet.
const PENDING: u8 = 0xff;
/// Descriptors of a request: header, data, status.
const PER_REQUEST: u64 = 3;
/// The place for requests that use no bounce buffer.
pub(super) const EXTRA_SLOT: u64 = BOUNCE_SLOTS;
const NR_SLOTS: usize = 9;
const _: () = assert!(NR_SLOTS as u64 == EXTRA_SLOT + 1);

/// A request, as the driver is asked to make it.
#[derive(Debug)]
pub(super) struct Request {
    kind: u32,
    sector: u64,
    data: u64,
    data_bytes: u64,
}

impl Request {
    /// Reads sectors into the memory at `data`.
    pub(super) fn read(sector: u64, data: u64, data_bytes: u64) -> Self {
        Self { kind: VIRTIO_BLK_T_IN, sector, data, data_bytes }
    }
}

/// The driver's state; all of it is private, and nothing the device writes is believed.
#[derive(Debug)]
pub(super) struct Driver {
    capacity_sectors: u64,
    /// How many requests were made available.
    submitted: u64,
    /// How many were found used.
    completed: u64,
    /// The first two entries of the available ring, which share an aligned word with its index.
    first_entries: [u16; 2],
    /// By slot: the status of a request that is done, and none while it is not.
    statuses: [Option<u8>; NR_SLOTS],
}

impl Driver {
    /// Finds the disk, agrees on features and sets up its queue.
    pub(super) fn start(cpu: &mut Cpu) -> Fallible<Self> {
        let found = (
            get(cpu, VIRTIO_MMIO_MAGIC_VALUE)?,
            get(cpu, VIRTIO_MMIO_VERSION)?,
            get(cpu, VIRTIO_MMIO_DEVICE_ID)?,
        );
        if found != (virtio::MAGIC, virtio::VERSION, virtio::BLOCK) {
            return Err(format!("there is no virtio disk: {found:x?}").into());
        }
        set(cpu, VIRTIO_MMIO_STATUS, 0)?;
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        set(cpu, VIRTIO_MMIO_STATUS, status)?;
        // Both lie in the upper half. A device that honours ACCESS_PLATFORM reaches only memory that
        // the platform lets it reach, which here means: what the guest has shared.
        let wanted = (1 << (VIRTIO_F_VERSION_1 - 32)) | (1 << (VIRTIO_F_ACCESS_PLATFORM - 32));
        set(cpu, VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1)?;
        let offered = get(cpu, VIRTIO_MMIO_DEVICE_FEATURES)?;
        if offered & wanted != wanted {
            return Err(format!("the disk lacks features: {offered:#x}").into());
        }
        set(cpu, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0)?;
        set(cpu, VIRTIO_MMIO_DRIVER_FEATURES, 0)?;
        set(cpu, VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1)?;
        set(cpu, VIRTIO_MMIO_DRIVER_FEATURES, wanted)?;
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        set(cpu, VIRTIO_MMIO_STATUS, status)?;
        if get(cpu, VIRTIO_MMIO_STATUS)? & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Err("the disk refused the features it had offered".into());
        }
        Self::set_up_queue(cpu)?;
        set(cpu, VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK)?;
        let low = get(cpu, VIRTIO_MMIO_CONFIG)?;
        let high = get(cpu, VIRTIO_MMIO_CONFIG + 4)?;
        Ok(Self {
            capacity_sectors: u64::from(high) << 32 | u64::from(low),
            submitted: 0,
            completed: 0,
            first_entries: [0; 2],
            statuses: [None; NR_SLOTS],
        })
    }

    fn set_up_queue(cpu: &mut Cpu) -> Fallible<()> {
        for page in [DESC_TABLE, AVAIL_RING, USED_RING, HEADERS] {
            cpu.store(page, &[0; 4096])?;
        }
        set(cpu, VIRTIO_MMIO_QUEUE_SEL, 0)?;
        if get(cpu, VIRTIO_MMIO_QUEUE_NUM_MAX)? < u32::from(QUEUE_SIZE) {
            return Err("the disk's queue is too short".into());
        }
        set(cpu, VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into())?;
        for (low, high, area) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, DESC_TABLE),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, AVAIL_RING),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, USED_RING),
        ] {
            set(cpu, low, low_half(area))?;
            set(cpu, high, low_half(area >> 32))?;
        }
        set(cpu, VIRTIO_MMIO_QUEUE_READY, 1)
    }

    pub(super) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// Makes a request available in a slot that has none under way. The device may see it at once.
    pub(super) fn submit(&mut self, cpu: &mut Cpu, slot: u64, request: &Request) -> Fallible<()> {
        let (header, status) = (HEADERS + slot * 16, STATUSES + slot);
        let mut raw = [0; 16];
        raw[..4].copy_from_slice(&request.kind.to_le_bytes());
        raw[8..].copy_from_slice(&request.sector.to_le_bytes());
        cpu.store(header, &raw)?;
        cpu.store(status, &[PENDING])?;

        let head = slot * PER_REQUEST;
        let (next, write) = (VRING_DESC_F_NEXT, VRING_DESC_F_WRITE);
        describe(cpu, head, header, 16, next)?;
        describe(cpu, head + 1, request.data, request.data_bytes, next | write)?;
        describe(cpu, head + 2, status, 1, write)?;

        *self.status_of(slot)? = None;
        let (place, head) = (self.submitted % u64::from(QUEUE_SIZE), u16::try_from(head)?);
        match place {
            0 => self.first_entries[0] = head,
            1 => self.first_entries[1] = head,
            _ => cpu.store(AVAIL_RING + 4 + place * 2, &head.to_le_bytes())?,
        }
        self.submitted += 1;
        // One atomic store publishes: it orders what was written before, and cannot tear the index.
        let [first, second] = self.first_entries.map(u64::from);
        let index = self.submitted & 0xffff;
        cpu.store_u64(AVAIL_RING, index << 16 | first << 32 | second << 48)
    }

    /// Tells the device that there are requests.
    pub(super) fn notify(&self, cpu: &mut Cpu) -> Fallible<()> {
        set(cpu, VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    }

    /// Waits until the request in the slot is done, and returns its status.
    pub(super) fn wait(&mut self, cpu: &mut Cpu, slot: u64) -> Fallible<u8> {
        loop {
            if let Some(status) = self.status_of(slot)?.take() {
                return Ok(status);
            }
            if !self.collect(cpu)? {
                let _pending = cpu.load_u32(board::WAIT)?;
                let interrupts = get(cpu, VIRTIO_MMIO_INTERRUPT_STATUS)?;
                if interrupts != 0 {
                    set(cpu, VIRTIO_MMIO_INTERRUPT_ACK, interrupts)?;
                }
                let broken = VIRTIO_CONFIG_S_NEEDS_RESET;
                if interrupts & VIRTIO_MMIO_INT_CONFIG != 0
                    && get(cpu, VIRTIO_MMIO_STATUS)? & broken != 0
                {
                    return Err("the disk cannot use its queue and needs a reset".into());
                }
            }
        }
    }

    fn status_of(&mut self, slot: u64) -> Fallible<&mut Option<u8>> {
        let found = usize::try_from(slot).ok().and_then(|slot| self.statuses.get_mut(slot));
        found.ok_or_else(|| format!("there is no slot {slot} for requests").into())
    }

    /// Looks at what the device has used since the last time; whether there was anything.
    fn collect(&mut self, cpu: &mut Cpu) -> Fallible<bool> {
        // Flags, index and more in one atomic load: see `submit`.
        let index = cpu.load_u64(USED_RING)? >> 16 & 0xffff;
        let fresh = index.wrapping_sub(self.completed) & 0xffff;
        if fresh > self.submitted - self.completed {
            return Err(format!("the disk claims to have used {fresh} requests too many").into());
        }
        for _ in 0..fresh {
            let place = self.completed % u64::from(QUEUE_SIZE);
            let mut raw = [0; 4];
            cpu.load(USED_RING + 4 + place * 8, &mut raw)?;
            let slot = u64::from(u32::from_le_bytes(raw)) / PER_REQUEST;
            let mut status = [PENDING];
            cpu.load(STATUSES + slot.min(EXTRA_SLOT), &mut status)?;
            *self.status_of(slot)? = Some(status[0]);
            self.completed += 1;
        }
        Ok(fresh > 0)
    }

    /// Asks the disk for its name.
    pub(super) fn id(&mut self, cpu: &mut Cpu) -> Fallible<String> {
        let data_bytes = u64::from(VIRTIO_BLK_ID_BYTES);
        let request = Request { kind: VIRTIO_BLK_T_GET_ID, sector: 0, data: BOUNCE, data_bytes };
        let status = self.run(cpu, &request)?;
        if status != OK {
            return Err(format!("the disk does not tell its name: status {status}").into());
        }
        let mut raw = [0; VIRTIO_BLK_ID_BYTES as usize];
        cpu.load(BOUNCE, &mut raw)?;
        let text = raw.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// Makes a request of its own and waits for it, whatever else is under way.
    pub(super) fn run(&mut self, cpu: &mut Cpu, request: &Request) -> Fallible<u8> {
        self.submit(cpu, EXTRA_SLOT, request)?;
        self.notify(cpu)?;
        self.wait(cpu, EXTRA_SLOT)
    }

    /// Resets the disk; when this returns it touches no memory any more.
    pub(super) fn stop(self, cpu: &mut Cpu) -> Fallible<()> {
        set(cpu, VIRTIO_MMIO_STATUS, 0)?;
        while get(cpu, VIRTIO_MMIO_STATUS)? != 0 {
            cpu.relax()?;
        }
        Ok(())
    }
}

/// Writes a descriptor; the next one in the table follows it in the chain if `flags` say so.
fn describe(cpu: &mut Cpu, index: u64, addr: u64, len: u64, flags: u32) -> Fallible<()> {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..16].copy_from_slice(&(len | u64::from(flags) << 32 | (index + 1) << 48).to_le_bytes());
    cpu.store(DESC_TABLE + index * 16, &raw)
}

fn get(cpu: &mut Cpu, register: u32) -> Fallible<u32> {
    cpu.load_u32(virtio::BASE + u64::from(register))
}

fn set(cpu: &mut Cpu, register: u32, value: u32) -> Fallible<()> {
    cpu.store_u32(virtio::BASE + u64::from(register), value)
}
