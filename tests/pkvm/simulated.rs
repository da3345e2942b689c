//! The simulated machine, told to do a scenario's steps.

use std::collections::BTreeMap;

use gmem::addr;
use gmem::hyp::MemslotId;
use gmem::hyp::linux::{
    Alias, GuestAct as Act, Linux, MemoryId, PageKind, Place, Raised, Ran, Slot, SlotAccess,
    SlotLog, UserSignal, VcpuId, VcpuNumber, VmId, VmKind as Kind,
};
use pkvm_oracle::{
    Backing, Errno, GuestAct, HostAct, Ipa, MEM_SHARE, MEM_UNSHARE, Machine, Name, Observation,
    Size, SlotFlags, Step, VcpuName, VmKind,
};

#[derive(Debug)]
pub(crate) struct Simulated {
    linux: Linux,
    memories: BTreeMap<Name, (MemoryId, u64)>,
    vms: BTreeMap<Name, VmId>,
    slots: BTreeMap<(Name, u16), Slot>,
    vcpus: BTreeMap<VcpuName, VcpuId>,
    /// What a vCPU was told last.
    acts: BTreeMap<VcpuName, GuestAct>,
}

impl Simulated {
    pub(crate) fn boot() -> Self {
        Self {
            linux: Linux::boot().unwrap(),
            memories: BTreeMap::new(),
            vms: BTreeMap::new(),
            slots: BTreeMap::new(),
            vcpus: BTreeMap::new(),
            acts: BTreeMap::new(),
        }
    }

    pub(crate) fn check(&self) -> Vec<String> {
        self.linux.check()
    }

    fn do_step(&mut self, step: &Step) -> Result<Observation, gmem::error::Errno> {
        match step {
            Step::Memlock(pages) => self.linux.limit_locked(*pages),
            Step::Memory { name, backing, pages, size } => {
                let backing = match backing {
                    Backing::Anon => gmem::hyp::linux::Backing::Anonymous,
                    Backing::Shared => gmem::hyp::linux::Backing::Shared,
                    Backing::Memfd => gmem::hyp::linux::Backing::Memfd,
                    Backing::Hugetlb => gmem::hyp::linux::Backing::Hugetlb,
                    Backing::GuestMemfd(vm) => match self.vms.get(vm) {
                        Some(&vm) => gmem::hyp::linux::Backing::GuestMemfd(vm),
                        None => return Err(gmem::error::Errno::EBADF),
                    },
                };
                let kind = match size {
                    Size::Small => PageKind::Base,
                    Size::Huge => PageKind::Huge,
                };
                let memory = self.linux.map(backing, *pages, kind)?;
                self.memories.insert(name.clone(), (memory, *pages));
            }
            Step::Vm(name, kind) => {
                let kind = match kind {
                    VmKind::Protected => Kind::Protected,
                    VmKind::Plain => Kind::Plain,
                };
                let vm = self.linux.create_vm(kind);
                self.vms.insert(name.clone(), vm);
            }
            Step::Slot { vm, slot, ipa, pages, flags } => {
                let memory = self.memories.get(&pages.memory).filter(|(_, nr)| pages.end <= *nr);
                let Some(&(memory, _)) = memory else { return Ok(Observation::Nothing) };
                let new = Slot {
                    ipa: addr::Ipa::new(ipa.0),
                    memory,
                    first_page: pages.first,
                    nr_pages: pages.end - pages.first,
                    access: access(*flags),
                    log: if flags.log { SlotLog::Dirty } else { SlotLog::None },
                };
                return self.set_slot(vm, *slot, new);
            }
            Step::DeleteSlot(vm, slot) => {
                return self.change_slot(vm, *slot, |old| Slot { nr_pages: 0, ..old });
            }
            Step::MoveSlot(vm, slot, ipa) => {
                let ipa = addr::Ipa::new(ipa.0);
                return self.change_slot(vm, *slot, |old| Slot { ipa, ..old });
            }
            Step::Vcpu(name) => {
                let Some(&vm) = self.vms.get(&name.vm) else { return Ok(Observation::Nothing) };
                let vcpu = self.linux.create_vcpu(vm, VcpuNumber(name.index))?;
                self.vcpus.insert(name.clone(), vcpu);
            }
            Step::Guest(name, act) => return Ok(self.guest(name, *act)),
            Step::Host(act, place) => {
                let memory = self.memories.get(&place.memory).filter(|(_, nr)| place.page < *nr);
                let Some(&(memory, _)) = memory else { return Ok(Observation::Nothing) };
                let place = Place { memory, page: place.page, offset: place.offset };
                return self.host(*act, place);
            }
            Step::Locked => return Ok(Observation::Pages(self.linux.locked_pages())),
            // Pins of guests are in another count.
            Step::Pinned => return Ok(Observation::Pages(0)),
            Step::CloseVm(name) => match self.vms.remove(name) {
                Some(vm) => self.linux.close_vm(vm),
                None => return Ok(Observation::Nothing),
            },
            Step::CloseVcpu(name) => match self.vcpus.remove(name) {
                Some(vcpu) => self.linux.close_vcpu(vcpu),
                None => return Ok(Observation::Nothing),
            },
            Step::CloseVcpuFd(name) => match self.vcpus.get(name) {
                Some(&vcpu) => self.linux.close_vcpu_fd(vcpu),
                None => return Ok(Observation::Nothing),
            },
        }
        Ok(Observation::Ok)
    }

