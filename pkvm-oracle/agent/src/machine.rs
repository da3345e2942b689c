//! The real machine: every step is a system call or an instruction.

use std::collections::BTreeMap;
use std::fs;

use pkvm_oracle::{
    Backing, Errno, GuestAct, Ipa, MEM_SHARE, MEM_UNSHARE, Machine, Name, Observation, PAGE_SIZE,
    Pages, SlotFlags, Step, VcpuName,
};

use crate::kvm::{self, Region, Stop, Stray, Vcpu, Vm};
use crate::memory::Memory;
use crate::{program, sys};

/// One process's VMs and memories.
#[derive(Debug, Default)]
pub(crate) struct Real {
    memories: BTreeMap<Name, Memory>,
    vms: BTreeMap<Name, Vm>,
    /// By VM and number. They outlive the VM's descriptor.
    slots: BTreeMap<(Name, u16), Region>,
    vcpus: BTreeMap<VcpuName, Started>,
}

/// A vCPU, and what it is at if KVM_RUN ended before that was done.
#[derive(Debug)]
struct Started {
    vcpu: Vcpu,
    at: Option<GuestAct>,
}

impl Machine for Real {
    fn step(&mut self, step: &Step) -> Observation {
        self.do_step(step).unwrap_or_else(Observation::Failed)
    }
}

impl Real {
    fn do_step(&mut self, step: &Step) -> Result<Observation, Errno> {
        match step {
            Step::Memlock(pages) => {
                sys::limit_locked(pages * PAGE_SIZE)?;
                sys::drop_ipc_lock()?;
            }
            Step::Memory { name, backing, pages, size } => {
                let vm = match backing {
                    Backing::GuestMemfd(vm) => self.vms.get(vm),
                    _ => None,
                };
                let memory = Memory::new(backing, *pages, *size, vm)?;
                self.memories.insert(name.clone(), memory);
            }
            Step::Vm(name, kind) => {
                self.vms.insert(name.clone(), Vm::new(*kind)?);
            }
            Step::Slot { vm, slot, ipa, pages, flags } => {
                return self.set_slot(vm, *slot, *ipa, pages, *flags);
            }
            Step::DeleteSlot(vm, slot) => {
                let region = |old: Region| Region { bytes: 0, ..old };
                return self.change_slot(vm, *slot, region);
            }
            Step::MoveSlot(vm, slot, ipa) => {
                return self.change_slot(vm, *slot, |old| Region { ipa: ipa.0, ..old });
            }
            Step::Vcpu(name) => {
                let Some(vm) = self.vms.get_mut(&name.vm) else { return Ok(Observation::Nothing) };
                let vcpu = vm.vcpu(name.index)?;
                self.vcpus.insert(name.clone(), Started { vcpu, at: None });
            }
            Step::Guest(name, act) => return Ok(self.guest(name, *act)),
            Step::Host(act, place) => {
                let memory = self.memories.get(&place.memory);
                let act = |memory: &Memory| memory.act(*act, place.page, place.offset);
                return Ok(memory.map_or(Observation::Nothing, act));
            }
            Step::Locked => return counter("VmLck:"),
            Step::Pinned => return counter("VmPin:"),
            Step::CloseVm(name) => match self.vms.remove(name) {
                Some(vm) => drop(vm),
                None => return Ok(Observation::Nothing),
            },
            Step::CloseVcpu(name) => match self.vcpus.remove(name) {
                Some(mut started) => started.vcpu.close(),
                None => return Ok(Observation::Nothing),
            },
            Step::CloseVcpuFd(name) => match self.vcpus.get_mut(name) {
                Some(started) => started.vcpu.close_fd(),
                None => return Ok(Observation::Nothing),
            },
        }
        Ok(Observation::Ok)
    }

    fn set_slot(
        &mut self,
        name: &Name,
        slot: u16,
        ipa: Ipa,
        pages: &Pages,
        flags: SlotFlags,
    ) -> Result<Observation, Errno> {
        let (Some(vm), Some(memory)) = (self.vms.get(name), self.memories.get(&pages.memory))
        else {
            return Ok(Observation::Nothing);
        };
        let Some(host) = memory.page(pages.first).filter(|_| memory.has_pages(pages.end)) else {
            return Ok(Observation::Nothing);
        };
        let log = if flags.log { kvm::SLOT_LOG } else { 0 };
        let readonly = if flags.readonly { kvm::SLOT_READONLY } else { 0 };
        let region = Region {
            slot: u32::from(slot),
            flags: log | readonly,
            ipa: ipa.0,
            bytes: (pages.end - pages.first) * PAGE_SIZE,
            host: host.addr() as u64,
        };
        match &memory.guest_memfd {
            Some(fd) => vm.set_guest_memfd(region, fd, pages.first * PAGE_SIZE)?,
            None => vm.set_region(region)?,
        }
        self.slots.insert((name.clone(), slot), region);
        Ok(Observation::Ok)
    }

    fn change_slot(
        &mut self,
        name: &Name,
        slot: u16,
        change: impl FnOnce(Region) -> Region,
    ) -> Result<Observation, Errno> {
        let key = (name.clone(), slot);
        let (Some(vm), Some(&old)) = (self.vms.get(name), self.slots.get(&key)) else {
            return Ok(Observation::Nothing);
        };
        let new = change(old);
        vm.set_region(new)?;
        match new.bytes {
            0 => self.slots.remove(&key),
            _ => self.slots.insert(key, new),
        };
        Ok(Observation::Ok)
    }

