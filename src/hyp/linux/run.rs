//! What the guest does, and how `KVM_RUN` ends.

use super::fault::Resolved;
use super::kvm::{VcpuId, VmKind};
use super::smccc::{Answer, call_of};
use super::{CPU, Linux, PROGRAM};
use crate::addr::{Access, Ipa};
use crate::error::Errno;
use crate::hyp::el2::{Bytes, GuestAnswer, GuestStop, HostCall};

/// What a guest is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestAct {
    /// Loads a byte.
    Load(Ipa),
    /// Stores a byte.
    Store(Ipa, u8),
    /// Branches there, and expects to come back.
    Execute(Ipa),
    /// `hvc #0` with `x0` to `x3`.
    Call([u64; 4]),
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ran {
    /// The guest has done it.
    Done,
    /// It loaded this.
    Byte(u8),
    /// What a hypercall left in `x0` to `x3`.
    Registers([u64; 4]),
    /// The guest's load went to the VMM, which answered with 0.
    MmioLoad(Ipa),
    /// The guest's store went to the VMM.
    MmioStore(Ipa, u8),
    /// The guest took an exception with this `ESR_EL1`.
    Exception(u64),
    /// `KVM_RUN` failed, and the vCPU is still at that instruction.
    Failed(Errno),
    /// `KVM_RUN` ended for this other reason.
    Exit(u32),
    /// `KVM_RUN` does not return.
    Spins,
    /// The vCPU is still at an instruction that did not end, and was not run.
    Stuck,
    /// There was nothing to resume.
    Idle,
    /// The vCPU is not there, or not any more.
    Nothing,
}

/// What became of an access.
enum Touched {
    Done,
    Vmm,
    Beyond,
}

// ESR_EL1: the class, an instruction of 32 bits, and the fault.
const DATA_ABORT: u64 = 0x9600_0000;
const INSTRUCTION_ABORT: u64 = 0x8600_0000;
const PC_ALIGNMENT: u64 = 0x8a00_0000;
const UNKNOWN: u64 = 0x0200_0000;
const EXTERNAL: u64 = 0x10;
const BY_A_STORE: u64 = 0x40;
/// `ret`.
const RETURN: u32 = 0xd65f_03c0;
/// `b .`
const LOOP: u32 = 0x1400_0000;
/// How often a fault may be resolved for one access before it is called endless.
const MAX_FAULTS: usize = 16;

impl Linux {
    /// `KVM_RUN` until the guest has done it, or `None` until it has done what it is at.
    pub fn run(&mut self, vcpu: VcpuId, act: Option<GuestAct>) -> Ran {
        if !self.can_run(vcpu) {
            return Ran::Nothing;
        }
        let act = match (act, self.vcpus[vcpu.0].at) {
            (None, None) => return Ran::Idle,
            (Some(_), Some(_)) => return Ran::Stuck,
            (Some(act), None) | (None, Some(act)) => act,
        };
        self.vcpus[vcpu.0].at = Some(act);
        let ran = self.run_loaded(vcpu, act).unwrap_or_else(Ran::Failed);
        if !matches!(ran, Ran::Failed(_) | Ran::Exit(_) | Ran::Spins) {
            self.vcpus[vcpu.0].at = None;
        }
        ran
    }

    fn run_loaded(&mut self, vcpu: VcpuId, act: GuestAct) -> Result<Ran, Errno> {
        let vm = self.vcpus[vcpu.0].vm;
        let made = self.make_vm(vm)?;
        let host_at = self.make_vcpu(vcpu, made)?;
        let idx = self.el2.host_struct(host_at).lock().vcpu_idx;
        self.el2.call(CPU, HostCall::VcpuLoad, [made.handle, idx, 0, 0])?;
        let ran = self
            .el2
            .call(CPU, HostCall::VcpuRun, [host_at, 0, 0, 0])
            .and_then(|_| self.run_program(vcpu, act));
        self.el2.call(CPU, HostCall::VcpuPut, [0; 4])?;
        ran
    }