    fn set_slot(
        &mut self,
        vm: &Name,
        number: u16,
        new: Slot,
    ) -> Result<Observation, gmem::error::Errno> {
        let Some(&id) = self.vms.get(vm) else { return Ok(Observation::Nothing) };
        let slot = MemslotId::from_u16(number).ok_or(gmem::error::Errno::EINVAL)?;
        self.linux.set_slot(id, slot, new)?;
        let key = (vm.clone(), number);
        match new.nr_pages {
            0 => self.slots.remove(&key),
            _ => self.slots.insert(key, new),
        };
        Ok(Observation::Ok)
    }

    fn change_slot(
        &mut self,
        vm: &Name,
        number: u16,
        change: impl FnOnce(Slot) -> Slot,
    ) -> Result<Observation, gmem::error::Errno> {
        match self.slots.get(&(vm.clone(), number)).copied() {
            Some(old) => self.set_slot(vm, number, change(old)),
            None => Ok(Observation::Nothing),
        }
    }

    fn guest(&mut self, name: &VcpuName, act: GuestAct) -> Observation {
        let vcpu = self.vcpus.get(name).filter(|&&vcpu| self.linux.can_run(vcpu));
        let Some(&vcpu) = vcpu else { return Observation::Nothing };
        let told = match act {
            GuestAct::Load(at) => Some(Act::Load(ipa(at))),
            GuestAct::Store(at, byte) => Some(Act::Store(ipa(at), byte)),
            GuestAct::Execute(at) => Some(Act::Execute(ipa(at))),
            GuestAct::Share(at) => Some(Act::Call([MEM_SHARE, at.0, 0, 0])),
            GuestAct::Unshare(at) => Some(Act::Call([MEM_UNSHARE, at.0, 0, 0])),
            GuestAct::Hvc(x) => Some(Act::Call(x)),
            GuestAct::Resume => None,
        };
        let ran = self.linux.run(vcpu, told);
        if told.is_some() && ran != Ran::Stuck {
            self.acts.insert(name.clone(), act);
        }
        let act = self.acts.get(name).copied().unwrap_or(act);
        match ran {
            Ran::Done => Observation::Ok,
            Ran::Byte(byte) => Observation::Byte(byte),
            Ran::Registers(x) if matches!(act, GuestAct::Hvc(_)) => {
                Observation::Registers(x.map(|x| x as i64))
            }
            Ran::Registers(x) => Observation::Answer(x[0] as i64),
            Ran::MmioLoad(at) => Observation::MmioLoad(Ipa(at.get())),
            Ran::MmioStore(at, byte) => Observation::MmioStore(Ipa(at.get()), byte),
            Ran::Exception(syndrome) => Observation::Exception(syndrome),
            Ran::Failed(errno) => Observation::Run(Errno(errno.get())),
            Ran::Exit(reason) => Observation::Exit(reason),
            Ran::Spins => Observation::Spins,
            Ran::Stuck => Observation::Stuck,
            Ran::Idle => Observation::Idle,
            Ran::Nothing => Observation::Nothing,
        }
    }