    fn guest(&mut self, name: &VcpuName, act: GuestAct) -> Observation {
        let Some(started) = self.vcpus.get_mut(name).filter(|started| started.vcpu.is_whole())
        else {
            return Observation::Nothing;
        };
        let act = match (act, started.at) {
            (GuestAct::Resume, None) => return Observation::Idle,
            (GuestAct::Resume, Some(at)) => at,
            (_, Some(_)) => return Observation::Stuck,
            (act, None) => act,
        };
        started.at = Some(act);
        let (stop, stray) = started.vcpu.run(&command(act));
        if matches!(stop, Stop::Answer(_) | Stop::Exception(_)) {
            started.at = None;
        }
        match (stop, stray) {
            (Stop::Answer(_), Some(Stray::Load(ipa))) => Observation::MmioLoad(ipa),
            (Stop::Answer(_), Some(Stray::Store(ipa, byte))) => Observation::MmioStore(ipa, byte),
            (Stop::Answer(registers), None) => answer(act, registers),
            (Stop::Exception(syndrome), _) => Observation::Exception(syndrome),
            (Stop::Failed(errno), _) => Observation::Run(errno),
            (Stop::Exit(reason), _) => Observation::Exit(reason),
            (Stop::Spins, _) => Observation::Spins,
        }
    }
}

fn command(act: GuestAct) -> [u64; program::NR_WORDS] {
    match act {
        GuestAct::Load(ipa) => [program::LOAD, ipa.0, 0, 0, 0],
        GuestAct::Store(ipa, byte) => [program::STORE, ipa.0, u64::from(byte), 0, 0],
        GuestAct::Execute(ipa) => [program::EXECUTE, ipa.0, 0, 0, 0],
        GuestAct::Share(ipa) => [program::CALL, MEM_SHARE, ipa.0, 0, 0],
        GuestAct::Unshare(ipa) => [program::CALL, MEM_UNSHARE, ipa.0, 0, 0],
        GuestAct::Hvc([x0, x1, x2, x3]) => [program::CALL, x0, x1, x2, x3],
        // `Real::guest` has put what is resumed in its place.
        GuestAct::Resume => [0; program::NR_WORDS],
    }
}

fn answer(act: GuestAct, registers: [u64; 4]) -> Observation {
    // Registers hold two's complement.
    match act {
        GuestAct::Load(_) => Observation::Byte(registers[0] as u8),
        GuestAct::Share(_) | GuestAct::Unshare(_) => Observation::Answer(registers[0] as i64),
        GuestAct::Hvc(_) => Observation::Registers(registers.map(|value| value as i64)),
        GuestAct::Store(..) | GuestAct::Execute(_) | GuestAct::Resume => Observation::Ok,
    }
}

/// A line of /proc/self/status that is in kB.
fn counter(field: &str) -> Result<Observation, Errno> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| sys::errno_of(&error))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .ok_or(Errno(libc::ENOENT))?;
    Ok(Observation::Pages(kib * 1024 / PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault;
    use pkvm_oracle::{Expectation, parse, run};

    /// What needs no KVM is true of any machine, this one for example.
    const WITHOUT_A_GUEST: &str = "\
scenario kinds for anon shared memfd
memory m $ 4
host load m[0]                -> 0x0
host store m[0]+8 0x22
host load m[0]+8              -> 0x22
host write m[0]+8             -> 0x22
host read m[0]+8 0x23
host vm-read m[0]+8           -> 0x23
host vm-write m[0]+8 0x24
host mem-read m[0]+8          -> 0x24
host mem-write m[0]+8 0x25
host splice m[0]+8            -> 0x25
host pin m[0]+8
host store m[1] 0x33
host protect m[1]
host load m[1]                -> 0x33
host store m[1] 0x34          -> SIGSEGV 2
host read m[1] 0x34           -> EFAULT
host load m[1]                -> 0x33
host unmap m[2]
host load m[2]                -> SIGSEGV 1
host store m[2] 0x35          -> SIGSEGV 1
host write m[2]               -> EFAULT
host pin m[2]                 -> EFAULT
host load m[4]                -> nothing
host load n[0]                -> nothing

scenario a-file
memory m memfd 4
host store m[3]+1 0x22
host file-read m[3]+1         -> 0x22
host file-write m[3]+1 0x23
host load m[3]+1              -> 0x23
host discard m[3]
host load m[3]+1              -> 0x23
host punch m[3]
host load m[3]+1              -> 0x0

scenario no-file
memory m anon 4
host file-read m[0]           -> EBADF
host punch m[0]               -> EBADF
host store m[0] 0x22
host discard m[0]
host load m[0]                -> 0x0

scenario nothing-there
slot v 0 0x80000000 m[0..1]   -> nothing
slot v 0 delete               -> nothing
vcpu v.0                      -> nothing
guest v.0 load 0x80000000     -> nothing
close v.0                     -> nothing
close-fd v.0                  -> nothing
close v                       -> nothing
";

    #[test]
    fn hosts_without_guests_are_as_everywhere() {
        fault::install().unwrap();
        for scenario in parse(WITHOUT_A_GUEST).unwrap() {
            let mut nr_seen = 0;
            run(&scenario, &mut Real::default(), |line, seen| {
                let shown = format!("{} line {}: {}", scenario.name, line.number, line.step);
                assert_eq!(line.expected, Expectation::Seen(*seen), "{shown}");
                nr_seen += 1;
            });
            assert_eq!(nr_seen, scenario.lines.len());
        }
    }
}
