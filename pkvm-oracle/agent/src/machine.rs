//! The real machine: every step is a system call or an instruction.

use std::collections::BTreeMap;
use std::fs;

use pkvm_oracle::{
    Errno, GuestAct, Ipa, Machine, Name, Observation, PAGE_SIZE, Pages, SlotFlags, Step, VcpuName,
};

use crate::kvm::{self, Region, Stop, Stray, Vcpu, Vm};
use crate::memory::Memory;
use crate::{program, sys};

const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;

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
                    pkvm_oracle::Backing::GuestMemfd(vm) => self.vms.get(vm),
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