    fn host(&mut self, act: HostAct, place: Place) -> Result<Observation, gmem::error::Errno> {
        let linux = &mut self.linux;
        Ok(match act {
            HostAct::Load => linux.load_u8(place).map_or_else(raised, Observation::Byte),
            HostAct::Store(byte) => {
                linux.store_u8(place, byte).map_or_else(raised, |()| Observation::Ok)
            }
            HostAct::ForkLoad => linux.fork_load_u8(place).map_or_else(raised, Observation::Byte),
            HostAct::Write => Observation::Byte(linux.copy_out_u8(place)?),
            HostAct::VmRead => Observation::Byte(linux.alias_load_u8(place, Alias::ProcessVm)?),
            HostAct::MemRead => Observation::Byte(linux.alias_load_u8(place, Alias::ProcMem)?),
            HostAct::Splice => Observation::Byte(linux.alias_load_u8(place, Alias::Splice)?),
            HostAct::Pin => ok(linux.hold(place)?),
            HostAct::FileRead | HostAct::SendFile => {
                Observation::Byte(linux.alias_load_u8(place, Alias::File)?)
            }
            HostAct::RingLoad => Observation::Byte(linux.alias_load_u8(place, Alias::Ring)?),
            HostAct::RingStore(byte) => ok(linux.alias_store_u8(place, Alias::Ring, byte)?),
            HostAct::DmaLoad => Observation::Byte(linux.device_load_u8(place)?),
            HostAct::DmaStore(byte) => ok(linux.device_store_u8(place, byte)?),
            HostAct::Read(byte) => ok(linux.copy_in_u8(place, byte)?),
            HostAct::VmWrite(byte) => ok(linux.alias_store_u8(place, Alias::ProcessVm, byte)?),
            HostAct::MemWrite(byte) => ok(linux.alias_store_u8(place, Alias::ProcMem, byte)?),
            HostAct::FileWrite(byte) => ok(linux.alias_store_u8(place, Alias::File, byte)?),
            HostAct::Discard => ok(linux.discard(place)?),
            HostAct::Punch => ok(linux.punch(place)?),
            HostAct::Unmap => {
                linux.unmap(place);
                Observation::Ok
            }
            HostAct::Protect => ok(linux.protect(place)?),
            HostAct::Lock => ok(linux.lock(place)?),
            HostAct::Unlock => ok(linux.unlock(place)?),
        })
    }
}

fn ok((): ()) -> Observation {
    Observation::Ok
}

fn ipa(at: Ipa) -> addr::Ipa {
    addr::Ipa::new(at.0)
}

fn access(flags: SlotFlags) -> SlotAccess {
    if flags.readonly { SlotAccess::ReadOnly } else { SlotAccess::ReadWrite }
}

fn raised(raised: Raised) -> Observation {
    let signal = match raised.signal {
        UserSignal::Segv => pkvm_oracle::Signal::Segv,
        UserSignal::Bus => pkvm_oracle::Signal::Bus,
    };
    Observation::Signal(signal, raised.code)
}

impl Machine for Simulated {
    fn step(&mut self, step: &Step) -> Observation {
        self.do_step(step).unwrap_or_else(|errno| Observation::Failed(Errno(errno.get())))
    }
}
