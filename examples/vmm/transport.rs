//! The disk's registers, between the vCPUs that access them and the thread that is the device.

use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_RO;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT};

use crate::layout::{QUEUE_SIZE, low_half, virtio};
use crate::run::lock;

/// What the device can do, and what a driver has to understand.
const REQUIRED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM;
const OFFERED: u64 = REQUIRED | 1 << VIRTIO_BLK_F_RO;

/// What the registers tell the device's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// The driver has set up the queue and is ready.
    Start(Queue),
    /// There may be requests.
    Kick,
    /// Forget the queue; answered with [`Transport::reset_done`].
    Reset,
    /// The machine is off.
    Quit,
}

/// The register block.
#[derive(Debug)]
pub(crate) struct Transport {
    registers: Mutex<Registers>,
    interrupt: Interrupt,
    device: Sender<Command>,
}

#[derive(Debug, Default)]
struct Registers {
    capacity_sectors: u64,
    status: u32,
    /// Whether the device has a queue, or has been told to take or forget one.
    device_is_live: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queue_num: u32,
    queue_ready: u32,
    desc: u64,
    avail: u64,
    used: u64,
}

impl Transport {
    pub(crate) fn new(capacity_sectors: u64, device: Sender<Command>) -> Self {
        let registers = Registers { capacity_sectors, ..Registers::default() };
        Self { registers: Mutex::new(registers), interrupt: Interrupt::default(), device }
    }

    /// A load from the register at this offset.
    pub(crate) fn read(&self, register: u32) -> u32 {
        let registers = lock(&self.registers);
        let half = |word: u64, sel: u32| match sel {
            0 => low_half(word),
            1 => low_half(word >> 32),
            _ => 0,
        };
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => virtio::MAGIC,
            VIRTIO_MMIO_VERSION => virtio::VERSION,
            VIRTIO_MMIO_DEVICE_ID => virtio::BLOCK,
            VIRTIO_MMIO_DEVICE_FEATURES => half(OFFERED, registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX if registers.queue_sel == 0 => QUEUE_SIZE.into(),
            VIRTIO_MMIO_QUEUE_READY if registers.queue_sel == 0 => registers.queue_ready,
            VIRTIO_MMIO_INTERRUPT_STATUS => *lock(&self.interrupt.pending),
            VIRTIO_MMIO_STATUS => registers.status,
            VIRTIO_MMIO_CONFIG => half(registers.capacity_sectors, 0),
            _ if register == VIRTIO_MMIO_CONFIG + 4 => half(registers.capacity_sectors, 1),
            _ => 0,
        }
    }

    /// A store to the register at this offset. What makes no sense is ignored, as hardware would.
    pub(crate) fn write(&self, register: u32, value: u32) {
        let mut registers = lock(&self.registers);
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => match registers.driver_features_sel {
                0 => set_low(&mut registers.driver_features, value),
                1 => set_high(&mut registers.driver_features, value),
                _ => {}
            },
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM if registers.queue_sel == 0 => registers.queue_num = value,
            VIRTIO_MMIO_QUEUE_READY if registers.queue_sel == 0 => {
                registers.queue_ready = value & 1
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut registers.desc, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut registers.desc, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut registers.avail, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut registers.avail, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut registers.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut registers.used, value),
            VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => self.tell(Command::Kick),
            VIRTIO_MMIO_INTERRUPT_ACK => *lock(&self.interrupt.pending) &= !value,
            VIRTIO_MMIO_STATUS => self.set_status(&mut registers, value),
            _ => {}
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            if registers.device_is_live {
                // The status stays as it is until the device has let go of guest memory.
                self.tell(Command::Reset);
            } else {
                registers.reset();
            }
            return;
        }
        let features = registers.driver_features;
        let acceptable = features & !OFFERED == 0 && features & REQUIRED == REQUIRED;
        registers.status = match acceptable {
            true => value,
            false => value & !VIRTIO_CONFIG_S_FEATURES_OK,
        };
        let ready = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if registers.status & ready == ready && !registers.device_is_live {
            match registers.queue() {
                Some(queue) => {
                    registers.device_is_live = true;
                    self.tell(Command::Start(queue));
                }
                None => registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET,
            }
        }
    }

    fn tell(&self, command: Command) {
        // A device that is gone has said why, and the run ends because of that.
        let _ = self.device.send(command);
    }

    /// Tells the device that there will be nothing more.
    pub(crate) fn quit(&self) {
        self.tell(Command::Quit);
    }

    /// The device has forgotten its queue and touches guest memory no more.
    pub(crate) fn reset_done(&self) {
        lock(&self.registers).reset();
        *lock(&self.interrupt.pending) = 0;
    }

    /// The device found its queue unusable and does nothing until it is reset.
    pub(crate) fn needs_reset(&self) {
        lock(&self.registers).status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device has used buffers.
    pub(crate) fn interrupt(&self) {
        self.interrupt.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Waits for an interrupt, but not for ever; says what is pending.
    pub(crate) fn wait_for_interrupt(&self) -> u32 {
        self.interrupt.wait()
    }
}

impl Registers {
    fn reset(&mut self) {
        *self = Self { capacity_sectors: self.capacity_sectors, ..Self::default() };
    }

    /// The queue that the driver described; none if it is no queue.
    fn queue(&self) -> Option<Queue> {
        let mut queue = Queue::new(QUEUE_SIZE).ok()?;
        queue.try_set_size(u16::try_from(self.queue_num).ok()?).ok()?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.desc)).ok()?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.avail)).ok()?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.used)).ok()?;
        queue.set_ready(self.queue_ready == 1);
        Some(queue)
    }
}

