//! /dev/kvm, as far as scenarios need it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};

use pkvm_oracle::{Errno, Ipa, PAGE_SIZE, PROGRAM_SLOT, VmKind};

use crate::{fault, program, run_page::RunPage, sys};

// linux/kvm.h.
const CREATE_VM: u64 = 0xae01;
const GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const CREATE_VCPU: u64 = 0xae41;
const RUN: u64 = 0xae80;
const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const SET_USER_MEMORY_REGION2: u64 = 0x40a0_ae49;
const SET_ONE_REG: u64 = 0x4010_aeac;
const ARM_VCPU_INIT: u64 = 0x4020_aeae;
const ARM_PREFERRED_TARGET: u64 = 0x8020_aeaf;
const CREATE_GUEST_MEMFD: u64 = 0xc040_aed4;

const TYPE_PROTECTED: u64 = 1 << 31;
pub(crate) const SLOT_LOG: u32 = 1 << 0;
pub(crate) const SLOT_READONLY: u32 = 1 << 1;
const SLOT_GUEST_MEMFD: u32 = 1 << 2;
const GUEST_MEMFD_MMAP: u64 = 1 << 0;
const GUEST_MEMFD_INIT_SHARED: u64 = 1 << 1;
/// KVM_ARM_VCPU_PSCI_0_2.
const FEATURE_PSCI: u32 = 1 << 2;
/// A core register of 64 bits: regs.pc.
const REGISTER_PC: u64 = 0x6030_0000_0010_0040;

/// A guest that does not come back spins, when the alarm has interrupted it so often: for three
/// seconds. An ordinary step takes a millisecond under emulation. Interruptions are counted and no
/// clock is read, so that a machine that did not run for a while has not spun.
const PATIENCE: u32 = 6;

/// kvm_userspace_memory_region.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) ipa: u64,
    pub(crate) bytes: u64,
    pub(crate) host: u64,
}

/// kvm_userspace_memory_region2.
#[repr(C)]
struct Region2 {
    region: Region,
    offset: u64,
    fd: u32,
    pad1: u32,
    pad2: [u64; 14],
}

/// kvm_create_guest_memfd.
#[repr(C)]
struct CreateGuestMemfd {
    size: u64,
    flags: u64,
    reserved: [u64; 6],
}

/// kvm_vcpu_init.
#[repr(C)]
#[derive(Default)]
struct VcpuInit {
    target: u32,
    features: [u32; 7],
}

/// kvm_one_reg.
#[repr(C)]
struct OneReg {
    id: u64,
    address: u64,
}

pub(crate) fn open() -> Result<File, Errno> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.map_err(|error| sys::errno_of(&error))
}

#[derive(Debug)]
pub(crate) struct Vm {
    kvm: File,
    fd: OwnedFd,
    /// The program's page, once there is one.
    program: Option<*mut u8>,
}

impl Vm {
    pub(crate) fn new(kind: VmKind) -> Result<Self, Errno> {
        let kvm = open()?;
        let kind = if kind == VmKind::Protected { TYPE_PROTECTED } else { 0 };
        let fd = sys::ioctl_fd(&kvm, CREATE_VM, kind)?;
        Ok(Self { kvm, fd, program: None })
    }

    pub(crate) fn set_region(&self, mut region: Region) -> Result<(), Errno> {
        sys::ioctl_struct(&self.fd, SET_USER_MEMORY_REGION, &mut region).map(drop)
    }

    /// Backed by a guest_memfd, from this offset on.
    pub(crate) fn set_guest_memfd(
        &self,
        mut region: Region,
        fd: &OwnedFd,
        offset: u64,
    ) -> Result<(), Errno> {
        region.flags |= SLOT_GUEST_MEMFD;
        let fd = u32::try_from(fd.as_raw_fd()).map_err(|_| Errno(libc::EBADF))?;
        let mut region = Region2 { region, offset, fd, pad1: 0, pad2: [0; 14] };
        sys::ioctl_struct(&self.fd, SET_USER_MEMORY_REGION2, &mut region).map(drop)
    }

    pub(crate) fn guest_memfd(&self, bytes: u64) -> Result<OwnedFd, Errno> {
        let flags = GUEST_MEMFD_MMAP | GUEST_MEMFD_INIT_SHARED;
        let mut args = CreateGuestMemfd { size: bytes, flags, reserved: [0; 6] };
        sys::ioctl_struct_fd(&self.fd, CREATE_GUEST_MEMFD, &mut args)
    }