    fn run_program(&mut self, vcpu: VcpuId, act: GuestAct) -> Result<Ran, Errno> {
        // What the guest runs all the time is the first thing that it must have.
        self.touch(vcpu, PROGRAM, &mut Bytes::Load(&mut [0]))?;
        match act {
            GuestAct::Load(at) => {
                let mut byte = [0];
                Ok(match self.touch(vcpu, at, &mut Bytes::Load(&mut byte))? {
                    Touched::Done => Ran::Byte(byte[0]),
                    Touched::Vmm => Ran::MmioLoad(at),
                    Touched::Beyond => Ran::Exception(DATA_ABORT),
                })
            }
            GuestAct::Store(at, byte) => {
                Ok(match self.touch(vcpu, at, &mut Bytes::Store(&[byte]))? {
                    Touched::Done => Ran::Done,
                    Touched::Vmm => Ran::MmioStore(at, byte),
                    Touched::Beyond => Ran::Exception(DATA_ABORT | BY_A_STORE),
                })
            }
            GuestAct::Execute(at) => self.execute(vcpu, at),
            GuestAct::Call(x) => self.call(vcpu, x),
        }
    }

    fn execute(&mut self, vcpu: VcpuId, at: Ipa) -> Result<Ran, Errno> {
        let mut word = [0; 4];
        if at.get() % word.len() as u64 != 0 {
            return Ok(Ran::Exception(PC_ALIGNMENT));
        }
        Ok(match self.touch(vcpu, at, &mut Bytes::Load(&mut word))? {
            Touched::Vmm => Ran::Exception(INSTRUCTION_ABORT | EXTERNAL),
            Touched::Beyond => Ran::Exception(INSTRUCTION_ABORT),
            Touched::Done => match u32::from_le_bytes(word) {
                RETURN => Ran::Done,
                LOOP => Ran::Spins,
                _ => Ran::Exception(UNKNOWN),
            },
        })
    }

    fn call(&mut self, vcpu: VcpuId, x: [u64; 4]) -> Result<Ran, Errno> {
        let kind = self.vms[self.vcpus[vcpu.0].vm.0].kind;
        for _ in 0..MAX_FAULTS {
            let fault = match self.el2.guest_call(CPU, x)? {
                GuestAnswer::Resume(x) => return Ok(Ran::Registers(x)),
                GuestAnswer::Exit(x) => {
                    return Ok(match call_of(x, kind == VmKind::Protected) {
                        Answer::Registers(x) => Ran::Registers(x),
                        Answer::Event => Ran::Exit(super::smccc::SYSTEM_EVENT),
                        Answer::Off => Ran::Spins,
                    });
                }
                // This kernel gives single pages, so there is nothing to split.
                GuestAnswer::WantsSplit(_) => return Err(Errno::E2BIG),
                // And a guest that shares no block needs no more tables of the host's than it had.
                GuestAnswer::WantsMemory => return Err(Errno::ENOMEM),
                GuestAnswer::Fault(fault) => fault,
            };
            match self.resolve(vcpu, fault, Access::Write)? {
                Resolved::Again => {}
                // There is no instruction that the VMM could stand in for.
                Resolved::Vmm => return Ok(Ran::Exception(DATA_ABORT | EXTERNAL)),
                Resolved::Beyond => return Ok(Ran::Exception(DATA_ABORT)),
            }
        }
        Ok(Ran::Spins)
    }

    /// An access of the guest's; faults are resolved on the way.
    fn touch(&mut self, vcpu: VcpuId, at: Ipa, bytes: &mut Bytes<'_>) -> Result<Touched, Errno> {
        let access = bytes.access();
        for _ in 0..MAX_FAULTS {
            let fault = match self.el2.vcpu(CPU, at, bytes.again()) {
                Ok(()) => return Ok(Touched::Done),
                Err(GuestStop::Fault(fault)) => fault,
                Err(GuestStop::Invalid) => return Err(Errno::EINVAL),
                Err(GuestStop::Broken) => return Err(Errno::EIO),
            };
            match self.resolve(vcpu, fault, access)? {
                Resolved::Again => {}
                Resolved::Vmm => return Ok(Touched::Vmm),
                Resolved::Beyond => return Ok(Touched::Beyond),
            }
        }
        Err(Errno::EAGAIN)
    }
}