/// The disk's interrupt line.
#[derive(Debug, Default)]
struct Interrupt {
    pending: Mutex<u32>,
    raised: Condvar,
}

impl Interrupt {
    fn raise(&self, bits: u32) {
        *lock(&self.pending) |= bits;
        self.raised.notify_all();
    }

    fn wait(&self) -> u32 {
        let pending = lock(&self.pending);
        if *pending != 0 {
            return *pending;
        }
        match self.raised.wait_timeout(pending, Duration::from_millis(50)) {
            Ok((pending, _)) => *pending,
            Err(poisoned) => *poisoned.into_inner().0,
        }
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn transport() -> (Transport, Receiver<Command>) {
        let (sender, receiver) = channel();
        (Transport::new(0x1_0000_0002, sender), receiver)
    }

    fn accept_features(transport: &Transport, features: u64) {
        transport.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        transport.write(VIRTIO_MMIO_DRIVER_FEATURES, low_half(features >> 32));
        transport.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        transport.write(VIRTIO_MMIO_DRIVER_FEATURES, low_half(features));
        transport.write(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FEATURES_OK);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let (transport, _device) = transport();
        for features in [0, 1 << VIRTIO_F_VERSION_1, REQUIRED | 1 << 9] {
            accept_features(&transport, features);
            assert_eq!(transport.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK, 0);
        }
        accept_features(&transport, OFFERED);
        assert_eq!(transport.read(VIRTIO_MMIO_STATUS), VIRTIO_CONFIG_S_FEATURES_OK);
    }

    #[test]
    fn a_reset_is_over_when_the_device_says_so() {
        let (transport, device) = transport();
        accept_features(&transport, REQUIRED);
        transport.write(VIRTIO_MMIO_QUEUE_NUM, 8);
        transport.write(VIRTIO_MMIO_QUEUE_READY, 1);
        let status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        transport.write(VIRTIO_MMIO_STATUS, status);
        assert!(matches!(device.try_recv(), Ok(Command::Start(queue)) if queue.size() == 8));
        transport.write(VIRTIO_MMIO_STATUS, 0);
        assert!(matches!(device.try_recv(), Ok(Command::Reset)));
        assert_eq!(transport.read(VIRTIO_MMIO_STATUS), status);
        transport.reset_done();
        assert_eq!(transport.read(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(transport.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn a_queue_that_is_none_needs_a_reset() {
        let (transport, device) = transport();
        accept_features(&transport, REQUIRED);
        transport.write(VIRTIO_MMIO_QUEUE_NUM, 7);
        let status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        transport.write(VIRTIO_MMIO_STATUS, status);
        assert!(device.try_recv().is_err());
        assert_ne!(transport.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    }

    #[test]
    fn the_capacity_has_two_halves() {
        let (transport, _device) = transport();
        assert_eq!(transport.read(VIRTIO_MMIO_CONFIG), 2);
        assert_eq!(transport.read(VIRTIO_MMIO_CONFIG + 4), 1);
        assert_eq!(transport.read(0x1fc), 0);
    }
}
