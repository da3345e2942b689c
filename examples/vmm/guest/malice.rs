//! What a guest that was taken over would ask of its disk: to write where it must not.

use super::driver::{Driver, OK, Request};
use crate::Fallible;
use crate::cpu::Cpu;
use crate::layout::{RAM, RAM_BYTES, RING, SECTOR};

/// What the shared page is filled with to see whether anything was written.
const PATTERN: u8 = 0x5a;

/// Makes requests with descriptors that point at private memory, at nothing, and across the border
/// from shared to private. Each has to fail, and fail as a whole.
pub(super) fn try_all(cpu: &mut Cpu, disk: &mut Driver, border: u64) -> Fallible<()> {
    let into_private = Request::read(0, RING, SECTOR);
    let into_nothing = Request::read(0, RAM + RAM_BYTES + 4096, SECTOR);
    let across = Request::read(0, border, 4096 + SECTOR);
    cpu.store(border, &[PATTERN; 4096])?;
    let attempts =
        [(into_private, "private memory"), (into_nothing, "nothing"), (across, "a border")];
    for (request, what) in attempts {
        let status = disk.run(cpu, &request)?;
        if status == OK {
            return Err(format!("the disk served a descriptor that points at {what}").into());
        }
        cpu.print(&format!("descriptor at {what}: the disk answers with status {status}"))?;
    }
    let mut found = [0; 4096];
    cpu.load(border, &mut found)?;
    match found == [PATTERN; 4096] {
        true => Ok(()),
        false => Err("a request that was refused has changed shared memory".into()),
    }
}