    /// A vCPU that will start at the program.
    pub(crate) fn vcpu(&mut self, index: u8) -> Result<Vcpu, Errno> {
        self.bring_program()?;
        let fd = sys::ioctl_fd(&self.fd, CREATE_VCPU, u64::from(index))?;
        let mut init = VcpuInit::default();
        sys::ioctl_struct(&self.fd, ARM_PREFERRED_TARGET, &mut init)?;
        init.features[0] |= FEATURE_PSCI;
        sys::ioctl_struct(&fd, ARM_VCPU_INIT, &mut init)?;
        let pc = program::AT;
        let mut register = OneReg { id: REGISTER_PC, address: (&raw const pc).addr() as u64 };
        sys::ioctl_struct(&fd, SET_ONE_REG, &mut register)?;
        let bytes = sys::ioctl_number(&self.kvm, GET_VCPU_MMAP_SIZE, 0)?;
        let bytes = usize::try_from(bytes).map_err(|_| Errno(libc::EINVAL))?;
        let run = RunPage::map(&fd, bytes)?;
        Ok(Vcpu { fd: Some(fd), run: Some(run) })
    }

    fn bring_program(&mut self) -> Result<(), Errno> {
        if self.program.is_some() {
            return Ok(());
        }
        let bytes = PAGE_SIZE as usize;
        // Shared, so that a fork does not copy it, which would take it from the guest.
        let page = sys::map(bytes, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?;
        for (at, word) in program::words() {
            for (byte, value) in word.to_le_bytes().into_iter().enumerate() {
                fault::store(page.wrapping_add(at * 4 + byte), value);
            }
        }
        self.set_region(Region {
            slot: u32::from(PROGRAM_SLOT),
            flags: 0,
            ipa: program::AT,
            bytes: PAGE_SIZE,
            host: page.addr() as u64,
        })?;
        // Never unmapped: it lives as long as the process.
        self.program = Some(page);
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: Option<OwnedFd>,
    run: Option<RunPage>,
}

/// Why a guest stopped.
pub(crate) enum Stop {
    /// It answered: x0 to x3.
    Answer([u64; 4]),
    /// It took an exception, with this syndrome.
    Exception(u64),
    /// KVM_RUN failed.
    Failed(Errno),
    /// KVM_RUN ended, for a reason that is none of ours.
    Exit(u32),
    /// KVM_RUN did not end by itself.
    Spins,
}

/// An access that left the guest elsewhere than at the command.
#[derive(Clone, Copy)]
pub(crate) enum Stray {
    Load(Ipa),
    Store(Ipa, u8),
}

impl Vcpu {
    pub(crate) fn is_whole(&self) -> bool {
        self.fd.is_some() && self.run.is_some()
    }

    pub(crate) fn close_fd(&mut self) {
        self.fd = None;
    }

    pub(crate) fn close(&mut self) {
        if let Some(run) = self.run.take() {
            run.unmap();
        }
        self.fd = None;
    }

    /// Runs the guest until it answers, or cannot. The first stray access is kept.
    pub(crate) fn run(&mut self, command: &[u64; program::NR_WORDS]) -> (Stop, Option<Stray>) {
        let (Some(fd), Some(run)) = (&self.fd, &self.run) else {
            return (Stop::Failed(Errno(libc::EBADF)), None);
        };
        let mut nr_interrupted = 0;
        let mut answer = [0; 4];
        let mut stray = None;
        loop {
            match sys::ioctl_number(fd, RUN, 0) {
                Ok(_) => {}
                Err(Errno(libc::EINTR)) if nr_interrupted < PATIENCE => {
                    nr_interrupted += 1;
                    continue;
                }
                Err(Errno(libc::EINTR)) => return (Stop::Spins, stray),
                Err(errno) => return (Stop::Failed(errno), stray),
            }
            let Some(mmio) = run.mmio() else { return (Stop::Exit(run.reason()), stray) };
            let offset = mmio.ipa.wrapping_sub(program::COMMAND);
            match (offset < program::COMMAND_BYTES, mmio.stored) {
                (true, None) => {
                    let word = command.get(offset as usize / 8).copied().unwrap_or(0);
                    run.answer_load(word);
                }
                (true, Some(value)) if mmio.ipa == program::EXCEPTION => {
                    return (Stop::Exception(value), stray);
                }
                (true, Some(value)) => {
                    let register = mmio.ipa.wrapping_sub(program::ANSWER) as usize / 8;
                    if let Some(slot) = answer.get_mut(register) {
                        *slot = value;
                    }
                    if register == 0 {
                        return (Stop::Answer(answer), stray);
                    }
                }
                (false, None) => {
                    run.answer_load(0);
                    stray.get_or_insert(Stray::Load(Ipa(mmio.ipa)));
                }
                (false, Some(value)) => {
                    stray.get_or_insert(Stray::Store(Ipa(mmio.ipa), value as u8));
                }
            }
        }
    }
}
