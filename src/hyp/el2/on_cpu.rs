//! Who makes a call: a CPU by its number, which is locked for as long as the call needs it; or a thread that is a CPU
//! for a while, as a real CPU is always, and pays for that once.

use super::El2;
use super::vm::{Cpu, Loaded};
use crate::error::Errno;

/// A CPU, as a call knows it.
#[derive(Debug)]
pub(crate) enum OnCpu<'a> {
    Number(usize),
    #[cfg_attr(
        not(any(test, feature = "oracle")),
        expect(dead_code, reason = "hyp/pkvm calls by number")
    )]
    Entered {
        nr: usize,
        cpu: &'a mut Cpu,
    },
}

impl El2 {
    /// Does something with the CPU and its number.
    ///
    /// # Errors
    /// `EINVAL` for a CPU that the machine has not; what `act` says.
    #[inline]
    pub(super) fn with_cpu<T>(
        &self,
        on: &mut OnCpu<'_>,
        act: impl FnOnce(&mut Cpu, usize) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match on {
            OnCpu::Number(nr) => act(&mut *self.cpu(*nr).ok_or(Errno::EINVAL)?, *nr),
            OnCpu::Entered { nr, cpu } => act(cpu, *nr),
        }
    }

    /// Does something with the vCPU that a CPU has loaded.
    ///
    /// # Errors
    /// `EINVAL` if it has none; what `act` says.
    #[inline]
    pub(super) fn with_vcpu_on<T>(
        &self,
        on: &mut OnCpu<'_>,
        act: impl FnOnce(&mut Loaded) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.with_cpu(on, |cpu, _| act(cpu.loaded.as_mut().ok_or(Errno::EINVAL)?))
    }
}
