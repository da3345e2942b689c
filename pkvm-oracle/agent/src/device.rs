//! A device of the emulated machine that reads and writes memory by physical addresses: QEMU's fw_cfg. It hands out files, and
//! one of them, which nobody needs here, can be written. So a byte goes from memory to that file and from there elsewhere.
//!
//! There is no IOMMU, and no driver: the agent asks the device itself, through /dev/mem.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use pkvm_oracle::{Errno, PAGE_SIZE};

use crate::{fault, sys};

/// Where the device is on the machine that the emulator calls `virt`.
const REGISTERS: i64 = 0x0902_0000;
/// Where it is told the address of a command, high half first.
const ADDRESS: usize = 16;

const ERROR: u32 = 1;
const READ: u32 = 2;
const SELECT: u32 = 8;
const WRITE: u32 = 16;
/// The list of files.
const DIRECTORY: u16 = 0x19;
const FILE: &[u8] = b"etc/vmcoreinfo\0";
/// An entry of the list: its size, its number, and its name from here on.
const ENTRY_BYTES: usize = 64;
const NAME_AT: usize = 8;

/// Bits of a word of /proc/self/pagemap.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// The device reads a byte there.
pub(crate) fn load(at: *const u8) -> Result<u8, Errno> {
    let device = Device::open()?;
    let from = physical(at)?;
    device.ask(device.file, WRITE, from, 1)?;
    device.ask(device.file, READ, device.answer_at, 1)?;
    Ok(device.answer(0))
}

/// The device writes a byte there.
pub(crate) fn store(at: *const u8, byte: u8) -> Result<(), Errno> {
    let device = Device::open()?;
    let to = physical(at)?;
    fault::store(device.answer_byte(0), byte);
    device.ask(device.file, WRITE, device.answer_at, 1)?;
    device.ask(device.file, READ, to, 1)
}

/// Where a byte of this process lies. The page that all share which nobody has written to is nowhere.
fn physical(at: *const u8) -> Result<u64, Errno> {
    let zeroes = sys::map(PAGE_SIZE as usize, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    fault::load(zeroes);
    let (frame, zero) = (frame(at)?, frame(zeroes)?);
    sys::unmap(zeroes, PAGE_SIZE as usize)?;
    match frame == zero {
        true => Err(Errno(libc::EFAULT)),
        false => Ok(frame * PAGE_SIZE + at.addr() as u64 % PAGE_SIZE),
    }
}

fn frame(at: *const u8) -> Result<u64, Errno> {
    let file = File::open("/proc/self/pagemap").map_err(|error| sys::errno_of(&error))?;
    let mut word = [0; 8];
    let nth = at.addr() as u64 / PAGE_SIZE;
    file.read_exact_at(&mut word, nth * 8).map_err(|error| sys::errno_of(&error))?;
    let word = u64::from_ne_bytes(word);
    match word & FRAME {
        frame @ 1.. if word & PRESENT != 0 => Ok(frame),
        _ => Err(Errno(libc::EFAULT)),
    }
}

struct Device {
    registers: *mut u8,
    /// A page of this process: first the answer, at its end the command.
    page: *mut u8,
    answer_at: u64,
    /// The number of the file that can be written.
    file: u16,
}

const PAGE: usize = PAGE_SIZE as usize;
const COMMAND_BYTES: usize = 16;
const COMMAND: usize = PAGE - COMMAND_BYTES;

impl Device {
    fn open() -> Result<Self, Errno> {
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open("/dev/mem")
            .map_err(|error| sys::errno_of(&error))?;
        let registers = sys::map_at(PAGE, &OwnedFd::from(memory), REGISTERS)?;
        // Shared: a fork leaves it where it is.
        let page = sys::map(PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?;
        fault::store(page, 0);
        let mut device = Self { registers, page, answer_at: frame(page)? * PAGE_SIZE, file: 0 };
        device.ask(DIRECTORY, READ, device.answer_at, COMMAND as u32)?;
        let number = device.number_of(FILE).ok_or(Errno(libc::ENODEV))?;
        device.file = number;
        Ok(device)
    }

    /// In the list that is the answer.
    fn number_of(&self, name: &[u8]) -> Option<u16> {
        let starts = (4..COMMAND - ENTRY_BYTES).step_by(ENTRY_BYTES);
        let is_it = |start: &usize| {
            let letters = (0..name.len()).map(|nth| self.answer(start + NAME_AT + nth));
            letters.eq(name.iter().copied())
        };
        let start = { starts }.find(is_it)?;
        Some(u16::from_be_bytes([self.answer(start + 4), self.answer(start + 5)]))
    }

    fn answer_byte(&self, nth: usize) -> *mut u8 {
        self.page.wrapping_add(nth)
    }

    fn answer(&self, nth: usize) -> u8 {
        match fault::load(self.answer_byte(nth)) {
            pkvm_oracle::Observation::Byte(byte) => byte,
            _ => 0,
        }
    }

    /// Has the device read from a file to memory, or write from memory to a file.
    fn ask(&self, file: u16, what: u32, at: u64, bytes: u32) -> Result<(), Errno> {
        let control = u32::from(file) << 16 | SELECT | what;
        let command = [control.to_be_bytes(), bytes.to_be_bytes()].into_iter().flatten();
        for (nth, byte) in command.chain(at.to_be_bytes()).enumerate() {
            fault::store(self.answer_byte(COMMAND + nth), byte);
        }
        let command_at = self.answer_at + COMMAND as u64;
        for (nth, half) in [command_at >> 32, command_at & 0xffff_ffff].into_iter().enumerate() {
            // The second half is what the device acts on.
            sys::store_register(self.registers, ADDRESS + 4 * nth, (half as u32).to_be());
        }
        // It is done when that store is; what is left are errors.
        let left = std::array::from_fn(|nth| self.answer(COMMAND + nth));
        match u32::from_be_bytes(left) {
            0 => Ok(()),
            left if left & ERROR != 0 => Err(Errno(libc::EIO)),
            _ => Err(Errno(libc::EBUSY)),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for at in [self.registers, self.page] {
            // The process ends soon, and takes them with it.
            let _: Result<(), Errno> = sys::unmap(at, PAGE);
        }
    }
}
