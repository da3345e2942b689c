//! What a guest that was taken over would ask of its disk: to write where it must not.

use super::driver::{Driver, OK, Request};
use crate::Fallible;
use crate::cpu::Cpu;
use crate::layout::{RAM, RAM_BYTES, RING, SECTOR};

/// What the page at the border is filled with to see whether anything was written.
const PATTERN: u8 = 0x5a;

/// The places that the disk is sent to.
pub(super) struct Malice {
    /// Private memory, if there is any.
    private: Option<u64>,
    /// A page that the disk may write to, and behind it one where it must not.
    border: u64,
}

impl Malice {
    /// Where only some memory is shared; the page is the last of it.
    pub(super) fn of_protected(border: u64) -> Self {
        Self { private: Some(RING), border }
    }

    /// Where all memory is the host's to see, and only what is none can be wrong.
    pub(super) fn of_non_protected() -> Self {
        Self { private: None, border: RAM + RAM_BYTES - 4096 }
    }

    /// Makes requests with descriptors that point at private memory, at nothing, and across the border.
    /// Each has to fail, and fail as a whole.
    pub(super) fn strike(&self, cpu: &mut Cpu, disk: &mut Driver) -> Fallible<()> {
        cpu.store(self.border, &[PATTERN; 4096])?;
        match self.private {
            Some(at) => expect_refused(cpu, disk, "private memory", &Request::read(0, at, SECTOR))?,
            None => cpu.print("descriptor at private memory: does not apply, there is none")?,
        }
        let into_nothing = Request::read(0, RAM + RAM_BYTES + 4096, SECTOR);
        expect_refused(cpu, disk, "nothing", &into_nothing)?;
        let across = Request::read(0, self.border, 4096 + SECTOR);
        expect_refused(cpu, disk, "a border", &across)?;
        let mut found = [0; 4096];
        cpu.load(self.border, &mut found)?;
        match found == [PATTERN; 4096] {
            true => Ok(()),
            false => Err("a request that was refused has changed memory".into()),
        }
    }
}

fn expect_refused(cpu: &mut Cpu, disk: &mut Driver, what: &str, request: &Request) -> Fallible<()> {
    match disk.run(cpu, request)? {
        OK => Err(format!("the disk served a descriptor that points at {what}").into()),
        status => {
            cpu.print(&format!("descriptor at {what}: the disk answers with status {status}"))
        }
    }
}
